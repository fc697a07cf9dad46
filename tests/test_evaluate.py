"""Tests of `python -m protlig_dd.evaluate`: its figures and its kinds of input.

The figures are compared with sums that are computed here.
"""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.batch import PackedBatch
from protlig_dd.config.verbs import EvaluateConfig
from protlig_dd.data.crops import window
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.store import SPLITS, SequenceStore, StoreGroup
from protlig_dd.diffusion.exact_count import masked_cross_entropy
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.uniform import Uniform
from protlig_dd.diffusion.likelihood import nll_bound, protein_draws
from protlig_dd.diffusion.noise import GeometricNoise, LogLinearNoise, Noise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.likelihood import leaks
from protlig_dd.evaluation.likelihood.baselines import find_baseline_stores, fit_baselines
from protlig_dd.evaluation.likelihood.scoring import Given, Scored, score, summary
from protlig_dd.evaluation.likelihood.tables import NAMES, letter_csv
from protlig_dd.evaluation.likelihood.trained_on import all_training_data
from protlig_dd.inference.model import load_trained, run_folder
from protlig_dd.system.random import protein_keys, stratified_positions
from protlig_dd.tokenizer import BOS, EOS, N_STATES, ProteinTokenizer

from . import brute_force
from .conftest import (
    Command,
    assert_one_line_error,
    exact_score_fn,
    make_model,
    random_batch,
    require_program,
)

encode = ProteinTokenizer().encode


def test_the_bigram_model_is_its_smoothed_counts() -> None:
    baselines = fit_baselines([encode("ACAC"), encode("AXC")])
    assert baselines.sequences == 2
    a, c = 0, 1
    counts = np.ones(N_STATES)
    counts[a] += 3
    counts[c] += 3
    unigram = counts / counts.sum()
    np.testing.assert_allclose(np.exp(baselines.unigram), unigram)
    np.testing.assert_allclose(np.exp(baselines.bigram[a, c]), (2 + 20 * unigram[c]) / (2 + 20))
    np.testing.assert_allclose(np.exp(baselines.bigram[BOS, a]), (2 + 20 * unigram[a]) / (2 + 20))
    np.testing.assert_allclose(np.exp(baselines.bigram[21]), unigram)  # after X
    np.testing.assert_allclose(np.exp(baselines.bigram).sum(1), 1)


@given(st.lists(st.text("ACDEFGHIKLMNPQRSTVWYX", min_size=1, max_size=30), min_size=1, max_size=5))
def test_the_nats_of_a_baseline_are_its_log_probabilities_at_each_position(sequences: list[str]) -> None:
    tokens = [encode(sequence) for sequence in sequences]
    baselines = fit_baselines(tokens)
    for ids in tokens:
        unigram, bigram = baselines.nats(ids)
        for i, token in enumerate(ids):
            inside = token < N_STATES
            assert unigram[i] == (-baselines.unigram[token] if inside else 0)
            assert bigram[i] == (-baselines.bigram[ids[i - 1], token] if inside else 0)


def test_the_nats_of_the_tokens_sum_to_the_bound() -> None:
    batch = random_batch([5, 9, 2])
    score_fn = ScoreFn(make_model(), Absorbing(), LogLinearNoise(), "x0")
    for estimator in ("integral", "exact_count"):
        bound = nll_bound(score_fn, batch, draws=3, estimator=estimator, generator=torch.Generator().manual_seed(0))
        sums = [float(part.sum()) for part in bound.token_nats.split(list(batch.lengths))]
        assert sums == pytest.approx(bound.nats.tolist())


