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

from .conftest import raises_value_error, random_batch


def reference(qkv: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Return softmax(q k^T / sqrt d) v. Scores between tokens of different sequences are masked with -inf."""
    q, k, v = qkv.double().permute(1, 2, 0, 3)
    scores = q @ k.transpose(-1, -2) / qkv.shape[-1] ** 0.5
    same_sequence = batch.segment_ids[:, None] == batch.segment_ids[None, :]
    weights = scores.masked_fill(~same_sequence, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 16))
def test_sdpa_equals_masked_attention_in_output_and_gradient(lengths: list[int], heads: int, head_dim: int) -> None:
    batch = random_batch(lengths)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(sum(lengths), heads, head_dim, generator=torch.Generator().manual_seed(1))
    sdpa_qkv, reference_qkv = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    out, expected = varlen_attention(sdpa_qkv, batch, "sdpa"), reference(reference_qkv, batch)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert sdpa_qkv.grad is not None
    assert reference_qkv.grad is not None
    assert torch.allclose(sdpa_qkv.grad, reference_qkv.grad.float(), atol=1e-4)


BATCH = random_batch([3, 5])
CUDA_BACKENDS = ("flash_attn", "torch_varlen")


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (torch.float32, 16, "needs bfloat16 or float16, but qkv is torch.float32; use sdpa"),
        (torch.bfloat16, 10, "needs a head_dim that is a multiple of 8 and at most 256, got 10; use sdpa"),
        (torch.bfloat16, 264, "needs a head_dim that is a multiple of 8 and at most 256, got 264; use sdpa"),
    ],
)
def test_cuda_backends_reject_unsupported_dtypes_and_head_dims(
    backend: str, dtype: torch.dtype, head_dim: int, message: str
) -> None:
    """The check must run before the kernel. Fake CUDA tensors test this without a GPU."""
    with FakeTensorMode():
        batch = random_batch([3, 5]).to("cuda:0")
        qkv = torch.zeros(8, 3, 2, head_dim, dtype=dtype, device="cuda:0")
        with raises_value_error(message):
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
    with raises_value_error(message):
        varlen_attention(torch.zeros(shape), BATCH, backend)


@pytest.mark.parametrize("backend", ["sdpa", *CUDA_BACKENDS])
def test_devices_and_cu_seqlens_are_checked_before_every_backend(backend: str) -> None:
    with raises_value_error("qkv is on meta but cu_seqlens is on cpu"):
        varlen_attention(torch.zeros(8, 3, 2, 16, device="meta"), BATCH, backend)
    # a pack with wrong cu_seqlens cannot be created, so set them afterwards; the check must find them too
    broken = dataclasses.replace(BATCH)
    object.__setattr__(broken, "cu_seqlens", BATCH.cu_seqlens.long())
    with raises_value_error(r"cu_seqlens must be \(3,\) torch.int32, got \(3,\) torch.int64"):
        check_attention_input(torch.zeros(8, 3, 2, 16), broken, backend)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_backends_reject_cpu_tensors(backend: str) -> None:
    with pytest.raises(ValueError, match=f"{backend} runs on CUDA, but qkv is on cpu"):
        varlen_attention(torch.zeros(8, 3, 2, 16), BATCH, backend)


def test_unknown_backends_are_rejected() -> None:
    with raises_value_error("unknown attention backend 'xformers'; choose from flash_attn"):
        varlen_attention(torch.zeros(8, 3, 2, 16), BATCH, "xformers")


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HAS_FLASH = has_flash_attn()


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        (CPU, "bf16", "matmul"),
        (CPU, "fp32", "sdpa"),
        (CUDA, "fp32", "sdpa"),
        (CUDA, "bf16", "flash_attn" if HAS_FLASH else "torch_varlen"),
    ],
)
def test_auto_selects_a_backend_for_the_device_and_the_precision(
    device: torch.device, precision: str, expected: str
) -> None:
    assert resolve_attention_backend("auto", device, precision, 64) == expected


def test_explicit_backends_that_cannot_run_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_attention_backend("torch_varlen", CUDA, "bf16", 64) == "torch_varlen"
    with raises_value_error("torch_varlen needs bf16, but the precision is fp32"):
        resolve_attention_backend("torch_varlen", CUDA, "fp32", 64)
    with raises_value_error("torch_varlen runs on CUDA, but the device is cpu"):
        resolve_attention_backend("torch_varlen", CPU, "bf16", 64)
    assert resolve_attention_backend("matmul", CPU, "bf16", 10) == "matmul"
    with raises_value_error("attention_backend=matmul needs bf16, but the precision is fp32; use sdpa or auto"):
        resolve_attention_backend("matmul", CPU, "fp32", 64)
    with raises_value_error("attention_backend=matmul runs on CPU, but the device is cuda:0; use sdpa or auto"):
        resolve_attention_backend("matmul", CUDA, "bf16", 64)
    assert resolve_attention_backend("auto", CUDA, "bf16", 10) == "sdpa"
    with raises_value_error("needs a head_dim that is a multiple of 8 and at most 256, got 10; use sdpa or auto"):
        resolve_attention_backend("torch_varlen", CUDA, "bf16", 10)
    with raises_value_error("unknown attention backend 'flash'; choose from auto"):
        resolve_attention_backend("flash", CPU, "bf16", 64)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with raises_value_error(r"flash-attn is not installed: pip install 'protlig_dd\[flash\]'"):
        resolve_attention_backend("flash_attn", CUDA, "bf16", 64)


def test_a_flash_attn_package_without_the_kernel_counts_as_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flash-attn 4 installs such a package: its code is in flash_attn/cute, and flash_attn itself is empty."""
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert resolve_attention_backend("auto", CUDA, "bf16", 64) == "torch_varlen"
    with raises_value_error("flash-attn is not installed"):
        resolve_attention_backend("flash_attn", CUDA, "bf16", 64)
    sys.modules.pop("flash_attn", None)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_backends_equal_sdpa(backend: str) -> None:
    if backend == "flash_attn" and not HAS_FLASH:
        pytest.skip("flash-attn is not installed")
    batch = random_batch([3, 64, 129]).to("cuda")
    qkv = torch.randn(196, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    cuda_qkv, sdpa_qkv = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    out, expected = varlen_attention(cuda_qkv, batch, backend), varlen_attention(sdpa_qkv, batch, "sdpa")
    assert torch.allclose(out, expected, atol=2e-2)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert cuda_qkv.grad is not None
    assert sdpa_qkv.grad is not None
    assert torch.allclose(cuda_qkv.grad, sdpa_qkv.grad, atol=5e-2)
