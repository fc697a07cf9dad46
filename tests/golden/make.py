"""Record the results of seeded runs, so that later versions can be compared with this version bit by bit.

    python -m tests.golden.make FOLDER

FOLDER must be empty. At the end the paths of a file and a folder are printed: copy both into tests/golden.

All results come from the public commands, in float32 on one thread. `record.json` has, for each of three small
models, the training losses, the samples, the infilled designs, and bounds on the NLL of proteins. It also has
checksums of the weights, of the variant scores and of the embeddings. `files/` has a store, a run that was stopped
half-way and an exported model. Later versions must be able to read all three, and to resume the run.
"""

import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors.numpy import load_file

from protlig_dd.data.fasta import read_fasta

Command = Callable[..., subprocess.CompletedProcess[str]]

SAMPLE = Path(__file__).resolve().parents[2] / "protlig_dd/data/sample/train.fasta.gz"
SEED = 0
PROTEINS = 80  # in the store
LONGEST = 150  # residues
STEPS = 40
MODELS = {
    "absorbing": [],
    "uniform": ["graph=uniform", "parametrisation=log_score", "optim=adamw", "time_conditioning=true"],
    "blosum62": ["graph=blosum62"],
}
PREDICTORS = {"absorbing": ("analytic", "euler", "ancestral")}
TRAIN = [
    "experiment=demo",
    f"seed={SEED}",
    "model.hidden_size=32",
    "model.n_heads=2",
    f"trainer.max_steps={STEPS}",
    f"data.max_len={LONGEST}",
    "data.tokens_per_pack=900",
    "optim.warmup_steps=5",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.log_every=1",
    "trainer.eval_every=20",
    "trainer.eval_max_sequences=10",
    "trainer.checkpoint_every=20",
    "report.samples=2",
    "report.steps=4",
    "report.draws=2",
    "report.untrained=false",
    "logger.tensorboard=false",
]
SMALLER = [*TRAIN, "model.hidden_size=16", "model.n_blocks=1", "run.name=stopped"]  # the run in files/
USE = ["device=cpu", "precision=fp32", f"seed={SEED}"]


