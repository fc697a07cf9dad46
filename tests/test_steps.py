"""Sampling step by step: bit-identical to sampling in one call, and edits between the steps."""

import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from protlig_dd.batch import PackedBatch
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.diffusion.graphs.substitution import make_substitution_graph
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.samplers.registry import SAMPLERS
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.generate import generate
from protlig_dd.inference.sequences import encode_with_free
from protlig_dd.inference.sharing import Work
from protlig_dd.inference.steps import SamplingSteps
from protlig_dd.tokenizer import AMINO_ACIDS, LETTERS, ProteinTokenizer

from . import brute_force
from .conftest import exact_score_fn, graph_of, make_model, raises_value_error

PAIRS = [
    (graph, predictor)
    for graph in ("absorbing", "uniform", "substitution")
    for predictor, sampler in SAMPLERS.items()
    if graph == "absorbing" or not sampler.needs_masks
]
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "steered": {"temperature": 0.7, "top_p": 0.9}}


def score_fn_of(graph: str, parametrisation: str = "x0", *, timed: bool = True) -> ScoreFn:
    model = make_model(time_conditioning=timed).eval()
    return ScoreFn(model, graph_of(graph, 20), LogLinearNoise(), parametrisation, timed)


sampling_steps = partial(SamplingSteps, max_len=200)


def templates_of(proteins: list[FastaRecord]) -> list[str]:
    """Return two real proteins in which a stretch, the ends and a context letter are fixed."""
    return [
        f"{protein.sequence[:4]}{'_' * 9}{protein.sequence[13:20]}X{'_' * 5}{protein.sequence[26:30]}"
        for protein in proteins[:2]
    ]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("graph", "predictor"), PAIRS)
def test_the_last_step_has_the_sequences_of_sampling_in_one_call(
    graph: str, predictor: str, options: str, proteins: list[FastaRecord]
) -> None:
    bias = {"plain": None, "steered": torch.arange(20) / 10}[options]
    chosen = SamplerOptions(6, predictor, **OPTIONS[options])
    cases = [("x0", True), ("log_score", True)] + ([("x0", False)] if graph == "absorbing" else [])
    for parametrisation, timed in cases:
        score_fn = score_fn_of(graph, parametrisation, timed=timed)
        for designs in ([7, 40, 19], templates_of(proteins)):
            ids = [encode_with_free(design, "x")[1:-1] if isinstance(design, str) else None for design in designs]
            lengths = [design if isinstance(design, int) else len(design) for design in designs]
            templates = None if ids[0] is None else ids
            at_once, _ = generate(score_fn, lengths, chosen, Work(1000), seed=5, log_bias=bias, templates=templates)
            steps = sampling_steps(score_fn, designs, chosen, seed=5, log_bias=bias)
            assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6, 7]
            assert steps.sequences == [ProteinTokenizer().decode(sampled) for sampled in at_once]


@pytest.mark.parametrize(("graph", "predictor"), PAIRS)
def test_sampling_in_several_packs_gives_the_sequences_of_the_steps(graph: str, predictor: str) -> None:
    """The outputs of the network may differ by rounding between packs, so with other seeds a residue could differ."""
    score_fn, lengths, options = score_fn_of(graph), [12, 30, 7, 19], SamplerOptions(4, predictor)
    in_packs, _ = generate(score_fn, lengths, options, Work(32), seed=3)
    steps = sampling_steps(score_fn, lengths, options, seed=3)
    assert steps.finish() == [ProteinTokenizer().decode(sampled) for sampled in in_packs]


@pytest.mark.parametrize(("graph", "predictor"), PAIRS)
def test_sampling_can_be_stopped_and_continued(graph: str, predictor: str) -> None:
    whole = sampling_steps(score_fn_of(graph), [30, 12], SamplerOptions(9, predictor), seed=1).finish()
    steps = sampling_steps(score_fn_of(graph), [30, 12], SamplerOptions(9, predictor), seed=1)
    assert len(steps) == 10
    for step in steps:
        if step.number == 3:
            break
    assert (steps.done, next(steps).number) == (3, 4)
    assert [step.number for step in steps] == [5, 6, 7, 8, 9, 10]
    assert steps.sequences == whole == steps.finish()
    with pytest.raises(StopIteration):
        next(steps)


@pytest.mark.parametrize(("graph", "predictor"), PAIRS)
def test_a_step_lists_the_positions_that_it_changed(graph: str, predictor: str, proteins: list[FastaRecord]) -> None:
    designs = [*templates_of(proteins), 12]
    steps = sampling_steps(score_fn_of(graph), designs, SamplerOptions(8, predictor), seed=2)
    before, sigmas = steps.sequences, []
    for step in steps:
        for old, new, changed in zip(before, step.sequences, step.changed, strict=True):
            assert changed == [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        before = step.sequences
        sigmas.append((step.sigma, step.sigma_next))
    assert [a for a, _ in sigmas[1:]] == [b for _, b in sigmas[:-1]]
    assert sigmas[-1][1] == 0
    assert before == steps.sequences
    for design, sequence in zip(designs[:2], before, strict=False):
        assert isinstance(design, str)
        assert all(a in ("_", b) for a, b in zip(design, sequence, strict=True))


@pytest.mark.parametrize("parametrisation", ["x0", "log_score"])
@pytest.mark.parametrize("name", ["absorbing", "uniform", "substitution"])
def test_log_probs_are_the_exact_posterior_of_the_final_residues(name: str, parametrisation: str) -> None:
    toy = brute_force.random_toy(name, n=20, sites=2, seed=4)
    states = "_" if name == "absorbing" else ""
    steps = sampling_steps(exact_score_fn(toy, parametrisation), [2] * 6, SamplerOptions(5), seed=0)
    before = steps.sequences
    for step in steps:
        if step.sigma < 3:  # at more noise the implied posterior amplifies rounding errors
            p = brute_force.transition(name, 20, step.sigma)
            for sequence, log_probs in zip(before, step.log_probs, strict=True):
                xt = [(AMINO_ACIDS + states).index(letter) for letter in sequence]
                joint = toy.p0 * p[:20, xt[0]][:, None] * p[:20, xt[1]]
                joint = joint / joint.sum()
                assert log_probs.shape == (2, 20)
                for site in range(2):
                    assert (log_probs[site].exp() - joint.sum(1 - site)).abs().max() < 1e-5
        before = step.sequences


def test_log_probs_exist_for_context_letters_and_under_steering() -> None:
    for graph, predictor in PAIRS:
        steps = sampling_steps(score_fn_of(graph), ["MX__V", 3], SamplerOptions(2, predictor, top_p=0.5), seed=0)
        for step in steps:
            assert [tuple(log_probs.shape) for log_probs in step.log_probs] == [(5, 20), (3, 20)]
            assert (step.log_probs[0][1] == -torch.inf).all()
            for row in (*step.log_probs[0][[0, 2, 3, 4]], *step.log_probs[1]):
                assert float(row.exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize("predictor", SAMPLERS)
def test_edits_stay_and_masked_residues_are_sampled_again(predictor: str) -> None:
    """The logits do not depend on the tokens, so with most samplers an edit changes no other residue."""
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    score_fn = ScoreFn(
        lambda batch, sigma: logits.repeat(len(batch.tokens), 1), graph_of("absorbing", 20), LogLinearNoise(), "x0"
    )
    unedited = sampling_steps(score_fn, [40, 9], SamplerOptions(12, predictor), seed=3).finish()
    steps = sampling_steps(score_fn, [40, 9], SamplerOptions(12, predictor), seed=3)
    for step in steps:
        if step.number == 6:
            known = [i for i, letter in enumerate(step.sequences[0]) if letter != "_"]
            steps.edit(0, {known[0]: "W", known[1]: "_", known[2]: "X"})
            edited = steps.sequences
            assert [edited[0][i] for i in known[:3]] == ["W", "_", "X"]
            assert edited[1] == step.sequences[1]
        elif step.number > 6:
            assert (step.sequences[0][known[0]], step.sequences[0][known[2]]) == ("W", "X")
    final = steps.sequences
    assert "_" not in final[0] + final[1]
    assert final[1] == unedited[1]
    if predictor != "ancestral":  # a fixed number of masks per step couples the positions of a protein
        others = [i for i in range(40) if i not in known[:3]]
        assert [final[0][i] for i in others] == [unedited[0][i] for i in others]


@pytest.mark.parametrize("graph", ["uniform", "substitution"])
def test_on_graphs_without_a_mask_the_next_step_starts_from_the_edited_sequence(graph: str) -> None:
    seen: list[list[int]] = []
    model = make_model().eval()

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(batch.tokens.tolist())
        return model(batch, sigma)

    score_fn = ScoreFn(network, graph_of(graph, 20), LogLinearNoise(), "x0")
    steps = sampling_steps(score_fn, [30], SamplerOptions(5), seed=3)
    steps.edit(0, {0: "C"})  # before the first step
    next(steps)
    before = steps.sequences[0]
    steps.edit(0, {4: "W", 29: "X"})
    final = steps.finish()
    assert seen[0][1] == LETTERS.index("C")
    assert seen[1][1:-1] == [LETTERS.index(letter) for letter in before[:4] + "W" + before[5:29] + "X"]
    assert final[0][29] == "X"
    assert set(final[0][:29]) <= set(AMINO_ACIDS)


@pytest.mark.parametrize("timed", [False, True])
def test_residues_that_the_caller_sets_condition_the_others_exactly(timed: bool) -> None:
    """The test sets the first of two sites of an exact model between the steps.

    The second site then follows the distribution p(second | first).
    """
    toy, chains = brute_force.random_toy("absorbing", n=20, sites=2, seed=2), 1200
    exact = exact_score_fn(toy, "x0")

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        return exact.model(batch, torch.ones_like(sigma))  # the posterior is the same at every sigma

    score_fn = ScoreFn(network, exact.graph, LogLinearNoise(1e-5, 1e-5), "x0", timed)
    steps = sampling_steps(score_fn, [2] * chains, SamplerOptions(12), seed=0)
    for _ in range(3):
        next(steps)
    undecided = [i for i, sequence in enumerate(steps.sequences) if sequence == "__"]
    assert len(undecided) > 600
    for i in undecided:
        steps.edit(i, {0: "C"})
    final = steps.finish()
    assert all(final[i][0] == "C" for i in undecided)
    counts = np.bincount([AMINO_ACIDS.index(final[i][1]) for i in undecided], minlength=20)
    expected = toy.p0[AMINO_ACIDS.index("C")]
    assert chisquare(counts, counts.sum() * (expected / expected.sum()).numpy()).pvalue > 1e-3


def test_after_an_edit_the_network_receives_the_sigma_that_matches_the_masks() -> None:
    calls: list[tuple[float, float]] = []

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        calls.append((float((batch.tokens == 20).sum()) / (len(batch.tokens) - 2), float(sigma)))
        return torch.zeros(len(batch.tokens), 20)

    steps = sampling_steps(ScoreFn(network, graph_of("absorbing", 20), LogLinearNoise(), "x0"), [50], SamplerOptions(4))
    first, second = next(steps), next(steps)
    steps.edit(0, dict.fromkeys(range(45), "A"))
    steps.finish()
    assert [sigma for _, sigma in calls[:2]] == pytest.approx([first.sigma, second.sigma])
    assert 0 < calls[2][0] <= 0.1
    assert calls[2][1] == pytest.approx(-np.log1p(-calls[2][0]), rel=1e-5)


@pytest.mark.parametrize(
    ("graph", "protein", "residues", "message"),
    [
        ("absorbing", 2, {0: "A"}, "protein 2 does not exist: 2 proteins are sampled, counted from 0"),
        ("absorbing", -1, {0: "A"}, "protein -1 does not exist: 2 proteins are sampled"),
        ("absorbing", 0, {0: "A", 9: "A"}, "position 9 of protein 0 does not exist: it has 9 residues, counted from 0"),
        ("absorbing", 0, {0: "A", 1: "a"}, "position 1 of protein 0: 'a' is not an allowed letter; choose from ACDEF"),
        ("absorbing", 0, {0: "AC"}, "'AC' is not an allowed letter"),
        ("absorbing", 1, {1: "A", 0: "A"}, "position 0 of protein 1 is fixed by its design, which has M there"),
        ("uniform", 0, {0: "_"}, "position 0 of protein 0: the graph uniform has no mask; give a letter"),
        ("absorbing", "0", {0: "A"}, "edit takes the number of a protein, got '0'"),
        ("absorbing", 0, "A", "edit takes a mapping of positions to letters, such as {10: 'W'}, got 'A'"),
        ("absorbing", 0, {"0": "A"}, "protein 0: a position is a whole number from 0, got '0'"),
    ],
)
def test_an_edit_that_is_not_possible_changes_nothing(graph: str, protein: Any, residues: Any, message: str) -> None:
    steps = sampling_steps(score_fn_of(graph), [9, "M__"], SamplerOptions(3), seed=0)
    before = steps.sequences
    with raises_value_error(message):
        steps.edit(protein, residues)
    assert steps.sequences == before
    unedited = sampling_steps(score_fn_of(graph), [9, "M__"], SamplerOptions(3), seed=0)
    assert steps.finish() == unedited.finish()


def test_an_edit_that_log_bias_forbids_is_an_error() -> None:
    """Otherwise the last step would replace the letter, after other residues were sampled given that letter."""
    bias = [torch.zeros(length, 20) for length in (5, 7)]
    bias[1][6, AMINO_ACIDS.index("W")] = -torch.inf
    for graph in ("absorbing", "uniform"):
        steps = sampling_steps(score_fn_of(graph), [5, 7], SamplerOptions(3), log_bias=bias)
        with pytest.raises(ValueError, match="position 6 of protein 1: log_bias forbids W there"):
            steps.edit(1, {0: "A", 6: "W"})
        steps.edit(1, {5: "W", 6: "V"})
        steps.edit(0, {4: "W"})
        if graph == "absorbing":
            final = steps.finish()
            assert (final[0][4], final[1][5:]) == ("W", "WV")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(3, 20), (5, 20)], "log_bias[0] has shape (3, 20), but designs[0] has 5 residues; give (5, 20)"),
        ([(5, 20), (4, 20)], "log_bias[1] has shape (4, 20), but designs[1] has 3 residues; give (3, 20)"),
        ([(5, 20), (3, 21)], "log_bias[1] has shape (3, 21), but designs[1] has 3 residues; give (3, 20)"),
        ([(5, 20), (20,)], "log_bias[1] has shape (20,), but designs[1] has 3 residues; give (3, 20)"),
        (
            [(8, 20)],
            "log_bias is a list of 1 tensors for 2 designs; give one tensor for each design, or a single tensor (20,)",
        ),
        ([(5, 20), (2, 20), (1, 20)], "log_bias is a list of 3 tensors for 2 designs; give one tensor for each design"),
        ([], "log_bias is a list of 0 tensors for 2 designs; give one tensor for each design"),
    ],
)
def test_a_bias_of_other_shapes_than_its_designs_is_an_error(shapes: list[tuple[int, ...]], message: str) -> None:
    """The shapes are an error even if the total number of rows equals the number of residues in the pack."""
    bias = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=re.escape(message)):
        sampling_steps(score_fn_of("absorbing"), ["M___V", 3], SamplerOptions(3), log_bias=bias)
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(score_fn_of("absorbing"), [5, 3], SamplerOptions(3), Work(1000), seed=0, log_bias=bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.5}, "steps is a whole number, got 2.5"),
        ({"steps": True}, "steps is a whole number, got True"),
        ({"steps": 3, "temperature": "1"}, "temperature is a number, got '1'"),
    ],
)
def test_sampler_options_of_other_types_are_errors(options: Any, message: str) -> None:
    with raises_value_error(message):
        sampling_steps(score_fn_of("absorbing"), [4], SamplerOptions(**options))


