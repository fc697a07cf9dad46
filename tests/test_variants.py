"""`python -m protlig_dd.variants`: what assays say, every strategy against one row at a time, ProteinGym's average."""

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
    column_streams,
    columns_of,
    exact_count_draw,
    integral_draw,
    mirrored_places,
)
from protlig_dd.evaluation.variants.composition import (
    background,
    beside_composition,
    composition_line,
    composition_scores,
)
from protlig_dd.evaluation.variants.fitness import Scores, over_draws, score_each, score_variants
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
from protlig_dd.evaluation.variants.scoring import check_different, done_before, of_assay, read_checked, settings_of
from protlig_dd.evaluation.variants.strategies import choose_strategies
from protlig_dd.evaluation.variants.windows import Piece, groups_of, pieces_of, windowed
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
    nothing = np.full(len(variants), np.nan)
    rows = [[str(i)] for i in range(len(variants))]
    return Assay(["mutant"], rows, list(variants), [f"row {i}" for i in range(len(variants))], nothing, nothing)


def read(tmp_path: Path, text: str, target: str = WILD) -> Assay:
    (tmp_path / "a.csv").write_text(text)
    return read_assay(tmp_path / "a.csv", ids(target))


def scored(score_fn: ScoreFn, assay: Assay, strategy: str, target: np.ndarray = TARGET, **options: int) -> Scores:
    settings = {"longest": 100, "draws": 8, "seed": 0, "tokens_per_pack": 70} | options
    work = Work(settings.pop("tokens_per_pack"))
    return score_variants(replace(score_fn, noise=NOISE), target, assay, work, strategy=strategy, **settings)


def test_what_is_drawn_follows_from_the_seed() -> None:
    deletion, pair = Variant(indel=Indel(3, 4, ())), Variant(((0, 0), (5, 2)))
    for kind, graph in (("exact_count", Absorbing()), ("integral", Uniform())):
        score_fn = ScoreFn(
            make_model(time_conditioning=kind == "integral"), graph, LogLinearNoise(), "x0", kind == "integral"
        )
        first, again, other = (scored(score_fn, assay_of(pair, deletion), "bound", seed=seed) for seed in (1, 1, 2))
        assert first.nats.tolist() == again.nats.tolist()
        assert (first.nats != other.nats).all()
    streams = [stream for seed in (1, 2) for draw in (0, 1) for stream in column_streams(seed, draw)]
    assert len({tuple(torch.rand(3, generator=stream).tolist()) for stream in streams}) == 8


def test_residues_are_counted_without_letters_that_are_none() -> None:
    """Of a wild type with X: the share that is masked, and the length that an indel changes."""
    target, seen = ids("MKTXYXIAK"), []

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(sigma)
        return torch.zeros(len(batch.tokens), N_STATES)

    score_fn = ScoreFn(network, Absorbing(), LogLinearNoise(), "x0")
    found = scored(score_fn, assay_of(Variant(((0, 0), (2, 1)))), "masked_marginals", target)
    assert found.nats.tolist() == [0.0]
    assert seen[0].tolist() == pytest.approx(masked_sigma(NOISE, torch.tensor([2 / 7], dtype=torch.float64)).tolist())
    indels = assay_of(Variant(indel=Indel(1, 2, ())), Variant(indel=Indel(4, 4, (5, 6))))
    for draws in (4, 10):  # every residue costs log 20, so that no length is better than another
        found = scored(
            ScoreFn(network, Absorbing(), LogLinearNoise(), "x0", False), indels, "bound", target, draws=draws
        )
        assert found.nats.mean() == pytest.approx(0, abs=1e-9)
        np.testing.assert_allclose(found.nats, 0, atol=1e-4)


def test_scores_are_made_again_when_anything_that_they_depend_on_changes(trained_run: Path, tmp_path: Path) -> None:
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
    settings = settings_of(trained, config) | of_assay(None, TARGET, 0)
    run = replace(trained.saved.config, run=replace(trained.saved.config.run, name="another"))
    (tmp_path / "weights").write_bytes(b"others")
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
    changes += [of_assay(tmp_path / "weights", TARGET, 0), of_assay(None, TARGET[1:], 0), of_assay(None, TARGET, 3)]
    output = tmp_path / "a.csv"
    earlier = settings | dict.fromkeys(METRICS)
    (tmp_path / "a.json").write_text(json.dumps(earlier))
    assert done_before(output, settings) is None  # it did not come to its end
    output.write_text("")
    assert done_before(output, settings) == earlier
    keys = set()
    for change in changes:
        (key,) = [key for key in change if change[key] != settings[key]]
        keys.add(key)
        with pytest.raises(ValueError, match=f"a.json was made with {key}="):
            done_before(output, settings | change)
    assert keys == set(settings)


# what files say


def test_both_columns_may_be_there_and_others_are_kept(tmp_path: Path) -> None:
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
        ("", "a.csv: empty"),
        ("mutant\n", "a.csv: no rows"),
        ("name,score\nx,1\n", "no column mutant or mutated_sequence; there are name, score"),
        ("mutant,mutant\nM1A,M1A\n", "the column mutant is there 2 times"),
        ("mutant\nM1A,x\n", "line 2: 2 cells for 1 columns"),
        ("mutant\nM1A\nA1M\n", "line 3: A1M has A at position 1, but the target has M"),
        ("mutant\nM1\n", "line 2: 'M1' is no mutation"),
        ("mutant\nM1A:\n", "line 2: '' is no mutation"),
        (f"mutant\n{WILD[1:]}\n", f"line 2: '{WILD[1:]}' is no mutation.* and whole proteins in a column mutated_seq"),
        ("mutant\nM0A\n", "line 2: M0A is at position 0, but the target has 1 to 22"),
        ("mutant\nM23A\n", "line 2: M23A is at position 23, but the target has 1 to 22"),
        ("mutant\nM1A:M1C\n", "line 2: M1A:M1C changes position 1 twice"),
        ("mutant\nM1X\n", "line 2: M1X: X is none of the amino acids"),
        ("mutant\nM1*\n", r"line 2: M1\* is a stop: give the whole protein in a column mutated_sequence"),
        ("mutant\nM1Ter\n", "line 2: 'M1TER' is no mutation"),
        ("mutant\nM1del:K2A\n", "line 2: M1DEL is a deletion beside other changes: give the whole protein"),
        ("mutant\np.Met1Xyz\n", "line 2: 'MET1XYZ' is no mutation"),
        ("mutant,DMS_score\nM1A,high\n", "line 2: DMS_score 'high' is no finite number"),
        ("mutant,DMS_score\nM1A,1_0\n", "line 2: DMS_score '1_0' is no finite number"),
        ("mutant,DMS_score\nM1A,-inf\n", "line 2: DMS_score '-inf' is no finite number"),
        ("mutant,DMS_score_bin\nM1A,2\n", "line 2: DMS_score_bin is 0 or 1, got 2"),
        ("mutated_sequence\nMK1\n", "line 2, mutated_sequence: illegal character '1' at position 3 of 3"),
        (f"mutated_sequence\nX{WILD[1:]}\n", "line 2: mutated_sequence has other letters"),
        (f"mutant,mutated_sequence\nM1A,C{WILD[1:]}\n", "line 2: mutant M1A and mutated_sequence do not make the same"),
        ("mutant,note\n,x\n", "line 2: neither a mutant nor a mutated_sequence"),
    ],
)
def test_a_wrong_assay_is_named(tmp_path: Path, text: str, message: str) -> None:
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
def test_mutants_are_read_as_people_write_them(tmp_path: Path, mutant: str, substitutions: dict[int, str]) -> None:
    assay = read(tmp_path, f'mutant\n"{mutant}"\nM1A\n')
    assert assay.variants[0] == Variant(tuple((site, AMINO_ACIDS.index(new)) for site, new in substitutions.items()))


