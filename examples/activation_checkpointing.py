"""Activation checkpointing: IP's activations are computed again in the backward passes instead of being kept.

Each loss has a backward pass of its own, so that what is not kept is computed again once per loss.
"""

from __future__ import annotations

import torch
from problem import EPOCHS, loader, networks, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

import gradprom_ext as gp


def train(checkpointing: bool) -> tuple[nn.Module, list[float], int]:
    """:returns: IP, the gate of every step, and the bytes that IP's last forward pass kept for the backward passes."""
    ip, vr = networks()
    opt = gp.GradPromAdamW(ip.parameters(), lr=3e-3, aux_weight=0.02)
    vr_opt = torch.optim.AdamW(vr.parameters(), lr=3e-3)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    batches, gates = loader(), []
    for _ in range(EPOCHS):
        for degraded, clean, label, _ in batches:
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):  # only to count the bytes
                enhanced = checkpoint(ip, degraded, use_reentrant=False) if checkpointing else ip(degraded)
            opt.backward(mse_loss(enhanced, clean), cross_entropy(vr(enhanced), label))
            opt.step()
            vr_opt.step()
            opt.zero_grad()
            vr_opt.zero_grad()
            gates.append(float(opt.stats.gate))
    return ip, gates, sum(kept.values())


if __name__ == "__main__":
    for name, checkpointing in (("kept", False), ("again", True)):
        ip, gates, size = train(checkpointing)
        print(f"{name + ':':7}{size / 1000:6.0f} kB between forward and backward;", report(ip, gates))
