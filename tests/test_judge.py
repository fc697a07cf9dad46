"""`python -m protlig_dd.judge`: its statistics are compared with direct counts."""

import csv
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyhmmer
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.data.mmseqs import Hit
from protlig_dd.data.prepare.bundled import SAMPLE_FOLDER
from protlig_dd.data.store import SequenceStore
from protlig_dd.evaluation.samples import relatives
from protlig_dd.evaluation.samples.external import (
    esm2_pseudo_perplexities,
    esmfold_plddts,
    pfam_hits,
    pseudo_perplexity,
)
from protlig_dd.evaluation.samples.statistics import (
    COLUMNS,
    SETS,
    Controls,
    Figure,
    Rows,
    cheap_judges,
    format_figure,
    kmer_divergence,
    kmers,
    low_complexity,
    match_lengths,
    perplexity,
    share,
    share_of_residues,
    shuffled,
    tandem_repeats,
    unique_share,
    with_controls,
)
from protlig_dd.evaluation.samples.verdicts import KINDS, Verdict, difference, verdict_on_lengths, verdicts
from protlig_dd.tokenizer import ProteinTokenizer

from .conftest import Command, assert_one_line_error, make_store, require_program

ENDINGS = ("", "_se", "_low", "_high")
ESM_LETTERS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
SEQUENCES = st.lists(st.text("ACDX", min_size=1, max_size=30), min_size=1, max_size=5)


def ids_of(text: str) -> np.ndarray:
    return ProteinTokenizer().encode(text)[1:-1]


@given(SEQUENCES, st.integers(1, 3))
def test_kmers_match_a_direct_count(sequences: list[str], k: int) -> None:
    codes, owners = kmers([ids_of(sequence) for sequence in sequences], k)
    found = Counter(zip(owners.tolist(), codes.tolist(), strict=True))
    expected: Counter[tuple[int, int]] = Counter()
    for i, sequence in enumerate(sequences):
        for start in range(len(sequence) - k + 1):
            word = sequence[start : start + k]
            if "X" not in word:
                expected[i, sum(int(x) * 20 ** (k - 1 - j) for j, x in enumerate(ids_of(word)))] += 1
    assert found == expected


def test_the_divergence_equals_the_jensen_shannon_divergence() -> None:
    p, q = {"A": 3 / 4, "C": 1 / 4}, {"A": 1 / 3, "D": 2 / 3}
    m = {letter: (p.get(letter, 0) + q.get(letter, 0)) / 2 for letter in "ACD"}
    by_hand = sum(x * math.log(x / m[letter]) for letter, x in [*p.items(), *q.items()]) / 2
    value, error, *_ = kmer_divergence(
        [ids_of("AAAC")] * 3, [ids_of("ADD")], 1, bootstrap=9, generator=np.random.default_rng(0)
    )
    assert value == pytest.approx(by_hand)
    assert error == pytest.approx(0, abs=1e-12)  # the three sequences are identical
    assert math.isnan(
        kmer_divergence([ids_of("A")], [ids_of("AC")], 2, bootstrap=2, generator=np.random.default_rng(0))[0]
    )


def test_the_bootstrap_error_matches_the_spread_over_independent_sets() -> None:
    generator = np.random.default_rng(0)
    reference = [generator.integers(0, 14, 100) for _ in range(400)]
    found = []
    for _ in range(60):
        rates = generator.dirichlet(np.full(20, 5.0), 30)
        sequences = [generator.choice(20, 100, p=rate) for rate in rates]
        found.append(kmer_divergence(sequences, reference, 1, bootstrap=60, generator=generator))
    values, errors = np.array(found).T[:2]
    assert 0.6 < errors.mean() / values.std() < 1.6


@given(st.text("ACDX", min_size=1, max_size=40))
def test_low_complexity_residues_match_a_direct_count_over_windows(text: str) -> None:
    expected = [False] * len(text)
    for start in range(len(text) - 11):
        counts = Counter(text[start : start + 12])
        entropy = -sum(n / 12 * math.log2(n / 12) for n in counts.values())
        if entropy <= 2.2 and "X" not in counts:
            expected[start : start + 12] = [True] * 12
    assert low_complexity(ids_of(text)).tolist() == expected


def test_windows_with_many_different_letters_do_not_have_low_complexity() -> None:
    assert not low_complexity(ids_of("ACDEFGHIKLMNPQRSTVWY")).any()
    assert low_complexity(ids_of("ACDEFGHIKLMNPQ" + "A" * 12)).tolist() == [False] * 9 + [True] * 17


@given(
    st.text("ACX", min_size=1, max_size=14) | st.text("ACD", min_size=6, max_size=9).map(lambda unit: unit * 3 + "W")
)
def test_tandem_repeats_are_units_repeated_three_times_in_a_row(text: str) -> None:
    expected = np.zeros(len(text), bool)
    for start, unit in itertools.product(range(len(text)), range(1, 11)):
        for end in range(start + max(3 * unit, 6), len(text) + 1):
            stretch = text[start:end]
            if all(stretch[i] == stretch[i - unit] != "X" for i in range(unit, len(stretch))):
                expected[start:end] = True
    assert tandem_repeats(ids_of(text)).tolist() == expected.tolist()


def test_shares_and_shuffling_match_values_by_hand() -> None:
    sequences = [ids_of("ACDEFGHIKLMNPQRSTVWY"), ids_of("AACC")]
    mixed = shuffled(sequences, np.random.default_rng(0))
    assert [sorted(sequence) for sequence in mixed] == [sorted(sequence) for sequence in sequences]
    assert mixed[0].tolist() != sequences[0].tolist()
    assert unique_share([sequences[0], sequences[1], sequences[0]]) == pytest.approx(2 / 3)
    ratio, error, *_ = share_of_residues([np.array([True, False]), np.array([True, True, True, False])])
    assert ratio == pytest.approx(4 / 6)
    assert error == pytest.approx(math.sqrt(2 * ((1 - 4 / 3) ** 2 + (3 - 8 / 3) ** 2)) / 6)


@pytest.mark.parametrize(
    ("figure", "text"),
    [(Figure(93138.0), "93,138"), (Figure(206.75), "206.8"), (Figure(math.nan), ""), (Figure(0.0, 0.0), "0 ± 0"),
     (Figure(0.05232, 0.0036), "0.0523 ± 0.0036"), (Figure(71.4, 12.3), "71 ± 12"),
     (Figure(0.000348, 0.000125), "0.00035 ± 0.00013"), (Figure(0.5, 0.0), "0.5000 ± 0.0000"),
     (Figure(0.25, low=0.2, high=0.31), "0.250 (0.200 to 0.310)")],
)  # fmt: skip
def test_figures_are_rounded_to_the_second_digit_of_their_error(figure: Figure, text: str) -> None:
    assert format_figure(figure) == text


@pytest.mark.parametrize(("hits", "n"), [(0, 300), (3, 10), (10, 10), (1, 4)])
def test_a_share_has_wilsons_interval(hits: int, n: int) -> None:
    """The ends of the interval are the two p for which |hits / n - p| = z sqrt(p (1 - p) / n)."""
    value, error, low, high = share([1.0] * hits + [0.0] * (n - hits))
    assert value == hits / n
    assert math.isnan(error)
    assert 0 <= low <= value <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(value - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-4, abs=1e-9)
    if not hits:
        assert format_figure(share([0.0] * 300)) == "0.0000 (0.0000 to 0.0126)"


def test_the_perplexity_of_a_set_averages_over_all_its_residues() -> None:
    nats, lengths = np.array([2.0, 3.0, 2.5]), [100, 10, 40]
    result, error, *_ = perplexity(np.exp(nats).tolist(), lengths)
    mean = (200 + 30 + 100) / 150
    assert result == pytest.approx(math.exp(mean))
    spread = sum(((value - mean) * length) ** 2 for value, length in zip(nats, lengths, strict=True))
    assert error == pytest.approx(result * math.sqrt(spread * 3 / 2) / 150)


def test_pseudo_perplexity_masks_one_residue_at_a_time() -> None:
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    tokens, inputs = torch.tensor([5, 0, 3, 2, 6]), []

    def logits_of(masked: torch.Tensor) -> torch.Tensor:
        inputs.extend(masked.tolist())
        return table[masked.roll(1, 1)]  # the logits of the previous token

    value = pseudo_perplexity(logits_of, tokens, mask=4, places=range(1, 4))
    assert inputs == [[5, 4, 3, 2, 6], [5, 0, 4, 2, 6], [5, 0, 3, 4, 6]]
    long = torch.randint(0, 4, (80,), generator=torch.Generator().manual_seed(1))
    separate = [pseudo_perplexity(logits_of, long, mask=4, places=range(i, i + 1)) for i in range(1, 79)]
    together = pseudo_perplexity(logits_of, long, mask=4, places=range(1, 79))
    assert math.log(together) == pytest.approx(np.mean(np.log(separate)))
    nats = [-float(table[a].log_softmax(0)[b]) for a, b in ((5, 0), (0, 3), (3, 2))]
    assert value == pytest.approx(math.exp(sum(nats) / 3))


def test_there_are_as_many_controls_as_samples_and_none_is_in_the_reference() -> None:
    pool = [np.full(50 + i, i) for i in range(20)]
    controls = with_controls([np.zeros(30), np.zeros(10)] * 4, pool, seed=3)
    for (samples, natural, mixed), reference in (
        (controls.sets, controls.reference),
        (controls.length_sets, controls.length_reference),
    ):
        assert len(samples) == len(natural) == len(mixed) == 8
        assert sorted(int(protein[0]) for protein in [*natural, *reference]) == list(range(20))
        assert all(len(protein) == 50 + protein[0] for protein in [*natural, *mixed, *reference])  # not cropped
        # every protein of the pool consists of a single letter, so shuffling does not change it
        assert [protein.tolist() for protein in mixed] == [protein.tolist() for protein in natural]
    with pytest.raises(ValueError, match="20 natural proteins are too few: 11 samples need 22, of which 11 are"):
        with_controls([np.zeros(30)] * 11, pool, seed=3)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.lists(st.integers(1, 60), max_size=20))
