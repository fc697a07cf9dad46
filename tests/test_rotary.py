import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.model.positions.rotary import apply_rotary_pos_emb, gather_rotary, rotary_cos_sin

from .conftest import raises_value_error, random_batch


def complex_reference(x: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """Rotate (batch, seq, heads, d) by multiplying complex numbers x[j] + i x[j + d/2] with e^(i m theta_j)."""
    half = x.shape[-1] // 2
    number = torch.complex(x[..., :half].double(), x[..., half:].double())
    theta = base ** (-torch.arange(half, dtype=torch.float64) / half)
    rotation = torch.polar(torch.ones(x.shape[1], half, dtype=torch.float64), torch.arange(x.shape[1])[:, None] * theta)
    rotated = number * rotation[None, :, None, :]
    return torch.cat([rotated.real, rotated.imag], dim=-1)


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 3), st.integers(0, 99))
def test_queries_and_keys_equal_the_complex_reference_and_values_are_unchanged(
    length: int, half: int, heads: int, seed: int
) -> None:
    qkv = torch.randn(2, length, 3, heads, 2 * half, generator=torch.Generator().manual_seed(seed))
    out = apply_rotary_pos_emb(qkv, *rotary_cos_sin(length, 2 * half))
    for i in (0, 1):
        assert torch.allclose(out[:, :, i].double(), complex_reference(qkv[:, :, i]), atol=1e-5)
    assert torch.equal(out[:, :, 2], qkv[:, :, 2])


def test_the_rotation_does_not_depend_on_how_many_positions_are_rotated_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qkv, tables = torch.randn(2, 50, 3, 2, 8), rotary_cos_sin(50, 8)
    together = apply_rotary_pos_emb(qkv, *tables)
    for numbers in (1, 500):  # 1 position at a time, and 7 with each thread
        monkeypatch.setattr("protlig_dd.model.positions.rotary.CACHED_NUMBERS", numbers)
        assert torch.equal(apply_rotary_pos_emb(qkv, *tables), together)


@pytest.mark.parametrize(("table", "length"), [(512, 16384), (16384, 512)])
def test_a_table_that_is_too_long_or_too_short_is_an_error(table: int, length: int) -> None:
    qkv = torch.zeros(2, length, 3, 8, 64, device="meta")
    cos, sin = rotary_cos_sin(table, 64, device="meta")
    with pytest.raises(ValueError, match=rf"length {table} against {length}"):
        apply_rotary_pos_emb(qkv, cos, sin)


def test_invalid_shapes_and_head_dims_are_errors() -> None:
    cos, sin = rotary_cos_sin(10, 32)
    with raises_value_error("head_dim 32 against 64"):
        apply_rotary_pos_emb(torch.zeros(1, 10, 3, 2, 64), cos, sin)
    with raises_value_error(r"\(batch, seq_len, 3, heads, head_dim\), got \(10, 3, 2, 32\)"):
        apply_rotary_pos_emb(torch.zeros(10, 3, 2, 32), cos, sin)
    with raises_value_error("rotary sin has shape"):
        apply_rotary_pos_emb(torch.zeros(1, 10, 3, 2, 32), cos, rotary_cos_sin(9, 32)[1])
    with raises_value_error("must be even, got 33"):
        rotary_cos_sin(10, 33)
    with raises_value_error("at least 1, got 0"):
        rotary_cos_sin(0, 32)


def test_tables_are_float32_and_the_result_has_the_dtype_of_qkv() -> None:
    cos, sin = rotary_cos_sin(2048, 64)
    assert cos.dtype == sin.dtype == torch.float32
    qkv = torch.randn(1, 2048, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    rotated = apply_rotary_pos_emb(qkv.bfloat16(), cos, sin)
    assert rotated.dtype == torch.bfloat16
    # the rotation is computed in float32, so only the input and the result are rounded
    assert torch.equal(rotated, apply_rotary_pos_emb(qkv.bfloat16().float(), cos, sin).bfloat16())


def test_packed_tokens_get_the_table_rows_of_their_positions() -> None:
    batch = random_batch([3, 5])
    cos, sin = rotary_cos_sin(5, 8)
    packed_cos, packed_sin = gather_rotary(cos, sin, batch)
    assert torch.equal(packed_cos[0, :3], cos[0, :3])
    assert torch.equal(packed_sin[0, 3:], sin[0])
    with raises_value_error("table has 4 positions but a sequence has 5 tokens"):
        gather_rotary(*rotary_cos_sin(4, 8), batch)


def test_scores_depend_on_relative_positions_only() -> None:
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    qkv = torch.stack([q.expand(40, 1, 16), k.expand(40, 1, 16), k.expand(40, 1, 16)], dim=1)[None]
    out = apply_rotary_pos_emb(qkv, *rotary_cos_sin(40, 16))[0]
    scores = out[:, 0, 0] @ out[:, 1, 0].T
    for shift in (-7, 0, 3):
        diagonal = scores.diagonal(shift)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)


@given(st.integers(1, 20), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_gradient_equals_that_of_the_complex_reference(length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(length)
    qkv = torch.randn(1, length, 3, 2, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(1, length, 3, 2, 8, generator=generator)
    (gradient,) = torch.autograd.grad((apply_rotary_pos_emb(qkv, *rotary_cos_sin(length, 8)) * weight).sum(), qkv)
    rotated = [complex_reference(qkv[:, :, i]) for i in (0, 1)]
    (expected,) = torch.autograd.grad((torch.stack([*rotated, qkv[:, :, 2].double()], 2) * weight).sum(), qkv)
    assert torch.allclose(gradient.float(), expected.float(), atol=1e-5 if dtype is torch.float32 else 2e-2)
