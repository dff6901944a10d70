"""A moving average of IP's weights, by ``torch.optim.swa_utils``.

The average follows the parameters, whoever moves them: update it after ``step``. In the first steps it still holds a
good part of the random weights that IP began with, so that its decay has to suit the length of the training.
"""

from __future__ import annotations

import torch
from problem import EPOCHS, loader, networks, report
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradprom_ext as gp

DECAY = 0.9


def train() -> tuple[nn.Module, nn.Module, list[float]]:
    """:returns: IP, the moving average of it, and the gate of every step."""
    ip, vr = networks()
    average = AveragedModel(ip, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    opt = gp.GradPromSGD(ip.parameters(), lr=0.2, momentum=0.9, aux_weight=0.02)
    vr_opt = torch.optim.SGD(vr.parameters(), lr=0.2)
    batches, gates = loader(), []
    for _ in range(EPOCHS):
        for degraded, clean, label, _ in batches:
            enhanced = ip(degraded)
            opt.backward(mse_loss(enhanced, clean), cross_entropy(vr(enhanced), label))
            opt.step()
            average.update_parameters(ip)
            vr_opt.step()
            opt.zero_grad()
            vr_opt.zero_grad()
            gates.append(float(opt.stats.gate))
    return ip, average, gates


if __name__ == "__main__":
    ip, average, gates = train()
    print("last weights:  ", report(ip, gates))
    print("moving average:", report(average, gates))
