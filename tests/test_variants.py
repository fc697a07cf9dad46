"""`python -m protlig_dd.variants`.

The tests cover the reading of assays, windows for long proteins, and ProteinGym's metrics and averages. They compare
each strategy with a direct computation for every variant.
"""

import csv
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from scipy.stats import mannwhitneyu, spearmanr

from protlig_dd.batch import PackedBatch
from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import VariantsConfig
from protlig_dd.data.store import SequenceStore
from protlig_dd.diffusion.exact_count import masked_nats, masked_sigma
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.rates import SWISS_PROT
from protlig_dd.diffusion.graphs.uniform import Uniform
from protlig_dd.diffusion.noise import CosineNoise, GeometricNoise, LogLinearNoise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.variants.assays import Assay, above_median, all_substitutions, read_assay, read_target
from protlig_dd.evaluation.variants.bounds import (
    GAP,
    antithetic_uniforms,
    column_streams,
    columns_of,
    exact_count_draw,
    integral_draw,
)
from protlig_dd.evaluation.variants.composition import (
    background,
    compare_with_composition,
    composition_line,
    composition_scores,
)
from protlig_dd.evaluation.variants.fitness import Scores, average_draws, score_each, score_variants
from protlig_dd.evaluation.variants.heatmap import heat_map, to_csv, to_png
from protlig_dd.evaluation.variants.measurements import (
    METRICS,
    aggregate,
    auc,
    judge,
    matthews,
    ndcg,
    spearman,
    top_recall,
)
from protlig_dd.evaluation.variants.mutants import Indel, Numbering, Variant, compare
from protlig_dd.evaluation.variants.references import read_reference
from protlig_dd.evaluation.variants.scoring import (
    assay_settings,
    check_distinct_outputs,
    earlier_summary,
    read_checked,
    settings_of,
)
from protlig_dd.evaluation.variants.strategies import choose_strategies
from protlig_dd.evaluation.variants.windows import Piece, groups_of, pieces_of, window_tokens
from protlig_dd.inference.model import load_trained
from protlig_dd.inference.sharing import Work
from protlig_dd.system.files import sha256
from protlig_dd.tokenizer import AMINO_ACIDS, BOS, EOS, MASK, N_STATES, ProteinTokenizer
from protlig_dd.variants import score

from . import brute_force
from .conftest import Command, MadeOnce, assert_one_line_error, composed, exact_score_fn, graph_of, make_model, thorough
from .test_likelihood import exact_bound
from .test_training import TINY

WILD = "MKTAYIAKQRQISFVKSHFSRQ"
CPU = torch.device("cpu")
NOISE = LogLinearNoise()


def ids(sequence: str) -> np.ndarray:
    return ProteinTokenizer().encode(sequence)[1:-1]


TARGET = ids(WILD)


def assay_of(*variants: Variant) -> Assay:
    """Return an assay of these variants without measurements."""
    missing = np.full(len(variants), np.nan)
    rows = [[str(i)] for i in range(len(variants))]
    return Assay(["mutant"], rows, list(variants), [f"row {i}" for i in range(len(variants))], missing, missing)


def read(tmp_path: Path, text: str, target: str = WILD) -> Assay:
    (tmp_path / "a.csv").write_text(text)
    return read_assay(tmp_path / "a.csv", ids(target))


def scored(score_fn: ScoreFn, assay: Assay, strategy: str, target: np.ndarray = TARGET, **options: int) -> Scores:
    settings = {"max_len": 100, "draws": 8, "seed": 0, "tokens_per_pack": 70} | options
    work = Work(settings.pop("tokens_per_pack"))
    return score_variants(replace(score_fn, noise=NOISE), target, assay, work, strategy=strategy, **settings)


def test_every_random_draw_follows_from_the_seed() -> None:
    deletion, pair = Variant(indel=Indel(3, 4, ())), Variant(((0, 0), (5, 2)))
    for kind, graph in (("exact_count", Absorbing()), ("integral", Uniform())):
        score_fn = ScoreFn(
            make_model(time_conditioning=kind == "integral"), graph, LogLinearNoise(), "x0", kind == "integral"
        )
        first, same_seed, other_seed = (
            scored(score_fn, assay_of(pair, deletion), "bound", seed=seed) for seed in (1, 1, 2)
        )
        assert first.nats.tolist() == same_seed.nats.tolist()
        assert (first.nats != other_seed.nats).all()
    streams = [stream for seed in (1, 2) for draw in (0, 1) for stream in column_streams(seed, draw)]
    assert len({tuple(torch.rand(3, generator=stream).tolist()) for stream in streams}) == 8


def test_residues_are_counted_without_letters_that_are_not_amino_acids() -> None:
    """An X in the wild type is counted neither in the masked fraction nor in the length that an indel changes."""
    target, sigmas = ids("MKTXYXIAK"), []

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        sigmas.append(sigma)
        return torch.zeros(len(batch.tokens), N_STATES)

    score_fn = ScoreFn(network, Absorbing(), LogLinearNoise(), "x0")
    found = scored(score_fn, assay_of(Variant(((0, 0), (2, 1)))), "masked_marginals", target)
    assert found.nats.tolist() == [0.0]
    assert sigmas[0].tolist() == pytest.approx(masked_sigma(NOISE, torch.tensor([2 / 7], dtype=torch.float64)).tolist())
    indels = assay_of(Variant(indel=Indel(1, 2, ())), Variant(indel=Indel(4, 4, (5, 6))))
    for draws in (4, 10):  # every residue costs log 20, so no length scores better than another
        found = scored(
            ScoreFn(network, Absorbing(), LogLinearNoise(), "x0", False), indels, "bound", target, draws=draws
        )
        assert found.nats.mean() == pytest.approx(0, abs=1e-9)
        np.testing.assert_allclose(found.nats, 0, atol=1e-4)


def test_earlier_scores_are_an_error_if_anything_that_they_depend_on_has_changed(
    trained_run: Path, tmp_path: Path
) -> None:
    trained = load_trained(str(trained_run), device="cpu", precision="fp32")
    config = VariantsConfig(
        from_="",
        assay=None,
        target=WILD,
        reference=None,
        output="a.csv",
        column="nats",
        offset=0,
        bad_rows="fail",
        strategy="ratio",
        draws=4,
        seed=0,
        device="cpu",
        precision="fp32",
        tokens_per_pack=100,
    )
    settings = settings_of(trained, config) | assay_settings(None, TARGET, 0)
    run = replace(trained.saved.config, run=replace(trained.saved.config.run, name="another"))
    (tmp_path / "weights").write_bytes(b"other")
    changes = [settings_of(replace(trained, precision="bf16"), config)] + [
        settings_of(replace(trained, saved=replace(trained.saved, **change)), config)
        for change in ({"step": 7}, {"config": run}, {"weights": tmp_path / "weights"})
    ]
    changes += [
        settings_of(trained, replace(config, **change))
        for change in (
            {"strategy": "bound"},
            {"draws": 6},
            {"seed": 1},
            {"column": "other"},
            {"bad_rows": "skip"},
        )
    ]
    changes += [
        assay_settings(tmp_path / "weights", TARGET, 0),
        assay_settings(None, TARGET[1:], 0),
        assay_settings(None, TARGET, 3),
    ]
    output = tmp_path / "a.csv"
    earlier = settings | dict.fromkeys(METRICS)
    (tmp_path / "a.json").write_text(json.dumps(earlier))
    assert earlier_summary(output, settings) is None  # the command was interrupted before it wrote the scores
    output.write_text("")
    assert earlier_summary(output, settings) == earlier
    keys = set()
    for change in changes:
        (key,) = [key for key in change if change[key] != settings[key]]
        keys.add(key)
        with pytest.raises(ValueError, match=f"a.json was written with {key}="):
            earlier_summary(output, settings | change)
    assert keys == set(settings)


# assays and targets in files


