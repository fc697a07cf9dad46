"""Measure how long training waits for a checkpoint, and how long a checkpoint takes to write (docs/reliability.md).

    python -m scripts.benchmarks.checkpoint

Training waits only for the copy to host memory. A background thread writes, syncs and hashes the files.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from protlig_dd.config.components import build_model
from protlig_dd.config.read import read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.runs.checkpoint import snapshot
from protlig_dd.runs.writer import CheckpointWriter
from protlig_dd.training.ema import EMA
from protlig_dd.training.optim.make import make_optimizer
from scripts.benchmarks.tables import table
from scripts.benchmarks.variants import composed


def measure(name: str, device: str, repeats: int, folder: Path) -> list[str]:
    config = read_config(composed(f"model={name}", "optim=muon"), TrainConfig)
    with torch.device(device):
        model = build_model(config.model, "sdpa", time_conditioning=False)
    optimizer = make_optimizer(model, config.optim, "fp32")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # creates the optimizer state
    ema = EMA(model, 0.999)
    writer = CheckpointWriter(folder / name, config_yaml="", keep_last=1, keep_every=None)
    waited, written = [], []
    for step in range(repeats):
        began = time.perf_counter()
        writer.save(step, lambda: snapshot(model, ema.weights, optimizer), {}, None)
        waited.append(time.perf_counter() - began)
        writer.wait()
        written.append(time.perf_counter() - began - waited[-1])
    writer.close()
    size = sum(file.stat().st_size for file in (folder / name).rglob("*.safetensors"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
        f"{name}, {parameters / 1e6:.0f} M",
        f"{size / 1e6:,.0f}",
        f"{statistics.median(waited):.3f}",
        f"{max(waited):.3f}",
        f"{statistics.median(written):.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "small", "medium"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7, help="checkpoints to write for each model")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="folder for scratch files; needs twice the size of a checkpoint"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmarks.checkpoint.") as name:
        rows = [measure(model, arguments.device, arguments.repeats, Path(name)) for model in arguments.models]
    table(["model", "MB", "training waits, median s", "training waits, max s", "background writing, s"], rows)


if __name__ == "__main__":
    main()
