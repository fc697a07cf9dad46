"""Build the bundled protein sample: train, validation and test FASTA files that share no homologs.

Run from the repository root (about 25 minutes on two cores):

    apt-get install mmseqs2 mmseqs2-examples
    python scripts/build_sample.py
    python scripts/build_sample.py --output /tmp/again     # writes identical files

1. Cluster at 50% identity and 80% target coverage, as UniRef50 does, and keep the representatives.
2. Search all representatives against each other (any identity, any coverage) and join the hits into
   connected components. Clustering alone leaks: many representatives have homologs below its thresholds.
3. Assign whole components, in the order of a seeded hash, to validation and test until each has 5% of the
   sequences. The other components, and every component with more than 1% of the sequences, go to train.
4. Search the finished splits against each other again, in both directions. Drop the held-out sequences
   that have a hit, and repeat until a round finds none. This finds more than step 2, because a hit in a
   smaller file has a smaller E-value. A sequence that is part of another one counts as a hit as well.
"""

import argparse
import gzip
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from statistics import mean, median

DEBIAN_INPUT = Path("/usr/share/doc/mmseqs2/example-data/DB.fasta.gz")
LETTERS = set("ACDEFGHIKLMNPQRSTVWYXBZJUO")
# splits to search against each other; sequences with a hit are dropped from the first split of a pair
CHECKS = (("validation", "train"), ("test", "train"), ("test", "validation"))
# fractions of all sequences: size of a held-out split, and maximum size of a component in a held-out split
HELD_OUT, LARGEST = 0.05, 0.01
CLUSTER = ["--min-seq-id", "0.5", "-c", "0.8", "--cov-mode", "1"]
SEARCH = ["-s", "7.5", "-e", "1e-3", "--alignment-mode", "3"]  # mode 3 computes identities exactly


