"""GradProm in one pass over memory.

GradProm (`arXiv:2501.01114 <https://arxiv.org/abs/2501.01114>`_) trains a main model with the help of an auxiliary one
without letting it bias the main one: an auxiliary gradient is added only where it points the same way.

>>> import torch, gradprom_ext as gp
>>> model, helper = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
>>> opt = gp.GradPromAdamW(model.parameters(), lr=1e-3)
>>> y = model(torch.ones(1, 3))
>>> opt.backward(y.square().mean(), helper(y).logsumexp(1).mean())
>>> opt.step(); opt.zero_grad()
"""

from ._step import NonFiniteGradientError
from .backends import available_backends
from .functional import gradient_stats, gradprom_
from .optim import GradPromAdam, GradPromAdamW, GradPromSGD
from .policy import AlwaysGate, GatePolicy, HardGate, NeverGate, ProjectGate, SoftGate
from .published import GradVacGate, MGDAGate, PCGradGate
from .settings import StepSettings
from .stats import GateStats
from .version import __version__

__all__ = [
    "AlwaysGate",
    "GatePolicy",
    "GateStats",
    "GradPromAdam",
    "GradPromAdamW",
    "GradPromSGD",
    "GradVacGate",
    "HardGate",
    "MGDAGate",
    "NeverGate",
    "NonFiniteGradientError",
    "PCGradGate",
    "ProjectGate",
    "SoftGate",
    "StepSettings",
    "__version__",
    "available_backends",
    "gradient_stats",
    "gradprom_",
]
