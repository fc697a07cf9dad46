"""Sample new proteins from a trained model.

python -m protlig_dd.sample from=runs/demo output=designs.fasta n=10
python -m protlig_dd.sample from=runs/demo output=designs.fasta n=10 lengths=100-300 steps=128 seed=7
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from protlig_dd.diffusion.sampling import check_sampler
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.model.attention import resolve_attention_backend
from protlig_dd.runtime.checkpoint import find_checkpoint, load_weights, read_state
from protlig_dd.runtime.cli import run_verb
from protlig_dd.runtime.config import SampleConfig, TrainConfig, build_graph, build_model, build_noise, read_config
from protlig_dd.runtime.environment import resolve_device, resolve_precision
from protlig_dd.runtime.files import write_atomic
from protlig_dd.runtime.generate import designs_fasta, draw_lengths, generate, length_draws
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
    checkpoint = find_checkpoint(Path(config.from_))
    state = read_state(checkpoint)
    lengths = choose_lengths(config.lengths, config.n, config.seed, state["length_quantiles"])
    log_bias = read_log_bias(config.log_bias, lengths)

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
    autocast = torch.bfloat16 if precision == "bf16" else None
    score_fn = ScoreFn(model, graph, trained.parametrisation, trained.time_conditioning, autocast)
    console.print(f"{checkpoint} on {device} in {precision}, attention {backend}")
    samples, counts = generate(
        score_fn,
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


def read_log_bias(wanted: Any, lengths: list[int]) -> torch.Tensor | list[torch.Tensor] | None:
    """Nats for each amino acid: (20,) from {letter: nats}, or (length, 20) for each protein from a CSV file.

    The file has a header of letters and a row for each position. Letters that are not named have 0.

    Raises:
        ValueError: a letter that is none of the 20 amino acids, something that is no number, or a file with another
            number of rows than a protein has residues; names the file and line.
    """
    if not wanted:
        return None
    if isinstance(wanted, dict):
        return torch.tensor(bias_row(list(wanted), list(wanted.values()), "log_bias"), dtype=torch.float64)
    path = Path(str(wanted))
    if not path.is_file():
        raise ValueError(f"log_bias={wanted}: give amino acids, log_bias={{W:-1,C:-inf}}, or a CSV file")
    with path.open(newline="") as file:
        lines = [line for line in csv.reader(file) if line]
    header, rows = [letter.strip() for letter in lines[0]] if lines else [], lines[1:]
    bias = [bias_row(header, row, f"{path} line {number}") for number, row in enumerate(rows, start=2)]
    for number, length in enumerate(lengths, start=1):
        if length != len(rows):
            raise ValueError(
                f"{path} has {len(rows)} rows but protein {number} has {length} residues; give lengths={len(rows)}"
            )
    return [torch.tensor(bias, dtype=torch.float64)] * len(lengths)


def bias_row(letters: list[str], values: list[Any], where: str) -> list[float]:
    """20 numbers in the order of AMINO_ACIDS."""
    if len(values) != len(letters):
        raise ValueError(f"{where}: {len(values)} numbers for the {len(letters)} letters of the header")
    row = [0.0] * N_STATES
    for letter, value in zip(letters, values, strict=True):
        if letter not in AMINO_ACIDS or len(letter) != 1:
            raise ValueError(f"{where}: {letter!r} is none of the amino acids {AMINO_ACIDS}")
        try:
            row[AMINO_ACIDS.index(letter)] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {value!r} for {letter} is no number") from error
    return row


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
    low, high = map(int, numbers)
    return (low + np.floor(length_draws(n, seed) * (high - low + 1)).astype(int)).tolist()


if __name__ == "__main__":
    run_verb(sample_proteins, "sample", SampleConfig)
