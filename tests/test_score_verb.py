"""`python -m protlig_dd.score`: its figures are compared with `evaluate` and with single evaluations of the network."""

import csv
import gzip
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from protlig_dd.batch import PackedBatch
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.data.store import SequenceStore
from protlig_dd.evaluate import evaluate
from protlig_dd.inference.model import load_trained
from protlig_dd.score import score_proteins
from protlig_dd.tokenizer import BOS, EOS, MASK, N_STATES, ProteinTokenizer

from .conftest import Command, composed
from .exported import KINDS, write_random

Row = dict[str, str]
Score = Callable[..., list[Row]]
FIGURES = ("bound", "bound_se", "perplexity", "perplexity_se", "pseudo_nll", "pseudo_perplexity")
COLUMNS = ["id", "length", "scored_residues", *FIGURES]


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The exported model models/m of a kind in KINDS (absorbing by default), in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["score"])  # ranks compare the arguments
    (tmp_path / "models").mkdir()
    return write_random(tmp_path / "models/m", getattr(request, "param", "absorbing"))


@pytest.fixture
def short(proteins: list[FastaRecord]) -> list[FastaRecord]:
    """Three proteins of at most 60 residues."""
    return [record for record in proteins if 20 <= len(record.sequence) <= 60][:3]


@pytest.fixture
def score(model: Path, tmp_path: Path) -> Score:
    """Return a function that scores a FASTA text and returns the rows of the table."""

    def run(text: str, *overrides: str, verb: str = "score") -> list[Row]:
        number = len(list(tmp_path.iterdir()))
        (tmp_path / f"in{number}.fasta").write_text(text)
        common = [f"from={model}", f"input=in{number}.fasta", "device=cpu", "precision=fp32", "draws=6", "seed=3"]
        if verb == "evaluate":
            evaluate(composed(*common, f"output=out{number}", "near=false", *overrides, name="evaluate"))
            return read(tmp_path / f"out{number}/per_sequence.csv")
        score_proteins(composed(*common, f"output=out{number}.csv", *overrides, name="score"))
        return read(tmp_path / f"out{number}.csv")

    return run


def read(path: Path) -> list[Row]:
    return list(csv.DictReader(path.read_text().splitlines()))


def fasta(*records: FastaRecord) -> str:
    return "".join(f">{record.id}\n{record.sequence}\n" for record in records)


def figures(row: Row, *names: str) -> list[float]:
    return [float(row[name]) for name in names]


@pytest.mark.parametrize("model", KINDS, indirect=True)
@pytest.mark.parametrize("tokens_per_pack", [10, 16384])
def test_the_bound_is_that_of_evaluate_for_the_protein_alone(
    score: Score, short: list[FastaRecord], tokens_per_pack: int
) -> None:
    rows = score(fasta(*short), f"tokens_per_pack={tokens_per_pack}")
    for row, record in zip(rows, short, strict=True):
        (expected,) = score(fasta(record), "masked=false", verb="evaluate")
        residues = int(expected["residues"])
        assert (row["id"], int(row["scored_residues"])) == (record.id, residues)
        nats = [value / residues for value in figures(expected, "bound_nats", "bound_nats_se")]
        assert figures(row, "bound", "bound_se") == pytest.approx(nats, abs=2e-6)
        perplexity = math.exp(nats[0])
        assert figures(row, "perplexity", "perplexity_se") == pytest.approx(
            [perplexity, perplexity * nats[1]], rel=1e-5
        )


def test_a_protein_has_the_same_scores_whatever_else_the_file_contains(score: Score, short: list[FastaRecord]) -> None:
    first, second, third = short
    (alone,) = score(fasta(first))
    together = score(fasta(third, first, second, first))
    assert together[1] == together[3] == alone
    assert list(alone) == COLUMNS
    for row, packed in zip(together, score(fasta(third, first, second, first), "tokens_per_pack=70"), strict=True):
        assert figures(row, *FIGURES) == pytest.approx(figures(packed, *FIGURES), abs=2e-5)
    (other_seed,) = score(fasta(first), "seed=4")
    assert other_seed["bound"] != alone["bound"]
    assert other_seed["pseudo_nll"] == alone["pseudo_nll"]  # it has no random draws


