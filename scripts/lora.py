"""Compare adapters (LoRA) with full fine-tuning on a protein family, and print the table of docs/finetuning.md.

    python -m scripts.lora                        about ten minutes on one core
    python -m scripts.lora --source-steps 20 --steps 5 --rates 1e-3      a quick try

The family is a set of ATP-binding proteins of ABC transporters, which is found among the bundled training proteins of
100 to 512 residues. Two proteins are connected if they share at least 7 different words of 5 residues. The family
contains all proteins that are connected, directly or through others, with a protein PotA (SEED_PROTEIN). Every third
protein of the family, in the order of the ids, is held out. The source model is trained on all other bundled training
proteins, except those of any length that share 7 words with a protein of the family.

Each arm is trained for the same number of steps with each learning rate, and the table has all of them. Runs are in
runs/, and their names begin with lora_. A finished run is not trained again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protlig_dd.config.train import config_in
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.prepare.bundled import SAMPLE_FOLDER
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.inference.model import find_saved
from protlig_dd.runs.metrics import read_metrics
from protlig_dd.training.cost import plan

SEED_PROTEIN = "tr|A0A0V8DMQ1|A0A0V8DMQ1_LACLL"
WORD, SHARED, LENGTHS, HELD_OUT_EVERY = 5, 7, range(100, 513), 3
DATA = Path("runs/lora_data")
ARMS = {
    "all weights": ["from={source}"],
    "LoRA, rank 4": ["from={source}", "model.lora.rank=4"],
    "LoRA, rank 16": ["from={source}", "model.lora.rank=16"],
    "from scratch": [],
}
COMMON = [
    "experiment=demo",
    "data.tokens_per_pack=2048",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.eval_every=0",
    "trainer.keep_last=1",
    "report.samples=0",
    "report.max_sequences=20",
    "report.draws=2",
    "report.untrained=false",
    "logger=none",
]
COLUMNS = (
    "training",
    "learning rate",
    "bound, nats/residue",
    "difference to the source",
    "trained parameters",
    "memory beyond the source's weights, MiB",
    "peak of the process, MiB",
    "checkpoint, MiB",
    "ms per step",
)


def words_of(record: FastaRecord) -> frozenset[str]:
    """Return the different words of a protein."""
    return frozenset(record.sequence[i : i + WORD] for i in range(len(record.sequence) - WORD + 1))


def family_of(seed: int, words: Sequence[frozenset[str]], candidates: Sequence[int]) -> set[int]:
    """Return the connected component of a protein among the candidates; all proteins are numbers of `words`."""
    family, added = {seed}, [seed]
    while added:
        others = [i for i in candidates if i not in family]
        added = [i for i in others if any(len(words[i] & words[j]) >= SHARED for j in added)]
        family.update(added)
    return family


def write_data() -> dict[str, int]:
    """Write the stores of the source and of the family, and the held-out proteins as FASTA. Return numbers of proteins.

    Files that exist are kept.
    """
    records = sorted(read_fasta(SAMPLE_FOLDER / "train.fasta.gz"), key=lambda record: record.id)
    words = [words_of(record) for record in records]
    seed = next(i for i, record in enumerate(records) if record.id == SEED_PROTEIN)
    candidates = [i for i, record in enumerate(records) if len(record.sequence) in LENGTHS]
    family = family_of(seed, words, candidates)
    members = [records[i] for i in sorted(family)]
    held_out = members[::HELD_OUT_EVERY]
    similar = {i for i in range(len(records)) if any(len(words[i] & words[j]) >= SHARED for j in family)}
    sets = {
        "family_train": [record for record in members if record not in held_out],
        "family_held_out": held_out,
        "source_train": [record for i, record in enumerate(records) if i not in similar],
        **{
            f"source_{split}": list(read_fasta(SAMPLE_FOLDER / f"{split}.fasta.gz")) for split in ("validation", "test")
        },
    }
    DATA.mkdir(parents=True, exist_ok=True)
    for name, selected in sets.items():
        fasta(name).write_text("".join(f">{r.id} {r.description}\n{r.sequence}\n" for r in selected))
    if not (DATA / "source.h5").exists():
        build_store({split: fasta(f"source_{split}") for split in ("train", "validation", "test")}, DATA / "source.h5")
    if not (DATA / "family.h5").exists():
        build_store({"train": fasta("family_train"), "validation": fasta("family_held_out")}, DATA / "family.h5")
    return {name: len(selected) for name, selected in sets.items()} | {"left out": len(similar - family)}


def fasta(name: str) -> Path:
    return DATA / f"{name}.fasta"


def command(verb: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"protlig_dd.{verb}", *arguments], check=True)


def train(name: str, data: str, steps: int, split: str, *overrides: str) -> Path:
    """Train a run unless it has finished, and return its folder."""
    run = Path("runs") / name
    if not (run / "report.json").exists():
        length = [f"trainer.max_steps={steps}", f"trainer.checkpoint_every={steps}", f"report.split={split}"]
        command("training", *COMMON, f"run.name={name}", f"data.path={DATA / data}", *length, *overrides)
    return run


def evaluated(run: Path, source: Path) -> dict[str, Any]:
    """Return the report of the run's bound on the held-out proteins, compared with the source."""
    output = DATA / f"evaluation_{run.name}"
    if not output.exists():
        options = ["near=false", "device=cpu", "precision=fp32", "draws=16", f"output={output}"]
        command("evaluate", f"from={run}", f"compare={source}", f"input={fasta('family_held_out')}", *options)
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def costs(run: Path, source: Path) -> list[str]:
    """Return the cells of a run's costs: parameters, memory, the size of its checkpoint and the time per step.

    The memory beyond the source's weights is that of the plan: all states and activations, less the source's weights.
    """
    saved = find_saved(str(run))
    base = 4 * sum(tensor.numel() for tensor in find_saved(str(source)).tensors().values())
    store = StoreGroup([SequenceStore(DATA / "family.h5")])
    estimate = plan(config_in(run), store, torch.device("cpu"), "fp32", 1, peak=1.0)
    rows = [row for step, row in sorted(read_metrics(run / "metrics.jsonl").items()) if "loss" in row]
    residues = np.diff([0.0, *(row["residues"] for row in rows)])
    seconds = float(np.median([n / row["residues_per_s"] for n, row in zip(residues, rows, strict=True)]))
    size = sum(file.stat().st_size for file in saved.path.iterdir())
    return [
        f"{estimate['trained_parameters']:,}",
        f"{(estimate['state_bytes'] + estimate['pack_bytes'] - base) / 2**20:,.1f}",
        f"{rows[-1]['peak_memory_gib'] * 1024:,.0f}",
        f"{size / 2**20:,.2f}",
        f"{1000 * seconds:,.0f}",
    ]


