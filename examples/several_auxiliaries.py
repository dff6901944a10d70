"""Two recognition networks advise IP: one tells discs from rings, one segments them. Each has a gate and a lambda.

``backward`` takes as many auxiliary losses as you have. It runs once through the graph for each of them.
"""

from __future__ import annotations

import torch
from problem import EPOCHS, loader, networks, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp


def train() -> tuple[nn.Module, list[Tensor]]:
    """:returns: IP, and the gates of every step, ``[2]`` each."""
    ip, vr = networks()
    segmenter = nn.Conv2d(1, 2, 5, padding=2)
    opt = gp.GradPromAdamW(ip.parameters(), lr=3e-3, aux_weight=[0.02, 0.05])  # in the order of the losses
    # One ordinary optimizer serves everything that advises.
    aux_opt = torch.optim.AdamW([*vr.parameters(), *segmenter.parameters()], lr=3e-3)
    batches, gates = loader(), []
    for _ in range(EPOCHS):
        for degraded, clean, label, mask in batches:
            enhanced = ip(degraded)
            diagnosis = cross_entropy(vr(enhanced), label)
            segmentation = cross_entropy(segmenter(enhanced), mask)
            opt.backward(mse_loss(enhanced, clean), diagnosis, segmentation)
            opt.step()
            aux_opt.step()
            opt.zero_grad()
            aux_opt.zero_grad()
            gates.append(opt.stats.gate)
    return ip, gates


if __name__ == "__main__":
    torch.manual_seed(0)
    ip, gates = train()
    print("diagnosis:   ", report(ip, [gate[0] for gate in gates]))
    print("segmentation:", report(ip, [gate[1] for gate in gates]))
    print("both open at once:", sum(bool(gate.all()) for gate in gates), "steps")
