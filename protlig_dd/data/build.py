"""From FASTA files to a store: which sequence goes to which split, and the bundled sample."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.data.store import SPLITS, SequenceStore, write_store

SAMPLE_FOLDER = Path(__file__).resolve().parent / "sample"


def build_store(
    inputs: Mapping[str, Path] | Iterable[Path],
    output: Path,
    *,
    validation_fraction: float = 0.0,
    test_fraction: float = 0.0,
) -> SequenceStore:
    """Read FASTA files into a new store.

    Args:
        inputs: {split: file}, or files whose sequences are split by a hash of their id.
        validation_fraction, test_fraction: expected shares of the hashed split; it does not change when other
            sequences are added. Sequences similar to one another may fall on both sides.

    Raises:
        ValueError: naming file, record and position of whatever cannot be read; an output that exists.
    """
    if output.exists():
        raise ValueError(f"{output} exists already; give another output or move it away")
    named = inputs if isinstance(inputs, Mapping) else {}
    files = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
    for split in named:
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}; the splits are {', '.join(SPLITS)}")
    if min(validation_fraction, test_fraction) < 0 or validation_fraction + test_fraction >= 1:
        raise ValueError(
            f"validation_fraction={validation_fraction} and test_fraction={test_fraction} must leave some to train on"
        )
    source = {
        "files": [{"name": file.name, "sha256": sha256(file)} for file in files],
        "splits": list(named) or {"validation": validation_fraction, "test": test_fraction},
    }

    def records() -> Iterator[tuple[FastaRecord, str]]:
        for split, file in named.items() or ((None, file) for file in files):
            for record in read_fasta(file):
                yield record, split or hashed_split(record.id, validation_fraction, test_fraction)

    return write_store(output, records(), source)


def hashed_split(id_: str, validation_fraction: float, test_fraction: float) -> str:
    """The split of an id: a keyed hash, so that it depends on nothing but the id and the fractions."""
    digest = hashlib.blake2b(id_.encode(), digest_size=8, key=b"protlig_dd split").digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


def bundled_store(folder: Path = Path("data")) -> SequenceStore:
    """The store of the bundled sample, built in `folder` when it is not there yet; named after its contents."""
    inputs = {split: SAMPLE_FOLDER / f"{split}.fasta.gz" for split in SPLITS}
    digest = hashlib.sha256("".join(sha256(file) for file in inputs.values()).encode()).hexdigest()
    path = folder / f"sample-{digest[:8]}.h5"
    return SequenceStore(path) if path.exists() else build_store(inputs, path)


def sha256(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        ValueError: no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
