"""Train the arms of an experiment and compare their validation bounds after the same number of training tokens.

An arm is a set of config overrides. Each arm is trained once for each model size and seed. The baseline is SEDD's
objective and network. There are two rounds:

    python -m scripts.arms screen --data data/swissprot.h5        all arms, with one seed
    python -m scripts.arms finalists --data data/swissprot.h5     the best arms and the baseline, with two seeds

Finalists are trained on 4 times as many tokens as the arms in the round `screen`. A run's name contains a hash of its
overrides. Finished runs are not trained again. To resume an interrupted command, run the same command again. Prints a
Markdown table and adds the results to runs/screen.json or runs/finalists.json.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from protlig_dd.evaluation.averages import per_residue
from protlig_dd.system.terminal import ProgressBar

SIZES = {
    "tiny": ["model=tiny"],
    "10 M": ["model=tiny", "model.hidden_size=384", "model.n_heads=6", "model.n_blocks=6"],
}
SEDD = [
    "parametrisation=log_score",
    "time_conditioning=true",
    "optim=adamw",
    "noise=loglinear",
    "model.qk_norm=false",
    "model.norm=layer",
    "model.mlp=gelu",
    "optim.schedule=cosine",
    "optim.ema_decay=0.9999",
    "optim.min_lr_ratio=0.1",
    "noise.max_weight=null",
]
X0 = [*SEDD, "parametrisation=x0"]
FREE = [*X0, "time_conditioning=false"]
QK = [*FREE, "model.qk_norm=true"]
MUON = [*FREE, "optim=muon"]
BOTH = [*QK, "optim=muon"]


def learning_rates(name: str, arm: list[str], *lrs: float) -> dict[str, list[str]]:
    return {f"{name}, lr {lr:g}": [*arm, f"optim.lr={lr}"] for lr in lrs}


def one_change(lr: float) -> dict[str, list[str]]:
    """Return arms that each change one thing in BOTH, with this learning rate.

    BOTH is the x0 parametrisation without time conditioning (time-free), with QK-norm and Muon.
    """
    base = [*BOTH, f"optim.lr={lr}"]
    changes = {
        "cosine noise": ["noise=cosine"],
        "weight at most 3": ["noise.max_weight=3"],
        "weight at most 10": ["noise.max_weight=10"],
        "warm-up, stable, decay": ["optim.schedule=wsd", "optim.min_lr_ratio=0.0"],
        "cosine to 0.01": ["optim.min_lr_ratio=0.01"],
        "RMSNorm": ["model.norm=rms"],
        "squared ReLU": ["model.mlp=relu2"],
        "SwiGLU": ["model.mlp=swiglu"],
        "EMA over 1%": ["optim.ema_decay=EMA:0.01"],
        "EMA over 2%": ["optim.ema_decay=EMA:0.02"],
        "EMA over 5%": ["optim.ema_decay=EMA:0.05"],
        "no EMA": ["optim.ema_decay=0.0"],
        "weight decay 0.1": ["optim.weight_decay=0.1"],
        "betas 0.9, 0.95": ["optim.betas=[0.9,0.95]"],
        "half the tokens a step": ["data.tokens_per_pack=HALF"],
    }
    return {f"QK-norm, Muon, lr {lr:g}; {name}": [*base, *change] for name, change in changes.items()}


DEFAULTS = "the defaults"
SCREEN = {
    **learning_rates("SEDD (log-score)", SEDD, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    **learning_rates("x0", X0, 5e-4, 1e-3, 2e-3, 4e-3),
    **learning_rates("x0, time-free", FREE, 5e-4, 1e-3, 2e-3, 4e-3),
    **learning_rates("x0, time-free, QK-norm", QK, 1e-3, 2e-3, 4e-3, 8e-3),
    **learning_rates("x0, time-free, Muon", MUON, 3e-3, 1e-2, 2e-2, 4e-2),
    **learning_rates("x0, time-free, QK-norm, Muon", BOTH, 3e-3, 1e-2, 2e-2, 4e-2),
    **one_change(1e-2),
    "QK-norm, Muon, lr 0.003; cosine noise": [*BOTH, "optim.lr=0.003", "noise=cosine"],
    "QK-norm, Muon, lr 0.003; weight at most 10": [*BOTH, "optim.lr=0.003", "noise.max_weight=10"],
    DEFAULTS: [],
}
FINALISTS = {
    **learning_rates("SEDD (log-score)", SEDD, 2.5e-4, 5e-4, 1e-3),
    **{name: SCREEN[name] for name in list(SCREEN)[-3:]},
}


def overrides(arm: Sequence[str], size: str, *, data: Path, residues: float, tokens: int, seed: int) -> list[str]:
    """Return the config overrides of a run that trains an arm.

    Args:
        arm: overrides. In `data.tokens_per_pack=HALF`, HALF stands for half of `tokens`. In `optim.ema_decay=EMA:f`,
            EMA:f stands for the decay that averages over the fraction f of the run's steps.
        size: a key of SIZES.
        residues: number of training tokens in the whole run.
        tokens: number of tokens in a step.
    """
    if "data.tokens_per_pack=HALF" in arm:
        tokens //= 2
    steps = round(residues / tokens)
    values: dict[str, str] = {}
    for override in arm:  # Hydra rejects a repeated key, so pass only its last value
        key, _, value = override.partition("=")
        values[key] = value
    if (horizon := values.get("optim.ema_decay", "")).startswith("EMA:"):
        values["optim.ema_decay"] = str(1 - 1 / max(1.0, float(horizon[4:]) * steps))
    values["data.tokens_per_pack"] = str(tokens)
    return [
        *SIZES[size],
        *(f"{key}={value}" for key, value in values.items()),
        f"data.path={data}",
        f"seed={seed}",
        "data.max_len=512",
        "optim.packs_per_step=1",
        f"trainer.max_steps={steps}",
        f"optim.warmup_steps={max(20, steps // 20)}",
        "trainer.eval_every=0",
        f"trainer.checkpoint_every={steps}",
        f"trainer.log_every={max(1, steps // 20)}",
        "logger.tensorboard=false",
        "report.split=validation",
        "report.draws=4",
        "report.samples=0",
    ]


def train(name: str, arguments: list[str], threads: int, base: Path = Path()) -> dict[str, Any]:
    """Train a run unless it is finished, and return its results, or {"error": message} if training failed.

    The results are those of report.json, the number of residues seen in training, the peak memory, and for each
    evaluated sequence its bound in nats and its length.

    Args:
        arguments: config overrides.
        threads: number of CPU threads.
        base: an existing folder; the run is written to base/runs/name.
    """
    folder = base / "runs" / name
    if not (folder / "report.json").exists():
        command = [sys.executable, "-m", "protlig_dd.training", f"run.name={name}", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=base)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with (folder / "report.csv").open(newline="") as file:
        sequences = list(csv.DictReader(file))
    return {
        **json.loads((folder / "report.json").read_text()),
        "seen": max(row["residues"] for row in rows if "residues" in row),
        "peak_memory_gib": max(row["peak_memory_gib"] for row in rows if "peak_memory_gib" in row),
        "nats": [float(row["nll_nats"]) for row in sequences],
        "lengths": [int(row["residues"]) for row in sequences],
    }


def paired(row: dict[str, Any], other: dict[str, Any]) -> str:
    """Return the bound of `row` minus the bound of `other` in nats/residue, with its standard error, as text.

    The two runs are compared sequence by sequence.
    """
    difference, error = per_residue(np.array(row["nats"]) - np.array(other["nats"]), np.array(row["lengths"]))
    return f"{difference:+.4f} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("round", choices=["screen", "finalists"])
    parser.add_argument("--data", type=Path, required=True, help="a store written by `python -m protlig_dd.prepare`")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in a step")
    parser.add_argument("--residues", type=float, default=20e6, help="training tokens of a run in the round `screen`")
    parser.add_argument("--jobs", type=int, default=1, help="runs trained at the same time")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each run")
    parser.add_argument("--only", nargs="+", default=[], help="names of the arms to train; default: all")
    parser.add_argument("--against", help="the arm to compare with; default: the best SEDD arm")
    parser.add_argument("--seeds", type=int, help="number of seeds of each arm; default: 1 for screen, 2 for finalists")
    arguments = parser.parse_args()
    final = arguments.round == "finalists"
    arms, residues = (FINALISTS, 4 * arguments.residues) if final else (SCREEN, arguments.residues)
    seeds = arguments.seeds or (2 if final else 1)
    if not arguments.data.is_file():
        parser.error(f"{arguments.data}: no such file")
    if unknown := {*arguments.only, *filter(None, [arguments.against])} - arms.keys():
        parser.error(f"no arm {', '.join(map(repr, sorted(unknown)))}; choose from {', '.join(map(repr, arms))}")
    selected = {name: arm for name, arm in arms.items() if not arguments.only or name in arguments.only}
    todo = []
    for size in arguments.sizes:
        for name, arm in selected.items():
            for seed in range(seeds):
                options = overrides(
                    arm, size, data=arguments.data, residues=residues, tokens=arguments.tokens, seed=seed
                )
                digest = hashlib.sha256(" ".join(options).encode()).hexdigest()[:12]
                todo.append((size, name, seed, f"{arguments.round}_{size.replace(' ', '')}_{digest}", options))
    found: dict[int, dict[str, Any]] = {}
    file = Path("runs") / f"{arguments.round}.json"
    results = {row["run"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    with ThreadPoolExecutor(arguments.jobs) as pool, ProgressBar(arguments.round, len(todo)) as bar:
        started = {pool.submit(train, *job[3:], arguments.threads): index for index, job in enumerate(todo)}
        for future in as_completed(started):
            index = started[future]
            size, name, seed, run, options = todo[index]
            found[index] = {
                "size": size,
                "arm": name,
                "seed": seed,
                "run": run,
                "overrides": options,
                **future.result(),
            }
            file.parent.mkdir(exist_ok=True)
            results[run] = found[index]
            file.write_text(json.dumps(list(results.values()), indent=1) + "\n")
            bar.advance()
    print_table([found[index] for index in sorted(found)], arguments.against)
    if any("error" in row for row in found.values()):
        raise SystemExit(1)


def print_table(found: list[dict[str, Any]], against: str | None) -> None:
    """Print a Markdown table with the bound of each run and the difference to the bound of a reference run.

    The reference has the same model size and seed as the run. It is the run of the arm `against`. If `against` is None,
    it is the run of the SEDD arm with the lowest bound.
    """
    reference = "the best SEDD arm" if against is None else f"'{against}'"
    print(f"\n| model | arm | seed | M residues seen | NLL bound | difference to unigram | difference to {reference} |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    valid = [row for row in found if "error" not in row and math.isfinite(row["nll"])]
    for row in found:
        values = [row["size"], row["arm"], str(row["seed"])]
        if row not in valid:
            values += ["", row.get("error", "no finite bound"), "", ""]
        else:
            same = [other for other in valid if (other["size"], other["seed"]) == (row["size"], row["seed"])]
            baselines = [other for other in same if (other["arm"] == against if against else "SEDD" in other["arm"])]
            values += [
                f"{row['seen'] / 1e6:.1f}",
                f"{row['nll']:.4f} ± {row['nll_se']:.4f}",
                f"{row['difference']:+.4f} ± {row['difference_se']:.4f}",
                paired(row, min(baselines, key=lambda other: other["nll"])) if baselines else "",
            ]
        print(f"| {' | '.join(values)} |")


if __name__ == "__main__":
    main()
