"""A plain training loop: two lines of it are other than with torch.optim.

The optimizer of IP is GradProm's, and ``opt.backward(main_loss, aux_loss)`` stands where ``loss.backward()`` stood.
"""

from __future__ import annotations

import torch
from problem import EPOCHS, loader, networks, report
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp


def train(gate: str = "hard") -> tuple[nn.Module, list[float]]:
    """Trains IP with the advice of VR.

    :param gate: ``"never"`` leaves VR's gradient out: what torch.optim does with the main loss alone.
    :returns: IP, and the gate of every step.
    """
    ip, vr = networks()
    opt = gp.GradPromAdamW(ip.parameters(), lr=3e-3, aux_weight=0.02, gate=gate)  # was torch.optim.AdamW
    vr_opt = torch.optim.AdamW(vr.parameters(), lr=3e-3)
    batches, gates = loader(), []
    for _ in range(EPOCHS):
        for degraded, clean, label, _ in batches:
            enhanced = ip(degraded)
            main_loss = mse_loss(enhanced, clean)
            aux_loss = cross_entropy(vr(enhanced), label)
            opt.backward(main_loss, aux_loss)  # one gradient per loss for IP; VR gets its ordinary one
            opt.step()  # the gate is taken here
            vr_opt.step()
            opt.zero_grad()
            vr_opt.zero_grad()
            gates.append(float(opt.stats.gate))
    return ip, gates


if __name__ == "__main__":
    print("GradProm:  ", report(*train()))
    print("without VR:", report(*train(gate="never")))
