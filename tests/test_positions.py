"""Every kind of position encoding: its formula, its attention backends, its limits and its error messages."""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.t5.modeling_t5 import T5Attention

from protlig_dd.batch import PackedBatch, StaticShape
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.dit import DiT
from protlig_dd.model.layers import EMBEDDING_STD
from protlig_dd.model.mixers import attention
from protlig_dd.model.mixers.attention import check_attention_input, resolve_attention_backend, varlen_attention
from protlig_dd.model.mixers.flex import compiled, document_mask, flex
from protlig_dd.model.mixers.scores import ScoreInputs, prepare_scores, with_columns
from protlig_dd.model.positions import POSITIONS
from protlig_dd.model.positions.alibi import slopes_of
from protlig_dd.model.positions.base import PositionEncoding
from protlig_dd.model.positions.biases import ProductBias
from protlig_dd.model.positions.diet import RANK
from protlig_dd.model.positions.diet_rel import CLIP
from protlig_dd.model.positions.t5 import bucket_of

from .conftest import SMALL_MODEL, make_model, raises_value_error, random_batch
from .test_plan_of_a_run import saved_bytes

LONGEST = 160  # maximum number of tokens of a sequence, more than the largest offset of diet_rel
KINDS = sorted(POSITIONS)
MIXER_LISTS = [
    "attention",
    "ttt_linear",
    ["attention", "ttt_linear"],
    ["ttt_linear", "attention"],
    ["attention", "ttt_mlp", "attention"],
]
BIASED = [name for name in KINDS if "torch_varlen" not in POSITIONS[name].backends] + ["diet"]


def options_of(kind: str, **options: Any) -> dict[str, Any]:
    """Return the keys of `model` that choose this kind of position encoding."""
    needed: dict[str, Any] = {"max_positions": LONGEST} if POSITIONS[kind].limited else {}
    needed |= {"sinusoid_scale": EMBEDDING_STD} if POSITIONS[kind].scaled else {}
    return {"positions": kind, **needed, **options}


def model_of(kind: str, mixers: str | list[str]) -> DiT:
    """Return a network with this kind of position encoding and these mixers."""
    n_blocks = 2 if isinstance(mixers, str) else len(mixers)
    return make_model(**options_of(kind, mixers=mixers, n_blocks=n_blocks))


def encoding_of(kind: str, **options: Any) -> PositionEncoding:
    """Return an encoding with random parameters."""
    torch.manual_seed(0)
    encoding = POSITIONS[kind](ModelConfig(**SMALL_MODEL | options_of(kind, **options)))
    for parameter in encoding.parameters():
        nn.init.normal_(parameter)
    return encoding


def prepared(encoding: PositionEncoding, batch: PackedBatch, backend: str) -> ScoreInputs | None:
    """Return what the encoding adds to the attention scores of the second of two blocks, which both have attention."""
    return prepare_scores(encoding, batch, backend, [True, True], torch.float32)[1]


def bias_by_formula(kind: str, encoding: PositionEncoding, block: int, length: int) -> torch.Tensor | None:
    """Return the bias (heads, length, length) of a block, computed entry by entry; None for a kind without a bias."""
    w = {name: parameter.detach().double() for name, parameter in encoding.named_parameters()}
    heads, bias = 4, torch.zeros(4, length, length, dtype=torch.float64)
    for h, i, j in itertools.product(range(heads), range(length), range(length)):
        match kind:
            case "t5":
                n = abs(j - i)
                bucket = n if n < 8 else min(15, 8 + math.floor(8 * math.log(n / 8) / math.log(16) + 1e-9))
                bias[h, i, j] = w["buckets.weight"][16 * (j > i) + bucket, h]
            case "diet_rel":
                bias[h, i, j] = w[f"offsets.{block}.weight"][max(-CLIP, min(CLIP, j - i)) + CLIP, h]
            case "diet":
                p, p_prime = (w[f"{name}.weight"].view(-1, heads, RANK) for name in ("queries", "keys"))
                bias[h, i, j] = p[i, h] @ p_prime[j, h]
            case "alibi":
                bias[h, i, j] = -(2.0 ** (-8 * (h + 1) / heads)) * abs(j - i)
            case _:
                return None
    return bias


