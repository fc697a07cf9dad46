"""The test-time training mixers, against formulas computed one gradient step at a time with autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from protlig_dd.model.config import ModelConfig
from protlig_dd.model.mixers import MIXERS
from protlig_dd.model.mixers.fast_weights import CHUNK, InnerLinear, InnerMLP, InnerModel
from protlig_dd.model.mixers.ttt import TTT, chunks_of, flip_of
from protlig_dd.model.positions import POSITIONS

from .conftest import SMALL_MODEL, make_model, random_batch

KINDS = ("ttt_linear", "ttt_mlp")


def random_parameters(module: torch.nn.Module, std: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def one_step_at_a_time(
    inner: InnerModel, head: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eta: torch.Tensor
) -> torch.Tensor:
    """Return the output of one head for one sequence.

    For each chunk of 16 tokens, take a gradient step on the weights of the inner model, then apply the model to q.

    Args:
        q, k, v: (tokens, width).
        eta: (tokens,).
    """
    w = {name: parameter.view(inner.heads, -1)[head] for name, parameter in inner.named_parameters()}
    width = inner.width
    gain, shift = w["norm_gain"], w["norm_shift"]
    if isinstance(inner, InnerLinear):
        state = [w["matrix.weight"].view(width, width), w["bias"]]
    else:
        first, second = w["matrix_1.weight"].view(width, 4 * width), w["matrix_2.weight"].view(4 * width, width)
        state = [first, w["bias_1"], second, w["bias_2"]]

    def apply(state: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        z = x @ state[0] + state[1]
        if len(state) > 2:
            z = F.gelu(z, approximate="tanh") @ state[2] + state[3]
        return (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * gain + shift

    outputs = []
    for i in range(0, len(q), 16):
        q_c, k_c, v_c, eta_c = (x[i : i + 16] for x in (q, k, v, eta))
        loss = (eta_c * 0.5 * (apply(state, k_c) - (v_c - k_c)).square().sum(-1)).sum()
        moved = torch.autograd.grad(loss, state, create_graph=True)
        state = [old - step for old, step in zip(state, moved, strict=True)]
        outputs.append(q_c + apply(state, q_c))
    return torch.cat(outputs)


@pytest.mark.parametrize("kind", [InnerLinear, InnerMLP])
def test_the_dual_form_and_its_gradients_equal_those_of_gradient_steps(kind: type[InnerModel]) -> None:
    """The input is three chunks of one sequence and two chunks of another, in float64."""
    inner, generator = kind(2, 8).double(), torch.Generator().manual_seed(0)
    random_parameters(inner)
    q, k, v = torch.randn(3, 5, 2, CHUNK, 8, dtype=torch.float64, generator=generator)
    eta = torch.rand(5, 2, CHUNK, 1, dtype=torch.float64, generator=generator)
    found = inner(q, k, v, eta, [2, 2, 1])
    expected = torch.empty_like(found)
    for chunks in ([0, 2, 4], [1, 3]):
        for head in range(2):
            parts = [x[chunks, head].flatten(0, 1) for x in (q, k, v, eta)]
            output = one_step_at_a_time(inner, head, *parts[:3], parts[3][:, 0])
            expected[chunks, head] = output.view(len(chunks), CHUNK, 8)
    assert (found - expected).abs().max() < 1e-10
    weight = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    gradients = (torch.autograd.grad((x * weight).sum(), list(inner.parameters())) for x in (found, expected))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < 1e-10 * (1 + b.abs().max())


def by_formulas(mixer: TTT, x: torch.Tensor) -> torch.Tensor:
    """Return the mixer's output for one sequence, without position encoding, computed one gradient step at a time."""
    w = dict(mixer.named_parameters())
    heads, width = mixer.n_heads, mixer.hidden_size // mixer.n_heads
    base = {"ttt_linear": 1.0, "ttt_mlp": 0.1}[next(name for name, kind in MIXERS.items() if type(mixer) is kind)]

    def read(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (x @ w["qkv.weight"].T).view(len(x), 3, heads, width).unbind(1)
        q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
        eta = base / (1 + (-(x @ w["rate.weight"].T + w["rate.bias"])).exp()) / (width * 16)
        z = [one_step_at_a_time(mixer.inner, h, q[:, h], k[:, h], v[:, h], eta[:, h]) for h in range(heads)]
        y = torch.cat(z, dim=-1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        y = y * w["heads_norm.weight"] + w["heads_norm.bias"]
        return (F.gelu(x @ w["gate.weight"].T, approximate="tanh") * y) @ w["ttt_out.weight"].T

    forward = w["directions.forward_alpha"].tanh() * read(x)
    return forward + w["directions.backward_alpha"].tanh() * read((x + forward).flip(0)).flip(0)


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_equal_the_formulas_in_each_sequence_of_a_pack(kind: str) -> None:
    config = ModelConfig(**SMALL_MODEL, positions="none")
    mixer = MIXERS[kind](config, "sdpa").double()
    assert isinstance(mixer, TTT)
    random_parameters(mixer)
    batch = random_batch([16, 37, 1, 20])
    x = torch.randn(74, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = mixer(x, batch, POSITIONS["none"](config))
    expected = torch.cat([by_formulas(mixer, part) for part in x.split([16, 37, 1, 20])])
    assert (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_within_a_chunk_matters_only_with_positions(kind: str) -> None:
    """Without positions, permuting the tokens of a chunk permutes the outputs in the same way."""
    batch, order = random_batch([12]), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    x = torch.randn(12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for positions, equal in (("none", True), ("rope", False)):
        config = ModelConfig(**SMALL_MODEL, positions=positions)
        mixer, encoding = MIXERS[kind](config, "sdpa").double(), POSITIONS[positions](config)
        random_parameters(mixer)
        moved = mixer(x[order], batch, encoding)
        assert torch.allclose(moved, mixer(x, batch, encoding)[order], rtol=0, atol=1e-10) is equal


@given(st.lists(st.integers(1, 70), min_size=1, max_size=6))
def test_every_token_has_its_own_slot_in_a_chunk_of_its_sequence(lengths: list[int]) -> None:
    batch = random_batch(lengths)
    chunks, flipped = chunks_of(batch), flip_of(batch)
    total = sum(lengths)
    assert len(chunks.token) == 16 * sum(chunks.counts) == 16 * sum(-(-length // 16) for length in lengths)
    assert torch.equal(chunks.token[chunks.slot], torch.arange(total))
    assert torch.equal(chunks.slot.sort().values, chunks.filled.nonzero()[:, 0])
    assert (batch.segment_ids[chunks.token].view(-1, 16).diff(dim=1) == 0).all()
    in_order = [torch.arange(n) for n in chunks.counts]  # step c: chunk c of each sequence, longest first
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    expected = torch.tensor([longest_first[r] for rows in in_order for r in rows.tolist()])
    assert torch.equal(batch.segment_ids[chunks.token].view(-1, 16)[:, 0], expected)
    expected_flip = [part.flip(0) for part in torch.arange(total).split(lengths)]
    assert torch.equal(flipped, torch.cat(expected_flip))


@settings(max_examples=5)
@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=5), st.integers(0, 99))
def test_changing_a_sequence_leaves_the_others_bit_identical(kind: str, lengths: list[int], seed: int) -> None:
    batch, sigma = random_batch(lengths, seed), torch.linspace(0.1, 3, len(lengths))
    model = MODELS[kind]
    changed = torch.where(batch.segment_ids == seed % len(lengths), (batch.tokens + 1) % 20, batch.tokens)
    moved = (model(batch, sigma) != model(batch.with_tokens(changed), sigma)).any(-1)
    assert torch.equal(moved, batch.segment_ids == seed % len(lengths))


MODELS = {kind: make_model(mixers=kind) for kind in KINDS}


class Products(TorchDispatchMode):
    """Record the dtypes of batched matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_float32_under_autocast(kind: str) -> None:
    batch, sigma = random_batch([40, 7]), torch.ones(2)
    with Products() as products:
        with torch.autocast("cpu", torch.bfloat16):
            loss = MODELS[kind](batch, sigma).square().sum()
        torch.autograd.grad(loss, list(MODELS[kind].parameters()))
    assert products.dtypes == {torch.float32}
