"""The step as functions: gradients in, parameters updated in place, nothing remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _checks, _torch, ops, reference, rules
from ._stateless import stand_ins, stepping
from ._step import Stepper
from .settings import StepConfig, StepSettings, with_settings
from .stats import GateStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["gradient_stats", "gradprom_"]

OneOrSeveral = Sequence["Tensor | None"] | Sequence[Sequence["Tensor | None"]]


@with_settings
@torch.no_grad()
def gradprom_(
    params: Iterable[Tensor],
    main_grads: Sequence[Tensor | None],
    aux_grads: OneOrSeveral,
    *,
    lr: float | Tensor = 1e-3,
    **settings: Unpack[StepSettings],
) -> GateStats:
    """One GradProm step by the SGD rule, in place:
    ``theta -= lr * (G_main + gate * aux_weight * G_aux)`` (`arXiv:2501.01114 <https://arxiv.org/abs/2501.01114>`_).

    :param params: the parameters theta, any shapes; float32, float64, float16 or bfloat16. Updated in place.
    :param main_grads: gradient of the main loss, one tensor per parameter, in its shape and on its device, with any
        strides and any of these dtypes; ``None`` is a zero. A parameter without any gradient is left alone.
    :param aux_grads: gradients of the auxiliary loss, likewise; or a sequence of such sequences for several.
    :param lr: learning rate, >= 0; a number, or a float32 or float64 tensor of one element.
    :param settings: see :class:`~gradprom_ext.settings.StepSettings`.
    :returns: :class:`~gradprom_ext.GateStats`; its tensors stay on the device.
    :raises ValueError: an argument out of range; gradients whose number, shape or device do not fit.
    :raises TypeError: integer, complex or sparse tensors.
    :raises NonFiniteGradientError: see ``nonfinite``. Whatever is raised, no parameter was changed.

    >>> import torch, gradprom_ext as gp
    >>> theta = [torch.tensor([1.0, 1.0])]
    >>> stats = gp.gradprom_(theta, [torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 1.0])], lr=0.5)
    >>> theta[0].tolist(), stats.gate.tolist()
    ([0.0, 0.5], [1.0])
    """
    if not isinstance(lr, Tensor) and not lr >= 0:
        raise ValueError(f"lr must be a number >= 0, got {lr}")
    config = StepConfig.make(**settings)
    theta, main, aux = list(params), list(main_grads), _checks.aux_sequences(aux_grads)
    if not isinstance(lr, Tensor):
        lr = float(lr)

    def check() -> None:
        for i, param in enumerate(theta):
            _checks.check_param(f"params[{i}]", param)
        _check_all(main, aux, theta, "params")

    if ops.traceable(config) and theta:
        check()
        return ops.gradprom_(theta, main, aux, lr, config)
    hypers = [rules.Hyper(lr=lr)]
    return _run(theta, aux, config, check, lambda stepper: stepper.step(main, aux, hypers))


@with_settings
@torch.no_grad()
def gradient_stats(
    main_grads: Sequence[Tensor | None],
    aux_grads: OneOrSeveral,
    **settings: Unpack[StepSettings],
) -> GateStats:
    """Cosines, norms and the gate that a step would have, without a step. Arguments and errors as in
    :func:`gradprom_`.

    >>> import torch, gradprom_ext as gp
    >>> gp.gradient_stats([torch.tensor([3.0, 4.0])], [torch.tensor([-4.0, 3.0])]).cosine.tolist()
    [0.0]
    """
    config = StepConfig.make(**settings)
    main, aux = list(main_grads), _checks.aux_sequences(aux_grads)
    for name, grads in [("main_grads", main), *((f"aux_grads[{k}]", gs) for k, gs in enumerate(aux))]:
        if len(grads) != len(main):
            raise ValueError(f"{name} holds {len(grads)} gradients for {len(main)} in main_grads")
    like = stand_ins(main, aux)

    def check() -> None:
        _check_all(main, aux, like, "main_grads")

    if ops.traceable(config) and main:
        check()
        return ops.gradient_stats(main, aux, config)
    return _run(like, aux, config, check, lambda stepper: stepper.stats(main, aux))


def _run(
    params: list[Tensor],
    aux: Sequence[Sequence[Tensor | None]],
    config: StepConfig,
    check: Callable[[], None],
    use: Callable[[Stepper], GateStats],
) -> GateStats:
    """``use`` of a stepper for these parameters.

    :param check: takes longer than a step. Kernels refuse whatever it refuses, so that it is called to say in the
        user's words what they have refused.
    """
    if not params:
        check()
        return _no_parameters(len(aux), config)
    if torch.compiler.is_compiling():
        return _untraced(params, len(aux), config, check, use)
    return _eager(params, len(aux), config, check, use)


def _eager(
    params: list[Tensor],
    num_aux: int,
    config: StepConfig,
    check: Callable[[], None],
    use: Callable[[Stepper], GateStats],
) -> GateStats:
    try:
        with stepping(params, num_aux, config, check) as stepper:
            return use(stepper)
    except Exception:
        check()
        raise


_untraced = _torch.untraced(_eager)


def _check_all(
    main: Sequence[Tensor | None], aux: Sequence[Sequence[Tensor | None]], like: Sequence[Tensor], what: str
) -> None:
    _checks.check_gradients("main_grads", main, like, what)
    for k, grads in enumerate(aux):
        _checks.check_gradients(f"aux_grads[{k}]" if len(aux) > 1 else "aux_grads", grads, like, what)


def _no_parameters(num_aux: int, config: StepConfig) -> GateStats:
    rows = 0 if config.per_tensor else 1
    gram = torch.zeros(rows, num_aux + 1, num_aux + 1, dtype=torch.float64)
    lambdas = config.lambdas(num_aux)
    return reference.decide(gram, config.policy, lambdas, config.aux_cap, config.max_grad_norm, config.per_tensor)[1]