def test_a_residue_may_be_missing_by_name(tmp_path: Path) -> None:
    """Either of two alike that stand together leaves the same protein, which is scored twice."""
    target = "MKKV"
    assay = read(tmp_path, "mutant\nK2del\nK3del\nM1del\n", target)
    assert assay.variants[0] == assay.variants[1] == compare(ids("MKV"), ids(target), "")
    assert assay.variants[2] == Variant(indel=Indel(0, 1, ()))


def test_positions_may_be_those_of_a_longer_construct(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("mutant\nM101A\nK102D\n")
    assay = read_assay(tmp_path / "a.csv", TARGET, numbering=Numbering(100))
    assert assay.variants == [Variant(((0, 0),)), Variant(((1, 2),))]
    with pytest.raises(ValueError, match=r"line 2: M101A has M at position 2 \(offset=99\), but"):
        read_assay(tmp_path / "a.csv", TARGET, numbering=Numbering(99))
    with pytest.raises(ValueError, match=r"line 2: M101A is at position -4 \(offset=105\), but the target has 1 to 22"):
        read_assay(tmp_path / "a.csv", TARGET, numbering=Numbering(105))


def test_bad_rows_may_be_left_out_and_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("mutant,DMS_score\nM1A,1\nM1*,2\nA2C,3\nK2A,4\n")
    with pytest.raises(ValueError, match=r"line 3: M1\* is a stop.* \(bad_rows=skip leaves such rows out\)"):
        read_assay(tmp_path / "a.csv", TARGET)
    assay = read_assay(tmp_path / "a.csv", TARGET, skip_bad=True)
    assert assay.measured.tolist() == [1, 4]
    assert [row[0] for row in assay.rows] == ["M1A", "K2A"]
    assert [re.sub(".*(line [0-9]).*", r"\1", one) for one in assay.bad] == ["line 3", "line 4"]
    (tmp_path / "a.csv").write_text("mutant\nM1*\nA2C\n")
    with pytest.raises(ValueError, match=r"line 2: M1\* is a stop.*; nor can any other row of .*a.csv be read"):
        read_assay(tmp_path / "a.csv", TARGET, skip_bad=True)


def test_letters_may_be_small_and_measurements_missing(tmp_path: Path) -> None:
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


def test_residues_without_probability_cannot_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="X1A is at X of the target"):
        read(tmp_path, "mutant\nX1A\n", "XK")
    assert read(tmp_path, "mutated_sequence\nXA\n", "XK").variants == [Variant(((1, 0),))]
    with pytest.raises(ValueError, match="at position 1 one of the two is no amino acid"):
        compare(ids("AX"), ids("XA"), "row")
    assert [row[0] for row in all_substitutions(ids("XM")).rows][:2] == ["M2A", "M2C"]


def test_a_target_is_a_file_or_a_sequence(tmp_path: Path) -> None:
    (tmp_path / "wt.fasta").write_text(">a\nmkta\n")
    assert read_target(str(tmp_path / "wt.fasta")).tolist() == read_target("MKTA").tolist() == ids("MKTA").tolist()
    (tmp_path / "wt.fasta").write_text(">a\nMK\n>b\nMK\n")
    with pytest.raises(ValueError, match="one protein, but there are 2 records"):
        read_target(str(tmp_path / "wt.fasta"))
    for name in ("no.fasta", ""):
        with pytest.raises(ValueError, match=f"target={name}: no such file"):
            read_target(name)
    assert len(all_substitutions(TARGET).variants) == 19 * len(WILD)


@given(st.text("ACDX", max_size=8), st.text("ACD", max_size=5), st.text("ACD", max_size=5), st.text("ACD", max_size=8))
def test_variants_are_rebuilt_from_their_columns(left: str, old: str, new: str, right: str) -> None:
    """What `compare` finds, laid over the wild type, is the variant again."""
    wild, variant = ids("M" + left + old + right), ids("M" + left + new + right)
    found = compare(variant, wild, "row")
    columns = columns_of(wild, Piece(0, 0, len(wild), found))
    assert columns.join(columns.aligned, columns.inserted).tolist() == [BOS, *variant.tolist(), EOS]
    assert len(columns.aligned) == len(wild) + 2
    assert int((columns.aligned == GAP).sum()) == max(0, len(wild) - len(variant))


# windows


def in_windows(assay: Assay, longest: int, length: int = 22, strategy: str = "bound") -> list[Piece]:
    return pieces_of(assay, length, longest, strategy)


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_windows_hold_their_sites_and_are_as_large_as_can_be(length: int, longest: int, data: st.DataObject) -> None:
    sites = sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=4)))
    pieces = in_windows(assay_of(Variant(tuple((site, 0) for site in sites))), longest, length)
    assert [site for piece in pieces for site, _ in piece.change.substitutions] == sites
    for piece in pieces:
        assert 0 <= piece.start < piece.stop <= length
        assert piece.stop - piece.start == min(length, longest)
        assert all(piece.start <= site < piece.stop for site, _ in piece.change.substitutions)
    assert len(pieces) == 1 or sites[-1] - sites[0] >= longest


def partitions(n: int) -> list[list[tuple[int, int]]]:
    """Of n sites in a row into groups of neighbours."""
    cuts = itertools.product((False, True), repeat=n - 1)
    ends = [[0, *(i + 1 for i, cut in enumerate(some) if cut), n] for some in cuts]
    return [list(itertools.pairwise(some)) for some in ends]


