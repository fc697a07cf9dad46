"""Tests of model inspection: attention weights, hooks, evaluation mode, contact maps and the examples in the docs."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.sampling import sample
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.hub import ProteinDiffusion
from protlig_dd.inference.contacts import average_product_correction, contact_map, to_png
from protlig_dd.inference.embedding import embed
from protlig_dd.inference.exported import EXPORTED, write_exported
from protlig_dd.inference.hooks import called_modules, hooks, parts_of
from protlig_dd.inference.inspect import analysis, attention, attention_weights
from protlig_dd.model.block import Block
from protlig_dd.model.dit import DiT
from protlig_dd.model.mixers import MIXERS
from protlig_dd.model.mixers import attention as kernels
from protlig_dd.model.mixers.scores import ScoreInputs
from protlig_dd.model.positions import POSITIONS
from protlig_dd.model.positions.biases import ProductBias
from protlig_dd.tokenizer import ProteinTokenizer

from .conftest import ROOT, graph_of, make_model, raises_value_error

NETWORKS: dict[str, dict[str, Any]] = {
    "time-free": {"time_conditioning": False},
    "conditioned": {},
    "qk_norm": {"qk_norm": True, "norm": "rms"},
    **{
        f"positions={name}": {"positions": name, "max_positions": 200 if kind.limited else None}
        for name, kind in POSITIONS.items()
    },
}
NOISE = LogLinearNoise()


def score_fn_of(model: DiT, graph: str = "absorbing", *, autocast: torch.dtype | None = None) -> ScoreFn:
    timed = model.sigma_embedding is not None
    return ScoreFn(model.eval(), graph_of(graph, 20), NOISE, "x0", timed, autocast)


def sharpened(model: DiT) -> DiT:
    """Give the model queries and keys that are large enough for attention to differ between tokens."""
    with torch.no_grad():
        for block in model.blocks:
            scaled = (block.mixer.q_norm, block.mixer.k_norm) if block.mixer.q_norm else (block.qkv,)
            for module in scaled:
                module.weight *= 10
    return model


def pack(sequence: str) -> PackedBatch:
    return PackedBatch.pack([torch.from_numpy(ProteinTokenizer().encode(sequence))])


@contextmanager
def spied_kernel() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect the input and output of the attention kernel in each block."""
    calls: list[tuple[Tensor, Tensor]] = []
    kernel = kernels._BACKENDS["sdpa"]

    def spy(qkv: Tensor, batch: PackedBatch, scores: ScoreInputs | None) -> Tensor:
        calls.append((qkv, kernel(qkv, batch, scores)))
        return calls[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels._BACKENDS, "sdpa", spy)
        yield calls


@pytest.fixture(scope="module")
def sequences(proteins: list[FastaRecord]) -> list[str]:
    """Three real proteins of different lengths."""
    return [record.sequence for record in proteins if len(record.sequence) < 120][:3]


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_weights_and_the_values_give_the_output_of_the_kernel(kind: str, sequences: list[str]) -> None:
    """The inputs and outputs of the kernel are recorded in a separate forward pass, in which nothing is inspected."""
    score_fn = score_fn_of(sharpened(make_model(**NETWORKS[kind])))
    for sequence, weights in zip(sequences, attention(score_fn, sequences, max_len=200), strict=True):
        with spied_kernel() as calls, torch.no_grad():
            score_fn.logits(pack(sequence), NOISE(torch.tensor([NOISE.t_min]))[0])
        assert weights.shape == (2, 4, len(sequence) + 2, len(sequence) + 2)
        assert weights.dtype == torch.float32
        assert (weights.sum(-1) - 1).abs().max() < 1e-5
        assert weights.amax(-1).median() > 3 / weights.shape[-1]  # the weights are not uniform
        for block_weights, (qkv, out) in zip(weights, calls, strict=True):
            mixed = torch.einsum("hij,jhd->ihd", block_weights, qkv[:, 2])
            assert (mixed - out).abs().max() < 2e-6 * out.abs().max()


@pytest.mark.parametrize("positions", POSITIONS)
def test_with_bf16_the_attention_weights_are_computed_in_float32_from_rounded_inputs(
    positions: str, sequences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs of torch's kernel are recorded. The tables of positions are large, so that their rounding matters."""
    model, calls = sharpened(make_model(**NETWORKS[f"positions={positions}"])), list[tuple[Tensor | None, ...]]()
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        calls.append((q, k, v, attn_mask, kernel(q, k, v, attn_mask=attn_mask)))
        return kernel(q, k, v, attn_mask=attn_mask)

    with torch.no_grad():
        for table in model.positions.parameters():
            table *= 10
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    (weights,) = attention(score_fn_of(model, autocast=torch.bfloat16), sequences[:1], max_len=200)
    assert len(calls) == 2
    for block_weights, call in zip(weights, calls, strict=True):
        assert {tensor.dtype for tensor in call if tensor is not None} == {torch.bfloat16}
        q, k, v, bias, out = (None if tensor is None else tensor.squeeze(0).double() for tensor in call)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        exact = (scores if bias is None else scores + bias).softmax(-1)
        assert (block_weights - exact).abs().max() < 1e-5  # rounding the weights to bf16 would change them by 4e-3
        assert (block_weights.double() @ v - out).abs().max() < 0.01 * out.abs().max()


def test_a_bias_in_appended_columns_gives_the_same_weights() -> None:
    """The CUDA kernels receive the bias of diet as columns that are appended to the queries and keys.

    Scores are still divided by the square root of head_dim, which does not include the appended columns.
    """
    torch.manual_seed(0)
    qkv, table = torch.randn(9, 3, 4, 8), torch.randn(2, 20, 4, 5)
    bias = ProductBias(*table)
    batch = PackedBatch.pack([torch.zeros(9, dtype=torch.long)])
    plain = attention_weights(qkv, ScoreInputs(bias), [3, 0], rounded=True)
    in_columns = attention_weights(qkv, ScoreInputs(bias, columns=bias.columns(batch, 8)), [3, 0], rounded=False)
    torch.testing.assert_close(in_columns, plain)
    expected = torch.einsum("ihd,jhd->hij", *qkv[:, :2].unbind(1)) / 8**0.5 + bias.matrix(9)
    torch.testing.assert_close(plain, expected.softmax(-1)[[3, 0]])


def test_blocks_and_heads_are_returned_in_the_order_of_the_request(sequences: list[str]) -> None:
    score_fn = score_fn_of(make_model(n_blocks=3))
    (everything,) = attention(score_fn, sequences[:1], max_len=200)
    (chosen,) = attention(score_fn, sequences[:1], blocks=[2, 0, -2, 0], heads=[3, -4], max_len=200)
    assert torch.equal(chosen, everything[[2, 0, 1, 0]][:, [3, 0]])
    (first,) = attention(score_fn, [sequences[0].lower()], blocks=[0], max_len=200)
    assert torch.equal(first, everything[:1])


def test_a_block_without_attention_is_an_error_only_if_it_is_chosen(sequences: list[str]) -> None:
    score_fn = score_fn_of(make_model(n_blocks=3, mixers=["attention", "ttt_linear", "attention"]))
    with pytest.raises(ValueError, match="block 1 has .*: its mixer is ttt_linear; choose from blocks 0, 2$"):
        attention(score_fn, sequences, max_len=200)
    with pytest.raises(
        ValueError, match="block 0 has .*: its mixer is ttt_mlp; no block of this network has attention$"
    ):
        attention(score_fn_of(make_model(mixers="ttt_mlp")), sequences, max_len=200)
    (weights,) = attention(score_fn, sequences[:1], blocks=[0, 2], max_len=200)
    assert (weights.sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [0, 2]}, "block 2 does not exist: this model has blocks 0 to 1"),
        ({"blocks": [-3]}, "block -3 does not exist: this model has blocks 0 to 1"),
        ({"heads": [4]}, "head 4 does not exist: this model has heads 0 to 3"),
        ({"heads": []}, r"heads is a list of numbers, such as \[0, -1\], got \[\], which is empty"),
        ({"blocks": 0}, r"blocks is a list of numbers, such as \[0, -1\], got 0"),
        ({"heads": 3}, r"heads is a list of numbers, such as \[0, -1\], got 3"),
        ({"blocks": ["0"]}, "blocks is a list of whole numbers, got '0'"),
        ({"heads": [1.0]}, "heads is a list of whole numbers, got 1.0"),
        ({"t": 1.5}, r"t must be a number in \[0.001, 1\], got 1.5"),
        ({"sequences": "MKV"}, "attention takes a list of sequences, got the string 'MKV'"),
        ({"sequences": []}, "attention takes a list of sequences"),
        ({"blocks": np.array(0)}, "blocks is a list of numbers, such as .*, got 0"),
        ({"t": "0.5"}, r"t must be a number in \[0.001, 1\], got '0.5'"),
        ({"t": True}, r"t must be a number in \[0.001, 1\], got True"),
        ({"sequences": ["M\u00df"]}, "illegal character '\u00df' at position 2 of 2"),
        ({"sequences": ["MKV", "M1"]}, r"sequences\[1\]: illegal character '1' at position 2"),
        ({"sequences": 5}, "attention takes a list of sequences, got 5"),
        ({"sequences": ["MKV", 5]}, r"sequences\[1\]: a sequence is a string of letters, got 5"),
        ({"sequences": ["M" * 21]}, r"sequences\[0\] has 21 residues; this model was trained on 1 to 20"),
        ({"sequences": ["M_V"], "graph": "uniform"}, r"sequences\[0\] has `_`, but the graph uniform has no mask"),
    ],
)
def test_invalid_arguments_of_attention_are_errors(options: dict[str, Any], message: str) -> None:
    options = {"sequences": ["MKV"], "graph": "absorbing", "max_len": 20} | options
    score_fn = score_fn_of(make_model(), options.pop("graph"))
    with raises_value_error(message):
        attention(score_fn, options.pop("sequences"), **options)


