"""Sample new proteins from a trained model.

python -m protlig_dd.sample from=runs/demo output=designs.fasta n=10
python -m protlig_dd.sample from=runs/demo output=designs.fasta n=10 lengths=100-300 steps=128 seed=7
"""

from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from protlig_dd.diffusion.score import make_score_fn
from protlig_dd.model.attention import resolve_attention_backend
from protlig_dd.runtime.checkpoint import find_checkpoint, load_weights, read_state
from protlig_dd.runtime.cli import run_verb
from protlig_dd.runtime.config import SampleConfig, TrainConfig, build_graph, build_model, build_noise, read_config
from protlig_dd.runtime.environment import resolve_device, resolve_precision
from protlig_dd.runtime.files import write_atomic
from protlig_dd.runtime.generate import designs_fasta, draw_lengths, generate
from protlig_dd.runtime.metrics import console


def sample_proteins(cfg: DictConfig) -> None:
    """Load a run's newest checkpoint (averaged weights), sample, and write FASTA."""
    config = read_config(cfg, SampleConfig)
    output = Path(config.output)
    if output.exists():
        raise ValueError(f"{output} exists already; give another output or move it away")
    if config.n < 1:
        raise ValueError(f"n must be at least 1, got {config.n}")
    checkpoint = find_checkpoint(Path(config.from_))
    state = read_state(checkpoint)
    lengths = choose_lengths(config.lengths, config.n, config.seed, state["length_quantiles"])

    trained = read_config(OmegaConf.load(checkpoint / "config.yaml"), TrainConfig)  # type: ignore[arg-type]
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    head_dim = trained.model.hidden_size // trained.model.n_heads
    backend = resolve_attention_backend("auto", device, precision, head_dim)
    graph, noise = build_graph(trained.graph), build_noise(trained.noise)
    with device:
        model = build_model(trained.model, backend).eval()
    load_weights(checkpoint / "ema.safetensors", model)
    score_fn = make_score_fn(
        model,
        graph,
        trained.parametrisation,
        time_conditioning=trained.time_conditioning,
        autocast=torch.bfloat16 if precision == "bf16" else None,
    )
    console.print(f"{checkpoint} on {device} in {precision}, attention {backend}")
    samples, counts = generate(
        score_fn,
        graph,
        noise,
        lengths=lengths,
        steps=config.steps,
        predictor=config.predictor,
        tokens_per_pack=config.tokens_per_pack,
        seed=config.seed,
        device=device,
        description="sampling",
    )
    text = designs_fasta(
        samples,
        run=trained.run.name,
        step=state["step"],
        seed=config.seed,
        predictor=config.predictor,
        steps=config.steps,
    )
    write_atomic(output, text)
    clamped = counts["clamped"] / counts["draws"]
    console.print(
        f"{output}: {len(samples)} proteins, {np.mean(lengths):.0f} residues each; {clamped:.2%} of draws clamped"
    )


def choose_lengths(wanted: str, n: int, seed: int, quantiles: list[float]) -> list[int]:
    """n lengths: `empirical` (the training set's), a number, or `shortest-longest` (uniform).

    Raises:
        ValueError: anything else.
    """
    if wanted == "empirical":
        return draw_lengths(quantiles, n, seed)
    shortest, dash, longest = wanted.partition("-")
    numbers = [shortest, longest] if dash else [shortest, shortest]
    if not all(number.isdecimal() for number in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise ValueError(f"lengths={wanted}: give a number, a range such as 100-300, or empirical")
    return np.random.default_rng([seed, n]).integers(int(numbers[0]), int(numbers[1]) + 1, n).tolist()


if __name__ == "__main__":
    run_verb(sample_proteins, "sample", SampleConfig)
