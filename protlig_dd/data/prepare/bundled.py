"""The protein sample that is bundled with the package, as a store."""

import hashlib
import time
from pathlib import Path

from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.prepare.output import OutputExistsError
from protlig_dd.data.store import FORMAT_VERSION, SPLITS, SequenceStore
from protlig_dd.system.files import sha256

SAMPLE_FOLDER = Path(__file__).resolve().parents[1] / "sample"


def bundled_store(folder: Path = Path("data")) -> SequenceStore:
    """Return the store of the bundled sample. It is built in `folder` if missing.

    The file name contains a hash of the sample and of the format version.
    """
    inputs = {split: SAMPLE_FOLDER / f"{split}.fasta.gz" for split in SPLITS}
    digest = hashlib.sha256(f"{FORMAT_VERSION}".encode() + "".join(map(sha256, inputs.values())).encode()).hexdigest()
    path = folder / f"sample-{digest[:8]}.h5"
    while not path.exists():
        try:
            return build_store(inputs, path)
        except OutputExistsError:  # another process is building it
            time.sleep(0.1)
    return SequenceStore(path)
