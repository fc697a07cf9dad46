"""Time and memory of a forward and backward pass, for several sizes of network and pack."""

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed import init_process_group
from torch.nn.parallel import DistributedDataParallel

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.dit import DiT
from protlig_dd.system.device import peak_memory
from protlig_dd.system.terminal import ProgressBar
from scripts.benchmarks.tables import table
from scripts.benchmarks.variants import MODELS, NETWORK


def growth(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure time and memory of a forward and backward pass, changing one setting at a time.

    Each measurement runs in a new process. With two ranks, it runs in two new processes that exchange gradients.
    """
    tokens, size = arguments.tokens, MODELS[arguments.models[0]]
    base = {
        "tokens": tokens,
        "length": tokens // 8,
        "n_blocks": size["n_blocks"],
        "hidden_size": size["hidden_size"],
        "checkpointing": False,
        "ranks": 1,
    }
    changes: dict[str, list[Any]] = {
        "tokens": [tokens // 2, tokens, 2 * tokens, 4 * tokens],
        "length": [tokens // 16, tokens // 8, tokens // 4, tokens // 2, tokens],
        "n_blocks": [size["n_blocks"] // 2, size["n_blocks"], 2 * size["n_blocks"]],
        "hidden_size": [size["hidden_size"] // 2, size["hidden_size"], 2 * size["hidden_size"]],
        "checkpointing": [False, True],
        "ranks": [1, 2],
    }
    rows = []
    with ProgressBar("growth", sum(map(len, changes.values()))) as bar:
        for setting, values in changes.items():
            for value in values:
                spec = base | {setting: value}
                with (
                    tempfile.TemporaryDirectory() as folder,
                    ProcessPoolExecutor(spec["ranks"], mp_context=get_context("spawn")) as pool,
                ):
                    found = list(pool.map(step_cost, [spec] * spec["ranks"], range(spec["ranks"]), repeat(folder)))
                ms, gib = max(time for time, _ in found), max(memory for _, memory in found)
                rows.append({"what": setting, "value": value, "ms_per_step": ms, "gib": gib, **spec})
                bar.advance()
    print(
        f"\nForward and backward pass of one pack of {base['tokens']} tokens in sequences of {base['length']}, "
        f"{base['hidden_size']} x {base['n_blocks']}, fp32, eager, cpu; each row changes one setting\n"
    )
    table(
        ["setting", "value", "ms", "us per token", "GiB beyond weights and gradients", "KiB per token"],
        [
            [
                row["what"],
                str(row["value"]),
                f"{row['ms_per_step']:,.0f}",
                f"{1e3 * row['ms_per_step'] / row['tokens'] / row['ranks']:,.0f}",
                f"{row['gib']:.2f}",
                f"{row['gib'] * 2**20 / row['tokens']:,.0f}",
            ]
            for row in rows
        ],
    )
    return rows


def step_cost(spec: dict[str, Any], rank: int, folder: str) -> tuple[float, float]:
    """Return the median time of a forward and backward pass in milliseconds, and its memory in GiB.

    The memory is the increase of the process's peak memory during the passes. Weights and gradients are not in it,
    because they are allocated before.

    Args:
        folder: an empty folder through which the ranks connect.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // spec["ranks"]))
    torch.manual_seed(rank)
    width = spec["hidden_size"]
    sizes = {"hidden_size": width, "n_heads": width // 64, "n_blocks": spec["n_blocks"]}
    kinds = {"qk_norm": True, "norm": "rms", "checkpointing": spec["checkpointing"]}
    model = DiT(ModelConfig(**{**NETWORK, **sizes, **kinds}), "sdpa", time_conditioning=False).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    wrapped: torch.nn.Module = model
    if spec["ranks"] > 1:
        init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=spec["ranks"])
        wrapped = DistributedDataParallel(model)
    device = torch.device("cpu")
    length = spec["length"]
    batch = PackedBatch.pack([torch.randint(0, 20, (length,)) for _ in range(max(1, spec["tokens"] // length))])
    sigma = torch.ones(len(batch.lengths))
    before, times = peak_memory(device), []
    for _ in range(5):
        began = time.perf_counter()
        F.cross_entropy(wrapped(batch, sigma), batch.tokens).backward()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times), (peak_memory(device) - before) / 2**30