def bound_cells(report: dict[str, Any]) -> list[str]:
    return [
        f"{report['bound']:.4f} ± {report['bound_se']:.4f}",
        f"{report['bound_to_compared']:+.4f} ± {report['bound_to_compared_se']:.4f}",
    ]


def compare(source_steps: int, steps: int, rates: Sequence[float]) -> None:
    """Train the source and all arms, and print the table."""
    numbers = write_data()
    source = train(f"lora_source_{source_steps}", "source.h5", source_steps, "test")
    rows = []
    for arm, overrides in ARMS.items():
        for rate in rates:
            name = "_".join(
                ["lora", *(word.strip(",") for word in arm.split()), str(source_steps), str(steps), f"{rate:g}"]
            )
            options = [override.format(source=source) for override in overrides]
            warmup = f"optim.warmup_steps={max(1, steps // 10)}"
            run = train(name, "family.h5", steps, "validation", *options, f"optim.lr={rate}", warmup)
            rows.append([arm, f"{rate:g}", *bound_cells(evaluated(run, source)), *costs(run, source)])
    report = evaluated(Path(f"runs/{name}"), source)
    rows.insert(0, ["none (the source)", "", f"{report['compared']:.4f} ± {report['compared_se']:.4f}", *[""] * 6])
    print(
        f"\n{numbers['family_held_out']} held-out proteins of the family, {report['residues']:,} residues; "
        f"{numbers['family_train']} training proteins; {steps} steps. The source was trained on "
        f"{numbers['source_train']:,} proteins for {source_steps} steps, without the family and without "
        f"{numbers['left out']} other proteins that share words with it.\n"
    )
    for cells in (COLUMNS, ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2), *rows):
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-steps", type=int, default=300, help="training steps of the source (default: 300)")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each arm (default: 60)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3], help="learning rates of each arm")
    arguments = parser.parse_args()
    try:
        compare(arguments.source_steps, arguments.steps, arguments.rates)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {error.cmd[2]} failed with exit code {error.returncode}; its message is above")


if __name__ == "__main__":
    main()
