"""`python -m protlig_dd.judge` and its statistics, against counts made one by one."""

import csv
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyhmmer
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.data.build import SAMPLE_FOLDER
from protlig_dd.data.fasta import read_fasta
from protlig_dd.data.store import SequenceStore
from protlig_dd.evaluation.judges import (
    kmer_divergence,
    kmers,
    low_complexity,
    share_of_residues,
    shuffled,
    tandem_repeats,
    unique_share,
)
from protlig_dd.evaluation.outside import esm2_pseudo_perplexities, esmfold_plddts, pfam_hits, pseudo_perplexity
from protlig_dd.tokenizer import ProteinTokenizer

from .conftest import Command, assert_one_line_error, require_program

SEQUENCES = st.lists(st.text("ACDX", min_size=1, max_size=30), min_size=1, max_size=5)


def ids_of(text: str) -> np.ndarray:
    return ProteinTokenizer().encode(text)[1:-1]


@given(SEQUENCES, st.integers(1, 3))
def test_kmers_are_those_of_the_letters(sequences: list[str], k: int) -> None:
    codes, owners = kmers([ids_of(one) for one in sequences], k)
    found = Counter(zip(owners.tolist(), codes.tolist(), strict=True))
    expected: Counter[tuple[int, int]] = Counter()
    for i, one in enumerate(sequences):
        for start in range(len(one) - k + 1):
            word = one[start : start + k]
            if "X" not in word:
                expected[i, sum(int(x) * 20 ** (k - 1 - j) for j, x in enumerate(ids_of(word)))] += 1
    assert found == expected


def test_divergence_is_jensen_and_shannons() -> None:
    p, q = {"A": 3 / 4, "C": 1 / 4}, {"A": 1 / 3, "D": 2 / 3}
    m = {letter: (p.get(letter, 0) + q.get(letter, 0)) / 2 for letter in "ACD"}
    by_hand = sum(x * math.log(x / m[letter]) for letter, x in [*p.items(), *q.items()]) / 2
    value, error = kmer_divergence([ids_of("AAAC")] * 3, [ids_of("ADD")], 1, bootstrap=9,
                                   generator=np.random.default_rng(0))  # fmt: skip
    assert value == pytest.approx(by_hand)
    assert error == pytest.approx(0, abs=1e-12)  # the three are the same
    assert math.isnan(kmer_divergence([ids_of("A")], [ids_of("AC")], 2, bootstrap=2,
                                      generator=np.random.default_rng(0))[0])  # fmt: skip


def test_the_bootstraps_error_is_the_spread_of_other_draws() -> None:
    generator = np.random.default_rng(0)
    reference = [generator.integers(0, 14, 100) for _ in range(400)]
    found = []
    for _ in range(60):
        rates = generator.dirichlet(np.full(20, 5.0), 30)
        some = [generator.choice(20, 100, p=rate) for rate in rates]
        found.append(kmer_divergence(some, reference, 1, bootstrap=60, generator=generator))
    values, errors = np.array(found).T
    assert 0.6 < errors.mean() / values.std() < 1.6


@given(st.text("ACD", min_size=1, max_size=40))
def test_low_complexity_is_that_of_some_window(text: str) -> None:
    expected = [False] * len(text)
    for start in range(len(text) - 11):
        counts = Counter(text[start : start + 12])
        entropy = -sum(n / 12 * math.log2(n / 12) for n in counts.values())
        if entropy <= 2.2:
            expected[start : start + 12] = [True] * 12
    assert low_complexity(ids_of(text)).tolist() == expected


def test_windows_of_many_letters_are_not_of_low_complexity() -> None:
    assert not low_complexity(ids_of("ACDEFGHIKLMNPQRSTVWY")).any()
    assert low_complexity(ids_of("ACDEFGHIKLMNPQ" + "A" * 12)).tolist() == [False] * 9 + [True] * 17


@given(st.text("AC", min_size=1, max_size=14) | st.text("ACD", min_size=6, max_size=9).map(lambda unit: unit * 3 + "W"))
def test_tandem_repeats_are_units_three_times_in_a_row(text: str) -> None:
    expected = np.zeros(len(text), bool)
    for start, unit in itertools.product(range(len(text)), range(1, 11)):
        for end in range(start + max(3 * unit, 6), len(text) + 1):
            stretch = text[start:end]
            if all(stretch[i] == stretch[i - unit] for i in range(unit, len(stretch))):
                expected[start:end] = True
    assert tandem_repeats(ids_of(text)).tolist() == expected.tolist()