def test_each_sample_gets_the_natural_protein_nearest_in_length(wanted: list[int], pool: list[int]) -> None:
    """The samples choose in random order, each from the proteins that no earlier sample has taken.

    If the pool contains all lengths of the samples, every sample gets a protein of exactly its length.
    """
    generator = np.random.default_rng(0)
    available = [*pool, *wanted]
    matched = match_lengths(wanted, available, generator)
    assert len(set(matched)) == len(wanted)
    assert sorted(available[index] for index in matched) == sorted(wanted)
    if len(pool) >= len(wanted):
        order, left = np.random.default_rng(1).permutation(len(wanted)).tolist(), set(range(len(pool)))
        found = match_lengths(wanted, pool, np.random.default_rng(1))
        for i in order:
            assert found[i] in left
            assert abs(pool[found[i]] - wanted[i]) == min(abs(pool[index] - wanted[i]) for index in left)
            left.remove(found[i])


def test_controls_depend_on_the_seed_and_are_shuffled_separately() -> None:
    pool = [np.arange(50) * 100 + i for i in range(40)]  # the last two digits identify the protein
    drawn = {}
    for seed in (0, 1):
        controls = with_controls([np.zeros(30)] * 20, pool, seed=seed)
        (_, natural, mixed), reference = controls.sets, controls.reference
        drawn[seed] = [int(protein[0] % 100) for protein in [*natural, *reference]]
        assert sorted(drawn[seed]) == list(range(40))
        # natural proteins are drawn at random, because the order of the pool may have a meaning
        assert len(set(drawn[seed][:20]) & set(range(20))) < 16
        for protein, shuffle in zip(natural, mixed, strict=True):
            assert sorted(shuffle) == protein.tolist()
            assert shuffle.tolist() != protein.tolist()
    assert drawn[0] != drawn[1]


def test_every_row_has_the_value_that_its_name_says() -> None:
    """The test computes each value in another way than `judge`.

    Low complexity is the exception: this test checks only the name of its row, and another test checks its residues.
    The fractions of these samples are all different, so that swapped rows are detected.
    """
    texts = ("ACDEFGHIKLMNPQRSTVWY" * 2, "AAAAAAAAAAAACDEF", "ACACACWYWYKLMN", "ACDAAA", "ACDAAA")
    samples = [ids_of(text) for text in texts]
    reference = [ids_of("MKVLAAGG" * n) for n in (1, 2, 5, 9)]
    controls = Controls([samples] * 3, [samples] * 3, reference, reference)
    rows = {name: judge(samples) for name, (judge, _) in cheap_judges(controls, bootstrap=20, seed=4).items()}
    lengths = sorted(map(len, samples))
    assert lengths == [6, 6, 14, 16, 40]
    reference_lengths = sorted(map(len, reference))
    distance = max(
        abs(sum(n <= longest for n in lengths) / 5 - sum(n <= longest for n in reference_lengths) / 4)
        for longest in {*lengths, *reference_lengths}
    )
    exact = {
        "proteins": 5,
        "residues": 82,
        "length, lower quartile": 6,
        "length, median": 14,
        "length, upper quartile": 16,
        "length, Kolmogorov-Smirnov distance": distance,
        "share of different sequences": 4 / 5,
        "residues in tandem repeats": (12 + 6) / 82,
    }
    for name, value in exact.items():
        assert rows[name][0] == pytest.approx(value), name
    flags = [low_complexity(sample).tolist() for sample in samples]
    # 18 residues are in tandem repeats; if 18 also had low complexity, swapped rows would not be detected
    assert sum(map(sum, flags)) not in (0, 18)
    assert rows["residues in low complexity"][0] == pytest.approx(sum(map(sum, flags)) / 82)
    for k, name in ((1, "composition"), (2, "2-mers"), (3, "3-mers")):
        counts = [
            Counter(str(protein[i : i + k].tolist()) for protein in group for i in range(len(protein) - k + 1))
            for group in (samples, reference)
        ]
        shares = [{word: n / sum(count.values()) for word, n in count.items()} for count in counts]
        middle = {word: (shares[0].get(word, 0) + shares[1].get(word, 0)) / 2 for word in {*shares[0], *shares[1]}}
        nats = sum(p * math.log(p / middle[word]) for share in shares for word, p in share.items()) / 2
        value, error, *_ = rows[f"{name}, divergence in nats"]
        assert value == pytest.approx(nats)
        same_seed, other_seed = (
            cheap_judges(controls, bootstrap=20, seed=seed)[f"{name}, divergence in nats"][0](samples)
            for seed in (4, 5)
        )
        assert same_seed[:2] == (value, error)
        assert other_seed[0] == value
        assert other_seed[1] != error


