"""Hugging Face Accelerate, with its accumulation of gradients.

``prepare`` wraps the optimizer for ``step`` and ``zero_grad``, which it leaves out until the last micro-batch. It does
not change the optimizer itself: ``backward`` and ``stats`` are those of the object that was wrapped. (And
``accelerator.backward`` divides a loss by the number of micro-batches; here that is written out.)
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from problem import EPOCHS, loader, networks, report
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp


def train(parts: int) -> tuple[nn.Module, list[float]]:
    """:param parts: micro-batches of 16 / parts images in a step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    ip, vr = networks()
    gradprom = gp.GradPromSGD(ip.parameters(), lr=0.2, momentum=0.9, aux_weight=0.02)
    vr_optimizer = torch.optim.SGD(vr.parameters(), lr=0.2)
    ip, vr, opt, vr_opt, batches = accelerator.prepare(ip, vr, gradprom, vr_optimizer, loader(16 // parts))
    gates = []
    for _ in range(EPOCHS):
        for degraded, clean, label, _ in batches:
            with accelerator.accumulate(ip, vr):
                enhanced = ip(degraded)
                main_loss = mse_loss(enhanced, clean) / parts
                aux_loss = cross_entropy(vr(enhanced), label) / parts
                gradprom.backward(main_loss, aux_loss)
                opt.step()
                vr_opt.step()
                opt.zero_grad()
                vr_opt.zero_grad()
            if accelerator.sync_gradients:
                gates.append(float(gradprom.stats.gate))
    return accelerator.unwrap_model(ip), gates


if __name__ == "__main__":
    for parts in (1, 4):
        print(f"{parts} x {16 // parts} images:", report(*train(parts)))