def test_the_noise_level_matches_the_masked_fraction_unless_a_time_is_given() -> None:
    model = make_model()
    score_fn, seen = score_fn_of(model), list[float]()
    assert model.sigma_embedding is not None
    model.sigma_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[0])))
    attention(score_fn, ["MKV_", "____", "MKVL"], max_len=9)
    attention(score_fn, ["MKV_"], t=0.5, max_len=9)
    attention(score_fn_of(model, "uniform"), ["MKVL"], max_len=9)
    lowest, middle, highest = NOISE(torch.tensor([NOISE.t_min, 0.5, 1.0]))[0].tolist()
    assert seen == pytest.approx([-np.log(0.75), highest, lowest, middle, lowest], rel=1e-5)


def test_attention_leaves_the_network_as_it_was_even_if_it_fails(sequences: list[str]) -> None:
    model = make_model(dropout=0.3)
    score_fn = score_fn_of(model)
    model.blocks[1].train()

    def fail(output: Tensor) -> None:
        raise KeyError("the caller's own error")

    first = attention(score_fn, sequences[:1], max_len=200)[0]
    with hooks(model, {"blocks.1.attention_out": fail}), pytest.raises(KeyError, match="own error"):
        attention(score_fn, sequences, max_len=200)
    assert all(isinstance(block, Block) and "mix" not in block.mixer.__dict__ for block in model.blocks)
    assert [block.training for block in model.blocks] == [False, True]
    assert torch.equal(first, attention(score_fn, sequences[:1], max_len=200)[0])  # no dropout, not even in block 1


PATHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "compiled": {},
    "time-free": {"time_conditioning": False},
    "rms": {"norm": "rms", "qk_norm": True, "tie_weights": True},
    **{name: options for name, options in NETWORKS.items() if name.startswith("positions=")},
    **{f"mixers={name}": {"mixers": ["attention", name]} for name in MIXERS},
}
TWICE = ("qkv", "rate", "gate", "inner", "ttt_out")


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("path", PATHS)
def test_hooks_run_on_every_path_of_the_network_in_evaluation(path: str, grad: bool, sequences: list[str]) -> None:
    """In a forward pass a module runs once, or twice if it belongs to test-time training.

    Test-time training reads each sequence in both directions with the same modules.
    """
    model = make_model(**PATHS[path])
    if path == "compiled":
        model.compile_blocks(dynamic=True)
    score_fn, found = score_fn_of(model), dict[str, list[Tensor]]()
    names = list(called_modules(model))
    twice = tuple(f"blocks.1.{part}" for part in TWICE) if "ttt" in path else ()
    expected = {name: 2 if name.startswith(twice) else 1 for name in names}
    batch, sigma = pack(sequences[0]), torch.ones(1)
    with (
        hooks(model, {name: found.setdefault(name, []).append for name in names}),
        torch.set_grad_enabled(grad),
    ):
        logits = score_fn.logits(batch, sigma)
        assert {name: len(calls) for name, calls in found.items()} == expected
        embed(model, score_fn, [ProteinTokenizer().encode(sequences[0])], layer=2, max_len=200)
        sample(score_fn, [9], SamplerOptions(1), torch.Generator().manual_seed(0))
        assert len(found["blocks.1"]) == 4
    assert torch.equal(found["head"][0], logits)
    used = sigma if score_fn.time_conditioning else torch.zeros(1)
    with torch.set_grad_enabled(grad):
        assert torch.equal(found["blocks.0"][0], model.hidden_states(batch, used, 1))
    assert torch.equal(found["embedding"][0], model.embedding(batch.tokens))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_name_is_accepted_exactly_if_a_forward_pass_calls_its_module(positions: str, mixer: str) -> None:
    """The network reads some weights, such as tables of positions, without a call of their module.

    A hook on such a module would never run.
    """
    options = {**NETWORKS[f"positions={positions}"], "mixers": ["attention", mixer]}
    for others in ({}, {"norm": "rms", "qk_norm": True, "tie_weights": True, "time_conditioning": False}):
        model, called = make_model(**options, **others).eval(), set[str]()
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, called=called, name=name: called.add(name))
        model(pack("MKVLA"), torch.ones(1))
        accepted = set()
        for name, _ in model.named_modules():
            with contextlib.suppress(ValueError), hooks(model, {name: print}):
                accepted.add(name)
        assert accepted == called - {""}
        assert {"embedding", "blocks.0", "blocks.0.qkv", "blocks.1.mlp", "head"} <= accepted


