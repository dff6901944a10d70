"""PyTorch Lightning: manual optimization, with the plain loop in ``training_step``.

Automatic optimization back-propagates one loss on its own, and GradProm needs a gradient of each. The optimizer says
so instead of training without VR.
"""

from __future__ import annotations

import lightning.pytorch as lightning
import torch
from problem import EPOCHS, loader, networks, report
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp


class Denoiser(lightning.LightningModule):
    """IP and VR with their optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.ip, self.vr = networks()
        self.gates: list[Tensor] = []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            gp.GradPromAdamW(self.ip.parameters(), lr=3e-3, aux_weight=0.02),
            torch.optim.AdamW(self.vr.parameters(), lr=3e-3),
        ]

    def training_step(self, batch: list[Tensor], batch_index: int) -> None:
        degraded, clean, label, _ = batch
        opt, vr_opt = self.optimizers()
        enhanced = self.ip(degraded)
        main_loss = mse_loss(enhanced, clean)
        opt.backward(main_loss, cross_entropy(self.vr(enhanced), label))  # in place of manual_backward
        opt.step()
        vr_opt.step()
        opt.zero_grad()
        vr_opt.zero_grad()
        self.log_dict({"loss": main_loss, "gate": opt.stats.gate, "cosine": opt.stats.cosine})
        self.gates.append(opt.stats.gate)


class Automatic(Denoiser):
    """What cannot work."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return super().configure_optimizers()[0]

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        degraded, clean, *_ = batch
        return mse_loss(self.ip(degraded), clean)


def trainer() -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


if __name__ == "__main__":
    model = Denoiser()
    trainer().fit(model, loader())
    print(report(model.ip, model.gates))
    try:
        trainer().fit(Automatic(), loader())
    except TypeError as error:
        print("automatic optimization:", error)
