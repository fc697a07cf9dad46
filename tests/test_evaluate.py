"""`python -m protlig_dd.evaluate`: its figures against sums made by hand, and the ways to give it proteins."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.batch import PackedBatch
from protlig_dd.data.store import SequenceStore
from protlig_dd.diffusion.graph import Absorbing
from protlig_dd.diffusion.likelihood import masked_cross_entropy, nll_bound, per_residue
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluate import cropped
from protlig_dd.evaluation.baselines import fit_baselines
from protlig_dd.runtime.trained import run_folder
from protlig_dd.tokenizer import BOS, EOS, N_STATES, ProteinTokenizer

from .conftest import Command, assert_one_line_error, make_model, random_batch

encode = ProteinTokenizer().encode


def test_the_bigram_model_is_its_counts() -> None:
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
def test_a_baselines_nats_are_summed_position_by_position(sequences: list[str]) -> None:
    tokens = [encode(sequence) for sequence in sequences]
    baselines = fit_baselines(tokens)
    for one in tokens:
        unigram, bigram = baselines.nats(one)
        for i, token in enumerate(one):
            inside = token < N_STATES
            assert unigram[i] == (-baselines.unigram[token] if inside else 0)
            assert bigram[i] == (-baselines.bigram[one[i - 1], token] if inside else 0)


def test_what_each_token_adds_sums_up_to_the_bound() -> None:
    batch = random_batch([5, 9, 2])
    score_fn = ScoreFn(make_model(), Absorbing(), "x0")
    for estimator in ("integral", "exact_count"):
        bound = nll_bound(score_fn, batch, Absorbing(), LogLinearNoise(), draws=3, estimator=estimator,
                          generator=torch.Generator().manual_seed(0))  # fmt: skip
        sums = [float(part.sum()) for part in bound.token_nats.split(list(batch.lengths))]
        assert sums == pytest.approx(bound.nats.tolist())


def test_masked_cross_entropy_is_that_of_masks_made_by_hand() -> None:
    """With a network whose logits at a token depend on that token's place alone, every mask costs the same."""
    tokens = torch.tensor([BOS, 3, 21, 5, 7, 0, 11, 2, EOS])
    batch, table = (
        PackedBatch.pack([tokens, tokens[:5]]),
        torch.randn(30, 20, generator=torch.Generator().manual_seed(1)),
    )
    seen: list[torch.Tensor] = []

    def network(noised: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(noised.tokens)
        return table[noised.positions]

    nats, masked = masked_cross_entropy(ScoreFn(network, Absorbing(), "x0"), batch, Absorbing(), share=0.3, draws=40,
                                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert masked.tolist() == [40 * 2, 40 * 1]  # round(0.3 * 6), round(0.3 * 3)
    times = sum((one == 20).double() for one in seen)
    assert not times[(batch.tokens >= 20)].any()
    assert (times[batch.tokens < 20] > 0).all()
    cost = F.cross_entropy(table[batch.positions], batch.tokens.clamp(max=19), reduction="none").double()
    torch.testing.assert_close(nats, times * cost)


def test_a_crop_is_the_first_residues_without_an_end() -> None:
    assert ProteinTokenizer().decode(cropped(encode("ACDEF"), 3)) == "ACD"
    assert cropped(encode("ACDEF"), 3).tolist()[-1] == 2
    assert cropped(encode("ACDEF"), 5).tolist() == encode("ACDEF").tolist()


def test_a_checkpoints_run_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "runs/demo/checkpoints/step_00000030"
    checkpoint.mkdir(parents=True)
    for folder, path in ((checkpoint, "."), (checkpoint.parent, checkpoint.name), (tmp_path, checkpoint)):
        monkeypatch.chdir(folder)
        assert run_folder(Path(path)) == tmp_path / "runs/demo"
    assert run_folder(tmp_path / "models/demo") is None


def test_the_folder_holds_what_the_parts_sum_up_to(
    trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    command = ["-m", "protlig_dd.evaluate", f"from={trained_run}", "draws=4", "tokens_per_pack=900", "precision=fp32"]
    done = run_python(*command, f"input={store.path}", "output=out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out/per_sequence.csv").read_text().splitlines()))
    assert len(rows) == report["sequences"] == 20
    assert [row["id"] for row in rows] == [store.id(i) for i in store.split("test")]
    residues = np.array([int(row["residues"]) for row in rows])
    for name in ("bound", "unigram", "bigram", "oadm"):
        nats = np.array([float(row[f"{name}_nats"]) for row in rows])
        assert per_residue(nats, residues) == pytest.approx((report[name], report[f"{name}_se"]), abs=1e-5)
    assert report["bound"] == report["oadm"]  # of a time-free model they are the same
    assert 2.5 < report["masked"] < 3.2
    for part in ("by_length", "by_amino_acid"):
        some = list(csv.DictReader((tmp_path / f"out/{part}.csv").read_text().splitlines()))
        counts = np.array([int(row["residues"]) for row in some])
        for name in ("bound", "unigram", "bigram"):
            total = sum(float(row[name]) * n for row, n in zip(some, counts, strict=True))
            assert total / counts.sum() == pytest.approx(report[name], abs=1e-4)
    assert (tmp_path / "out/report.md").read_text() in done.stdout
    again = run_python(*command, f"input={store.path}", "output=out")
    assert_one_line_error(again, "out exists already")
    # the same figures from two processes
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    done = run_python(*launcher, f"input={store.path}", "output=ranks")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ranks/per_sequence.csv").read_text() == (tmp_path / "out/per_sequence.csv").read_text()


def test_fasta_is_compared_with_the_runs_own_training_set(
    trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    decode = ProteinTokenizer().decode
    long = decode(store[0]) * 5
    short = [i for i in store.split("test") if store.lengths[i] <= 300][:4]
    text = "".join(f">{store.id(i)}\n{decode(store[i]).lower()}\n" for i in short)
    (tmp_path / "held.fasta").write_text(f"{text}>long\n{long}\n")
    command = ["-m", "protlig_dd.evaluate", f"from={trained_run}", "input=held.fasta", "draws=1", "masked=false"]
    done = run_python(*command, "output=out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["cut_to_max_len"] == 1
    assert "their first 300 are scored" in done.stdout
    assert report["baseline_sequences"] == 360
    assert "masked" not in report
    exported = run_python("-m", "protlig_dd.export", f"from={trained_run}", "to=small")
    assert exported.returncode == 0, exported.stderr
    bare = run_python(*command[:2], "from=small", *command[3:], "output=bare")
    assert bare.returncode == 0, bare.stderr
    assert "no training set for unigram and bigram models: give train=store.h5" in bare.stdout
    there = json.loads((tmp_path / "bare/report.json").read_text())
    assert (there["bound"], there["baseline_sequences"]) == (report["bound"], None)
    few = run_python(*command, "output=few", "max_sequences=2")
    assert few.returncode == 0, few.stderr
    assert json.loads((tmp_path / "few/report.json").read_text())["sequences"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["input=none.fasta"], "none.fasta: no such file"),
        (["input=bad.fasta"], "bad.fasta: record b: illegal character '_' at position 2 of 3"),
        (["input=one.fasta"], "one.fasta has 1 sequences; a standard error needs at least 2"),
        (["input=STORE", "split=tests"], "split=tests; there are train, validation, test"),
        (["input=one.fasta", "draws=0"], "draws must be at least 1, got 0"),
        (["input=STORE", "from=nothing"], "nothing: neither a run folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command, options: list[str], message: str
) -> None:
    (tmp_path / "bad.fasta").write_text(">a\nACD\n>b\nA_D\n")
    (tmp_path / "one.fasta").write_text(">a\nACD\n")
    before = sorted(tmp_path.iterdir())
    more = [] if any(option.startswith("from=") for option in options) else [f"from={trained_run}"]
    wanted = [option.replace("STORE", str(store.path)) for option in options]
    assert_one_line_error(run_python("-m", "protlig_dd.evaluate", *more, *wanted), message)
    assert sorted(tmp_path.iterdir()) == before
