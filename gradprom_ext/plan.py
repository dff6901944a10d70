"""What backends are handed: a *plan* of one device's parameters, and the *request* for one step of it."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ._extension import same_objects
from .policy import GatePolicy
from .rules import Hyper, Rule
from .stats import GateStats

__all__ = ["MAX_AUX", "Gradients", "PlanBase", "PlanSpec", "StatesByName", "StepRequest"]

#: The Gram matrix of so many auxiliary gradients and the main one fits into the registers of a program or thread. The
#: compiled module has the same limit.
MAX_AUX = 4

Gradients = Sequence["Tensor | None"]


@dataclass(frozen=True, eq=False)
class PlanSpec:
    """Parameters of one device and all that is fixed about stepping them.

    :param groups: ``groups[i]`` is the index of params[i]'s hyper-parameters.
    :param states: the optimizer's state dicts, one per parameter.
    :param num_aux: number of auxiliary gradients.
    :param per_tensor: one Gram matrix per parameter instead of one for all.
    """

    rule: Rule
    params: list[Tensor]
    groups: list[int]
    states: list[dict[str, Any]]
    num_aux: int
    per_tensor: bool

    @property
    def rows(self) -> int:
        """Number of Gram matrices."""
        return len(self.params) if self.per_tensor else 1

    def of(self, params: list[Tensor]) -> PlanSpec:
        """The plan of other parameters in the place of these."""
        return PlanSpec(self.rule, params, self.groups, self.states, self.num_aux, self.per_tensor)

    def part(self, indices: Sequence[int]) -> PlanSpec:
        """The plan of some of the parameters."""
        pick = operator.itemgetter(*indices) if len(indices) > 1 else lambda items: (items[indices[0]],)
        return PlanSpec(
            self.rule,
            list(pick(self.params)),
            list(pick(self.groups)),
            list(pick(self.states)),
            self.num_aux,
            self.per_tensor,
        )


class StepRequest(NamedTuple):
    """What one step depends on beside the tensors.

    :param hypers: one per parameter group; a tensor ``lr`` is on the plan's device or in host memory.
    :param gate: one that the kernels have (:func:`gradprom_ext.policy.kernel_of`).
    :param aux_weight: one lambda per auxiliary; a tensor of one or of as many on the plan's device is read when the
        step runs, one in host memory now. The same holds for each ``Hyper.lr``.
    :param aux_cap: kappa of :func:`gradprom_ext.policy.caps`; ``None``: no cap.
    :param max_grad_norm: of the combined gradient; ``None``: no clipping.
    :param skipped_steps: float64 ``[]`` on the plan's device, raised by 1 where a gradient is not finite; or ``None``.
    """

    hypers: Sequence[Hyper]
    gate: GatePolicy
    aux_weight: tuple[float, ...] | Tensor
    aux_cap: float | None
    max_grad_norm: float | None
    skipped_steps: Tensor | None


class PlanBase(ABC):
    """Parameters of one device and their optimizer states, ready to be stepped.

    A plan belongs to fixed parameter *objects*. Their memory, and that of the states and gradients, may be another at
    every step (``tensor.data = ...`` moves it under an object that stays the same), so none of it is remembered unread.

    :cvar fused: whether :meth:`step` can gate on its own. Otherwise the caller takes the two halves, :meth:`gram` and
        :meth:`update`, and decides in between, as it does for several devices and for policies written in Python.
    :cvar checks_params: whether parameters that cannot be stepped are refused, before anything is written, as gradients
        are. Otherwise the caller has checked them.
    """

    fused: ClassVar[bool] = False
    checks_params: ClassVar[bool] = False

    def __init__(self, spec: PlanSpec) -> None:
        self.spec = spec
        self._device = spec.params[0].device

    def matches(self, params: list[Tensor]) -> bool:
        """Whether these are the very parameter objects the plan was made for, still on its device.

        A plan that reads where they are only in its step leaves the second half to it. It then refuses by an error of
        which :func:`gradprom_ext._extension.parameters_moved` is true.
        """
        return same_objects(params, self.spec.params) and all(p.device == self._device for p in params)

    def rebind(self, params: list[Tensor]) -> bool:
        """Takes other parameters in the place of those that it had, of which no layout, address or type is believed;
        only for a rule without states. Returns whether it could; else the plan is of no more use."""
        return False

    def release(self) -> bool:
        """Lets go of every tensor. Returns whether the plan is worth keeping, for :meth:`rebind`."""
        return False

    @abstractmethod
    def bind_gradients(self, main: Gradients, aux: Sequence[Gradients]) -> None:
        """Hands over this step's gradients, one per parameter and loss. Checks everything, writes nothing.

        A plan may keep addresses, not tensors: the caller keeps the gradients alive until the step is done.
        """

    @abstractmethod
    def missing_states(self, hypers: Sequence[Hyper]) -> list[int]:
        """Parameters that have a gradient but lack a state tensor."""

    @abstractmethod
    def gram(self) -> Tensor:
        """Float64 ``[rows, K + 1, K + 1]``."""

    @abstractmethod
    def update(self, hypers: Sequence[Hyper], weights: Tensor, skipped: Tensor) -> None:
        """Steps with ``weights`` float64 ``[rows, K + 1]`` unless ``skipped`` (bool ``[]``)."""

    def measure(self, request: StepRequest) -> GateStats | None:
        """Gram matrix and gate in one go: the statistics of :meth:`step`, without a step; only where :attr:`fused`.
        ``None`` where only a step can gate."""
        return None

    def step(self, request: StepRequest) -> GateStats:
        """Gram matrix, gate and update in one go; only where :attr:`fused`."""
        raise NotImplementedError(f"{type(self).__name__} is not fused")


class StatesByName(PlanBase):
    """A plan that looks its states up by name, in Python."""

    @abstractmethod
    def is_active(self, i: int) -> bool:
        """Whether parameter ``i`` has a gradient; without any it is left alone."""

    def missing_states(self, hypers: Sequence[Hyper]) -> list[int]:
        """Parameters that have a gradient but lack a state tensor."""
        states = self.spec.states
        return [i for i, names in self.needed_states(hypers) if not all(name in states[i] for name in names)]

    def needed_states(self, hypers: Sequence[Hyper]) -> Iterator[tuple[int, tuple[str, ...]]]:
        """What the update needs, for each parameter that has a gradient."""
        spec = self.spec
        for i, param in enumerate(spec.params):
            if self.is_active(i):
                yield i, spec.rule.state_names(hypers[spec.groups[i]], param)
