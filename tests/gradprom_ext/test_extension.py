"""What every step needs of the compiled module beside its kernels, in C++ and in Python."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gradprom_ext import _extension


@pytest.fixture(params=["compiled", "python"])
def functions(request):
    if request.param == "python":
        return _extension._in_python()
    module, problem = _extension.extension()
    if module is None:
        pytest.skip(problem)
    return module.same_objects, module.grads_of


def test_the_same_objects(functions):
    a, b, c = torch.ones(2), torch.ones(2), object()
    same, _ = functions
    assert same([], [])
    assert same([a, None, c], [a, None, c])
    assert not same([a], [b])
    assert not same([a, b], [b, a])
    assert not same([a], [a, a])


def test_gradients(functions):
    class Overridden(torch.nn.Parameter):
        grad = property(lambda self: "mine")

    plain, without = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    plain.grad = torch.zeros(2)
    _, grads = functions
    found = grads([plain, without, Overridden(torch.ones(2))])
    assert found[0] is plain.grad
    assert found[1:] == [None, "mine"]


def test_importing_the_package_does_not_load_the_module():
    code = "import sys, gradprom_ext; print('gradprom_ext._C' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr
