"""MONAI: a ``SupervisedTrainer`` whose iteration is GradProm's.

``iteration_update`` replaces what the trainer does with a batch; handlers, metrics, checkpoints and all else of the
engine stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.handlers import StatsHandler
from monai.utils.enums import CommonKeys as Keys
from problem import EPOCHS, loader, networks, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp


def train(handlers: list[Any]) -> tuple[nn.Module, list[Tensor]]:
    ip, vr = networks()
    opt = gp.GradPromAdamW(ip.parameters(), lr=3e-3, aux_weight=0.02)
    vr_opt = torch.optim.AdamW(vr.parameters(), lr=3e-3)
    gates: list[Tensor] = []

    def iteration(trainer: SupervisedTrainer, batch: list[Tensor]) -> dict[str, Any]:
        degraded, clean, label, _ = (x.to(trainer.state.device) for x in batch)
        enhanced = trainer.inferer(degraded, trainer.network)
        main_loss = trainer.loss_function(enhanced, clean)
        opt.backward(main_loss, cross_entropy(vr(enhanced), label))
        opt.step()
        vr_opt.step()
        opt.zero_grad()
        vr_opt.zero_grad()
        gates.append(opt.stats.gate)
        return {Keys.IMAGE: degraded, Keys.LABEL: clean, Keys.PRED: enhanced, Keys.LOSS: main_loss.detach()}

    SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=EPOCHS, train_data_loader=loader(), network=ip, optimizer=opt,
        loss_function=mse_loss, iteration_update=iteration, train_handlers=handlers, decollate=False,
    ).run()  # fmt: skip
    return ip, gates


if __name__ == "__main__":
    print(report(*train([StatsHandler(iteration_log=False, tag_name="loss")])))
