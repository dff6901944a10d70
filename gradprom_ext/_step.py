"""One GradProm step over any parameters: split them by device, run the plans, report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, reference, rules
from ._device import readable, refuse_capture, to_device
from .policy import GatePolicy, resolve_policy
from .reference import Gradients
from .rules import Hyper, Rule
from .stats import GateStats


class NonFiniteGradientError(FloatingPointError):
    """A gradient holds NaN or infinity and ``nonfinite="raise"``; nothing was updated."""


@dataclass(frozen=True)
class StepConfig:
    """The checked arguments that every entry point shares."""

    policy: GatePolicy
    aux_weight: float | tuple[float, ...] | Tensor
    per_tensor: bool
    max_grad_norm: float | None
    raise_nonfinite: bool
    backend: str

    @classmethod
    def make(
        cls,
        *,
        aux_weight: float | Sequence[float] | Tensor,
        gate: str | GatePolicy,
        threshold: float,
        granularity: str,
        max_grad_norm: float | None,
        nonfinite: str,
        backend: str,
    ) -> StepConfig:
        """:raises ValueError: an argument has no meaning; says which and what it may be."""
        if granularity not in ("global", "tensor"):
            raise ValueError(f"granularity must be 'global' or 'tensor', got {granularity!r}")
        if nonfinite not in ("skip", "raise"):
            raise ValueError(f"nonfinite must be 'skip' or 'raise', got {nonfinite!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
        backends.check_name(backend)
        return cls(
            policy=resolve_policy(gate, threshold),
            aux_weight=check_aux_weight(aux_weight),
            per_tensor=granularity == "tensor",
            max_grad_norm=None if max_grad_norm is None else float(max_grad_norm),
            raise_nonfinite=nonfinite == "raise",
            backend=backend,
        )

    def lambdas(self, num_aux: int) -> tuple[float, ...] | Tensor:
        """One lambda per auxiliary, or a tensor of one or of as many.

        :raises ValueError: ``aux_weight`` has another number of entries.
        """
        if isinstance(self.aux_weight, float):
            return (self.aux_weight,) * num_aux
        entries = self.aux_weight.numel() if isinstance(self.aux_weight, Tensor) else len(self.aux_weight)
        if entries != num_aux and not (isinstance(self.aux_weight, Tensor) and entries == 1):
            raise ValueError(f"aux_weight has {entries} entries for {num_aux} auxiliary gradients")
        return self.aux_weight


def check_aux_weight(aux_weight: float | Sequence[float] | Tensor) -> float | tuple[float, ...] | Tensor:
    """:raises ValueError: a number that is not finite, or a tensor that is neither ``[]`` nor ``[K]``.
    :raises TypeError: a tensor of another type than float32 and float64.
    """
    if isinstance(aux_weight, Tensor):
        if aux_weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"aux_weight has dtype {aux_weight.dtype}; as a tensor it must be float32 or float64")
        if aux_weight.ndim > 1:
            raise ValueError(f"aux_weight has shape {tuple(aux_weight.shape)}; it must hold one number per auxiliary")
        return aux_weight.detach()  # shares memory: what its owner writes is seen
    weights = tuple(map(float, aux_weight)) if isinstance(aux_weight, Iterable) else (float(aux_weight),)
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"aux_weight must be finite, got {aux_weight}")
    return weights if isinstance(aux_weight, Iterable) else weights[0]


class Stepper:
    """Plans for a fixed list of parameters, one per device."""

    def __init__(
        self,
        rule: Rule,
        params: list[Tensor],
        groups: list[int],
        states: list[dict[str, Any]],
        num_aux: int,
        config: StepConfig,
    ) -> None:
        self._rule, self._params, self._groups, self._states = rule, params, groups, states
        self.num_aux = num_aux
        self.config = config
        self.lambdas = config.lambdas(num_aux)
        by_device = shares_by_device(params)
        self.devices = [device for device, _ in by_device]
        self._shares = [share for _, share in by_device]
        # The parameters plan by plan; on the device that decides, where indexing by it does not wait.
        self._order = torch.empty(0, dtype=torch.int64)
        if len(by_device) > 1:
            self._order = torch.tensor([i for share in self._shares for i in share], device=self.devices[0])
        self.backends = [backends.choose(config.backend, device, num_aux) for device in self.devices]
        self._plans = [
            backend.plan(
                rule, _pick(params, share), _pick(groups, share), _pick(states, share), num_aux, config.per_tensor
            )
            for backend, share in zip(self.backends, self._shares, strict=True)
        ]

    @classmethod
    def stateless(cls, params: list[Tensor], num_aux: int, config: StepConfig) -> Stepper:
        """Plain SGD on one group of parameters: nothing is left from step to step."""
        return cls(rules.SGD, params, [0] * len(params), [{} for _ in params], num_aux, config)

    @classmethod
    def for_gradients(cls, main: Gradients, aux: Sequence[Gradients], config: StepConfig) -> Stepper:
        """Without parameters: to measure, not to step."""
        return cls.stateless(stand_ins(main, aux), len(aux), config)

    def fits(self, params: Sequence[Tensor], num_aux: int, config: StepConfig) -> bool:
        """Whether this stepper was made for the same parameter objects, on the devices they are on now."""
        if config is not self.config or num_aux != self.num_aux or len(params) != len(self._params):
            return False
        if len(self._plans) == 1:
            return self._plans[0].matches(params)
        return all(plan.matches(_pick(params, share)) for plan, share in zip(self._plans, self._shares, strict=True))

    def stats(self, main: Gradients, aux: Sequence[Gradients]) -> GateStats:
        """Measures and decides without updating anything."""
        self._bind(main, aux)
        return self._decide()[1]

    def step(
        self,
        main: Gradients,
        aux: Sequence[Gradients],
        hypers: Sequence[Hyper],
        skipped_steps: Tensor | None = None,
    ) -> GateStats:
        """Steps every parameter that has a gradient.

        :param skipped_steps: float64 ``[]`` on the first device, raised by 1 where nothing was updated.
        :raises NonFiniteGradientError: see ``nonfinite``; nothing was updated then.
        :raises RuntimeError: the first step is being captured in a CUDA graph.
        """
        config = self.config
        self._bind(main, aux)
        readable_hypers = [[h.on(device) for h in hypers] for device in self.devices]
        for plan, share, here in zip(self._plans, self._shares, readable_hypers, strict=True):
            for i in plan.missing_states(here):
                refuse_capture()
                p = share[i]
                self._rule.init_state(here[self._groups[p]], self._params[p], self._states[p])
        if len(self._plans) == 1 and config.policy.kernel is not None and hasattr(self._plans[0], "step"):
            lambdas = readable(self.lambdas, self.devices[0])
            stats = self._plans[0].step(readable_hypers[0], config.policy, lambdas, config.max_grad_norm, skipped_steps)
        else:
            weights, stats = self._decide()
            if skipped_steps is not None:
                skipped_steps += stats.skipped
            rows = self._rows_of(weights)
            for plan, here, row, device in zip(self._plans, readable_hypers, rows, self.devices, strict=True):
                plan.update(here, to_device(row, device), to_device(stats.skipped, device))
        if config.raise_nonfinite and stats.skipped:
            raise NonFiniteGradientError(f"{_name_nonfinite(main, aux)} holds NaN or infinity; nothing was updated")
        return stats

    def _bind(self, main: Gradients, aux: Sequence[Gradients]) -> None:
        if len(self._plans) == 1:
            self._plans[0].bind_gradients(main, aux)
            return
        for plan, share in zip(self._plans, self._shares, strict=True):
            plan.bind_gradients(_pick(main, share), [_pick(gs, share) for gs in aux])

    def _decide(self) -> tuple[Tensor, GateStats]:
        config = self.config
        return reference.decide(self._gram(), config.policy, self.lambdas, config.max_grad_norm, config.per_tensor)

    def _gram(self) -> Tensor:
        grams = [plan.gram() for plan in self._plans]
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


def stand_ins(main: Gradients, aux: Sequence[Gradients]) -> list[Tensor]:
    """For every parameter a tensor of its shape, device and layout: a gradient of it, or an empty one."""
    return [next((g for g in gs if g is not None), torch.empty(0)) for gs in zip(main, *aux, strict=True)]


def _pick(items: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    return [items[i] for i in indices]


def _name_nonfinite(main: Gradients, aux: Sequence[Gradients]) -> str:
    for name, grads in [("main_grads", main), *((f"aux_grads[{k}]", gs) for k, gs in enumerate(aux))]:
        for i, g in enumerate(grads):
            if g is not None and not torch.isfinite(g).all():
                return f"{name}[{i}]"
    return "a gradient"