def test_mutant_and_sequence_columns_may_be_combined_and_other_columns_are_kept(tmp_path: Path) -> None:
    assay = read(
        tmp_path,
        "\ufeffmutant,mutated_sequence,DMS_score,note\n"
        f"M1A:K2D,AD{WILD[2:]},1.5,x\n"
        f'"",{WILD[:3]}{WILD[4:]},,y\n'
        f"{WILD}W,{WILD}W,-2,z\n"
        "T3T,,0.5,\n",
    )
    assert assay.variants == [
        Variant(((0, 0), (1, 2))),
        Variant(indel=Indel(3, 4, ())),
        Variant(indel=Indel(22, 22, (18,))),
        Variant(),
    ]
    assert assay.header == ["mutant", "mutated_sequence", "DMS_score", "note"]
    assert [row[3] for row in assay.rows] == ["x", "y", "z", ""]
    np.testing.assert_array_equal(assay.measured, [1.5, np.nan, -2, 0.5])
    np.testing.assert_array_equal(assay.fit, [1, np.nan, 0, 0])
    assert assay.first_indel == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.csv: the file is empty"),
        ("mutant\n", "a.csv: no rows"),
        ("name,score\nx,1\n", "no column mutant or mutated_sequence; its columns are name, score"),
        ("mutant,mutant\nM1A,M1A\n", "column mutant occurs 2 times"),
        ("mutant\nM1A,x\n", "line 2: 2 cells, but the header has 1"),
        ("mutant\nM1A\nA1M\n", "line 3: A1M has A at position 1, but the target has M"),
        ("mutant\nM1\n", "line 2: 'M1' is not a mutation"),
        ("mutant\nM1A:\n", "line 2: '' is not a mutation"),
        (
            f"mutant\n{WILD[1:]}\n",
            f"line 2: '{WILD[1:]}' is not a mutation.* and whole proteins in a column mutated_seq",
        ),
        ("mutant\nM0A\n", "line 2: M0A is at position 0, outside the target's positions 1 to 22"),
        ("mutant\nM23A\n", "line 2: M23A is at position 23, outside the target's positions 1 to 22"),
        ("mutant\nM1A:M1C\n", "line 2: M1A:M1C changes position 1 twice"),
        ("mutant\nM1X\n", "line 2: M1X: X is not one of the amino acids"),
        ("mutant\nM1*\n", r"line 2: M1\* is a stop codon; give the whole protein in a column mutated_sequence"),
        ("mutant\nM1Ter\n", "line 2: 'M1TER' is not a mutation"),
        ("mutant\nM1del:K2A\n", "line 2: M1DEL is a deletion combined with other changes; give the whole protein"),
        ("mutant\np.Met1Xyz\n", "line 2: 'MET1XYZ' is not a mutation"),
        ("mutant,DMS_score\nM1A,high\n", "line 2: DMS_score 'high' is not a finite number"),
        ("mutant,DMS_score\nM1A,1_0\n", "line 2: DMS_score '1_0' is not a finite number"),
        ("mutant,DMS_score\nM1A,-inf\n", "line 2: DMS_score '-inf' is not a finite number"),
        ("mutant,DMS_score_bin\nM1A,2\n", "line 2: DMS_score_bin must be 0 or 1, got 2"),
        ("mutated_sequence\nMK1\n", "line 2, mutated_sequence: illegal character '1' at position 3 of 3"),
        (
            f"mutated_sequence\nX{WILD[1:]}\n",
            "line 2: mutated_sequence and the target differ in letters other than the amino acids",
        ),
        (
            f"mutant,mutated_sequence\nM1A,C{WILD[1:]}\n",
            "line 2: mutant M1A and mutated_sequence do not describe the same",
        ),
        ("mutant,note\n,x\n", "line 2: both mutant and mutated_sequence are empty"),
    ],
)
def test_an_invalid_assay_is_an_error_that_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("mutant", "substitutions"),
    [
        ("WT", {}), ("_wt", {}), ("p.=", {}), ("M1M", {}), ("p.Met1=", {}), ("K2A", {1: "A"}), ("p.Lys2Ala", {1: "A"}),
        ("p.K2A", {1: "A"}), ("K2A;T3P", {1: "A", 2: "P"}), ("K2A,T3P", {1: "A", 2: "P"}),
        ("K2A; T3P", {1: "A", 2: "P"}),
        ("p.[Lys2Ala;Thr3Pro]", {1: "A", 2: "P"}), ("lys2ala", {1: "A"}),
    ],
)  # fmt: skip
def test_common_notations_of_mutants_are_read(tmp_path: Path, mutant: str, substitutions: dict[int, str]) -> None:
    assay = read(tmp_path, f'mutant\n"{mutant}"\nM1A\n')
    assert assay.variants[0] == Variant(tuple((site, AMINO_ACIDS.index(new)) for site, new in substitutions.items()))


def test_a_deletion_may_be_given_by_name(tmp_path: Path) -> None:
    """Deleting either of two adjacent identical residues gives the same protein; both rows are scored."""
    target = "MKKV"
    assay = read(tmp_path, "mutant\nK2del\nK3del\nM1del\n", target)
    assert assay.variants[0] == assay.variants[1] == compare(ids("MKV"), ids(target), "")
    assert assay.variants[2] == Variant(indel=Indel(0, 1, ()))


def test_positions_may_be_numbered_as_in_a_longer_construct(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("mutant\nM101A\nK102D\n")
    assay = read_assay(tmp_path / "a.csv", TARGET, numbering=Numbering(100))
    assert assay.variants == [Variant(((0, 0),)), Variant(((1, 2),))]
    with pytest.raises(ValueError, match=r"line 2: M101A has M at position 2 \(offset=99\), but"):
        read_assay(tmp_path / "a.csv", TARGET, numbering=Numbering(99))
    with pytest.raises(
        ValueError, match=r"line 2: M101A is at position -4 \(offset=105\), outside the target's positions 1 to 22"
    ):
        read_assay(tmp_path / "a.csv", TARGET, numbering=Numbering(105))


def test_invalid_rows_may_be_skipped_and_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("mutant,DMS_score\nM1A,1\nM1*,2\nA2C,3\nK2A,4\n")
    with pytest.raises(ValueError, match=r"line 3: M1\* is a stop.* \(bad_rows=skip skips such rows\)"):
        read_assay(tmp_path / "a.csv", TARGET)
    assay = read_assay(tmp_path / "a.csv", TARGET, skip_bad=True)
    assert assay.measured.tolist() == [1, 4]
    assert [row[0] for row in assay.rows] == ["M1A", "K2A"]
    assert [re.sub(".*(line [0-9]).*", r"\1", message) for message in assay.bad] == ["line 3", "line 4"]
    (tmp_path / "a.csv").write_text("mutant\nM1*\nA2C\n")
    with pytest.raises(ValueError, match=r"line 2: M1\* is a stop.*; every row of .*a.csv is invalid"):
        read_assay(tmp_path / "a.csv", TARGET, skip_bad=True)


def test_letters_may_be_lower_case_and_measurements_missing(tmp_path: Path) -> None:
    assay = read(
        tmp_path,
        f"mutant,mutated_sequence,DMS_score\nm1a:k2d,,NA\n,{WILD[1:].lower()},nan\n{WILD.lower()}w,{WILD}W, 2 \n",
    )
    assert assay.variants == [
        Variant(((0, 0), (1, 2))),
        Variant(indel=Indel(0, 1, ())),
        Variant(indel=Indel(22, 22, (18,))),
    ]
    np.testing.assert_array_equal(assay.measured, [np.nan, np.nan, 2])
    assert assay.most_changed == 2


def test_letters_that_are_not_amino_acids_cannot_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="X1A changes X, which is not one of the amino acids"):
        read(tmp_path, "mutant\nX1A\n", "XK")
    assert read(tmp_path, "mutated_sequence\nXA\n", "XK").variants == [Variant(((1, 0),))]
    with pytest.raises(ValueError, match="differ at position 1, where one of the two letters is not an amino acid"):
        compare(ids("AX"), ids("XA"), "row")
    assert [row[0] for row in all_substitutions(ids("XM")).rows][:2] == ["M2A", "M2C"]


def test_a_target_is_a_file_or_a_sequence(tmp_path: Path) -> None:
    (tmp_path / "wt.fasta").write_text(">a\nmkta\n")
    assert read_target(str(tmp_path / "wt.fasta")).tolist() == read_target("MKTA").tolist() == ids("MKTA").tolist()
    (tmp_path / "wt.fasta").write_text(">a\nMK\n>b\nMK\n")
    with pytest.raises(ValueError, match="the target must be one protein, but the file has 2 records"):
        read_target(str(tmp_path / "wt.fasta"))
    for name in ("no.fasta", ""):
        with pytest.raises(ValueError, match=f"target={name}: no such file"):
            read_target(name)
    assert len(all_substitutions(TARGET).variants) == 19 * len(WILD)


@given(st.text("ACDX", max_size=8), st.text("ACD", max_size=5), st.text("ACD", max_size=5), st.text("ACD", max_size=8))
def test_the_differences_found_by_compare_rebuild_the_variant(left: str, old: str, new: str, right: str) -> None:
    """The differences that `compare` returns, applied to the wild type, give the variant."""
    wild, variant = ids("M" + left + old + right), ids("M" + left + new + right)
    found = compare(variant, wild, "row")
    columns = columns_of(wild, Piece(0, 0, len(wild), found))
    assert columns.join(columns.aligned, columns.inserted).tolist() == [BOS, *variant.tolist(), EOS]
    assert len(columns.aligned) == len(wild) + 2
    assert int((columns.aligned == GAP).sum()) == max(0, len(wild) - len(variant))


# windows


def in_windows(assay: Assay, max_len: int, length: int = 22, strategy: str = "bound") -> list[Piece]:
    return pieces_of(assay, length, max_len, strategy)


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_windows_contain_their_sites_and_are_as_large_as_possible(
    length: int, max_len: int, data: st.DataObject
) -> None:
    sites = sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=4)))
    pieces = in_windows(assay_of(Variant(tuple((site, 0) for site in sites))), max_len, length)
    assert [site for piece in pieces for site, _ in piece.change.substitutions] == sites
    for piece in pieces:
        assert 0 <= piece.start < piece.stop <= length
        assert piece.stop - piece.start == min(length, max_len)
        assert all(piece.start <= site < piece.stop for site, _ in piece.change.substitutions)
    assert len(pieces) == 1 or sites[-1] - sites[0] >= max_len