@given(st.integers(1, 60), st.integers(1, 12), st.data())
def test_sites_share_windows_as_well_as_they_can(length: int, longest: int, data: st.DataObject) -> None:
    """Of all partitions: the fewest windows, then the nearest edge as far away as can be, then the next nearest."""
    sites = sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=8)))
    shown = min(length, longest)

    def quality(groups: list[tuple[int, int]]) -> tuple[int, list[int]]:
        margins = []
        for first, last in groups:
            low, high = sites[first], sites[last - 1]
            start = min(max(0, (low + high + 1 - shown) // 2), length - shown)
            left, right = low - start, start + shown - 1 - high
            margins.append(min(left if start else length, right if start + shown < length else length))
        return -len(groups), sorted(margins)

    able = [one for one in partitions(len(sites)) if all(sites[b - 1] - sites[a] < longest for a, b in one)]
    found = groups_of(sites, length, longest)
    assert found in able
    assert quality(found) == max(quality(one) for one in able)


def test_far_sites_share_a_window_with_the_nearer_neighbour() -> None:
    far = Variant(((4999, 0), (5399, 9), (5599, 19)))
    pieces = in_windows(assay_of(far), 512, 7000, "masked_marginals")
    assert [[site for site, _ in piece.change.substitutions] for piece in pieces] == [[4999], [5399, 5599]]
    assert groups_of([0, 7, 12], 30, 10) == [(0, 1), (1, 3)]  # a site at the protein's end lacks nothing
    assert groups_of([], 22, 5) == []


@given(st.integers(1, 200), st.integers(1, 40))
def test_windows_of_the_wild_type_alone_are_few(length: int, longest: int) -> None:
    """Each site has as many residues on both sides as a quarter of a window, or all that there are."""
    every = Variant(tuple((site, 0) for site in range(length)))
    pieces = in_windows(assay_of(every), longest, length, "ratio")
    assert [piece.change.substitutions for piece in pieces] == [(one,) for one in every.substitutions]
    for site, (_, start, stop, _) in enumerate(pieces):
        assert stop - start == min(length, longest)
        assert 0 <= start <= max(0, site - longest // 4)
        assert min(length, site + 1 + longest // 4) <= stop <= length
    assert len({piece.start for piece in pieces}) <= 2 + max(0, length - longest) // max(1, longest // 4)


@given(st.integers(1, 40), st.integers(1, 20), st.data())
def test_windows_of_indels_hold_the_same_part_of_both(length: int, longest: int, data: st.DataObject) -> None:
    """As much as the model can see, the block in it, wherever that leaves anything else; refused elsewhere."""
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, length)] * 2)))
    new = data.draw(st.lists(st.integers(0, 19), max_size=25).filter(lambda new: len(new) != stop - start))
    more = len(new) - (stop - start)
    target = np.arange(length, dtype=np.uint8) % 20
    variant = np.array([*target[:start], *new, *target[stop:]], dtype=np.uint8)
    assay = assay_of(Variant(indel=Indel(start, stop, tuple(new))))
    if max(length, length + more) > longest and max(stop - start, len(new)) >= longest:
        with pytest.raises(ValueError, match=f"row 0: {stop - start} residues become {len(new)}, too many for a wind"):
            in_windows(assay, longest, length)
        return
    (piece,) = in_windows(assay, longest, length)
    assert 0 <= piece.start <= start <= stop <= piece.stop <= length
    assert max(piece.stop - piece.start, piece.stop - piece.start + more) == min(longest, max(length, length + more))
    for sequence, last, change in ((target, piece.stop, Variant()), (variant, piece.stop + more, piece.change)):
        columns = columns_of(target, Piece(0, piece.start, piece.stop, change))
        shown = columns.join(columns.aligned, columns.inserted).tolist()
        assert shown == windowed(sequence, piece.start, last).tolist()


def test_windows_have_the_ends_of_the_protein_alone() -> None:
    assert windowed(TARGET, 0, 3).tolist() == [BOS, *TARGET[:3]]
    assert windowed(TARGET, 2, 22).tolist() == [*TARGET[2:], EOS]
    assert in_windows(assay_of(Variant(((10, 0),))), 5)[0][1:3] == (8, 13)


def test_an_indel_is_seen_through_one_window() -> None:
    (piece,) = in_windows(assay_of(Variant(indel=Indel(10, 10, (0, 1, 2)))), 9)
    assert piece.stop - piece.start + 3 == 9
    columns = columns_of(TARGET, piece)
    expected = [*TARGET[piece.start : 10], 0, 1, 2, *TARGET[10 : piece.stop]]
    assert columns.join(columns.aligned, columns.inserted).tolist() == expected


# strategies


def test_strategies_are_those_of_the_graph() -> None:
    single, indel = assay_of(Variant(((0, 0),))), assay_of(Variant(indel=Indel(0, 1, ())))
    both = assay_of(*single.variants, *indel.variants, Variant())
    assert choose_strategies("auto", Absorbing(), single) == (["masked_marginals"], "the graph is absorbing")
    assert choose_strategies("auto", Uniform(), single) == (["ratio"], "the graph is uniform")
    assert choose_strategies("auto", Uniform(), indel) == (["bound"], "there are insertions or deletions")
    assert choose_strategies("auto", Uniform(), both)[0] == ["ratio", "bound", "ratio"]
    assert choose_strategies("bound", Uniform(), both) == (["bound"] * 3, "as asked for")
    assert choose_strategies("wildtype_marginals", Absorbing(), single)[0] == ["wildtype_marginals"]
    with pytest.raises(ValueError, match=r"strategy=masked_marginals: .*\(uniform\) can do ratio, bound"):
        choose_strategies("masked_marginals", Uniform(), single)
    with pytest.raises(ValueError, match="can do masked_marginals, site_marginals, wildtype_marginals, bound"):
        choose_strategies("ratio", Absorbing(), single)
    with pytest.raises(
        ValueError,
        match="row 0: 0 residues stand in the place of 1, but strategy=ratio needs equal lengths; use auto, or bou",
    ):
        choose_strategies("ratio", Uniform(), indel)


@pytest.mark.parametrize("graph", [Absorbing(), Uniform()])
def test_an_indel_leaves_the_scores_of_substitutions_alone(graph: Graph) -> None:
    """Each variant has the score that its strategy gives it in an assay of its own kind."""
    score_fn = ScoreFn(make_model(), graph, NOISE, "x0" if isinstance(graph, Absorbing) else "log_score")
    substitutions = [Variant(((3, 7),)), Variant(((0, 1), (19, 5))), Variant()]
    indels = [Variant(indel=Indel(4, 6, (1,))), Variant(indel=Indel(9, 9, (2,)))]
    mixed = assay_of(substitutions[0], indels[0], substitutions[1], indels[1], substitutions[2])
    strategies, _ = choose_strategies("auto", graph, mixed)
    settings: dict[str, Any] = {"longest": 100, "draws": 8, "seed": 0}
    found = score_each(score_fn, TARGET, mixed, Work(70), strategies=strategies, **settings)
    own = scored(score_fn, assay_of(*substitutions), strategies[0])
    bound = scored(score_fn, assay_of(*indels), "bound")
    np.testing.assert_allclose(found.nats[[0, 2, 4]], own.nats, atol=1e-5)
    np.testing.assert_allclose(found.nats[[1, 3]], bound.nats, atol=1e-5)
    assert found.standard_error is not None
    assert bound.standard_error is not None
    np.testing.assert_allclose(found.standard_error[[1, 3]], bound.standard_error, atol=1e-5)
    assert np.isnan(found.standard_error[[0, 2, 4]]).all()
    alone = score_each(score_fn, TARGET, assay_of(*substitutions), Work(70), strategies=[strategies[0]] * 3, **settings)
    assert alone.standard_error is None