def test_masked_cross_entropy_is_the_sum_over_masked_residues() -> None:
    """The logits depend on the position only, so the cost of a masked residue does not depend on the other residues."""
    tokens = torch.tensor([BOS, 3, 21, 5, 7, 0, 11, 2, EOS])
    batch, table = (
        PackedBatch.pack([tokens, tokens[:5]]),
        torch.randn(30, 20, generator=torch.Generator().manual_seed(1)),
    )
    noised_packs: list[torch.Tensor] = []

    def network(noised: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        noised_packs.append(noised.tokens)
        return table[noised.positions]

    score_fn = ScoreFn(network, Absorbing(), LogLinearNoise(), "x0")
    nats, masked = masked_cross_entropy(
        score_fn, batch, fraction=0.3, draws=40, generator=torch.Generator().manual_seed(0)
    )
    assert masked.tolist() == [40 * 2, 40 * 1]  # round(0.3 * 6), round(0.3 * 3)
    times = sum((pack == 20).double() for pack in noised_packs)
    assert not times[(batch.tokens >= 20)].any()
    assert (times[batch.tokens < 20] > 0).all()
    cost = F.cross_entropy(table[batch.positions], batch.tokens.clamp(max=19), reduction="none").double()
    torch.testing.assert_close(nats, times * cost)


def test_pooled_nats_are_the_weighted_sum_over_masked_residues() -> None:
    """EvoDiff (analysis/sequence_perp.py) divides the nats of masked residues by the number of masked residues.

    Unlike the exact-count bound, EvoDiff does not multiply the nats by L / k (residues / masked residues).
    """
    tokens = torch.tensor([BOS, 3, 21, 5, 7, 0, 11, 2, EOS])
    batch = PackedBatch.pack([tokens, tokens[:5]])
    table = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
    noised_packs: list[torch.Tensor] = []

    def network(noised: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        noised_packs.append(noised.tokens)
        return table[noised.positions]

    bound = nll_bound(
        ScoreFn(network, Absorbing(), LogLinearNoise(), "x0"),
        batch,
        draws=6,
        estimator="exact_count",
        generator=torch.Generator().manual_seed(0),
    )
    # two draws in each of three strata, which end at 1/9, 4/9 and 9/9; a draw is weighted by the width of its stratum
    times = sum(
        width / 18 * (pack == 20).double() for width, pack in zip((1, 1, 3, 3, 5, 5), noised_packs, strict=True)
    )
    cost = F.cross_entropy(table[batch.positions], batch.tokens.clamp(max=19), reduction="none").double()
    sums = [[float(part.sum()) for part in values.split(list(batch.lengths))] for values in (times * cost, times)]
    assert bound.pooled_nats.tolist() == pytest.approx(sums[0])
    assert bound.pooled.tolist() == pytest.approx(sums[1])
    assert [int((pack[: len(tokens)] == 20).sum()) for pack in noised_packs[:2]] == [1, 1]


def test_evodiff_pooled_nats_equal_an_enumeration() -> None:
    """A draw masks one or both of the two sites.

    A single masked site is scored given the other site. Two masked sites are scored independently.
    """
    toy, x0, copies = brute_force.random_toy("absorbing", n=3, sites=2), (2, 1), 400
    batch = PackedBatch.pack([torch.tensor(x0)] * copies)
    bound = nll_bound(
        exact_score_fn(toy), batch, draws=2, estimator="exact_count", generator=torch.Generator().manual_seed(0)
    )
    assert set(bound.pooled.tolist()) == {1, 1.5, 2}
    assert float(bound.pooled.mean()) == pytest.approx(1.5, abs=0.01)
    joint, marginals = toy.p0[x0].log(), [toy.p0.sum(1)[x0[0]].log(), toy.p0.sum(0)[x0[1]].log()]
    one_masked = sum(float(log_p - joint) for log_p in marginals) / 2
    expected = (one_masked - float(sum(marginals))) / 2
    error = float(bound.pooled_nats.std()) / copies**0.5
    assert abs(float(bound.pooled_nats.mean()) - expected) < 4 * error < 0.2


def test_a_crop_shorter_than_the_protein_has_no_eos() -> None:
    assert ProteinTokenizer().decode(window(encode("ACDEF"), 0, 3)) == "ACD"
    assert window(encode("ACDEF"), 0, 3).tolist()[-1] == 2
    assert window(encode("ACDEF"), 0, 5).tolist() == encode("ACDEF").tolist()


def test_the_run_of_a_checkpoint_is_found_from_any_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "runs/demo/checkpoints/step_00000030"
    checkpoint.mkdir(parents=True)
    for folder, path in ((checkpoint, "."), (checkpoint.parent, checkpoint.name), (tmp_path, checkpoint)):
        monkeypatch.chdir(folder)
        assert run_folder(Path(path)) == tmp_path / "runs/demo"
    assert run_folder(tmp_path / "models/demo") is None


@pytest.mark.parametrize("conditioned", [True, False])
def test_the_order_agnostic_bound_differs_only_for_a_time_conditioned_model(
    conditioned: bool, trained_run: Path, store: SequenceStore
) -> None:
    trained = load_trained(str(trained_run), device="cpu", precision="fp32")
    model = make_model(time_conditioning=conditioned).eval()
    score_fn = ScoreFn(model, Absorbing(), trained.score_fn.noise, "x0", time_conditioning=conditioned)
    trained = replace(trained, score_fn=score_fn)
    config = EvaluateConfig(
        from_="",
        input="",
        split="test",
        train=None,
        compare=None,
        context="none",
        near=False,
        output="",
        draws=2,
        masked=False,
        max_sequences=None,
        seed=3,
        device="cpu",
        precision="fp32",
        tokens_per_pack=10_000,
    )
    sequences = [store[row] for row in store.split("test")[:3]]
    scored = score(trained, [Given(tokens, None) for tokens in sequences], config, None)
    batch = PackedBatch.pack([torch.from_numpy(tokens.astype(np.int64)) for tokens in sequences])
    keys = protein_keys(sequences)
    generator = protein_draws(keys, stratified_positions(keys, 2, 3), 3)
    found = None
    for name, estimator in (("bound", "integral"), ("oadm", "exact_count"))[0 if conditioned else 1 :]:
        found = nll_bound(trained.score_fn, batch, generator=generator, draws=2, estimator=estimator)
        assert [protein.nats[name] for protein in scored] == pytest.approx(found.nats.tolist())
    assert [protein.nats["evodiff"] for protein in scored] == pytest.approx(found.pooled_nats.tolist())
    assert found is not None
    figures = summary(scored)
    if conditioned:
        assert abs(figures["bound"] - figures["oadm"]) > 0.01
    else:
        assert [protein.nats["bound"] for protein in scored] == pytest.approx(found.nats.tolist())
    assert figures["evodiff"] == pytest.approx(float(found.pooled_nats.sum() / found.pooled.sum()))


@pytest.mark.parametrize(
    ("graph", "noise", "estimator"),
    [
        (Absorbing(), LogLinearNoise(), "exact_count"),
        (Absorbing(), LogLinearNoise(), "integral"),
        (Uniform(), GeometricNoise(sigma_max=7.0), "integral"),
    ],
)
def test_the_draws_of_a_protein_depend_only_on_the_set_and_the_seed(graph: Graph, noise: Noise, estimator: str) -> None:
    """The masks and times of a protein do not depend on the packs or on the order of the proteins.

    So the bound of a protein only changes by rounding.
    """
    score_fn = ScoreFn(make_model(), graph, noise, "x0", time_conditioning=True)
    proteins = [random_batch([length], seed=length).tokens for length in (9, 30, 4)]

    def bounds(order: list[int], at_once: int, seed: int = 7) -> list[float]:
        ordered = [proteins[i] for i in order]
        keys = protein_keys(tokens.numpy() for tokens in ordered)
        positions, found = stratified_positions(keys, 3, seed), {}
        for first in range(0, 3, at_once):
            in_pack = slice(first, first + at_once)
            bound = nll_bound(
                score_fn,
                PackedBatch.pack(ordered[in_pack]),
                draws=3,
                estimator=estimator,
                generator=protein_draws(keys[in_pack], positions[:, in_pack], seed),
            )
            found.update(zip(order[in_pack], bound.nats.tolist(), strict=True))
        return [found[i] for i in range(3)]

    together = bounds([0, 1, 2], 3)
    assert bounds([0, 1, 2], 1) == pytest.approx(together, rel=1e-4)
    assert bounds([2, 0, 1], 2) == pytest.approx(together, rel=1e-4)
    assert bounds([0, 1, 2], 3, seed=8) != pytest.approx(together, rel=1e-3)
    keys = protein_keys(tokens.numpy() for tokens in proteins)
    first, other = (protein_draws(keys, stratified_positions(keys, 3, 7), seed).generators for seed in (7, 8))
    assert len({generator.initial_seed() for generator in (*first, *other)}) == 6


def test_the_positions_of_the_draws_are_stratified_over_the_set() -> None:
    keys = protein_keys([np.array([i % 20, i // 20]) for i in range(60)])
    positions = stratified_positions(keys, 3, seed=0)
    assert positions.shape == (3, 60)
    for draw in positions:
        assert sorted((60 * draw).long().tolist()) == list(range(60))
    assert not torch.equal(positions[0], positions[1])
    twins = protein_keys([np.array([3, 4]), np.array([5]), np.array([3, 4])])
    assert len(set(twins.tolist())) == 3  # equal proteins have different draws
    assert protein_keys([np.array([5]), np.array([3, 4]), np.array([3, 4])]).tolist() == twins[[1, 0, 2]].tolist()
    order = np.random.default_rng(0).permutation(60)
    torch.testing.assert_close(stratified_positions(keys[order], 3, seed=0), positions[:, order])
    assert not torch.equal(stratified_positions(keys, 3, seed=1), positions)


def test_evaluate_and_the_report_page_have_the_same_figures(
    trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    """The report page was computed with packs of 1,200 tokens. This evaluation uses packs of 5,000 tokens."""
    command = [
        "-m",
        "protlig_dd.evaluate",
        f"from={trained_run}",
        f"input={store.path}",
        "precision=fp32",
        "draws=2",
        "masked=false",
        "near=false",
        "tokens_per_pack=5000",
    ]
    done = run_python(*command, "output=out")
    assert done.returncode == 0, done.stderr
    found, page = (json.loads(file.read_text()) for file in (tmp_path / "out/report.json", trained_run / "report.json"))
    for name, page_name in (("bound", "nll"), ("unigram", "unigram_nll"), ("bound_to_unigram", "difference")):
        assert found[name] == pytest.approx(page[page_name], abs=2e-6)
        assert found[f"{name}_se"] == pytest.approx(page[f"{page_name}_se"], abs=2e-6)


def test_two_models_are_compared_protein_by_protein(
    trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    start = trained_run / "checkpoints/step_00000020"
    command = [
        "-m",
        "protlig_dd.evaluate",
        f"from={trained_run}",
        f"input={store.path}",
        "precision=fp32",
        "near=false",
        "draws=2",
    ]
    done = run_python(*command, f"compare={start}", "output=out")
    assert done.returncode == 0, done.stderr
    assert (
        f"none of 20 proteins is an exact copy of a training protein of this model ({store.path}) or the compared "
        f"model ({store.path})" in done.stdout
    )
    report, table = json.loads((tmp_path / "out/report.json").read_text()), (tmp_path / "out/report.md").read_text()
    rows = list(csv.DictReader((tmp_path / "out/per_sequence.csv").read_text().splitlines()))
    nats, compared_nats, residues = (
        np.array([float(row[key]) for row in rows]) for key in ("bound_nats", "compared_nats", "residues")
    )
    assert report["compared_with"] == {
        "run": "small",
        "step": 20,
        "checkpoint": str(start),
        "estimator": "exact_count",
        "trained_context": "none",
    }
    for name, values in (("compared", compared_nats), ("bound_to_compared", nats - compared_nats)):
        expected = ratio_and_error(values, residues)
        assert (report[name], report[f"{name}_se"]) == pytest.approx(expected, abs=1e-6)
    difference, error = ratio_and_error(nats - compared_nats, residues)
    assert difference < 0  # 40 training steps give a lower bound than 20
    models = f"small, step 40, minus small, step 20 ({start})"
    line = f"{models}, paired difference: {difference:+.4f} ± {error:.4f} nats/residue"
    assert line in table
    assert f"were fitted to 360 training proteins of {store.path}." in table
    assert error < ratio_and_error(nats, residues)[1]
    alone = run_python(*command, "output=alone", f"from={start}")
    assert alone.returncode == 0, alone.stderr
    alone_rows = csv.DictReader((tmp_path / "alone/per_sequence.csv").read_text().splitlines())
    assert [float(row["bound_nats"]) for row in alone_rows] == pytest.approx(compared_nats.tolist(), abs=1e-4)


def test_a_letter_that_only_one_protein_contains_has_no_standard_error() -> None:
    def scored(sequence: str, nats: float) -> Scored:
        counts = np.bincount(encode(sequence)[1:-1], minlength=N_STATES)
        return Scored(len(sequence), {}, 0.0, {}, counts, {"bound": counts * nats})

    rows = list(csv.DictReader(letter_csv([scored("AAW", 2.0), scored("AC", 3.0), scored("CCC", 2.5)]).splitlines()))
    assert [(row["amino_acid"], row["residues"], row["bound_se"] == "nan") for row in rows] == [
        ("A", "3", False),
        ("C", "4", False),
        ("W", "1", True),
    ]


def ratio_and_error(nats: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """Return total nats / total count, and the standard error of this ratio over proteins."""
    n, ratio = len(nats), nats.sum() / count.sum()
    residuals = nats - ratio * count
    return ratio, math.sqrt((residuals**2).sum() * n / (n - 1)) / count.sum()


@pytest.mark.slow
def test_the_output_folder_agrees_with_sums_over_proteins(
    trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    command = [
        "-m",
        "protlig_dd.evaluate",
        f"from={trained_run}",
        "near=false",
        "draws=4",
        "tokens_per_pack=900",
        "precision=fp32",
    ]
    done = run_python(*command, f"input={store.path}", "output=out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out/per_sequence.csv").read_text().splitlines()))
    table = (tmp_path / "out/report.md").read_text()
    assert len(rows) == report["sequences"] == 20
    assert [row["id"] for row in rows] == [store.id(i) for i in store.split("test")]
    residues = np.array([int(row["residues"]) for row in rows])
    for name in ("bound", "unigram", "bigram", "oadm", "evodiff", "masked"):
        nats = np.array([float(row[f"{name}_nats"]) for row in rows])
        count = np.array([float(row[f"{name}_tokens"]) for row in rows]) if name in ("evodiff", "masked") else residues
        mean, error = ratio_and_error(nats, count)
        assert (report[name], report[f"{name}_se"]) == pytest.approx((mean, error), abs=1e-5)
        assert report[f"{name}_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {NAMES[name]} |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == f"{mean:.4f} ± {error:.4f}"
        assert cells[2] == f"{math.exp(mean):.3f} ± {math.exp(mean) * error:.3f}"  # error propagation through exp
        assert (cells[3] != "") is (name in ("bound", "bigram"))
        if cells[3]:
            unigram = np.array([float(row["unigram_nats"]) for row in rows])
            assert cells[3] == "{:+.4f} ± {:.4f}".format(*ratio_and_error(nats - unigram, residues))
    assert (report["residues"], report["draws"], report["max_len"]) == (residues.sum(), 4, 300)
    heading = f"20 proteins, {residues.sum():,} residues; small, step 40; exact_count estimator, 4 draws"
    assert table.splitlines()[0] == heading
    assert 2.5 < report["masked"] < 3.2
    assert 2.5 < report["evodiff"] < 3.2
    assert (report["baseline_store"], report["baseline_sequences"]) == (str(store.path), 360)
    for part in ("by_length", "by_amino_acid"):
        part_rows = list(csv.DictReader((tmp_path / f"out/{part}.csv").read_text().splitlines()))
        counts = np.array([int(row["residues"]) for row in part_rows])
        assert counts.sum() == report["residues"]
        for name in ("bound", "unigram", "bigram"):
            total = sum(float(row[name]) * n for row, n in zip(part_rows, counts, strict=True))
            assert total / counts.sum() == pytest.approx(report[name], abs=1e-4)
    for row in csv.DictReader((tmp_path / "out/by_length.csv").read_text().splitlines()):
        inside = (residues >= int(row["from"])) & (residues <= float(row["to"] or math.inf))
        assert (int(row["sequences"]), int(row["residues"])) == (inside.sum(), residues[inside].sum())
        if inside.sum() > 1:
            nats = np.array([float(protein["bound_nats"]) for protein in rows])[inside]
            expected = ratio_and_error(nats, residues[inside])
            assert (float(row["bound"]), float(row["bound_se"])) == pytest.approx(expected, abs=1e-4)
    assert table in done.stdout
    again = run_python(*command, f"input={store.path}", "output=out")
    assert_one_line_error(again, "out exists already")
    # two processes give the same figures
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    done = run_python(*launcher, f"input={store.path}", "output=ranks")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ranks/per_sequence.csv").read_text() == (tmp_path / "out/per_sequence.csv").read_text()


def test_baselines_of_fasta_input_come_from_the_runs_training_set(
    trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    decode = ProteinTokenizer().decode
    long = decode(store[0]) * 5
    short = [i for i in store.split("test") if store.lengths[i] <= 300][:4]
    text = "".join(f">{store.id(i)}\n{decode(store[i]).lower()}\n" for i in short)
    (tmp_path / "held.fasta").write_text(f"{text}>long\n{long}\n")
    command = ["-m", "protlig_dd.evaluate", f"from={trained_run}", "input=held.fasta", "draws=1", "masked=false"]
    command += ["near=false"]
    done = run_python(*command, "output=out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["cut_to_max_len"] == 1
    assert "only the first 300 residues of each are scored" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out/per_sequence.csv").read_text().splitlines()))
    assert {row["id"]: int(row["residues"]) for row in rows}["long"] == 300
    assert report["baseline_sequences"] == 360
    assert "masked" not in report
    exported = run_python("-m", "protlig_dd.export", f"from={trained_run}", "to=small")
    assert exported.returncode == 0, exported.stderr
    bare = run_python(*command[:2], "from=small", *command[3:], "output=bare")
    assert bare.returncode == 0, bare.stderr
    assert "training set was not found: give train=store.h5 for unigram and bigram models" in bare.stdout
    bare_report = json.loads((tmp_path / "bare/report.json").read_text())
    assert (bare_report["bound"], bare_report["baseline_sequences"]) == (report["bound"], None)
    few = run_python(*command, "output=few", "max_sequences=2")
    assert few.returncode == 0, few.stderr
    assert json.loads((tmp_path / "few/report.json").read_text())["sequences"] == 2


def test_baselines_are_fitted_to_the_training_set_of_the_model(
    trained_run: Path,
    store: SequenceStore,
    proteins: list[FastaRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The store is found from any working folder. Another store with the same path is not used."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    others = {}
    for i, split in enumerate(SPLITS):
        others[split] = tmp_path / f"{split}.fasta"
        others[split].write_text("".join(f">{r.id}\n{r.sequence}\n" for r in proteins[i * 9 : i * 9 + 9]))
    other = build_store(others, elsewhere / "data/my.h5")
    run = shutil.copytree(trained_run, here / "runs/small")
    record = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(record | {"data_path": "data/my.h5"}))
    trained = load_trained(str(run), device="cpu", precision="fp32")
    monkeypatch.chdir(elsewhere)
    assert find_baseline_stores(None, None, trained) is None  # ./data/my.h5 is another store
    assert "training set was not found" in capsys.readouterr().out
    assert find_baseline_stores(None, other, trained) is None
    (here / "data").mkdir()
    shutil.copy(store.path, here / "data/my.h5")
    for path in (run, run / "checkpoints/step_00000040"):
        for evaluated in (None, other):
            found = find_baseline_stores(None, evaluated, load_trained(str(path), device="cpu", precision="fp32"))
            assert found is not None
            assert found.name == str(here / "data/my.h5")
            assert f"bigram models to the training split of {found.name}" in capsys.readouterr().out
    named = find_baseline_stores(str(other.path), store, trained)
    assert named is not None
    assert named.fingerprint == other.fingerprint


def test_find_copies_agrees_with_a_set_of_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most proteins have 1 to 13 residues.

    The proteins `twins` differ from training proteins only in the first and the last residue.
    """
    monkeypatch.setattr(leaks, "ROWS_AT_ONCE", 7)
    generator = np.random.default_rng(0)
    text = ["".join(generator.choice(list("ACDX"), generator.integers(1, 14))) for _ in range(300)]
    train = list(dict.fromkeys(text[:150]))
    (tmp_path / "train.fasta").write_text("".join(f">t{i}\n{sequence}\n" for i, sequence in enumerate(train)))
    held = [sequence for sequence in dict.fromkeys(text[150:]) if sequence not in train]
    (tmp_path / "test.fasta").write_text("".join(f">h{i}\n{sequence}\n" for i, sequence in enumerate(held)))
    store = build_store({"train": tmp_path / "train.fasta", "test": tmp_path / "test.fasta"}, tmp_path / "a.h5")
    twins = [f"W{sequence[1:-1]}W" for sequence in train if len(sequence) > 9]
    queries = [*text, *twins, text[0], "W" * 60]
    found = leaks.find_copies([encode(sequence) for sequence in queries], StoreGroup([store]))
    assert found.tolist() == [sequence in train for sequence in queries]
    assert 20 < found.sum() < len(queries) - 20
    assert len(twins) > 10


def test_training_proteins_are_counted_and_left_out_of_a_second_bound(
    trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    decode = ProteinTokenizer().decode
    # only the first 300 residues of this protein are scored, but its whole sequence is compared with the training set
    long = next(i for i in store.split("train") if store.lengths[i] > 300)
    short = [i for i in store.split("test") if store.lengths[i] <= 300][:3]
    chosen = [0, 1, long, *short]
    (tmp_path / "held.fasta").write_text("".join(f">p{i}\n{decode(store[i]).lower()}\n" for i in chosen))
    command = ["-m", "protlig_dd.evaluate", f"from={trained_run}", "draws=2", "masked=false", "near=false"]
    done = run_python(*command, "input=held.fasta", "output=out")
    assert done.returncode == 0, done.stderr
    message = f"3 of 6 proteins are exact copies of training proteins of this model ({store.path})"
    assert f"warning: {message}" in done.stdout
    assert "similar proteins were not searched for: near=false" in done.stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out/per_sequence.csv").read_text().splitlines()))
    assert [row["in_training"] for row in rows] == ["copy"] * 3 + ["no"] * 3
    found = report["in_training"]
    assert (found["copies"], found["near"], found["not_searched"]) == (3, None, [])
    assert found["searched"] == [{"model": "this model", "store": str(store.path), "copies": 3}]
    nats, residues = (np.array([float(row[key]) for row in rows[3:]]) for key in ("bound_nats", "residues"))
    mean, error = ratio_and_error(nats, residues)
    others = found["others"]
    assert (others["sequences"], others["bound"], others["bound_se"]) == pytest.approx((3, mean, error), abs=1e-5)
    assert abs(others["bound"] - report["bound"]) > 1e-4
    line = (
        "3 proteins are exact copies of training proteins of a model named above; "
        f"the other 3 proteins have an NLL bound of {mean:.4f}"
    )
    assert line in (tmp_path / "out/report.md").read_text()
    unigram = np.array([float(row["unigram_nats"]) for row in rows[3:]])
    assert "{:+.4f} ± {:.4f} to the unigram model (nats/residue).".format(
        *ratio_and_error(nats - unigram, residues)
    ) in (done.stdout)
    assert line in done.stdout


def test_proteins_without_known_residues_do_not_stop_an_evaluation(
    trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    """Two of the three proteins have no known residue. The other is a copy of a training protein.

    So no protein is left for the second bound, which leaves out copies.
    """
    text = f">copy\n{ProteinTokenizer().decode(store[0])}\n>x\nXXX\n>y\nXXXX\n"
    (tmp_path / "held.fasta").write_text(text)
    command = ["-m", "protlig_dd.evaluate", f"from={trained_run}", "draws=2", "masked=false", "near=false"]
    done = run_python(*command, "input=held.fasta", "output=out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/report.json").read_text())["in_training"]["others"] is None
    assert "named above. Too few other proteins are left for held-out figures." in done.stdout


def test_an_unreadable_training_store_does_not_stop_an_evaluation(
    trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    run = tmp_path / "runs/small"
    shutil.copytree(trained_run, run)
    record = json.loads((run / "environment.json").read_text())
    (tmp_path / "damaged.h5").write_bytes(store.path.read_bytes()[:3000])
    (run / "environment.json").write_text(json.dumps(record | {"data_path": "damaged.h5"}))
    (tmp_path / "held.fasta").write_text(f">a\n{ProteinTokenizer().decode(store[0])}\n")
    command = ["-m", "protlig_dd.evaluate", "from=runs/small", "draws=2", "masked=false", "near=false"]
    done = run_python(*command, "input=held.fasta", "output=out")
    assert done.returncode == 0, done.stderr
    assert "its training set was not found or cannot be read" in done.stdout


def test_train_is_used_for_the_compared_model_only_if_the_fingerprint_matches(
    trained_run: Path, store: SequenceStore, tmp_path: Path
) -> None:
    trained = load_trained(str(trained_run), device="cpu", precision="fp32")
    # a model in tmp_path, outside any run, does not name its training store
    without_store = replace(trained, saved=replace(trained.saved, path=tmp_path))
    (found,) = all_training_data(str(store.path), None, without_store, label="the compared model")
    assert found.model == "the compared model"
    assert found.stores is not None
    assert found.stores.fingerprint == store.fingerprint
    # this model was trained on another store than that of train=
    other = replace(without_store, saved=replace(without_store.saved, data_fingerprint="0" * 32))
    (found,) = all_training_data(str(store.path), None, other, label="the compared model")
    assert found.stores is None


def test_without_a_training_set_copies_are_reported_as_not_compared(
    trained_run: Path, store: SequenceStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_trained(str(trained_run), device="cpu", precision="fp32")
    unmatched = replace(trained, saved=replace(trained.saved, data_fingerprint="0" * 32))
    (source,) = all_training_data(None, store, unmatched)
    found = leaks.find_leaks([store[0], store[1]], [source], "auto")
    assert found.lines() == [
        "proteins were not compared with the training proteins of this model: its training "
        "set was not found or cannot be read; name it with train=store.h5"
    ]
    assert (found.report()["copies"], found.report()["near"], found.cells(2)) == (None, None, ["", ""])
    lines = leaks.find_leaks([store[0], store[390]], all_training_data(str(store.path), None, unmatched), False).lines()
    assert lines[0] == (
        "warning: 1 of 2 proteins are exact copies of training proteins of this model, with the training set of train= "
        f"({store.path})"
    )
    clean = leaks.find_leaks([store[390]], all_training_data(None, store, trained), False)
    assert clean.lines()[0] == f"none of 1 proteins is an exact copy of a training protein of this model ({store.path})"


@pytest.mark.slow
@pytest.mark.system
def test_similar_training_proteins_are_found_with_mmseqs(
    trained_run: Path, store: SequenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_program("mmseqs")
    sources = all_training_data(None, store, load_trained(str(trained_run), device="cpu", precision="fp32"))
    changed = store[1].copy()
    changed[5::10] = np.where(changed[5::10] < N_STATES, (changed[5::10] + 1) % N_STATES, changed[5::10])
    shuffled = store[2].copy()
    shuffled[1:-1] = np.random.default_rng(0).permutation(shuffled[1:-1])
    monkeypatch.setattr(leaks, "MAX_RESIDUES", 1000)
    sequences = [store[0], changed, shuffled]
    assert leaks.find_leaks(sequences, sources, "auto").near is None
    found = leaks.find_leaks(sequences, sources, True)
    assert found.cells(3) == ["copy", "near", "no"]
    assert (
        "warning: 1 more of 3 proteins are similar to a training protein "
        "(>= 50% identity over >= 80% of at least one of the two sequences)" in found.lines()
    )


def test_a_single_protein_has_the_standard_error_of_its_draws(
    trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    (tmp_path / "one.fasta").write_text(f">one\n{ProteinTokenizer().decode(store[0])[:120]}\n")
    done = run_python(
        "-m",
        "protlig_dd.evaluate",
        f"from={trained_run}",
        "input=one.fasta",
        "output=out",
        "draws=4",
        f"train={store.path}",
        "device=cpu",
        "precision=fp32",
        "near=false",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    (row,) = csv.DictReader((tmp_path / "out/per_sequence.csv").read_text().splitlines())
    assert report["bound_se"] == pytest.approx(float(row["bound_nats_se"]) / 120, abs=1e-6)
    assert report["unigram_se"] is None
    table = (tmp_path / "out/report.md").read_text()
    assert f"| {report['bound']:.4f} ± {report['bound_se']:.4f} |" in table
    assert f"| unigram model, NLL | {report['unigram']:.4f} |" in table
    note = "With a single protein, the standard error of the bound is its Monte Carlo error, and all other"
    assert note in table
    assert "nan" not in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["input=none.fasta"], "none.fasta: no such file"),
        (["input=bad.fasta"], "bad.fasta: record b: illegal character '_' at position 2 of 3"),
        (["input=STORE", "split=tests"], "split=tests; choose from train, validation, test"),
        (["input=one.fasta", "draws=0"], "draws must be at least 1, got 0"),
        (["input=one.fasta", "near=perhaps"], "near=perhaps; choose from auto, true, false"),
        (["input=STORE", "from=nothing"], "nothing does not exist"),
    ],
)
def test_invalid_arguments_are_one_line_errors(
    trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command, options: list[str], message: str
) -> None:
    (tmp_path / "bad.fasta").write_text(">a\nACD\n>b\nA_D\n")
    (tmp_path / "one.fasta").write_text(">a\nACD\n")
    before = sorted(tmp_path.iterdir())
    model = [] if any(option.startswith("from=") for option in options) else [f"from={trained_run}"]
    arguments = [option.replace("STORE", str(store.path)) for option in options]
    assert_one_line_error(run_python("-m", "protlig_dd.evaluate", *model, *arguments), message)
    assert sorted(tmp_path.iterdir()) == before