def partitions(n: int) -> list[list[tuple[int, int]]]:
    """Return all partitions of n consecutive sites into groups of neighbours.

    A group is (first, last); `last` is excluded.
    """
    cuts = itertools.product((False, True), repeat=n - 1)
    boundaries = [[0, *(i + 1 for i, cut in enumerate(pattern) if cut), n] for pattern in cuts]
    return [list(itertools.pairwise(ends)) for ends in boundaries]


@given(st.integers(1, 60), st.integers(1, 12), st.data())
def test_sites_share_windows_by_the_best_partition(length: int, max_len: int, data: st.DataObject) -> None:
    """The best partition of the sites into windows has the fewest windows.

    Of the partitions with the fewest windows it has the largest margins; the smallest margins are compared first. The
    margin of a window is its number of residues before its first or after its last site, whichever is smaller. A side
    on which the window reaches the end of the protein does not count.
    """
    sites = sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=8)))
    shown = min(length, max_len)

    def quality(groups: list[tuple[int, int]]) -> tuple[int, list[int]]:
        margins = []
        for first, last in groups:
            low, high = sites[first], sites[last - 1]
            start = min(max(0, (low + high + 1 - shown) // 2), length - shown)
            left, right = low - start, start + shown - 1 - high
            margins.append(min(left if start else length, right if start + shown < length else length))
        return -len(groups), sorted(margins)

    valid = [groups for groups in partitions(len(sites)) if all(sites[b - 1] - sites[a] < max_len for a, b in groups)]
    found = groups_of(sites, length, max_len)
    assert found in valid
    assert quality(found) == max(quality(groups) for groups in valid)


def test_distant_sites_share_a_window_with_the_nearer_neighbour() -> None:
    distant = Variant(((4999, 0), (5399, 9), (5599, 19)))
    pieces = in_windows(assay_of(distant), 512, 7000, "masked_marginals")
    assert [[site for site, _ in piece.change.substitutions] for piece in pieces] == [[4999], [5399, 5599]]
    assert groups_of([0, 7, 12], 30, 10) == [(0, 1), (1, 3)]  # the end of the protein does not limit a margin
    assert groups_of([], 22, 5) == []


@given(st.integers(1, 200), st.integers(1, 40))
def test_strategies_without_masks_let_neighbouring_sites_share_windows(length: int, max_len: int) -> None:
    """On each side of a site, its window has at least max_len // 4 residues, or all up to the end of the protein."""
    every = Variant(tuple((site, 0) for site in range(length)))
    pieces = in_windows(assay_of(every), max_len, length, "ratio")
    assert [piece.change.substitutions for piece in pieces] == [(substitution,) for substitution in every.substitutions]
    for site, (_, start, stop, _) in enumerate(pieces):
        assert stop - start == min(length, max_len)
        assert 0 <= start <= max(0, site - max_len // 4)
        assert min(length, site + 1 + max_len // 4) <= stop <= length
    assert len({piece.start for piece in pieces}) <= 2 + max(0, length - max_len) // max(1, max_len // 4)


@given(st.integers(1, 40), st.integers(1, 20), st.data())
def test_windows_of_indels_contain_the_same_part_of_both_proteins(
    length: int, max_len: int, data: st.DataObject
) -> None:
    """A window contains all residues that are deleted or inserted, and as many other residues as fit.

    An indel that leaves no space for other residues is an error.
    """
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, length)] * 2)))
    new = data.draw(st.lists(st.integers(0, 19), max_size=25).filter(lambda new: len(new) != stop - start))
    change = len(new) - (stop - start)
    target = np.arange(length, dtype=np.uint8) % 20
    variant = np.array([*target[:start], *new, *target[stop:]], dtype=np.uint8)
    assay = assay_of(Variant(indel=Indel(start, stop, tuple(new))))
    if max(length, length + change) > max_len and max(stop - start, len(new)) >= max_len:
        with pytest.raises(
            ValueError, match=f"row 0: {len(new)} residues replace {stop - start}; such a change does not fit into a wi"
        ):
            in_windows(assay, max_len, length)
        return
    (piece,) = in_windows(assay, max_len, length)
    assert 0 <= piece.start <= start <= stop <= piece.stop <= length
    size = piece.stop - piece.start
    assert max(size, size + change) == min(max_len, max(length, length + change))
    for sequence, last, changes in ((target, piece.stop, Variant()), (variant, piece.stop + change, piece.change)):
        columns = columns_of(target, Piece(0, piece.start, piece.stop, changes))
        shown = columns.join(columns.aligned, columns.inserted).tolist()
        assert shown == window_tokens(sequence, piece.start, last).tolist()


def test_windows_have_bos_and_eos_only_at_the_ends_of_the_protein() -> None:
    assert window_tokens(TARGET, 0, 3).tolist() == [BOS, *TARGET[:3]]
    assert window_tokens(TARGET, 2, 22).tolist() == [*TARGET[2:], EOS]
    assert in_windows(assay_of(Variant(((10, 0),))), 5)[0][1:3] == (8, 13)


def test_an_indel_is_scored_in_one_window() -> None:
    (piece,) = in_windows(assay_of(Variant(indel=Indel(10, 10, (0, 1, 2)))), 9)
    assert piece.stop - piece.start + 3 == 9
    columns = columns_of(TARGET, piece)
    expected = [*TARGET[piece.start : 10], 0, 1, 2, *TARGET[10 : piece.stop]]
    assert columns.join(columns.aligned, columns.inserted).tolist() == expected


# strategies


def test_each_graph_accepts_only_its_own_scoring_strategies() -> None:
    single, indel = assay_of(Variant(((0, 0),))), assay_of(Variant(indel=Indel(0, 1, ())))
    both = assay_of(*single.variants, *indel.variants, Variant())
    assert choose_strategies("auto", Absorbing(), single) == (["masked_marginals"], "the graph is absorbing")
    assert choose_strategies("auto", Uniform(), single) == (["ratio"], "the graph is uniform")
    assert choose_strategies("auto", Uniform(), indel) == (["bound"], "there are insertions or deletions")
    assert choose_strategies("auto", Uniform(), both)[0] == ["ratio", "bound", "ratio"]
    assert choose_strategies("bound", Uniform(), both) == (["bound"] * 3, "as requested")
    assert choose_strategies("wildtype_marginals", Absorbing(), single)[0] == ["wildtype_marginals"]
    with pytest.raises(
        ValueError,
        match="strategy=masked_marginals is not available for graph=uniform; choose from auto, ratio, bound",
    ):
        choose_strategies("masked_marginals", Uniform(), single)
    with pytest.raises(
        ValueError, match="choose from auto, masked_marginals, site_marginals, wildtype_marginals, bound"
    ):
        choose_strategies("ratio", Absorbing(), single)
    with pytest.raises(
        ValueError,
        match="row 0: 0 residues replace 1, but strategy=ratio scores substitutions only; use auto or bound",
    ):
        choose_strategies("ratio", Uniform(), indel)


@pytest.mark.parametrize("graph", [Absorbing(), Uniform()])
def test_an_indel_does_not_change_the_scores_of_substitutions(graph: Graph) -> None:
    """In a mixed assay each variant has the same score as in an assay of substitutions or indels only."""
    score_fn = ScoreFn(make_model(), graph, NOISE, "x0" if isinstance(graph, Absorbing) else "log_score")
    substitutions = [Variant(((3, 7),)), Variant(((0, 1), (19, 5))), Variant()]
    indels = [Variant(indel=Indel(4, 6, (1,))), Variant(indel=Indel(9, 9, (2,)))]
    mixed = assay_of(substitutions[0], indels[0], substitutions[1], indels[1], substitutions[2])
    strategies, _ = choose_strategies("auto", graph, mixed)
    settings: dict[str, Any] = {"max_len": 100, "draws": 8, "seed": 0}
    found = score_each(score_fn, TARGET, mixed, Work(70), strategies=strategies, **settings)
    marginals = scored(score_fn, assay_of(*substitutions), strategies[0])
    bound = scored(score_fn, assay_of(*indels), "bound")
    np.testing.assert_allclose(found.nats[[0, 2, 4]], marginals.nats, atol=1e-5)
    np.testing.assert_allclose(found.nats[[1, 3]], bound.nats, atol=1e-5)
    assert found.standard_error is not None
    assert bound.standard_error is not None
    np.testing.assert_allclose(found.standard_error[[1, 3]], bound.standard_error, atol=1e-5)
    assert np.isnan(found.standard_error[[0, 2, 4]]).all()
    without_indels = score_each(
        score_fn, TARGET, assay_of(*substitutions), Work(70), strategies=[strategies[0]] * 3, **settings
    )
    assert without_indels.standard_error is None


MANY = assay_of(
    Variant(((3, 7),)), Variant(((3, 8),)), Variant(((0, 1), (21, 5))), Variant(), Variant(((4, 2), (5, 2), (9, 9)))
)


