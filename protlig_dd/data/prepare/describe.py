"""Print summaries of a store."""

import itertools
import json
from typing import Any

from protlig_dd.data.encode import nucleotide_warning
from protlig_dd.data.members import Members
from protlig_dd.data.prepare.output import manifest_path
from protlig_dd.data.store import SPLITS, SequenceStore
from protlig_dd.system.terminal import ByteBar, console
from protlig_dd.tokenizer import ProteinTokenizer

PLOT_ROWS, PLOT_WIDTH = 20, 50
SHOWN_RECORDS = 3


def describe(store: SequenceStore) -> None:
    """Print what the store contains and what was dropped from the input."""
    manifest = store.manifest
    residues = sum(split["residues"] for split in manifest["splits"].values())
    console.print(f"{store.path}: {len(store):,} sequences, {residues:,} residues")
    for name in SPLITS:
        split = manifest["splits"][name]
        console.print(f"  {name:<10} {split['sequences']:,} sequences, {split['residues']:,} residues")
    dropped = {name: count for name, count in manifest["dropped"].items() if count}
    if dropped:
        console.print("dropped " + ", ".join(f"{count:,} by {name}" for name, count in dropped.items()))
    for shared in manifest.get("shared", ()):  # missing in manifests of earlier versions
        pairs = ", ".join(f"{id_} = {earlier_id}" for id_, earlier_id in shared["first"])
        more = ", ..." if shared["sequences"] > len(shared["first"]) else ""
        kept = "both" if manifest["options"]["filters"]["duplicates"] else f"{shared['in']} only"
        console.print(
            f"warning: {shared['sequences']:,} sequences of {shared['of']} are also in {shared['in']} and are kept in "
            f"{kept}: {pairs}{more}"
        )
    if manifest["lower_case_letters"]:
        console.print(f"{manifest['lower_case_letters']:,} lower-case letters are stored like upper-case letters")
    if case := manifest.get("case"):  # missing if no record has both cases
        console.print(
            f"{case['sequences']:,} sequences have upper-case and lower-case letters; the store keeps the case, which "
            "can mark context (data.context=lower or upper)"
        )
        for context, found in case["only_context"].items():
            if found["sequences"]:
                console.print(
                    f"warning: data.context={context} would be an error: all amino acids of {found['sequences']:,} "
                    f"sequences are {context}-case letters: {', '.join(found['first'])}"
                    + (", ..." if found["sequences"] > len(found["first"]) else "")
                )
    if repeats := manifest.get("repeated_in_other_case"):
        kept = "both are kept" if manifest["options"]["filters"]["duplicates"] else "only the earlier one is kept"
        console.print(f"warning: {repeats:,} sequences differ from an earlier one only in the case of letters; {kept}")
    if found := manifest.get("nucleotide_like"):  # missing in manifests of earlier versions
        console.print(nucleotide_warning(found, manifest["records"], "the input"))
    if (check := manifest["split_check"]) is not None:
        hits = ", ".join(f"{check['hits'][name]:,} of {check['searched'][name]:,} {name}" for name in check["hits"])
        action = "moved to train" if check["on_hit"] == "move" else "dropped"
        console.print(
            f"held-out sequences similar to a training sequence (>= {check['identity']:.0%} identity over >= "
            f"{check['coverage']:.0%} of at least one of the two sequences): {hits}; {action}; "
            f"number of searches: {check['rounds']}"
        )


def inspect(store: SequenceStore) -> None:
    """Print the manifest, a plot of the lengths and the first records, then verify all checksums.

    Raises:
        ValueError: the store is damaged. The message names the dataset.
    """
    shown = {key: value for key, value in store.manifest.items() if key not in ("splits", "length_bin")}
    path = manifest_path(store.path)
    if path.is_file():
        try:
            manifest = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        if manifest.get("fingerprint") == store.fingerprint:
            shown |= {key: manifest[key] for key in ("created", "seconds", "software")}
    console.print_json(json.dumps(shown | {"fingerprint": store.fingerprint}), indent=1)
    describe(store)
    console.print("\n".join(length_plot(store.manifest)))
    decode = ProteinTokenizer().decode
    for row in range(min(SHOWN_RECORDS, len(store))):
        sequence = decode(store[row])
        if (lower := store.lower_case(row)) is not None:
            sequence = "".join(x.lower() if low else x for x, low in zip(sequence, lower.tolist(), strict=True))
        more = f"... {len(sequence):,} residues" if len(sequence) > 60 else ""
        console.print(f">{store.header(row)}\n{sequence[:60]}{more}")
    with ByteBar("verifying", store.nbytes) as bar:
        store.verify(bar.advance)
    console.print(f"{store.path}: all checksums match")


def length_plot(manifest: dict[str, Any]) -> list[str]:
    """Return the lines of a text histogram of all lengths, with at most PLOT_ROWS rows.

    If more rows are needed, the last row counts all longer sequences.
    """
    width = manifest["length_bin"]
    splits = [split["lengths"] for split in manifest["splits"].values()]
    counts = [sum(column) for column in itertools.zip_longest(*splits, fillvalue=0)]
    if len(counts) > PLOT_ROWS:
        counts = [*counts[: PLOT_ROWS - 1], sum(counts[PLOT_ROWS - 1 :])]
    lines = ["residues      sequences"]
    for i, count in enumerate(counts):
        last = i == PLOT_ROWS - 1
        bounds = f"{i * width:>5}+    " if last else f"{i * width:>5}-{(i + 1) * width - 1:<5}"
        lines.append(f"{bounds} {count:>11,} {'█' * round(PLOT_WIDTH * count / max(counts))}")
    return lines


def describe_members(members: Members) -> None:
    """Print what a file of members contains, and which lines of its table were not used."""
    found, sizes = members.manifest, members.manifest["members_per_cluster"]
    console.print(
        f"{members.path}: {found['clusters']:,} clusters with {found['members']:,} members; members per cluster: mean "
        f"{sizes['mean']:,.2f}, median {sizes['median']:,.0f}, largest {sizes['max']:,}"
    )
    if empty := found["clusters_without_members"]:
        console.print(f"{empty:,} clusters have no member: training reads their representatives")
    for name, store in (("clusters", found["clusters_store"]), ("members", found["members_store"])):
        if count := (unknown := found["unknown"][name])["lines"]:
            console.print(
                f"{count:,} of {found['lines']:,} lines of the table were not used, because the id of the "
                f"{name.removesuffix('s')} is not in {store}; the first is {unknown['first']}"
            )
    if repeated := found["duplicate_lines"]:
        console.print(f"{repeated:,} lines repeat an earlier line")


def inspect_members(members: Members) -> None:
    """Print the manifest of a file of members and a description, then verify all checksums.

    Raises:
        ValueError: the file is damaged. The message names the dataset.
    """
    identity = {
        "clusters_fingerprint": members.clusters_fingerprint,
        "members_fingerprint": members.store_fingerprint,
        "store": str(members.store_path),
        "fingerprint": members.fingerprint,
    }
    console.print_json(json.dumps(members.manifest | identity), indent=1)
    describe_members(members)
    members.verify()
    console.print(f"{members.path}: all checksums match")