@pytest.mark.parametrize("model", ["absorbing", "absorbing, log_score"], indirect=True)
def test_the_pseudo_nll_is_the_mean_over_residues_that_are_masked_one_by_one(score: Score, model: Path) -> None:
    sequence = "MKTAYXXXXXXXXXXXXIBXXXAX"  # a few residues, so that one of them is a large fraction
    score_fn = load_trained(str(model), device="cpu", precision="fp32").score_fn
    tokens = torch.tensor([BOS, *ProteinTokenizer().encode(sequence)[1:-1].tolist(), EOS])
    sites = torch.nonzero(tokens < N_STATES)[:, 0].tolist()
    assert len(sites) == 7
    total = 0.0
    for site in sites:
        masked = tokens.clone()
        masked[site] = MASK
        sigma = torch.tensor([-math.log(1 - 1 / 7)])  # the sigma at which one residue of 7 is masked on average
        with torch.no_grad():
            logits = score_fn.model(PackedBatch.pack([masked]), sigma if score_fn.time_conditioning else 0 * sigma)
        total += float(F.cross_entropy(logits[site].double(), tokens[site]))
    for pack in (20, 100, 16384):
        (row,) = score(f">p\n{sequence.lower()}\n", f"tokens_per_pack={pack}")
        expected = [total / 7, math.exp(total / 7)]
        assert figures(row, "pseudo_nll", "pseudo_perplexity") == pytest.approx(expected, rel=1e-5)
        assert (row["length"], row["scored_residues"]) == ("24", "7")