def attention_by_formula(qkv: torch.Tensor, batch: PackedBatch, kind: str, encoding: PositionEncoding) -> torch.Tensor:
    """Return the attention output of the second block, one sequence at a time, in float64."""
    out = []
    for part in batch.unpack(qkv.double()):
        q, k, v = part.permute(1, 2, 0, 3)
        bias = bias_by_formula(kind, encoding, 1, len(part))
        scores = q @ k.mT / q.shape[-1] ** 0.5 + (0.0 if bias is None else bias)
        out.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


QKV = torch.randn(52, 3, 4, 16, generator=torch.Generator().manual_seed(3))
BATCH = random_batch([7, 1, 30, 14])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", BIASED)
def test_attention_adds_the_bias_of_the_formula_in_sdpa_and_flex(kind: str) -> None:
    """The backend flex runs uncompiled here. Another test, which needs a GPU, covers the flash kernels."""
    encoding = encoding_of(kind, hidden_size=64)
    expected = attention_by_formula(QKV, BATCH, kind, encoding)
    scores = prepared(encoding, BATCH, "sdpa")
    with torch.no_grad():
        torch.testing.assert_close(
            varlen_attention(QKV, BATCH, "sdpa", scores).double(), expected, rtol=1e-5, atol=1e-5
        )
        in_flex = flex(QKV, BATCH, prepared(encoding, BATCH, "flex"))
        torch.testing.assert_close(in_flex.double(), expected, rtol=1e-5, atol=1e-5)


def test_diet_by_appended_columns_equals_the_plain_sum() -> None:
    encoding = encoding_of("diet", hidden_size=64)
    scores = prepared(encoding, BATCH, "torch_varlen")
    assert scores is not None
    wide = with_columns(QKV, scores.columns)
    assert wide.shape == (52, 3, 4, 16 + RANK)
    same_sequence = BATCH.segment_ids[:, None] == BATCH.segment_ids
    q, k, v = wide.permute(1, 2, 0, 3)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=same_sequence, scale=16**-0.5).transpose(0, 1)
    expected = varlen_attention(QKV, BATCH, "sdpa", prepared(encoding, BATCH, "sdpa"))
    torch.testing.assert_close(out[..., :16], expected, rtol=1e-5, atol=1e-5)
    assert not out[..., 16:].any()


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9))
def test_the_flex_mask_has_exactly_the_blocks_with_a_query_and_key_of_one_sequence(lengths: list[int]) -> None:
    batch = random_batch(lengths)
    same_sequence = batch.segment_ids[:, None] == batch.segment_ids
    total, blocks = len(batch.tokens), -(-len(batch.tokens) // 128)
    spare = 128 * blocks - total
    padded = F.pad(same_sequence, (0, spare, 0, spare)).view(blocks, 128, blocks, 128)
    mask = document_mask(batch)
    assert torch.equal(mask.to_dense()[0, 0].bool(), padded.any(dim=3).any(dim=1))
    transposed = BlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices)
    assert torch.equal(mask.q_num_blocks, transposed.q_num_blocks)
    for row, count in enumerate(mask.q_num_blocks[0, 0].tolist()):
        assert torch.equal(mask.q_indices[0, 0, row, :count], transposed.q_indices[0, 0, row, :count])