def test_in_test_time_training_the_second_call_of_a_module_is_on_reversed_sequences(sequences: list[str]) -> None:
    """docs/inspect.md describes the order of the tokens, and the shape of the output of the inner model."""
    model, found = make_model(mixers="ttt_linear", n_blocks=1), dict[str, list[Tensor]]()
    with torch.no_grad():  # without the output of the first direction, the second direction reads the mixer's input
        model.blocks[0].directions.forward_alpha.zero_()
    tokens = [torch.from_numpy(ProteinTokenizer().encode(sequence)) for sequence in sequences[:2]]
    batch = PackedBatch.pack(tokens)
    names = ("qkv", "inner")
    with hooks(model.eval(), {f"blocks.0.{name}": found.setdefault(name, []).append for name in names}):
        model(batch, torch.ones(2))
    first, second = found["qkv"]
    for ahead, reverse in zip(batch.unpack(first), batch.unpack(second), strict=True):
        torch.testing.assert_close(reverse, ahead.flip(0))
    chunks = sum(-(-length // 16) for length in batch.lengths)
    assert [tuple(output.shape) for output in found["inner"]] == [(chunks, 4, 16, 8)] * 2


def test_a_hook_may_replace_an_output(sequences: list[str]) -> None:
    model, batch = make_model().eval(), pack(sequences[0])
    x_TH = torch.randn(len(batch.tokens), 32)
    with hooks(model, {"blocks.1": lambda output: x_TH}):
        replaced = model(batch, torch.ones(1))
    assert model.sigma_embedding is not None
    cond_nC = model.sigma_embedding(torch.ones(1))
    expected = model.head(x_TH, cond_nC, batch.segment_ids, model.embedding.weight)
    assert torch.equal(replaced, expected)
    assert not torch.equal(replaced, model(batch, torch.ones(1)))
    with hooks(model, {"blocks.0.attention_out": torch.zeros_like, "blocks.1.attention_out": torch.zeros_like}):
        without_mixing = model(batch, torch.ones(1))
        shuffled = batch.with_tokens(batch.tokens.flip(0))
        assert torch.allclose(model(shuffled, torch.ones(1)).flip(0), without_mixing, atol=1e-5)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(2, 32), r"the hook on blocks.0 returned \(2, 32\) torch.float32 on cpu in place of \(5, 32\)"),
        (torch.zeros(5, 32).double(), r"returned \(5, 32\) torch.float64 on cpu in place of \(5, 32\) torch.float32"),
        (3, "the hook on blocks.0 returned int; return a tensor or None"),
    ],
)
def test_a_hook_must_return_a_tensor_of_the_same_shape_and_dtype(returned: Any, message: str) -> None:
    model = make_model().eval()
    with hooks(model, {"blocks.0": lambda output: returned}), pytest.raises(ValueError, match=message):
        model(pack("MKV"), torch.ones(1))


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_are_removed_when_the_body_ends_or_raises() -> None:
    model, batch = make_model().eval(), pack("MKVLA")
    before = model(batch, torch.ones(1))
    with hooks(model, {"blocks.0": torch.zeros_like, "blocks.1.mlp": torch.zeros_like}):
        assert n_hooks(model) == 2
        with pytest.raises(RuntimeError, match="3 hooks"), hooks(model, {"head": torch.zeros_like}):
            raise RuntimeError(f"{n_hooks(model)} hooks")
        assert n_hooks(model) == 2
    assert n_hooks(model) == 0
    assert torch.equal(model(batch, torch.ones(1)), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("block.1", "'block.1' is not a module of this network; the network has embedding, "),
        ("blocks.2.qkv", "'blocks.2.qkv' is not a module of this network; blocks has blocks.0 to blocks.1"),
        ("blocks", "'blocks' is never called itself, so a hook would not run; blocks has blocks.0 to blocks.1"),
        (
            "positions",
            "'positions' is never called itself, so a hook would not run: it has no weights, and the network",
        ),
        (
            "blocks.0.qvk",
            "'blocks.0.qvk' is not a module of this network; blocks.0 has blocks.0.adaln, blocks.0.attention_norm, ",
        ),
        ("embedding.weight", "'embedding.weight' is a weight, not a module; read it as network.get_parameter("),
        ("", "'' is not a module of this network; the network has embedding, "),
        (0, "0 is not a module of this network; the network has embedding, "),
    ],
)
def test_the_error_for_a_name_that_cannot_be_hooked_lists_the_names_beside_it(name: Any, message: str) -> None:
    model = make_model().eval()
    with raises_value_error(re.escape(message)), hooks(model, {"blocks.0": print, name: print}):
        pytest.fail("the body must not run")
    assert n_hooks(model) == 0


def test_lists_of_module_names_shorten_numbered_modules_to_a_range() -> None:
    names = [f"blocks.{i}{part}" for i in range(12) for part in ("", ".qkv", ".mlp", ".mlp.up")]
    assert parts_of("", ["embedding", *names, "head"]) == ["embedding", "blocks.0 to blocks.11", "head"]
    assert parts_of("blocks.3", names) == ["blocks.3.qkv", "blocks.3.mlp"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"positions": "t5"}, "positions.buckets"),
        ({"positions": "diet", "max_positions": 9}, "positions.queries"),
        ({"positions": "diet_rel"}, "positions.offsets.1"),
        ({"mixers": "ttt_mlp"}, "blocks.0.heads_norm"),
    ],
)
def test_weights_that_are_read_without_a_call_cannot_be_hooked(options: dict[str, Any], name: str) -> None:
    model = make_model(**options).eval()
    message = f"'{name}' is never called itself, so a hook would not run: the network reads its weights; see"
    with pytest.raises(ValueError, match=re.escape(message)), hooks(model, {name: print}):
        pytest.fail("the body must not run")
    assert list(model.get_submodule(name).parameters())


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"blocks.0": 3}, "the hook on blocks.0 is 3; give a function of the module's output"),
        ([print], r"hooks takes a mapping of module names to functions, got \[<built-in function print>\]"),
    ],
)
def test_hooks_must_map_module_names_to_functions(functions: Any, message: str) -> None:
    model = make_model().eval()
    with raises_value_error(message), hooks(model, functions):
        pytest.fail("the body must not run")
    assert n_hooks(model) == 0


