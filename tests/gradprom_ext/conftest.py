"""Every test of the library's semantics runs on every target (targets.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from . import targets

# Profiles of the tests that attack: 10,000 new cases for each target (`make fuzz`), and a few (.ci/sanitize). Otherwise
# each has its own number of cases, always the same ones.
settings.register_profile("fuzz", max_examples=10_000, print_blob=True)
settings.register_profile("few", max_examples=25, derandomize=True)


@pytest.fixture(params=targets.TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """Name of the target, as the test's id shows it."""
    if request.param == "triton-interpreter" and request.node.get_closest_marker("slow_in_interpreter"):
        pytest.skip("minutes in Triton's interpreter; test_triton.py has a smaller one")
    if request.param == "gpu-triton" and request.node.get_closest_marker("every_type"):
        pytest.skip("Triton compiles a kernel for each combination of types; its interpreter goes through all of them")
    if request.param.startswith(("mirror-", "gpu-")) and request.node.get_closest_marker("not_mirrored"):
        pytest.skip("a mirror copies memory, and this is about tensors without")
    return request.param


@pytest.fixture
def backend(target: str) -> Iterator[Any]:
    """What the optimizers and functions of the library take as ``backend``."""
    with targets.running(target) as backend:
        yield backend


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
