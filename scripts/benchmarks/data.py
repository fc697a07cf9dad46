"""Benchmark the data path: preparing a store, planning the packs of an epoch, and loading packs.

    python -m scripts.benchmarks.data                                     the bundled proteins, a few minutes
    python -m scripts.benchmarks.data --fasta my.fasta --gigabytes 2      your own proteins

The benchmark writes a FASTA file that repeats the given proteins, in lines of 60 residues. Each repeat has new ids, and
rotates every sequence by one residue more than the previous repeat, so that there are no exact duplicates. Preparing
and planning run in processes of their own, so that their CPU seconds and peak memory include nothing else. The peak
memory is read from /proc, so the benchmark needs Linux. The whole store is read once before the loader is timed, so
that the store is in the page cache. The loader's rate is compared with the rate that GPUs need. Prints Markdown tables.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protlig_dd.config.components import build_model
from protlig_dd.config.read import read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.loader import PackDataset, pack_loader
from protlig_dd.data.member_packs import MemberDataset
from protlig_dd.data.members import ClusterGroup, Members
from protlig_dd.data.packing import total_tokens
from protlig_dd.data.prepare.bundled import SAMPLE_FOLDER
from protlig_dd.data.rows import SplitRows
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.system.terminal import ProgressBar
from protlig_dd.training.cost import H100_FLOPS, MFU
from scripts.benchmarks.measure import measured
from scripts.benchmarks.prepare import make_fasta, prepare
from scripts.benchmarks.synthetic import write_store_of_lengths
from scripts.benchmarks.tables import table
from scripts.benchmarks.variants import composed

UNIREF50_CLUSTERS = 70_198_728
MAX_LEN, BUDGET, PACKS_PER_STEP = 1024, 32_768, 16
GPUS = 8
MEMBERS_PER_CLUSTER = 2.7  # as of UniRef90 members in UniRef50 clusters


def plan_once(path: str, step: int) -> None:
    """Time how long it takes to find the sequences of a training step's packs, and print the results as JSON.

    A plan lists the sequences of every pack of an epoch. The JSON object has these keys:
        seconds, mapped: the time in seconds without and with a cached plan.
        epoch: the epoch of the step.
        packs: the number of packs in an epoch.
        fill: the mean fraction of the packs' token budget that is used.
        tail: the fraction of the epoch's sequences that are left over after the last pack.
    """
    group, last = StoreGroup([SequenceStore(path)]), step * PACKS_PER_STEP + PACKS_PER_STEP - 1
    times = {}
    for name in ("seconds", "mapped"):  # the first plan is computed and written to a file; the second maps the file
        began = time.perf_counter()
        dataset = PackDataset(group, SplitRows(group, "train"), max_len=MAX_LEN, tokens_per_pack=BUDGET, seed=0)
        dataset.plan_ahead = False
        dataset.pack_rows(last)
        times[name] = time.perf_counter() - began
    epoch = last // len(dataset)
    rows, starts = dataset.plan(epoch)
    fill = total_tokens(group.lengths, rows[: starts[len(dataset)]], MAX_LEN) / len(dataset) / BUDGET
    found = {"fill": fill, "tail": dataset.tail(epoch) / len(rows), "packs": len(dataset), "epoch": epoch}
    print(json.dumps(times | found))


PLAN = """
from scripts.benchmarks.data import plan_once
plan_once({path!r}, {step})
"""


def plan(folder: Path, store: SequenceStore, sequences: int) -> None:
    """Time the planning of an epoch of `sequences` sequences, whose lengths are drawn from the store's lengths."""
    lengths = np.random.default_rng(0).choice(store.lengths[:], sequences)
    write_store_of_lengths(folder / "lengths.h5", lengths, sequences)
    last = total_tokens(lengths, np.arange(sequences, dtype=np.uint32), MAX_LEN) // BUDGET // PACKS_PER_STEP
    rows = []
    os.environ["TMPDIR"] = str(folder)
    steps = (0, last // 2, 10 * last)
    with ProgressBar("plan", len(steps)) as bar:
        for step in steps:
            shutil.rmtree(folder / f"protlig_dd-{os.getuid()}", ignore_errors=True)
            found = measured(PLAN.format(path=str(folder / "lengths.h5"), step=step), folder)
            rows.append(
                [
                    f"{step:,}",
                    str(found["epoch"]),
                    f"{found['seconds']:.1f}",
                    f"{found['mapped']:.1f}",
                    f"{found['peak'] / 2**30:.2f}",
                    f"{found['packs']:,}",
                    f"{found['fill']:.2%}",
                    f"{found['tail']:.2%}",
                ]
            )
            bar.advance()
    print(
        f"\nTime to the first batch of a run that starts at the given step, without and with a cached plan. A batch "
        f"has {PACKS_PER_STEP} packs of {BUDGET:,} tokens. An epoch has {sequences:,} lengths drawn from the store's "
        f"lengths and cropped at {MAX_LEN:,}\n"
    )
    table(["at step", "epoch", "seconds", "seconds, plan cached", "peak GiB", "packs per epoch", "fill", "tail"], rows)


class OnlyMembers(Members):
    """Members of clusters that are not in a file."""

    def __init__(self, offsets: np.ndarray, rows: np.ndarray, store: SequenceStore, clusters: SequenceStore) -> None:
        self.offsets, self.rows, self.store, self.path = offsets, rows, store, Path("members")
        self.fingerprint, self.clusters_fingerprint = "members", clusters.fingerprint

    def __len__(self) -> int:
        return len(self.offsets) - 1


def draw_once(folder: Path) -> None:
    """Time the draw of the members of an epoch, and print the results as JSON.

    The JSON object has these keys, all in seconds:
        count: the time to count the packs of an epoch, for which a run reads the lengths of all members once.
        draw: the time to draw a member of each cluster.
        plan: the time to make the plan of an epoch, the draw included.
    """
    offsets, rows = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("offsets", "rows"))
    clusters, store = (SequenceStore(folder / f"{name}.h5") for name in ("clusters", "members"))
    group = ClusterGroup(clusters, OnlyMembers(offsets, rows, store, clusters))
    began, times = time.perf_counter(), {}
    dataset = MemberDataset(group, SplitRows(group, "train"), max_len=MAX_LEN, tokens_per_pack=BUDGET, seed=0)
    dataset.plan_ahead = False
    times["count"], began = time.perf_counter() - began, time.perf_counter()
    dataset.draw(np.asarray(dataset.rows), 1)
    times["draw"], began = time.perf_counter() - began, time.perf_counter()
    dataset.plan(0)
    times["plan"], tail = time.perf_counter() - began, dataset.tail(0) / len(clusters)
    print(json.dumps(times | {"packs": len(dataset), "tail": tail}))