def test_each_result_on_relatives_is_in_its_own_row(
    monkeypatch: pytest.MonkeyPatch, store: SequenceStore, tmp_path: Path
) -> None:
    """MMseqs2 is replaced by fixed results, all different, so that swapped rows are detected."""
    sets = [[ids_of("ACDEFGHIKL")] * 4, [ids_of("LKIHGFEDCA")] * 4, [ids_of("AAAAACCCCC")] * 4]
    clusters = {"samples": [[0, 2], [1], [3]], "natural": [[0], [1], [2], [3]], "shuffled": [[0, 1, 2, 3]]}
    hits = {0: Hit(0.9, True), 1: Hit(0.6, False), 2: Hit(0.3, False), 7: Hit(0.5, True)}

    def fixed_clusters(path: Path, scratch: Path, *, identity: float, coverage: float) -> list[list[int]]:
        assert path.read_text().count(">") == 4
        assert (identity, coverage) == (0.5, 0.8)
        return clusters[path.name]

    def fixed_hits(queries: Path, targets: Path, scratch: Path) -> dict[int, Hit]:
        assert queries.read_text().split()[::2] == [f">{i}" for i in range(12)]
        assert targets.read_text().count(">") == len(store.split("train"))
        return hits

    monkeypatch.setattr(relatives, "clusters_of", fixed_clusters)
    monkeypatch.setattr(relatives, "best_hits", fixed_hits)
    rows: Rows = {}
    columns = relatives.relatives(sets, store, tmp_path, rows)
    cluster_share, same_cluster, hit, identity, near = rows
    assert [round(value, 6) for value, *_ in rows[cluster_share]] == [0.75, 1.0, 0.25]
    assert [value for value, *_ in rows[same_cluster]] == [0.5, 0.0, 1.0]
    assert [value for value, *_ in rows[hit]] == [0.75, 0.25, 0.0]
    assert [value for value, *_ in rows[identity]][:2] == [pytest.approx(0.6), 0.5]
    assert math.isnan(rows[identity][2][0])
    assert [value for value, *_ in rows[near]] == [0.25, 0.25, 0.0]
    assert rows[hit][0] == pytest.approx(share([1.0, 1.0, 1.0, 0.0]), nan_ok=True)
    assert rows[identity][0][1] == pytest.approx(0.3 / math.sqrt(3))
    assert cluster_share == "clusters at 50% identity, per protein"
    assert same_cluster == "with another of the set at >= 50% identity"
    assert (hit, near) == ("with a training protein at E <= 0.001", "with one at >= 50% identity over >= 80%")
    assert columns[same_cluster] == [1, 0, 1, 0]
    assert columns[hit] == [1, 1, 1, 0]
    assert columns[identity][:3] == [0.9, 0.6, 0.3]
    assert columns[near] == [1, 0, 0, 0]


SMALL_ESM: dict[str, Any] = {
    "vocab_size": 33,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 1,
    "mask_token_id": 32,
    "position_embedding_type": "rotary",
    "token_dropout": True,
}


@pytest.fixture(scope="module")
def esm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with ESM-2's architecture, tokenizer and masking, and a small number of random weights."""
    folder = tmp_path_factory.mktemp("esm")
    (folder / "vocab.txt").write_text("\n".join(ESM_LETTERS))
    transformers.EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.EsmConfig(
        **SMALL_ESM,
        initializer_range=0.5,
    )
    transformers.EsmForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_pseudo_perplexity_of_esm2_masks_one_residue_at_a_time(esm_folder: Path) -> None:
    model = transformers.EsmForMaskedLM.from_pretrained(esm_folder).eval()
    protein = "MKVLAWGXCDEFHIKLMNPQRSTVWYMKVLAWGCDEFHIKLMNPQ"
    nats = []
    for hidden in range(len(protein)):
        shown = ["<cls>", *protein, "<eos>"]
        shown[hidden + 1] = "<mask>"
        with torch.no_grad():
            logits = model(torch.tensor([[ESM_LETTERS.index(token) for token in shown]])).logits
        nats.append(-float(logits[0, hidden + 1].log_softmax(-1)[ESM_LETTERS.index(protein[hidden])]))
    calls: list[None] = []
    value, other = esm2_pseudo_perplexities(str(esm_folder), "cpu")([protein, "MKV"], lambda: calls.append(None))
    assert value == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert other != value
    assert len(calls) == 2


@pytest.mark.slow
def test_the_plddt_of_esmfold_is_the_mean_over_existing_atoms(tmp_path: Path) -> None:
    """The model has ESMFold's architecture and tokenizer, and a small number of random weights."""
    letters = [*"ARNDCQEGHILKMFPSTWYVX", "<unk>", "<pad>", "<cls>", "<eos>", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(letters))
    transformers.EsmTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    structure = {
        "sequence_dim": 16,
        "pairwise_dim": 8,
        "ipa_dim": 4,
        "resnet_dim": 8,
        "num_heads_ipa": 2,
        "num_blocks": 1,
        "num_resnet_blocks": 1,
    }
    trunk = {
        "num_blocks": 1,
        "sequence_state_dim": 32,
        "pairwise_state_dim": 16,
        "sequence_head_width": 16,
        "pairwise_head_width": 8,
        "position_bins": 4,
        "structure_module": structure,
    }
    config = transformers.EsmConfig(
        **SMALL_ESM,
        is_folding_model=True,
        vocab_list=ESM_LETTERS,
        esmfold_config={"trunk": trunk, "lddt_head_hid_dim": 8, "fp16_esm": False},
    )
    model = transformers.EsmForProteinFolding(config).eval()
    model.save_pretrained(tmp_path)
    calls: list[None] = []
    values = esmfold_plddts(str(tmp_path), "cpu")(["GAG", "MKVLAW"], lambda: calls.append(None))
    assert len(calls) == 2
    for protein, value in zip(("GAG", "MKVLAW"), values, strict=True):
        with torch.no_grad():
            folded = model(torch.tensor([["ARNDCQEGHILKMFPSTWYV".index(letter) for letter in protein]]))
        heavy = {"G": 4, "A": 5, "M": 8, "K": 9, "V": 7, "L": 8, "W": 14}  # non-hydrogen atoms of each residue
        exists = folded["atom37_atom_exists"][0].bool()
        assert exists.sum(1).tolist() == [heavy[letter] for letter in protein]
        assert value == pytest.approx(100 * float(folded["plddt"][0][exists].mean()), abs=0.01)