MANY = assay_of(
    Variant(((3, 7),)), Variant(((3, 8),)), Variant(((0, 1), (21, 5))), Variant(), Variant(((4, 2), (5, 2), (9, 9)))
)


@pytest.mark.parametrize("longest", [100, 10])
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
def test_marginals_are_those_of_one_row_at_a_time(
    graph: Graph, parametrisation: str, timed: bool, strategy: str, longest: int
) -> None:
    """Each window by itself, its log-probabilities read off the whole table."""
    model = make_model(time_conditioning=timed).eval()
    score_fn = ScoreFn(model, graph, LogLinearNoise(), parametrisation, timed)
    expected = []
    for number, variant in enumerate(MANY.variants):
        total = 0.0
        for piece in (p for p in in_windows(MANY, longest, strategy=strategy) if p.variant == number):
            tokens = torch.from_numpy(windowed(TARGET, piece.start, piece.stop))
            shift = 1 - piece.start if piece.start == 0 else -piece.start
            sites = [site + shift for site, _ in piece.change.substitutions]
            level = float(NOISE(torch.tensor(NOISE.t_min))[0])
            if strategy in ("masked_marginals", "site_marginals"):
                tokens[sites] = MASK
                level = -float(np.log1p(-len(sites) / (piece.stop - piece.start)))
            batch, sigma = PackedBatch.pack([tokens]), torch.tensor([level])
            with torch.no_grad():
                log_p = score_fn(batch, sigma) if strategy == "ratio" else score_fn.logits(batch, sigma).log_softmax(-1)
            for site, (place, residue) in zip(sites, piece.change.substitutions, strict=True):
                total += float(log_p[site, residue] - log_p[site, TARGET[place]])
        expected.append(total)
        assert variant.substitutions or total == 0
    found = scored(score_fn, MANY, strategy, longest=longest)
    np.testing.assert_allclose(found.nats, expected, atol=2e-5)
    assert found.standard_error is None
    if strategy == "site_marginals":
        singles = assay_of(*(Variant((one,)) for one in MANY.variants[4].substitutions))
        assert found.nats[4] == pytest.approx(scored(score_fn, singles, strategy, longest=longest).nats.sum(), abs=2e-5)


def toy_scores(name: str, parametrisation: str = "log_score") -> tuple[brute_force.Toy, ScoreFn]:
    toy = brute_force.random_toy(name, n=3, sites=2)
    return toy, exact_score_fn(toy, parametrisation)


ALL_OF_THE_TOY = [
    Variant(tuple((site, y) for site, y in enumerate(pair) if y != (0, 2)[site]))
    for pair in itertools.product(range(3), repeat=2)
]
TOY_WILD = np.array([0, 2], dtype=np.uint8)


def true_differences(toy: brute_force.Toy) -> list[float]:
    return [float(toy.p0[pair].log() - toy.p0[0, 2].log()) for pair in itertools.product(range(3), repeat=2)]


@pytest.mark.parametrize("name", ["uniform", "substitution"])
def test_exact_ratios_of_single_substitutions_are_those_of_the_data(name: str) -> None:
    toy, score_fn = toy_scores(name)
    noise = GeometricNoise(1e-6, 12.0, 1e-6)
    found = score_variants(
        replace(score_fn, noise=noise),
        TOY_WILD,
        assay_of(*ALL_OF_THE_TOY),
        Work(70),
        strategy="ratio",
        longest=9,
        draws=4,
        seed=0,
    )
    singles = [i for i, variant in enumerate(ALL_OF_THE_TOY) if len(variant.substitutions) == 1]
    np.testing.assert_allclose(found.nats[singles], np.array(true_differences(toy))[singles], atol=1e-3)


def test_exact_masked_marginals_of_single_substitutions_are_those_of_the_data() -> None:
    toy, score_fn = toy_scores("absorbing", "x0")
    found = scored(score_fn, assay_of(*ALL_OF_THE_TOY), "masked_marginals", TOY_WILD)
    singles = [i for i, variant in enumerate(ALL_OF_THE_TOY) if len(variant.substitutions) == 1]
    np.testing.assert_allclose(found.nats[singles], np.array(true_differences(toy))[singles], atol=1e-5)


def test_with_all_masks_enumerated_the_bound_is_the_likelihood() -> None:
    """k = 1 (either site) and k = 2 of an exact model, each k with the same weight."""
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
    """Within its own standard error; the ends of the noise leave a few hundredths of a nat."""
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
        longest=9,
        draws=draws,
        seed=2,
    )
    assert found.standard_error is not None
    assert found.nats[2] == found.standard_error[2] == 0  # the wild type itself
    error = np.abs(found.nats - true_differences(toy))
    assert (error < 4 * found.standard_error + 0.05).all()
    assert np.median(found.standard_error) < 0.4 * (200 / draws) ** 0.5


def without_time(score_fn: ScoreFn) -> ScoreFn:
    """The exact posterior does not depend on the time, but the toy's table needs one above 0."""
    exact = score_fn.model
    return ScoreFn(
        lambda batch, sigma: exact(batch, torch.full_like(sigma, 0.5)), score_fn.graph, LogLinearNoise(), "x0", False
    )


def test_draws_are_mirrored_and_stratified() -> None:
    places = np.array(mirrored_places(8, torch.Generator().manual_seed(0)))
    np.testing.assert_allclose(places[0::2] + places[1::2], 1)
    assert sorted(np.floor(places * 8).astype(int)) == list(range(8))