@pytest.mark.parametrize("max_len", [100, 10])
@pytest.mark.parametrize(
    ("graph", "parametrisation", "timed", "strategy"),
    [
        (Absorbing(), "x0", False, "masked_marginals"),
        (Absorbing(), "log_score", True, "masked_marginals"),
        (Absorbing(), "x0", False, "site_marginals"),
        (Absorbing(), "x0", False, "wildtype_marginals"),
        (Uniform(), "log_score", True, "ratio"),
        (graph_of("substitution", 20), "x0", True, "ratio"),
    ],
)
def test_marginals_equal_those_of_separate_forward_passes(
    graph: Graph, parametrisation: str, timed: bool, strategy: str, max_len: int
) -> None:
    """Each window is one forward pass, and the log-probabilities are read from its logits."""
    model = make_model(time_conditioning=timed).eval()
    score_fn = ScoreFn(model, graph, LogLinearNoise(), parametrisation, timed)
    expected = []
    for number, variant in enumerate(MANY.variants):
        total = 0.0
        for piece in (p for p in in_windows(MANY, max_len, strategy=strategy) if p.variant == number):
            tokens = torch.from_numpy(window_tokens(TARGET, piece.start, piece.stop))
            shift = 1 - piece.start if piece.start == 0 else -piece.start
            indices = [site + shift for site, _ in piece.change.substitutions]
            level = float(NOISE(torch.tensor(NOISE.t_min))[0])
            if strategy in ("masked_marginals", "site_marginals"):
                tokens[indices] = MASK
                level = -float(np.log1p(-len(indices) / (piece.stop - piece.start)))
            batch, sigma = PackedBatch.pack([tokens]), torch.tensor([level])
            with torch.no_grad():
                log_p = score_fn(batch, sigma) if strategy == "ratio" else score_fn.logits(batch, sigma).log_softmax(-1)
            for index, (site, residue) in zip(indices, piece.change.substitutions, strict=True):
                total += float(log_p[index, residue] - log_p[index, TARGET[site]])
        expected.append(total)
        assert variant.substitutions or total == 0
    found = scored(score_fn, MANY, strategy, max_len=max_len)
    np.testing.assert_allclose(found.nats, expected, atol=2e-5)
    assert found.standard_error is None
    if strategy == "site_marginals":
        singles = assay_of(*(Variant((substitution,)) for substitution in MANY.variants[4].substitutions))
        assert found.nats[4] == pytest.approx(scored(score_fn, singles, strategy, max_len=max_len).nats.sum(), abs=2e-5)


def toy_scores(name: str, parametrisation: str = "log_score") -> tuple[brute_force.Toy, ScoreFn]:
    toy = brute_force.random_toy(name, n=3, sites=2)
    return toy, exact_score_fn(toy, parametrisation)


ALL_OF_THE_TOY = [
    Variant(tuple((site, y) for site, y in enumerate(pair) if y != (0, 2)[site]))
    for pair in itertools.product(range(3), repeat=2)
]
TOY_WILD = np.array([0, 2], dtype=np.uint8)


def true_differences(toy: brute_force.Toy) -> list[float]:
    """Return log p(variant) - log p(wild type) of all variants of the toy."""
    return [float(toy.p0[pair].log() - toy.p0[0, 2].log()) for pair in itertools.product(range(3), repeat=2)]


@pytest.mark.parametrize("name", ["uniform", "substitution"])
def test_ratios_of_an_exact_model_are_the_true_ratios_for_single_substitutions(name: str) -> None:
    toy, score_fn = toy_scores(name)
    noise = GeometricNoise(1e-6, 12.0, 1e-6)
    found = score_variants(
        replace(score_fn, noise=noise),
        TOY_WILD,
        assay_of(*ALL_OF_THE_TOY),
        Work(70),
        strategy="ratio",
        max_len=9,
        draws=4,
        seed=0,
    )
    singles = [i for i, variant in enumerate(ALL_OF_THE_TOY) if len(variant.substitutions) == 1]
    np.testing.assert_allclose(found.nats[singles], np.array(true_differences(toy))[singles], atol=1e-3)


def test_masked_marginals_of_an_exact_model_are_the_true_ratios_for_single_substitutions() -> None:
    toy, score_fn = toy_scores("absorbing", "x0")
    found = scored(score_fn, assay_of(*ALL_OF_THE_TOY), "masked_marginals", TOY_WILD)
    singles = [i for i, variant in enumerate(ALL_OF_THE_TOY) if len(variant.substitutions) == 1]
    np.testing.assert_allclose(found.nats[singles], np.array(true_differences(toy))[singles], atol=1e-5)


def test_with_all_masks_enumerated_the_bound_of_an_exact_model_is_the_likelihood() -> None:
    """The bound averages two cases with equal weights: one masked residue, at either site, and two masked residues."""
    toy, score_fn = toy_scores("absorbing", "x0")
    for pair in itertools.product(range(3), repeat=2):
        batch = PackedBatch.pack([torch.tensor([BOS, *pair, EOS])])
        total = 0.0
        for masked, weight in (([0, 1], 0.5), ([1, 0], 0.5), ([1, 1], 1.0)):
            where = torch.tensor([False, *map(bool, masked), False])
            total += weight / 2 * float(masked_nats(replace(score_fn, noise=NOISE), batch, where).sum())
        assert total == pytest.approx(-float(toy.p0[pair].log()), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parametrisation"), [("absorbing", "x0"), ("uniform", "log_score"), ("substitution", "x0")]
)
def test_the_bound_of_an_exact_model_is_the_true_difference(name: str, parametrisation: str) -> None:
    """The difference of two bounds equals the difference of log p, up to the standard error and a systematic error.

    The systematic error, a few hundredths of a nat, comes from the finite noise range.
    """
    toy, score_fn = toy_scores(name, parametrisation)
    if name == "absorbing":
        score_fn = without_time(score_fn)
    noise = CosineNoise(eps=1e-3, t_min=0.02, rate=-score_fn.graph.lambda_2)
    draws = 200 if thorough() else 64
    found = score_variants(
        replace(score_fn, noise=noise),
        TOY_WILD,
        assay_of(*ALL_OF_THE_TOY),
        Work(400),
        strategy="bound",
        max_len=9,
        draws=draws,
        seed=2,
    )
    assert found.standard_error is not None
    assert found.nats[2] == found.standard_error[2] == 0  # the wild type
    error = np.abs(found.nats - true_differences(toy))
    assert (error < 4 * found.standard_error + 0.05).all()
    assert np.median(found.standard_error) < 0.4 * (200 / draws) ** 0.5


def without_time(score_fn: ScoreFn) -> ScoreFn:
    """Return the exact score function without time conditioning.

    The exact posterior is the same at every sigma, but its computation needs a sigma above 0.
    """
    exact = score_fn.model
    return ScoreFn(
        lambda batch, sigma: exact(batch, torch.full_like(sigma, 0.5)), score_fn.graph, LogLinearNoise(), "x0", False
    )


def test_uniform_draws_are_antithetic_and_stratified() -> None:
    uniforms = np.array(antithetic_uniforms(8, torch.Generator().manual_seed(0)))
    np.testing.assert_allclose(uniforms[0::2] + uniforms[1::2], 1)
    assert sorted(np.floor(uniforms * 8).astype(int)) == list(range(8))