def test_the_error_for_a_missing_package_gives_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "pyhmmer", None)
    with pytest.raises(ValueError, match=r"esm2=x needs transformers: pip install 'protlig_dd\[esm\]'"):
        esm2_pseudo_perplexities("x", "cpu")
    with pytest.raises(ValueError, match=r"esmfold=y needs transformers: pip install 'protlig_dd\[esm\]'"):
        esmfold_plddts("y", "cpu")
    with pytest.raises(ValueError, match=r"hmm=x.hmm needs pyhmmer: pip install 'protlig_dd\[hmm\]'"):
        pfam_hits(Path("x.hmm"))


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


def test_an_hmm_finds_its_family_and_no_shuffled_protein(hmm: Path) -> None:
    protein = next(read_fasta(SAMPLE_FOLDER / "train.fasta.gz")).sequence
    mixed = "".join(np.random.default_rng(0).permutation(list(protein)))
    calls: list[None] = []
    texts = [mixed, protein, protein[: len(protein) * 3 // 4], mixed[::-1]]
    assert pfam_hits(hmm)(texts, lambda: calls.append(None)) == [0, 1, 1, 0]
    assert len(calls) == 4


@pytest.mark.slow
@pytest.mark.system
def test_the_output_folder_reports_relatives_and_families(
    store: SequenceStore, hmm: Path, tmp_path: Path, run_python: Command
) -> None:
    require_program("mmseqs")
    decode = ProteinTokenizer().decode
    copies = [decode(store[row]) for row in store.split("train")[:4]]
    letters = np.random.default_rng(0)
    noise = ["".join(letters.choice(list("ACDEFGHIKLMNPQRSTVWY"), 120)) for _ in range(4)]
    texts = [*copies, *noise, "A" * 60, noise[0]]  # two of the ten samples are identical
    (tmp_path / "samples.fasta").write_text("".join(f">s{i}\n{text}\n" for i, text in enumerate(texts)))
    command = ["-m", "protlig_dd.judge", "samples=samples.fasta", f"natural={store.path}", f"hmm={hmm}"]
    done = run_python(*command, "output=out", "bootstrap=20")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/judges.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert (report["samples"], report["natural"], report["train"]) == (
        "samples.fasta",
        str(store.path),
        str(store.path),
    )
    assert rows["proteins"]["samples"] == rows["proteins"]["natural"] == rows["proteins"]["shuffled"] == 10
    assert rows["share of different sequences"]["samples"] == pytest.approx(0.9)
    assert rows["with a training protein at E <= 0.001"]["samples"] == pytest.approx(0.4)
    assert rows["with a training protein at E <= 0.001"]["shuffled"] == 0
    assert rows["identity to the best of those"]["samples"] == pytest.approx(1)
    assert rows["with one at >= 50% identity over >= 80%"]["samples"] == pytest.approx(0.4)
    assert rows["clusters at 50% identity, per protein"]["samples"] == pytest.approx(0.9)
    assert rows["with another of the set at >= 50% identity"]["samples"] == pytest.approx(0.2)
    assert rows["with another of the set at >= 50% identity"]["shuffled"] == 0
    assert rows["with a hit to the HMMs"]["samples"] == pytest.approx(0.1)
    divergence = rows["3-mers, divergence in nats"]
    assert divergence["samples"] > divergence["natural"]
    assert rows["composition, divergence in nats"]["natural"] == pytest.approx(
        rows["composition, divergence in nats"]["shuffled"]
    )
    table = (tmp_path / "out/table.md").read_text()
    assert table in done.stdout
    sentences = [f"- {verdict['group']}: {verdict['told']}" for verdict in report["verdicts"]]
    assert [verdict["group"] for verdict in report["verdicts"]] == [
        "proteins and residues",
        "lengths",
        "composition and words",
        "repeats",
        "variety",
        "relatives",
        "families",
    ]
    notes = [
        "The natural proteins are chosen to have nearly the samples' lengths; in rows about lengths they are "
        "chosen at random.",
        f"Training proteins are those of {store.path}.",
    ]
    assert table.splitlines()[2 + len(rows) :] == ["", *sentences, "", notes[0], "", notes[1]]
    samples = list(csv.DictReader((tmp_path / "out/per_sequence.csv").read_text().splitlines()))
    assert [row["id"] for row in samples] == [f"s{i}" for i in range(10)]
    assert samples[9]["same_as"] == "s4"
    assert [float(row["with another of the set at >= 50% identity"]) for row in samples] == [*[0] * 4, 1, *[0] * 4, 1]
    assert (float(samples[8]["low_complexity"]), float(samples[8]["tandem_repeats"])) == (1, 1)
    assert [float(row["identity to the best of those"]) for row in samples[:4]] == pytest.approx([1] * 4)
    assert [row["identity to the best of those"] for row in samples[4:]] == ["nan"] * 6
    assert [float(row["with a training protein at E <= 0.001"]) for row in samples] == [*[1] * 4, *[0] * 6]
    assert_one_line_error(run_python(*command, "output=out"), "out exists already")


@pytest.mark.slow
def test_without_mmseqs_the_other_rows_are_written(store: SequenceStore, tmp_path: Path, run_python: Command) -> None:
    texts = "".join(f">n{i}\n{ProteinTokenizer().decode(store[i])}\n" for i in range(8))
    (tmp_path / "samples.fasta").write_text(texts)
    command = ["-m", "protlig_dd.judge", "samples=samples.fasta", "natural=samples.fasta", "bootstrap=2"]
    done = run_python(*command, "mmseqs=false", f"train={store.path}")
    assert done.returncode == 0, done.stderr
    assert "MMseqs2 is not used, so relatives and clusters are not searched for" in done.stdout
    assert "4 of 8 samples are judged: each sample needs two natural proteins" in done.stdout
    names = [row["name"] for row in json.loads((tmp_path / "judged/judges.json").read_text())["rows"]]
    assert len(names) == 12
    assert json.loads((tmp_path / "judged/judges.json").read_text())["train"] is None  # no training set was searched
    # table.md, judges.csv and judges.json have the same figures; some of them are computed again below
    report_rows = json.loads((tmp_path / "judged/judges.json").read_text())["rows"]
    table = (tmp_path / "judged/table.md").read_text().splitlines()[2:14]
    samples = list(csv.DictReader((tmp_path / "judged/per_sequence.csv").read_text().splitlines()))
    cells = list(csv.reader((tmp_path / "judged/judges.csv").read_text().splitlines()))
    assert cells[0] == ["judge", *COLUMNS]
    assert COLUMNS[:5] == ("samples", "samples_se", "samples_low", "samples_high", "natural")
    for row, line, csv_row in zip(report_rows, table, cells[1:], strict=True):
        figures = [
            Figure(*(math.nan if row[f"{name}{end}"] is None else row[f"{name}{end}"] for end in ENDINGS))
            for name in SETS
        ]
        assert line == f"| {' | '.join([row['name'], *map(format_figure, figures)])} |"
        assert csv_row == [row["name"], *(f"{value:.6f}" for value in itertools.chain(*figures))]
    rows = {row["name"]: row for row in report_rows}
    assert len(samples) == rows["proteins"]["samples"] == 4
    proteins = {f"n{i}": ProteinTokenizer().decode(store[i]) for i in range(8)}
    chosen = [proteins[row["id"]] for row in samples]
    assert [int(row["length"]) for row in samples] == [len(protein) for protein in chosen]
    assert rows["residues"]["samples"] == sum(map(len, chosen))
    assert rows["length, median"]["samples"] == np.median([len(protein) for protein in chosen])
    for key, name in (("low_complexity", "low complexity"), ("tandem_repeats", "tandem repeats")):
        flagged = sum(float(row[key]) * int(row["length"]) for row in samples)
        assert rows[f"residues in {name}"]["samples"] == pytest.approx(flagged / sum(map(len, chosen)), abs=1e-6)
    process = run_python(*command, "mmseqs=true", "output=other", PATH="/nowhere")
    assert_one_line_error(process, "mmseqs=true, but no `mmseqs` is on the PATH: install it")


def test_a_single_sample_is_judged(store: SequenceStore, tmp_path: Path, run_python: Command) -> None:
    """A value whose standard error needs several samples is reported without a standard error."""
    (tmp_path / "one.fasta").write_text(f">one\n{ProteinTokenizer().decode(store[0])}\n")
    done = run_python(
        "-m", "protlig_dd.judge", "samples=one.fasta", f"natural={store.path}", "mmseqs=false", "bootstrap=5"
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "judged/judges.json").read_text())["rows"]}
    assert rows["proteins"]["samples"] == rows["proteins"]["shuffled"] == 1
    assert rows["residues in low complexity"]["samples_se"] is None
    assert rows["composition, divergence in nats"]["samples_se"] is None
    assert rows["composition, divergence in nats"]["samples"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["samples=none.fasta"], "none.fasta: no such file"),
        (["samples=gaps.fasta"], "gaps.fasta: record b: illegal character '_' at position 2 of 3"),
        (["natural=one.fasta"], "one.fasta has 1 sequences but needs at least 4, half of them as the reference"),
        (["natural=two.fasta"], "two.fasta has 2 sequences but needs at least 4, half of them as the reference"),
        (["hmm=none.hmm"], "hmm=none.hmm: no such file"),
        (["esm2=none/such"], "none/such cannot be loaded"),
        (["hmm=two.fasta", "natural=STORE"], "two.fasta: not a file of HMMs"),
        (["mmseqs=maybe"], "mmseqs=maybe; choose from auto, true, false"),
        (["bootstrap=1"], "bootstrap must be at least 2, got 1"),
        (["split=tests"], "split=tests; choose from train, validation, test"),
    ],
)
def test_an_invalid_input_is_a_one_line_error(
    store: SequenceStore, tmp_path: Path, run_python: Command, options: list[str], message: str
) -> None:
    (tmp_path / "gaps.fasta").write_text(">a\nACD\n>b\nA_D\n")
    (tmp_path / "one.fasta").write_text(">a\nACD\n")
    (tmp_path / "two.fasta").write_text(">a\nACD\n>b\nACD\n")
    before = sorted(tmp_path.iterdir())
    settings = {"samples": "two.fasta", "natural": str(store.path), "mmseqs": "false"}
    settings |= dict(option.replace("STORE", str(store.path)).split("=") for option in options)
    arguments = (f"{key}={value}" for key, value in settings.items())
    process = run_python("-m", "protlig_dd.judge", *arguments, HF_HUB_OFFLINE="1")
    assert_one_line_error(process, message)
    assert sorted(tmp_path.iterdir()) == before


