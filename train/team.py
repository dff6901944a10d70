"""Several processes that train one run together, started by ``torchrun``: who they are, and what they agree on.

Each has a replica of all networks and a part of every batch. Gradients are averaged over all of them before an
optimizer steps, so that the replicas stay the same; the first process alone writes.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradprom_ext.distributed import Replicas
from train.errors import RunError

T = TypeVar("T")
Item = TypeVar("Item")

PATIENCE = timedelta(minutes=30)
"""For how long a process waits for another one that is alive and says nothing. One that is dead is noticed at once."""
WHILE_IT_WORKS = timedelta(days=365)
"""The same where the first process does what the others will need, which may be a training of its own."""


class Team:
    """The processes that train a run together; by itself, a process that is alone.

    :param group: of ``torch.distributed``; ``None``: no other process is known.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, evaluates and tells."""
        return self.rank == 0

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's share of a batch.

        :param items: of the whole batch; their number is a multiple of :attr:`size`.
        """
        each = len(items) // self.size
        return items[self.rank * each : (self.rank + 1) * each]

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process. All must ask."""
        if self.size == 1:
            return flag
        found = torch.tensor(float(flag))
        with self.together():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return bool(found)

    def any_of(self, flag: Tensor) -> Tensor:
        """The same of a flag on the device, ``bool []``, which is not waited for."""
        if self.size == 1:
            return flag
        found = flag.float()
        with self.together():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found.bool()

    def mean(self, measured: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What all have measured on their parts of a batch, averaged; 0-dim tensors, on the device."""
        if self.size == 1 or not measured:
            return dict(measured)
        values = torch.stack([value.detach().to(torch.float64) for value in measured.values()])
        with self.together():
            dist.all_reduce(values, group=self.group)
        return dict(zip(measured, values / self.size, strict=True))

    def average_gradients_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets an optimizer of PyTorch's step with the gradients of all processes, from now on."""
        if self.size > 1:
            optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: self.average(optimizer))

    def average(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives parameters the gradients of all processes; where they have them already, nothing changes."""
        if self.group is None or self.size == 1:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        [averages] = Replicas(self.group).average(parameters, [[p.grad for p in parameters]])
        for p, g in zip(parameters, averages, strict=True):
            p.grad = g

    def level(self, networks: Iterable[nn.Module]) -> None:
        """Gives every process the buffers of the first one (batch statistics), which each has made of its own part."""
        if self.size == 1:
            return
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for buffer in (buffer for network in networks for buffer in network.buffers()):
            kinds.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        for buffers in kinds.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            with self.together():
                dist.broadcast(flat, group=self.group, group_src=0)
            for buffer, values in zip(buffers, flat.split([each.numel() for each in buffers]), strict=True):
                buffer.copy_(values.view_as(buffer))

    def told(self, value: T) -> T:
        """What the first process says. All must ask.

        :param value: whatever can be pickled; that of other processes is ignored.
        """
        if self.size == 1:
            return value
        said = [value]
        with self.together():
            dist.broadcast_object_list(said, group=self.group, group_src=0, device=torch.device("cpu"))
        return said[0]

    def all(self, value: T) -> list[T]:
        """What each process says, in their order. All must ask."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        with self.together():
            dist.all_gather_object(said, value, group=self.group)
        return said

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """The block is done by the first process and then by the others, which find in the cache what it has made and
        wait for it as long as it takes."""
        if self.size > 1 and not self.leads:
            Team(self._patient).told(None)
        yield
        if self.size > 1 and self.leads:
            Team(self._patient).told(None)

    def alone(self) -> Team:
        """This process without the others: for what each does by itself."""
        return self if self.size == 1 else self._itself

    @functools.cached_property
    def _patient(self) -> dist.ProcessGroup:
        assert self.group is not None
        ranks = dist.get_process_group_ranks(self.group)
        return dist.new_group(ranks, WHILE_IT_WORKS, "gloo", use_local_synchronization=True)

    @functools.cached_property
    def _itself(self) -> Team:
        return Team(dist.new_group([dist.get_rank()], use_local_synchronization=True))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What processes do together in the block ends with an error that says so where one of them has gone.

        :raises RunError: another process has gone.
        """
        try:
            yield
        except RuntimeError as error:
            # What gloo raises is a plain RuntimeError that begins with the place in its sources.
            said = (str(error) or type(error).__name__).splitlines()[0]
            if not isinstance(error, dist.DistError) and "gloo" not in said and "Connection" not in said:
                raise
            raise RunError(
                f"process {self.rank} of {self.size} lost another process of this run ({said}). The message of the one "
                "that went first says why; --resume goes on from the last checkpoint"
            ) from error


ALONE = Team()


@contextlib.contextmanager
def gathered(device: torch.device) -> Iterator[Team]:
    """All processes that ``torchrun`` has started for this run; without it, this one.

    :param device: where they compute; each on a GPU of its own.
    :raises RunError: there are fewer GPUs than processes on this machine, or the others cannot be reached.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield ALONE
        return
    place, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    backend = "gloo"
    if device.type == "cuda":
        if torch.cuda.device_count() < here:
            raise RunError(
                f"torchrun started {here} processes on this machine, which has {torch.cuda.device_count()} GPUs; give "
                f"--nproc-per-node {torch.cuda.device_count()}, or --device cpu"
            )
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except RuntimeError as error:
        raise RunError(f"the processes that torchrun started did not find each other: {error}") from error
    try:
        yield Team(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
