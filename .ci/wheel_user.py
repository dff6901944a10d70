"""What a user of the installed wheel writes. `.ci/wheel` runs it, and mypy checks its types against the wheel's."""

import sys
from pathlib import Path

import torch
from typing_extensions import assert_type

import gradprom_ext as gp


class NotLouder(gp.GatePolicy):
    """Open while the auxiliary gradient is no longer than the main one."""

    def __call__(self, gram: torch.Tensor, aux_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        squared = gram.diagonal(dim1=-2, dim2=-1)
        return torch.ones_like(gram[..., 0, 0]), (squared[..., 1:] <= squared[..., :1]).to(gram.dtype)


def step(backend: str) -> None:
    """One step, which must run on ``backend``."""
    model, helper = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    opt = gp.GradPromAdamW(model.parameters(), lr=0.01, aux_weight=0.5, gate=NotLouder())
    y = model(torch.ones(1, 3))
    opt.backward(y.square().mean(), helper(y).logsumexp(1).mean())
    opt.step()
    stats = opt.stats
    assert_type(stats, gp.GateStats | None)
    assert stats is not None
    assert_type(stats.cosine, torch.Tensor)
    assert_type(opt.backend, str)
    assert opt.backend == backend, f"{opt.backend} has stepped instead of {backend}"
    assert not torch.equal(model.weight, before)


def wrong() -> None:
    """What mypy must see; nobody calls it."""
    gp.GradPromSGD([torch.ones(2)], gate=1)  # type: ignore[arg-type]


if __name__ == "__main__":
    environment, backend = Path(sys.argv[1]), sys.argv[2]
    assert Path(gp.__file__).is_relative_to(environment), f"{gp.__file__} is not the installed wheel"
    step(backend)
    experiments = {"einops", "matplotlib", "monai", "scipy", "skimage", "tyro"} & set(sys.modules)
    assert not experiments, f"the library imports {experiments}, which only the experiments need"
    print(f"gradprom_ext {gp.__version__} of the wheel stepped on backend {backend}")
