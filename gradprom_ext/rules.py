"""The optimizers' update rules: their hyper-parameters, their state tensors, and what they do to a parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._device import readable, to_device

__all__ = ["ADAM", "ADAMW", "SGD", "Adam", "Hyper", "Rule", "Sgd", "apply_rule"]


@dataclass(frozen=True, eq=False)
class Hyper:
    """Hyper-parameters of one parameter group, with the names and meanings of ``torch.optim``."""

    lr: float | Tensor  #: a tensor on the parameters' device is read there when the step runs
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decoupled: bool = False  #: AdamW: weight decay acts on the parameter, not on the gradient
    amsgrad: bool = False
    maximize: bool = False

    def same(self, other: Hyper) -> bool:
        """Equal numbers, and the very same tensors (comparing their values would wait for the device)."""
        return all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(self, other, strict=True))

    def __iter__(self) -> Iterator[Any]:
        return iter(vars(self).values())

    def on(self, device: torch.device) -> Hyper:
        """With ``lr`` where a step on ``device`` can read it."""
        lr = readable(self.lr, device)
        return self if lr is self.lr else replace(self, lr=lr)


class Rule(ABC):
    """An update rule: its numbers, its states, and what it does to an element. The kernels know it by its name.

    :param master_weights: 16-bit parameters are updated through a float32 twin, ``state["master"]``.
    """

    name: ClassVar[str]

    def __init__(self, *, master_weights: bool = False) -> None:
        self.master_weights = master_weights

    def with_masters(self, master_weights: bool) -> Rule:
        """The same rule, with or without them."""
        other = copy(self)
        other.master_weights = master_weights
        return other

    @abstractmethod
    def numbers(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """What of a parameter group's dict the rule depends on, as it is now (schedulers change it between steps)."""

    @abstractmethod
    def hyper(self, numbers: tuple[Any, ...]) -> Hyper:
        """:meth:`numbers` by their names."""

    @abstractmethod
    def moment_names(self, hyper: Hyper) -> tuple[str, ...]:
        """Moments of one parameter, named as in ``torch.optim``; ``"step"`` comes on top where there are any."""

    @abstractmethod
    def apply(
        self, hyper: Hyper, lr: Tensor, step: Tensor, old: Tensor, gradient: Tensor, moments: list[Tensor]
    ) -> Tensor:
        """One update in plain PyTorch, in the type of ``gradient``.

        :param lr: float64 ``[]``.
        :param step: float32 ``[]``, number of updates so far; not looked at by rules without moments.
        :param old: the parameter.
        :param gradient: its gradient, with the sign to descend by.
        :param moments: as :meth:`moment_names` orders them; replaced by their new values.
        :returns: the new parameter.
        """

    def has_master(self, param: Tensor) -> bool:
        """Whether the update acts on ``state["master"]``, of which ``param`` then receives the rounded values."""
        return self.master_weights and param.dtype in (torch.float16, torch.bfloat16)

    def init_state(self, hyper: Hyper, param: Tensor, state: dict[str, Any]) -> None:
        """Fills in what is missing: the master, the moments (zeros in the layout and dtype of what is updated), and the
        count of updates."""
        if self.has_master(param) and "master" not in state:
            state["master"] = param.to(torch.float32, memory_format=torch.preserve_format)
        names = self.moment_names(hyper)
        # A momentum buffer that came without a count (from torch.optim.SGD) has seen at least one gradient.
        if names and "step" not in state:
            state["step"] = torch.full((), float(names[0] in state), dtype=torch.float32, device=param.device)
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(self.updated(param, state), memory_format=torch.preserve_format)

    def updated(self, param: Tensor, state: Mapping[str, Any]) -> Tensor:
        """What the update reads and writes: the master where there is one, else the parameter."""
        return state["master"] if self.has_master(param) else param

    def state_names(self, hyper: Hyper, param: Tensor) -> tuple[str, ...]:
        """Everything that :meth:`init_state` sees to."""
        names = list(self.moment_names(hyper))
        if names:
            names.append("step")
        if self.has_master(param):
            names.append("master")
        return tuple(names)


def _lr(number: Any) -> float | Tensor:
    return number if isinstance(number, Tensor) else float(number)