class Recorded:
    """A network that has learnt nothing, and what it was shown."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        self.seen += batch.unpack(batch.tokens)
        return torch.zeros(len(batch.tokens), N_STATES)


def test_mirrored_draws_mask_what_the_other_shows() -> None:
    """Of 22 residues 7 and 16, or 1 and 22: all of them once, and one in both."""
    network = Recorded()
    score_fn = ScoreFn(network, Absorbing(), NOISE, "x0", False)
    columns = [columns_of(TARGET, Piece(0, 0, 22, Variant()))]
    batch = PackedBatch.pack([columns[0].aligned])
    for k in (0, 2):
        for place in (0.3, 0.01):
            for draw, at in ((k, place), (k + 1, 1 - place)):
                exact_count_draw(score_fn, batch, columns, at, draw, 7)
    masked = torch.stack(network.seen)[:, 1:-1] == MASK
    assert masked.sum(1).tolist() == [7, 16, 1, 22] * 2
    assert (masked[0::2] | masked[1::2]).all()
    assert not torch.equal(masked[0], masked[4])  # another pair


def test_scores_of_draws_by_hand() -> None:
    """Pairs (2, 0) and (6, 3)."""
    found = over_draws(np.array([[1.0, 0], [3, 0], [5, 2], [7, 4]]))
    assert found.nats.tolist() == [4, 1.5]
    assert found.standard_error == pytest.approx([2, 1.5])


@pytest.mark.parametrize("name", ["uniform", "substitution"])
def test_with_all_noise_enumerated_the_integral_is_the_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every x_t with every x at t_min, quadrature over the draw's place; a noise range where all three terms count."""
    toy, score_fn = toy_scores(name)
    noise = LogLinearNoise(eps=0.1, t_min=0.05, rate=-score_fn.graph.lambda_2)
    states = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    pairs = [(i, j) for i in range(9) for j in range(9)]
    copies = [columns_of(TOY_WILD, Piece(0, 0, 2, Variant()))] * len(pairs)
    batch = PackedBatch.pack([one.aligned for one in copies])
    drawn: list[int] = []

    def transition(x0: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.cat([x0[:1], states[drawn.pop(0)], x0[-1:]]) if len(x0) else x0

    def probability(sigma: float) -> torch.Tensor:
        return brute_force.transition(name, 3, sigma)[torch.from_numpy(TOY_WILD).long(), states].prod(1)

    monkeypatch.setattr(score_fn.graph, "sample_transition", transition)
    total, lowest = 0.0, probability(float(noise(torch.tensor(noise.t_min, dtype=torch.float64))[0]))
    for point, weight in zip(*np.polynomial.legendre.leggauss(12), strict=True):
        drawn += [i for i, _ in pairs] + [j for _, j in pairs]
        place = (1 + float(point)) / 2
        t = torch.tensor(noise.t_min + (1 - noise.t_min) * place, dtype=torch.float64)
        with torch.no_grad():
            nats = integral_draw(replace(score_fn, noise=noise), batch, copies, place, 0, 0).view(9, 9, 4).sum(2)
        total += weight / 2 * float(probability(float(noise(t)[0])) @ nats.double() @ lowest)
    assert total == pytest.approx(exact_bound(toy, toy.log_score, (0, 2), noise), abs=1e-4)


@pytest.mark.parametrize("longest", [100, 12])
def test_a_model_of_the_background_alone_gives_indels_nothing(longest: int) -> None:
    """Of one whose amino acids are equal exactly 0; else what the residues differ from the wild type's mean."""
    changes = [Variant(indel=one) for one in (Indel(4, 4, (3, 3, 9)), Indel(8, 11, ()), Indel(3, 6, (1,)))]
    found = scored(
        ScoreFn(Recorded(), Absorbing(), LogLinearNoise(), "x0", False), assay_of(*changes), "bound", longest=longest
    )
    np.testing.assert_allclose(found.nats, 0, atol=1e-4)  # float32 of some 60 nats
    background = torch.randn(N_STATES, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    score_fn = ScoreFn(
        lambda batch, sigma: background.expand(len(batch.tokens), -1), Absorbing(), LogLinearNoise(), "x0", False
    )
    found = scored(score_fn, assay_of(*changes), "bound", longest=longest, draws=96, tokens_per_pack=10_000)
    assert found.standard_error is not None
    for i, piece in enumerate(in_windows(assay_of(*changes), longest)):
        wild, columns = TARGET[piece.start : piece.stop], columns_of(TARGET, piece)
        variant = columns.join(columns.aligned, columns.inserted)
        variant = variant[variant < N_STATES]
        expected = len(variant) * float(background[variant].mean() - background[wild.astype(np.int64)].mean())
        assert abs(found.nats[i] - expected) < 4 * found.standard_error[i]
        assert found.standard_error[i] < 1


@pytest.mark.parametrize("name", ["absorbing", "uniform", "substitution"])
def test_wild_type_and_variants_are_noised_alike(name: str) -> None:
    """With a residue inserted and one deleted: every residue that the two share is shown noised in the same way."""
    network, timed = Recorded(), name != "absorbing"
    noise = LogLinearNoise(t_min=0.3) if timed else NOISE  # so much that the last denoising step shows some as well
    score_fn = ScoreFn(network, graph_of(name, 20), noise, "x0", timed)
    draw = integral_draw if timed else exact_count_draw
    for change, places in (
        (Variant(((5, 3),)), [(i, i) for i in range(24) if i != 6]),
        (Variant(indel=Indel(5, 6, ())), [(i, i - (i > 6)) for i in range(24) if i != 6]),
        (Variant(indel=Indel(5, 5, (1, 1))), [(i, i + 2 * (i > 5)) for i in range(24)]),
    ):
        network.seen.clear()
        columns = [columns_of(TARGET, Piece(0, 0, 22, one)) for one in (Variant(), change)]
        batch = PackedBatch.pack([one.join(one.aligned, one.inserted) for one in columns])
        draw(score_fn, batch, columns, 0.4, 3, 7)
        assert len(network.seen) == (4 if timed else 2)  # of the integral, and of the last denoising step
        for wild, variant in zip(network.seen[0::2], network.seen[1::2], strict=True):
            differ = sum(int(wild[i] != variant[j]) for i, j in places)
            if timed:
                assert differ == 0
                assert not torch.equal(wild, batch.unpack(batch.tokens)[0])
            else:  # the numbers of masked residues may differ by one where lengths do, or the new residue takes part
                assert differ <= 2
                assert MASK in wild


def test_scores_depend_on_the_seed_and_not_on_packs() -> None:
    score_fn = ScoreFn(make_model(time_conditioning=False).eval(), Absorbing(), LogLinearNoise(), "x0", False)
    assay = assay_of(*MANY.variants, Variant(indel=Indel(4, 6, (1,))))
    one, other, third = (
        scored(score_fn, assay, "bound", tokens_per_pack=tokens, seed=seed)
        for tokens, seed in ((30, 0), (1000, 0), (1000, 1))
    )
    np.testing.assert_allclose(one.nats, other.nats, atol=1e-4)
    assert np.abs(other.nats - third.nats).max() > 1e-3
    assert other.nats[3] == 0
    with pytest.raises(ValueError, match="draws must be an even number of at least 4, got 5"):
        scored(score_fn, assay, "bound", draws=5)


# what predictions are worth


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_spearman_and_auc_are_scipys(pairs: list[tuple[int, int]]) -> None:
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


def test_what_was_not_measured_is_left_out() -> None:
    scores = np.array([3.0, 9.0, 1.0, 2.0])
    measured = np.array([0.9, np.nan, 0.1, 0.5])
    assert spearman(scores, measured) == pytest.approx(1)
    assert auc(scores, above_median(measured)) == 1
    assert spearman(scores, np.full(4, np.nan)) is None
    assert auc(scores, np.full(4, np.nan)) is None


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=10, max_size=60))
def test_the_other_metrics_are_what_their_names_say(pairs: list[tuple[int, int]]) -> None:
    """Each counted one by one, with the definitions of sklearn and of ProteinGym's script."""
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
    ranking = sorted(range(len(pairs)), key=lambda i: -scores[i])[:top]  # the earlier of two alike first
    gain = [(value - measured.min()) / (measured.max() - measured.min()) for value in measured]
    ideal = sorted(gain, reverse=True)[:top]
    found, best = (
        sum(g / math.log2(rank + 2) for rank, g in enumerate(some)) for some in ([gain[i] for i in ranking], ideal)
    )
    assert ndcg(scores, measured) == pytest.approx(found / best)
    fittest, chosen = (
        {i for i, v in enumerate(values) if v >= np.quantile(values, 0.9)} for values in (measured, scores)
    )
    assert top_recall(scores, measured) == pytest.approx(len(fittest & chosen) / len(fittest))
    assert ndcg(scores[:9], measured[:9]) is None  # no tenth


