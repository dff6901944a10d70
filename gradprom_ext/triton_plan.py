"""The Triton backend's plan: lays tensors out as tables and launches :mod:`gradprom_ext.triton_kernels` over them.

A step is three launches (measure, decide, update) where all parameters are of one :class:`Kind`: the same types of
parameter, gradients and states, and the same way to reach their elements. With several kinds, measure and update are
launched once for each.

Memory traffic of a step, fp32 with one auxiliary, in bytes per parameter: SGD 8 + 8 + 4 + 4 = 24, with momentum 32,
Adam 40, AMSGrad 48; less by what the L2 cache still has of the gradients when the update reads them a second time. SGD
on bf16 parameters and gradients takes 12; with fp32 masters SGD takes 20 and Adam 36.

Nothing waits for the device. What the kernels know about the tensors lies in tables of 64-bit words, which are sent
again (from pinned memory, behind the work already enqueued) when a word in them has changed: gradients mostly come back
at the same addresses, so a step in full swing sends nothing.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import _checks, _torch
from .plan import Gradients, PlanSpec, StatesByName, StepRequest
from .policy import GatePolicy, kernel_of
from .rules import Hyper
from .stats import HEADER, GateStats, packed_size

#: A tensor as the kernels see it: address, type, and strides in its parameter's index space; ``None`` instead where the
#: elements of that space follow each other in its memory.
Operand = tuple[int, torch.dtype, "tuple[int, ...] | None"]

#: All that may change about a tensor from step to step, as PyTorch says it.
Look = tuple[int, torch.dtype, torch.device, torch.Size, tuple[int, ...]]

#: A table of 64-bit words in host memory: numbers, addresses, and the bits of float64 values.
Words = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tiling:
    """How work is cut up. The order of every sum follows from this and from the sizes, never from the device. Nothing
    is autotuned: the kernels work in place and cannot be run several times."""

    block: int  #: elements that a program works on at once, a power of two
    warps: int
    shortest_chunk: int  #: elements of one program, a multiple of ``block``
    longest_chunk: int
    chunks: int  #: so many are aimed at: enough for every multiprocessor, not too many for the one program that decides
    rows: int  #: of Gram matrices that are decided at once where there are several,
    slots: int  #: and partial ones that each adds at once; ``rows * slots`` where there is one row
    items: int  #: parameters whose coefficients are worked out at once
    deciding_warps: int

    def measure_block(self, grads: Sequence[torch.dtype]) -> int:
        """Elements that a program measures at once: one vector of 16 bytes of the narrowest gradient per thread. More
        would not fit into the registers: a thread has a sum in fp64 for each of its elements and each entry of the
        matrix."""
        per_vector = 16 // min(dtype.itemsize for dtype in grads)
        return self.block * (min(per_vector, 4) if len(grads) > 3 else per_vector) // 8

    def chunk_length(self, elements: int) -> int:
        """Elements per chunk for a model of so many."""
        length = self.shortest_chunk
        while length < self.longest_chunk and length * self.chunks < elements:
            length *= 2
        return length


#: 128 threads with 8 elements each: two vectors of 16 bytes from an fp32 tensor, one from a 16-bit tensor.
GPU_TILING = Tiling(
    block=1024,
    warps=4,
    shortest_chunk=2048,
    longest_chunk=65536,
    chunks=4096,
    rows=32,
    slots=32,
    items=256,
    deciding_warps=8,
)
#: In the interpreter an operation costs microseconds, however many elements it works on.
INTERPRETER_TILING = Tiling(
    block=8192,
    warps=1,
    shortest_chunk=16384,
    longest_chunk=65536,
    chunks=64,
    rows=1024,
    slots=4,
    items=1024,
    deciding_warps=1,
)


class IndexSpace:
    """Runs over a parameter in the order of its memory: its dimensions other than 1, slowest stride first. So tensors
    of equal dense layout (also channels_last, transposed, ...) are flat, and any other layout is matched, never
    permuted."""

    def __init__(self, shape: torch.Size, strides: tuple[int, ...]) -> None:
        self.shape, self.strides = shape, strides
        self.numel = shape.numel()
        self._order = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -strides[d])
        self.sizes = tuple(shape[d] for d in self._order)
        self.dense = tuple(math.prod(self.sizes[i + 1 :]) for i in range(len(self.sizes)))
        self.checked = False  #: the parameter was found to be writable element by element
        self._known: dict[tuple[int, ...], tuple[int, ...] | None] = {}

    def strides_of(self, strides: tuple[int, ...]) -> tuple[int, ...] | None:
        """What an :data:`Operand` says of a tensor of this shape with these strides."""
        if strides not in self._known:
            own = tuple(strides[d] for d in self._order)
            self._known[strides] = None if own == self.dense or self.numel == 0 else own
        return self._known[strides]


class Kind(NamedTuple):
    """What parameters must have in common to be worked on in one launch."""

    updated: torch.dtype | None  #: of what the update reads and writes, the parameter or its master
    rounded: torch.dtype | None  #: of the parameter where there is a master
    states: tuple[torch.dtype, ...]
    grads: tuple[torch.dtype, ...]
    wide: bool  #: the arithmetic is in float64
    aligned: bool  #: flat, at multiples of 16 bytes
    strided: bool


class Item(NamedTuple):
    """A parameter that has a gradient, with all that belongs to it. The tensors of the update are left out where only
    the gradients are measured."""

    param: int  #: index in the plan's list of parameters
    updated: Operand | None
    rounded: Operand | None
    states: tuple[Operand, ...]
    step: int  #: address of the counter of updates; 0 for stateless rules
    grads: tuple[Operand | None, ...]

    def operands(self) -> tuple[Operand | None, ...]:
        """In the order of the kernels' tables."""
        return (self.updated, self.rounded, *self.states, *(None,) * (3 - len(self.states)), *self.grads)

    def kind(self) -> Kind:
        tensors = [t for t in self.operands() if t is not None]
        grads = [g for g in self.grads if g is not None]
        strided = any(strides is not None for _, _, strides in tensors)
        return Kind(
            updated=self.updated and self.updated[1],
            rounded=self.rounded and self.rounded[1],
            states=tuple(dtype for _, dtype, _ in self.states),
            # An absent gradient is a zero of any type; this one does not make another kind.
            grads=tuple((g or grads[0])[1] for g in self.grads),
            wide=any(t is not None and t[1] == torch.float64 for t in (self.updated, *grads)),
            aligned=not strided and all(address % 16 == 0 for address, _, _ in tensors),
            strided=strided,
        )


