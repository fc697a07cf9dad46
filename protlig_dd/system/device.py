"""Device, precision and compilation available on this machine, and the environment record of a run."""

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
    """Return the device itself, or the CPU if the device has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


# oneDNN keeps the code that it compiled for the latest 1024 sizes of matrix products, which can take a gigabyte.
# oneDNN reads this variable at the first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

DEPENDENCIES = ("flash-attn", "numpy", "einops", "hydra-core", "omegaconf", "biopython", "h5py", "safetensors")
PRECISIONS = ("auto", "bf16", "fp32")
CHECKS_SHAPES = os.environ.get("PROTLIG_TYPECHECK") == "1"  # see protlig_dd/__init__.py
UNCHECKED = "torch.compile cannot compile the checks of shapes that PROTLIG_TYPECHECK=1 adds"


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the named device. `auto` is this process's GPU if there is one, else the CPU.

    Args:
        name: auto | cpu | cuda | cuda:N | mps. `cuda` is the GPU of this local rank.

    Raises:
        ValueError: the device is unknown, or this machine or torch build does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: not a device; choose from auto, cpu, cuda, cuda:N, mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={name}, but CUDA is not available (torch {torch.__version__})")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            visible = torch.cuda.device_count()
            raise ValueError(f"device={name}: GPU {index} does not exist; {visible} GPUs are visible, numbered from 0")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name}, but MPS is not available (torch {torch.__version__})")
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"device={name}: choose from auto, cpu, cuda, cuda:N, mps")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """Return bf16 or fp32. `auto` is bf16 if the hardware computes in bf16 natively, else fp32.

    Native bf16: CUDA GPUs that support it, and CPUs with AMX or AVX512-BF16.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision={name}: choose from {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    native = device.type == "cpu" and (capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return "bf16" if native else "fp32"


def resolve_compile(choice: bool | str, device: torch.device) -> bool:
    """Whether to use torch.compile. `auto` uses it on CUDA if `missing_to_compile` returns None.

    On a CPU, `auto` depends on the length of the run (see training/cost.py), and this function returns False.

    Raises:
        ValueError: `choice` is true, but this machine lacks something that torch.compile needs, or shapes are checked.
    """
    if choice == "auto":
        return device.type == "cuda" and not CHECKS_SHAPES and missing_to_compile(device) is None
    if choice and CHECKS_SHAPES:
        raise ValueError(f"trainer.compile=true: {UNCHECKED}; unset it, or use trainer.compile=false")
    if choice and (missing := missing_to_compile(device)):
        raise ValueError(f"trainer.compile=true needs {missing}; install it, or use trainer.compile=false")
    return bool(choice)


def missing_to_compile(device: torch.device) -> str | None:
    """Return what torch.compile needs and this machine lacks; None if nothing is missing.

    On a CPU, inductor compiles C++, and on CUDA, Triton compiles a launcher in C. Both include Python.h (inductor's
    codecache.py, Triton's runtime/build.py).
    """
    compilers, name = {
        "cpu": ((os.environ.get("CXX", "g++"), "clang++"), "a C++ compiler for the CPU (g++)"),
        "cuda": ((os.environ.get("CC", "gcc"), "gcc", "clang"), "a C compiler (gcc)"),
    }.get(device.type, ((), ""))
    if not name:
        return None
    if not any(map(shutil.which, compilers)):
        return name
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.is_file() else f"Python's headers ({header} is missing; install the package python3-dev)"


def obstacle_to_compiling(device: torch.device) -> str | None:
    """Return why this process cannot compile, as far as this can be known without compiling; else None."""
    if CHECKS_SHAPES:
        return UNCHECKED
    missing = missing_to_compile(device)
    return f"torch.compile needs {missing}" if missing else None


def problem_with_compiling(device: torch.device) -> str | None:
    """Compile a small function. Return None if this works, else what is missing, or the compiler's error in a line."""
    if problem := obstacle_to_compiling(device):
        return problem
    x = torch.ones(64, device=device)
    try:
        torch.compile(lambda x: x.sin().cumsum(0) + x)(x)
    except Exception as error:  # torch documents no class for the errors of compilers
        lines = str(error).strip().splitlines() or [""]
        cause = next((line.strip() for line in lines if " error: " in line), lines[0])
        return f"torch.compile fails ({type(error).__name__}: {cause}); trainer.compile=true shows the whole error"
    return None


def matmul_peak(device: torch.device, precision: str, seconds: float = 0.1, size: int | None = None) -> float:
    """Measure matrix products on this device for `seconds`, and return the FLOP/s of the fastest product.

    Args:
        size: rows and columns of the square matrices; None chooses a size at which the device reaches its peak.
    """
    if size is None:
        size = 8192 if device.type == "cuda" else min(512 * torch.get_num_threads(), 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)

    def timed() -> float:
        start = time.perf_counter()
        x @ x
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    deadline = time.perf_counter() + seconds + timed()  # not counted: the first product, which loads the library
    fastest = min(timed(), timed())
    while time.perf_counter() < deadline:
        fastest = min(fastest, timed())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / fastest


def peak_memory(device: torch.device) -> int:
    """Return this process's peak memory in bytes: GPU memory on CUDA, else resident memory of the host.

    Linux records the peak of the present program as VmHWM. The peak of `getrusage` is inherited from the program that
    started this one, so it is too large if that program needed more memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists() and (kib := status.read_text().partition("VmHWM:")[2].split()[:1]):
        return int(kib[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return versions, hardware and the source commit, for environment.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        # torch.__version__ names the build (2.13.0+cu130); the metadata of some torch wheels do not
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
    """Return the commit of the checkout that this code runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # a checkout on a machine without git
        return None
