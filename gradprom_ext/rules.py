"""The optimizers' update rules: their hyper-parameters, their state tensors, and what they do to a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._device import readable, to_device

__all__ = ["Hyper", "Rule", "apply_rule"]


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


@dataclass(frozen=True)
class Rule:
    """``sgd`` or ``adam``, and how a parameter group's dict becomes a :class:`Hyper`."""

    name: str
    decoupled: bool = False
    master_weights: bool = False  #: 16-bit parameters are updated through a float32 twin, ``state["master"]``

    def hyper(self, group: Mapping[str, Any]) -> Hyper:
        """The numbers of ``group`` as they are now (schedulers change them between steps)."""
        common: dict[str, Any] = {
            "lr": group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
            "maximize": bool(group["maximize"]),
        }
        if self.name == "sgd":
            return Hyper(
                **common,
                momentum=float(group["momentum"]),
                dampening=float(group["dampening"]),
                nesterov=bool(group["nesterov"]),
            )
        beta1, beta2 = group["betas"]
        return Hyper(
            **common,
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            amsgrad=bool(group["amsgrad"]),
            decoupled=self.decoupled,
        )

    def has_master(self, param: Tensor) -> bool:
        """Whether the update acts on ``state["master"]``, of which ``param`` then receives the rounded values."""
        return self.master_weights and param.dtype in (torch.float16, torch.bfloat16)

    def moment_names(self, hyper: Hyper) -> tuple[str, ...]:
        """Moments of one parameter, named as in ``torch.optim``; ``"step"`` comes on top where there are any."""
        if self.name == "sgd":
            return ("momentum_buffer",) if hyper.momentum != 0 else ()
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if hyper.amsgrad else ("exp_avg", "exp_avg_sq")

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


SGD = Rule("sgd")
ADAM = Rule("adam")
ADAMW = Rule("adam", decoupled=True)


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
    if isinstance(hyper.lr, Tensor):
        lr = to_device(hyper.lr, param.device).to(torch.float64)
    else:
        lr = torch.full((), hyper.lr, dtype=torch.float64, device=param.device)
    old = target.to(dtype)
    slots = [state[name].to(dtype) for name in names]
    g = -gradient if hyper.maximize else gradient
    if hyper.weight_decay != 0 and not hyper.decoupled:
        g = g + hyper.weight_decay * old

    if rule.name == "sgd":
        direction = g
        if names:
            # The first buffer is the gradient itself, undamped.
            keep = 1 - hyper.dampening * (state["step"] != 0).to(dtype)
            slots[0] = hyper.momentum * slots[0] + keep * g
            direction = g + hyper.momentum * slots[0] if hyper.nesterov else slots[0]
        new = old - lr.to(dtype) * direction
    else:
        step = state["step"].to(torch.float64) + 1
        correction1 = 1 - torch.pow(hyper.beta1, step)
        correction2 = 1 - torch.pow(hyper.beta2, step)
        if hyper.decoupled:
            old = old * (1 - lr * hyper.weight_decay).to(dtype)
        slots[0] = slots[0] + (1 - hyper.beta1) * (g - slots[0])
        slots[1] = hyper.beta2 * slots[1] + (1 - hyper.beta2) * g * g
        if hyper.amsgrad:
            slots[2] = torch.maximum(slots[2], slots[1])
        denominator = slots[-1].sqrt() / correction2.sqrt().to(dtype) + hyper.eps
        new = old - (lr / correction1).to(dtype) * (slots[0] / denominator)

    target.copy_(torch.where(skip, target, new.to(target.dtype)))
    if target is not param:
        param.copy_(torch.where(skip, param, target.to(param.dtype)))
    for name, value in zip(names, slots, strict=True):
        state[name].copy_(torch.where(skip, state[name], value.to(state[name].dtype)))
    if names:
        state["step"] += (~skip).to(state["step"].dtype)
