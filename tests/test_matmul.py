"""The attention backend matmul, compared with float64."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from protlig_dd.model.mixers.attention import varlen_attention
from protlig_dd.model.mixers.matmul import LONGEST, MULTIPLE, matmul_attention

from .conftest import raises_value_error, random_batch
from .test_attention import reference

# relative errors of tensors; a number rounded to bf16 has a relative error of at most 0.004
ERROR, GRADIENT_ERROR = 0.008, 0.01


def random_qkv(tokens: int, heads: int, head_dim: int) -> Tensor:
    return torch.randn(tokens, 3, heads, head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()


def output_and_gradient(qkv: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    qkv = qkv.clone().requires_grad_()
    out = matmul_attention(qkv, lengths)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.cat([torch.randn(n, *out.shape[1:], generator=generator) for n in lengths]).bfloat16())
    assert qkv.grad is not None
    return out.detach(), qkv.grad


def distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.integers(1, 4), st.integers(2, 40))
@example([1], 1, 2)
@example([MULTIPLE - 1, MULTIPLE, MULTIPLE + 1], 2, 64)
@example([LONGEST], 1, 32)
def test_matmul_computes_attention_in_output_and_gradient(lengths: list[int], heads: int, head_dim: int) -> None:
    qkv = random_qkv(sum(lengths), heads, head_dim)
    out, gradient = output_and_gradient(qkv, lengths)
    exact_qkv = qkv.double().requires_grad_()
    expected = reference(exact_qkv, random_batch(lengths))
    generator = torch.Generator().manual_seed(1)
    weight = torch.cat([torch.randn(n, heads, head_dim, generator=generator) for n in lengths]).bfloat16()
    (expected * weight.double()).sum().backward()
    assert out.dtype == gradient.dtype == torch.bfloat16
    assert distance(out, expected.detach()) < ERROR
    assert exact_qkv.grad is not None
    # q and k of a single token have no gradient, so compare all parts relative to the whole gradient
    assert distance(gradient, exact_qkv.grad) < GRADIENT_ERROR


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=5))
def test_a_sequence_has_the_same_bits_alone_and_in_a_pack(lengths: list[int]) -> None:
    qkv = random_qkv(sum(lengths), 2, 16)
    together = matmul_attention(qkv, lengths).split(lengths)
    for part, out in zip(qkv.split(lengths), together, strict=True):
        assert torch.equal(matmul_attention(part, [len(part)]), out)


def test_sequences_that_are_not_finite_do_not_change_their_neighbours() -> None:
    lengths = [20, 7, 33]
    qkv = random_qkv(sum(lengths), 2, 16)
    out, gradient = output_and_gradient(qkv, lengths)
    qkv[20:27] = torch.nan
    out_beside, gradient_beside = output_and_gradient(qkv, lengths)
    for tensor, beside in ((out, out_beside), (gradient, gradient_beside)):
        assert beside[20:27].isnan().all()
        assert torch.equal(beside[:20], tensor[:20])
        assert torch.equal(beside[27:], tensor[27:])


def test_a_sequence_that_is_too_long_is_computed_by_torchs_kernel() -> None:
    qkv = random_qkv(LONGEST + 6, 1, 16)
    for lengths in ([5, LONGEST + 1], [6, LONGEST], [LONGEST + 1, 2, 3]):
        batch = random_batch(lengths)
        out = varlen_attention(qkv, batch, "matmul")
        assert distance(out, reference(qkv, batch)) < ERROR
        for part, found in zip(qkv.split(lengths), out.split(lengths), strict=True):
            alone = random_batch([len(part)])
            by_matmul, by_kernel = (varlen_attention(part, alone, backend) for backend in ("matmul", "sdpa"))
            assert torch.equal(found, by_matmul)  # whatever its neighbours
            assert torch.equal(found, by_kernel) == (len(part) > LONGEST)


def test_other_dtypes_are_an_error() -> None:
    batch = random_batch([5, 3])
    with raises_value_error("matmul needs bfloat16 on the CPU, but qkv is torch.float32 on cpu; use sdpa"):
        varlen_attention(random_qkv(8, 1, 16).float(), batch, "matmul")
