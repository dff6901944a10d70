"""Parameters of which each process holds a part: those of FSDP2 (``fully_shard``) and of tensor parallelism, which are
DTensors.

A step works on the parts that lie in this process. What the gate needs of the others are inner products, and an inner
product over all elements is the sum of those over the parts: of each pair of losses one number crosses the network, and
no gradient does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import _torch
from ._step import Stepper, named
from .distributed import compare
from .plan import Gradients, PlanSpec
from .rules import Hyper
from .settings import StepConfig
from .stats import GateStats

__all__ = ["Placing", "ShardedStepper", "check_sharding", "own_part", "placing_of"]


class Placing(NamedTuple):
    """Where a parameter's parts are.

    :param mesh: of the processes that hold it; ``None``: it is whole in each process.
    :param copies: how many of them hold each part.
    """

    mesh: DeviceMesh | None
    copies: int


def placing_of(param: Tensor) -> Placing:
    """Tells where the parts of a parameter are.

    :param param: a DTensor, or any other tensor, which is whole.
    """
    if not _torch.is_dtensor(param):
        return Placing(None, 1)
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return Placing(mesh, math.prod(mesh.size(dim) for dim, each in enumerate(placements) if each.is_replicate()))


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the same object at each call, as long as it lies in the same memory."""
    return _torch.local_of(tensor) if _torch.is_dtensor(tensor) else tensor


def check_sharding(name: str, param: Tensor) -> None:
    """
    :raises TypeError: a parameter whose parts a step could not do with.
    """
    if _torch.is_flattened_by_fsdp1(param):
        raise TypeError(
            f"{name} belongs to FullyShardedDataParallel, of whose flat parameters no one can say which part is whose; "
            "use torch.distributed.fsdp.fully_shard, its successor"
        )
    if _torch.is_dtensor(param):
        for each in param.placements:  # type: ignore[attr-defined]
            if each.is_partial():
                raise TypeError(
                    f"{name} is a DTensor that is {each}: its values are sums over processes that were not taken yet; "
                    "redistribute() it to Shard or Replicate"
                )


class ShardedStepper(Stepper):
    """Steps the parts of distributed parameters that lie in this process, together with all other processes.

    :param spec: its parameters and their states may be DTensors. A parameter that is none is taken to be whole in each
        process, with the same gradients everywhere, and counts once.
    """

    def __init__(self, spec: PlanSpec, config: StepConfig) -> None:
        self._whole = spec
        self._placings = [placing_of(p) for p in spec.params]
        self._own_states: list[dict[str, Any]] = [{} for _ in spec.params]
        own = [own_part(p) for p in spec.params]
        super().__init__(PlanSpec(spec.rule, own, spec.groups, self._own_states, spec.num_aux, spec.per_tensor), config)
        # It takes two halves: between them are those of the others.
        self._fused = False
        self._meshes = list(dict.fromkeys(each.mesh for each in self._placings if each.mesh is not None))

    def _split(self, params: Sequence[Tensor]) -> list[tuple[torch.device, list[int]]]:
        """One plan for all that lie on one device and are held by the same processes, equally often."""
        shares: dict[tuple[torch.device, Placing], list[int]] = {}
        for i, (param, placing) in enumerate(zip(params, self._placings, strict=True)):
            shares.setdefault((param.device, placing), []).append(i)
        return [(device, share) for (device, _), share in shares.items()]

    def fits(self, params: list[Tensor], num_aux: int, config: StepConfig) -> bool:
        return len(params) == len(self._whole.params) and super().fits([own_part(p) for p in params], num_aux, config)

    def step(
        self,
        main: Gradients,
        aux: Sequence[Gradients],
        hypers: Sequence[Hyper],
        skipped_steps: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> GateStats:
        with torch.no_grad():
            own_main, *own_aux = (self._own_grads(name, grads) for name, grads in named(main, aux))
            self._take_states()
            stats = super().step(own_main, own_aux, hypers, skipped_steps, scales)
            self._give_states()
        torch.autograd.graph.increment_version([p for p in self._whole.params if _torch.is_dtensor(p)])
        return stats

    def compare(self, stats: GateStats, step: int) -> None:
        """
        :raises ReplicaError: the processes decided differently.
        """
        for group, device in self.groups():
            compare(group, stats.packed.to(device), step)

    def groups(self) -> list[tuple[dist.ProcessGroup, str]]:
        """Those of all processes that hold a part, and the type of the device on which they exchange tensors:
        parameters may have been offloaded to the host."""
        return [(group, mesh.device_type) for mesh in self._meshes for group in mesh.get_all_groups()]

    def _own_grads(self, name: str, grads: Gradients) -> list[Tensor | None]:
        """The parts of gradients that belong to the parts of parameters that are here."""
        return [
            own_gradient(f"{name}[{i}]", g, p) for i, (g, p) in enumerate(zip(grads, self._whole.params, strict=True))
        ]

    def _take_states(self) -> None:
        """Looks up the parts of all states: others may have been loaded."""
        for param, state, own in zip(self._whole.params, self._whole.states, self._own_states, strict=True):
            own.clear()
            for name, value in state.items():
                moment = isinstance(value, Tensor) and name != "step"
                if moment and _torch.is_dtensor(param) != _torch.is_dtensor(value):
                    raise TypeError(
                        f"the optimizer state {name!r} of a parameter of shape {tuple(param.shape)} is a "
                        f"{type(value).__name__} and the parameter a {type(param).__name__}; load states of sharded "
                        "parameters with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                    )
                own[name] = own_part(value) if isinstance(value, Tensor) else value

    def _give_states(self) -> None:
        """Hands over those that the step has made."""
        for param, state, own in zip(self._whole.params, self._whole.states, self._own_states, strict=True):
            for name in [name for name in own if name not in state]:  # in one order in all processes
                value = own[name]
                state[name] = value if name == "step" or not _torch.is_dtensor(param) else _torch.like(value, param)

    def _gram(self) -> Tensor:
        """The sum over all parts everywhere, each counted once."""
        grams = [plan.gram() for plan in self._plans]
        placings = [self._placings[share[0]] for share in self._shares]
        for mesh in self._meshes:
            places = [k for k, each in enumerate(placings) if each.mesh == mesh]
            # A part that several processes hold is summed as often, and equals itself but for rounding.
            rows = torch.cat([(grams[k] / placings[k].copies).to(mesh.device_type) for k in places])
            for group in mesh.get_all_groups():
                dist.all_reduce(rows, group=group)
            for k, summed in zip(places, rows.split([len(grams[k]) for k in places]), strict=True):
                grams[k] = summed.to(grams[k].device)
        return self._together(grams)


def own_gradient(name: str, grad: Tensor | None, param: Tensor) -> Tensor | None:
    """The part of a gradient that belongs to what this process holds of its parameter.

    :raises TypeError: one of them is a DTensor and the other is not.
    """
    if grad is None:
        return None
    if _torch.is_dtensor(grad) != _torch.is_dtensor(param):
        raise TypeError(
            f"{name} is a {type(grad).__name__}, and its parameter is a {type(param).__name__}: which part of it "
            "belongs to this process cannot be known"
        )
    if not _torch.is_dtensor(param):
        return grad
    wanted = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if (grad.device_mesh, grad.placements) != wanted:  # type: ignore[attr-defined]
        grad = grad.redistribute(*wanted)  # type: ignore[attr-defined]  # of tensor parallelism: a sum not taken yet
    return own_part(grad)
