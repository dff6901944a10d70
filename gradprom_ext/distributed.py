"""Averages of the gradients over the processes that train one model together, before the gate is taken.

DistributedDataParallel averages what the first backward of a forward leaves, and nothing that comes after it. A gate
by gradients of one's own batch differs from process to process, and the replicas drift apart. So the optimizer averages
all gradients itself: then the Gram matrix, the gate and the update are the same numbers everywhere.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import Gradients

__all__ = ["Average", "ReplicaError", "Replicas", "compare", "union"]

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
        averages = [Average(self, params) for _ in losses]
        for average, grads in zip(averages, losses, strict=True):
            average.send_rest(grads)
        return [average.result() for average in averages]


class Average:
    """The means over all processes of the gradients of one loss, sent bucket by bucket, in one order everywhere: from
    the last parameter to the first, as a backward pass finishes them.

    :param replicas: who takes part.
    :param params: the same in all processes, in one order.
    """

    def __init__(self, replicas: Replicas, params: Sequence[Tensor]) -> None:
        self._replicas, self.params = replicas, params
        self._buckets = _buckets(params)
        self._missing = [len(places) for places in self._buckets]  # gradients that a backward has not finished
        self._bucket_of = {i: b for b, places in enumerate(self._buckets) for i in places}
        self._pending: list[tuple[Tensor, dist.Work]] = []
        self._results: list[Tensor | None] = [None] * len(params)
        self._counted: tuple[Tensor, dist.Work] | None = None
        self._lacking = False

    @contextlib.contextmanager
    def during_backward(self) -> Iterator[None]:
        """Sends each bucket as soon as the backward pass within this block has finished it."""
        late: list[int] = []

        def finished(i: int, param: Tensor) -> None:
            bucket = self._bucket_of[i]
            self._missing[bucket] -= 1
            if bucket < len(self._pending):
                late.append(i)  # an exception from here would leave the other processes waiting in the collective
            # A bucket waits for those before it, as losses may reach other parameters in another process.
            while len(self._pending) < len(self._buckets) and not self._missing[len(self._pending)]:
                places = self._buckets[len(self._pending)]
                self._send([self.params[i].grad for i in places])

        hooks = [
            p.register_post_accumulate_grad_hook(lambda p, i=i: finished(i, p))  # type: ignore[misc]
            for i, p in enumerate(self.params)
            if p.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if late:
            raise RuntimeError(
                f"the gradient of params[{late[0]}] was added to after it had been sent to the other processes: one "
                "backward pass finished it several times, as activation checkpointing with use_reentrant=True does; "
                "leave last=True out, and it is sent in step()"
            )

    def send_rest(self, grads: Gradients) -> None:
        """Sends what no backward pass has sent.

        :param grads: one of each parameter, or ``None``.
        """
        for places in self._buckets[len(self._pending) :]:
            self._send([grads[i] for i in places])
        device = self.params[0].device if self.params else torch.device("cpu")
        self._lacking = any(g is None for g in grads)
        if self._lacking:
            present = torch.tensor([float(g is not None) for g in grads], device=device)
        else:  # nothing comes from the host, for which a device would wait
            present = torch.ones(len(grads), device=device)
        if len(grads):
            self._counted = present, self._all_reduce(present)

    def result(self) -> list[Tensor | None]:
        """Waits, in the order of the device's work, for all that was sent.

        :returns: new tensors, laid out as the parameters are; ``None`` where no process has a gradient.
        :raises RuntimeError: another process has gone, or did not answer within the group's time-out.
        """
        for sent, work in self._pending:
            work.wait()
            sent.div_(self._replicas.number)
        if self._counted is not None:
            present, work = self._counted
            work.wait()
            if self._lacking:
                known = present.tolist()
                return [result if known[i] else None for i, result in enumerate(self._results)]
        return self._results

    def _send(self, grads: Gradients) -> None:
        """The next bucket's."""
        places = self._buckets[len(self._pending)]
        with torch.no_grad():
            flat = torch.cat([_dense(g, self.params[i]) for i, g in zip(places, grads, strict=True)])
        self._pending.append((flat, self._all_reduce(flat)))
        start = 0
        for i in places:
            like = self.params[i]
            self._results[i] = _as_laid_out(flat[start : start + like.numel()], like)
            start += like.numel()

    def _all_reduce(self, tensor: Tensor) -> dist.Work:
        return dist.all_reduce(tensor, group=self._replicas.group, async_op=True)


def compare(group: dist.ProcessGroup, numbers: Tensor, step: int) -> None:
    """Checks that all processes of a group have the same numbers, bit for bit.

    :param numbers: float64, of any shape; NaNs are equal.
    :param step: for the message.
    :raises ReplicaError: they differ; in every process, naming the first that differs from the first process.
    """
    bits = numbers.detach().reshape(-1).view(torch.int64)
    all_bits = [torch.empty_like(bits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_bits, bits, group=group)
    for place, other in enumerate(all_bits):
        if not torch.equal(other, all_bits[0]):
            first, rank = (dist.get_global_rank(group, each) for each in (0, place))
            raise ReplicaError(
                f"at step {step} process {rank} of {dist.get_world_size()} decided otherwise than process {first}: "
                f"{other.view(torch.float64).tolist()} instead of {all_bits[0].view(torch.float64).tolist()} "
                "(skipped, combined norm, clip coefficient; per row the norms, weights, cosines and gates; sums of "
                "the whole parameters). Did .grad, lambda or the parameters come to differ?"
            )


def union(names: Collection[str], known: Sequence[str], groups: Sequence[tuple[dist.ProcessGroup, str]]) -> set[str]:
    """The names that any process of some groups has.

    :param known: all that there may be, in one order everywhere.
    :param groups: with the type of the device that their processes exchange tensors on.
    """
    present = torch.tensor([int(name in names) for name in known], dtype=torch.int32)
    for group, device in groups:
        present = present.to(device)
        dist.all_reduce(present, dist.ReduceOp.MAX, group=group)
    return set(itertools.compress(known, present.tolist()))


def _buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of tensors that go together: of one device and type, about :data:`BUCKET` bytes, from the last to the
    first."""
    open_: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    held: dict[tuple[torch.device, torch.dtype], int] = {}
    done: list[list[int]] = []
    for i, t in reversed(list(enumerate(tensors))):
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