class Sgd(Rule):
    """``torch.optim.SGD``."""

    name = "sgd"

    def numbers(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return _SGD_NUMBERS(group)

    def hyper(self, numbers: tuple[Any, ...]) -> Hyper:
        lr, weight_decay, maximize, momentum, dampening, nesterov = numbers
        return Hyper(
            _lr(lr),
            weight_decay=float(weight_decay),
            maximize=bool(maximize),
            momentum=float(momentum),
            dampening=float(dampening),
            nesterov=bool(nesterov),
        )

    def moment_names(self, hyper: Hyper) -> tuple[str, ...]:
        return ("momentum_buffer",) if hyper.momentum != 0 else ()

    def apply(
        self, hyper: Hyper, lr: Tensor, step: Tensor, old: Tensor, gradient: Tensor, moments: list[Tensor]
    ) -> Tensor:
        g = gradient + hyper.weight_decay * old if hyper.weight_decay != 0 else gradient
        direction = g
        if moments:
            # The first buffer is the gradient itself, undamped.
            keep = 1 - hyper.dampening * (step != 0).to(g.dtype)
            moments[0] = hyper.momentum * moments[0] + keep * g
            direction = g + hyper.momentum * moments[0] if hyper.nesterov else moments[0]
        return old - lr.to(g.dtype) * direction


_SGD_NUMBERS = itemgetter("lr", "weight_decay", "maximize", "momentum", "dampening", "nesterov")


class Adam(Rule):
    """``torch.optim.Adam``.

    :param decoupled: AdamW: weight decay acts on the parameter, not on the gradient.
    """

    name = "adam"

    def __init__(self, *, decoupled: bool = False, master_weights: bool = False) -> None:
        super().__init__(master_weights=master_weights)
        self.decoupled = decoupled

    def numbers(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return (*_ADAM_NUMBERS(group), *group["betas"])

    def hyper(self, numbers: tuple[Any, ...]) -> Hyper:
        lr, weight_decay, maximize, eps, amsgrad, beta1, beta2 = numbers
        return Hyper(
            _lr(lr),
            weight_decay=float(weight_decay),
            maximize=bool(maximize),
            eps=float(eps),
            amsgrad=bool(amsgrad),
            beta1=float(beta1),
            beta2=float(beta2),
            decoupled=self.decoupled,
        )

    def moment_names(self, hyper: Hyper) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if hyper.amsgrad else ("exp_avg", "exp_avg_sq")

    def apply(
        self, hyper: Hyper, lr: Tensor, step: Tensor, old: Tensor, gradient: Tensor, moments: list[Tensor]
    ) -> Tensor:
        g, dtype = gradient, gradient.dtype
        if hyper.decoupled:
            old = old * (1 - lr * hyper.weight_decay).to(dtype)
        elif hyper.weight_decay != 0:
            g = g + hyper.weight_decay * old
        count = step.to(torch.float64) + 1
        correction1, correction2 = (1 - torch.pow(beta, count) for beta in (hyper.beta1, hyper.beta2))
        moments[0] = moments[0] + (1 - hyper.beta1) * (g - moments[0])
        moments[1] = hyper.beta2 * moments[1] + (1 - hyper.beta2) * g * g
        if hyper.amsgrad:
            moments[2] = torch.maximum(moments[2], moments[1])
        denominator = moments[-1].sqrt() / correction2.sqrt().to(dtype) + hyper.eps
        return old - (lr / correction1).to(dtype) * (moments[0] / denominator)


_ADAM_NUMBERS = itemgetter("lr", "weight_decay", "maximize", "eps", "amsgrad")

SGD = Sgd()
ADAM = Adam()
ADAMW = Adam(decoupled=True)


def _followed(master: Tensor, param: Tensor) -> Tensor:
    """The master, or the parameter's value where the parameter is no longer the master's rounded value: it was
    written to since. Bits are compared, so that NaN equals itself and the zeros differ."""
    same = master.to(param.dtype).view(torch.int16) == param.view(torch.int16)
    return torch.where(same, master, param.to(master.dtype))


def apply_rule(rule: Rule, hyper: Hyper, param: Tensor, gradient: Tensor, state: dict[str, Any], skip: Tensor) -> None:
    """One update in plain PyTorch; where ``skip`` is true nothing changes, bit for bit.

    :param param: any shape; updated in place.
    :param gradient: the combined gradient, in the type the arithmetic runs in.
    :param state: as :meth:`Rule.init_state` leaves it; updated in place.
    :param skip: bool ``[]`` on the parameter's device; never read back.
    """
    dtype = gradient.dtype
    names = rule.moment_names(hyper)
    target = rule.updated(param, state)
    start = target if target is param else _followed(target, param)
    if isinstance(hyper.lr, Tensor):
        lr = to_device(hyper.lr, param.device).to(torch.float64)
    else:
        lr = torch.full((), hyper.lr, dtype=torch.float64, device=param.device)
    moments = [state[name].to(dtype) for name in names]
    step = state["step"] if names else torch.zeros((), device=param.device)
    new = rule.apply(hyper, lr, step, start.to(dtype), -gradient if hyper.maximize else gradient, moments)

    target.copy_(torch.where(skip, target, new.to(target.dtype)))
    if target is not param:
        param.copy_(torch.where(skip, param, target.to(param.dtype)))
    for name, value in zip(names, moments, strict=True):
        state[name].copy_(torch.where(skip, state[name], value.to(state[name].dtype)))
    if names:
        state["step"] += (~skip).to(state["step"].dtype)
