"""Measure the samplers, graphs and likelihood estimators, and print tables of docs/diffusion.md and likelihood.md.

Run from the repository root, in the project's environment:

    python -m scripts.diffusion_report samplers     # samples of toy distributions against the exact ones (minutes)
    python -m scripts.diffusion_report graphs       # test-set bounds of the demo with each graph (7 to 10 minutes each)
    python -m scripts.diffusion_report likelihood --run runs/graph_absorbing    # variance of the run's bound (minutes)

A bound is an upper bound on the negative log-likelihood of proteins, in nats per residue.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from protlig_dd.batch import PackedBatch
from protlig_dd.config.components import build_graph
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.prepare.bundled import bundled_store
from protlig_dd.diffusion.likelihood import nll_bound
from protlig_dd.diffusion.noise import CosineNoise, LogLinearNoise, Noise
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.sampling import sample
from protlig_dd.inference.model import find_saved, load_saved
from protlig_dd.system.terminal import ProgressBar
from tests import brute_force
from tests.conftest import exact_score_fn
from tests.test_sampling import NOISES, SAMPLERS, frequencies

SITES, STATES = 2, 3
# Overrides of experiment=demo. Graphs other than absorbing need time conditioning.
RUNS = {
    "absorbing": [],
    "uniform": ["graph=uniform", "time_conditioning=true"],
    "blosum62": ["graph=blosum62", "time_conditioning=true"],
}


def samplers(chains: int, steps: list[int]) -> None:
    """Print the total variation distance between the samples of toy distributions and the exact distributions.

    A toy is a random distribution over SITES residues with STATES states each, and its scores are exact. The rows
    `infilled` fix the first residue and compare the second with its exact conditional distribution.
    """
    toy_of = {name: brute_force.random_toy(name, n=STATES, sites=SITES, seed=2) for name in NOISES}
    rows: list[tuple[str, list[float]]] = []
    negative: dict[tuple[str, str, int], float] = {}
    with ProgressBar("sampling", len(SAMPLERS) * len(steps) + len(toy_of) * len(steps)) as bar:
        for name, predictor in SAMPLERS:
            row = []
            for number in steps:
                generator = torch.Generator().manual_seed(number)
                counts: Counter[str] = Counter()
                samples = sample(
                    replace(exact_score_fn(toy_of[name]), noise=NOISES[name]),
                    [SITES] * chains,
                    SamplerOptions(number, predictor),
                    generator,
                    counts=counts,
                )
                expected = toy_of[name].p0.flatten().numpy()
                row.append(np.abs(frequencies(samples, STATES) / chains - expected).sum() / 2)
                negative[name, predictor, number] = counts["clamped"] / counts["draws"]
                bar.advance()
            rows.append((f"{name}, {predictor}", row))
        for name, toy in toy_of.items():
            row = []
            for number in steps:

                def project(tokens: torch.Tensor) -> torch.Tensor:
                    tokens = tokens.view(-1, SITES + 2).clone()
                    tokens[:, 1] = 1
                    return tokens.view(-1)

                samples = sample(
                    replace(exact_score_fn(toy), noise=NOISES[name]),
                    [SITES] * chains,
                    SamplerOptions(number),
                    torch.Generator().manual_seed(number),
                    project,
                )
                seen = np.bincount(np.stack(samples)[:, 1], minlength=STATES) / chains
                row.append(np.abs(seen - (toy.p0[1] / toy.p0[1].sum()).numpy()).sum() / 2)
                bar.advance()
            rows.append((f"{name}, analytic, infilled", row))
    p = toy_of["absorbing"].p0.flatten().numpy()
    floor = np.sqrt(2 * p * (1 - p) / np.pi / chains).sum() / 2
    print(f"\nTotal variation by number of steps, {chains:,} chains (exact samples would show about {floor:.4f})\n")
    table(["graph, sampler", *map(str, steps)], [[name, *(f"{value:.4f}" for value in row)] for name, row in rows])
    (graph, predictor, number), share = max(negative.items(), key=lambda item: item[1])
    print(
        f"\nLargest fraction of draws with a clamped negative probability: {share:.2%} "
        f"({graph}, {predictor}, {number} steps)"
    )


def graphs(steps: int | None) -> None:
    """Train the demo with each graph, and print the bounds on the test set.

    Args:
        steps: number of training steps; None for the demo's.
    """
    rows = []
    for name, overrides in RUNS.items():
        command = ["experiment=demo", f"run.name=graph_{name}", *overrides]
        command += [] if steps is None else [f"trainer.max_steps={steps}", "report.draws=1", "report.samples=0"]
        if not Path(f"runs/graph_{name}/report.json").exists():  # a finished run is not trained again
            subprocess.run([sys.executable, "-m", "protlig_dd.training", *command], check=True)
        report = json.loads(Path(f"runs/graph_{name}/report.json").read_text())
        graph = build_graph(OmegaConf.load(f"runs/graph_{name}/config.yaml").graph)
        rows.append(
            [name, f"{graph.lambda_2:.3f}", f"{graph.sigma_max:.2f}", report["estimator"]]
            + [f"{report[key]:.4f} ± {report[f'{key}_se']:.4f}" for key in ("nll", "difference")]
            + [f"{report['composition_kl']:.4f}" if "composition_kl" in report else ""]
        )
    print(
        f"\nTest set, {report['sequences']} proteins, {report['residues']:,} residues; nats/residue; unigram model "
        f"{report['unigram_nll']:.4f} ± {report['unigram_nll_se']:.4f}\n"
    )
    columns = ["graph", "lambda_2", "sigma_max", "estimator", "NLL bound", "difference to the unigram model"]
    table([*columns, "composition KL of samples"], rows)


def likelihood(run: Path, proteins: int, repeats: int) -> None:
    """Compare the estimators of a trained model's bound: print variance times number of network evaluations.

    The variance of a protein's bound in nats per residue is computed over the repeats, and averaged over the proteins.

    Args:
        run: a run folder or a checkpoint.
        proteins: number of test proteins.
        repeats: number of estimates of each protein's bound, each with another seed.
    """
    saved = find_saved(str(run))
    score_fn, config = load_saved(saved, torch.device("cpu"), "fp32"), saved.config
    noise = score_fn.noise
    store, data = bundled_store(), config.data
    rows = store.split("test")[:proteins]
    packs = PackDataset(store, rows, seed=None, max_len=data.max_len, tokens_per_pack=data.tokens_per_pack)
    batches: list[PackedBatch] = [packs[i] for i in range(len(packs))]
    time_free = not config.time_conditioning
    noises = {"the run's noise": noise}
    if time_free:  # without time conditioning the bound is the same integral for every noise schedule
        noises = {"log-linear": LogLinearNoise(), "cosine": CosineNoise()}
    estimators: list[tuple[str, str, Noise]] = [
        (f"integral, {name}", "integral", noise) for name, noise in noises.items()
    ]
    if time_free:
        estimators.append(("exact count", "exact_count", LogLinearNoise()))
    found = []
    numbers_of_draws = (1, 8)
    with ProgressBar("estimating", len(estimators) * len(numbers_of_draws) * repeats) as bar:
        for (name, estimator, noise), draws in itertools.product(estimators, numbers_of_draws):
            nats = []
            for repeat in range(repeats):
                generator = torch.Generator().manual_seed(repeat)
                with_noise = replace(score_fn, noise=noise)
                bounds = [
                    nll_bound(with_noise, batch, generator=generator, draws=draws, estimator=estimator)
                    for batch in batches
                ]
                nats.append(torch.cat([bound.nats for bound in bounds]))
                residues = torch.cat([bound.residues for bound in bounds])
                bar.advance()
            stacked = torch.stack(nats) / residues
            variance = float(stacked.var(0).mean())
            evaluations = draws * (2 if estimator == "integral" else 1)
            mean = float((stacked * residues).sum(1).mean() / residues.sum())
            found.append(
                [
                    name,
                    str(draws),
                    str(evaluations),
                    f"{mean:.4f}",
                    f"{variance**0.5:.4f}",
                    f"{variance * evaluations:.5f}",
                ]
            )
    print(f"\n{saved.path}: {len(residues)} test proteins, {repeats} repeats; nats/residue of a protein\n")
    table(
        [
            "estimator",
            "draws",
            "network evaluations",
            "mean bound",
            "standard deviation of a protein's bound",
            "variance x evaluations",
        ],
        found,
    )


def table(columns: list[str], rows: list[list[str]]) -> None:
    for cells in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("samplers", help="compare samples of toy distributions with the exact ones")
    command.add_argument("--chains", type=int, default=50_000)
    command.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 100, 300])
    command = commands.add_parser("graphs", help="train the demo with each graph, in runs/graph_*; print the bounds")
    command.add_argument(
        "--steps", type=int, help="number of training steps, for a quick try; default: those of the demo"
    )
    command = commands.add_parser("likelihood", help="print the variance of the estimators of the bound")
    command.add_argument("--run", type=Path, required=True, help="a run on the bundled proteins, or its checkpoint")
    command.add_argument("--proteins", type=int, default=20)
    command.add_argument("--repeats", type=int, default=16)
    arguments = vars(parser.parse_args())
    {"samplers": samplers, "graphs": graphs, "likelihood": likelihood}[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    main()
