"""Sample new proteins from a trained model.

python -m protlig_dd.sample from=runs/demo output=designs.fasta n=10
python -m protlig_dd.sample from=runs/demo output=designs.fasta n=10 lengths=100-300 steps=128 seed=7
"""

import csv
import math
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
    for key, value, least in (
        ("n", config.n, 1),
        ("steps", config.steps, 1),
        ("seed", config.seed, 0),
        ("tokens_per_pack", config.tokens_per_pack, 1),
    ):
        if value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")
    checkpoint, skipped = find_checkpoint(Path(config.from_))
    for problem in skipped:
        console.print(f"skipped: {problem}")
    state = read_state(checkpoint)
    lengths = choose_lengths(config.lengths, config.n, config.seed, state.get("length_counts"))
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
        model = build_model(trained.model, backend, trained.time_conditioning).eval()
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
        more=describe_steering(config),
    )
    write_atomic(output, text)
    clamped = counts["clamped"] / counts["draws"]
    console.print(
        f"{output}: {len(samples)} proteins, {np.mean(lengths):.0f} residues on average; {clamped:.2%} of draws clamped"
    )
    if counts["skipped"]:
        share = counts["skipped"] / (counts["skipped"] + counts["evaluated"])
        console.print(f"{share:.1%} of the network's evaluations were skipped: nothing had changed")


def describe_steering(config: SampleConfig) -> str:
    """` temperature=0.9 log_bias=C:-inf,K:0.5`: what is not the default, for the headers."""
    bias = config.log_bias
    if isinstance(bias, dict):
        bias = ",".join(f"{letter}:{nats}" for letter, nats in bias.items())
    options = {"temperature": (config.temperature, 1), "top_p": (config.top_p, 1), "log_bias": (bias or None, None)}
    return "".join(f" {name}={value}" for name, (value, default) in options.items() if value != default)


def read_log_bias(wanted: Any, lengths: list[int]) -> torch.Tensor | list[torch.Tensor] | None:
    """Nats for each amino acid: (20,) from {letter: nats}, or (length, 20) for each protein from a CSV file.

    The file has a header of letters and a row for each position. Letters that are not named have 0.

    Raises:
        ValueError: a letter that is none of the 20 amino acids, something that is no number, nothing left to choose
            from, or a file with another number of rows than a protein has residues; names the file and line.
    """
    if wanted is None or wanted == {}:
        return None
    if isinstance(wanted, dict):
        return bias_row(letters_of(list(wanted), "log_bias"), list(wanted.values()), "log_bias")
    path = Path(str(wanted))
    if not path.is_file():
        raise ValueError(f"log_bias={wanted}: no such file; for amino acids, in quotes, 'log_bias={{C:-inf,K:0.5}}'")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(f"{path} line {reader.line_num}", row) for row in reader if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from error
    if len(lines) < 2:
        raise ValueError(f"{path}: give a line of amino acids, then a row of numbers for each position")
    (where, header), *rows = lines
    letters = letters_of([cell.strip() for cell in header], where)
    bias = torch.stack([bias_row(letters, row, where) for where, row in rows])
    for number, length in enumerate(lengths, start=1):
        if length != len(bias):
            raise ValueError(
                f"{path} has {len(bias)} rows but protein {number} has {length} residues; give lengths={len(bias)}"
            )
    return [bias] * len(lengths)


def letters_of(names: list[str], where: str) -> list[int]:
    """The ids of different amino acids."""
    for name in names:
        if name not in tuple(AMINO_ACIDS):
            raise ValueError(f"{where}: {name!r} is none of the amino acids {AMINO_ACIDS}")
        if names.count(name) > 1:
            raise ValueError(f"{where}: {name} is there {names.count(name)} times")
    return [AMINO_ACIDS.index(name) for name in names]


def bias_row(ids: list[int], values: list[Any], where: str) -> torch.Tensor:
    """(20,) float64, 0 for the amino acids that are not named."""
    if len(values) != len(ids):
        raise ValueError(f"{where}: {len(values)} numbers for the {len(ids)} amino acids of the first line")
    row = [0.0] * N_STATES
    for index, value in zip(ids, values, strict=True):
        try:
            row[index] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {value!r} for {AMINO_ACIDS[index]} is no number") from error
        if math.isnan(row[index]) or row[index] == math.inf:
            raise ValueError(f"{where}: {AMINO_ACIDS[index]} must be finite or -inf, got {value}")
    if set(row) == {-math.inf}:
        raise ValueError(f"{where} forbids every amino acid")
    return torch.tensor(row, dtype=torch.float64)


def choose_lengths(wanted: str, n: int, seed: int, counts: list[int] | None) -> list[int]:
    """n lengths: `empirical` (the training set's), a number, or `shortest-longest` (uniform).

    Args:
        counts: how many training sequences have each length, as the checkpoint keeps them.

    Raises:
        ValueError: anything else; or a checkpoint without counts, from an earlier version.
    """
    if wanted == "empirical":
        if counts is None:
            raise ValueError("this checkpoint does not know its training lengths; give lengths=, such as 100-300")
        return draw_lengths(counts, n, seed)
    shortest, dash, longest = wanted.partition("-")
    numbers = [shortest, longest] if dash else [shortest, shortest]
    if not all(number.isdecimal() for number in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise ValueError(f"lengths={wanted}: give a number, a range such as 100-300, or empirical")
    low, high = map(int, numbers)
    return (low + np.floor(length_draws(n, seed) * (high - low + 1)).astype(int)).tolist()


if __name__ == "__main__":
    run_verb(sample_proteins, "sample", SampleConfig)