@settings(max_examples=3)
@pytest.mark.parametrize("mixers", ["attention", ["attention", "ttt_linear", "attention"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=5), st.integers(0, 99))
def test_a_sequence_alone_gives_the_logits_and_gradients_that_it_has_in_a_pack(
    kind: str, mixers: str | list[str], lengths: list[int], seed: int
) -> None:
    model = model_of(kind, mixers)
    batch = random_batch(lengths, seed)
    sigma = torch.rand(len(lengths), generator=torch.Generator().manual_seed(seed)) * 5
    packed = model(batch, sigma)
    separate = torch.cat(
        [model(PackedBatch.pack([tokens]), sigma[i : i + 1]) for i, tokens in enumerate(batch.unpack(batch.tokens))]
    )
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(F.cross_entropy(out, batch.tokens), parameters) for out in (packed, separate))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_the_order_of_residues_matters_only_with_positions(kind: str) -> None:
    batch, sigma = random_batch([30]), torch.ones(1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    shuffled = batch.with_tokens(batch.tokens[order])
    model, plain = make_model(**options_of(kind)), make_model(positions="none")
    torch.testing.assert_close(plain(shuffled, sigma), plain(batch, sigma)[order], rtol=1e-5, atol=1e-5)
    assert (model(shuffled, sigma) - model(batch, sigma)[order]).abs().max() > 1e-4


@pytest.mark.parametrize("mixers", MIXER_LISTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_an_encoding_gets_a_gradient(kind: str, mixers: str | list[str]) -> None:
    """DistributedDataParallel waits for the gradient of every parameter."""
    if kind in BIASED and "attention" not in mixers:
        with raises_value_error(f"model.positions={kind} adds a bias to attention scores, but .* has no attention"):
            model_of(kind, mixers)
        return
    model, batch = model_of(kind, mixers), random_batch([150])
    F.cross_entropy(model(batch, torch.ones(1)), batch.tokens).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_diet_rel_has_a_table_for_each_block_with_attention_named_after_the_block() -> None:
    mixed, plain = model_of("diet_rel", ["attention", "ttt_linear", "attention"]), make_model(positions="diet_rel")
    names = [[name for name, _ in model.named_parameters() if "offsets" in name] for model in (mixed, plain)]
    assert names == [[f"positions.offsets.{block}.weight" for block in blocks] for blocks in ((0, 2), (0, 1))]
    batch, sigma = random_batch([40]), torch.ones(1)
    with torch.no_grad():
        before = [mixed.hidden_states(batch, sigma, layer) for layer in range(3)]
        mixed.positions.offsets["2"].weight.add_(torch.randn(2 * CLIP + 1, 4))
        for layer, states in enumerate(before):
            assert torch.equal(mixed.hidden_states(batch, sigma, layer), states)
        assert not torch.equal(mixed.trunk(batch, sigma, 3)[0], before[2])


class RecordsDevices(FakeTensorMode):
    """A mode of fake tensors that records the devices of the tensors that operations return."""

    devices: set[str]

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().dispatch(func, types, args, kwargs)
        self.devices |= {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        return out


def kinds_and_backends() -> Iterator[tuple[str, str]]:
    for kind in KINDS:
        yield from ((kind, backend) for backend in POSITIONS[kind].backends if backend not in ("flash_attn", "matmul"))


@pytest.mark.parametrize(("kind", "backend"), list(kinds_and_backends()))
def test_no_tensor_of_a_network_on_cuda_is_on_the_cpu(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Triton cannot run on fake tensors
    monkeypatch.setattr("protlig_dd.model.mixers.flex.compiled", lambda: lambda q, k, v, **options: torch.empty_like(v))
    dtype = torch.float32 if backend == "sdpa" else torch.bfloat16
    with RecordsDevices() as mode, torch.no_grad():
        mode.devices = set()
        # build on the fake CPU and move each tensor: on CUDA, initialisers and Module.to need a CUDA build of torch
        config = ModelConfig(**SMALL_MODEL | options_of(kind, hidden_size=64, tie_weights=True))
        model = DiT(config, backend)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("cuda:0", dtype)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to("cuda:0"))
        model.sigma_embedding.mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
        batch, sigma = random_batch([7, 140]).to("cuda:0"), torch.ones(2).to("cuda:0")
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
        mode.devices = set()
        out = model(batch, sigma)
    assert mode.devices == {"cuda"}
    assert out.shape == (147, 20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"mlp": "geglu"}, {"tie_weights": True}], ids=str)
def test_flops_of_every_kind_equal_the_count_of_torch(kind: str, options: dict[str, Any]) -> None:
    model, lengths = make_model(**options_of(kind, **options)), [7, 150, 12]
    # torch does not count the CPU's fused attention kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(random_batch(lengths), torch.ones(3))
    assert model.flops(lengths) == counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_and_padded_packs_give_the_same_gradients(kind: str) -> None:
    batch, sigma, found = random_batch([7, 150, 12]), torch.rand(3), []
    for checkpointing, padded in ((False, False), (True, False), (False, True)):
        model = make_model(**options_of(kind, checkpointing=checkpointing)).train()
        if padded:
            model.pad_packs(StaticShape(256, 8, LONGEST))
        loss = F.cross_entropy(model(batch, sigma), batch.tokens)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    plain, checkpointed, of_padded = found
    for name, a, b, c in zip(dict(model.named_parameters()), plain, checkpointed, of_padded, strict=True):
        assert torch.equal(a, b), name
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


def test_t5_has_the_buckets_of_transformers() -> None:
    offsets = torch.arange(-5000, 5001)
    expected = T5Attention._relative_position_bucket(offsets, bidirectional=True, num_buckets=32, max_distance=128)
    assert torch.equal(bucket_of(offsets), expected)
    assert 16 not in bucket_of(offsets)
    first = [int((bucket_of(-offsets[5000:]) == bucket).nonzero()[0]) for bucket in range(8, 16)]
    assert first == [8, 12, 16, 23, 32, 46, 64, 91]


def test_alibi_has_the_slopes_of_the_paper() -> None:
    assert slopes_of(8) == [1 / 2**head for head in range(1, 9)]
    assert slopes_of(16) == pytest.approx([2 ** (-head / 2) for head in range(1, 17)])
    assert slopes_of(12) == pytest.approx([*slopes_of(8), *[2 ** (-head / 2) for head in (1, 3, 5, 7)]])
    assert slopes_of(20) == pytest.approx([*slopes_of(16), *[2 ** (-head / 4) for head in (1, 3, 5, 7)]])
    assert slopes_of(1) == [2**-8]


def test_adaptive_equals_sinusoidal_before_training() -> None:
    batch = random_batch([40, 9])
    embedded = torch.randn(49, 32, generator=torch.Generator().manual_seed(1))
    plain, adaptive = (
        POSITIONS[kind](ModelConfig(**SMALL_MODEL | options_of(kind))) for kind in ("sinusoidal", "adaptive")
    )
    assert torch.equal(adaptive.add(embedded, batch), plain.add(embedded, batch))
    added = (plain.add(embedded, batch) - embedded).double() / EMBEDDING_STD
    for token, (i, k) in itertools.product((0, 17, 39, 43), enumerate(range(0, 32, 2))):
        angle = int(batch.positions[token]) / 10000 ** (k / 32)
        assert float(added[token, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-4)
        assert float(added[token, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-4)


def test_adaptive_weights_positions_frequencies_and_tokens() -> None:
    encoding, batch = encoding_of("adaptive"), random_batch([12])
    scale, gain, token_gain = (parameter.detach().double() for parameter in encoding.parameters())
    added = encoding.add(torch.zeros(12, 32), batch).detach().double().view(12, 16, 2)
    for token, k in itertools.product(range(12), range(16)):
        angle = float(scale) * token / 10000 ** (2 * k / 32)
        weight = EMBEDDING_STD * float(token_gain[batch.tokens[token], 0] * gain[k])
        expected = [weight * math.sin(angle), weight * math.cos(angle)]
        assert added[token, k].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "diet"}, "model.positions=diet needs model.max_positions, the length of its table"),
        ({"positions": "diet", "max_positions": 0}, "model.max_positions must be at least 1, got 0"),
        (
            {"max_positions": 30},
            "max_positions=30 has no effect with model.positions=rope, .*set model.positions to diet",
        ),
        ({"positions": "sinusoidal", "hidden_size": 33, "n_heads": 3}, "hidden_size must be even, got 33"),
        ({"positions": "adaptive", "sinusoid_scale": None}, "model.positions=adaptive needs model.sinusoid_scale, the"),
        ({"sinusoid_scale": 0.02}, "model.sinusoid_scale=0.02 has no effect with model.positions=rope"),
        ({"positions": "rope", "hidden_size": 33, "n_heads": 3}, "gives head_dim 11: .* must be even, got 11"),
        ({"positions": "rpe"}, "model.positions=rpe: choose from rope, .*, none; did you mean 'rope'?"),
        ({"mlp": "geglue"}, "model.mlp=geglue: choose from gelu, .*; did you mean 'geglu'?"),
        (
            {"positions": "t5", "mixers": "ttt_linear"},
            "model.positions=t5 adds a bias to attention scores, but model.mixers=ttt_linear has no attention",
        ),
    ],
)
def test_dimensions_that_a_kind_cannot_encode_are_rejected(options: dict[str, Any], message: str) -> None:
    with raises_value_error(message):
        make_model(**options)