class RecordingNetwork:
    """A network with logits of 0 that records its input sequences."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []

    def __call__(self, batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        self.inputs += batch.unpack(batch.tokens)
        return torch.zeros(len(batch.tokens), N_STATES)


def test_antithetic_draws_mask_complementary_residues() -> None:
    """Two antithetic draws mask 7 and 16 of the 22 residues, or 1 and 22.

    Together they mask every residue, and one residue twice.
    """
    network = RecordingNetwork()
    score_fn = ScoreFn(network, Absorbing(), NOISE, "x0", False)
    columns = [columns_of(TARGET, Piece(0, 0, 22, Variant()))]
    batch = PackedBatch.pack([columns[0].aligned])
    for k in (0, 2):
        for u in (0.3, 0.01):
            for draw, uniform in ((k, u), (k + 1, 1 - u)):
                exact_count_draw(score_fn, batch, columns, uniform, draw, 7)
    masked = torch.stack(network.inputs)[:, 1:-1] == MASK
    assert masked.sum(1).tolist() == [7, 16, 1, 22] * 2
    assert (masked[0::2] | masked[1::2]).all()
    assert not torch.equal(masked[0], masked[4])  # a different pair of draws


def test_averages_and_standard_errors_of_draws_match_values_by_hand() -> None:
    """The means of the two antithetic pairs are (2, 0) and (6, 3)."""
    found = average_draws(np.array([[1.0, 0], [3, 0], [5, 2], [7, 4]]))
    assert found.nats.tolist() == [4, 1.5]
    assert found.standard_error == pytest.approx([2, 1.5])


@pytest.mark.parametrize("name", ["uniform", "substitution"])
def test_with_all_noise_enumerated_the_integral_is_the_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enumerate all pairs of sequences noised to t and to t_min, and integrate over u, which sets t, by quadrature.

    The noise range is chosen so that all three terms of the bound matter.
    """
    toy, score_fn = toy_scores(name)
    noise = LogLinearNoise(eps=0.1, t_min=0.05, rate=-score_fn.graph.lambda_2)
    states = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    pairs = [(i, j) for i in range(9) for j in range(9)]
    copies = [columns_of(TOY_WILD, Piece(0, 0, 2, Variant()))] * len(pairs)
    batch = PackedBatch.pack([columns.aligned for columns in copies])
    next_states: list[int] = []

    def transition(x0: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.cat([x0[:1], states[next_states.pop(0)], x0[-1:]]) if len(x0) else x0

    def probability(sigma: float) -> torch.Tensor:
        return brute_force.transition(name, 3, sigma)[torch.from_numpy(TOY_WILD).long(), states].prod(1)

    monkeypatch.setattr(score_fn.graph, "sample_transition", transition)
    total, lowest = 0.0, probability(float(noise(torch.tensor(noise.t_min, dtype=torch.float64))[0]))
    for point, weight in zip(*np.polynomial.legendre.leggauss(12), strict=True):
        next_states += [i for i, _ in pairs] + [j for _, j in pairs]
        u = (1 + float(point)) / 2
        t = torch.tensor(noise.t_min + (1 - noise.t_min) * u, dtype=torch.float64)
        with torch.no_grad():
            nats = integral_draw(replace(score_fn, noise=noise), batch, copies, u, 0, 0).view(9, 9, 4).sum(2)
        total += weight / 2 * float(probability(float(noise(t)[0])) @ nats.double() @ lowest)
    assert total == pytest.approx(exact_bound(toy, toy.log_score, (0, 2), noise), abs=1e-4)


@pytest.mark.parametrize("max_len", [100, 12])
def test_a_model_of_residue_frequencies_gives_indels_no_score_for_their_length(max_len: int) -> None:
    """If all frequencies are equal, the score is 0.

    Otherwise it is the variant's length times (its mean log-frequency minus the mean log-frequency of the wild type).
    """
    changes = [Variant(indel=indel) for indel in (Indel(4, 4, (3, 3, 9)), Indel(8, 11, ()), Indel(3, 6, (1,)))]
    found = scored(
        ScoreFn(RecordingNetwork(), Absorbing(), LogLinearNoise(), "x0", False),
        assay_of(*changes),
        "bound",
        max_len=max_len,
    )
    np.testing.assert_allclose(found.nats, 0, atol=1e-4)  # rounding errors of float32 sums of about 60 nats
    background = torch.randn(N_STATES, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    score_fn = ScoreFn(
        lambda batch, sigma: background.expand(len(batch.tokens), -1), Absorbing(), LogLinearNoise(), "x0", False
    )
    found = scored(score_fn, assay_of(*changes), "bound", max_len=max_len, draws=96, tokens_per_pack=10_000)
    assert found.standard_error is not None
    for i, piece in enumerate(in_windows(assay_of(*changes), max_len)):
        wild, columns = TARGET[piece.start : piece.stop], columns_of(TARGET, piece)
        variant = columns.join(columns.aligned, columns.inserted)
        variant = variant[variant < N_STATES]
        expected = len(variant) * float(background[variant].mean() - background[wild.astype(np.int64)].mean())
        assert abs(found.nats[i] - expected) < 4 * found.standard_error[i]
        assert found.standard_error[i] < 1


@pytest.mark.parametrize("name", ["absorbing", "uniform", "substitution"])
def test_wild_type_and_variants_get_the_same_noise(name: str) -> None:
    """Every residue that the variant shares with the wild type is noised in the same way, for indels too."""
    network, timed = RecordingNetwork(), name != "absorbing"
    noise = LogLinearNoise(t_min=0.3) if timed else NOISE  # with a large t_min, the last denoising step has noise too
    score_fn = ScoreFn(network, graph_of(name, 20), noise, "x0", timed)
    draw = integral_draw if timed else exact_count_draw
    for change, pairs in (
        (Variant(((5, 3),)), [(i, i) for i in range(24) if i != 6]),
        (Variant(indel=Indel(5, 6, ())), [(i, i - (i > 6)) for i in range(24) if i != 6]),
        (Variant(indel=Indel(5, 5, (1, 1))), [(i, i + 2 * (i > 5)) for i in range(24)]),
    ):
        network.inputs.clear()
        columns = [columns_of(TARGET, Piece(0, 0, 22, variant)) for variant in (Variant(), change)]
        batch = PackedBatch.pack([each.join(each.aligned, each.inserted) for each in columns])
        draw(score_fn, batch, columns, 0.4, 3, 7)
        # a time-conditioned network is called for the integral and for the last denoising step
        assert len(network.inputs) == (4 if timed else 2)
        for wild, variant in zip(network.inputs[0::2], network.inputs[1::2], strict=True):
            differ = sum(int(wild[i] != variant[j]) for i, j in pairs)
            if timed:
                assert differ == 0
                assert not torch.equal(wild, batch.unpack(batch.tokens)[0])
            else:  # another length or a new residue can change the masking of up to two residues
                assert differ <= 2
                assert MASK in wild


def test_scores_depend_on_the_seed_and_not_on_the_packing() -> None:
    score_fn = ScoreFn(make_model(time_conditioning=False).eval(), Absorbing(), LogLinearNoise(), "x0", False)
    assay = assay_of(*MANY.variants, Variant(indel=Indel(4, 6, (1,))))
    small_packs, large_pack, other_seed = (
        scored(score_fn, assay, "bound", tokens_per_pack=tokens, seed=seed)
        for tokens, seed in ((30, 0), (1000, 0), (1000, 1))
    )
    np.testing.assert_allclose(small_packs.nats, large_pack.nats, atol=1e-4)
    assert np.abs(large_pack.nats - other_seed.nats).max() > 1e-3
    assert large_pack.nats[3] == 0
    with pytest.raises(ValueError, match="draws must be even and at least 4, got 5"):
        scored(score_fn, assay, "bound", draws=5)


# agreement with measurements


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_spearman_and_auc_equal_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    scores, measured = np.array(pairs, dtype=np.float64).T
    if np.ptp(scores) and np.ptp(measured):
        assert spearman(scores, measured) == pytest.approx(spearmanr(scores, measured).statistic)
    else:
        assert spearman(scores, measured) is None
    fit = above_median(measured)
    assert fit.tolist() == [float(value > np.median(measured)) for value in measured]
    good, bad = scores[fit == 1], scores[fit == 0]
    if len(good) and len(bad):
        assert auc(scores, fit) == pytest.approx(mannwhitneyu(good, bad).statistic / len(good) / len(bad))
        beaten = np.mean([(g > b) + (g == b) / 2 for g in good for b in bad])
        assert auc(scores, fit) == pytest.approx(beaten)
    else:
        assert auc(scores, fit) is None


def test_metrics_leave_out_variants_without_measurement() -> None:
    scores = np.array([3.0, 9.0, 1.0, 2.0])
    measured = np.array([0.9, np.nan, 0.1, 0.5])
    assert spearman(scores, measured) == pytest.approx(1)
    assert auc(scores, above_median(measured)) == 1
    assert spearman(scores, np.full(4, np.nan)) is None
    assert auc(scores, np.full(4, np.nan)) is None


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=10, max_size=60))
def test_the_other_metrics_match_their_definitions(pairs: list[tuple[int, int]]) -> None:
    """The definitions are those of sklearn and of ProteinGym's script, computed by direct counts."""
    scores, measured = np.array(pairs, dtype=np.float64).T
    fit, high = above_median(measured), scores >= np.median(scores)
    counts = Counter(zip(high.tolist(), (fit == 1).tolist(), strict=True))
    tp, tn, fp, fn = (counts[key] for key in ((True, True), (False, False), (True, False), (False, True)))
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    if fit.min() == fit.max():
        assert matthews(high, fit) is None
    else:
        assert matthews(high, fit) == pytest.approx((tp * tn - fp * fn) / below if below else 0, abs=1e-12)
    if measured.min() == measured.max():
        assert ndcg(scores, measured) is top_recall(scores, measured) is None
        return
    top = len(pairs) // 10
    ranking = sorted(range(len(pairs)), key=lambda i: -scores[i])[:top]  # of equal scores, the earlier row is first
    gain = [(value - measured.min()) / (measured.max() - measured.min()) for value in measured]
    ideal = sorted(gain, reverse=True)[:top]
    found, best = (
        sum(g / math.log2(rank + 2) for rank, g in enumerate(gains)) for gains in ([gain[i] for i in ranking], ideal)
    )
    assert ndcg(scores, measured) == pytest.approx(found / best)
    fittest, chosen = (
        {i for i, v in enumerate(values) if v >= np.quantile(values, 0.9)} for values in (measured, scores)
    )
    assert top_recall(scores, measured) == pytest.approx(len(fittest & chosen) / len(fittest))
    assert ndcg(scores[:9], measured[:9]) is None  # 10% of nine rows is less than one row


def test_an_assay_has_metrics_by_mutation_depth_too() -> None:
    rng = np.random.default_rng(0)
    changed = [1] * 40 + [2] * 30 + [7] * 20 + [5] * 10 + [0]
    measured = rng.normal(size=len(changed))
    scores = measured + rng.normal(size=len(changed))
    measured[:5] = np.nan
    fit = above_median(measured)
    found = judge(scores, measured, fit, changed)
    assert found["spearman"] == pytest.approx(spearmanr(scores[5:], measured[5:]).statistic)
    assert list(found["by_depth"]) == ["1", "2", "5+"]
    deep = slice(70, 100)
    assert found["by_depth"]["5+"]["spearman"] == pytest.approx(spearmanr(scores[deep], measured[deep]).statistic)
    high = scores >= np.median(scores[5:])  # the median is that of the whole assay
    assert found["by_depth"]["5+"]["mcc"] == pytest.approx(matthews(high[deep], fit[deep]))
    assert found["by_depth"]["2"]["auc"] == pytest.approx(auc(scores[40:70], fit[40:70]))