def test_a_split_with_too_few_proteins_is_named(
    proteins: list[FastaRecord], tmp_path: Path, run_python: Command
) -> None:
    (tmp_path / "two.fasta").write_text(">a\nACD\n>b\nACD\n")
    make_store(tmp_path / "small.h5", proteins, train=5, held_out=2)
    process = run_python("-m", "protlig_dd.judge", "samples=two.fasta", "natural=small.h5", "mmseqs=false")
    message = (
        "the test split of small.h5 has 2 sequences but needs at least 4, half of them as the reference; build the"
    )
    assert_one_line_error(process, f"{message} store with a larger split.test_fraction, or set split= to another split")


def verdicts_of(samples: list[np.ndarray], pool: list[np.ndarray], requested: str | None = None) -> dict[str, Verdict]:
    """Return the verdict on each group of rows."""
    controls = with_controls(samples, pool, seed=0)
    cheap = cheap_judges(controls, bootstrap=10, seed=0)
    rows = {name: [judge(proteins) for proteins in sets] for name, (judge, sets) in cheap.items()}
    first, *found = verdicts(rows, len(controls.length_reference), requested)
    # natural proteins are chosen to match the samples in number and length, so these rows are not judged
    assert (first.group, first.verdict) == ("proteins and residues", "not judged")
    return {verdict.group: verdict for verdict in found}