@pytest.mark.parametrize("kind", ["t5", "diet", "diet_rel", "alibi", "none"])
def test_kinds_without_pairs_of_dimensions_take_an_odd_head_dim(kind: str) -> None:
    model = make_model(**options_of(kind, hidden_size=33, n_heads=3))
    assert model(random_batch([5]), torch.ones(1)).shape == (5, 20)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if POSITIONS[kind].limited])
def test_a_sequence_beyond_the_table_is_rejected_with_both_numbers(kind: str) -> None:
    model = make_model(**options_of(kind))
    assert model(random_batch([LONGEST]), torch.ones(1)).shape == (LONGEST, 20)
    with raises_value_error(f"a table of {LONGEST} positions .*, but a sequence has {LONGEST + 1} tokens"):
        model(random_batch([3, LONGEST + 1]), torch.ones(2))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not POSITIONS[kind].limited])
def test_kinds_without_a_table_take_sequences_of_any_length(kind: str) -> None:
    model = make_model(**options_of(kind))
    assert torch.isfinite(model(random_batch([1500]), torch.ones(1))).all()


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backend_that_cannot_compute_a_kind_is_rejected_by_name(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "missing_to_compile", lambda device: None)
    monkeypatch.setattr(attention, "has_flash_attn", lambda: True)
    able = POSITIONS[kind].backends
    for backend in ("flash_attn", "torch_varlen", "flex", "sdpa"):
        config = ModelConfig(**SMALL_MODEL | options_of(kind, hidden_size=64))
        if backend in able:
            assert resolve_attention_backend(backend, CUDA, "bf16", 16, kind) == backend
            assert DiT(config, backend).attention_backend == backend
            continue
        message = (
            f"model.attention_backend={backend} cannot add the bias of model.positions={kind} .*; use .*flex, sdpa"
        )
        with raises_value_error(message):
            resolve_attention_backend(backend, CUDA, "bf16", 16, kind)
        with raises_value_error(message):
            DiT(config, backend)


