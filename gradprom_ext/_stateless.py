"""Steps that leave nothing behind, for the functions: plain SGD, or no update at all.

Making a plan of hundreds of tensors takes longer than the step. So plans are kept from call to call; what they keep is
room, not knowledge. No tensor stays alive for them, and none is recognized by its identity or address: every call hands
over its tensors anew, and each is read, its layout, type and negative bit included.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import backends, rules
from ._step import Stepper
from .backends import Backend
from .plan import Gradients, PlanBase
from .self_check import Needs
from .settings import StepConfig

__all__ = ["stand_ins", "stepping"]


@functools.lru_cache(maxsize=16)
def _kept(backend: Backend, device: torch.device, tensors: int, num_aux: int, per_tensor: bool) -> deque[PlanBase]:
    """Plans that nobody uses. Each is taken out for the time of a call, so that threads, and calls within calls, never
    share one; a deque needs no lock, which a fork could leave locked."""
    return deque(maxlen=4)


@contextlib.contextmanager
def stepping(params: list[Tensor], num_aux: int, config: StepConfig, check: Callable[[], None]) -> Iterator[Stepper]:
    """A stepper for these parameters, until the end of the block.

    :param params: at least one.
    :param check: raises what is wrong with parameters and gradients; called where the plans would not see it.
    """
    device = params[0].device
    dtypes = frozenset([p.dtype for p in params])
    needs = Needs(rules.SGD.name, False, num_aux, config.per_tensor, config.kernel, dtypes)
    backend = backends.proven(config.backend, device, needs)
    kept = _kept(backend, device, len(params), num_aux, config.per_tensor)
    plan = _take(kept)
    if plan is not None and plan.rebind(params):
        stepper = Stepper(plan.spec, config, plan)
    else:
        stepper = Stepper.stateless(params, num_aux, config)
        plan = stepper.plan
    if plan is None or not plan.checks_params:
        check()
    yield stepper
    # Behind an error the plan is not kept.
    if plan is not None and plan.release():
        kept.append(plan)


def _take(kept: deque[PlanBase]) -> PlanBase | None:
    try:
        return kept.pop()
    except IndexError:
        return None


def stand_ins(main: Gradients, aux: Sequence[Gradients]) -> list[Tensor]:
    """For every parameter a tensor of its shape, device and layout: a gradient of it, or an empty one."""
    found = [g for g in main if g is not None]
    if len(found) == len(main):
        return found
    return [next((g for g in gs if g is not None), torch.empty(0)) for gs in zip(main, *aux, strict=True)]