def test_an_assay_is_judged_by_mutation_depth_too() -> None:
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
    high = scores >= np.median(scores[5:])  # of the whole assay
    assert found["by_depth"]["5+"]["mcc"] == pytest.approx(matthews(high[deep], fit[deep]))
    assert found["by_depth"]["2"]["auc"] == pytest.approx(auc(scores[40:70], fit[40:70]))


def result(protein: str, kind: str, rho: float, area: float | None, **more: Any) -> dict[str, Any]:
    return {
        "UniProt_ID": protein,
        "coarse_selection_type": kind,
        **dict.fromkeys(METRICS),
        "spearman": rho,
        "auc": area,
    } | more


def test_assays_are_averaged_as_proteingym_does() -> None:
    """By hand: P1's two stability assays first, then P1 with P2, then stability with activity."""
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
    # two proteins of 0.3 and 0.5 drawn with replacement, then half of that, as the other type has one protein
    assert total["spearman_se"] == pytest.approx(0.1 / math.sqrt(2) / 2, rel=0.05)
    assert total["mcc"] is total["mcc_se"] is None


def test_proteingyms_clinical_files_are_scored_by_their_labels(tmp_path: Path) -> None:
    """They name no UniProt_ID and no type, and have words for labels."""
    folder, reference = tmp_path / "clinical", tmp_path / "reference.csv"
    folder.mkdir()
    (folder / "NP_1.1.csv").write_text(
        f"protein,mutant,mutated_sequence,DMS_bin_score\nNP,K2A,{WILD[0]}A{WILD[2:]},Pathogenic\nNP,T3P,MKP{WILD[3:]},benign\n"
    )
    reference.write_text(f"DMS_id,target_seq,DMS_filename\nNP_1.1,{WILD},NP_1.1.csv\n")
    (one,) = read_reference(reference, folder)
    assert (one.protein, one.type, one.more) == ("NP_1.1", "Clinical", {})
    assay = read_assay(one.path, one.target)
    assert assay.fit.tolist() == [0, 1]
    assert assay.judge(np.array([-2.0, -1.0]))["auc"] == 1
    assert assay.judge(np.array([-2.0, -1.0]))["spearman"] is None


def test_empty_columns_of_a_spreadsheet_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "excel.csv").write_text("mutant,DMS_score,,\nK2A,1,,\nT3A,0.5,,\n")
    assay = read_assay(tmp_path / "excel.csv", TARGET)
    assert assay.header == ["mutant", "DMS_score", "", ""]
    assert assay.measured.tolist() == [1, 0.5]


def test_a_target_without_amino_acids_has_no_scan() -> None:
    with pytest.raises(ValueError, match="the target has no amino acid that could be substituted"):
        all_substitutions(ids("UX"))


def test_references_that_do_not_fit_the_folder_are_named(tmp_path: Path) -> None:
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
    assert [(one.id, one.path.name, one.target.tolist()) for one in found] == [
        ("A", "a_file.csv", ids("MK").tolist()),
        ("B", "B.csv", ids("MK").tolist()),
    ]
    (folder / "._B.csv").write_bytes(b"\x00\x05")  # macOS
    (folder / "c.csv").write_text("mutant\nM1A\n")
    with pytest.raises(ValueError, match=r"c.csv is not in .*reference.csv"):
        read_reference(reference, folder)
    for text, message in (
        (f"{head}A,MK,P1,Activity,c.csv\nA,MK,P1,Activity,B.csv\n", "line 3: A is there twice"),
        (f"{head}A/b,MK,P1,Activity,c.csv\n", "line 2: DMS_id 'A/b' cannot name a file"),
        (f"{head}A,M1,P1,Activity,c.csv\n", "line 2, target_seq: illegal character '1'"),
        ("DMS_id\nA\n", "no column target_seq; there are DMS_id"),
    ):
        reference.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_reference(reference, folder)


def test_a_reference_says_how_its_assays_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "dms").mkdir()
    (tmp_path / "dms/A.csv").write_text("mutant\nM101A\nK102D\n")
    (tmp_path / "dms/B.csv").write_text("mutant\nM1A\n")
    reference = tmp_path / "reference.csv"
    head = "DMS_id,target_seq,start_idx,raw_mut_offset"
    reference.write_text(f"{head}\nA,{WILD},101,\nB,{WILD},,25\n")

    def one(number: int, offset: int | None = None) -> Assay:
        given = "null" if offset is None else str(offset)
        config = read_config(composed("from=x", f"offset={given}", name="variants"), VariantsConfig)
        found = read_reference(reference, tmp_path / "dms")[number]
        return read_checked(found.path, found.target, config, found.numbering)

    assert one(0).variants == one(0, 100).variants == [Variant(((0, 0),)), Variant(((1, 2),))]
    assert one(1).variants == [Variant(((0, 0),))]  # which raw_mut_offset, that of the raw file, does not move
    with pytest.raises(ValueError, match=r"line 2: M101A is at position 101, but the target has 1 to 22"):
        one(0, 0)
    reference.write_text(f"{head}\nA,{WILD},100.0,\nB,{WILD},,25\n")
    with pytest.raises(
        ValueError, match=r"M101A has M at position 2 \(offset=99, as start_idx=100.0 in .*reference.csv "
    ):
        one(0)
    (tmp_path / "dms/B.csv").write_text("mutant\nK1A\n")
    with pytest.raises(
        ValueError, match=r"K1A has K at position 1 \(offset=0; raw_mut_offset=25 in .*reference.csv is "
    ):
        one(1)
    reference.write_text(f"{head}\nA,{WILD},first,\nB,{WILD},,25\n")
    with pytest.raises(ValueError, match="line 2: start_idx is a whole number, got 'first'"):
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


def test_what_is_less_fit_is_red_and_what_is_fitter_is_blue() -> None:
    table = np.repeat([-1.0, 1.0], 50)[:, None] * np.ones(N_STATES)
    picture = imread(BytesIO(to_png(table, np.zeros(100, dtype=np.uint8), "title")))
    redness = picture[..., 0] - picture[..., 2]
    red, blue = (np.median(np.nonzero(where)[1]) for where in (redness > 0.2, redness < -0.2))
    assert red < picture.shape[1] / 2 < blue