def test_hooks_on_compiled_training_steps_are_an_error() -> None:
    model = make_model()
    with hooks(model, {"blocks.0": print}):
        assert n_hooks(model) == 1
    model.compile_blocks(dynamic=True)
    with pytest.raises(ValueError, match="put the network in evaluation mode"), hooks(model, {"blocks.0": print}):
        pytest.fail("the body must not run")


def test_analysis_restores_the_mode_of_every_module() -> None:
    model = make_model(dropout=0.5)
    model.eval()
    model.blocks[1].train()
    model.blocks[0].mlp.up.train()  # blocks.0, which contains this module, is in evaluation mode
    model.head.out.train()
    mixers = [block.mixer for block in model.blocks]
    modules = [*model.modules(), *mixers]
    modes = [module.training for module in modules]
    assert 0 < sum(modes) < len(modes)
    assert [mixer.training for mixer in mixers] == [False, True]
    batch = pack("MKVLAW")
    with analysis(model):
        assert not any(module.training for module in modules)
        first = model(batch, torch.ones(1))
        assert torch.equal(first, model(batch, torch.ones(1)))
        assert not first.requires_grad
    assert [module.training for module in modules] == modes
    with pytest.raises(RuntimeError, match="stop"), analysis(model):
        raise RuntimeError("stop")
    assert [module.training for module in modules] == modes
    assert torch.is_grad_enabled()
    assert model(batch, torch.ones(1)).requires_grad


def test_the_contact_map_is_the_mean_over_heads_minus_the_product_of_averages(sequences: list[str]) -> None:
    (weights,) = attention(score_fn_of(make_model()), sequences[:1], max_len=200)
    contacts = contact_map(weights)
    n = len(sequences[0])
    a = np.zeros((n, n))
    for block in weights.double().numpy():
        for head in block:
            for i in range(n):
                for j in range(n):
                    a[i, j] += (head[i + 1, j + 1] + head[j + 1, i + 1]) / (2 * weights.shape[0] * weights.shape[1])
    expected = a - np.outer(a.mean(0), a.mean(0)) / a.mean()
    assert np.abs(contacts.numpy() - expected).max() < 1e-7
    assert torch.equal(contacts, contacts.T)
    assert contacts.sum(0).abs().max() < 1e-6  # the correction removes what a position has in common with all others


def test_a_contact_map_accepts_the_weights_of_a_single_head() -> None:
    weights = torch.rand(2, 3, 9, 9).softmax(-1)
    assert torch.equal(contact_map(weights[1, 2]), contact_map(weights[1:, 2:]))


@pytest.mark.parametrize(
    ("weights", "found"),
    [([torch.rand(1, 1, 5, 5)], "list"), (torch.rand(5), r"shape \(5,\)"), (torch.rand(1, 1, 2, 2), "shape")],
)
def test_a_contact_map_of_anything_but_one_protein_is_an_error(weights: Any, found: str) -> None:
    with raises_value_error(rf"contact_map takes the weights of one protein, a tensor \(.*\), got {found}"):
        contact_map(weights)


@pytest.mark.parametrize("part", ["residues", "no block", "not a number"])
def test_a_contact_map_needs_rows_that_sum_to_one(part: str) -> None:
    weights = torch.rand(2, 3, 9, 9).softmax(-1)
    changed = {"residues": weights[..., 1:-1, 1:-1], "no block": weights[:0], "not a number": weights * torch.nan}
    with pytest.raises(ValueError, match="attention weights, whose rows sum to 1; give the weights of all tokens"):
        contact_map(changed[part])


def test_a_picture_needs_a_square_map_of_its_sequence() -> None:
    with raises_value_error(r"the map has shape \(5, 7\), but the sequence has 5 residues"):
        to_png(torch.rand(5, 7), "MKVLA", "title")


def test_a_product_of_averages_alone_is_corrected_to_zero() -> None:
    rate = torch.rand(30, dtype=torch.float64)
    a = torch.outer(rate, rate)
    assert average_product_correction(a).abs().max() < 1e-12
    a[3, 20] = a[20, 3] = 3.0
    assert sorted(divmod(int(average_product_correction(a).argmax()), 30)) in ([3, 20],)


