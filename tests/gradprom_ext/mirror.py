"""The tests of the library's semantics on the kernels of another device, unchanged.

A *mirror* is a backend for host memory. It copies the storages of the tensors that it is given to
a device, runs the plan of a real backend there, and copies what a step may write back. Whole storages travel: tensors
keep their offsets and strides, views of one storage stay views of one storage, and a write beside a tensor comes back
with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradprom_ext.backends import Backend
from gradprom_ext.plan import Gradients, PlanBase, PlanSpec, StepRequest
from gradprom_ext.rules import Hyper
from gradprom_ext.stats import GateStats


class Copies:
    """Storages of host tensors on a device.

    A storage that was there at the last step keeps its copy, and thereby its address, as tensors do in real training.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # By address. The host's storage is held too, so that its address cannot become another's.
        self._now: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def begin(self) -> None:
        """Of a step: what was copied until now may have changed since."""
        self._before, self._now = self._now, {}

    def send(self, tensor: Tensor) -> Tensor:
        """The same view of the copy of the tensor's storage."""
        host = tensor.untyped_storage()
        key = host.data_ptr()
        if key not in self._now:
            known = self._before.get(key)
            if known is not None and known[1].nbytes() == host.nbytes():
                copy = known[1]
            else:
                copy = torch.UntypedStorage(host.nbytes(), device=self.device)
            copy.copy_(host)
            self._now[key] = host, copy
        view = torch.empty(0, dtype=tensor.dtype, device=self.device)
        return view.set_(self._now[key][1], tensor.storage_offset(), tensor.size(), tensor.stride())

    def bring_back(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the host's storages of tensors that were sent in this step."""
        for key in {t.untyped_storage().data_ptr() for t in tensors}:
            host, copy = self._now[key]
            host.copy_(copy)


class MirrorPlan(PlanBase):
    """See :class:`gradprom_ext.plan.PlanBase`; ``inner`` makes the plan that does the work."""

    def __init__(self, inner: Backend, device: torch.device, spec: PlanSpec) -> None:
        super().__init__(spec)
        self._params, self._states = spec.params, spec.states
        self._copies = Copies(device)
        # A plan knows its parameters by their objects, whose memory and type may change, and their states by the dicts.
        self._twins = [torch.empty(0, device=device) for _ in spec.params]
        self._twin_states: list[dict[str, Any]] = [{} for _ in spec.params]
        self._send_params()
        self._plan = inner.plan(dataclasses.replace(spec, params=self._twins, states=self._twin_states))
        self.fused = self._plan.fused  # type: ignore[misc]

    def bind_gradients(self, main: Gradients, aux: Sequence[Gradients]) -> None:
        self._copies.begin()
        self._send_params()
        assert self._plan.matches(self._twins)
        # What is bound is addresses: the copies are held until the next step.
        self._bound = [[None if g is None else self._copies.send(g) for g in grads] for grads in (main, *aux)]
        self._plan.bind_gradients(self._bound[0], self._bound[1:])

    def missing_states(self, hypers: Sequence[Hyper]) -> list[int]:
        self._send_states()
        return self._plan.missing_states(self._sent(hypers))

    def gram(self) -> Tensor:
        return self._plan.gram().cpu()

    def update(self, hypers: Sequence[Hyper], weights: Tensor, skipped: Tensor) -> None:
        self._send_states()
        device = self._copies.device
        self._plan.update(self._sent(hypers), weights.to(device), skipped.to(device))
        self._bring_back()

    def step(self, request: StepRequest) -> GateStats:
        self._send_states()
        sent = request._replace(hypers=self._sent(request.hypers))
        if isinstance(request.aux_weight, Tensor):
            sent = sent._replace(aux_weight=self._copies.send(request.aux_weight))
        if request.skipped_steps is not None:
            sent = sent._replace(skipped_steps=self._copies.send(request.skipped_steps))
        stats = self._plan.step(sent)
        self._bring_back(*([] if request.skipped_steps is None else [request.skipped_steps]))
        return dataclasses.replace(stats, packed=stats.packed.cpu())

    def _send_params(self) -> None:
        for twin, param in zip(self._twins, self._params, strict=True):
            twin.data = self._copies.send(param)

    def _send_states(self) -> None:
        for twin, state in zip(self._twin_states, self._states, strict=True):
            twin.clear()
            twin.update({key: self._copies.send(value) for key, value in state.items()})

    def _sent(self, hypers: Sequence[Hyper]) -> list[Hyper]:
        return [dataclasses.replace(h, lr=self._copies.send(h.lr)) if isinstance(h.lr, Tensor) else h for h in hypers]

    def _bring_back(self, *others: Tensor) -> None:
        states = (value for state in self._states for value in state.values())
        self._copies.bring_back([*self._params, *states, *others])
        # Storages were overwritten below the tensors' version counters.
        torch.autograd.graph.increment_version(self._params)


class Mirror(Backend):
    """The backend for host memory that works elsewhere; see :class:`gradprom_ext.backends.Backend`."""

    name = "cpu"
    device_type: str | None = "cpu"

    def __init__(self, inner: Backend, device: torch.device) -> None:
        self._inner, self._device = inner, device

    def missing(self) -> str | None:
        return self._inner.missing()

    def rejects(self, device: torch.device, num_aux: int) -> str | None:
        if device.type != "cpu":
            return f"takes tensors in host memory, not on {device}"
        return self._inner.rejects(self._device, num_aux)

    def plan(self, spec: PlanSpec) -> PlanBase:
        return MirrorPlan(self._inner, self._device, spec)