def test_shares_and_shuffling() -> None:
    some = [ids_of("ACDEFGHIKLMNPQRSTVWY"), ids_of("AACC")]
    mixed = shuffled(some, np.random.default_rng(0))
    assert [sorted(one) for one in mixed] == [sorted(one) for one in some]
    assert mixed[0].tolist() != some[0].tolist()
    assert unique_share([some[0], some[1], some[0]]) == pytest.approx(2 / 3)
    ratio, error = share_of_residues([np.array([True, False]), np.array([True, True, True, False])])
    assert ratio == pytest.approx(4 / 6)
    assert error == pytest.approx(math.sqrt(2 * ((1 - 4 / 3) ** 2 + (3 - 8 / 3) ** 2)) / 6)


def test_pseudo_perplexity_masks_one_residue_at_a_time() -> None:
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    tokens, seen = torch.tensor([5, 0, 3, 2, 6]), []

    def logits_of(shown: torch.Tensor) -> torch.Tensor:
        seen.append(shown[0].tolist())
        return table[shown.roll(1, 1)]  # that of the token before

    value = pseudo_perplexity(logits_of, tokens, mask=4, places=range(1, 4))
    assert seen == [[5, 4, 3, 2, 6], [5, 0, 4, 2, 6], [5, 0, 3, 4, 6]]
    nats = [-float(table[a].log_softmax(0)[b]) for a, b in ((5, 0), (0, 3), (3, 2))]
    assert value == pytest.approx(math.exp(sum(nats) / 3))


def test_judges_that_are_not_installed_say_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "pyhmmer", None)
    with pytest.raises(ValueError, match=r"esm2=x needs transformers: pip install 'protlig_dd\[esm\]'"):
        esm2_pseudo_perplexities(["AC"], "x", "cpu")
    with pytest.raises(ValueError, match=r"esmfold=true needs transformers: pip install 'protlig_dd\[esm\]'"):
        esmfold_plddts(["AC"], "cpu")
    with pytest.raises(ValueError, match=r"hmm=x.hmm needs pyhmmer: pip install 'protlig_dd\[hmm\]'"):
        pfam_hits(["AC"], Path("x.hmm"))


