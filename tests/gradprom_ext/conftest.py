"""Every semantic test runs on every backend this machine has."""

from __future__ import annotations

import pytest
import torch

import gradprom_ext as gp


@pytest.fixture(params=gp.available_backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