@pytest.fixture(scope="module")
def bundled() -> list[np.ndarray]:
    """The bundled sample's training proteins, in random order."""
    found = [ids_of(record.sequence) for record in read_fasta(SAMPLE_FOLDER / "train.fasta.gz")]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


@pytest.mark.slow
def test_natural_proteins_are_judged_as_natural(bundled: list[np.ndarray]) -> None:
    found = verdicts_of(bundled[:1000], bundled[1000:3000])
    assert {verdict.verdict for verdict in found.values()} == {"as natural"}, found
    assert list(found) == ["lengths", "composition and words", "repeats", "variety"]


@pytest.mark.slow
def test_shuffled_and_single_letter_proteins_are_judged_worse(bundled: list[np.ndarray]) -> None:
    """The sentence of a verdict names the rows that are worse, and suggests what to try."""
    mixed = verdicts_of(shuffled(bundled[:400], np.random.default_rng(0)), bundled[1000:1800])
    assert mixed["repeats"].verdict == mixed["composition and words"].verdict == "worse"
    assert mixed["lengths"].verdict == mixed["variety"].verdict == "as natural"
    assert '"residues in low complexity" (lower than natural)' in mixed["repeats"].told
    assert "try a lower temperature" in mixed["repeats"].told
    single_letter = verdicts_of([np.zeros(60, np.uint8)] * 50, bundled[:200])
    assert {verdict.verdict for verdict in single_letter.values()} == {"worse"}
    assert '"composition" (higher than natural)' in single_letter["composition and words"].told
    assert "try a higher temperature" in single_letter["repeats"].told
    assert '"share of different sequences" (lower than natural)' in single_letter["variety"].told
    assert "try lengths=empirical" in single_letter["lengths"].told


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_samples_get_the_verdict_cannot_tell(bundled: list[np.ndarray], n: int) -> None:
    found = verdicts_of(bundled[:n], bundled[20:60])
    assert {verdict.verdict for verdict in found.values()} == {"cannot tell"}, found
    for verdict in found.values():
        assert f"{n} samples are too few; try n=" in verdict.told
    requested = verdicts_of(bundled[:n], bundled[20:60], "they were requested")
    assert str(requested["lengths"]) == "lengths: not judged: they were requested"


def test_lengths_are_as_natural_only_if_the_whole_interval_is_below_the_limit() -> None:
    assert verdict_on_lengths(0.02, 1000, 1000, None).verdict == "as natural"  # the interval ends at 0.08
    assert verdict_on_lengths(0.19, 100, 100, None).verdict == "cannot tell"  # the interval ends at 0.38
    assert verdict_on_lengths(0.10, 100, 100, None).verdict == "cannot tell"
    assert verdict_on_lengths(0.10, 1000, 1000, None).verdict == "worse"


