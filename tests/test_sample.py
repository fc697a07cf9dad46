"""`python -m protlig_dd.sample`: biases, lengths, and the bounds in the headers of samples."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from protlig_dd.batch import PackedBatch
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.diffusion.likelihood import nll_bound
from protlig_dd.evaluation.likelihood.held_out import length_counts
from protlig_dd.inference.lengths import Lengths, choose_lengths, lengths_of
from protlig_dd.inference.model import load_trained
from protlig_dd.inference.steering import read_log_bias
from protlig_dd.system.random import keyed_generator
from protlig_dd.tokenizer import AMINO_ACIDS, ProteinTokenizer

from .conftest import Command, assert_one_line_error

C, K = AMINO_ACIDS.index("C"), AMINO_ACIDS.index("K")


def test_a_bias_is_the_same_at_all_positions_or_has_a_row_for_each(tmp_path: Path) -> None:
    everywhere = read_log_bias({"C": float("-inf"), "K": 0.5}, [3])
    assert isinstance(everywhere, torch.Tensor)
    assert everywhere[[C, K]].tolist() == [-torch.inf, 0.5]
    assert everywhere.count_nonzero() == 2
    assert everywhere.dtype == torch.float64
    file = tmp_path / "bias.csv"
    file.write_bytes(b"\xef\xbb\xbfC, K\r\n-inf,0\r\n\r\n0,2.5\r\n")
    positions = read_log_bias(str(file), [2, 2, 2])
    assert len(positions) == 3
    assert positions[1][:, [C, K]].tolist() == [[-torch.inf, 0.0], [0.0, 2.5]]
    assert read_log_bias(None, [3]) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "give a line of amino acids, then a row of numbers"),
        ("C,K\n", "give a line of amino acids, then a row of numbers"),
        ("C,Z\n1,2\n", "line 1: 'Z' is not one of the amino acids ACDEFGHIKLMNPQRSTVWY"),
        ("C,C\n1,2\n", "line 1: C appears 2 times"),
        ("C,K\n\n1,2\n1\n", "line 4: 1 numbers for the 2 amino acids of the first line"),
        ("C,K\n  \n1,2\n1\n", "line 4: 1 numbers"),
        ("C,K\n1,x\n", "line 2: 'x' for K is not a number"),
        ("C,K\n1,inf\n", "line 2: K must be finite or -inf, got inf"),
        (",".join(AMINO_ACIDS) + "\n" + ",".join(["-inf"] * 20), "line 2 forbids every amino acid"),
        (
            "C\n1\n1\n1\n",
            "has 3 rows but protein 2 has 4 residues; the file needs one row per residue, so set lengths=3 ",
        ),
    ],
)
def test_the_error_for_a_wrong_bias_file_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bias.csv").write_text(text)
    with pytest.raises(ValueError, match=f"bias.csv.*{message}"):
        read_log_bias(str(tmp_path / "bias.csv"), [3, 4])


def test_a_bias_file_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bias.csv").write_bytes("C\n1\n".encode("utf-16"))
    with pytest.raises(ValueError, match="bias.csv is not a CSV file in UTF-8"):
        read_log_bias(str(tmp_path / "bias.csv"), [1])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (0, "log_bias=0: no such file; to bias amino acids, give them in quotes"),
        ({"Z": 1}, "log_bias: 'Z' is not one"),
        ({"C": "much"}, "'much' for C is not a number"),
        ("no.csv", "log_bias=no.csv"),
    ],
)
def test_the_error_for_a_wrong_bias_names_the_wrong_part(wanted: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_log_bias(wanted, [3])


def test_a_range_of_lengths_includes_both_ends() -> None:
    drawn = Counter(choose_lengths("7-9", 3000, 1, None))
    assert set(drawn) == {7, 8, 9}
    assert all(abs(times / 3000 - 1 / 3) < 0.05 for times in drawn.values())


@pytest.mark.parametrize("wanted", ["empirical", "5-9", "7"])
def test_the_first_lengths_do_not_depend_on_the_number_of_proteins(wanted: str) -> None:
    known = Lengths([0, 0, 0, 0, 0, 3, 3, 3, 3, 3], "some")
    few, many = (choose_lengths(wanted, n, 3, known) for n in (10, 3000))
    assert many[:10] == few
    assert {"empirical": {5, 6, 7, 8, 9}, "5-9": {5, 6, 7, 8, 9}, "7": {7}}[wanted] == set(many)
    assert wanted == "7" or choose_lengths(wanted, 10, 4, known) != few


@pytest.mark.parametrize("wanted", ["", "0", "9-5", "5-", "-5", "a", "5-9-12", "1.5"])
def test_invalid_lengths_are_errors(wanted: str) -> None:
    with pytest.raises(ValueError, match=f"lengths={wanted}: give a number or a range"):
        choose_lengths(wanted, 3, 0, Lengths([0, 1], "some"))


def test_lengths_must_be_given_if_the_checkpoint_has_no_record_of_them() -> None:
    assert choose_lengths("7", 2, 0, None) == [7, 7]
    with pytest.raises(ValueError, match="has no record of its training lengths; give lengths="):
        choose_lengths("empirical", 2, 0, None)


def test_cropped_proteins_are_left_out_of_the_empirical_lengths(store: SequenceStore) -> None:
    """The model was trained on crops of 200 residues, but a protein of 800 residues is not counted with length 200."""
    group, max_len = StoreGroup([store]), 200
    lengths = [int(store.lengths[row]) for row in store.split("train")]
    counts, cropped = length_counts(group, max_len)
    assert cropped == sum(length > max_len for length in lengths) > 20
    assert counts == np.bincount([length for length in lengths if length <= max_len], minlength=max_len + 1).tolist()
    known = lengths_of(counts, cropped, max_len)
    assert known is not None
    assert known.description == (
        f"{len(lengths) - cropped:,} training proteins of up to 200 residues; "
        f"{cropped:,} longer proteins were cropped in training and are left out"
    )
    drawn = choose_lengths("empirical", 2000, 0, known)
    assert drawn.count(max_len) / 2000 < 0.03
    assert set(drawn) <= set(lengths)


def test_counts_at_max_len_of_earlier_versions_are_left_out() -> None:
    known = lengths_of([0, 0, 5, 0, 90], None, 4)
    assert known is not None
    assert known.counts == [0, 0, 5, 0, 0]
    assert known.description.endswith(
        "; 90 proteins with 4 residues are left out, because the model does not record which of them were cropped"
    )
    assert choose_lengths("empirical", 3, 0, known) == [2, 2, 2]
    with pytest.raises(
        ValueError,
        match=r"no training lengths to draw from \(0 training .* 95 proteins with 4 residues .*\); give lengths=",
    ):
        choose_lengths("empirical", 3, 0, lengths_of([0, 0, 0, 0, 95], None, 4))


def assert_bounds_are_those_of_the_model(
    records: Sequence[FastaRecord], run: Path, *, numbers: Sequence[int], seed: int, draws: int
) -> None:
    """Compare nll and nll_se in each header (nats per residue) with the bound of that protein, computed alone."""
    trained = load_trained(str(run), device="cpu", precision="fp32")
    for number, record in zip(numbers, records, strict=True):
        batch = PackedBatch.pack([torch.from_numpy(ProteinTokenizer().encode(record.sequence).astype(np.int64))])
        generator = keyed_generator(seed, "bound", number, torch.device("cpu"))
        bound = nll_bound(trained.score_fn, batch, generator=generator, draws=draws, estimator="exact_count")
        residues = sum(letter in AMINO_ACIDS for letter in record.sequence)
        (written,) = re.findall(r" nll=(\d\.\d{4}) nll_se=(\d\.\d{4})", record.description)
        expected = [float(value) / residues for value in (bound.nats, bound.standard_error)]
        assert [float(value) for value in written] == pytest.approx(expected, abs=1.5e-4)


@pytest.mark.slow
def test_headers_give_the_bound_of_each_protein_on_any_number_of_ranks(
    trained_run: Path, tmp_path: Path, run_python: Command
) -> None:
    command = ["-m", "protlig_dd.sample", f"from={trained_run}", "steps=4", "lengths=20-60", "tokens_per_pack=100"]
    command += ["precision=fp32", "nll_draws=3"]
    done = run_python(*command, "output=one.fasta", "n=7")
    assert done.returncode == 0, done.stderr
    records = list(read_fasta(tmp_path / "one.fasta"))
    assert [record.id for record in records] == [f"small_{i}" for i in range(1, 8)]
    for record in records:
        found = re.fullmatch(
            r"run=small step=40 seed=0 length=(\d+) sampler=analytic steps=4 lengths=20-60 nll=(\S+) nll_se=(\S+)",
            record.description,
        )
        assert found, record.description
        assert int(found[1]) == len(record.sequence)
    assert_bounds_are_those_of_the_model(records, trained_run, numbers=range(7), seed=0, draws=3)
    residues = sum(len(record.sequence) for record in records)
    assert (
        f"7 proteins, {residues / 7:.0f} residues on average; 0.00% of draws had a negative probability" in done.stdout
    )
    few = run_python(*command, "output=few.fasta", "n=3", "tokens_per_pack=4000")
    assert few.returncode == 0, few.stderr
    assert (tmp_path / "one.fasta").read_text().startswith((tmp_path / "few.fasta").read_text())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run_python(*launcher, *command, "output=two.fasta", "n=7")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.fasta").read_text() == (tmp_path / "one.fasta").read_text()
    for lengths in ("301", "1-301"):  # the upper end of a range may be drawn
        assert_one_line_error(
            run_python(*command, "output=long.fasta", f"lengths={lengths}", "n=1"),
            f"lengths={lengths}: the longest protein has 301 residues; this model was trained on 1 to 300",
        )