@pytest.mark.parametrize("bias", [{"C": -1e9}, "A", [0.0] * 20])
def test_a_bias_that_is_not_a_tensor_is_an_error(bias: Any) -> None:
    with raises_value_error(r"log_bias is a tensor \(20,\) or a list of tensors, for the amino acids ACDEF"):
        sampling_steps(score_fn_of("absorbing"), [5, 3], SamplerOptions(3), log_bias=bias)


def test_each_design_is_sampled_with_the_rows_of_its_bias() -> None:
    """The bias of each position allows a single amino acid, so the biases determine the sequences."""
    wanted = ["MKVLA", "WYF"]
    bias = []
    for sequence in wanted:
        rows = torch.full((len(sequence), 20), -torch.inf)
        rows[range(len(sequence)), [AMINO_ACIDS.index(letter) for letter in sequence]] = 0
        bias.append(rows)
    for graph in ("absorbing", "uniform"):
        assert sampling_steps(score_fn_of(graph), [5, 3], SamplerOptions(3), log_bias=bias).finish() == wanted


def test_an_edit_after_the_last_step_is_an_error() -> None:
    steps = sampling_steps(score_fn_of("absorbing"), [9], SamplerOptions(3), seed=0)
    steps.finish()
    with pytest.raises(ValueError, match="all 4 steps are done, so an edit has no effect"):
        steps.edit(0, {0: "A"})