def test_auto_selects_a_backend_that_can_compute_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "missing_to_compile", lambda device: None)
    for flash, varlen, alibi in ((True, "flash_attn", "flash_attn"), (False, "torch_varlen", "flex")):
        monkeypatch.setattr(attention, "has_flash_attn", lambda flash=flash: flash)
        chosen = {kind: resolve_attention_backend("auto", CUDA, "bf16", 64, kind) for kind in KINDS}
        expected = dict.fromkeys(KINDS, varlen) | {"t5": "flex", "diet_rel": "flex", "alibi": alibi}
        assert chosen == expected
    cpu = torch.device("cpu")
    for device, precision in ((cpu, "fp32"), (CUDA, "fp32")):
        assert {resolve_attention_backend("auto", device, precision, 64, kind) for kind in KINDS} == {"sdpa"}
    without_bias = {kind for kind in KINDS if resolve_attention_backend("auto", cpu, "bf16", 64, kind) == "matmul"}
    assert without_bias == {"rope", "sinusoidal", "adaptive", "none"}
    assert resolve_attention_backend("auto", CUDA, "bf16", 20) == "sdpa"  # flex is only for biases
    assert resolve_attention_backend("auto", CUDA, "bf16", 8, "t5") == "sdpa"
    assert resolve_attention_backend("auto", CUDA, "bf16", 240, "diet") == "sdpa"
    monkeypatch.setattr(attention, "missing_to_compile", lambda device: "a C compiler (gcc)")
    assert resolve_attention_backend("auto", CUDA, "bf16", 64, "t5") == "sdpa"


