import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from protlig_dd.system import device as device_module
from protlig_dd.system.device import (
    describe_environment,
    matmul_peak,
    missing_to_compile,
    peak_memory,
    problem_with_compiling,
    resolve_compile,
    resolve_device,
    resolve_precision,
)
from protlig_dd.system.distributed import Processes, join_group
from protlig_dd.system.random import keyed_generator, random_key

from .conftest import Command


def test_device_auto_is_cuda_if_available_otherwise_the_cpu() -> None:
    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert str(resolve_device("auto")) == expected
    assert str(resolve_device("cpu")) == "cpu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", r"device=cuda, but CUDA is not available \(torch "),
        ("cuda:1", r"device=cuda:1, but CUDA is not available"),
        ("mps", r"device=mps, but MPS is not available"),
        ("gpu", "device=gpu: not a device"),
        ("meta", "device=meta: choose from auto, cpu, cuda, cuda:N, mps"),
    ],
)
def test_explicit_devices_must_exist(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        resolve_device(name)


def test_a_single_process_sets_its_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs are captured on the current GPU, so it must be the GPU of the tensors."""
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    join_group(Processes(0, 1, 0), torch.device("cuda:1"), 1, None)
    join_group(Processes(0, 1, 0), torch.device("cpu"), 1, None)
    assert chosen == [torch.device("cuda:1")]


def test_compile_auto_is_false_on_a_gpu_machine_that_cannot_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "CHECKS_SHAPES", False)
    cuda = torch.device("cuda:0")
    compiler = tmp_path / "bin/gcc"
    compiler.parent.mkdir()
    monkeypatch.setenv("PATH", str(compiler.parent))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    for missing in ("a C compiler", "Python's headers"):
        assert str(missing_to_compile(cuda)).startswith(missing)
        assert resolve_compile("auto", cuda) is False
        with pytest.raises(ValueError, match=f"trainer.compile=true needs {missing}.*; install it, or use"):
            resolve_compile(True, cuda)
        assert resolve_compile(False, cuda) is False
        compiler.touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    assert missing_to_compile(cuda) is None
    assert resolve_compile("auto", cuda) is resolve_compile(True, cuda) is True
    compiler.rename(compiler.with_name("my-cc"))
    monkeypatch.setenv("CC", "my-cc")
    assert resolve_compile("auto", cuda) is True


def test_a_compiler_that_does_not_work_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_python: Command
) -> None:
    monkeypatch.setattr(device_module, "CHECKS_SHAPES", False)
    compiler, header, cpu = tmp_path / "c++", tmp_path / "Python.h", torch.device("cpu")
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda *arguments, **options: {"include": str(tmp_path)})
    assert problem_with_compiling(cpu) == "torch.compile needs a C++ compiler for the CPU (g++)"
    error = "echo 'a.cpp:1: fatal error: omp.h: No such file' >&2; exit 1"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo "g++ 13" ;; *) {error} ;; esac\n')
    compiler.chmod(0o755)
    assert str(problem_with_compiling(cpu)).startswith(f"torch.compile needs Python's headers ({header} is missing")
    header.touch()
    # in a new process, because torch reads CXX only once, and remembers the compiler
    code = f"""
import sysconfig, torch
paths = sysconfig.get_paths() | {{"include": {str(tmp_path)!r}}}
sysconfig.get_paths = lambda *arguments, **options: paths
from protlig_dd.system.device import problem_with_compiling
print(problem_with_compiling(torch.device("cpu")))
"""
    variables = {name: os.environ[name] for name in ("CXX", "PATH", "TORCHINDUCTOR_CACHE_DIR")}
    done = run_python("-c", code, new=True, PROTLIG_TYPECHECK="0", **variables)
    problem = done.stdout.strip()
    message = r"torch.compile fails \(\w+: a.cpp:1: fatal error: omp.h: No such file\)"
    assert re.match(message, problem), done.stdout + done.stderr
    assert problem.endswith("); trainer.compile=true shows the whole error")
    assert "\n" not in problem
    monkeypatch.setattr(device_module, "CHECKS_SHAPES", True)
    assert str(problem_with_compiling(cpu)).endswith("that PROTLIG_TYPECHECK=1 adds")
    assert not resolve_compile("auto", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"trainer.compile=true: .* PROTLIG_TYPECHECK=1 adds; unset it, or use"):
        resolve_compile(True, cpu)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_matmul_peak_is_the_rate_of_the_fastest_product_except_the_first(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first product takes 0.1 s and does not count. The next products take 1 s, 2 s and 0.5 s. At 9 s the deadline,
    # 0.1 s + 5 s, has passed.
    ticks = iter([0.0, 0.0, 0.1, 1.0, 2.0, 2.0, 4.0, 4.0, 5.0, 5.5, 9.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert matmul_peak(torch.device("cpu"), precision, seconds=5.0, size=64) == 2 * 64**3 / 0.5


def test_without_git_the_recorded_commit_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert describe_environment(torch.device("cpu"))["git_commit"] is None


def test_a_gpu_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(resolve_device("cuda", local_rank=1)) == "cuda:1"
    with pytest.raises(ValueError, match="device=cuda:2: GPU 2 does not exist; 2 GPUs are visible"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(
    ("capabilities", "expected"), [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({}, "fp32")]
)
def test_precision_auto_is_bf16_on_cpus_that_compute_in_it(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", torch.device("cpu")) == expected
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
    with pytest.raises(ValueError, match="precision=fp8"):
        resolve_precision("fp8", torch.device("cpu"))


def test_the_environment_record_has_versions_and_threads() -> None:
    record = describe_environment(torch.device("cpu"))
    assert record["versions"]["torch"] == torch.__version__
    assert record["threads"] >= 1


def test_random_keys_depend_on_seed_purpose_and_index() -> None:
    keys = {random_key(seed, purpose, index) for seed in (0, 1) for purpose in ("a", "b") for index in range(50)}
    assert len(keys) == 200
    first, second = (keyed_generator(1, "noise", 7, torch.device("cpu")) for _ in range(2))
    assert torch.equal(torch.rand(9, generator=first), torch.rand(9, generator=second))


PEAK = "import torch; from protlig_dd.system.device import peak_memory; print(peak_memory(torch.device('cpu')))"
LARGE = f"import subprocess, sys; full = b'x' * (1 << 30); subprocess.run([sys.executable, '-c', {PEAK!r}], check=True)"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not record the peak of one program")
def test_the_peak_memory_of_a_process_does_not_contain_that_of_its_parent() -> None:
    """The peak of `getrusage` contains that of the parent, because a program inherits the peak of its parent."""
    alone, of_large_parent = (
        int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for code in (PEAK, LARGE)
    )
    assert of_large_parent < alone + (1 << 29)


def test_peak_memory_grows_with_what_a_process_holds() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + (1 << 24))  # 64 MiB more than the peak so far
    assert peak_memory(torch.device("cpu")) > before + held.nbytes - (1 << 24) - before
