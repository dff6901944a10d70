"""Every semantic test runs on every backend that takes the memory its tensors lie in, the host's."""

from __future__ import annotations

import pytest
import torch

from gradprom_ext import backends

#: Triton takes host memory only under its interpreter, whose tests have a file of their own.
HOST_BACKENDS = [
    name for name, reason in backends.explain(torch.device("cpu")).items() if reason is None and name != "triton"
]


@pytest.fixture(params=HOST_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
