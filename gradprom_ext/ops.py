"""The functions as operators of PyTorch, ``torch.ops.gradprom_ext.*``: what ``torch.compile`` sees of them.

A compiler cannot look into a kernel. It needs to know what goes in, what is written to and what comes out: the schemas
below declare that, and the fake implementations say it without running anything. The real ones are the ordinary step,
on whatever backend the tensors call for. Eager mode does not go through here. The optimizers do not either: they run
between the graphs, as those of ``torch.optim`` do where they are not traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import rules
from ._stateless import stand_ins, stepping
from .plan import Gradients
from .policy import resolve_policy
from .settings import StepConfig
from .stats import GateStats, packed_size

__all__ = ["gradient_stats", "gradprom_", "traceable"]

_library = torch.library.Library("gradprom_ext", "DEF")
_SETTINGS = (
    "str gate, float threshold, float[] aux_weight, Tensor? aux_weight_tensor, bool per_tensor, "
    "float? aux_cap, float? max_grad_norm, str backend"
)
# `grads` holds the main gradients and then those of each auxiliary, one for every parameter.
_library.define(
    f"gradprom_(Tensor(a!)[] params, Tensor?[] grads, float lr, Tensor? lr_tensor, *, {_SETTINGS}) -> Tensor"
)
_library.define(f"gradient_stats(Tensor?[] grads, int num_aux, *, {_SETTINGS}) -> Tensor")


def traceable(config: StepConfig) -> bool:
    """Whether a step with these settings is one operator: a policy or a backend that is an object has no name that a
    schema could carry, and raising means reading."""
    named = config.kernel is not None and isinstance(config.backend, str)
    return torch.compiler.is_compiling() and named and not config.raise_nonfinite


def gradprom_(
    params: Sequence[Tensor], main: Gradients, aux: Sequence[Gradients], lr: float | Tensor, config: StepConfig
) -> GateStats:
    """:func:`gradprom_ext.gradprom_` on checked arguments."""
    packed = torch.ops.gradprom_ext.gradprom_(
        list(params),
        [g for gs in (main, *aux) for g in gs],
        0.0 if isinstance(lr, Tensor) else lr,
        lr if isinstance(lr, Tensor) else None,
        **_settings(config, len(aux)),
    )
    return GateStats(packed, len(aux), len(params) if config.per_tensor else None)


def gradient_stats(main: Gradients, aux: Sequence[Gradients], config: StepConfig) -> GateStats:
    """:func:`gradprom_ext.gradient_stats` on checked arguments."""
    grads = [g for gs in (main, *aux) for g in gs]
    packed = torch.ops.gradprom_ext.gradient_stats(grads, len(aux), **_settings(config, len(aux)))
    return GateStats(packed, len(aux), len(main) if config.per_tensor else None)


def _settings(config: StepConfig, num_aux: int) -> dict[str, Any]:
    lambdas = config.lambdas(num_aux)
    return {
        "gate": config.kernel,
        "threshold": config.policy.threshold,
        "aux_weight": [] if isinstance(lambdas, Tensor) else list(lambdas),
        "aux_weight_tensor": lambdas if isinstance(lambdas, Tensor) else None,
        "per_tensor": config.per_tensor,
        "aux_cap": config.aux_cap,
        "max_grad_norm": config.max_grad_norm,
        "backend": config.backend,
    }


def _config(
    gate: str,
    threshold: float,
    aux_weight: Sequence[float],
    aux_weight_tensor: Tensor | None,
    per_tensor: bool,
    aux_cap: float | None,
    max_grad_norm: float | None,
    backend: str,
) -> StepConfig:
    return StepConfig(
        policy=resolve_policy(gate, threshold),
        aux_weight=tuple(aux_weight) if aux_weight_tensor is None else aux_weight_tensor,
        per_tensor=per_tensor,
        aux_cap=aux_cap,
        max_grad_norm=max_grad_norm,
        raise_nonfinite=False,
        backend=backend,
    )


def _by_loss(grads: Sequence[Tensor | None], num_aux: int) -> list[list[Tensor | None]]:
    count = len(grads) // (1 + num_aux)
    return [list(grads[k * count : (k + 1) * count]) for k in range(1 + num_aux)]


@torch.library.impl(_library, "gradprom_", "CompositeExplicitAutograd")
@torch.no_grad()
def _gradprom(
    params: list[Tensor], grads: list[Tensor | None], lr: float, lr_tensor: Tensor | None, **settings: Any
) -> Tensor:
    main, *aux = _by_loss(grads, len(grads) // len(params) - 1)
    with stepping(params, len(aux), _config(**settings), _checked_before) as stepper:
        return stepper.step(main, aux, [rules.Hyper(lr if lr_tensor is None else lr_tensor)]).packed


@torch.library.impl(_library, "gradient_stats", "CompositeExplicitAutograd")
@torch.no_grad()
def _gradient_stats(grads: list[Tensor | None], num_aux: int, **settings: Any) -> Tensor:
    main, *aux = _by_loss(grads, num_aux)
    with stepping(stand_ins(main, aux), len(aux), _config(**settings), _checked_before) as stepper:
        return stepper.stats(main, aux).packed


def _checked_before() -> None:
    """What can be said of a tensor before it is real was said while the graph was made."""


def _fake_stats(like: Tensor, count: int, num_aux: int, per_tensor: bool) -> Tensor:
    return like.new_empty(packed_size(count if per_tensor else 1, num_aux), dtype=torch.float64)


@torch.library.register_fake("gradprom_ext::gradprom_", lib=_library)
def _fake_gradprom(
    params: list[Tensor], grads: list[Tensor | None], lr: float, lr_tensor: Tensor | None, **settings: Any
) -> Tensor:
    return _fake_stats(params[0], len(params), len(grads) // len(params) - 1, settings["per_tensor"])


@torch.library.register_fake("gradprom_ext::gradient_stats", lib=_library)
def _fake_gradient_stats(grads: list[Tensor | None], num_aux: int, **settings: Any) -> Tensor:
    like = next((g for g in grads if g is not None), torch.empty(0))
    return _fake_stats(like, len(grads) // (1 + num_aux), num_aux, settings["per_tensor"])