def test_assays_whose_files_would_collide_are_refused() -> None:
    check_different([Path("out/A.csv"), Path("out/B.csv"), Path("out/summary.csv")])
    for one, other, path in (("summary", "summary", "summary.csv"), ("A", "A_heatmap", "A_heatmap.csv")):
        with pytest.raises(ValueError, match=f"out/{path} would be a file of {one} and of {other}; rename"):
            check_different([Path(f"out/{one}.csv"), Path(f"out/{other}.csv")])


def test_composition_scores_are_sums_of_log_ratios() -> None:
    frequencies = np.arange(1.0, 21) / 210
    pair, same = Variant(((0, 3), (4, 7))), Variant()
    found = composition_scores([pair, same, Variant(indel=Indel(3, 4, ()))], TARGET, np.log(frequencies))
    expected = math.log(4 / (TARGET[0] + 1)) + math.log(8 / (TARGET[4] + 1))
    assert found[:2].tolist() == pytest.approx([expected, 0])
    assert math.isnan(found[2])


def test_the_baseline_is_judged_over_rows_without_indels() -> None:
    """And so are the scores once more, to stand beside it."""
    generator = np.random.default_rng(0)
    variants = [Variant(((i % 9, i % 7),)) for i in range(30)] + [Variant(indel=Indel(3, 4, ()))] * 10
    baseline = composition_scores(variants, TARGET, np.log(SWISS_PROT))
    scores, measured = generator.normal(size=(2, 40))
    assay = replace(assay_of(*variants), measured=measured, fit=(measured > 0).astype(float))
    found = beside_composition(assay, scores, baseline, "nature")
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
    only = beside_composition(assay_of(variants[-1]), scores[-1:], baseline[-1:], "nature")
    assert "says nothing of insertions and deletions" in composition_line(only)


def test_the_frequencies_are_those_of_the_training_proteins_where_they_are_found(
    trained_run: Path, store: SequenceStore
) -> None:
    trained = load_trained(str(trained_run), device="cpu", precision="fp32")
    found = background(trained)
    tokens = np.concatenate([store[row] for row in store.split("train")])
    counts = np.bincount(tokens, minlength=30)[:N_STATES] + 1
    np.testing.assert_allclose(np.exp(found.logs), counts / counts.sum())
    assert (found.name, found.told) == (f"training split of {store.fingerprint}", f"the training split of {store.path}")
    other = background(replace(trained, saved=replace(trained.saved, data_fingerprint="0" * 32)))
    np.testing.assert_allclose(np.exp(other.logs), SWISS_PROT / SWISS_PROT.sum())
    assert other.told == "UniProtKB/Swiss-Prot, as the training set was not found"


# the command

FOLDER = ("assay=dms", "reference=reference.csv", "output=out", "draws=4")


@pytest.fixture(scope="session")
def short_run(store: SequenceStore, python: Command, made_once: MadeOnce) -> Path:
    """A run of 4 steps on 200 residues of each protein at most."""

    def fill(folder: Path) -> None:
        options = [*TINY, f"data.path={store.path}", "run.name=v", "trainer.max_steps=4"]
        trained = python("-m", "protlig_dd.training", *options, cwd=folder)
        assert trained.returncode == 0, trained.stderr

    return made_once("short", fill) / "runs/v"


