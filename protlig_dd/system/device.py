"""What this machine can do, and the record of it that a run keeps."""

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU where it has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


DEPENDENCIES = ("flash-attn", "numpy", "einops", "hydra-core", "omegaconf", "biopython", "h5py", "safetensors")
PRECISIONS = ("auto", "bf16", "fp32")


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is this process's GPU where there is one, else the CPU; anything else must exist.

    Args:
        name: auto | cpu | cuda | cuda:N | mps. `cuda` is the local rank's GPU.

    Raises:
        ValueError: an unknown device, or one that this machine or torch build does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: not a device; use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={name}, but CUDA is not available (torch {torch.__version__})")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device={name}: GPU {index} of {torch.cuda.device_count()}")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name}, but MPS is not available (torch {torch.__version__})")
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"device={name}: use auto, cpu, cuda, cuda:N or mps")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware computes in it (CUDA, CPUs with AMX or AVX512-BF16), else fp32."""
    if name not in PRECISIONS:
        raise ValueError(f"precision={name}; there are {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    native = device.type == "cpu" and (capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return "bf16" if native else "fp32"


def resolve_compile(choice: bool | str, device: torch.device) -> bool:
    """Whether torch.compile is used: `auto` says yes on CUDA, where Triton comes with torch, unless it cannot work.

    Raises:
        ValueError: wanted on a machine that lacks what it takes.
    """
    if choice == "auto":
        return device.type == "cuda" and missing_to_compile(device) is None
    if choice and (missing := missing_to_compile(device)):
        raise ValueError(f"trainer.compile=true needs {missing}; install it, or use trainer.compile=false")
    return bool(choice)


def missing_to_compile(device: torch.device) -> str | None:
    """What torch.compile takes that this machine lacks; None if nothing.

    On a CPU inductor compiles C++; on CUDA Triton compiles a launcher in C, which includes Python.h (its
    runtime/build.py).
    """
    if device.type == "cpu":
        there = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
        return None if there else "a C++ compiler on a CPU (g++)"
    if device.type == "cuda":
        if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
            return "a C compiler (gcc)"
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        return None if header.is_file() else f"Python's headers ({header} is not there; the package python3-dev)"
    return None


def matmul_peak(device: torch.device, precision: str, seconds: float = 0.1, size: int | None = None) -> float:
    """FLOP/s of this device's matrix products: the fastest of those that fit into `seconds`, measured now.

    Args:
        size: rows and columns of the square matrices; None is large enough for the device to reach its peak.
    """
    if size is None:
        size = 8192 if device.type == "cuda" else min(512 * torch.get_num_threads(), 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)

    def timed() -> float:
        since = time.perf_counter()
        x @ x
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - since

    until = time.perf_counter() + seconds + timed()  # the first one loads the library
    fastest = min(timed(), timed())
    while time.perf_counter() < until:
        fastest = min(fastest, timed())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / fastest


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has taken at most: of the GPU's memory, or of the machine's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and the source commit, for environment.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        # torch names its build (2.13.0+cu130), which the metadata of some of its wheels leave out
        "versions": {"torch": str(torch.__version__)}
        | {name: version for name in DEPENDENCIES if (version := _version(name))},
        "device_name": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout this code runs from; None when it was installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # a checkout on a machine without git
        return None