DRAW = """
from pathlib import Path
from scripts.benchmarks.data import draw_once
draw_once(Path({folder!r}))
"""


def draw(folder: Path, store: SequenceStore, clusters: int, members: int) -> None:
    """Time the draw of an epoch. The members of a cluster are random, and the lengths are those of the store."""
    rng = np.random.default_rng(0)
    sizes = np.bincount(rng.integers(clusters, size=members), minlength=clusters)
    np.save(folder / "offsets.npy", np.append(0, np.cumsum(sizes)))
    rows = np.arange(members, dtype=np.uint32)
    rng.shuffle(rows)
    np.save(folder / "rows.npy", rows)
    for name, sequences in (("clusters", clusters), ("members", members)):
        write_store_of_lengths(folder / f"{name}.h5", store.lengths[:], sequences)
    del sizes, rows
    found = measured(DRAW.format(folder=str(folder)), folder)
    print(
        f"\nThe draw of an epoch with `data.members`: {clusters:,} clusters with {members:,} members. The lengths are "
        "those of the store, repeated, and the members of a cluster are random\n"
    )
    table(
        ["seconds to count the packs", "to draw an epoch", "to plan it, with the draw", "peak GiB", "packs", "tail"],
        [
            [
                *(f"{found[name]:.1f}" for name in ("count", "draw", "plan")),
                f"{found['peak'] / 2**30:.2f}",
                f"{found['packs']:,}",
                f"{found['tail']:.2%}",
            ]
        ],
    )