def machine() -> dict[str, str]:
    """Return the kind of machine and the versions of libraries, because the bits of float32 results depend on them."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if platform.system() == "Linux" else []
    cpu = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    kinds = [flag for flag in cpu.get("flags", "").split() if flag.startswith(("avx", "amx", "fma"))]
    return {
        "cpu": " ".join(cpu.get(key, "?") for key in ("model name", "cpu family", "model", "stepping")),
        "flags": " ".join(sorted(kinds)),
        "torch": str(torch.__version__),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def write_proteins(folder: Path) -> None:
    """Write the first proteins of the bundled sample's training split to three files.

    Proteins of more than LONGEST residues are skipped. Of the rest, all.fasta has the first 80 (PROTEINS),
    proteins.fasta the first 20 and motif.fasta the first one.
    """
    short = (record for record in read_fasta(SAMPLE) if len(record.sequence) <= LONGEST)
    records = list(itertools.islice(short, PROTEINS))
    text = [f">{record.id} {record.description}\n{record.sequence}\n" for record in records]
    (folder / "all.fasta").write_text("".join(text))
    (folder / "proteins.fasta").write_text("".join(text[:20]))
    (folder / "motif.fasta").write_text(text[0])


def make_store(command: Command, folder: Path) -> None:
    """Write store.h5 from all.fasta."""
    run(
        command,
        folder,
        "prepare",
        "input=all.fasta",
        "output=store.h5",
        "split.validation_fraction=0.15",
        "split.test_fraction=0.15",
    )


def record(command: Command, folder: Path, model: str) -> dict[str, Any]:
    """Train one of MODELS in `folder`, run the other commands with it, and return the results.

    The folder must contain store.h5 and the files of `write_proteins`.
    """
    run(command, folder, "training", *TRAIN, *MODELS[model], f"run.name={model}", "data.path=store.h5")
    trained = folder / "runs" / model
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    checkpoint = trained / f"checkpoints/step_{STEPS:08d}"
    found: dict[str, Any] = {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "grad_norms": [row["grad_norm"] for row in rows if "grad_norm" in row],
        "validation": [row["val_nll"] for row in rows if "val_nll" in row],
        "weights": {name: tensors_sha256(checkpoint / f"{name}.safetensors") for name in ("model", "ema", "optimizer")},
        "report": json.loads((trained / "report.json").read_text())["nll"],
        "samples": {},
    }
    use = [f"from=runs/{model}", *USE]
    run(command, folder, "evaluate", *use, "input=proteins.fasta", f"output=bound_{model}", "draws=4", "near=false")
    found["bound"] = sorted((folder / f"bound_{model}/per_sequence.csv").read_text().splitlines())
    for predictor in PREDICTORS.get(model, ("analytic", "euler")):
        output = f"{model}_{predictor}.fasta"
        run(
            command,
            folder,
            "sample",
            *use,
            f"output={output}",
            "n=8",
            "lengths=30-60",
            "steps=12",
            "nll_draws=2",
            "temperature=0.9",
            f"predictor={predictor}",
        )
        found["samples"][predictor] = (folder / output).read_text().splitlines()
    run(
        command,
        folder,
        "infill",
        *use,
        "input=motif.fasta",
        f"output={model}_infill.fasta",
        "n=3",
        "free=[5-20]",
        "steps=8",
        "free_draws=4",
    )
    found["infill"] = (folder / f"{model}_infill.csv").read_text().splitlines()
    run(command, folder, "variants", *use, "target=motif.fasta", f"output={model}_scan.csv")
    scan = (folder / f"{model}_scan.csv").read_text()
    found["variants"] = {"sha256": sha256(scan.encode()), "first": scan.splitlines()[:5]}
    embed = [argument for argument in use if not argument.startswith("seed=")]
    run(command, folder, "embed", *embed, "input=proteins.fasta", f"output={model}.h5", "pooling=per_residue")
    with h5py.File(folder / f"{model}.h5") as file:
        found["embeddings"] = sha256(np.asarray(file["embeddings"]).tobytes())
    return found


def make_files(command: Command, folder: Path) -> None:
    """Train a run that stops half-way, and export its model."""
    run(command, folder, "training", *SMALLER, "data.path=store.h5", f"trainer.stop_at_step={STEPS // 2}")
    run(command, folder, "export", "from=runs/stopped", "to=exported")


def continued(command: Command, folder: Path) -> dict[str, Any]:
    """Resume the run of `make_files`. Return the losses of all its steps, and samples of the exported model."""
    run(command, folder, "training", *SMALLER, "data.path=store.h5")
    rows = [json.loads(line) for line in (folder / "runs/stopped/metrics.jsonl").read_text().splitlines()]
    run(command, folder, "sample", *USE, "from=exported", "output=of_exported.fasta", "n=4", "lengths=40", "steps=8")
    return {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "samples": (folder / "of_exported.fasta").read_text().splitlines(),
    }


def run(command: Command, folder: Path, verb: str, *arguments: str) -> None:
    """Run `python -m protlig_dd.VERB`. Raise a RuntimeError with the stderr of the command if it fails."""
    done = command("-m", f"protlig_dd.{verb}", *arguments, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{verb} {' '.join(arguments)}: {done.stderr}")


def tensors_sha256(path: Path) -> str:
    """Return the SHA-256 of the names and values of all tensors in a safetensors file."""
    tensors = load_file(path)
    return sha256(b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors)))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    folder = Path(sys.argv[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )

    write_proteins(folder)
    make_store(command, folder)
    found: dict[str, Any] = {"machine": machine(), "seed": SEED}
    found["models"] = {model: record(command, folder, model) for model in MODELS}
    make_files(command, folder)
    kept = folder / "files"
    (kept / "runs").mkdir(parents=True)
    shutil.copy(folder / "store.h5", kept)
    shutil.copytree(folder / "runs/stopped", kept / "runs/stopped", ignore=shutil.ignore_patterns("lock", "*.html"))
    shutil.copytree(folder / "exported", kept / "exported")
    found["continued"] = continued(command, folder)
    (folder / "record.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{folder / 'record.json'} and {kept}")


if __name__ == "__main__":
    main()
