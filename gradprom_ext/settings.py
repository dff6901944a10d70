"""The settings that every entry point shares: declared once, checked once."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import torch
from torch import Tensor

from . import backends
from .backends import Backend
from .policy import GatePolicy, kernel_of, resolve_policy

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["StepConfig", "StepSettings", "check_aux_weight", "with_settings"]

F = TypeVar("F", bound=Callable[..., Any])


class StepSettings(TypedDict, total=False):
    """Keyword arguments of the optimizers and functions.

    :param aux_weight: lambda of the auxiliary gradients, one number or one per auxiliary loss; or a tensor of those,
        read when the step runs.
    :param gate: ``"hard"`` (GradProm: open where the cosine reaches ``threshold``), ``"soft"`` (weight
        ``max(0, cosine)``), ``"always"`` (joint training), ``"never"``, ``"project"`` (one-sided PCGrad) or a
        :class:`~gradprom_ext.GatePolicy`.
    :param threshold: cosine in [-1, 1] at which ``"hard"`` and ``"soft"`` open.
    :param granularity: ``"global"``: one cosine over all parameters; ``"tensor"``: one per parameter.
    :param aux_cap: kappa > 0; lambda of each auxiliary gradient ``G_k`` is reduced, before the gate takes it, to where
        ``|lambda_k * G_k| <= kappa * |G_main|``. A main gradient of zero leaves no room: nothing auxiliary is added.
        ``None``: no cap. With ``granularity="tensor"`` each parameter has its own, by its own norms.
    :param max_grad_norm: clips the norm of the combined gradient, over all parameters, as
        ``torch.nn.utils.clip_grad_norm_`` does.
    :param nonfinite: what a NaN or infinity in any gradient does: ``"skip"`` the step, parameters, state and step
        counters staying bit for bit, or ``"raise"`` (and wait for the device to know). A float64 gradient whose squared
        norm leaves float64, one longer than 1e154, counts as infinite; one shorter than 1e-154 as zero.
    :param backend: ``"auto"``, one of :func:`~gradprom_ext.available_backends`, or a
        :class:`~gradprom_ext.backends.Backend` of one's own.

    Useful as a type where settings are kept apart from the call:

    >>> import torch, gradprom_ext as gp
    >>> settings: gp.StepSettings = {"gate": "soft", "aux_weight": 0.1, "aux_cap": 0.5}
    >>> opt = gp.GradPromSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, **settings)
    >>> opt.aux_weight
    0.1
    """

    aux_weight: float | Sequence[float] | Tensor
    gate: str | GatePolicy
    threshold: float
    granularity: Literal["global", "tensor"]
    aux_cap: float | None
    max_grad_norm: float | None
    nonfinite: Literal["skip", "raise"]
    backend: str | Backend


DEFAULTS: StepSettings = {
    "aux_weight": 1.0,
    "gate": "hard",
    "threshold": 0.0,
    "granularity": "global",
    "aux_cap": None,
    "max_grad_norm": None,
    "nonfinite": "skip",
    "backend": "auto",
}


def _annotations() -> list[tuple[str, str]]:
    """The settings' types as they are written above; a ``TypedDict`` wraps them into forward references."""
    return [(name, getattr(a, "__forward_arg__", str(a))) for name, a in StepSettings.__annotations__.items()]


def with_settings(function: F) -> F:
    """Shows the settings one by one in ``help()`` and to ``inspect.signature``, where ``function`` takes
    ``**settings``, and refuses unknown ones under the function's own name."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    names = {p.name for p in own}
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS[name], annotation=annotation)  # type: ignore[literal-required]
        for name, annotation in _annotations()
        if name not in names
    ]
    known = names | {p.name for p in shared}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                where = type(args[0]).__name__ if function.__name__ == "__init__" else function.__name__
                raise TypeError(f"{where}() got an unexpected keyword argument {name!r}")
        return function(*args, **kwargs)

    checked.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


@dataclass(frozen=True)
class StepConfig:
    """The settings, checked."""

    policy: GatePolicy
    aux_weight: float | tuple[float, ...] | Tensor
    per_tensor: bool
    aux_cap: float | None
    max_grad_norm: float | None
    raise_nonfinite: bool
    backend: str | Backend
    without: frozenset[str] = frozenset()  #: backends that other processes of the same training cannot run

    @classmethod
    def make(cls, **settings: Unpack[StepSettings]) -> StepConfig:
        """:raises ValueError: a setting has no meaning; says which and what it may be."""
        s: StepSettings = {**DEFAULTS, **settings}
        aux_cap, max_grad_norm = s["aux_cap"], s["max_grad_norm"]
        if s["granularity"] not in ("global", "tensor"):
            raise ValueError(f"granularity must be 'global' or 'tensor', got {s['granularity']!r}")
        if s["nonfinite"] not in ("skip", "raise"):
            raise ValueError(f"nonfinite must be 'skip' or 'raise', got {s['nonfinite']!r}")
        if aux_cap is not None and not 0 < aux_cap < math.inf:
            raise ValueError(f"aux_cap must be a finite number > 0 or None, got {aux_cap} (gate='never' adds nothing)")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
        backends.check_name(s["backend"])
        return cls(
            policy=resolve_policy(s["gate"], s["threshold"]),
            aux_weight=check_aux_weight(s["aux_weight"]),
            per_tensor=s["granularity"] == "tensor",
            aux_cap=None if aux_cap is None else float(aux_cap),
            max_grad_norm=None if max_grad_norm is None else float(max_grad_norm),
            raise_nonfinite=s["nonfinite"] == "raise",
            backend=s["backend"],
        )

    @property
    def kernel(self) -> str | None:
        """Name of the gate's case in the kernels; ``None`` for a policy in Python."""
        return kernel_of(self.policy)

    def lambdas(self, num_aux: int) -> tuple[float, ...] | Tensor:
        """One lambda per auxiliary, or a tensor of one or of as many.

        :raises ValueError: ``aux_weight`` has another number of entries.
        """
        if isinstance(self.aux_weight, float):
            return (self.aux_weight,) * num_aux
        entries = self.aux_weight.numel() if isinstance(self.aux_weight, Tensor) else len(self.aux_weight)
        if entries != num_aux and not (isinstance(self.aux_weight, Tensor) and entries == 1):
            raise ValueError(f"aux_weight has {entries} entries for {num_aux} auxiliary gradients")
        return self.aux_weight


def check_aux_weight(aux_weight: float | Sequence[float] | Tensor) -> float | tuple[float, ...] | Tensor:
    """:raises ValueError: a number that is not finite, or a tensor that is neither ``[]`` nor ``[K]``.
    :raises TypeError: a tensor of another type than float32 and float64.
    """
    if isinstance(aux_weight, Tensor):
        if aux_weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"aux_weight has dtype {aux_weight.dtype}; as a tensor it must be float32 or float64")
        if aux_weight.ndim > 1:
            raise ValueError(f"aux_weight has shape {tuple(aux_weight.shape)}; it must hold one number per auxiliary")
        return aux_weight
    weights = tuple(map(float, aux_weight)) if isinstance(aux_weight, Iterable) else (float(aux_weight),)
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"aux_weight must be finite, got {aux_weight}")
    return weights if isinstance(aux_weight, Iterable) else weights[0]
