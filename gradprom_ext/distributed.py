"""Averages of the gradients over the processes that train one model together, before the gate is taken.

DistributedDataParallel averages what the first backward of a forward leaves, and nothing that comes after it. A gate
by gradients of one's own batch differs from process to process, and the replicas drift apart. So the optimizer averages
all gradients itself: then the Gram matrix, the gate and the update are the same numbers everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import Gradients

__all__ = ["ReplicaError", "Replicas"]

BUCKET = 32 * 2**20
"""Bytes that are sent together: large enough for the bandwidth of a network, small enough that packing the next bucket
overlaps with sending this one."""


class ReplicaError(RuntimeError):
    """Processes that train one model together have come to differ."""


@dataclass(frozen=True)
class Replicas:
    """The processes that train one model together, each with a replica of it.

    :param group: of ``torch.distributed``.
    """

    group: dist.ProcessGroup

    @property
    def number(self) -> int:
        return dist.get_world_size(self.group)

    def average(self, params: Sequence[Tensor], losses: Sequence[Gradients]) -> list[list[Tensor | None]]:
        """The means over all processes of the gradients of each loss.

        Every process sends a number for each element of each parameter and loss, zeros where it has no gradient, so
        that all send the same whatever their losses reached; a gradient that no process has stays ``None``. Only a
        process that lacks one waits for the device, to learn whether another has it.

        :param params: the same in all processes, in one order.
        :param losses: per loss a gradient, or ``None``, of each parameter. They are not written to.
        :returns: new tensors, laid out as the parameters are.
        :raises RuntimeError: another process has gone, or did not answer within the group's time-out.
        """
        grads = [g for gs in losses for g in gs]
        like = [p for _ in losses for p in params]
        if not grads:
            return [[] for _ in losses]
        lacking = any(g is None for g in grads)
        if lacking:
            present = torch.tensor([float(g is not None) for g in grads], device=like[0].device)
        else:  # nothing comes from the host, for which a device would wait
            present = torch.ones(len(grads), device=like[0].device)
        counted = dist.all_reduce(present, group=self.group, async_op=True)
        pending = []
        results: list[Tensor | None] = [None] * len(grads)
        for places in _buckets(like):
            flat = torch.cat([_dense(grads[i], like[i]) for i in places])
            pending.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))
            start = 0
            for i in places:
                results[i] = _as_laid_out(flat[start : start + like[i].numel()], like[i])
                start += like[i].numel()
        for sent, work in pending:
            work.wait()
            sent.div_(self.number)
        counted.wait()
        if lacking:
            known = present.tolist()
            results = [result if known[i] else None for i, result in enumerate(results)]
        return [results[k * len(params) : (k + 1) * len(params)] for k in range(len(losses))]

    def compare(self, numbers: Tensor, step: int) -> None:
        """Checks that all processes have the same numbers, bit for bit.

        :param numbers: float64, of any shape; NaNs are equal.
        :param step: for the message.
        :raises ReplicaError: they differ; in every process, naming the first that differs from the first process.
        """
        bits = numbers.detach().reshape(-1).view(torch.int64)
        all_bits = [torch.empty_like(bits) for _ in range(self.number)]
        dist.all_gather(all_bits, bits, group=self.group)
        for rank, other in enumerate(all_bits):
            if not torch.equal(other, all_bits[0]):
                raise ReplicaError(
                    f"at step {step} process {rank} of {self.number} decided otherwise than process 0: "
                    f"{other.view(torch.float64).tolist()} instead of {all_bits[0].view(torch.float64).tolist()} "
                    "(skipped, combined norm, clip coefficient; per row the norms, weights, cosines and gates; sums of "
                    "the parameters). Did .grad, lambda or the parameters come to differ?"
                )


def _buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of tensors that go together: of one device and type, about :data:`BUCKET` bytes, in order."""
    open_: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    held: dict[tuple[torch.device, torch.dtype], int] = {}
    done: list[list[int]] = []
    for i, t in enumerate(tensors):
        key = (t.device, t.dtype)
        size = t.numel() * t.element_size()
        if key in open_ and held[key] + size > BUCKET:
            done.append(open_.pop(key))
        if key not in open_:
            open_[key], held[key] = [], 0
        open_[key].append(i)
        held[key] += size
    return done + list(open_.values())


def _dense(grad: Tensor | None, param: Tensor) -> Tensor:
    """A gradient as one row of numbers, in the order in which the parameter's lie in memory."""
    if grad is None:
        return torch.zeros(param.numel(), dtype=param.dtype, device=param.device)
    return grad.detach().to(param.dtype).permute(_order(param)).reshape(-1)


def _order(param: Tensor) -> list[int]:
    """The parameter's axes, from the one with the widest stride to the one with the narrowest."""
    strides = param.stride()
    return sorted(range(param.ndim), key=lambda axis: -strides[axis])


def _as_laid_out(row: Tensor, param: Tensor) -> Tensor:
    """The inverse of :func:`_dense`: a view with the parameter's shape and order of axes."""
    order = _order(param)
    shape = [param.shape[axis] for axis in order]
    back = sorted(range(param.ndim), key=lambda axis: order[axis])
    return row.view(shape).permute(back)