@pytest.fixture(scope="module")
def hmm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile HMM of one bundled protein, without gathering cutoffs."""
    protein = next(read_fasta(SAMPLE_FOLDER / "train.fasta.gz"))
    alphabet = pyhmmer.easel.Alphabet.amino()
    sequence = pyhmmer.easel.TextSequence(name="family", sequence=protein.sequence).digitize(alphabet)
    profile, _, _ = pyhmmer.plan7.Builder(alphabet).build(sequence, pyhmmer.plan7.Background(alphabet))
    path = tmp_path_factory.mktemp("hmm") / "family.hmm"
    with path.open("wb") as file:
        profile.write(file)
    return path


def test_a_profile_finds_its_own_family_and_nothing_shuffled(hmm: Path) -> None:
    protein = next(read_fasta(SAMPLE_FOLDER / "train.fasta.gz")).sequence
    mixed = "".join(np.random.default_rng(0).permutation(list(protein)))
    assert pfam_hits([mixed, protein, protein[: len(protein) * 3 // 4], mixed[::-1]], hmm) == [False, True, True, False]


@pytest.mark.slow
def test_the_folder_of_tables(store: SequenceStore, hmm: Path, tmp_path: Path, run_python: Command) -> None:
    require_program("mmseqs")
    decode = ProteinTokenizer().decode
    train, test = store.split("train"), store.split("test")
    copies = [decode(store[row]) for row in train[:4]]
    letters = np.random.default_rng(0)
    noise = ["".join(letters.choice(list("ACDEFGHIKLMNPQRSTVWY"), 120)) for _ in range(4)]
    texts = [*copies, *noise, "A" * 60, noise[0]]
    (tmp_path / "samples.fasta").write_text("".join(f">s{i}\n{text}\n" for i, text in enumerate(texts)))
    command = ["-m", "protlig_dd.judge", "samples=samples.fasta", f"natural={store.path}", f"hmm={hmm}"]
    done = run_python(*command, "output=out", "bootstrap=20")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/judges.json").read_text())}
    assert (rows["proteins"]["samples"], rows["proteins"]["natural"]) == (10, len(test) // 2)
    assert rows["different sequences"]["samples"] == pytest.approx(0.9)
    assert rows["with a training protein at E <= 0.001"]["samples"] == pytest.approx(0.4)
    assert rows["with a training protein at E <= 0.001"]["shuffled"] == 0
    assert rows["identity to the best of those"]["samples"] == pytest.approx(1)
    assert rows["with one at >= 50% identity over >= 80%"]["samples"] == pytest.approx(0.4)
    assert rows["clusters at 50% identity, a protein"]["samples"] == pytest.approx(0.9)
    assert rows["with a hit to the HMMs"]["samples"] == pytest.approx(0.1)
    divergence = rows["3-mers, divergence in nats"]
    assert divergence["samples"] > divergence["natural"]
    assert rows["composition, divergence in nats"]["natural"] == pytest.approx(
        rows["composition, divergence in nats"]["shuffled"]
    )
    table = (tmp_path / "out/table.md").read_text()
    assert table in done.stdout
    assert len(table.splitlines()) == 2 + len(rows)
    ones = list(csv.DictReader((tmp_path / "out/per_sequence.csv").read_text().splitlines()))
    assert [one["id"] for one in ones] == [f"s{i}" for i in range(10)]
    assert ones[9]["same_as"] == "s4"
    assert (float(ones[8]["low_complexity"]), float(ones[8]["tandem_repeats"])) == (1, 1)
    assert [float(one["identity to the best of those"]) for one in ones[:4]] == pytest.approx([1] * 4)
    assert_one_line_error(run_python(*command, "output=out"), "out exists already")


@pytest.mark.slow
def test_without_mmseqs_the_rest_is_told(store: SequenceStore, tmp_path: Path, run_python: Command) -> None:
    texts = "".join(f">n{i}\n{ProteinTokenizer().decode(store[i])}\n" for i in range(8))
    (tmp_path / "samples.fasta").write_text(texts)
    command = ["-m", "protlig_dd.judge", "samples=samples.fasta", "natural=samples.fasta", "bootstrap=2"]
    done = run_python(*command, "mmseqs=false", f"train={store.path}")
    assert done.returncode == 0, done.stderr
    assert "MMseqs2 is not used, so relatives and clusters are not searched for" in done.stdout
    names = [row["name"] for row in json.loads((tmp_path / "judged/judges.json").read_text())]
    assert len(names) == 12
    process = run_python(*command, "mmseqs=true", "output=other", PATH="/nowhere")
    assert_one_line_error(process, "mmseqs=true, but no `mmseqs` is on the PATH: install it")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["samples=none.fasta"], "none.fasta: no such file"),
        (["samples=gaps.fasta"], "gaps.fasta: record b: illegal character '_' at position 2 of 3"),
        (["samples=one.fasta"], "one.fasta has 1 sequences; a standard error needs at least 2"),
        (["natural=one.fasta"], "one.fasta has 1 sequences"),
        (["natural=two.fasta"], "two.fasta has 2 sequences; natural proteins and their reference need at least 4"),
        (["hmm=none.hmm"], "hmm=none.hmm: no such file"),
        (["hmm=two.fasta", "natural=STORE"], "two.fasta: not a file of HMMs"),
        (["mmseqs=maybe"], "mmseqs=maybe; there are auto, true and false"),
        (["bootstrap=1"], "bootstrap must be at least 2, got 1"),
        (["split=tests"], "split=tests; there are train, validation, test"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    store: SequenceStore, tmp_path: Path, run_python: Command, options: list[str], message: str
) -> None:
    (tmp_path / "gaps.fasta").write_text(">a\nACD\n>b\nA_D\n")
    (tmp_path / "one.fasta").write_text(">a\nACD\n")
    (tmp_path / "two.fasta").write_text(">a\nACD\n>b\nACD\n")
    before = sorted(tmp_path.iterdir())
    given = {"samples": "two.fasta", "natural": str(store.path), "mmseqs": "false"}
    given |= dict(option.replace("STORE", str(store.path)).split("=") for option in options)
    process = run_python("-m", "protlig_dd.judge", *(f"{key}={value}" for key, value in given.items()))
    assert_one_line_error(process, message)
    assert sorted(tmp_path.iterdir()) == before
