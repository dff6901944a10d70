"""The compiled module, for type checkers; csrc/python/module.cpp is the source, and CI compares the two."""

from collections.abc import Sequence
from typing import Any, SupportsInt

from torch import Tensor

MAX_AUX: int
STATS_HEADER: int
HYPER_NAMES: tuple[str, ...]
COMPILER: str
CUDA_ARCHITECTURES: str
OPENMP: bool

def cpu_isa() -> str: ...
def cuda_unusable(device: SupportsInt) -> str: ...
def tensor_path(tensor: object) -> str: ...
def grads_of(params: list[Tensor]) -> list[Tensor | None]: ...
def same_objects(a: list[Any], b: list[Any]) -> bool: ...
def stats_row_size(num_aux: SupportsInt) -> int: ...
def moment_names(rule: Rule) -> list[str]: ...

class _Enum:
    def __init__(self, value: SupportsInt) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
    __members__: dict[str, Any]

class Rule(_Enum):
    sgd: Rule
    adam: Rule

class Gate(_Enum):
    hard: Gate
    soft: Gate
    always: Gate
    never: Gate
    project: Gate

class CudaOptions:
    def __init__(
        self, *, cooperative: bool = True, max_blocks: SupportsInt = 0, max_shared_bytes: SupportsInt = -1
    ) -> None: ...

class Group:
    def __init__(self, *, lr: float | Tensor, **rest: float | bool) -> None: ...

class GateSettings:
    def __init__(
        self,
        *,
        gate: Gate,
        threshold: float,
        max_grad_norm: float,
        aux_cap: float,
        aux_weight: tuple[float, ...] | Tensor,
    ) -> None: ...

class ParametersMoved(ValueError): ...

class Plan:
    def __init__(
        self,
        *,
        rule: Rule,
        params: list[Tensor],
        groups: Sequence[int],
        states: list[dict[str, Any]],
        num_aux: int,
        per_tensor: bool,
        master_weights: bool,
        cuda: CudaOptions = ...,
    ) -> None: ...
    def matches(self, params: list[Tensor]) -> bool: ...
    def rebind(self, params: list[Tensor]) -> bool: ...
    def release(self) -> bool: ...
    def bind_gradients(self, main: Sequence[Tensor | None], aux: Sequence[Sequence[Tensor | None]]) -> None: ...
    def bind_states(self, groups: Sequence[Group]) -> list[int]: ...
    def step(
        self, groups: Sequence[Group], gate: GateSettings, stats: Tensor, skipped_steps: Tensor | None
    ) -> None: ...
    def measure(self, gate: GateSettings, stats: Tensor) -> bool: ...
    def gram(self, out: Tensor) -> None: ...
    def update(self, groups: Sequence[Group], weights: Tensor, skip: Tensor) -> None: ...
