"""A trained model, ready to use, from a run folder or a checkpoint alone: what every verb but training begins with."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from protlig_dd.diffusion.graph import Graph
from protlig_dd.diffusion.noise import Noise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.model.attention import resolve_attention_backend
from protlig_dd.model.dit import DiT
from protlig_dd.runtime.checkpoint import find_checkpoint, load_weights, read_state
from protlig_dd.runtime.config import TrainConfig, build_graph, build_model, build_noise, read_config
from protlig_dd.runtime.distributed import Processes, join_group, processes_from_environment
from protlig_dd.runtime.environment import resolve_device, resolve_precision
from protlig_dd.runtime.metrics import announce

TIMEOUT = 3600  # seconds that a rank waits for the others


@dataclass(frozen=True)
class Trained:
    """The averaged weights of a checkpoint in an evaluating model, and all that goes with them."""

    checkpoint: Path
    config: TrainConfig
    step: int
    length_counts: list[int] | None
    """How many training sequences have 0, 1, ... residues."""
    model: DiT
    score_fn: ScoreFn
    noise: Noise
    device: torch.device
    precision: str
    processes: Processes

    @property
    def run(self) -> str:
        return self.config.run.name

    @property
    def graph(self) -> Graph:
        return self.score_fn.graph

    @property
    def max_len(self) -> int:
        """Residues of the longest sequence that it was trained on."""
        return self.config.data.max_len

    def check_length(self, residues: int, name: str) -> None:
        """Raise for a protein of no length, or a longer one than the model was trained on."""
        if not 1 <= residues <= self.max_len:
            raise ValueError(f"{name} has {residues} residues; this model was trained on 1 to {self.max_len}")


def load_trained(path: str, *, device: str, precision: str) -> Trained:
    """The newest sound checkpoint of a run folder, or that checkpoint; under torchrun on each rank's own device.

    Raises:
        ValueError: no sound checkpoint there, a device or precision that this machine does not have, weights that do
            not fit the config that came with them.
    """
    checkpoint, skipped = find_checkpoint(Path(path))
    processes = processes_from_environment()
    for problem in skipped:
        announce(f"skipped: {problem}", processes)
    state = read_state(checkpoint)
    config = read_config(OmegaConf.load(checkpoint / "config.yaml"), TrainConfig)  # type: ignore[arg-type]
    where = resolve_device(device, processes.local_rank)
    precision = resolve_precision(precision, where)
    backend = resolve_attention_backend("auto", where, precision, config.model.hidden_size // config.model.n_heads)
    graph = build_graph(config.graph)
    noise = build_noise(config.noise, graph)
    with where:
        model = build_model(config.model, backend, config.time_conditioning).eval()
    load_weights(checkpoint / "ema.safetensors", model)
    autocast = torch.bfloat16 if precision == "bf16" else None
    score_fn = ScoreFn(model, graph, config.parametrisation, config.time_conditioning, autocast)
    join_group(processes, where, TIMEOUT)
    announce(f"{checkpoint} on {where} in {precision}, attention {backend}", processes)
    return Trained(
        checkpoint=checkpoint,
        config=config,
        step=state["step"],
        length_counts=state.get("length_counts"),
        model=model,
        score_fn=score_fn,
        noise=noise,
        device=where,
        precision=precision,
        processes=processes,
    )


def check_free(output: str) -> Path:
    """The path to write, which must not exist."""
    path = Path(output)
    if path.exists():
        raise ValueError(f"{path} exists already; give another output or move it away")
    return path


def check_least(options: Iterable[tuple[str, int, int]]) -> None:
    """Raise for the first (key, value, least) whose value is below that."""
    for key, value, least in options:
        if value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")