@pytest.mark.parametrize(
    ("backend", "head_dim", "kind", "message"),
    [
        ("flex", 8, "t5", "attention_backend=flex needs a head_dim of at least 16, got 8; use sdpa or auto"),
        (
            "torch_varlen",
            240,
            "diet",
            r"at most 256, got 272 \(240 and the 32 dimensions of the position encoding\); use sdpa or auto",
        ),
        ("flex", 64, "t5", r"flex is compiled by torch, which needs a C compiler \(gcc\); install it, or use sdpa"),
    ],
)
def test_an_explicit_backend_that_cannot_run_is_an_error(
    backend: str, head_dim: int, kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "missing_to_compile", lambda device: "a C compiler (gcc)")
    with raises_value_error(message):
        resolve_attention_backend(backend, CUDA, "bf16", head_dim, kind)
    with raises_value_error(f"model.attention_backend={backend} runs on CUDA, but the device is cpu; use sdpa or auto"):
        resolve_attention_backend(backend, torch.device("cpu"), "bf16", head_dim, kind)


def test_a_kernel_never_drops_a_bias_that_it_cannot_add() -> None:
    with FakeTensorMode():
        batch = random_batch([7, 1, 30, 14]).to("cuda:0")
        qkv = torch.zeros(52, 3, 4, 16, dtype=torch.bfloat16, device="cuda:0")
        for kind, backend in (("t5", "flash_attn"), ("t5", "torch_varlen"), ("alibi", "torch_varlen")):
            (bias,) = encoding_of(kind).bias(random_batch([30]))
            with raises_value_error(
                f"attention backend {backend} cannot add this bias to the scores; use flex or sdpa"
            ):
                varlen_attention(qkv, batch, backend, ScoreInputs(bias))
        (product,) = encoding_of("diet").bias(random_batch([30]))
        for backend in ("flash_attn", "torch_varlen", "flex"):
            columns_missing = ScoreInputs(product, block_mask=document_mask(batch))
            with raises_value_error(f"attention backend {backend} needs the columns of a ProductBias, but got none"):
                varlen_attention(qkv, batch, backend, columns_missing)
    with raises_value_error("attention backend flex runs on CUDA, but qkv is on cpu; use sdpa"):
        varlen_attention(QKV, BATCH, "flex")


@pytest.mark.parametrize(("kind", "backend"), [("t5", "sdpa"), ("diet", "sdpa"), ("diet", "torch_varlen")])
def test_matrices_and_columns_without_their_bias_are_rejected(kind: str, backend: str) -> None:
    complete = prepared(encoding_of(kind, hidden_size=64), BATCH, backend)
    assert complete is not None
    with raises_value_error(f"attention backend {backend} got the matrices or columns of a bias without the bias"):
        varlen_attention(QKV, BATCH, backend, replace(complete, bias=None))


