"""Which backend runs, what the doctor says, and that every way into the kernels gives the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradprom_ext as gp
from gradprom_ext import backends, doctor

ROOT = Path(__file__).resolve().parents[2]
needs_kernels = pytest.mark.skipif("cpu" not in gp.available_backends(), reason="the compiled module is not built")


def python(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_compiled_module_is_built():
    """The suite must not pass on the reference alone by accident."""
    assert backends.extension()[1] is None
    assert gp.available_backends()[-1] == "reference"
    assert "cpu" in gp.available_backends()


def test_auto_takes_the_kernels_for_host_memory():
    opt = gp.GradPromSGD([torch.nn.Parameter(torch.ones(2))])
    assert opt.backend == "cpu"


STEP = """
import torch, gradprom_ext as gp
from tests.gradprom_ext.problems import bits, problem
params, main, aux = problem(2, seed=0, shapes=[(257, 3), (20_011,), (5,)])
opt = gp.GradPromAdamW([torch.nn.Parameter(p) for p in params], lr=0.1, gate="always", backend="cpu")
for p, g in zip(opt.param_groups[0]["params"], main): p.grad = g
opt.aux_grads = aux
opt.step()
out = torch.cat([p.detach().flatten() for p in opt.param_groups[0]["params"]])
"""


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(isa, tmp_path):
    """Fused multiply-adds round once where the baseline rounds twice: equal to a few units of the last place."""
    file = tmp_path / "out.pt"
    name = python(
        STEP + f"torch.save(out, {str(file)!r}); print(gp.backends.extension()[0].cpu_isa())", GRADPROM_CPU_ISA=isa
    )
    if name.strip() != isa:
        pytest.skip(f"this processor has no {isa}")
    namespace: dict = {}
    exec(STEP.replace('backend="cpu"', 'backend="reference"'), namespace)
    torch.testing.assert_close(torch.load(file), namespace["out"], rtol=1e-6, atol=1e-7)


@needs_kernels
def test_reading_tensors_by_attributes_gives_the_same_bits():
    """Where a PyTorch lacks the DLPack exchange API, pointers and layouts come from Python attributes."""
    code = STEP + (
        "t = torch.zeros(4, 6).t()\n"
        "half = torch.ones(6, 4, dtype=torch.bfloat16)\n"
        "gp.gradprom_([t], [torch.ones(6, 4)], [half], gate='always', backend='cpu')\n"
        "print(gp.backends.extension()[0].tensor_path(torch.empty(0)), t.sum().item())\n"
        "print(bits(out).hex())\n"
    )
    by_exchange, by_attributes = (
        python(code, **env).split("\n", 1) for env in ({}, {"GRADPROM_TENSORS": "attributes"})
    )
    assert by_exchange[0].startswith("exchange ")
    assert by_attributes[0].startswith("attributes ")
    assert by_exchange[0].split()[1] == by_attributes[0].split()[1]
    assert by_exchange[1] == by_attributes[1]


@needs_kernels
def test_torch_threads_are_the_kernels_threads():
    """One OpenMP runtime for both: a second one would ignore torch.set_num_threads and fight for the cores."""
    maps = python(
        "import torch, gradprom_ext as gp; gp.available_backends(); torch.ones(1 << 20).sum()\n"
        "print('\\n'.join(sorted({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'iomp' in l})))"
    )
    assert len(maps.split()) == 1, f"several OpenMP runtimes are loaded: {maps}"


def test_without_the_compiled_module_the_reference_works_and_says_so():
    out = python(
        "import sys; sys.modules['gradprom_ext._C'] = None\n"
        "import warnings, torch, gradprom_ext as gp\n"
        "from gradprom_ext import doctor\n"
        "print(gp.available_backends())\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3):\n"
        "        p = torch.ones(2); gp.gradprom_([p], [torch.ones(2)], [torch.ones(2)], lr=1.0)\n"
        "print(p.tolist(), len(caught), caught[0].message)\n"
        "print(doctor.report())"
    )
    assert out.startswith("['reference']")
    assert (
        "[-1.0, -1.0] 1 gradprom_ext runs its slow reference on cpu (cpu: the compiled module cannot be imported" in out
    )
    assert "install a C++17 compiler" in out and "install gradprom_ext again" in out


def test_doctor(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for backend in backends.BACKENDS:
        assert f"  {backend.name}" in text
    assert str(torch.get_num_threads()) + " threads" in text


def test_a_missing_compiler_is_one_line_and_no_failure():
    result = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "CXX": "/nowhere/c++"},
    )
    assert result.returncode == 0, result.stderr
    line = [text for text in result.stderr.splitlines() if "gradprom_ext" in text]
    assert len(line) == 1
    assert "no C++ compiler found" in line[0]
    assert "apt-get install g++" in line[0]


def test_importing_the_library_does_not_import_the_experiments():
    heavy = python(
        "import sys, gradprom_ext\n"
        "print(sorted({'monai','matplotlib','skimage','torchmetrics','tyro','rich','scipy'} & set(sys.modules)))"
    )
    assert heavy.strip() == "[]"