def result(protein: str, kind: str, rho: float, area: float | None, **added: Any) -> dict[str, Any]:
    return {
        "UniProt_ID": protein,
        "coarse_selection_type": kind,
        **dict.fromkeys(METRICS),
        "spearman": rho,
        "auc": area,
    } | added


def test_assays_are_averaged_as_in_proteingym() -> None:
    """By hand: average P1's two stability assays, then P1 with P2, then stability with activity."""
    depths = [{"1": dict.fromkeys(METRICS) | {"spearman": rho}} for rho in (0.6, 0.2, 0.1)]
    results = [
        result("P1", "Stability", 0.2, 0.5, taxon="Human", by_depth=depths[0]),
        result("P1", "Stability", 0.4, 0.7, taxon="Human", by_depth=depths[1]),
        result("P2", "Stability", 0.5, None, taxon="Virus", by_depth={}),
        result("P1", "Activity", 0.1, 0.9, taxon="Human", by_depth=depths[2]),
    ]
    total = aggregate(results)
    stability = total["by_type"]["Stability"]
    assert {key: stability[key] for key in ("spearman", "auc", "assays", "proteins")} == pytest.approx(
        {"spearman": 0.4, "auc": 0.6, "assays": 3, "proteins": 2}
    )
    assert stability["mcc"] is None
    assert total["spearman"] == pytest.approx(0.25)
    assert total["auc"] == pytest.approx(0.75)
    assert total["assays"] == 4
    assert "by_msa_depth" not in total
    assert total["by_taxon"]["Human"]["spearman"] == pytest.approx((0.2 + 0.4 + 0.1) / 3)
    assert total["by_taxon"]["Virus"]["spearman"] == 0.5
    assert list(total["by_mutation_depth"]) == ["1"]
    assert total["by_mutation_depth"]["1"]["spearman"] == pytest.approx(((0.6 + 0.2) / 2 + 0.1) / 2)
    # The bootstrap varies Stability only: its two proteins have 0.3 and 0.5, but Activity has a single protein.
    # Averaging the two types halves the error.
    assert total["spearman_se"] == pytest.approx(0.1 / math.sqrt(2) / 2, rel=0.05)
    assert total["mcc"] is total["mcc_se"] is None


def test_clinical_files_of_proteingym_are_judged_by_their_labels(tmp_path: Path) -> None:
    """Clinical files have no UniProt_ID and no type, and their labels are words."""
    folder, reference = tmp_path / "clinical", tmp_path / "reference.csv"
    folder.mkdir()
    (folder / "NP_1.1.csv").write_text(
        f"protein,mutant,mutated_sequence,DMS_bin_score\nNP,K2A,{WILD[0]}A{WILD[2:]},Pathogenic\nNP,T3P,MKP{WILD[3:]},benign\n"
    )
    reference.write_text(f"DMS_id,target_seq,DMS_filename\nNP_1.1,{WILD},NP_1.1.csv\n")
    (entry,) = read_reference(reference, folder)
    assert (entry.protein, entry.type, entry.more) == ("NP_1.1", "Clinical", {})
    assay = read_assay(entry.path, entry.target)
    assert assay.fit.tolist() == [0, 1]
    assert assay.judge(np.array([-2.0, -1.0]))["auc"] == 1
    assert assay.judge(np.array([-2.0, -1.0]))["spearman"] is None


def test_empty_columns_of_a_spreadsheet_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "excel.csv").write_text("mutant,DMS_score,,\nK2A,1,,\nT3A,0.5,,\n")
    assay = read_assay(tmp_path / "excel.csv", TARGET)
    assert assay.header == ["mutant", "DMS_score", "", ""]
    assert assay.measured.tolist() == [1, 0.5]


def test_a_scan_of_a_target_without_amino_acids_is_an_error() -> None:
    with pytest.raises(ValueError, match="the target has no amino acid to substitute"):
        all_substitutions(ids("UX"))


def test_a_reference_file_that_does_not_match_its_folder_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "dms"
    folder.mkdir()
    reference = tmp_path / "reference.csv"
    head = "DMS_id,target_seq,UniProt_ID,coarse_selection_type,DMS_filename\n"
    reference.write_text(f"{head}A,MK,P1,Activity,a_file.csv\nB,mk,P1,Activity,\n")
    with pytest.raises(ValueError, match="no CSV files"):
        read_reference(reference, folder)
    for name in ("a_file", "B"):
        (folder / f"{name}.csv").write_text("mutant\nM1A\n")
    found = read_reference(reference, folder)
    assert [(entry.id, entry.path.name, entry.target.tolist()) for entry in found] == [
        ("A", "a_file.csv", ids("MK").tolist()),
        ("B", "B.csv", ids("MK").tolist()),
    ]
    (folder / "._B.csv").write_bytes(b"\x00\x05")  # macOS writes such files
    (folder / "c.csv").write_text("mutant\nM1A\n")
    with pytest.raises(ValueError, match=r"c.csv: no row in the reference file .*reference.csv"):
        read_reference(reference, folder)
    for text, message in (
        (f"{head}A,MK,P1,Activity,c.csv\nA,MK,P1,Activity,B.csv\n", "line 3: DMS_id A occurs twice"),
        (f"{head}A/b,MK,P1,Activity,c.csv\n", "line 2: DMS_id 'A/b' is not a valid file name"),
        (f"{head}A,M1,P1,Activity,c.csv\n", "line 2, target_seq: illegal character '1'"),
        ("DMS_id\nA\n", "no column target_seq; its columns are DMS_id"),
    ):
        reference.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_reference(reference, folder)


def test_the_reference_file_sets_how_assays_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "dms").mkdir()
    (tmp_path / "dms/A.csv").write_text("mutant\nM101A\nK102D\n")
    (tmp_path / "dms/B.csv").write_text("mutant\nM1A\n")
    reference = tmp_path / "reference.csv"
    head = "DMS_id,target_seq,start_idx,raw_mut_offset"
    reference.write_text(f"{head}\nA,{WILD},101,\nB,{WILD},,25\n")

    def read_entry(number: int, offset: int | None = None) -> Assay:
        value = "null" if offset is None else str(offset)
        config = read_config(composed("from=x", f"offset={value}", name="variants"), VariantsConfig)
        found = read_reference(reference, tmp_path / "dms")[number]
        return read_checked(found.path, found.target, config, found.numbering)

    assert read_entry(0).variants == read_entry(0, 100).variants == [Variant(((0, 0),)), Variant(((1, 2),))]
    assert read_entry(1).variants == [Variant(((0, 0),))]  # raw_mut_offset applies to the raw file only
    with pytest.raises(ValueError, match=r"line 2: M101A is at position 101, outside the target's positions 1 to 22"):
        read_entry(0, 0)
    reference.write_text(f"{head}\nA,{WILD},100.0,\nB,{WILD},,25\n")
    with pytest.raises(
        ValueError, match=r"M101A has M at position 2 \(offset=99, from start_idx=100.0 in .*reference.csv\)"
    ):
        read_entry(0)
    (tmp_path / "dms/B.csv").write_text("mutant\nK1A\n")
    with pytest.raises(
        ValueError,
        match=r"K1A has K at position 1 \(offset=0; raw_mut_offset=25 in .*reference.csv applies to the raw file only",
    ):
        read_entry(1)
    reference.write_text(f"{head}\nA,{WILD},first,\nB,{WILD},,25\n")
    with pytest.raises(ValueError, match="line 2: start_idx must be a whole number, got 'first'"):
        read_reference(reference, tmp_path / "dms")


def test_a_heat_map_has_a_cell_for_each_single_substitution() -> None:
    target = ids("MXK")
    assay = assay_of(Variant(((0, 0),)), Variant(((2, 5),)), Variant(((0, 1), (2, 1))))
    table = heat_map(assay, target, np.array([-1.0, 2.0, 9.0]))
    assert table is not None
    assert np.isnan(table).sum() == 60 - 4
    assert (table[0, 0], table[2, 5], table[0, target[0]], table[2, target[2]]) == (-1, 2, 0, 0)
    lines = list(csv.reader(to_csv(table, target).splitlines()))
    assert lines[1][:4] == ["1", "M", "-1.000000", ""]
    assert lines[2] == ["2", "X", *[""] * 20]
    assert to_png(table, target, "title").startswith(b"\x89PNG")
    assert heat_map(assay_of(MANY.variants[2]), TARGET, np.zeros(1)) is None


def test_in_a_heat_map_less_fit_is_red_and_fitter_is_blue() -> None:
    table = np.repeat([-1.0, 1.0], 50)[:, None] * np.ones(N_STATES)
    picture = imread(BytesIO(to_png(table, np.zeros(100, dtype=np.uint8), "title")))
    redness = picture[..., 0] - picture[..., 2]
    red, blue = (np.median(np.nonzero(where)[1]) for where in (redness > 0.2, redness < -0.2))
    assert red < picture.shape[1] / 2 < blue


