import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from protlig_dd.batch import PackedBatch, StaticShape
from protlig_dd.model import block as block_module
from protlig_dd.model import layers
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.dit import CPU_MULTIPLE, DiT, drop_masked
from protlig_dd.model.kernels import per_token
from protlig_dd.model.layers import MLP, RMSNorm, make_norm, modulate
from protlig_dd.model.mixers import MIXERS
from protlig_dd.model.mixers.attention import Attention
from protlig_dd.model.rotary import rotary_cos_sin
from protlig_dd.tokenizer import MASK

from .conftest import SMALL_MODEL, make_model, raises_value_error, random_batch

MODEL = make_model()
OPTIONS = [
    {"time_conditioning": False},
    {"norm": "rms", "qk_norm": True, "time_conditioning": False},
    {"mlp": "relu2", "norm": "rms"},
    {"mlp": "swiglu", "qk_norm": True},
    {"mlp": "geglu", "tie_weights": True},
    {"checkpointing": True},
    {
        "mlp": "gelu_erf",
        "attention_bias": True,
        "head": "lm",
        "tie_weights": True,
        "token_dropout": True,
        "norm_eps": 0.1,
    },
]
VARIANTS = [make_model(**options) for options in OPTIONS]
MIXED = {name: make_model(mixers=["attention", name], qk_norm=True) for name in MIXERS}


def gradients(model: DiT, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@settings(max_examples=10)
@pytest.mark.parametrize("model", [MODEL, *VARIANTS, *MIXED.values()], ids=["default", *map(str, OPTIONS), *MIXED])
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(0, 99))
def test_a_pack_gives_the_logits_and_gradients_of_its_sequences_one_at_a_time(
    model: DiT, lengths: list[int], seed: int
) -> None:
    batch = random_batch(lengths, seed)
    sigma = torch.rand(len(lengths), generator=torch.Generator().manual_seed(seed)) * 5
    target = torch.randint(0, 20, (sum(lengths),), generator=torch.Generator().manual_seed(seed + 1))
    packed = model(batch, sigma)
    separate = torch.cat(
        [model(PackedBatch.pack([tokens]), sigma[i : i + 1]) for i, tokens in enumerate(batch.unpack(batch.tokens))]
    )
    assert torch.allclose(packed, separate, atol=1e-5, rtol=1e-5)
    for found, expected in zip(
        gradients(model, F.cross_entropy(packed, target)),
        gradients(model, F.cross_entropy(separate, target)),
        strict=True,
    ):
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)