def test_designed_residues_are_scored_given_the_context(
    score: Score, short: list[FastaRecord], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sequence = short[0].sequence
    text = f">p\n{sequence[:15].lower()}{sequence[15:]}\n"
    (row,) = score(text, "context=lower")
    assert list(row) == [
        *COLUMNS[:-2],
        "designed_residues",
        "bound_given_context",
        "bound_given_context_se",
        *COLUMNS[-2:],
    ]
    (expected,) = score(text, "context=lower", "masked=false", verb="evaluate")
    residues = int(row["designed_residues"])
    assert residues == int(expected["residues"]) == len(sequence) - 15
    nats = [value / residues for value in figures(expected, "bound_nats", "bound_nats_se")]
    assert figures(row, "bound_given_context", "bound_given_context_se") == pytest.approx(nats, abs=2e-6)
    (whole,) = score(text)  # the model was trained without context, so context=auto is none
    assert whole == {name: row[name] for name in COLUMNS}
    write_random(tmp_path / "models/designer", "absorbing", context="lower")
    (auto,) = score(text, "from=models/designer")
    assert "the lower-case residues are given, as in training (context=auto)" in capsys.readouterr().out
    assert auto["designed_residues"] == row["designed_residues"]
    assert "designed_residues" not in score(text.upper(), "from=models/designer")[0]
    assert "has no record with both upper-case and lower-case letters: all" in " ".join(capsys.readouterr().out.split())
    assert "designed_residues" not in score(text, "from=models/designer", "context=none")[0]


def test_a_long_protein_is_cropped_as_by_evaluate(
    score: Score, proteins: list[FastaRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    long = next(record.sequence for record in proteins if len(record.sequence) > 150)
    text = f">p\n{long[:100].lower()}{long[100:]}\n"
    (row,) = score(text, "context=lower")
    message = "1 proteins have more than 60 residues, the maximum length that this model was trained on: "
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{message}only the first 60 residues of each are scored" in printed
    assert f"{message}each is cropped to the 60 consecutive residues with the largest number of residues to" in printed
    assert (row["length"], row["scored_residues"], row["designed_residues"]) == (str(len(long)), "60", "60")
    for column, context in (("bound", "none"), ("bound_given_context", "lower")):
        (expected,) = score(text, f"context={context}", "masked=false", verb="evaluate")
        assert float(row[column]) == pytest.approx(float(expected["bound_nats"]) / 60, abs=2e-6)


def test_one_sequence_is_scored_on_the_command_line(
    score: Score, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = score(">sequence\nMKTAYIAKQR\n")
    (tmp_path / "zipped.fasta.gz").write_bytes(gzip.compress(b">sequence\nmktayiakqr*\n"))
    assert score(">p\nMKV\n", "input=zipped.fasta.gz") == [row]
    common = [f"from={model}", "sequence=MKTAYIAKQR", "device=cpu", "precision=fp32", "seed=3"]
    capsys.readouterr()
    before = set(tmp_path.iterdir())
    score_proteins(composed(*common, "draws=6", name="score"))
    assert set(tmp_path.iterdir()) == before
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-9:]] == [[*cell] for cell in row.items()]
    score_proteins(composed(*common, "draws=1", "output=one.csv", "pseudo=false", name="score"))
    (single,) = read(tmp_path / "one.csv")
    assert list(single) == COLUMNS[:-2]
    assert single["bound_se"] == single["perplexity_se"] == ""  # one draw has no standard error


@pytest.mark.parametrize("model", ["uniform"], indirect=True)
def test_a_model_without_a_mask_has_no_pseudo_likelihood(
    score: Score, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = score(">p\nMKTAYIAKQR\n")
    assert list(row) == COLUMNS[:-2]
    assert "no pseudo-likelihoods: the graph uniform has no mask (pseudo=auto)" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="pseudo=true masks one residue at a time, which needs the absorbing graph; this"
    ):
        score(">p\nMKTAYIAKQR\n", "pseudo=true")


def test_bad_input_is_an_error_and_writes_nothing(model: Path, tmp_path: Path, store: SequenceStore) -> None:
    for name, text in (
        ("empty", ""),
        ("illegal", ">a\nMKV\n>b\nMK1V\n"),
        ("unknown", ">a\nMKV\n>b\nXXZ\n"),
        ("good", ">a\nMKV\n"),
        ("only_lower", ">a\nMKv\n>b\nmkv\n"),
    ):
        (tmp_path / f"{name}.fasta").write_text(text)
    cases = {
        (): "give either input= (FASTA) or sequence= (one protein)",
        ("input=good.fasta", "sequence=MKV", "output=x.csv"): "give either input= (FASTA) or sequence= (one protein)",
        ("input=good.fasta",): "output is required with input=: give output=scores.csv",
        ("input=good.fasta", "output=good.fasta"): "good.fasta exists already",
        ("input=empty.fasta", "output=x.csv"): "empty.fasta",
        ("input=illegal.fasta", "output=x.csv"): "illegal.fasta: record b: illegal character '1' at position 3 of 4",
        ("input=unknown.fasta", "output=x.csv"): "record b has no residue to score: all its letters are among X, B, Z,",
        ("input=only_lower.fasta", "output=x.csv", "context=lower"): "record b: context=lower leaves nothing to design",
        (
            "input=good.fasta",
            "output=x.csv",
            "context=lower",
        ): "context=lower: good.fasta has no record with both upper",
        ("sequence=MK1", "output=x.csv"): "sequence=: illegal character '1' at position 3 of 3",
        ("sequence=MKV", "context=upper"): "context=upper: sequence= has no record with both upper-case and lower-case",
        (f"input={store.path}", "output=x.csv"): "this is a store; give FASTA, or use evaluate",
        ("sequence=MKV", "draws=0"): "draws must be at least 1, got 0",
        ("sequence=MKV", "pseudo=maybe"): "pseudo=maybe; choose from auto, true, false",
    }
    before = set(tmp_path.rglob("*"))
    for overrides, message in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            score_proteins(composed(f"from={model}", "device=cpu", *overrides, name="score"))
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_two_ranks_write_the_same_scores(
    model: Path, short: list[FastaRecord], tmp_path: Path, run_python: Command
) -> None:
    (tmp_path / "in.fasta").write_text(fasta(*short))
    command = ["-m", "protlig_dd.score", "from=models/m", "input=in.fasta", "device=cpu", "tokens_per_pack=300"]
    for ranks in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        process = run_python(*(launcher if ranks > 1 else []), *command, f"output={ranks}.csv")
        assert process.returncode == 0, process.stderr
        assert f"{ranks}.csv: 3 proteins" in process.stdout
        assert "pseudo-likelihoods" in process.stdout
    assert (tmp_path / "1.csv").read_text() == (tmp_path / "2.csv").read_text()
