"""``torch.compile`` of the models; the loop stays as it is.

Each loss runs once through the compiled backward pass. torch.compile finds that out at the *first* backward of a model:
if you pre-train IP with one loss, and add the second later, call ``torch.compiler.reset()`` in between.

``--backend inductor``, PyTorch's default, takes a minute and needs a C++ compiler.
"""

from __future__ import annotations

import argparse

import torch
from problem import EPOCHS, loader, networks, report
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp


def train(backend: str | None) -> tuple[nn.Module, list[float]]:
    """:param backend: of ``torch.compile``; ``None`` compiles nothing."""
    ip, vr = networks()
    opt = gp.GradPromAdamW(ip.parameters(), lr=3e-3, aux_weight=0.02)
    vr_opt = torch.optim.AdamW(vr.parameters(), lr=3e-3)
    if backend is not None:
        ip, vr = torch.compile(ip, backend=backend), torch.compile(vr, backend=backend)  # the parameters stay the same
    batches, gates = loader(), []
    for _ in range(EPOCHS):
        for degraded, clean, label, _ in batches:
            enhanced = ip(degraded)
            opt.backward(mse_loss(enhanced, clean), cross_entropy(vr(enhanced), label))
            opt.step()
            vr_opt.step()
            opt.zero_grad()
            vr_opt.zero_grad()
            gates.append(float(opt.stats.gate))
    return ip, gates


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="aot_eager", choices=["aot_eager", "inductor"])
    compiled, gates = train(parser.parse_args().backend)
    eager, same = train(None)
    print("compiled:", report(compiled, gates))
    print("eager:   ", report(eager, same))