def logits_by_formulas(model: DiT, tokens: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return the logits of one sequence, computed from the named weights by the formulas of the papers.

    The formulas are adaLN of DiT (arXiv 2212.09748) with SEDD's sinusoids of sigma, the rotary encoding of RoFormer
    (arXiv 2104.09864) as products of complex numbers, and pre-norm residual blocks.
    """
    w = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    width, heads, length = model.embedding.embedding_dim, model.blocks[0].mixer.n_heads, len(tokens)
    half = width // heads // 2

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(name: str, x: torch.Tensor, rms: bool) -> torch.Tensor:
        centred = x if rms else x - x.mean(-1, keepdim=True)
        eps = 1e-6 if rms else model.head.norm.eps
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def exact_gelu(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def silu(x: torch.Tensor) -> torch.Tensor:
        return x / (1 + torch.exp(-x))

    cond = None
    if model.sigma_embedding is not None:
        angles = sigma * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
        hidden = silu(linear("sigma_embedding.mlp.0", torch.cat([angles.cos(), angles.sin()])))
        cond = silu(linear("sigma_embedding.mlp.2", hidden))

    def modulations(name: str, number: int) -> list[torch.Tensor | float]:
        """Return the first `number` of: shift, scale and gate of attention, shift, scale and gate of the MLP.

        Without time conditioning shift and scale are 0, and the gate is 1. The head has only shift and scale.
        """
        if cond is None:
            return [0.0, 0.0, 1.0, 0.0, 0.0, 1.0][:number]
        return list(linear(f"{name}.adaln", cond).chunk(number))

    x = w["embedding.weight"][tokens] * (0.88 if model.token_dropout else 1.0)  # no token is masked
    frequencies = torch.tensor([10000 ** (-j / half) for j in range(half)], dtype=torch.float64)
    rotation = torch.exp(1j * torch.arange(length, dtype=torch.float64)[:, None] * frequencies)[:, None]
    for i, block in enumerate(model.blocks):
        name, rms = f"blocks.{i}", isinstance(block.attention_norm, RMSNorm)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulations(name, 6)
        h = norm(f"{name}.attention_norm", x, rms) * (1 + scale_a) + shift_a
        q, k, v = linear(f"{name}.qkv", h).view(length, 3, heads, 2 * half).unbind(1)
        if block.mixer.q_norm is not None:
            q, k = norm(f"{name}.q_norm", q, True), norm(f"{name}.k_norm", k, True)
        q, k = ((torch.complex(z[..., :half], z[..., half:]) * rotation) for z in (q, k))
        # the real part of q k* is the dot product of the rotated vectors
        scores = torch.einsum("ihd,jhd->hij", q, k.conj()).real / (2 * half) ** 0.5
        attended = torch.einsum("hij,jhd->ihd", scores.exp() / scores.exp().sum(-1, keepdim=True), v)
        x = x + gate_a * linear(f"{name}.attention_out", attended.reshape(length, width))
        h = linear(f"{name}.mlp.up", norm(f"{name}.mlp_norm", x, rms) * (1 + scale_m) + shift_m)
        if block.mlp.kind in ("swiglu", "geglu"):
            gate = silu if block.mlp.kind == "swiglu" else gelu
            h = gate(h[:, : h.shape[1] // 2]) * h[:, h.shape[1] // 2 :]
        else:
            h = {"gelu": gelu, "gelu_erf": exact_gelu, "relu2": lambda z: z.clamp(min=0) ** 2}[block.mlp.kind](h)
        x = x + gate_m * linear(f"{name}.mlp.down", h)
    shift, scale = modulations("head", 2)
    x = norm("head.norm", x, isinstance(model.head.norm, RMSNorm)) * (1 + scale) + shift
    if "head.dense.weight" in w:
        x = norm("head.dense_norm", exact_gelu(linear("head.dense", x)), isinstance(model.head.norm, RMSNorm))
    if "head.out.gain" in w:
        return w["head.out.gain"] * x / 0.02 @ w["embedding.weight"][:20].T + w["head.out.bias"]
    return linear("head.out", x)


@pytest.mark.parametrize("model", [MODEL, *VARIANTS], ids=["default", *map(str, OPTIONS)])
def test_logits_equal_the_published_formulas(model: DiT) -> None:
    batch, sigma = random_batch([7, 1, 12]), torch.tensor([0.01, 3.0, 0.7])
    expected = [
        logits_by_formulas(model, tokens, float(level))
        for tokens, level in zip(batch.unpack(batch.tokens), sigma.double(), strict=True)
    ]
    torch.testing.assert_close(model(batch, sigma).double(), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_the_order_of_sequences_in_a_pack_does_not_matter() -> None:
    batch, sigma = random_batch([7, 12, 5]), torch.tensor([0.1, 1.0, 4.0])
    parts = batch.unpack(batch.tokens)
    forward = batch.unpack(MODEL(batch, sigma))
    reversed_pack = PackedBatch.pack(parts[::-1])
    backward = reversed_pack.unpack(MODEL(reversed_pack, sigma.flip(0)))
    for logits, expected in zip(forward, backward[::-1], strict=True):
        assert torch.allclose(logits, expected, atol=1e-5)


def test_a_new_model_returns_zeros_and_a_random_one_depends_on_its_inputs() -> None:
    torch.manual_seed(0)
    batch = random_batch([7, 12])
    for tied in (False, True):
        fresh = DiT(ModelConfig(**SMALL_MODEL, tie_weights=tied), "sdpa")
        assert torch.equal(fresh(batch, torch.ones(2)), torch.zeros(19, 20))
    out = MODEL(batch, torch.ones(2))
    assert not torch.allclose(out, MODEL(batch, torch.tensor([1.0, 2.0])))  # sigma changes the logits
    changed = batch.tokens.clone()
    changed[0] = (changed[0] + 1) % 20
    difference = (out - MODEL(batch.with_tokens(changed), torch.ones(2))).abs().amax(-1)
    assert (difference[:7] > 0).all()  # every token of the first sequence attends to the changed token
    assert (difference[7:] == 0).all()  # no token of the second sequence does


def test_dropout_acts_in_training_only_and_follows_the_seed() -> None:
    model, batch, sigma = make_model(dropout=0.5), random_batch([20]), torch.ones(1)
    outs = []
    for _ in range(2):
        torch.manual_seed(1)
        outs.append(model(batch, sigma))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], model(batch, sigma))
    assert torch.equal(model.eval()(batch, sigma), model(batch, sigma))


def test_tokens_that_are_not_packed_are_rejected() -> None:
    nested = torch.zeros(32, 32, 512, dtype=torch.int64)
    with raises_value_error(r"one dimension, \(total,\), got shape \(32, 32, 512\)"):
        MODEL(nested, torch.ones(32))


def test_the_number_of_sigmas_must_equal_the_number_of_sequences() -> None:
    with raises_value_error(r"sigma has shape \(3,\) for 2 sequences"):
        MODEL(random_batch([3, 4]), torch.ones(3))


def test_a_tensor_on_another_device_is_rejected() -> None:
    batch = random_batch([3, 4])
    with raises_value_error("tokens is on meta but the model is on cpu"):
        MODEL(batch.to("meta"), torch.ones(2))
    with raises_value_error("sigma is on meta but the model is on cpu"):
        MODEL(batch, torch.ones(2, device="meta"))


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        ({"hidden_size": 2560, "n_heads": 120}, r"hidden_size=2560 .*n_heads=120 \(2560 = 120 \* 21 \+ 40\)"),
        ({"hidden_size": 36, "n_heads": 4}, "hidden_size=36 / model.n_heads=4 gives head_dim 9"),
        ({"n_blocks": 0}, "n_blocks must be at least 1, got 0"),
    ],
)
def test_invalid_model_dimensions_are_rejected(dimensions: dict[str, int], message: str) -> None:
    with raises_value_error(message):
        make_model(**dimensions)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("torch_varlen", torch.bfloat16)]
)
def test_the_whole_model_runs_on_fake_cuda_tensors(backend: str, dtype: torch.dtype, mixer: str) -> None:
    """Check shapes, dtypes and devices of the CUDA path without a GPU: every fake tensor must be on CUDA."""
    with FakeTensorMode(), torch.no_grad():
        # initialisers, Module.to and autocast need a CUDA build of torch, so build the model on the fake CPU, and move
        # its parameters one by one
        options = {"hidden_size": 64, "dropout": 0.1, "mixers": ["attention", mixer]}
        model = DiT(ModelConfig(**SMALL_MODEL | options), backend)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.to("cuda:0", dtype)))
        model.sigma_embedding.mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
        sigma, batch = torch.ones(2).to("cuda:0"), random_batch([7, 40]).to("cuda:0")
        with TensorDevices() as devices:
            out = model(batch, sigma)
        assert devices.found == {"cuda"}
        assert out.device.type == "cuda"
        assert out.dtype == dtype
        assert out.shape == (47, 20)
        with raises_value_error("tokens is on cpu but the model is on cuda"):
            model(random_batch([7, 40]), sigma)


class TensorDevices(TorchDispatchMode):
    """Record in `found` the device types of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.found |= {x.device.type for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


def test_a_mixer_with_weights_that_the_block_cannot_register_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithOwnWeight(Attention):
        def __init__(self, config: ModelConfig, backend: str) -> None:
            super().__init__(config, backend)
            self.gain = torch.nn.Parameter(torch.ones(1))

    class WithMLP(Attention):
        def __init__(self, config: ModelConfig, backend: str) -> None:
            super().__init__(config, backend)
            self.mlp = torch.nn.Linear(1, 1)

    class WithDropout(Attention):
        def __init__(self, config: ModelConfig, backend: str) -> None:
            super().__init__(config, backend)
            self.drop = torch.nn.Dropout()

    mixers = (("direct", WithOwnWeight), ("mlp", WithMLP), ("dropout", WithDropout))
    for name, kind in mixers:
        monkeypatch.setitem(MIXERS, name, kind)
    with pytest.raises(ValueError, match="direct: gain must belong to a child module of the mixer"):
        DiT(ModelConfig(**SMALL_MODEL, mixers="direct"), "sdpa")
    with pytest.raises(ValueError, match="mixer mlp: the block already has a part called mlp; rename the mixer's part"):
        DiT(ModelConfig(**SMALL_MODEL, mixers="mlp"), "sdpa")
    model = DiT(ModelConfig(**SMALL_MODEL, mixers="dropout"), "sdpa").eval()
    assert not any(part.training for block in model.blocks for part in block.mixer.modules())
    assert all(part.training for block in model.train().blocks for part in block.mixer.modules())


def test_tied_weights_are_rows_of_the_embedding_and_are_stored_once() -> None:
    tied, untied = make_model(tie_weights=True), make_model()
    shapes = {name: tuple(tensor.shape) for name, tensor in untied.state_dict().items()}
    del shapes["head.out.weight"]
    assert {name: tuple(tensor.shape) for name, tensor in tied.state_dict().items()} == shapes | {
        "head.out.gain": (32,)
    }
    # all residues of the input are A, so the other rows of the embedding have a gradient only if the head uses them
    batch = PackedBatch.pack([torch.zeros(9, dtype=torch.int64)])
    for model, rows in ((tied, 20), (untied, 1)):
        F.cross_entropy(model(batch, torch.ones(1)), batch.tokens + 1).backward()
        assert int((model.embedding.weight.grad.abs().sum(1) > 0).sum()) == rows


@pytest.mark.parametrize("mlp", ["geglu", "swiglu"])
def test_gated_mlps_have_as_many_weights_as_gelu(mlp: str) -> None:
    gated, plain = (
        sum(p.numel() for p in make_model(mlp=kind, hidden_size=96).blocks.parameters() if p.ndim == 2)
        for kind in (mlp, "gelu")
    )
    assert gated == plain


@pytest.mark.parametrize("mixer", MIXERS)
def test_flops_equal_the_count_of_torch(mixer: str) -> None:
    model, lengths = MIXED[mixer], [7, 40, 16, 12]
    batch, sigma = random_batch(lengths), torch.ones(4)
    # torch does not count the FLOPs of the CPU's fused attention kernel, so use the unfused one
    with FlopCounterMode(display=False) as forward, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(batch, sigma)
    assert model.flops(lengths) == forward.get_total_flops()
    with FlopCounterMode(display=False) as forward_and_backward, sdpa_kernel(SDPBackend.MATH):
        model(batch, sigma).sum().backward()
    model.zero_grad()
    # the backward pass costs slightly less than two forward passes, as the first layer's input needs no gradient
    assert forward_and_backward.get_total_flops() == pytest.approx(3 * model.flops(lengths), rel=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mixer", MIXERS)
def test_activation_checkpointing_changes_only_memory(dropout: float, mixer: str) -> None:
    batch, sigma, found = random_batch([7, 40, 12]), torch.rand(3), []
    for checkpointing in (False, True):
        model = make_model(dropout=dropout, checkpointing=checkpointing, mixers=["attention", mixer]).train()
        saved: list[torch.Tensor] = []
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            loss = F.cross_entropy(model(batch, sigma), batch.tokens)
        found.append((gradients(model, loss), sum(x.numel() for x in saved)))
    (plain, plain_size), (checkpointed, checkpointed_size) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert checkpointed_size < plain_size / 3


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(2, 9), st.integers(-12, 12))
def test_rms_norm_and_its_gradients_equal_those_of_torch(leading: list[int], width: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x, grad = (torch.randn([*leading, width], dtype=torch.float64, generator=generator) for _ in "xg")
    x = (x * 2.0**exponent).requires_grad_()
    norm = RMSNorm(width, eps=0.01).double()
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
    expected = F.rms_norm(x, (width,), norm.weight, 0.01)
    assert torch.allclose(norm(x), expected, rtol=1e-12, atol=0)
    gradients_of_norm = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    for a, b in zip(gradients_of_norm, torch.autograd.grad(expected, (x, norm.weight), grad), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_the_gradient_of_a_modulation_is_the_sum_over_its_tokens() -> None:
    batch = random_batch([7, 40, 12])
    modulation = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(59, 8)
    parts = modulation.chunk(2, dim=-1)
    for values, part in zip(per_token(parts, batch.segment_ids), parts, strict=True):
        assert torch.equal(values, part.index_select(0, batch.segment_ids))
    values = torch.cat(per_token(parts, batch.segment_ids), dim=-1)
    (found,) = torch.autograd.grad((values * weight).sum(), modulation)
    expected = torch.stack([part.sum(0) for part in batch.unpack(weight)])
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_padded_packs_give_the_same_logits_and_gradients(mixer: str) -> None:
    model = make_model(qk_norm=True, mixers=["attention", mixer]).train()
    batch, sigma = random_batch([7, 40, 12]), torch.rand(3)
    plain = model(batch, sigma)
    expected = gradients(model, F.cross_entropy(plain, batch.tokens))
    model.pad_packs(StaticShape(128, 8, 40))
    padded = model(batch, sigma)
    assert torch.allclose(padded, plain, atol=1e-5)
    for gradient, expected_gradient in zip(
        gradients(model, F.cross_entropy(padded, batch.tokens)), expected, strict=True
    ):
        assert torch.allclose(gradient, expected_gradient, atol=1e-5)
    larger = random_batch([30] * 5)
    assert model(larger, torch.rand(5)).shape == (150, 20)  # does not fit the static shape: computed without padding
    message = (
        "sdpa reads lengths on the host" if mixer == "attention" else f"model.mixers has {mixer}, which reads lengths"
    )
    with raises_value_error(message):
        model.capture(None)


@pytest.mark.parametrize("lengths", [[7, 40, 12], [1, 3], [60, 4], [3, 126]])
def test_bf16_packs_on_a_cpu_are_padded_in_training_without_a_change_of_the_result(lengths: list[int]) -> None:
    model, batch, sizes = DiT(ModelConfig(**SMALL_MODEL), "matmul"), random_batch(lengths), []
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    sigma, found = torch.rand(len(lengths)), []
    for training in (True, False):
        model.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch, sigma)
        assert logits.shape == (sum(lengths), 20)
        found.append(torch.cat([g.flatten() for g in gradients(model, F.cross_entropy(logits, batch.tokens))]))
    assert sizes == [-(-sum(lengths) // CPU_MULTIPLE) * CPU_MULTIPLE, sum(lengths)]
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


def test_without_time_conditioning_sigma_is_ignored() -> None:
    batch = random_batch([7, 12])
    model = make_model(time_conditioning=False)
    assert torch.equal(model(batch, torch.zeros(2)), model(batch, torch.tensor([1.0, 4.0])))
    assert not [name for name, _ in model.named_parameters() if "adaln" in name or "sigma" in name]


def test_only_the_final_norm_is_modulated_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dtypes = make_model(), []

    def recorded(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        out = modulate(x, shift, scale)
        dtypes.append(out.dtype)
        return out

    for module in (block_module, layers):
        monkeypatch.setattr(module, "modulate", recorded)
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(random_batch([7, 12]), torch.ones(2))
    blocks = [torch.bfloat16] * 2 * len(model.blocks)
    assert dtypes == [*blocks, torch.float32] + [torch.float32] * (len(blocks) + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXERS)
def test_logits_on_cuda_equal_logits_on_the_cpu(mixer: str) -> None:
    model, batch, sigma = MIXED[mixer], random_batch([7, 120]), torch.ones(2)
    expected = model(batch, sigma)
    try:
        out = model.to("cuda")(batch.to("cuda"), sigma.to("cuda"))
    finally:
        model.to("cpu")
    assert torch.allclose(out.cpu(), expected, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_of_padded_packs_gives_the_gradients_of_unpadded_packs(compiled: bool) -> None:
    """Two packs of different sizes test the accumulation of gradients too."""
    packs = [random_batch([7, 120]).to("cuda"), random_batch([50, 9, 31]).to("cuda")]
    found = []
    for use_graph in (False, True):
        model = DiT(ModelConfig(**SMALL_MODEL | {"hidden_size": 64}), "torch_varlen").to("cuda")
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        if use_graph:
            if compiled:
                model.compile_blocks(dynamic=False)
            model.pad_packs(StaticShape(256, 8, 130))
            model.capture(torch.bfloat16)
        for batch in packs:
            with torch.autocast("cuda", torch.bfloat16):
                out = model(batch, torch.linspace(0.1, 2, len(batch.lengths), device="cuda"))
            F.cross_entropy(out, batch.tokens).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    plain, graphed = found
    assert (plain - graphed).norm() < 0.02 * plain.norm()


def test_token_dropout_zeroes_masks_and_scales_each_protein_by_its_unmasked_fraction() -> None:
    batch = random_batch([6, 5, 4])
    tokens = batch.tokens.clone()
    tokens[1:4] = MASK  # 3 of 6
    tokens[11:15] = MASK  # all
    batch = batch.with_tokens(tokens)
    x = torch.randn(15, 8, generator=torch.Generator().manual_seed(0))
    found = drop_masked(x, batch)
    assert not found[1:4].any()
    assert not found[11:15].any()
    torch.testing.assert_close(found[[0, 4, 5]], x[[0, 4, 5]] * 0.88 / 0.5)
    torch.testing.assert_close(found[6:11], x[6:11] * 0.88)


@pytest.mark.parametrize("options", [{"head": "lm"}, {"head": "lm", "tie_weights": True}, {"attention_bias": True}])
def test_the_options_of_esm2_leave_an_untrained_network_with_zero_logits(options: dict[str, Any]) -> None:
    network, batch = DiT(ModelConfig(**{**SMALL_MODEL, **options}), "sdpa"), random_batch([7, 4])
    assert not network(batch, torch.full((2,), 0.5)).any()


def test_gelu_erf_is_the_exact_gelu() -> None:
    layer, x = MLP(16, "gelu_erf").double(), torch.randn(5, 16, dtype=torch.float64)
    up = layer.up(x)
    expected = layer.down(up * 0.5 * (1 + torch.erf(up / 2**0.5)))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_eps_is_added_to_the_variance(norm: str) -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(make_norm(norm, 8, 0.5).double()(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "lmm"}, r"model.head=lmm: choose from linear, lm; did you mean 'lm'\?"),
        ({"rotary_frequencies": [1.0]}, "model.rotary_frequencies has 1 frequencies, but head_dim 8 has 4 pairs"),
        ({"rotary_frequencies": [1.0], "positions": "none"}, "model.rotary_frequencies has no effect with model.pos"),
        (
            {"attention_bias": True, "mixers": "ttt_linear"},
            "model.attention_bias=true has no effect with model.mixers=",
        ),
        ({"rotary_frequencies": [1.0, 1.0, 1.0, math.nan]}, "model.rotary_frequencies must be finite numbers, got"),
        ({"norm_eps": 0.0}, "model.norm_eps must be a finite number above 0, got 0.0"),
    ],
)
def test_an_option_of_esm2_that_does_not_fit_is_an_error(options: dict[str, Any], message: str) -> None:
    with raises_value_error(message):
        make_model(**options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_given_rotary_frequencies_stay_in_float32_if_the_network_is_converted(dtype: torch.dtype) -> None:
    listed = [1.0, 0.1, 0.01, 0.001]
    network = make_model(rotary_frequencies=listed).to(dtype)
    assert network.embedding.weight.dtype == dtype
    assert network.positions.frequencies.dtype == torch.float32
    torch.testing.assert_close(network.float().positions.frequencies, torch.tensor(listed), rtol=0, atol=0)


def test_given_rotary_frequencies_are_the_angles_per_position() -> None:
    frequencies = torch.tensor([0.5, 0.25])
    cos, sin = rotary_cos_sin(4, 4, frequencies=frequencies)
    angle = torch.outer(torch.arange(4.0), frequencies)
    torch.testing.assert_close(cos.squeeze()[:, :2], angle.cos())
    torch.testing.assert_close(sin.squeeze()[:, 2:], angle.sin())
    with pytest.raises(ValueError, match=r"head_dim 4 needs 2 frequencies, got \(3,\)"):
        rotary_cos_sin(4, 4, frequencies=torch.ones(3))