@pytest.mark.parametrize(("hits", "verdict"), [(0.02, "cannot tell"), (0.5, "worse")])
def test_the_identity_of_few_hits_gives_no_verdict(hits: float, verdict: str) -> None:
    """2 or 50 of the 100 samples have hits, so the error of their mean identity has 1 or 49 degrees of freedom."""
    rows = {
        "proteins": [Figure(100.0)] * 3,
        "length, Kolmogorov-Smirnov distance": [Figure(0.05)] * 3,
        "identity to the best of those": [Figure(0.305, 0.005), Figure(0.36, 0.01), Figure(0.30, 0.01)],
    }
    hit_rows = {"with a training protein at E <= 0.001": [Figure(hits), Figure(0.8), Figure(0.0)]}
    kind = next(kind for kind in KINDS if kind.prefix == "identity to the best")
    assert difference(kind, rows | hit_rows, "identity to the best of those", 0.95).verdict("either") == verdict


@pytest.mark.parametrize(
    ("samples", "natural", "shuffled", "verdict", "side"),
    [
        (Figure(0.10, 0.01), Figure(0.11, 0.01), Figure(0.02, 0.01), "as natural", ""),
        (Figure(0.05, 0.01), Figure(0.11, 0.01), Figure(0.02, 0.01), "worse", "lower"),
        (Figure(0.17, 0.01), Figure(0.11, 0.01), Figure(0.02, 0.01), "worse", "higher"),
        (
            Figure(0.10, 0.03),
            Figure(0.11, 0.03),
            Figure(0.02, 0.01),
            "cannot tell",
            "",
        ),  # the interval extends beyond the limit
        # the shuffled value equals the natural value, so the limit is 0
        (Figure(0.10, 0.01), Figure(0.11, 0.01), Figure(0.11, 0.01), "cannot tell", ""),
        (
            Figure(0.00, 0.00),
            Figure(0.02, 0.008),
            Figure(0.00, 0.00),
            "cannot tell",
            "",
        ),  # no sample has low complexity, so the standard error of 0 has no meaning
        (Figure(0.10), Figure(0.11), Figure(0.02), "cannot tell", ""),
    ],
)
def test_a_verdict_follows_from_the_difference_and_its_error(
    samples: Figure, natural: Figure, shuffled: Figure, verdict: str, side: str
) -> None:
    rows = {
        "proteins": [Figure(200.0)] * 3,
        "length, Kolmogorov-Smirnov distance": [Figure(0.05)] * 3,
        "residues in low complexity": [samples, natural, shuffled],
    }
    *_, found = verdicts(rows, 400)
    assert found.verdict == verdict
    assert f"({side} than natural)" in found.told or not side


@pytest.mark.parametrize(
    ("name", "samples", "natural", "verdict"),
    [
        ("share of different sequences", 0.8, 1.0, "worse"),
        ("share of different sequences", 1.0, 1.0, "as natural"),
        ("share of different sequences", 1.0, 0.8, "as natural"),
        ("with another of the set at >= 50% identity", 0.2, 0.02, "worse"),
        ("with another of the set at >= 50% identity", 0.02, 0.2, "as natural"),
        ("with a training protein at E <= 0.001", 0.0, 0.9, "worse"),
        ("with a training protein at E <= 0.001", 0.9, 0.9, "as natural"),
        ("with a hit to the HMMs", 0.2, 0.7, "worse"),
        ("with a hit to the HMMs", 0.9, 0.7, "as natural"),
    ],
)
def test_a_deviation_is_worse_only_on_the_bad_side_of_its_row(
    name: str, samples: float, natural: float, verdict: str
) -> None:
    rows = {
        "proteins": [Figure(200.0)] * 3,
        "length, Kolmogorov-Smirnov distance": [Figure(0.5)] * 3,
        name: [share([1.0] * round(200 * p) + [0.0] * round(200 * (1 - p))) for p in (samples, natural, 0.0)],
    }
    if name == "share of different sequences":  # this row has no standard error, and shuffling does not change it
        rows[name] = [Figure(samples), Figure(natural), Figure(natural)]
    _, lengths, found = verdicts(rows, 400)
    assert (found.verdict, lengths.verdict) == (verdict, "worse")


@pytest.mark.slow
@pytest.mark.parametrize(("headers", "sentence"), [
    ("lengths=60-90", "lengths: not judged: they were requested (lengths=60-90)"),
    ("nll_free=2.8", "lengths: not judged: they were given to infill"),
    ("", "lengths: cannot tell: 6 samples are too few"),
])  # fmt: skip
def test_the_verdicts_are_printed_and_written(
    store: SequenceStore, tmp_path: Path, run_python: Command, headers: str, sentence: str
) -> None:
    texts = "".join(f">n{i} length=3 {headers}\n{ProteinTokenizer().decode(store[i])}\n" for i in range(6))
    (tmp_path / "samples.fasta").write_text(texts)
    done = run_python(
        "-m", "protlig_dd.judge", "samples=samples.fasta", f"natural={store.path}", "mmseqs=false", "bootstrap=5"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "judged/judges.json").read_text())["verdicts"]
    assert [verdict["group"] for verdict in found[1:]] == ["lengths", "composition and words", "repeats", "variety"]
    table = (tmp_path / "judged/table.md").read_text()
    for verdict in found:
        assert f"- {verdict['group']}: {verdict['told']}\n" in table
    assert table in done.stdout
    assert sentence in table
