"""The optimizers' update rules: their hyper-parameters, their state tensors, and what they do to a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Hyper", "Rule", "apply_rule"]


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of one parameter group, with the names and meanings of ``torch.optim``."""

    lr: float
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


@dataclass(frozen=True)
class Rule:
    """``sgd`` or ``adam``, and how a parameter group's dict becomes a :class:`Hyper`."""

    name: str
    decoupled: bool = False

    def hyper(self, group: Mapping[str, Any]) -> Hyper:
        """The numbers of ``group`` as they are now (schedulers change them between steps)."""
        common: dict[str, Any] = {
            "lr": float(group["lr"]),
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

    def state_names(self, hyper: Hyper) -> tuple[str, ...]:
        """State tensors of one parameter, named as in ``torch.optim``; ``"step"`` comes on top where there are any."""
        if self.name == "sgd":
            return ("momentum_buffer",) if hyper.momentum != 0 else ()
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if hyper.amsgrad else ("exp_avg", "exp_avg_sq")

    def init_state(self, hyper: Hyper, param: Tensor, state: dict[str, Any]) -> None:
        """Fills in what is missing: zeros in the parameter's layout and dtype, and the count of updates."""
        names = self.state_names(hyper)
        # A momentum buffer that came without a count (from torch.optim.SGD) has seen at least one gradient.
        if names and "step" not in state:
            state["step"] = torch.full((), float(names[0] in state), dtype=torch.float32, device=param.device)
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)


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
    names = rule.state_names(hyper)
    old = param.to(dtype)
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
        new = old - hyper.lr * direction
    else:
        step = state["step"].to(torch.float64) + 1
        correction1 = 1 - torch.pow(hyper.beta1, step)
        correction2 = 1 - torch.pow(hyper.beta2, step)
        if hyper.decoupled:
            old = old * (1 - hyper.lr * hyper.weight_decay)
        slots[0] = slots[0] + (1 - hyper.beta1) * (g - slots[0])
        slots[1] = hyper.beta2 * slots[1] + (1 - hyper.beta2) * g * g
        if hyper.amsgrad:
            slots[2] = torch.maximum(slots[2], slots[1])
        denominator = slots[-1].sqrt() / correction2.sqrt().to(dtype) + hyper.eps
        new = old - (hyper.lr / correction1).to(dtype) * (slots[0] / denominator)

    param.copy_(torch.where(skip, param, new.to(param.dtype)))
    for name, value in zip(names, slots, strict=True):
        state[name].copy_(torch.where(skip, state[name], value.to(state[name].dtype)))
    if names:
        state["step"] += (~skip).to(state["step"].dtype)
