"""`python -m protlig_dd.infill`: free and fixed positions, contigs, the ranking of designs, files and errors."""

import csv
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from protlig_dd.batch import PackedBatch
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.data.store import SequenceStore
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.uniform import Uniform
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.samples.redesigns import Redesign, free_draws, free_nll
from protlig_dd.inference import generate
from protlig_dd.inference.layouts import (
    MAX_DESIGNS,
    Design,
    Segment,
    build_template,
    draw_layout,
    draw_sizes,
    map_csv,
    mask_free_positions,
    read_records,
)
from protlig_dd.inference.model import TrainedModel, load_trained
from protlig_dd.inference.sharing import Work
from protlig_dd.infill import infill
from protlig_dd.sample import sample_proteins
from protlig_dd.tokenizer import BOS, EOS, MASK, ProteinTokenizer

from .conftest import Command, assert_one_line_error, composed, make_model
from .test_sample import assert_bounds_are_those_of_the_model

RECORD = FastaRecord("p", "", "ACDEFGHIKL", "in.fasta")
IDS = ProteinTokenizer().encode(RECORD.sequence)[1:-1]
BOTH = dict.fromkeys("AB", (RECORD, IDS))


def shown(ids: np.ndarray) -> str:
    return ProteinTokenizer().decode(ids)