def read_fasta(path: Path) -> list[tuple[str, str]]:
    """Return (header, sequence) of each record. If a record is invalid, exit with a message that names the record."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as lines:
            before, *blocks = f"\n{lines.read()}".split("\n>")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        sys.exit(f"build_sample: cannot read {path} as gzipped FASTA: {error}")
    if before.strip() or not blocks:
        sys.exit(f"build_sample: {path} is not FASTA: it must start with '>'")
    parts = (block.partition("\n") for block in blocks)
    records = [(header.strip(), "".join(body.split())) for header, _, body in parts]
    seen = {""}
    for number, (header, sequence) in enumerate(records, 1):
        name = (header.split() or [""])[0]
        if name in seen or not sequence:
            sys.exit(f"build_sample: record {number} ({name}): the id is missing or repeated, or the sequence is empty")
        seen.add(name)
        for position, letter in enumerate(sequence, 1):
            if letter not in LETTERS:
                sys.exit(f"build_sample: record {name}: {letter!r} at position {position} is not a residue letter")
    return records


class Mmseqs:
    """Runs the mmseqs binary in a scratch folder. In the files for mmseqs, record numbers replace the headers."""

    def __init__(self, scratch: str, records: list[tuple[str, str]]) -> None:
        self.scratch, self.records = Path(scratch), records

    def call(self, *arguments: str, result: str) -> list[list[str]]:
        done = subprocess.run(["mmseqs", *arguments], cwd=self.scratch, text=True, capture_output=True)
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
            sys.exit(f"build_sample: mmseqs {arguments[0]} failed ({done.returncode}): {lines[-1]}")
        return [row.split("\t") for row in (self.scratch / result).read_text().splitlines()]

    def write(self, name: str, members: Iterable[int]) -> str:
        (self.scratch / name).write_text("".join(f">{i}\n{self.records[i][1]}\n" for i in sorted(members)))
        return name

    def hits(self, queries: set[int], targets: set[int]) -> list[tuple[int, int, float]]:
        """Return (query, target, identity) of all hits of a search. --max-seqs allows hits to every target."""
        files = [self.write("queries", queries), self.write("targets", targets), "hits", "tmp"]
        columns = ["--format-output", "query,target,fident", "--max-seqs", str(len(targets) + 1)]
        rows = self.call("easy-search", *files, *SEARCH, *columns, result="hits")
        return [(int(query), int(target), float(identity)) for query, target, identity in rows]


def in_hash_order(members: Iterable[int], records: list[tuple[str, str]], salt: str) -> list[int]:
    """Return the members in an order that depends only on their ids and the salt."""
    return sorted(members, key=lambda i: sha256(f"{salt} {records[i][0].split()[0]}".encode()).digest())


def find_components(members: set[int], hits: list[tuple[int, int, float]]) -> dict[int, set[int]]:
    """Return the connected component of each member; members of a component share one set object."""
    component = {i: {i} for i in members}
    for query, target, _ in hits:
        small, large = sorted((component[query], component[target]), key=len)
        if small is not large:
            large |= small
            component.update(dict.fromkeys(small, large))
    return component


def verify(splits: dict[str, set[int]], mmseqs: Mmseqs) -> list[str]:
    """Do step 4: remove the held-out sequences that have hits, in place, and return a Markdown table of the hits."""
    table = ["| pairs with a hit (sequences dropped) |", "|:--|", *(f"| {a} and {b} |" for a, b in CHECKS)]
    found = -1
    while found:
        table[:2], found = [f"{table[0]} round {table[1].count('|') - 1} |", f"{table[1]}--:|"], 0
        for row, (held, other) in enumerate(CHECKS, 2):
            a, b = splits[held], splits[other]
            if not a or not b:
                sys.exit(f"build_sample: no sequences left for {held} or {other}: the input is too small")
            pairs = {(i, j) for i, j, _ in mmseqs.hits(a, b)} | {(i, j) for j, i, _ in mmseqs.hits(b, a)}
            text = {i: mmseqs.records[i][1] for i in a | b}
            pairs |= {(i, j) for i in a for j in b if text[i] in text[j] or text[j] in text[i]}
            splits[held] = a - {i for i, _ in pairs}
            table[row] += f" {len(pairs)} ({len(a) - len(splits[held])}) |"
            found += len(pairs)
    return table


def write_fasta(path: Path, records: list[tuple[str, str]]) -> None:
    """Write gzipped FASTA, wrapped at 60 columns and sorted by id, without a name or time in the gzip header."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as out:
        for header, sequence in sorted(records, key=lambda record: record[0].split()[0]):
            lines = [f">{header}", *(sequence[i : i + 60] for i in range(0, len(sequence), 60)), ""]
            out.write("\n".join(lines).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--input", type=Path, default=DEBIAN_INPUT, help="gzipped FASTA file\n(%(default)s)")
    parser.add_argument("--output", type=Path, default="protlig_dd/data/sample", help="output folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of step 3 (%(default)s)")
    args = parser.parse_args()
    if not shutil.which("mmseqs") or not args.input.is_file():
        missing = f"file {args.input}" if shutil.which("mmseqs") else "mmseqs on the PATH"
        sys.exit(f"build_sample: {missing} not found; on Debian or Ubuntu: apt-get install mmseqs2 mmseqs2-examples")
    records = read_fasta(args.input)
    with tempfile.TemporaryDirectory(prefix="build_sample-") as scratch:
        mmseqs = Mmseqs(scratch, records)
        files = [mmseqs.write("all", range(len(records))), "c", "tmp"]
        kept = {int(row[0]) for row in mmseqs.call("easy-cluster", *files, *CLUSTER, result="c_cluster.tsv")}
        hits = mmseqs.hits(kept, kept)
        component, limit = find_components(kept, hits), max(1, int(LARGEST * len(kept)))
        starts = in_hash_order({min(group) for group in component.values()}, records, f"split {args.seed}")
        splits: dict[str, set[int]] = {"train": set(), "validation": set(), "test": set()}
        for group in (component[start] for start in starts):
            short = [split for split in ("validation", "test") if len(splits[split]) < HELD_OUT * len(kept)]
            splits[short[0] if short and len(group) <= limit else "train"] |= group
        checks = verify(splits, mmseqs)
    out = set(in_hash_order(kept, records, f"leak {args.seed}")[: round(HELD_OUT * len(kept))])
    leaks = [(a, same) for i, j, same in hits for a, b in ((i, j), (j, i)) if a in out and b not in out]
    heads = "| split | sequences | residues | mean length | median | min | max | components |"
    table = [heads, "|:--" + 7 * "|--:" + "|"]
    for split, members in splits.items():
        n, groups = [len(records[i][1]) for i in members], {min(component[i]) for i in members}
        cells = f"{len(n):,} | {sum(n):,} | {mean(n):.1f} | {median(n):g} | {min(n)} | {max(n):,}"
        table.append(f"| {split} | {cells} | {len(groups):,} |")
    sizes = sorted(len(component[start]) for start in starts)
    any_hit, close = len({i for i, _ in leaks}), len({i for i, same in leaks if same >= 0.5})
    tables = "\n".join([*table, "", *checks])
    facts = f"""{tables}

Clustering kept {len(kept):,} of {len(records):,} proteins. They form {len(sizes):,} components (step 2 below);
{sum(size > limit for size in sizes)} have more than {limit} sequences, and the largest has {sizes[-1]:,}.

Clustering alone would leak: of {len(out)} representatives held out at random, {any_hit} have a hit among
the other representatives, and {close} have a hit with at least 50% identity over the aligned region."""
    debian = subprocess.getoutput("dpkg-query -Wf '${Version}' mmseqs2-examples 2>/dev/null || echo ?")
    readme = f"""# Protein sample

Real proteins for tests and short training runs. `mmseqs` finds no homologs between the splits.
Step 2 below explains the components of the first table, and step 4 the hits and rounds of the second.

{facts}

**Origin.** UniProt, through `{DEBIAN_INPUT}` of the Debian package
mmseqs2-examples {debian}, SHA-256 `{sha256(args.input.read_bytes()).hexdigest()}`.

**Licence.** UniProt, by the UniProt Consortium (https://www.uniprot.org), under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/). Changes: a subset, split, sorted by id and wrapped.

**Made by** `python scripts/build_sample.py --seed {args.seed}` with mmseqs {subprocess.getoutput("mmseqs version")}:
`easy-cluster {" ".join(CLUSTER)}` in step 1, `easy-search {" ".join(SEARCH)}` in steps 2 and 4.

{__doc__[__doc__.index("1. ") :]}"""
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=args.output) as unfinished:
        for split, members in splits.items():
            write_fasta(Path(unfinished, f"{split}.fasta.gz"), [records[i] for i in members])
        Path(unfinished, "README.md").write_text(readme)
        for path in Path(unfinished).iterdir():
            path.replace(args.output / path.name)
    print(facts)


if __name__ == "__main__":
    main()