@pytest.fixture
def target(store: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bundled protein of more than 200 residues. Assays of it lie in this test's folder, which is where it runs.

    A is of substitutions, B of a deletion and two insertions.
    """
    row = next(row for row in range(len(store)) if 210 < store.lengths[row] < 260)
    protein = ProteinTokenizer().decode(store[row])
    monkeypatch.chdir(tmp_path)
    Path("wt.fasta").write_text(f">wt\n{protein}\n")
    Path("dms").mkdir()
    places = [i for i, letter in enumerate(protein) if letter in AMINO_ACIDS][::5]
    mutants = [f"{protein[i]}{i + 1}{'K' if protein[i] == 'W' else 'W'}" for i in places]
    lines = [f"{mutant},{i % 7},{i % 2},note\n" for i, mutant in enumerate(mutants)]
    Path("dms/A.csv").write_text("mutant,DMS_score,DMS_score_bin,more\n" + "".join(lines))
    Path("dms/B.csv").write_text(f"mutated_sequence,DMS_score\n{protein[1:]},1\nM{protein},2\n{protein}W,0\n")
    head = "DMS_id,target_seq,UniProt_ID,coarse_selection_type\n"
    Path("reference.csv").write_text(f"{head}A,{protein},P1,Activity\nB,{protein},P1,Stability\n")
    return protein


@pytest.fixture
def run(short_run: Path, target: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Score with these options, in this process; what is printed."""
    Path("runs").symlink_to(short_run.parent)

    def run(*overrides: str) -> str:
        score(composed("from=runs/v", "tokens_per_pack=700", *overrides, name="variants"))
        return capsys.readouterr().out

    return run


def log_ratios(mutants: list[str], store: SequenceStore) -> list[float]:
    """Of single substitutions: log f(mutant) - log f(wild type) in the training split, with a pseudo-count."""
    counts = dict(zip(AMINO_ACIDS, (store.token_counts[0] + 1).tolist(), strict=False))
    return [math.log(counts[mutant[-1]]) - math.log(counts[mutant[0]]) for mutant in mutants]


@pytest.mark.slow
def test_a_scan_has_every_substitution_and_a_heat_map(
    run: Callable[..., str], target: str, store: SequenceStore
) -> None:
    printed = run("target=wt.fasta", "output=scan.csv")
    assert "strategy=masked_marginals (the graph is absorbing)" in printed
    rows = list(csv.DictReader(Path("scan.csv").read_text().splitlines()))
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
    own = {f"{letter}{i}{letter}": "0.000000" for i, letter in enumerate(target, start=1) if letter in AMINO_ACIDS}
    assert {mutant: score for mutant, score in table.items() if score} == scores | own

    lines = [f"{row['mutant']},{i}\n" for i, row in enumerate(rows[::97])]  # which are read as an assay's
    Path("some.csv").write_text("mutant,DMS_score\n" + "".join(lines))
    run("target=wt.fasta", "assay=some.csv", "output=again.csv")
    again = csv.DictReader(Path("again.csv").read_text().splitlines())
    assert [(row["mutant"], row["score"]) for row in again] == [(row["mutant"], row["score"]) for row in rows[::97]]
    with pytest.raises(ValueError, match=r"there is a column score already"):
        run("target=wt.fasta", "assay=scan.csv", "output=x.csv")


@pytest.mark.slow
def test_an_assay_keeps_its_columns_and_two_ranks_score_it_alike(
    run: Callable[..., str], short_run: Path, run_python: Command
) -> None:
    assay = ("assay=dms/A.csv", "target=wt.fasta", "strategy=bound", "draws=4")
    run(*assay, "output=one.csv")
    two = run_python(
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "-m",
        "protlig_dd.variants",
        f"from={short_run}",
        "tokens_per_pack=700",
        *assay,
        "output=two.csv",
    )
    assert two.returncode == 0, two.stderr
    assert Path("one.csv").read_text() == Path("two.csv").read_text()
    one = list(csv.DictReader(Path("one.csv").read_text().splitlines()))
    assert [",".join(list(row.values())[:4]) for row in one] == Path("dms/A.csv").read_text().splitlines()[1:]
    assert list(one[0])[4:] == ["score", "score_strategy", "score_se", "score_minus_composition"]
    scores = [float(row["score"]) for row in one]
    expected = spearmanr(scores, [int(row["DMS_score"]) for row in one])[0]
    assert json.loads(Path("one.json").read_text())["spearman"] == pytest.approx(expected)


@pytest.mark.slow
def test_a_folder_of_assays_is_scored_in_two_goes(run: Callable[..., str], store: SequenceStore) -> None:
    assert "B: 3 variants by strategy=bound (there are insertions or deletions)" in run(*FOLDER)
    total = json.loads(Path("out/summary.json").read_text())
    assert set(total["by_type"]) == {"Activity", "Stability"}
    lines = list(csv.DictReader(Path("out/summary.csv").read_text().splitlines()))
    for line in lines:  # each figure from the rows, and the averages from the assays'
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
        if line["DMS_id"] == "B":  # of insertions and deletions
            assert {row["score_minus_composition"] for row in rows} == {line["composition_spearman"]} == {""}
            continue
        baseline = log_ratios([row["mutant"] for row in rows], store)
        assert float(line["composition_spearman"]) == pytest.approx(spearmanr(baseline, measured).statistic)
        assert total["composition"]["spearman"] == pytest.approx(float(line["composition_spearman"]))
    for metric in ("spearman", "auc"):
        assert total[metric] == pytest.approx(sum(float(line[metric]) for line in lines) / 2)
    assert re.search(r"^A,P1,Activity,masked_marginals,", Path("out/summary.csv").read_text(), re.MULTILINE)
    Path("out/B.csv").rename("B.csv")  # as if it had been stopped before
    kept = Path("out/A.csv").stat().st_mtime_ns
    assert "1 of 2 are there already" in run(*FOLDER)
    assert json.loads(Path("out/summary.json").read_text()) == total
    assert Path("out/A.csv").stat().st_mtime_ns == kept
    assert Path("out/B.csv").read_text() == Path("B.csv").read_text()
    entry = json.loads(Path("out/A.json").read_text())
    assert entry["frequencies"] == total["frequencies"] == f"training split of {store.fingerprint}"
    assert entry["checkpoint"] == "runs/v/checkpoints/step_00000004"
    assert entry["weights_sha256"] == sha256(Path(entry["checkpoint"]) / "ema.safetensors")


@pytest.mark.slow
def test_each_variant_is_scored_by_its_own_strategy(run: Callable[..., str], target: str) -> None:
    """And figures that mix two are given for each as well."""
    sites = [i for i, letter in enumerate(target) if letter in AMINO_ACIDS][:24]
    sequences = [target[:i] + ("K" if target[i] == "W" else "W") + target[i + 1 :] for i in sites[:12]]
    sequences += [target[:i] + target[i + 1 :] for i in sites[::2]]
    rows = [f"{sequence},{i * 7 % 5}\n" for i, sequence in enumerate(sequences)]
    Path("both.csv").write_text("mutated_sequence,DMS_score\n" + "".join(rows))
    out = run("assay=both.csv", "target=wt.fasta", "output=both_scored.csv", "draws=4")
    assert (
        "24 variants, 12 by strategy=masked_marginals (substitutions), 12 by strategy=bound (insertions and dele" in out
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
    assert f"alone: spearman {alone['spearman']:.4f}" in out
    assert alone["by_strategy"] == {}


@pytest.mark.slow
def test_files_of_others_stay_as_they_are(run: Callable[..., str], target: str) -> None:
    run(*FOLDER)
    entry = json.loads(Path("out/A.json").read_text())

    def is_refused(path: str, content: str, message: str) -> None:
        """With this file in the output, which stays as it is."""
        Path(path).parent.mkdir(exist_ok=True)
        earlier = Path(path).read_text() if Path(path).exists() else None
        Path(path).write_text(content)
        with pytest.raises(ValueError, match=message):
            run(*FOLDER[:2], f"output={Path(path).parent}", "draws=4")
        assert Path(path).read_text() == content
        assert earlier or [each.name for each in Path(path).parent.iterdir()] == [Path(path).name]
        Path(path).write_text(earlier) if earlier else Path(path).unlink()

    is_refused("mine/B.csv", "x", "mine/B.csv exists already")
    is_refused("mine/A_heatmap.csv", "x", "mine/A_heatmap.csv exists already")
    is_refused("mine/summary.csv", "x", "mine/summary.csv exists already")
    is_refused("mine/summary.json", "{}", "mine/summary.json is not what this verb writes")
    is_refused("mine/A.json", "[1]", "mine/A.json is not what this verb writes")
    is_refused("mine/A.json", "{", "mine/A.json is not what this verb writes")
    is_refused("out/A.json", json.dumps(entry | {"weights_sha256": "0"}), "A.json was made with weights_sha256=0, not")
    is_refused("out/A.json", json.dumps(entry | {"assay_sha256": "0"}), "A.json was made with assay_sha256=0, not")
    is_refused("out/A.json", json.dumps(entry | {"target": "M"}), f"A.json was made with target=M, not {target}")
    with pytest.raises(ValueError, match=r"summary\.json was made with seed=0, not 1"):
        run(*FOLDER, "seed=1")


@pytest.mark.slow
def test_what_cannot_be_scored_is_refused(
    run: Callable[..., str], run_python: Command, short_run: Path, tmp_path: Path
) -> None:
    Path("scored.csv").write_text("mutant,score\nM1A,0\n")
    for message, overrides in (
        ("output=dms is the folder of assays", ["assay=dms/", "reference=reference.csv", "output=dms"]),
        ("output=x.json: give a name that ends in .csv", ["target=wt.fasta", "output=x.json"]),
        ("scored.csv exists already", ["target=wt.fasta", "output=scored.csv"]),
        ("assay=dms is a folder: give reference=", ["assay=dms", "output=x"]),
        ("with reference=, give a folder of CSV files", ["reference=reference.csv", "output=x"]),
        ("the targets of a folder's assays are in reference=", [*FOLDER, "target=wt.fasta"]),
        ("target is required", ["output=x.csv"]),
        ("draws must be an even number of at least 4, got 5", ["target=wt.fasta", "output=x.csv", "draws=5"]),
        ("strategy=ratio: .* can do masked_marginals", ["target=wt.fasta", "output=x.csv", "strategy=ratio"]),
    ):
        with pytest.raises(ValueError, match=message):
            run(*overrides)
    wrong = run_python("-m", "protlig_dd.variants", f"from={short_run}", "target=no.fasta", "output=x.csv")
    assert_one_line_error(wrong, "target=no.fasta: no such file")
    assert not list(tmp_path.glob("x*"))
    assert not (tmp_path / "out").exists()
