"""One GradProm step over any parameters: split them by device, run the plans, report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, reference, rules
from ._device import readable, refuse_capture, to_device
from .backends import Backend
from .plan import Gradients, PlanBase, PlanSpec, StepRequest
from .rules import Hyper
from .self_check import Needs
from .settings import StepConfig
from .stats import GateStats


class NonFiniteGradientError(FloatingPointError):
    """A gradient holds NaN or infinity and ``nonfinite="raise"``; nothing was updated.

    >>> import torch, gradprom_ext as gp
    >>> nan, one = torch.tensor([float("nan")]), torch.ones(1)
    >>> gp.gradprom_([one], [nan], [one], nonfinite="raise")
    Traceback (most recent call last):
    gradprom_ext._step.NonFiniteGradientError: main_grads[0] holds NaN or infinity; nothing was updated
    """


class Stepper:
    """Plans for a fixed list of parameters, one per device.

    :param plan: of all of them, where there is one already.
    """

    def __init__(self, spec: PlanSpec, config: StepConfig, plan: PlanBase | None = None) -> None:
        self._spec = spec
        self.config = config
        self.lambdas = config.lambdas(spec.num_aux)
        by_device: list[tuple[torch.device, Sequence[int]]]
        by_device = [*self._split(spec.params)] if plan is None else [(spec.params[0].device, range(len(spec.params)))]
        self.devices = [device for device, _ in by_device]
        self._shares = [share for _, share in by_device]
        # The parameters plan by plan; on the device that decides, where indexing by it does not wait.
        self._order = torch.empty(0, dtype=torch.int64)
        if len(by_device) > 1:
            self._order = torch.tensor([i for share in self._shares for i in share], device=self.devices[0])
        self.backends: list[Backend] = []  # of the plans that are made here
        if plan is None:
            parts = [spec] if len(by_device) == 1 else [spec.part(share) for share in self._shares]
            needs = [Needs.of(part, config.kernel) for part in parts]
            self.backends = [
                backends.proven(config.backend, device, need, config.without)
                for device, need in zip(self.devices, needs, strict=True)
            ]
            self._plans = [backend.plan(part) for backend, part in zip(self.backends, parts, strict=True)]
        else:
            self._plans = [plan]
        self._fused = len(self._plans) == 1 and config.kernel is not None and self._plans[0].fused

    def _split(self, params: Sequence[Tensor]) -> list[tuple[torch.device, list[int]]]:
        """Which parameters make up a plan, and the device of each plan."""
        return shares_by_device(params)

    @classmethod
    def stateless(cls, params: list[Tensor], num_aux: int, config: StepConfig) -> Stepper:
        """Plain SGD on one group of parameters: nothing is left from step to step."""
        spec = PlanSpec(
            rules.SGD, params, [0] * len(params), [{} for _ in params], num_aux=num_aux, per_tensor=config.per_tensor
        )
        return cls(spec, config)

    @property
    def plan(self) -> PlanBase | None:
        """That of all parameters, where they are on one device."""
        return self._plans[0] if len(self._plans) == 1 else None

    def fits(self, params: list[Tensor], num_aux: int, config: StepConfig) -> bool:
        """Whether this stepper was made for the same parameter objects; see :meth:`PlanBase.matches`."""
        if config is not self.config or num_aux != self._spec.num_aux or len(params) != len(self._spec.params):
            return False
        if len(self._plans) == 1:
            return self._plans[0].matches(params)
        return all(plan.matches(_pick(params, share)) for plan, share in zip(self._plans, self._shares, strict=True))

    def stats(self, main: Gradients, aux: Sequence[Gradients]) -> GateStats:
        """Measures and decides without updating anything.

        :raises NonFiniteGradientError: see ``nonfinite``.
        """
        self._bind(main, aux)
        stats = self._plans[0].measure(self._request([])) if self._fused else None
        if stats is None:
            stats = self._decide()[1]
        self._raise_nonfinite(stats, main, aux)
        return stats

    def step(
        self,
        main: Gradients,
        aux: Sequence[Gradients],
        hypers: Sequence[Hyper],
        skipped_steps: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> GateStats:
        """Steps every parameter that has a gradient.

        :param skipped_steps: float64 ``[]`` on the first device, raised by 1 where nothing was updated.
        :param scales: what the gradients of each loss were multiplied with, float64 ``[K + 1]`` on the first device.
            Neither the Gram matrix of the decision nor what is added to the parameters then contains it; a gradient
            that overflowed skips the step, whatever ``nonfinite`` says.
        :raises NonFiniteGradientError: see ``nonfinite``; nothing was updated then.
        :raises RuntimeError: the first step is being captured in a CUDA graph.
        """
        if self._fused and scales is None:
            return self._fused_step(main, aux, hypers, skipped_steps)
        with torch.no_grad():
            self._bind(main, aux)
            readable_hypers = [[h.on(device) for h in hypers] for device in self.devices]
            for plan, share, here in zip(self._plans, self._shares, readable_hypers, strict=True):
                self._init_states(plan, share, here)
            weights, stats = self._decide(scales)
            if skipped_steps is not None:
                skipped_steps += stats.skipped
            rows = self._rows_of(weights)
            for plan, here, row, device in zip(self._plans, readable_hypers, rows, self.devices, strict=True):
                plan.update(here, to_device(row, device), to_device(stats.skipped, device))
        if scales is None:
            self._raise_nonfinite(stats, main, aux)
        return stats

    def _fused_step(
        self, main: Gradients, aux: Sequence[Gradients], hypers: Sequence[Hyper], skipped_steps: Tensor | None
    ) -> GateStats:
        """The same with one plan and a gate that its kernels have: no operation of PyTorch's but the allocation of the
        statistics, so that autograd need not be kept out."""
        plan, device = self._plans[0], self.devices[0]
        plan.bind_gradients(main, aux)
        if any(isinstance(h.lr, Tensor) for h in hypers):
            hypers = [h.on(device) for h in hypers]
        self._init_states(plan, self._shares[0], hypers)
        stats = plan.step(self._request(hypers, skipped_steps))
        self._raise_nonfinite(stats, main, aux)
        return stats

    def _request(self, hypers: Sequence[Hyper], skipped_steps: Tensor | None = None) -> StepRequest:
        config, lambdas = self.config, readable(self.lambdas, self.devices[0])
        return StepRequest(hypers, config.policy, lambdas, config.aux_cap, config.max_grad_norm, skipped_steps)

    def _init_states(self, plan: PlanBase, share: Sequence[int], hypers: Sequence[Hyper]) -> None:
        """Makes what is missing of the states of a plan, whose parameters are those numbered ``share``."""
        for i in plan.missing_states(hypers):
            refuse_capture()
            spec, p = self._spec, share[i]
            with torch.no_grad():
                spec.rule.init_state(hypers[spec.groups[p]], spec.params[p], spec.states[p])

    def _raise_nonfinite(self, stats: GateStats, main: Gradients, aux: Sequence[Gradients]) -> None:
        if self.config.raise_nonfinite and stats.skipped:
            raise NonFiniteGradientError(f"{_name_nonfinite(main, aux)}; nothing was updated")

    def _bind(self, main: Gradients, aux: Sequence[Gradients]) -> None:
        if len(self._plans) == 1:
            self._plans[0].bind_gradients(main, aux)
            return
        for plan, share in zip(self._plans, self._shares, strict=True):
            plan.bind_gradients(_pick(main, share), [_pick(gs, share) for gs in aux])

    def _decide(self, scales: Tensor | None = None) -> tuple[Tensor, GateStats]:
        config, gram = self.config, self._gram()
        if scales is not None:
            gram = gram / (scales[:, None] * scales)
        weights, stats = reference.decide(
            gram, config.policy, self.lambdas, config.aux_cap, config.max_grad_norm, config.per_tensor
        )
        # The weights take the scales out in the pass in which the kernels add the gradients up.
        return weights if scales is None else weights / scales, stats

    def _gram(self) -> Tensor:
        return self._together([plan.gram() for plan in self._plans])

    def _together(self, grams: list[Tensor]) -> Tensor:
        """The Gram matrices of a step, of those of its plans: float64 ``[rows, K + 1, K + 1]``."""
        if len(grams) == 1:
            return grams[0]
        grams = [to_device(g, grams[0].device) for g in grams]
        if not self.config.per_tensor:
            return torch.stack(grams).sum(0)
        return torch.cat(grams)[self._order.argsort()]

    def _rows_of(self, weights: Tensor) -> Sequence[Tensor]:
        """What each plan needs of the weights."""
        if len(self._plans) == 1 or not self.config.per_tensor:
            return [weights] * len(self._plans)
        return weights[self._order].split([len(share) for share in self._shares])


def shares_by_device(params: Sequence[Tensor]) -> list[tuple[torch.device, list[int]]]:
    """Indices of the parameters that lie together, in the order in which the devices first occur."""
    shares: dict[torch.device, list[int]] = {}
    for i, param in enumerate(params):
        shares.setdefault(param.device, []).append(i)
    return list(shares.items())


def _pick(items: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    return [items[i] for i in indices]


def named(main: Gradients, aux: Sequence[Gradients]) -> list[tuple[str, Gradients]]:
    """The gradients of each loss with what messages call them."""
    return [("main_grads", main), *((f"aux_grads[{k}]", grads) for k, grads in enumerate(aux))]


def _name_nonfinite(main: Gradients, aux: Sequence[Gradients]) -> str:
    """Which gradient it is, and what is wrong with it."""
    for name, grads in named(main, aux):
        for i, g in enumerate(grads):
            if g is not None and not torch.isfinite(g).all():
                return f"{name}[{i}] holds NaN or infinity"
    # All are finite, but a sum of their squares is not.
    for name, grads in named(main, aux):
        if not sum(float(g.to(torch.float64).square().sum()) for g in grads if g is not None) < math.inf:
            return f"the squared norm of {name} leaves float64: it is longer than 1e154"
    return "a gradient holds NaN or infinity"
