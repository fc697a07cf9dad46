"""The proteins that come with the package, as a store."""

import hashlib
import time
from pathlib import Path

from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.prepare.output import AlreadyThereError
from protlig_dd.data.store import FORMAT_VERSION, SPLITS, SequenceStore
from protlig_dd.system.files import sha256

SAMPLE_FOLDER = Path(__file__).resolve().parents[1] / "sample"


def bundled_store(folder: Path = Path("data")) -> SequenceStore:
    """The store of the bundled sample, built in `folder` when it is not there yet; named after its contents."""
    inputs = {split: SAMPLE_FOLDER / f"{split}.fasta.gz" for split in SPLITS}
    digest = hashlib.sha256(f"{FORMAT_VERSION}".encode() + "".join(map(sha256, inputs.values())).encode()).hexdigest()
    path = folder / f"sample-{digest[:8]}.h5"
    while not path.exists():
        try:
            return build_store(inputs, path)
        except AlreadyThereError:  # another process makes it
            time.sleep(0.1)
    return SequenceStore(path)
