"""Micro-batches: several calls of ``backward`` before one ``step``. The gate is taken once, on the sums.

The gradients add up on both sides, so four micro-batches are one batch of four times their size, in what they decide
too. As always, a mean over a micro-batch has to be divided by their number.
"""

from __future__ import annotations

import torch
from problem import EPOCHS, loader, networks, report
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp


def train(parts: int) -> tuple[nn.Module, list[float]]:
    """:param parts: micro-batches into which every batch of 16 images is divided."""
    ip, vr = networks()
    opt = gp.GradPromSGD(ip.parameters(), lr=0.2, momentum=0.9, aux_weight=0.02)
    vr_opt = torch.optim.SGD(vr.parameters(), lr=0.2)
    batches, gates = loader(batch_size=16), []
    for _ in range(EPOCHS):
        for degraded, clean, label, _ in batches:
            for some in torch.arange(len(label)).chunk(parts):
                enhanced = ip(degraded[some])
                main_loss = mse_loss(enhanced, clean[some]) / parts
                aux_loss = cross_entropy(vr(enhanced), label[some]) / parts
                opt.backward(main_loss, aux_loss)
            opt.step()
            vr_opt.step()
            opt.zero_grad()
            vr_opt.zero_grad()
            gates.append(float(opt.stats.gate))
    return ip, gates


if __name__ == "__main__":
    (whole, gates), (divided, same) = train(parts=1), train(parts=4)
    print("one batch of 16:        ", report(whole, gates))
    print("four micro-batches of 4:", report(divided, same))
    with torch.no_grad():
        apart = max(float((p - q).abs().max()) for p, q in zip(whole.parameters(), divided.parameters(), strict=True))
    agree = sum(a == b for a, b in zip(gates, same, strict=True))
    print(f"the gates agree in {agree} of {len(gates)} steps; the weights differ by {apart:.0e}")