def test_the_picture_has_the_sequence_beside_the_map(tmp_path: Path, sequences: list[str]) -> None:
    (weights,) = attention(score_fn_of(make_model()), sequences[:1], max_len=200)
    contacts = contact_map(weights)[:20, :20]
    pictures = [to_png(contacts, sequence, "title") for sequence in (sequences[0][:20], "A" * 20)]
    assert pictures[0] != pictures[1]
    (tmp_path / "map.png").write_bytes(pictures[0])
    with Image.open(tmp_path / "map.png") as image:
        assert (image.format, image.size) == ("PNG", (950, 850))
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20
    with pytest.raises(ValueError, match=r"the map has shape \(20, 20\), but the sequence has 3 residues"):
        to_png(contacts, "MKV", "title")
    assert to_png(torch.rand(140, 140), "A" * 140, "long").startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with models/demo, an exported model with random weights and the norms of `model=tiny`."""
    folder = tmp_path_factory.mktemp("inspect")
    description = json.loads((ROOT / "tests/golden/files/exported" / EXPORTED[1]).read_text())
    options = {"hidden_size": 32, "n_heads": 8, "n_blocks": 2, "cond_dim": 16, "norm": "rms", "qk_norm": True}
    description |= {"model": description["model"] | options, "max_len": 512}
    (folder / "models").mkdir()
    weights = make_model(time_conditioning=False, **options).state_dict()
    write_exported(folder / "models/demo", weights, description)
    return folder


def test_the_examples_in_the_docs_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Python blocks of docs/inspect.md one after the other, with the assertions that they contain."""
    shutil.copytree(folder / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/inspect.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) >= 5
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    with Image.open(tmp_path / "attention.png") as image:
        assert image.format == "PNG"
    assert (ROOT / "docs" / re.findall(r"!\[.*?\]\((.*?)\)", text)[0]).is_file()


def test_the_methods_of_a_loaded_model_call_these_functions(folder: Path) -> None:
    model = ProteinDiffusion.from_pretrained(folder / "models/demo", device="cpu")
    (weights,) = model.attention(["MKV_A"], blocks=[1], heads=[0, 7], t=0.5)
    assert torch.equal(weights, attention(model.score_fn, ["MKV_A"], blocks=[1], heads=[0, 7], t=0.5, max_len=512)[0])
    found: list[Tensor] = []
    model.train()
    with model.hooks({"blocks.0": found.append}), model.analysis():
        assert not model.network.training
        model.embed(["MKV"], layer=1)
    assert model.network.training
    assert torch.equal(found[0], model.network.hidden_states(pack("MKV"), torch.zeros(1), 1))
    steps = model.sample_steps([9, "MK__V"], SamplerOptions(3), seed=4)
    assert [len(sequence) for sequence in steps.finish()] == [9, 5]
    with pytest.raises(ValueError, match=r"designs\[0\] has 513 residues; this model was trained on 1 to 512"):
        model.sample_steps([513], SamplerOptions(3))
    long = ["MKV", "M" * 513]
    with pytest.raises(
        ValueError, match=r"sequences\[1\] has 513 residues, but .* at most 512 residues; long=window averages"
    ):
        model.embed(long)
    with pytest.raises(ValueError, match="long=windows: choose from error, window; did you mean 'window'"):
        model.embed(long, long="windows")
    assert model.embed(long, long="window").shape == (2, 32)
    for layer in (1.0, "1", True):
        with raises_value_error(f"layer is a whole number, got {layer!r}"):
            model.embed(["MKV"], layer=layer)
    with pytest.raises(ValueError, match=r"sequences\[0\]: illegal character '\u017f' at position 2 of 2"):
        model.embed(["M\u017f"])
    with raises_value_error("from_pretrained takes the name of a folder or of a model on the hub, got None"):
        ProteinDiffusion.from_pretrained(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="head 8 does not exist"):
        model.attention(["MKV"], heads=[8])
    with pytest.raises(ValueError, match="the network has .*blocks.0 to blocks.1"), model.hooks({"block.0": print}):
        pytest.fail("the body must not run")
