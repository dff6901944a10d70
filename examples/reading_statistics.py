"""Reading the statistics without waiting for a GPU in every step.

``opt.stats`` are tensors on the device, new ones in each step. What waits is turning one into a number: ``float``,
``print``, ``if``. So a loop keeps the tensors, or sums on the device, and reads them once per epoch.
"""

from __future__ import annotations

import torch
from problem import EPOCHS, loader, networks, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp


def train() -> tuple[nn.Module, Tensor]:
    """:returns: IP, and a row for every step: cosine, gate, norms of the main and the auxiliary gradient."""
    ip, vr = networks()
    opt = gp.GradPromAdamW(ip.parameters(), lr=3e-3, aux_weight=0.02)
    vr_opt = torch.optim.AdamW(vr.parameters(), lr=3e-3)
    batches, rows = loader(), []
    for epoch in range(EPOCHS):
        kept, loss_sum = [], torch.zeros(())
        for degraded, clean, label, _ in batches:
            enhanced = ip(degraded)
            main_loss = mse_loss(enhanced, clean)
            opt.backward(main_loss, cross_entropy(vr(enhanced), label))
            opt.step()
            vr_opt.step()
            opt.zero_grad()
            vr_opt.zero_grad()
            kept.append(opt.stats)
            loss_sum += main_loss.detach()
        table = torch.stack([torch.cat([s.cosine, s.gate, s.main_norm[None], s.aux_norm]) for s in kept])
        rows.append(table.cpu())  # the one moment of the epoch that waits
        mean = rows[-1].mean(0)
        print(
            f"epoch {epoch}: loss {float(loss_sum) / len(batches):.4f}, mean cosine {mean[0]:+.3f}, "
            f"gate open {mean[1]:.0%}, mean norms {mean[2]:.3f} and {mean[3]:.3f}"
        )
    print("steps skipped because of NaN or infinity:", int(opt.skipped_steps))  # counted on the device
    return ip, torch.cat(rows)


if __name__ == "__main__":
    ip, table = train()
    print(report(ip, table[:, 1].tolist()))