def load(store: SequenceStore, folder: Path, seconds: float, steps: int) -> float:
    """Print the residues/s of training and, for two pack sizes, of a loader with one worker.

    Return the loader's best rate.
    """
    with store.path.open("rb") as file:
        while file.read(1 << 26):
            pass
    rows, best = [], 0.0
    trainer = training_rate(store, folder, steps)
    for budget in (16_384, BUDGET):
        dataset = PackDataset(store, store.split("train"), max_len=MAX_LEN, tokens_per_pack=budget, seed=0)
        rate = loader_rate(dataset, seconds)
        dataset.forget_plans()
        rows.append([f"{budget:,}", f"{rate / 1e6:.1f}", f"{trainer:,.0f}", f"{rate / trainer:,.0f}"])
        best = max(best, rate)
    size = store.path.stat().st_size
    print(
        f"\nLoader alone, one worker, shuffled, random crops of {MAX_LEN:,}, from a cached store of {size / 1e6:,.0f} "
        f"MB, compared with training model=tiny on this machine's {torch.get_num_threads()} CPU cores\n"
    )
    table(["tokens per pack", "M residues/s", "training residues/s", "loader / training"], rows)
    return best


def loader_rate(dataset: PackDataset, seconds: float) -> float:
    packs: Iterator[Any] = iter(pack_loader(dataset, range(10**9), workers=1, pin_memory=False))
    for _ in range(20):  # not timed, because the worker first starts and maps the plan
        next(packs)
    residues, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        rows = next(packs).rows.numpy()
        residues += int(np.minimum(dataset.group.lengths[rows], MAX_LEN).sum())
    return residues / spent


def training_rate(store: SequenceStore, folder: Path, steps: int) -> float:
    """Return the median residues/s of a short training run of the demo. The first quarter of the steps is left out."""
    command = [
        sys.executable,
        "-m",
        "protlig_dd.training",
        "experiment=demo",
        "run.name=benchmark",
        "run.fresh=true",
        f"data.path={store.path}",
        f"trainer.max_steps={steps + 1}",
        f"trainer.stop_at_step={steps}",
        "trainer.eval_every=0",
        "logger.tensorboard=false",
        "trainer.log_every=1",
    ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    lines = (folder / "runs/benchmark/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[steps // 4 :]]
    return statistics.median(row["residues_per_s"] for row in rows if "residues_per_s" in row)


def gpu_demand(store: SequenceStore, rate: float) -> None:
    """Print the tokens/s that one H100 and a node of H100s need, estimated from FLOPs.

    The table also has the ratio of the loader's rate to the rate that one H100 needs.
    """
    tokens = np.minimum(store.lengths[:], MAX_LEN).astype(np.int64)
    attended = float((tokens**2).sum() / tokens.sum())  # tokens that a token attends to, on average
    rows = []
    for name in ("medium", "large"):
        with torch.device("meta"):
            model = build_model(read_config(composed(f"model={name}"), TrainConfig).model, "sdpa", False)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        flops = 3 * model.flops(tokens.tolist()) / tokens.sum()
        needed = H100_FLOPS * MFU / flops
        rows.append(
            [
                f"{name}, {parameters / 1e6:.0f} M",
                f"{flops / 1e9:.2f}",
                f"{needed / 1e6:.2f}",
                f"{GPUS * needed / 1e6:.1f}",
                f"{rate / needed:.1f}",
            ]
        )
    print(
        f"\nOne node of {GPUS} H100 at an assumed {MFU:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s. A token attends to "
        f"{attended:.0f} tokens on average; a loader worker delivers {rate / 1e6:.1f} M residues/s\n"
    )
    table(["model", "GFLOP per token", "M tokens/s per GPU", "M tokens/s per node", "one worker / one GPU"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, default=SAMPLE_FOLDER / "train.fasta.gz", help="proteins to repeat")
    parser.add_argument("--gigabytes", type=float, default=1.1, help="size of the FASTA file to write")
    parser.add_argument("--sequences", type=int, default=UNIREF50_CLUSTERS, help="sequences in the planned epoch")
    parser.add_argument("--repeats", type=int, default=3, help="runs of `prepare` on each file")
    parser.add_argument("--seconds", type=float, default=15, help="seconds for which the loader is measured")
    parser.add_argument("--steps", type=int, default=40, help="steps of the training run")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="folder for scratch files; needs 4 times the size of the FASTA"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmarks.") as name:
        folder = Path(name).resolve()
        fasta = folder / "proteins.fasta"
        make_fasta(arguments.fasta, fasta, int(arguments.gigabytes * 1e9))
        store = SequenceStore(prepare(folder, fasta, arguments.repeats))
        plan(folder, store, arguments.sequences)
        draw(folder, store, arguments.sequences, round(arguments.sequences * MEMBERS_PER_CLUSTER))
        rate = load(store, folder, arguments.seconds, arguments.steps)
        gpu_demand(store, rate)


if __name__ == "__main__":
    main()
