"""Benchmark the orders of an epoch, data.order=full and data.order=blocks: what a plan costs, and what steps read.

    python -m scripts.benchmarks.plans                                      20 minutes and 20 GB of disk space
    python -m scripts.benchmarks.plans --sequences 70198728                 without BFD's size
    python -m scripts.benchmarks.plans --fasta swissprot.fasta.gz           the lengths and orders of these proteins

The first table plans epochs of synthetic stores, which have offsets but no letters (see synthetic.py). Their lengths
repeat a million lengths drawn from the proteins. Every row is measured in processes of its own. Their memory is read
from /proc, so the benchmark needs Linux. data.order=full is measured for at most --most-full sequences, and its time
and memory are multiplied for more. The second table compares what successive steps read, for stores that have the
proteins in three different orders. Its blocks have 256 rows instead of 65,536, so that an epoch has many windows. The
third table counts the reads from the disk if the store is not in the page cache. Its store repeats the proteins until
it has --read of them. Prints Markdown tables.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from protlig_dd.data import rows as rows_module
from protlig_dd.data.blocks import BlockDataset
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.plan_cache import plan_folder
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.prepare.bundled import SAMPLE_FOLDER
from protlig_dd.data.rows import SplitRows
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.evaluation.likelihood.held_out import length_counts
from protlig_dd.system.terminal import ProgressBar
from protlig_dd.tokenizer import N_STATES
from scripts.benchmarks.measure import measured, peak_of_memory
from scripts.benchmarks.synthetic import repeat_store, write_store_of_lengths
from scripts.benchmarks.tables import table

UNIREF50_CLUSTERS, BFD_SEQUENCES = 70_198_728, 2_200_000_000
MAX_LEN, BUDGET, PACKS_PER_STEP = 1024, 32_768, 16
VARIATION_BLOCK_ROWS, EPOCHS = 256, 6  # of the second table
DRAWN = 1 << 20  # number of lengths that a synthetic store repeats
DATASETS = {"full": PackDataset, "blocks": BlockDataset}


def start_once(path: str, order: str, step: int) -> None:
    """Do what a rank of a run does with the store `path` before it trains, and print what it costs as JSON.

    A rank finds the rows of the packs of its first step, and counts the lengths of the training proteins. The JSON
    object has these keys:
        first: seconds until the rows of the first step's packs are known.
        counts: seconds to count the lengths.
        own: peak of the process's own memory in bytes.
        plan: bytes of the plans in the temporary folder.
        packs: number of packs in an epoch.
    """
    group = StoreGroup([SequenceStore(path)])
    with peak_of_memory() as memory:
        began = time.perf_counter()
        dataset = dataset_of(order, group)
        dataset.plan_ahead = False
        for pack in range(step * PACKS_PER_STEP, (step + 1) * PACKS_PER_STEP):
            dataset.pack_rows(pack)
        first = time.perf_counter() - began
        length_counts(group, MAX_LEN)
        counts = time.perf_counter() - began - first
    size = sum(file.stat().st_size for file in plan_folder().rglob("*.npy"))
    found = {"first": first, "counts": counts, "own": memory["peak"], "plan": size, "packs": len(dataset)}
    print(json.dumps(found))


def dataset_of(order: str, group: StoreGroup, tokens_per_pack: int = BUDGET) -> PackDataset:
    rows = SplitRows(group, "train")
    return DATASETS[order](group, rows, max_len=MAX_LEN, tokens_per_pack=tokens_per_pack, seed=0)


START = """
from scripts.benchmarks.plans import start_once
start_once({path!r}, {order!r}, {step})
"""


def cost(folder: Path, lengths: np.ndarray, sizes: list[int], most_full: int) -> None:
    """Print what a start costs, for each number of sequences and each order.

    Args:
        lengths: numbers of residues of the proteins.
        most_full: largest number of sequences for which data.order=full is measured.
    """
    drawn, rows = np.random.default_rng(0).choice(lengths, DRAWN), []
    cases = [(size, order) for size in sorted(sizes) for order in DATASETS]
    path, written = folder / "lengths.h5", 0
    with ProgressBar("plans", len(cases)) as bar:
        for size, order in cases:
            sequences = min(size, most_full) if order == "full" else size
            if sequences != written:
                write_store_of_lengths(path, drawn, written := sequences)
            tokens = int(np.minimum(drawn + 2, MAX_LEN + 1).mean() * sequences)
            code = START.format(path=str(path), order=order, step=tokens // BUDGET // PACKS_PER_STEP // 2)
            shutil.rmtree(folder / f"protlig_dd-{os.getuid()}", ignore_errors=True)
            planner, other = measured(code, folder), measured(code, folder)  # the second process maps the first's plan
            times = size / sequences
            rows.append(
                [
                    order,
                    f"{size:,}" + ("" if times == 1 else f", {times:.1f} times the values of {sequences:,}"),
                    f"{planner['first'] * times:.1f}",
                    f"{other['first'] * times:.1f}",
                    f"{other['counts'] * times:.1f}",
                    f"{(other['own'] + (planner['own'] - other['own']) * times) / 2**30:.2f}",
                    f"{other['own'] / 2**30:.2f}",
                    f"{planner['plan'] * times / 1e6:,.1f}",
                    f"{round(planner['packs'] * times):,}",
                ]
            )
            bar.advance()
    path.unlink()
    print(
        f"\nCost of starting a run in the middle of an epoch, for {DRAWN:,} lengths drawn from the proteins and "
        f"repeated until there are enough. A step has {PACKS_PER_STEP} packs of {BUDGET:,} tokens, and proteins are "
        f"cropped at {MAX_LEN:,} residues. The memory is the process's own, including the libraries, without mapped "
        "files\n"
    )
    table(
        [
            "`data.order`",
            "sequences",
            "seconds to the first step's packs",
            "if the plan is stored",
            "seconds to count lengths",
            "GiB of the process that plans",
            "GiB of any other process",
            "MB of the plan on disk",
            "packs an epoch",
        ],
        rows,
    )


def stores_of_orders(folder: Path, records: list[FastaRecord]) -> dict[str, SequenceStore]:
    """Build stores that have the proteins in the order of the file, in random order and sorted by length."""
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    orders = {
        "in the order of the file": records,
        "in random order": shuffled,
        "sorted by length": sorted(shuffled, key=lambda record: -len(record.sequence)),
    }
    stores = {}
    for i, (name, ordered) in enumerate(orders.items()):
        fasta = folder / f"order{i}.fasta"
        fasta.write_text("".join(f">{record.id}\n{record.sequence}\n" for record in ordered))
        stores[name] = build_store({"train": fasta}, folder / f"order{i}.h5")
    return stores


def variation(stores: dict[str, SequenceStore], step_packs: int, tokens_per_pack: int) -> None:
    """Print how much the proteins of successive steps vary, for each store and order."""
    rows = []
    with ProgressBar("orders", len(stores) * len(DATASETS)) as bar:
        for name, store in stores.items():
            for order in DATASETS:
                dataset = dataset_of(order, StoreGroup([store]), tokens_per_pack)
                lengths, compositions, correlation = steps_of_epochs(dataset, step_packs)
                dataset.forget_plans()
                if order == "full":
                    length_of_full, composition_of_full = lengths.std(), spread(compositions)
                windows = dataset.n_windows if isinstance(dataset, BlockDataset) else 1
                rows.append(
                    [
                        name,
                        order,
                        f"{windows}",
                        f"{lengths.mean():.0f}",
                        f"{lengths.std():.1f}",
                        f"{lengths.std() / length_of_full:.2f}",
                        f"{spread(compositions) / composition_of_full:.2f}",
                        f"{correlation:+.2f}",
                        f"{dataset.tail(0) / len(dataset.rows):.2%}",
                    ]
                )
                bar.advance()
    print(
        f"\nSteps of {step_packs} packs of {tokens_per_pack:,} tokens in {EPOCHS} epochs of {len(store):,} proteins; a "
        f"block has {rows_module.BLOCK_ROWS} rows. A deviation is the standard deviation over the steps of a "
        "step's mean\n"
    )
    table(
        [
            "store",
            "`data.order`",
            "windows",
            "tokens per sequence",
            "its deviation",
            "relative to full",
            "deviation of the composition, relative to full",
            "correlation of successive steps",
            "tail",
        ],
        rows,
    )


def steps_of_epochs(dataset: PackDataset, step_packs: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the steps' mean numbers of tokens per sequence (steps,), their compositions (steps, 20), and the
    correlation of the means of successive steps."""
    lengths, compositions = [], []
    for first in range(0, EPOCHS * len(dataset) - step_packs + 1, step_packs):
        batches = [dataset[pack] for pack in range(first, first + step_packs)]
        lengths.append(np.mean([length for batch in batches for length in batch.lengths]))
        counts = sum(np.bincount(batch.tokens.numpy(), minlength=N_STATES)[:N_STATES] for batch in batches)
        compositions.append(counts / counts.sum())
    means = np.array(lengths)
    return means, np.array(compositions), float(np.corrcoef(means[:-1], means[1:])[0, 1])


