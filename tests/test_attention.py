import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from protlig_dd.batch import PackedBatch
from protlig_dd.model.mixers.attention import (
    check_attention_input,
    has_flash_attn,
    resolve_attention_backend,
    varlen_attention,
)

from .conftest import random_batch, refuses


def reference(qkv: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """softmax(q k^T / sqrt d) v over one (total, total) matrix with other sequences masked out."""
    q, k, v = qkv.double().permute(1, 2, 0, 3)
    scores = q @ k.transpose(-1, -2) / qkv.shape[-1] ** 0.5
    same = batch.segment_ids[:, None] == batch.segment_ids[None, :]
    weights = scores.masked_fill(~same, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 16))
def test_sdpa_equals_masked_attention_in_output_and_gradient(lengths: list[int], heads: int, head_dim: int) -> None:
    batch = random_batch(lengths)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(sum(lengths), heads, head_dim, generator=torch.Generator().manual_seed(1))
    mine, theirs = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    out, expected = varlen_attention(mine, batch, "sdpa"), reference(theirs, batch)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(mine.grad, theirs.grad.float(), atol=1e-4)


BATCH = random_batch([3, 5])
CUDA_BACKENDS = ("flash_attn", "torch_varlen")


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (torch.float32, 16, "takes bfloat16 or float16, qkv is torch.float32; use sdpa"),
        (torch.bfloat16, 10, r"takes a head_dim in 8, 16, .. 256, got 10"),
        (torch.bfloat16, 264, r"takes a head_dim in 8, 16, .. 256, got 264"),
    ],
)
def test_dtypes_and_head_dims_of_the_cuda_backends(
    backend: str, dtype: torch.dtype, head_dim: int, message: str
) -> None:
    """On a CUDA tensor without a GPU: the check must stand before the kernel."""
    with FakeTensorMode():
        batch = random_batch([3, 5]).to("cuda:0")
        qkv = torch.zeros(8, 3, 2, head_dim, dtype=dtype, device="cuda:0")
        with refuses(message):
            varlen_attention(qkv, batch, backend)


@pytest.mark.parametrize("backend", ["sdpa", *CUDA_BACKENDS])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 3, 2), r"\(total, 3, heads, head_dim\), got \(8, 3, 2\)"),
        ((8, 2, 2, 16), r"got \(8, 2, 2, 16\)"),
        ((9, 3, 2, 16), "qkv has 9 tokens but the pack's lengths sum to 8"),
    ],
)
def test_shapes_are_checked_before_every_backend(backend: str, shape: tuple[int, ...], message: str) -> None:
    with refuses(message):
        varlen_attention(torch.zeros(shape), BATCH, backend)


@pytest.mark.parametrize("backend", ["sdpa", *CUDA_BACKENDS])
def test_devices_and_geometry_are_checked_before_every_backend(backend: str) -> None:
    with refuses("qkv is on meta but cu_seqlens is on cpu"):
        varlen_attention(torch.zeros(8, 3, 2, 16, device="meta"), BATCH, backend)
    # a frozen dataclass refuses wrong geometry itself; the check stands before the kernels all the same
    broken = dataclasses.replace(BATCH)
    object.__setattr__(broken, "cu_seqlens", BATCH.cu_seqlens.long())
    with refuses(r"cu_seqlens must be \(3,\) torch.int32, got \(3,\) torch.int64"):
        check_attention_input(torch.zeros(8, 3, 2, 16), broken, backend)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_backends_refuse_what_their_kernels_cannot_take(backend: str) -> None:
    with pytest.raises(ValueError, match=f"{backend} runs on CUDA, qkv is on cpu"):
        varlen_attention(torch.zeros(8, 3, 2, 16), BATCH, backend)


def test_unknown_backends_are_refused() -> None:
    with refuses("no attention backend 'xformers'; the backends are flash_attn"):
        varlen_attention(torch.zeros(8, 3, 2, 16), BATCH, "xformers")


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HAS_FLASH = has_flash_attn()


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        (CPU, "bf16", "sdpa"),
        (CPU, "fp32", "sdpa"),
        (CUDA, "fp32", "sdpa"),
        (CUDA, "bf16", "flash_attn" if HAS_FLASH else "torch_varlen"),
    ],
)
def test_auto_takes_what_runs(device: torch.device, precision: str, expected: str) -> None:
    assert resolve_attention_backend("auto", device, precision, 64) == expected


def test_explicit_backends_that_cannot_run_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_attention_backend("torch_varlen", CUDA, "bf16", 64) == "torch_varlen"
    with refuses("torch_varlen needs bf16, the precision is fp32"):
        resolve_attention_backend("torch_varlen", CUDA, "fp32", 64)
    with refuses("torch_varlen runs on CUDA, the device is cpu"):
        resolve_attention_backend("torch_varlen", CPU, "bf16", 64)
    assert resolve_attention_backend("auto", CUDA, "bf16", 10) == "sdpa"
    with refuses("takes a head_dim in 8, 16, .. 256, got 10"):
        resolve_attention_backend("torch_varlen", CUDA, "bf16", 10)
    with refuses("no attention backend 'flash'"):
        resolve_attention_backend("flash", CPU, "bf16", 64)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with refuses(r"flash-attn is not installed: pip install 'protlig_dd\[flash\]'"):
        resolve_attention_backend("flash_attn", CUDA, "bf16", 64)


def test_a_package_without_the_kernel_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash-attn 4 leaves one: its code is in flash_attn/cute, and flash_attn itself has nothing."""
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert resolve_attention_backend("auto", CUDA, "bf16", 64) == "torch_varlen"
    with refuses("flash-attn is not installed"):
        resolve_attention_backend("flash_attn", CUDA, "bf16", 64)
    sys.modules.pop("flash_attn", None)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_backends_equal_sdpa(backend: str) -> None:
    if backend == "flash_attn" and not HAS_FLASH:
        pytest.skip("flash-attn is not installed")
    batch = random_batch([3, 64, 129]).to("cuda")
    qkv = torch.randn(196, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    mine, theirs = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    out, expected = varlen_attention(mine, batch, backend), varlen_attention(theirs, batch, "sdpa")
    assert torch.allclose(out, expected, atol=2e-2)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(mine.grad, theirs.grad, atol=5e-2)
