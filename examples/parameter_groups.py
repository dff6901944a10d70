"""Parameter groups, and layers that join late.

The first layers of IP are frozen at first, as if they were pre-trained. Then they join as a group with a smaller
learning rate. The gate compares the gradients of all groups together, so that there is one decision for all of IP.
"""

from __future__ import annotations

import torch
from problem import EPOCHS, loader, networks, report
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp

FROZEN_EPOCHS = 2


def train(gate: str = "hard") -> tuple[nn.Module, list[float]]:
    ip, vr = networks()
    first, rest = ip[:2], ip[2:]
    first.requires_grad_(False)
    weights = [p for p in rest.parameters() if p.ndim > 1]
    biases = [p for p in rest.parameters() if p.ndim == 1]
    opt = gp.GradPromAdamW(
        [{"params": weights}, {"params": biases, "weight_decay": 0.0}],
        lr=3e-3, weight_decay=0.01, aux_weight=0.02, gate=gate,
    )  # fmt: skip
    vr_opt = torch.optim.AdamW(vr.parameters(), lr=3e-3)
    batches, gates = loader(), []
    for epoch in range(EPOCHS):
        if epoch == FROZEN_EPOCHS:
            first.requires_grad_(True)
            opt.add_param_group({"params": first.parameters(), "lr": 1e-3})
        for degraded, clean, label, _ in batches:
            enhanced = ip(degraded)
            opt.backward(mse_loss(enhanced, clean), cross_entropy(vr(enhanced), label))
            opt.step()
            vr_opt.step()
            opt.zero_grad()
            vr_opt.zero_grad()
            gates.append(float(opt.stats.gate))
        print(f"epoch {epoch}: learning rates", [group["lr"] for group in opt.param_groups])
    return ip, gates


if __name__ == "__main__":
    print(report(*train()))
