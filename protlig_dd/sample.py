"""Sample new proteins from a trained model.

python -m protlig_dd.sample from=runs/demo output=designs.fasta n=10
python -m protlig_dd.sample from=runs/demo output=designs.fasta n=10 lengths=100-300 steps=128 seed=7
"""

from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from protlig_dd.diffusion.sampling import check_sampler
from protlig_dd.diffusion.score import make_score_fn
from protlig_dd.model.attention import resolve_attention_backend
from protlig_dd.runtime.checkpoint import find_checkpoint, load_weights, read_state
from protlig_dd.runtime.cli import run_verb
from protlig_dd.runtime.config import SampleConfig, TrainConfig, build_graph, build_model, build_noise, read_config
from protlig_dd.runtime.environment import resolve_device, resolve_precision
from protlig_dd.runtime.files import write_atomic
from protlig_dd.runtime.generate import designs_fasta, draw_lengths, generate
from protlig_dd.runtime.metrics import console
from protlig_dd.tokenizer import AMINO_ACIDS, N_STATES


def sample_proteins(cfg: DictConfig) -> None:
    """Load a run's newest checkpoint (averaged weights), sample, and write FASTA."""
    config = read_config(cfg, SampleConfig)
    output = Path(config.output)
    if output.exists():
        raise ValueError(f"{output} exists already; give another output or move it away")
    for key, value, least in (("n", config.n, 1), ("steps", config.steps, 1), ("seed", config.seed, 0)):
        if value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")
    log_bias = read_log_bias(config.log_bias)
    checkpoint = find_checkpoint(Path(config.from_))
    state = read_state(checkpoint)
    lengths = choose_lengths(config.lengths, config.n, config.seed, state["length_quantiles"])

    trained = read_config(OmegaConf.load(checkpoint / "config.yaml"), TrainConfig)  # type: ignore[arg-type]
    longest = max(lengths)
    if longest > trained.data.max_len:
        console.print(f"warning: {longest} residues are more than the {trained.data.max_len} this model was trained on")
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    head_dim = trained.model.hidden_size // trained.model.n_heads
    backend = resolve_attention_backend("auto", device, precision, head_dim)
    graph = build_graph(trained.graph)
    noise = build_noise(trained.noise, graph)
    check_sampler(graph, config.predictor, config.temperature, config.top_p)
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
        temperature=config.temperature,
        top_p=config.top_p,
        log_bias=log_bias,
        time_free=not trained.time_conditioning,
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
    if counts["skipped"]:
        share = counts["skipped"] / (counts["skipped"] + counts["evaluated"])
        console.print(f"{share:.1%} of the network's evaluations were skipped: nothing had changed")


def read_log_bias(wanted: dict[str, float] | None) -> torch.Tensor | None:
    """(20,) nats from {letter: nats}, 0 for the letters that are not named; None when there are none.

    Raises:
        ValueError: a letter that is none of the 20 amino acids.
    """
    if not wanted:
        return None
    bias = torch.zeros(N_STATES, dtype=torch.float64)
    for letter, nats in wanted.items():
        if letter not in AMINO_ACIDS or len(letter) != 1:
            raise ValueError(f"log_bias: {letter!r} is none of the amino acids {AMINO_ACIDS}")
        bias[AMINO_ACIDS.index(letter)] = nats
    return bias


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