def test_ranges_start_at_one_and_include_both_ends() -> None:
    assert shown(mask_free_positions(RECORD, IDS, fixed=None, free=["2-4", 10])) == "A___FGHIK_"
    assert shown(mask_free_positions(RECORD, IDS, fixed=["2-4", "10"], free=None)) == "_CDE_____L"
    assert shown(mask_free_positions(RECORD, IDS, fixed=None, free="3")) == "AC_EFGHIKL"
    partial = IDS.copy()
    partial[0] = MASK
    assert shown(mask_free_positions(RECORD, partial, fixed=None, free=["5-6"])) == "_CDE__HIKL"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"free": ["9-11"]}, "in.fasta: record p: free=9-11 ends at 11, but the sequence has 10 residues"),
        ({"free": ["0-3"]}, "free=0-3: give a number or a range"),
        ({"free": ["4-2"]}, "free=4-2: give a number or a range"),
        ({"fixed": ["x"]}, "fixed=x: give a number or a range"),
    ],
)
def test_the_error_for_a_wrong_range_names_the_range(options: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_free_positions(RECORD, IDS, **({"fixed": None, "free": None} | options))


def test_a_position_without_a_residue_cannot_be_fixed() -> None:
    partial = IDS.copy()
    partial[2] = MASK
    with pytest.raises(ValueError, match="position 3 is fixed, but the sequence has `_` there"):
        mask_free_positions(RECORD, partial, fixed=["1-3"], free=None)


def test_a_contig_places_motifs_between_new_residues() -> None:
    layout = draw_layout("2/A3-5/0-0/B9-10/1", None, np.random.default_rng(0))
    assert layout == [Segment(2), Segment(3, 3, "A"), Segment(2, 9, "B"), Segment(1)]
    design = build_template(BOTH, layout)
    assert shown(design) == "__DEFKL_"
    assert map_csv([Design("d", 0, layout, design, 0)]).splitlines()[1:] == [
        "d,1,2,true,,", "d,3,5,false,A,3", "d,6,7,false,B,9", "d,8,8,true,,",
    ]  # fmt: skip
    # A1-3 and B4-6 have consecutive residue numbers, but belong to two proteins
    adjacent = draw_layout("A1-3/B4-6/1", None, np.random.default_rng(0))
    assert map_csv([Design("d", 0, adjacent, build_template(BOTH, adjacent), 0)]).splitlines()[1:] == [
        "d,1,3,false,A,1", "d,4,6,false,B,4", "d,7,7,true,,",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="the contig has residues 9-12, but the sequence has 10"):
        build_template(BOTH, draw_layout("A9-12/3", None, np.random.default_rng(0)))


def test_a_contig_that_allows_new_residues_has_at_least_one() -> None:
    def layouts(contig: str, lengths: str | None = None, n: int = 200) -> Counter[str]:
        drawn = (draw_layout(contig, lengths, np.random.default_rng(i)) for i in range(n))
        return Counter(shown(build_template(BOTH, layout)) for layout in drawn)

    seen = layouts("0-2/A1-5/0-2", n=2000)
    assert set(seen) == {"_" * a + "ACDEF" + "_" * b for a in range(3) for b in range(3) if a + b}
    # chi-square statistic with 7 degrees of freedom
    assert sum((count - 250) ** 2 / 250 for count in seen.values()) < 26
    assert layouts("0-1") == {"_": 200}
    assert set(layouts("0-2/A1-5/0-2", "1-6")) == {"_ACDEF", "ACDEF_"}
    # a contig without new residues is allowed, because positions that are `_` in the input are free
    assert layouts("A1-5") == layouts("0-2/A1-5/0-2", "5") == {"ACDEF": 200}


def test_the_map_is_valid_csv_for_any_record_name() -> None:
    name = 'p,1"x'
    (row,) = csv.DictReader(map_csv([Design(name, 0, [Segment(10, 1)], IDS, 0)]).splitlines())
    assert row == {"design": name, "start": "1", "end": "10", "free": "false", "input": "", "input_start": "1"}


def test_the_map_separates_free_from_fixed_positions_of_a_protein() -> None:
    template = mask_free_positions(RECORD, IDS, fixed=None, free=["2-4", 10])
    assert map_csv([Design("d", 0, [Segment(10, 1)], template, 0)]).splitlines() == [
        "design,start,end,free,input,input_start", "d,1,1,false,,1", "d,2,4,true,,2", "d,5,9,false,,5",
        "d,10,10,true,,10",
    ]  # fmt: skip


@given(
    ranges=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=4),
    low=st.integers(0, 12),
    extra=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_segment_sizes_fit_their_ranges_and_the_total_length(
    ranges: list[tuple[int, int]], low: int, extra: int, seed: int
) -> None:
    bounds = [(first, first + more) for first, more in ranges]
    if sum(b for _, b in bounds) < low or sum(a for a, _ in bounds) > low + extra:
        return
    sizes = draw_sizes(bounds, low, low + extra, np.random.default_rng(seed))
    assert all(first <= size <= last for size, (first, last) in zip(sizes, bounds, strict=True))
    assert low <= sum(sizes) <= low + extra


def test_segment_sizes_are_uniform_over_all_fitting_combinations() -> None:
    bounds, low, high = [(0, 3), (5, 5), (1, 4)], 8, 9
    fitting = [c for c in itertools.product(*(range(a, b + 1) for a, b in bounds)) if low <= sum(c) <= high]
    generator = np.random.default_rng(0)
    counts = Counter(tuple(draw_sizes(bounds, low, high, generator)) for _ in range(7000))
    assert set(counts) == set(fitting)
    expected = 7000 / len(fitting)
    chi_square = sum((counts[sizes] - expected) ** 2 / expected for sizes in fitting)
    assert chi_square < 3 * len(fitting)


@pytest.mark.parametrize(
    ("contig", "lengths", "message"),
    [
        ("", None, "contig=: '': give a number or a range"),
        ("0-0/0-0", None, "contig=0-0/0-0 has no residue"),
        ("5/A", None, "contig=5/A: 'A': give a number or a range"),
        ("5/A0-3", None, "'A0-3': give a number or a range"),
        ("A1-3/0/B1-3", None, "contig=A1-3/0/B1-3: /0 is a break between two chains"),
        ("A1-3/5/0 B1-3", None, "/0 is a break between two chains"),
        ("5-2/A1-3", None, "'5-2': give a number"),
        ("5-10/A1-3", "20-30", "lengths=20-30, but contig=5-10/A1-3 gives 8 to 13 residues"),
        ("5-10/A1-3", "x", "lengths=x: give a number"),
    ],
)
def test_the_error_for_a_wrong_contig_names_the_contig(contig: str, lengths: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_layout(contig, lengths, np.random.default_rng(0))


def test_the_input_may_have_gaps_and_lower_case_but_no_repeated_id(tmp_path: Path) -> None:
    path = tmp_path / "in.fasta"
    path.write_text(">a\nac__D*\n>b\nXKL\n")
    assert [shown(ids) for _, ids in read_records(path)] == ["AC__D", "XKL"]
    path.write_text(">a\nAC\n>a\nAD\n")
    with pytest.raises(ValueError, match="in.fasta: record a appears twice"):
        read_records(path)
    path.write_text(">a\nA?C\n")
    with pytest.raises(ValueError, match="record a: illegal character '\\?' at position 2 of 3"):
        read_records(path)


@pytest.mark.slow
def test_fixed_residues_are_kept_and_free_positions_are_filled(
    trained_run: Path, tmp_path: Path, run_python: Command
) -> None:
    (tmp_path / "in.fasta").write_text(f">wt a protein\n{RECORD.sequence * 4}\n>holes\nAC__DX__\n")
    command = [
        "-m",
        "protlig_dd.infill",
        f"from={trained_run}",
        "input=in.fasta",
        "steps=8",
        "n=3",
        "device=cpu",
        "precision=fp32",
        "nll_draws=8",
        "free_draws=2",
    ]
    done = run_python(*command, "output=out.fasta", "free=[2-4]", "seed=5")
    assert done.returncode == 0, done.stderr
    records = list(read_fasta(tmp_path / "out.fasta"))
    assert [record.id for record in records] == ["wt_1", "wt_2", "wt_3", "holes_1", "holes_2", "holes_3"]
    for record in records[:3]:
        assert record.sequence[0] == "A"
        assert record.sequence[4:] == (RECORD.sequence * 4)[4:]
        assert " nll=" in record.description
        assert " nll_free=" in record.description
        assert "seed=5" in record.description
    for record in records[3:]:
        assert (record.sequence[0], record.sequence[4:6], len(record.sequence)) == ("A", "DX", 8)
        assert "_" not in record.sequence
    assert len({record.sequence for record in records[:3]}) > 1
    numbers = [k * MAX_DESIGNS + i for k in range(2) for i in range(3)]
    assert_bounds_are_those_of_the_model(records, trained_run, numbers=numbers, seed=5, draws=8)
    rows = list(csv.DictReader((tmp_path / "out.map.csv").read_text().splitlines()))
    assert [row["start"] + "-" + row["end"] for row in rows if row["design"] == "wt_2" and row["free"] == "true"] == [
        "2-4"
    ]
    alone = run_python(*command, "output=one.fasta", "free=[2-4]", "seed=5", "n=1")
    assert alone.returncode == 0, alone.stderr
    few = {record.id: record for record in read_fasta(tmp_path / "one.fasta")}
    assert set(few) == {"wt_1", "holes_1"}
    for record in records:  # the header contains the bound, so the bound is compared too
        if record.id in few:
            assert (record.sequence, record.description) == (few[record.id].sequence, few[record.id].description)

    scaffold = ["contig=3-9/A5-8/2/A12-14/0-9", "lengths=16-18", "input=wt.fasta", "output=scaffold.fasta"]
    (tmp_path / "wt.fasta").write_text(f">wt\n{RECORD.sequence * 4}\n")
    done = run_python(*command, *scaffold, "n=20", "nll_draws=0")
    assert done.returncode == 0, done.stderr
    lengths = set()
    for record in read_fasta(tmp_path / "scaffold.fasta"):
        motif_start = record.sequence.find("FGHI")
        assert 3 <= motif_start <= 9
        assert record.sequence[motif_start + 6 : motif_start + 9] == "CDE"
        assert " nll=" not in record.description
        lengths.add(len(record.sequence))
    assert lengths == {16, 17, 18}
    designs = {record.id: record.sequence for record in read_fasta(tmp_path / "scaffold.fasta")}
    rows = list(csv.DictReader((tmp_path / "scaffold.map.csv").read_text().splitlines()))
    for name, design in designs.items():
        segments = [row for row in rows if row["design"] == name]
        ends = [(int(row["start"]), int(row["end"])) for row in segments]
        assert [first for first, _ in ends] == [1, *(last + 1 for _, last in ends[:-1])]
        assert ends[-1][1] == len(design)
        for row, (first, last) in zip(segments, ends, strict=True):
            assert (row["input_start"] == "") is (row["free"] == "true")
            if row["input_start"]:
                begin = int(row["input_start"]) - 1
                assert design[first - 1 : last] == (RECORD.sequence * 4)[begin : begin + last - first + 1]


def run_in_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run: Path, records: dict[str, str], *options: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "in.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records.items()))
    more = [f"from={run}", "input=in.fasta", "output=out.fasta", "steps=4", "device=cpu", "precision=fp32"]
    infill(composed(*more, *options, name="infill"))


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_two_letters_in_a_contig_are_two_records(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A contig with only one letter is applied to each record."""
    records = {"a": RECORD.sequence, "b": RECORD.sequence[::-1]}
    for contig, expected in (
        ("A1-4/2/B5-9", {"a+b_1": ("ACDE", "GFEDC"), "a+b_2": ("ACDE", "GFEDC")}),
        ("B1-4/2/B5-9", {"a_1": ("ACDE", "FGHIK"), "a_2": ("ACDE", "FGHIK"),
                         "b_1": ("LKIH", "GFEDC"), "b_2": ("LKIH", "GFEDC")}),
    ):  # fmt: skip
        run_in_process(tmp_path, monkeypatch, trained_run, records, f"contig={contig}", "n=2", "free_draws=1")
        found = {record.id: (record.sequence[:4], record.sequence[6:]) for record in read_fasta(Path("out.fasta"))}
        assert found == expected
        # with contig= the table has no row for the input
        assert [row["name"] for row in read_csv(Path("out.csv"))] == list(expected)
        for path in ("out.fasta", "out.csv", "out.map.csv"):
            Path(path).unlink()
    capsys.readouterr()
    with pytest.raises(ValueError, match="contig=A1-2/2/C1-2: C is record 3 of in.fasta, which has 2"):
        run_in_process(tmp_path, monkeypatch, trained_run, records, "contig=A1-2/2/C1-2")
    run_in_process(tmp_path, monkeypatch, trained_run, records, "contig=A5-8/2/A1-6/B1-2", "n=1", "free_draws=0")
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: the contig puts A1-6 after A5-8" in printed
    assert "warning: the contig has A5-6 twice, in A1-6 and A5-8" in printed
    assert "nll_free" not in Path("out.fasta").read_text()
    assert {row["nll_free"] for row in read_csv(Path("out.csv"))} == {""}


def test_the_table_gives_the_mutations_and_scores_of_each_design(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row is the input, unless it contains `_`. A position that is `_` in the input is not a mutation."""
    wild = RECORD.sequence * 3
    records = {"wt": wild, "holes": f"AC__D{RECORD.sequence}"}
    run_in_process(tmp_path, monkeypatch, trained_run, records, "free=[3-9]", "n=6", "best=4", "free_draws=6")
    rows = read_csv(Path("out.csv"))
    assert rows[0]["name"] == "wt"
    assert len(rows) == 1 + 4 + 4
    designs = {record.id: record for record in read_fasta(Path("out.fasta"))}
    assert list(designs) == [row["name"] for row in rows[1:]]
    assert {row["design"] for row in read_csv(Path("out.map.csv"))} == set(designs)
    assert (rows[0]["sequence"], rows[0]["mutations"]) == (wild, "")
    assert float(rows[0]["score"]) == float(rows[0]["score_se"]) == 0
    for row in rows[1:]:
        parent = wild if row["name"].startswith("wt") else records["holes"]
        assert row["sequence"] == designs[row["name"]].sequence
        changed = {
            (old, position, new)
            for position, (old, new) in enumerate(zip(parent, row["sequence"], strict=True), 1)
            if old not in ("_", new)
        }
        assert row["mutations"] == ":".join(
            f"{old}{position}{new}" for old, position, new in sorted(changed, key=lambda c: c[1])
        )
        header = dict(part.split("=") for part in designs[row["name"]].description.split() if "=" in part)
        assert float(header["nll_free"]) == pytest.approx(float(row["nll_free"]), abs=6e-5)
        assert float(header["nll_free_se"]) == pytest.approx(float(row["nll_free_se"]), abs=6e-5)
        assert (row["score"] == "") is row["name"].startswith("holes")
        if row["score"]:
            by_residue = 7 * (float(rows[0]["nll_free"]) - float(row["nll_free"]))
            assert float(row["score"]) == pytest.approx(by_residue, abs=2e-5)
    for group in (rows[1:5], rows[5:]):  # each group is sorted, the best design first
        values = [float(row["nll_free"]) for row in group]
        assert values == sorted(values)


@pytest.mark.parametrize("conditioned", [False, True])
def test_the_nll_of_free_residues_is_the_average_over_their_masks(conditioned: bool) -> None:
    """Compare with an exact average over all masks.

    The number k of masked residues is uniform on 1..m, where m is the number of free residues. All masks of k residues
    are equally likely.
    """
    model = make_model(time_conditioning=conditioned).eval()
    score_fn = ScoreFn(model, Absorbing(), LogLinearNoise(), "x0", time_conditioning=conditioned)
    free = np.zeros(10, bool)
    free[[2, 3, 7, 8]] = True
    designs = [
        Redesign(str(i), np.where(free, np.random.default_rng(i).integers(0, 20, 10), IDS), free, i % 2)
        for i in range(4)
    ]
    drawn = free_draws(score_fn, designs, Work(100), draws=100, seed=0)
    found = free_nll(drawn, designs, [0, None, 0, None])
    exact = []
    for design in designs:
        batch, total = PackedBatch.pack([torch.tensor([BOS, *design.ids.tolist(), EOS])]), 0.0
        for k in range(1, 5):
            masks = list(itertools.combinations(np.flatnonzero(free) + 1, k))
            for mask in masks:
                masked = torch.zeros(12, dtype=torch.bool)
                masked[list(mask)] = True
                masked_batch = batch.with_tokens(torch.where(masked, 20, batch.tokens))
                sigma = torch.tensor([-math.log1p(-k / 10)])
                with torch.no_grad():
                    log_p = model(masked_batch, sigma).double().log_softmax(-1)
                total -= float(log_p[masked, batch.tokens[masked]].sum()) / k / len(masks)
        exact.append(total)
    for estimate, nats in zip(found, exact, strict=True):
        assert estimate.nll == pytest.approx(nats / 4, abs=4 * estimate.nll_error)
        assert estimate.nll_error < 0.2
    assert found[2].score == pytest.approx(exact[0] - exact[2], abs=4 * found[2].score_error)
    assert math.isnan(found[1].score)
    alone = free_draws(score_fn, designs[2:3], Work(30), draws=8, seed=0)
    packed = free_draws(score_fn, designs, Work(30), draws=8, seed=0)
    assert alone[:, 0] == pytest.approx(packed[:, 2], rel=1e-5)


@pytest.mark.slow
def test_two_seeds_rank_the_redesigns_of_a_loop_similarly(trained_run: Path, store: SequenceStore) -> None:
    """The scores use the default number of random masks, `free_draws`."""
    trained = load_trained(str(trained_run), device="cpu", precision="fp32")
    protein = next(store[row][1:-1] for row in store.split("test") if 60 < len(store[row]) < 130)
    template = protein.copy()
    template[20:32] = MASK
    samples, _ = generate.generate(
        trained.score_fn, [len(template)] * 50, SamplerOptions(8), Work(8000), seed=1, templates=[template] * 50
    )
    designs = [Redesign(str(i), ids, template == MASK, 0) for i, ids in enumerate(samples)]
    draws = composed("from=x", "input=y", name="infill")["free_draws"]
    first, second = (
        free_draws(trained.score_fn, designs, Work(8000), draws=draws, seed=seed).sum(0) for seed in (1, 2)
    )
    assert spearmanr(first, second).statistic > 0.9


def test_designs_are_ranked_only_with_an_absorbing_graph(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def uniform(*args: Any, **options: Any) -> TrainedModel:
        trained = load_trained(*args, **options)
        score_fn = ScoreFn(trained.network, Uniform(), LogLinearNoise(), "log_score")
        return replace(trained, score_fn=score_fn)

    monkeypatch.setattr("protlig_dd.infill.load_trained", uniform)
    records = {"wt": RECORD.sequence}
    with pytest.raises(ValueError, match="best=1 ranks by nll_free, which needs a model with the absorbing graph"):
        run_in_process(tmp_path, monkeypatch, trained_run, records, "free=[2-4]", "n=2", "best=1")
    run_in_process(tmp_path, monkeypatch, trained_run, records, "free=[2-4]", "n=2")
    assert "infilling is an approximation with this model's graph" in " ".join(capsys.readouterr().out.split())
    assert "nll_free" not in Path("out.fasta").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["input=whole.fasta", "free=1", "best=3", "n=2"], "best=3 must be at most n=2"),
        (["input=whole.fasta", "free=1", "best=1", "free_draws=0"], "best=1 ranks by nll_free, which needs free_draws"),
        (["input=whole.fasta", "free=1", "output=out.csv"], "out.csv would be written twice"),
        (["input=whole.fasta", "free=[]"], "record wt has no free position"),
        (["input=whole.fasta"], "record wt has no free position"),
        (
            ["input=lower.fasta", "context=lower"],
            "record low has no free position: all its letters are lower-case, and",
        ),
        (["input=whole.fasta", "free=1", "fixed=2"], "give only one of fixed=, free=, context= and contig="),
        (["input=whole.fasta", "free=1", "lengths=9"], "lengths=9 needs contig="),
        (["input=whole.fasta", "contig=999/A1-2"], "the design has 1001 residues; this model was trained on 1 to"),
        (
            ["input=whole.fasta", "free=1", "map=./out.fasta"],
            "map=./out.fasta, output=out.fasta: out.fasta would be written twice",
        ),
        (["input=whole.fasta", "free=1", "map=whole.fasta/x.csv"], "whole.fasta is not a writable folder"),
        (["input=whole.fasta", "free=1", "output=whole.fasta/new/x.fasta"], "is not a writable folder"),
        (["input=whole.fasta", "free=1", "n=0"], "n must be at least 1, got 0"),
        (["input=none.fasta"], "none.fasta: no such file"),
        (["input=whole.fasta", "free=1", "from=nothing"], "nothing does not exist"),
        (["input=whole.fasta", "free=1", "output=whole.fasta"], "whole.fasta exists already"),
    ],
)
def test_wrong_options_are_one_line_errors_and_leave_no_file(
    trained_run: Path, tmp_path: Path, run_python: Command, options: list[str], message: str
) -> None:
    (tmp_path / "whole.fasta").write_text(f">wt\n{RECORD.sequence}\n")
    (tmp_path / "lower.fasta").write_text(f">low\n{RECORD.sequence.lower()}\n")
    keys = {option.partition("=")[0] for option in options}
    more = [option for option in (f"from={trained_run}", "output=out.fasta") if option.partition("=")[0] not in keys]
    assert_one_line_error(run_python("-m", "protlig_dd.infill", *more, *options), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lower.fasta", "whole.fasta"]


Sampled = tuple[list[np.ndarray], Counter[str]]


def run_verb(
    trained_run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str, after: Callable[[Sampled], Sampled]
) -> None:
    """Run `sample` or `infill` in a folder, with `after` applied to the result of the sampler."""
    monkeypatch.chdir(folder)
    (folder / "in.fasta").write_text(f">wt\n{RECORD.sequence}\n")
    sampler = generate.generate
    monkeypatch.setattr(generate, "generate", lambda *args, **options: after(sampler(*args, **options)))
    common = [f"from={trained_run}", "output=out.fasta", "steps=2", "n=2", "nll_draws=1", "device=cpu"]
    if verb == "sample":
        sample_proteins(composed(*common, "lengths=9", name="sample"))
    else:
        infill(composed(*common, "input=in.fasta", "free=[2-4]", name="infill"))


def test_a_changed_fixed_residue_is_an_error_and_leaves_no_file(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(found: Sampled) -> Sampled:
        found[0][1][6] = (found[0][1][6] + 1) % 20
        return found

    with pytest.raises(AssertionError, match="wt_2: fixed residue 7 was changed"):
        run_verb(trained_run, tmp_path, monkeypatch, "infill", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


@pytest.mark.parametrize(
    ("verb", "name"), [("sample", "out.fasta"), ("infill", "out.fasta"), ("infill", "out.map.csv")]
)
def test_a_file_that_appears_while_sampling_is_kept(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, name: str
) -> None:
    def meanwhile(found: Sampled) -> Sampled:
        Path(name).write_text("somebody else's")
        return found

    with pytest.raises(ValueError, match=f"{name} exists already"):
        run_verb(trained_run, tmp_path, monkeypatch, verb, meanwhile)
    assert (tmp_path / name).read_text() == "somebody else's"


def test_a_run_name_with_spaces_gives_ids_without_spaces(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions accepted run names with spaces."""

    def load_spaced(*args: Any, **options: Any) -> TrainedModel:
        trained = load_trained(*args, **options)
        saved = trained.saved
        config = replace(saved.config, run=replace(saved.config.run, name="my\t old run"))
        return replace(trained, saved=replace(saved, config=config))

    monkeypatch.setattr("protlig_dd.sample.load_trained", load_spaced)
    run_verb(trained_run, tmp_path, monkeypatch, "sample", lambda found: found)
    records = list(read_fasta(tmp_path / "out.fasta"))
    assert [record.id for record in records] == ["my_old_run_1", "my_old_run_2"]
    assert all(record.description.startswith("run=my_old_run step=40 ") for record in records)