@pytest.mark.parametrize("kind", ["none", "t5", "diet"])
def test_flex_never_attends_across_sequences_for_lack_of_a_mask(kind: str) -> None:
    complete = prepared(encoding_of(kind, hidden_size=64), BATCH, "flex")
    assert complete is not None
    with FakeTensorMode():
        batch = random_batch([7, 1, 30, 14]).to("cuda:0")
        qkv = torch.zeros(52, 3, 4, 16, dtype=torch.bfloat16, device="cuda:0")
        check_attention_input(qkv, batch, "flex", complete)
        with raises_value_error("attention backend flex needs a mask that separates the sequences, but got none"):
            varlen_attention(qkv, batch, "flex", replace(complete, block_mask=None))


@pytest.mark.parametrize("kind", [kind for kind in BIASED if kind != "diet_rel"])
@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
def test_on_sdpa_all_blocks_read_the_same_copy_of_a_bias_that_they_share(
    kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = make_model(**options_of(kind, n_blocks=3)), list[torch.Tensor]()
    if precision == "fp64":
        model.double().sigma_embedding.mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    plain = F.scaled_dot_product_attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor) -> torch.Tensor:
        assert attn_mask.dtype == q.dtype
        read.append(attn_mask)  # keeps the matrix, so that its memory is not reused
        return plain(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        model(random_batch([20, 9, 20]), torch.ones(3))
    pointers = [matrix.data_ptr() for matrix in read]
    assert pointers == pointers[:3] * 3
    # sequences of equal length also share a bias that needs no gradient
    assert len(set(pointers)) == (2 if kind == "alibi" else 3)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_blocks_share_one_copy_of_the_bias_in_the_backward_pass(precision: str) -> None:
    kept = {
        kind: [saved_bytes(make_model(**options_of(kind, n_blocks=n)), [130, 70], precision) for n in (1, 2, 3)]
        for kind in ("none", "alibi", "t5", "diet")
    }
    number = 2 if precision == "bf16" else 4
    bias = number * 4 * (130**2 + 70**2)  # bytes, for 4 heads
    for kind, (one, two, three) in kept.items():
        more = [b - a for a, b in zip(kept["none"], (one, two, three), strict=True)]
        # if the bias needs a gradient, torch on the CPU keeps the attention weights, as float32 even under bf16
        weights = 0 if kind in ("none", "alibi") else bias * 4 // number
        assert three - two == two - one
        assert weights <= more[1] - more[0] < weights + bias // 2


@pytest.mark.parametrize(("mixers", "backend"), [("attention", "sdpa"), (["ttt_linear", "attention"], "flex")])
def test_no_bias_or_mask_is_prepared_for_blocks_without_attention(
    mixers: str | list[str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("prepared in vain")

    model = make_model(**options_of("t5", mixers=mixers, hidden_size=64))
    model.attention_backend = backend
    plain = make_model(mixers="ttt_linear", hidden_size=64)
    plain.attention_backend = "flex"
    for target in ("protlig_dd.model.mixers.flex.document_mask", "protlig_dd.model.positions.t5.T5Relative.bias"):
        monkeypatch.setattr(target, fail)
    batch, sigma = random_batch([5, 9]), torch.ones(2)
    for layer in range(1 if mixers == "attention" else 2):
        assert model.hidden_states(batch, sigma, layer).shape == (14, 64)
    assert plain(batch, sigma).shape == (14, 20)
    with pytest.raises(AssertionError, match="prepared in vain"):
        model(batch, sigma)


def test_flex_cannot_be_recorded_as_a_cuda_graph() -> None:
    model = DiT(ModelConfig(**SMALL_MODEL | options_of("t5", hidden_size=64)), "flex")
    model.pad_packs(StaticShape(128, 8, 40))
    with raises_value_error(
        "flex builds a mask for each pack, so it cannot be recorded .*use flash_attn or torch_varlen"
    ):
        model.capture(torch.bfloat16)


def test_flex_is_not_compiled_anew_for_every_shape_of_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the graphs that torch traces, without generating code for them."""
    torch._dynamo.reset()
    traced = torch.compile(flex_attention, fullgraph=True, backend="eager")
    monkeypatch.setattr("protlig_dd.model.mixers.flex.flex_attention", traced)
    encoding, graphs, before = encoding_of("t5", hidden_size=64), [], counters["stats"]["unique_graphs"]
    for lengths in ([7, 14], [100, 60, 9], [33, 2], [150, 150, 150], [3], [44, 45]):
        batch = random_batch(lengths)
        qkv = torch.randn(sum(lengths), 3, 4, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = flex(qkv, batch, prepared(encoding, batch, "flex"))
            expected = varlen_attention(qkv, batch, "sdpa", prepared(encoding, batch, "sdpa"))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert 1 <= graphs[0] <= graphs[2] == graphs[-1]


def test_one_process_can_compile_flex_for_several_networks_and_modes_of_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit on compiled variants is lowered from torch's default, 8, to 2.

    On the CPU the modes with and without gradients give different variants even without a backward pass.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr("protlig_dd.model.mixers.flex.flex_attention", compiled.__wrapped__())
    before = counters["stats"]["unique_graphs"]
    for width, grad in itertools.product((64, 128), (True, False)):
        encoding = encoding_of("t5", hidden_size=width).requires_grad_(False)
        qkv = torch.randn(52, 3, 4, width // 4, generator=torch.Generator().manual_seed(0))
        with torch.set_grad_enabled(grad):
            found = flex(qkv, BATCH, prepared(encoding, BATCH, "flex"))
            expected = varlen_attention(qkv, BATCH, "sdpa", prepared(encoding, BATCH, "sdpa"))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] - before > 2


def gpu_backends() -> Iterator[tuple[str, str]]:
    for kind in BIASED:
        yield from ((kind, backend) for backend in POSITIONS[kind].backends if backend != "sdpa")
    yield "rope", "flex"


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "backend"), list(gpu_backends()))
def test_biases_and_their_gradients_on_cuda_equal_those_of_sdpa(kind: str, backend: str) -> None:
    if backend == "flash_attn" and not attention.has_flash_attn():
        pytest.skip("flash-attn is not installed")
    batch = random_batch([3, 150, 129]).to("cuda")
    found = []
    for name in (backend, "sdpa"):
        encoding = encoding_of(kind, hidden_size=128, max_positions=LONGEST if kind == "diet" else None).to("cuda")
        qkv = torch.randn(282, 3, 4, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        qkv = qkv.to(torch.bfloat16).requires_grad_()
        out = varlen_attention(qkv, batch, name, prepared(encoding, batch, name))
        out.float().square().sum().backward()
        gradients = [p.grad.flatten().float() for p in encoding.parameters() if p.grad is not None]
        found.append((out, qkv.grad, torch.cat(gradients) if gradients else None))
    (out, grad, table), (expected, expected_grad, expected_table) = found
    assert torch.allclose(out, expected, atol=3e-2)
    assert (grad - expected_grad).norm() < 0.02 * expected_grad.norm()
    if table is not None:
        assert (table - expected_table).norm() < 0.02 * expected_table.norm()


def test_a_product_bias_is_the_product_of_its_tables() -> None:
    q, k = (torch.from_numpy(np.random.default_rng(i).standard_normal((9, 2, 3))) for i in range(2))
    found = ProductBias(q, k).matrix(5)
    assert torch.allclose(found[1, 3, 4], q[3, 1] @ k[4, 1])
    assert found.shape == (2, 5, 5)