class Launch(NamedTuple):
    """A run of the table of chunks."""

    kind: Kind
    first_chunk: int
    num_chunks: int


@dataclass(frozen=True)
class Work:
    """The items of a step cut into chunks, as tables of words; gradprom_ext/triton_kernels.py names their columns."""

    launches: list[Launch]
    num_items: int
    num_slots: int
    chunk_length: int
    tables: tuple[Words, ...]  #: items, chunks, slots of the rows, geometry


def arrange(
    items: Sequence[Item], spaces: Sequence[IndexSpace], groups: Sequence[int], rows: int | None, tiling: Tiling
) -> Work:
    """Lays out a step.

    :param items: parameters that have a gradient.
    :param spaces: one per parameter of the plan, and likewise ``groups``, the indices of their hyper-parameters.
    :param rows: their number, where each has its own Gram matrix; ``None``: one matrix for all.
    """
    numel = _words([spaces[item.param].numel for item in items])
    length = tiling.chunk_length(int(numel.sum()))
    # Slots of partial matrices are numbered in the order of the parameters, whatever their kinds.
    count = -(-numel // length)
    slot = np.cumsum(count) - count

    by_kind: dict[Kind, list[int]] = {}
    for n, item in enumerate(items):
        by_kind.setdefault(item.kind(), []).append(n)
    launches: list[Launch] = []
    chunks = [np.empty((0, 3), np.int64)]
    first_chunk = 0
    for kind, members in by_kind.items():
        of_item = np.repeat(members, count[members])
        number = np.arange(len(of_item)) - np.repeat(np.cumsum(count[members]) - count[members], count[members])
        chunks.append(np.stack([of_item, number * length, slot[of_item] + number], axis=1))
        if len(of_item) > 0:  # there may be nothing but empty parameters
            launches.append(Launch(kind, first_chunk, len(of_item)))
        first_chunk += len(of_item)

    row_of = [0 if rows is None else item.param for item in items]
    slots_of = np.zeros(1 if rows is None else rows, np.int64)
    np.add.at(slots_of, row_of, count)

    table: list[int] = []
    geometry: list[int] = []
    for item, row in zip(items, row_of, strict=True):
        space = spaces[item.param]
        operands = item.operands()
        table += (space.numel, row, groups[item.param], item.step, len(geometry))
        table += (0 if t is None else t[0] for t in operands)
        if any(t is not None and t[2] is not None for t in operands):
            geometry += (len(space.sizes), *space.sizes)
            for t in operands:
                geometry += space.dense if t is None or t[2] is None else t[2]
    tables = _words(table), np.concatenate(chunks).ravel(), np.cumsum([0, *slots_of]), _words(geometry)
    return Work(launches, len(items), first_chunk, length, tables)


class Sender:
    """Brings tables to the device: again only when a word has changed, or when another stream is to read them."""

    #: Captured CUDA graphs copy from these at every replay. A graph that is gone does not say so, and it may outlive
    #: the plan (a captured call of a function leaves none behind), so they stay.
    _captured: ClassVar[list[Tensor]] = []

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: tuple[Words, ...] = ()
        self._stream = 0
        self._sent: tuple[Tensor, ...] = ()
        # For the next capture, during which not every PyTorch can allocate pinned memory.
        self._spare = torch.empty(0, dtype=torch.int64)

    def send(self, tables: tuple[Words, ...]) -> tuple[Tensor, ...]:
        """The tables in device memory, for kernels on the current stream."""
        if self._device.type == "cpu":
            return tuple(map(torch.from_numpy, tables))
        if torch.cuda.is_current_stream_capturing():
            # A graph gets memory of its own: what other steps leave in theirs is not there when it is replayed.
            host = self._fill(self._spare, tables)
            self._spare = self._spare[:0]
            self._captured.append(host)
            return self._copy(host, tables)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        if not self._sent or stream != self._stream or not self._same(tables):
            # Fresh memory on both sides: PyTorch gives neither away before the work in flight is done with it.
            self._sent = self._copy(self._fill(self._spare[:0], tables), tables)
            self._seen, self._stream = tables, stream
        if len(self._spare) < _rooms(tables):
            self._spare = self._pinned(_rooms(tables))
        return self._sent

    def _same(self, tables: tuple[Words, ...]) -> bool:
        return all(a is b or np.array_equal(a, b) for a, b in zip(tables, self._seen, strict=True))

    @staticmethod
    def _pinned(words: int) -> Tensor:
        return torch.zeros(words, dtype=torch.int64, pin_memory=True)

    def _fill(self, memory: Tensor, tables: tuple[Words, ...]) -> Tensor:
        """The tables one after the other, in ``memory`` if that is large enough."""
        words = _rooms(tables)
        host = memory[:words] if len(memory) >= words else self._pinned(words)
        for place, table in zip(host.split(list(map(_room, tables))), tables, strict=True):
            place[: len(table)] = torch.from_numpy(table)
        return host

    def _copy(self, host: Tensor, tables: tuple[Words, ...]) -> tuple[Tensor, ...]:
        return host.to(self._device, non_blocking=True).split(list(map(_room, tables)))


def _look_at(tensors: Sequence[Tensor | None]) -> list[Look | None]:
    """:raises TypeError: a tensor whose class intercepts operations: it need not have memory."""
    for kind in set(map(type, tensors)) - {type(None), Tensor, torch.nn.Parameter}:
        if not issubclass(kind, Tensor) or _torch.intercepts_operations(kind):
            raise TypeError(f"a {kind.__name__} has no memory that could be looked at")
    return [None if t is None else (t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in tensors]


def _room(table: Words) -> int:
    """Words: every table begins at a multiple of 16 bytes, for which the kernels are compiled."""
    return len(table) + len(table) % 2


def _rooms(tables: tuple[Words, ...]) -> int:
    return sum(map(_room, tables))


def _words(words: Sequence[int]) -> Words:
    return np.array(words, np.int64)


def _bits(x: float) -> int:
    """A float64 as a word."""
    return struct.unpack("=q", struct.pack("=d", x))[0]


class Arrangement:
    """One of a plan's two kinds of work: with the tensors of the update, or with the gradients alone."""

    def __init__(self, device: torch.device) -> None:
        self._sender = Sender(device)
        self._work: Work | None = None
        self._states: list[Look | None] = []

    def drop(self) -> None:
        """A parameter or a gradient is no longer where it was."""
        self._work = None

    def get(self, states: list[Look | None], make: Callable[[], Work]) -> Work:
        """What ``make`` returns, which depends on ``states`` as they look now."""
        if self._work is None or states != self._states:
            self._work, self._states = make(), states
        return self._work

    def send(self) -> tuple[Tensor, ...]:
        assert self._work is not None
        return self._sender.send(self._work.tables)


class TritonPlan(StatesByName):
    """A plan of :mod:`gradprom_ext.triton_kernels`; see :class:`gradprom_ext.plan.PlanBase`.

    :param kernels: that module. Loaded under ``TRITON_INTERPRET=1``, its kernels work on host memory.
    """

    fused = True

    def __init__(self, kernels: Any, spec: PlanSpec) -> None:
        super().__init__(spec)
        self._kernels = kernels
        params = self._params = spec.params
        self._rule, self._groups, self._states = spec.rule, spec.groups, spec.states
        self._num_grads = 1 + spec.num_aux
        self._rows = spec.rows if spec.per_tensor else None
        self._tiling = INTERPRETER_TILING if self._device.type == "cpu" else GPU_TILING
        self._types: dict[torch.dtype | None, Any] = {None: None}
        self._types |= {dtype: getattr(kernels.tl, str(dtype).removeprefix("torch.")) for dtype in _checks.DTYPES}
        self._seen_params = _look_at(params)
        self._seen_grads: list[list[Look | None]] = []
        self._spaces = [IndexSpace(p.shape, p.stride()) for p in params]
        self._grads: list[list[Operand | None]] = []
        self._resolved: Sequence[Gradients] = []
        self._active: list[int] = []  # parameters that have a gradient; the others are left alone
        self._measured, self._stepped = Arrangement(self._device), Arrangement(self._device)
        self._settings = Sender(self._device)

    # ------------------------------------------------------------------------------------------------------------------
    # What a plan is asked for

    def matches(self, params: list[Tensor]) -> bool:
        if not super().matches(params):
            return False
        seen = _look_at(params)
        if seen != self._seen_params:  # `p.data = ...`, `module.half()`
            self._seen_params = seen
            self._spaces = [IndexSpace(p.shape, p.stride()) for p in params]
            self._seen_grads = []
        return True

    def bind_gradients(self, main: Gradients, aux: Sequence[Gradients]) -> None:
        resolved: list[Gradients] = [main, *aux]
        seen: list[list[Look | None]] = []
        with contextlib.suppress(
            AttributeError, TypeError, RuntimeError, NotImplementedError
        ):  # no tensor, or without memory
            # What a view with the negative bit has in memory are the opposites of its values.
            resolved = [[g.resolve_neg() if g is not None and g.is_neg() else g for g in gs] for gs in resolved]
            seen = [_look_at(grads) for grads in resolved]
        self._resolved = resolved  # alive until the next step
        if seen and seen == self._seen_grads:
            return
        self._seen_grads = []  # until all are found to be in order
        names = ["main_grads", *(f"aux_grads[{k}]" for k in range(len(aux)))]
        self._grads = [self._bind(name, grads) for name, grads in zip(names, resolved, strict=True)]
        self._active = [i for i, grads in enumerate(zip(*self._grads, strict=True)) if any(grads)]
        self._seen_grads = seen
        self._measured.drop()
        self._stepped.drop()

    def is_active(self, i: int) -> bool:
        return any(grads[i] is not None for grads in self._grads)

    def missing_states(self, hypers: Sequence[Hyper]) -> list[int]:
        self._check_writable()
        return super().missing_states(hypers)

    def gram(self) -> Tensor:
        n = self._num_grads
        work = self._measured.get([], lambda: self._arrange(None))
        grams = self._empty(self._num_rows, n, n)
        with self._on_device():
            items, chunks, row_slots, geometry = self._measured.send()
            partials = self._measure(work, items, chunks, geometry)
            self._decide(self._kernels.gram_kernel, row_slots, partials, grams, self._num_rows, N=n, **self._tile())
        return grams

    def update(self, hypers: Sequence[Hyper], weights: Tensor, skipped: Tensor) -> None:
        work = self._work(hypers)
        settings = (self._describe_groups(hypers),)
        with self._on_device():
            items, chunks, _, geometry = self._stepped.send()
            (groups,) = self._settings.send(settings)
            verdict = self._empty(HEADER).fill_(1.0)  # the weights have been clipped already
            verdict[0].copy_(skipped, non_blocking=True)
            coefficients = self._empty(work.num_items, self._kernels.COEFFICIENTS.value)
            self._decide(
                self._kernels.prepare_kernel,
                items,
                groups,
                coefficients,
                verdict,
                work.num_items,
                RULE=self._rule.name,
                N=self._num_grads,
                ITEMS=self._tiling.items,
            )
            self._update(work, items, chunks, geometry, weights.contiguous(), coefficients, verdict)

    def step(self, request: StepRequest) -> GateStats:
        hypers, policy, aux_weight, aux_cap, max_grad_norm, skipped_steps = request
        work = self._work(hypers)
        settings = self._describe_groups(hypers), self._describe_gate(policy, aux_weight, aux_cap, max_grad_norm)
        with self._on_device():
            items, chunks, row_slots, geometry = self._stepped.send()
            groups, gate = self._settings.send(settings)
            stats = self._empty(packed_size(self._num_rows, self._num_grads - 1))
            weights = self._empty(self._num_rows, self._num_grads)
            coefficients = self._empty(work.num_items, self._kernels.COEFFICIENTS.value)
            partials = self._measure(work, items, chunks, geometry)
            self._decide(
                self._kernels.decide_kernel,
                row_slots,
                items,
                groups,
                gate,
                partials,
                weights,
                coefficients,
                stats,
                skipped_steps,
                self._num_rows,
                work.num_items,
                GATE=kernel_of(policy),
                RULE=self._rule.name,
                N=self._num_grads,
                ITEMS=self._tiling.items,
                **self._tile(),
            )
            self._update(work, items, chunks, geometry, weights, coefficients, stats)
        return GateStats(stats, self._num_grads - 1, self._rows)

    # ------------------------------------------------------------------------------------------------------------------
    # Launches

    def _measure(self, work: Work, items: Tensor, chunks: Tensor, geometry: Tensor) -> Tensor:
        partials = self._empty(work.num_slots, self._num_grads * (self._num_grads + 1) // 2)
        for kind, first_chunk, num_chunks in work.launches:
            self._kernels.measure_kernel[(num_chunks,)](
                chunks,
                items,
                geometry,
                partials,
                first_chunk,
                work.chunk_length,
                DTYPES=self._triton_types(kind.grads),
                ALIGNED=kind.aligned,
                STRIDED=kind.strided,
                BLOCK=self._tiling.measure_block(kind.grads),
                num_warps=self._tiling.warps,
                enable_fp_fusion=True,
            )
        return partials

    def _decide(self, kernel: Any, *args: Any, **constants: Any) -> None:
        kernel[(1,)](*args, **constants, num_warps=self._tiling.deciding_warps, enable_fp_fusion=True)

    def _tile(self) -> dict[str, int]:
        """Rows of Gram matrices, and partial matrices of each, that the deciding program takes at once."""
        rows, slots = self._tiling.rows, self._tiling.slots
        return {"ROWS": 1, "SLOTS": rows * slots} if self._rows is None else {"ROWS": rows, "SLOTS": slots}

    def _update(
        self,
        work: Work,
        items: Tensor,
        chunks: Tensor,
        geometry: Tensor,
        weights: Tensor,
        coefficients: Tensor,
        verdict: Tensor,
    ) -> None:
        for kind, first_chunk, num_chunks in reversed(work.launches):
            self._kernels.update_kernel[(num_chunks,)](
                chunks,
                items,
                geometry,
                weights,
                coefficients,
                verdict,
                first_chunk,
                work.chunk_length,
                RULE=self._rule.name,
                T=self._types[torch.float64 if kind.wide else torch.float32],
                UPDATED_DTYPE=self._types[kind.updated],
                ROUNDED_DTYPE=self._types[kind.rounded],
                STATE_DTYPES=self._triton_types(kind.states),
                GRAD_DTYPES=self._triton_types(kind.grads),
                ALIGNED=kind.aligned,
                STRIDED=kind.strided,
                BLOCK=self._tiling.block,
                num_warps=self._tiling.warps,
                enable_fp_fusion=True,
            )
        # The kernels write through raw addresses; autograd must still notice that saved parameters are stale.
        torch.autograd.graph.increment_version(self._params)

    def _triton_types(self, dtypes: Sequence[torch.dtype]) -> tuple[Any, ...]:
        return tuple(self._types[dtype] for dtype in dtypes)

    @property
    def _num_rows(self) -> int:
        return 1 if self._rows is None else self._rows

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self._device)

    def _on_device(self) -> contextlib.AbstractContextManager[None]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    # ------------------------------------------------------------------------------------------------------------------
    # Tensors

    def _work(self, hypers: Sequence[Hyper]) -> Work:
        """This step's work with everything that the update touches. Checks all of it."""
        self._check_writable()
        states = [self._states[i][name] for i, names in self.needed_states(hypers) for name in names]
        return self._stepped.get(_look_at(states), lambda: self._arrange(hypers))

    def _arrange(self, hypers: Sequence[Hyper] | None) -> Work:
        items = [self._item(i, None if hypers is None else hypers[self._groups[i]]) for i in self._active]
        return arrange(items, self._spaces, self._groups, self._rows, self._tiling)

    def _item(self, i: int, hyper: Hyper | None) -> Item:
        grads = tuple([gs[i] for gs in self._grads])
        if hyper is None:
            return Item(i, None, None, (), 0, grads)
        names = self._rule.moment_names(hyper)
        states = tuple([self._state(i, name) for name in names])
        step = self._step_counter(i) if names else 0
        param = self._operand(i, self._params[i])
        if not self._rule.has_master(self._params[i]):
            return Item(i, param, None, states, step, grads)
        master = self._state(i, "master")
        if master[1] != torch.float32:
            raise TypeError(f"state of params[{i}]['master'] must be a float32 tensor")
        return Item(i, master, param, states, step, grads)

    def _operand(self, i: int, tensor: Tensor) -> Operand | None:
        """``None`` for a tensor that does not go with parameter ``i``."""
        space = self._spaces[i]
        if (
            isinstance(tensor, Tensor)
            and not (tensor.is_nested or _torch.intercepts_operations(type(tensor)) or _torch.is_functional(tensor))
            and tensor.layout == torch.strided
            and tensor.dtype in self._types
            and tensor.shape == space.shape
            and tensor.device == self._device
            and (space.numel == 0 or _checks.has_room(tensor))
        ):
            return tensor.data_ptr(), tensor.dtype, space.strides_of(tensor.stride())
        return None

    def _bind(self, name: str, grads: Gradients) -> list[Operand | None]:
        if len(grads) == len(self._params):
            operands = [None if g is None else self._operand(i, g) for i, g in enumerate(grads)]
            if all(g is None or t is not None for g, t in zip(grads, operands, strict=True)):
                return operands
        _checks.check_gradients(name, grads, self._params)
        raise AssertionError(f"{name} was refused for no reason")

    def _state(self, i: int, key: str) -> Operand:
        tensor = self._states[i][key]
        operand = self._operand(i, tensor)
        name = f"state of params[{i}]['{key}']"
        if operand is None:
            _checks.check_param(name, tensor)
            _checks.check_state(name, tensor, self._params[i])
            raise ValueError(f"{name} is on {tensor.device}, but its parameter is on {self._device}")
        _checks.check_param(name, tensor)
        _checks.check_writable(name, tensor)
        return operand

    def _step_counter(self, i: int) -> int:
        step = self._states[i]["step"]
        if step.dtype != torch.float32 or step.ndim != 0 or step.device != self._device:
            raise TypeError(f"state of params[{i}]['step'] must be a float32 tensor of no dimensions on {self._device}")
        return step.data_ptr()

    def _check_writable(self) -> None:
        for i, param in enumerate(self._params):
            if not self._spaces[i].checked:
                _checks.check_param(f"params[{i}]", param)
                _checks.check_writable(f"params[{i}]", param)
                self._spaces[i].checked = True

    # ------------------------------------------------------------------------------------------------------------------
    # Settings

    def _describe_groups(self, hypers: Sequence[Hyper]) -> Words:
        words: list[int] = []
        for h in hypers:
            words += self._number(h.lr, "lr")
            words += map(
                _bits,
                (
                    h.weight_decay,
                    -1.0 if h.maximize else 1.0,
                    h.momentum,
                    h.dampening,
                    float(h.nesterov),
                    1.0 - h.beta1,
                    h.beta2,
                    1.0 - h.beta2,
                    _log(h.beta1),
                    _log(h.beta2),
                    h.eps,
                    float(h.decoupled),
                ),
            )
        return _words(words)

    def _describe_gate(
        self,
        policy: GatePolicy,
        aux_weight: tuple[float, ...] | Tensor,
        aux_cap: float | None,
        max_grad_norm: float | None,
    ) -> Words:
        words = [_bits(policy.threshold), _bits(max_grad_norm or 0.0), _bits(aux_cap or 0.0)]
        num_aux = self._num_grads - 1
        if isinstance(aux_weight, Tensor):
            aux_weight = tuple(aux_weight.expand(num_aux))
        for weight in aux_weight:
            words += self._number(weight, "aux_weight")
        return _words(words)

    def _number(self, x: float | Tensor, name: str) -> tuple[int, int, int]:
        """Three words: a number that is known now, or the address where the kernels find it."""
        if not isinstance(x, Tensor) or x.device != self._device:
            return _bits(float(x)), 0, 0
        if x.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must hold one number")
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be a number, or a float32 or float64 tensor")
        return (0, x.data_ptr(), 0) if x.dtype == torch.float32 else (0, 0, x.data_ptr())


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
