"""The compiled module, for type checkers; csrc/bindings.cpp is the source."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

MAX_AUX: int
STATS_HEADER: int
CUDA_ARCHITECTURES: str
COMPILER: str
OPENMP: bool

def cpu_isa() -> str: ...
def tensor_path(tensor: Tensor) -> str: ...
def allow_exchange(allowed: bool) -> None: ...
def __getattr__(name: str) -> Any: ...

class Group:
    def __init__(self, *, lr: float | Tensor, **rest: float | bool) -> None: ...

class GateSettings:
    def __init__(
        self, *, gate: Any, threshold: float, max_grad_norm: float, aux_weight: tuple[float, ...] | Tensor
    ) -> None: ...

class Plan:
    def __init__(
        self,
        *,
        rule: Any,
        params: list[Tensor],
        groups: list[int],
        states: list[dict[str, Any]],
        num_aux: int,
        per_tensor: bool,
        master_weights: bool,
    ) -> None: ...
    def matches(self, params: list[Tensor]) -> bool: ...
    def bind_gradients(self, main: Sequence[Tensor | None], aux: Sequence[Sequence[Tensor | None]]) -> None: ...
    def bind_states(self, groups: Sequence[Group]) -> list[int]: ...
    def step(self, groups: Sequence[Group], gate: GateSettings, stats: Tensor, skipped_steps: Tensor) -> None: ...
    def gram(self, out: Tensor) -> None: ...
    def update(self, groups: Sequence[Group], weights: Tensor, skip: Tensor) -> None: ...
