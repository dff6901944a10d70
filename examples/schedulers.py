"""Schedulers of PyTorch, and a lambda that grows.

The optimizers are ``torch.optim.Optimizer``s, so that every scheduler takes them; one that moves momentum or betas too.
Lambda is ``opt.aux_weight``, a number that you may assign at any time.
"""

from __future__ import annotations

import torch
from problem import EPOCHS, loader, networks, report
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.lr_scheduler import OneCycleLR

import gradprom_ext as gp

WARM_UP, LAMBDA = 20, 0.05  #: lambda reaches LAMBDA after so many steps


def train() -> tuple[nn.Module, list[float], list[tuple[float, float]]]:
    """:returns: IP, and the gate, and the learning rate and lambda, of every step."""
    ip, vr = networks()
    batches, gates, numbers = loader(), [], []
    opt = gp.GradPromAdamW(ip.parameters(), aux_weight=0.0)
    vr_opt = torch.optim.AdamW(vr.parameters(), lr=3e-3)
    scheduler = OneCycleLR(opt, max_lr=6e-3, total_steps=EPOCHS * len(batches))
    for _ in range(EPOCHS):
        for degraded, clean, label, _ in batches:
            opt.aux_weight = LAMBDA * min(1.0, len(gates) / WARM_UP)
            numbers.append((scheduler.get_last_lr()[0], opt.aux_weight))
            enhanced = ip(degraded)
            opt.backward(mse_loss(enhanced, clean), cross_entropy(vr(enhanced), label))
            opt.step()
            scheduler.step()
            vr_opt.step()
            opt.zero_grad()
            vr_opt.zero_grad()
            gates.append(float(opt.stats.gate))
    return ip, gates, numbers


if __name__ == "__main__":
    ip, gates, numbers = train()
    for step in (0, 10, 24, 50, 79):
        print("step {:2}: learning rate {:.1e}, lambda {:.3f}".format(step, *numbers[step]))
    print(report(ip, gates))