@pytest.mark.parametrize(
    ("designs", "options", "message"),
    [
        ([], SamplerOptions(3), "sample_steps takes a list of lengths and sequences, got "),
        ("M__", SamplerOptions(3), "sample_steps takes a list of lengths and sequences, got the string 'M__'"),
        (60, SamplerOptions(3), "sample_steps takes a list of lengths and sequences, got 60"),
        ({60: 1}, SamplerOptions(3), "sample_steps takes a list of lengths and sequences, got {60: 1}"),
        ([4, 0], SamplerOptions(3), r"designs\[1\] has 0 residues; this model was trained on 1 to 200"),
        ([4, 201], SamplerOptions(3), r"designs\[1\] has 201 residues; this model was trained on 1 to 200"),
        (["_" * 201], SamplerOptions(3), r"designs\[0\] has 201 residues; this model was trained on 1 to 200"),
        ([60.5], SamplerOptions(3), r"designs\[0\]: give a number of residues, or a sequence with `_` .*, got 60.5"),
        (["M_", "MKX"], SamplerOptions(3), r"designs\[1\] has no free position, so there is nothing to sample"),
        (["M1"], SamplerOptions(3), r"designs\[0\]: illegal character '1' at position 2 of 2"),
        ([4], {"steps": 4}, r"the options of a sampler are SamplerOptions\(steps, ...\), got {'steps': 4}"),
        ([4], SamplerOptions(0), "sampling needs at least 1 step, got 0"),
        ([4], SamplerOptions(3, "ancestral"), "predictor=ancestral is for the absorbing graph"),
    ],
)
def test_impossible_designs_and_options_are_errors(designs: Any, options: Any, message: str) -> None:
    score_fn = ScoreFn(make_model(), make_substitution_graph("BLOSUM62"), LogLinearNoise(), "x0")
    with raises_value_error(message):
        sampling_steps(score_fn, designs, options)