def test_assays_that_would_write_the_same_file_are_an_error() -> None:
    check_distinct_outputs([Path("out/A.csv"), Path("out/B.csv"), Path("out/summary.csv")])
    for first, second, path in (("summary", "summary", "summary.csv"), ("A", "A_heatmap", "A_heatmap.csv")):
        with pytest.raises(ValueError, match=f"out/{path}: both {first} and {second} would write this file; rename"):
            check_distinct_outputs([Path(f"out/{first}.csv"), Path(f"out/{second}.csv")])


def test_composition_scores_are_sums_of_log_ratios() -> None:
    frequencies = np.arange(1.0, 21) / 210
    pair, wild_type = Variant(((0, 3), (4, 7))), Variant()
    found = composition_scores([pair, wild_type, Variant(indel=Indel(3, 4, ()))], TARGET, np.log(frequencies))
    expected = math.log(4 / (TARGET[0] + 1)) + math.log(8 / (TARGET[4] + 1))
    assert found[:2].tolist() == pytest.approx([expected, 0])
    assert math.isnan(found[2])


def test_the_composition_baseline_is_compared_only_on_rows_without_indels() -> None:
    """The scores of the model are judged over the same rows, so that both can be compared."""
    generator = np.random.default_rng(0)
    variants = [Variant(((i % 9, i % 7),)) for i in range(30)] + [Variant(indel=Indel(3, 4, ()))] * 10
    baseline = composition_scores(variants, TARGET, np.log(SWISS_PROT))
    scores, measured = generator.normal(size=(2, 40))
    assay = replace(assay_of(*variants), measured=measured, fit=(measured > 0).astype(float))
    found = compare_with_composition(assay, scores, baseline, "nature")
    assert (found["rows"], found["of"]) == (30, "nature")
    assert found["spearman_with_scores"] == pytest.approx(spearmanr(scores[:30], baseline[:30])[0])
    for metrics, values in (
        (found, baseline),
        (found["score_minus_composition"], scores - baseline),
        (found["scores_of_the_same_rows"], scores),
    ):
        expected = judge(values[:30], measured[:30], assay.fit[:30], [1] * 30)
        assert {key: metrics[key] for key in METRICS} == {key: expected[key] for key in METRICS}
    line = composition_line(found)
    assert f"Spearman {found['spearman_with_scores']:.4f} with the scores; with the measurements spearman " in line
    assert "over the 30 rows without insertion or deletion, where the model has spearman" in line
    only_indels = compare_with_composition(assay_of(variants[-1]), scores[-1:], baseline[-1:], "nature")
    assert "all variants are insertions or deletions" in composition_line(only_indels)


def test_the_frequencies_are_those_of_the_training_split_if_its_store_is_found(
    trained_run: Path, store: SequenceStore
) -> None:
    trained = load_trained(str(trained_run), device="cpu", precision="fp32")
    found = background(trained)
    tokens = np.concatenate([store[row] for row in store.split("train")])
    counts = np.bincount(tokens, minlength=30)[:N_STATES] + 1
    np.testing.assert_allclose(np.exp(found.logs), counts / counts.sum())
    assert (found.name, found.label) == (
        f"training split of {store.fingerprint}",
        f"the training split of {store.path}",
    )
    not_found = background(replace(trained, saved=replace(trained.saved, data_fingerprint="0" * 32)))
    np.testing.assert_allclose(np.exp(not_found.logs), SWISS_PROT / SWISS_PROT.sum())
    assert not_found.label == "UniProtKB/Swiss-Prot, as the training set was not found"


# the command

FOLDER = ("assay=dms", "reference=reference.csv", "output=out", "draws=4")


@pytest.fixture(scope="session")
def short_run(store: SequenceStore, python: Command, made_once: MadeOnce) -> Path:
    """A run of 4 steps with max_len 200."""

    def fill(folder: Path) -> None:
        options = [*TINY, f"data.path={store.path}", "run.name=v", "trainer.max_steps=4"]
        trained = python("-m", "protlig_dd.training", *options, cwd=folder)
        assert trained.returncode == 0, trained.stderr

    return made_once("short", fill) / "runs/v"


