"""A plan of the compiled module ``gradprom_ext._C``, whose kernels are those of csrc/cpu or csrc/cuda."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .plan import Gradients, PlanBase, PlanSpec, StepRequest
from .policy import kernel_of
from .rules import Hyper
from .stats import GateStats, packed_size

__all__ = ["CompiledPlan"]


class CompiledPlan(PlanBase):
    """See :class:`gradprom_ext.plan.PlanBase`.

    :param module: ``gradprom_ext._C``.
    :param cuda_options: arguments of its ``CudaOptions``, for tests and measurements.
    """

    fused = True
    checks_params = True

    def __init__(self, module: Any, spec: PlanSpec, cuda_options: dict[str, Any]) -> None:
        super().__init__(spec)
        self._c = module
        self._forget_numbers()
        self._plan = module.Plan(
            rule=getattr(module.Rule, spec.rule.name),
            params=spec.params,
            groups=spec.groups,
            states=spec.states,
            num_aux=spec.num_aux,
            per_tensor=spec.per_tensor,
            master_weights=spec.rule.master_weights,
            cuda=module.CudaOptions(**cuda_options),
        )
        # Callers reach the compiled functions without a step in Python between.
        self.matches = self._plan.matches  # type: ignore[method-assign]
        self.bind_gradients = self._plan.bind_gradients  # type: ignore[method-assign]

    def _forget_numbers(self) -> None:
        self._seen: Sequence[Hyper] = ()
        self._converted: list[Any] = []
        self._gate: Any = None
        self._gate_key: tuple[Any, ...] = ()

    def rebind(self, params: list[Tensor]) -> bool:
        if not self._plan.rebind(params):
            return False
        self.spec = self.spec.of(params)
        return True

    def release(self) -> bool:
        self._forget_numbers()  # learning rate and lambda may be tensors
        self.spec = self.spec.of([])
        return self._plan.release()

    def bind_gradients(self, main: Gradients, aux: Sequence[Gradients]) -> None:
        self._plan.bind_gradients(main, aux)

    def missing_states(self, hypers: Sequence[Hyper]) -> list[int]:
        return self._plan.bind_states(self._settings(hypers))

    def gram(self) -> Tensor:
        n = self.spec.num_aux + 1
        packed = self._empty((self.spec.rows, n * (n + 1) // 2))
        self._plan.gram(packed)
        i, j = torch.triu_indices(n, n, device=packed.device)
        gram = packed.new_empty(len(packed), n, n)
        gram[:, i, j] = packed
        gram[:, j, i] = packed
        return gram

    def update(self, hypers: Sequence[Hyper], weights: Tensor, skipped: Tensor) -> None:
        self._plan.update(self._settings(hypers), weights.contiguous(), skipped.to(weights.dtype))
        torch.autograd.graph.increment_version(self.spec.params)

    def measure(self, request: StepRequest) -> GateStats | None:
        stats = self._empty_stats()
        return self._stats(stats) if self._plan.measure(self._gate_of(request), stats) else None

    def step(self, request: StepRequest) -> GateStats:
        stats = self._empty_stats()
        self._plan.step(self._settings(request.hypers), self._gate_of(request), stats, request.skipped_steps)
        # The kernels write through raw pointers; autograd must still notice that saved parameters are stale.
        torch.autograd.graph.increment_version(self.spec.params)
        return self._stats(stats)

    def _empty_stats(self) -> Tensor:
        return self._empty((packed_size(self.spec.rows, self.spec.num_aux),))

    def _stats(self, packed: Tensor) -> GateStats:
        spec = self.spec
        return GateStats(packed, spec.num_aux, spec.rows if spec.per_tensor else None)

    def _gate_of(self, request: StepRequest) -> Any:
        _, gate, aux_weight, aux_cap, max_grad_norm, _ = request
        key = (gate, gate.threshold, aux_weight, aux_cap, max_grad_norm)
        if self._gate is None or not all(map(operator.is_, key, self._gate_key)):
            self._gate_key = key
            self._gate = self._c.GateSettings(
                gate=getattr(self._c.Gate, str(kernel_of(gate))),
                threshold=gate.threshold,
                max_grad_norm=max_grad_norm or 0.0,
                aux_cap=aux_cap or 0.0,
                aux_weight=aux_weight,
            )
        return self._gate

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self._device)

    def _settings(self, hypers: Sequence[Hyper]) -> list[Any]:
        seen = self._seen  # they change when a scheduler moves, at most once per step
        if seen is hypers:
            return self._converted
        if len(seen) != len(hypers) or not all(map(Hyper.same, hypers, seen)):
            self._seen, self._converted = hypers, [self._c.Group(**vars(h)) for h in hypers]
        return self._converted