def spread(compositions: np.ndarray) -> float:
    """Return the root of the mean over amino acids of the variance of their frequency over the steps."""
    return float(np.sqrt(compositions.var(0).mean()))


def read_once(path: str, order: str, packs: int) -> None:
    """Read the first packs of an epoch from a store that is not in the page cache. Print the reads as JSON."""
    dataset = dataset_of(order, StoreGroup([SequenceStore(path)]))
    dataset.plan_ahead = False
    for pack in range(packs):
        dataset.pack_rows(pack)  # not measured: making the plan, and reading the offsets
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, faults = bytes_read(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    tokens = sum(len(dataset[pack].tokens) for pack in range(packs))
    found = {"faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults, "bytes": bytes_read() - before}
    dataset.forget_plans()
    print(json.dumps(found | {"tokens": tokens}))


def bytes_read() -> int:
    """Return how many bytes this process has read from disks."""
    return int(Path("/proc/self/io").read_text().partition("read_bytes:")[2].split()[0])


READ = """
from scripts.benchmarks.plans import read_once
read_once({path!r}, {order!r}, {packs})
"""


def reads(folder: Path, store: SequenceStore, proteins: int) -> None:
    """Print how often a run waits for the disk, for each order. data.order=blocks reads its first window.

    Args:
        store: its proteins are repeated until there are `proteins` of them.
    """
    path, rows = folder / "cold.h5", []
    large = repeat_store(store, path, -(-proteins // len(store)))
    by_blocks = BlockDataset(StoreGroup([large]), large.split("train"), max_len=MAX_LEN, tokens_per_pack=BUDGET, seed=0)
    packs_of = {"full": 1000, "blocks": int(by_blocks.windows(0).ends[0])}
    del large, by_blocks  # pages that this process has mapped would stay in memory
    for order, packs in packs_of.items():
        found = measured(READ.format(path=str(path), order=order, packs=packs), folder)
        per_token = found["bytes"] / found["tokens"]
        rows.append([order, f"{packs:,}", f"{found['faults'] / packs:.3f}", f"{per_token:.1f}"])
    print(
        f"\nReads from the disk for the first packs of {BUDGET:,} tokens, from a store of "
        f"{path.stat().st_size / 1e6:,.0f} MB that is not in the page cache. With `blocks` these are all packs of a "
        "window\n"
    )
    table(["`data.order`", "packs", "waits for the disk per pack", "bytes read per token"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, default=SAMPLE_FOLDER / "train.fasta.gz", help="proteins")
    parser.add_argument(
        "--sequences", type=int, nargs="*", default=[UNIREF50_CLUSTERS, BFD_SEQUENCES], help="numbers of sequences"
    )
    parser.add_argument("--most-full", type=int, default=280_000_000, help="measure data.order=full up to this number")
    parser.add_argument("--read", type=int, default=4_000_000, help="proteins in the store of the third table")
    parser.add_argument("--folder", type=Path, default=Path(), help="folder for scratch files; 8 bytes a sequence")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmarks.") as name:
        folder = Path(name).resolve()
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        records = list(read_fasta(arguments.fasta))
        if arguments.sequences:
            lengths = np.array([len(record.sequence) for record in records])
            cost(folder, lengths, arguments.sequences, arguments.most_full)
        stores = stores_of_orders(folder, records)
        block_rows, rows_module.BLOCK_ROWS = rows_module.BLOCK_ROWS, VARIATION_BLOCK_ROWS
        variation(stores, step_packs=4, tokens_per_pack=16_384)
        rows_module.BLOCK_ROWS = block_rows
        reads(folder, stores["in random order"], arguments.read)


if __name__ == "__main__":
    main()