@pytest.fixture
def target(store: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bundled protein of more than 200 residues, with two assays in the test's folder, which is the working folder.

    Assay A has substitutions, assay B a deletion and two insertions.
    """
    row = next(row for row in range(len(store)) if 210 < store.lengths[row] < 260)
    protein = ProteinTokenizer().decode(store[row])
    monkeypatch.chdir(tmp_path)
    Path("wt.fasta").write_text(f">wt\n{protein}\n")
    Path("dms").mkdir()
    positions = [i for i, letter in enumerate(protein) if letter in AMINO_ACIDS][::5]
    mutants = [f"{protein[i]}{i + 1}{'K' if protein[i] == 'W' else 'W'}" for i in positions]
    lines = [f"{mutant},{i % 7},{i % 2},note\n" for i, mutant in enumerate(mutants)]
    Path("dms/A.csv").write_text("mutant,DMS_score,DMS_score_bin,more\n" + "".join(lines))
    Path("dms/B.csv").write_text(f"mutated_sequence,DMS_score\n{protein[1:]},1\nM{protein},2\n{protein}W,0\n")
    head = "DMS_id,target_seq,UniProt_ID,coarse_selection_type\n"
    Path("reference.csv").write_text(f"{head}A,{protein},P1,Activity\nB,{protein},P1,Stability\n")
    return protein


@pytest.fixture
def run(short_run: Path, target: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that scores with the given options, in this process, and returns the printed text."""
    Path("runs").symlink_to(short_run.parent)

    def run(*overrides: str) -> str:
        score(composed("from=runs/v", "tokens_per_pack=700", *overrides, name="variants"))
        return capsys.readouterr().out

    return run


def log_ratios(mutants: list[str], store: SequenceStore) -> list[float]:
    """Return log f(mutant) - log f(wild type) of single substitutions.

    f is the frequency of a residue in the training split, with a pseudo-count.
    """
    counts = dict(zip(AMINO_ACIDS, (store.token_counts[0] + 1).tolist(), strict=False))
    return [math.log(counts[mutant[-1]]) - math.log(counts[mutant[0]]) for mutant in mutants]


@pytest.mark.slow
def test_a_scan_has_every_substitution_and_a_heat_map(
    run: Callable[..., str], target: str, store: SequenceStore
) -> None:
    printed = run("target=wt.fasta", "output=scan.csv")
    assert "strategy=masked_marginals (the graph is absorbing)" in printed
    rows = list(csv.DictReader(Path("scan.csv").read_text().splitlines()))
    assert f"scan.csv: {len(rows)} scores; heat map in scan_heatmap.png" in printed
    assert rows[0]["mutant"].startswith(f"{target[0]}1")
    assert len(rows) == 19 * sum(letter in AMINO_ACIDS for letter in target)
    assert Path("scan_heatmap.png").stat().st_size > 10_000
    cells = list(csv.DictReader(Path("scan_heatmap.csv").read_text().splitlines()))
    assert [(int(row["position"]), row["wild_type"]) for row in cells] == list(enumerate(target, start=1))
    table = {f"{row['wild_type']}{row['position']}{letter}": row[letter] for row in cells for letter in AMINO_ACIDS}
    scores = {row["mutant"]: row["score"] for row in rows}
    baseline = [float(row["score"]) - float(row["score_minus_composition"]) for row in rows]
    ratios = log_ratios([row["mutant"] for row in rows], store)
    assert baseline == pytest.approx(ratios, abs=2e-6)
    rank = spearmanr([float(row["score"]) for row in rows], ratios)[0]
    found = json.loads(Path("scan.json").read_text())["composition"]["spearman_with_scores"]
    assert found == pytest.approx(rank, abs=1e-5)  # scores are written with six decimals
    assert f"{store.path}): Spearman {found:.4f} with the scores" in printed
    wild_type = {
        f"{letter}{i}{letter}": "0.000000" for i, letter in enumerate(target, start=1) if letter in AMINO_ACIDS
    }
    assert {mutant: score for mutant, score in table.items() if score} == scores | wild_type

    lines = [f"{row['mutant']},{i}\n" for i, row in enumerate(rows[::97])]  # a scan's mutants can be read as an assay
    Path("some.csv").write_text("mutant,DMS_score\n" + "".join(lines))
    run("target=wt.fasta", "assay=some.csv", "output=again.csv")
    again = csv.DictReader(Path("again.csv").read_text().splitlines())
    assert [(row["mutant"], row["score"]) for row in again] == [(row["mutant"], row["score"]) for row in rows[::97]]
    with pytest.raises(ValueError, match=r"column score exists already"):
        run("target=wt.fasta", "assay=scan.csv", "output=x.csv")


@pytest.mark.slow
def test_an_assay_keeps_its_columns_and_two_ranks_score_it_alike(
    run: Callable[..., str], short_run: Path, run_python: Command
) -> None:
    assay = ("assay=dms/A.csv", "target=wt.fasta", "strategy=bound", "draws=4")
    run(*assay, "output=one_rank.csv")
    two_ranks = run_python(
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "-m",
        "protlig_dd.variants",
        f"from={short_run}",
        "tokens_per_pack=700",
        *assay,
        "output=two_ranks.csv",
    )
    assert two_ranks.returncode == 0, two_ranks.stderr
    assert Path("one_rank.csv").read_text() == Path("two_ranks.csv").read_text()
    rows = list(csv.DictReader(Path("one_rank.csv").read_text().splitlines()))
    assert [",".join(list(row.values())[:4]) for row in rows] == Path("dms/A.csv").read_text().splitlines()[1:]
    assert list(rows[0])[4:] == ["score", "score_strategy", "score_se", "score_minus_composition"]
    scores = [float(row["score"]) for row in rows]
    expected = spearmanr(scores, [int(row["DMS_score"]) for row in rows])[0]
    assert json.loads(Path("one_rank.json").read_text())["spearman"] == pytest.approx(expected)


@pytest.mark.slow
def test_an_interrupted_folder_of_assays_is_resumed(run: Callable[..., str], store: SequenceStore) -> None:
    assert "B: 3 variants by strategy=bound (there are insertions or deletions)" in run(*FOLDER)
    total = json.loads(Path("out/summary.json").read_text())
    assert set(total["by_type"]) == {"Activity", "Stability"}
    lines = list(csv.DictReader(Path("out/summary.csv").read_text().splitlines()))
    for line in lines:  # recompute each figure from the rows, and the averages from the assays
        rows = list(csv.DictReader(Path(f"out/{line['DMS_id']}.csv").read_text().splitlines()))
        scores, measured = ([float(row[key]) for row in rows] for key in ("score", "DMS_score"))
        fit = [row["DMS_score_bin"] == "1" for row in rows] if "DMS_score_bin" in rows[0] else [x > 1 for x in measured]
        pairs = [
            (a > b) + 0.5 * (a == b)
            for a, x in zip(scores, fit, strict=True)
            if x
            for b, y in zip(scores, fit, strict=True)
            if not y
        ]
        assert int(line["variants"]) == len(rows)
        assert float(line["spearman"]) == pytest.approx(spearmanr(scores, measured).statistic)
        assert float(line["auc"]) == pytest.approx(sum(pairs) / len(pairs))
        if line["DMS_id"] == "B":  # insertions and deletions
            assert {row["score_minus_composition"] for row in rows} == {line["composition_spearman"]} == {""}
            continue
        baseline = log_ratios([row["mutant"] for row in rows], store)
        assert float(line["composition_spearman"]) == pytest.approx(spearmanr(baseline, measured).statistic)
        assert total["composition"]["spearman"] == pytest.approx(float(line["composition_spearman"]))
    for metric in ("spearman", "auc"):
        assert total[metric] == pytest.approx(sum(float(line[metric]) for line in lines) / 2)
    assert re.search(r"^A,P1,Activity,masked_marginals,", Path("out/summary.csv").read_text(), re.MULTILINE)
    Path("out/B.csv").rename("B.csv")  # as if the command had been stopped before B was written
    modified = Path("out/A.csv").stat().st_mtime_ns
    assert "1 of 2 assays are scored already" in run(*FOLDER)
    assert json.loads(Path("out/summary.json").read_text()) == total
    assert Path("out/A.csv").stat().st_mtime_ns == modified
    assert Path("out/B.csv").read_text() == Path("B.csv").read_text()
    entry = json.loads(Path("out/A.json").read_text())
    assert entry["frequencies"] == total["frequencies"] == f"training split of {store.fingerprint}"
    assert entry["checkpoint"] == "runs/v/checkpoints/step_00000004"
    assert entry["weights_sha256"] == sha256(Path(entry["checkpoint"]) / "ema.safetensors")


@pytest.mark.slow
def test_each_variant_is_scored_by_its_own_strategy(run: Callable[..., str], target: str) -> None:
    """If the variants have two strategies, the summary also has the metrics of each strategy."""
    sites = [i for i, letter in enumerate(target) if letter in AMINO_ACIDS][:24]
    sequences = [target[:i] + ("K" if target[i] == "W" else "W") + target[i + 1 :] for i in sites[:12]]
    sequences += [target[:i] + target[i + 1 :] for i in sites[::2]]
    rows = [f"{sequence},{i * 7 % 5}\n" for i, sequence in enumerate(sequences)]
    Path("both.csv").write_text("mutated_sequence,DMS_score\n" + "".join(rows))
    printed = run("assay=both.csv", "target=wt.fasta", "output=both_scored.csv", "draws=4")
    assert (
        "24 variants, 12 by strategy=masked_marginals (substitutions), 12 by strategy=bound (insertions and dele"
        in printed
    )
    found = list(csv.DictReader(Path("both_scored.csv").read_text().splitlines()))
    assert [row["score_strategy"] for row in found] == ["masked_marginals"] * 12 + ["bound"] * 12
    assert [row["score_se"] != "" for row in found] == [False] * 12 + [True] * 12
    summary = json.loads(Path("both_scored.json").read_text())
    assert summary["strategy"] == "masked_marginals+bound"
    Path("half.csv").write_text("mutated_sequence,DMS_score\n" + "".join(rows[:12]))
    run("assay=half.csv", "target=wt.fasta", "output=half_scored.csv")
    half = list(csv.DictReader(Path("half_scored.csv").read_text().splitlines()))
    assert [row["score"] for row in half] == [row["score"] for row in found[:12]]
    assert {row["score_strategy"] for row in half} == {"masked_marginals"}
    alone = json.loads(Path("half_scored.json").read_text())
    assert summary["by_strategy"]["masked_marginals"]["spearman"] == pytest.approx(alone["spearman"], abs=1e-6)
    assert summary["by_strategy"]["bound"]["variants"] == 12
    assert f"alone: spearman {alone['spearman']:.4f}" in printed
    assert alone["by_strategy"] == {}


@pytest.mark.slow
def test_files_that_the_command_did_not_write_are_not_changed(run: Callable[..., str], target: str) -> None:
    run(*FOLDER)
    entry = json.loads(Path("out/A.json").read_text())

    def assert_rejected(path: str, content: str, message: str) -> None:
        """Assert that scoring raises if the output folder has this file, and that the file is unchanged."""
        Path(path).parent.mkdir(exist_ok=True)
        earlier = Path(path).read_text() if Path(path).exists() else None
        Path(path).write_text(content)
        with pytest.raises(ValueError, match=message):
            run(*FOLDER[:2], f"output={Path(path).parent}", "draws=4")
        assert Path(path).read_text() == content
        assert earlier or [each.name for each in Path(path).parent.iterdir()] == [Path(path).name]
        Path(path).write_text(earlier) if earlier else Path(path).unlink()

    assert_rejected("mine/B.csv", "x", "mine/B.csv exists already")
    assert_rejected("mine/A_heatmap.csv", "x", "mine/A_heatmap.csv exists already")
    assert_rejected("mine/summary.csv", "x", "mine/summary.csv exists already")
    assert_rejected("mine/summary.json", "{}", "mine/summary.json was not written by this command")
    assert_rejected("mine/A.json", "[1]", "mine/A.json was not written by this command")
    assert_rejected("mine/A.json", "{", "mine/A.json was not written by this command")
    assert_rejected(
        "out/A.json", json.dumps(entry | {"weights_sha256": "0"}), "A.json was written with weights_sha256=0, not"
    )
    assert_rejected(
        "out/A.json", json.dumps(entry | {"assay_sha256": "0"}), "A.json was written with assay_sha256=0, not"
    )
    assert_rejected(
        "out/A.json", json.dumps(entry | {"target": "M"}), f"A.json was written with target=M, not {target}"
    )
    with pytest.raises(ValueError, match=r"summary\.json was written with seed=0, not 1"):
        run(*FOLDER, "seed=1")


@pytest.mark.slow
def test_invalid_settings_are_errors_that_write_nothing(
    run: Callable[..., str], run_python: Command, short_run: Path, tmp_path: Path
) -> None:
    Path("scored.csv").write_text("mutant,score\nM1A,0\n")
    for message, overrides in (
        ("output=dms is the folder of assays", ["assay=dms/", "reference=reference.csv", "output=dms"]),
        ("output=x.json: give a name that ends in .csv", ["target=wt.fasta", "output=x.json"]),
        ("scored.csv exists already", ["target=wt.fasta", "output=scored.csv"]),
        ("assay=dms is a folder; give ProteinGym's reference file with reference=", ["assay=dms", "output=x"]),
        ("reference= needs a folder of CSV files", ["reference=reference.csv", "output=x"]),
        ("target=wt.fasta cannot be used with a folder; its targets are in reference=", [*FOLDER, "target=wt.fasta"]),
        ("target is required", ["output=x.csv"]),
        ("draws must be an even number of at least 4, got 5", ["target=wt.fasta", "output=x.csv", "draws=5"]),
        (
            "strategy=ratio is not available for graph=absorbing; choose from auto, masked_marginals",
            ["target=wt.fasta", "output=x.csv", "strategy=ratio"],
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(*overrides)
    process = run_python("-m", "protlig_dd.variants", f"from={short_run}", "target=no.fasta", "output=x.csv")
    assert_one_line_error(process, "target=no.fasta: no such file")
    assert not list(tmp_path.glob("x*"))
    assert not (tmp_path / "out").exists()
