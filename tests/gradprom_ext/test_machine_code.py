"""What the compiler made of the CUDA kernels, read out of the built module: no GPU is needed for that."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from gradprom_ext import backends

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ptxas_report", ROOT / "benchmarks" / "ptxas_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def module(report) -> tuple[str, Path]:
    """A ``cuobjdump``, and the compiled module."""
    extension, problem = backends.extension()
    if extension is None or not extension.CUDA_ARCHITECTURES:
        pytest.skip(problem or "the CUDA kernels are not built: no nvcc was found when the package was installed")
    tool = report.find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump was found, neither on the path nor with Triton")
    return tool, Path(extension.__file__)


@pytest.fixture(params=["80", "90"])
def arch(request, module) -> str:
    if f"{request.param}-real" not in backends.extension()[0].CUDA_ARCHITECTURES:
        pytest.skip(f"the kernels are not built for sm_{request.param}")
    return request.param


STEP_KERNELS = {f"step ({rule}, {n} gradients)" for rule in ("sgd", "adam") for n in range(1, 6)}


def test_memory_is_accessed_16_bytes_at_a_time_and_nothing_spills(report, module, arch):
    """For every number of gradients: device memory and shared memory by vectors, no local memory at all."""
    kernels = report.instructions(*module, arch)
    assert set(kernels) >= STEP_KERNELS
    for name in STEP_KERNELS:
        counts = kernels[name]
        assert min(counts[key] for key in ("ldg_128", "stg_128", "lds_128", "sts_128")) >= 2, (name, counts)
        assert counts["local"] == 0, (name, counts)


def test_a_block_of_512_threads_fits_a_multiprocessor(report, module, arch):
    """At most 128 registers a thread, no stack, and little static shared memory: the rest is for gradients."""
    command = [module[0], "--dump-resource-usage", "--gpu-architecture", f"sm_{arch}", str(module[1])]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    kernels = {report.short_name(name): tuple(map(int, numbers)) for name, *numbers in usage}
    assert set(kernels) >= STEP_KERNELS, text[:2000]
    for name in STEP_KERNELS:
        registers, stack, shared = kernels[name]
        assert registers <= 128, name
        assert stack == 0, name
        assert shared <= 4096, name
