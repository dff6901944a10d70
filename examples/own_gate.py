"""A gate of your own: a function of the inner products of the gradients.

The cosine of one batch is noisy. This gate looks at its moving average instead. It works on tensors alone, never asking
for a number, so that no step waits for a GPU; and it runs on every backend.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from problem import EPOCHS, loader, networks, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp
from gradprom_ext.policy import cosines


class SteadyGate(gp.GatePolicy):
    """Open where the moving average of the cosine is not negative.

    :param decay: of the average, in [0, 1); 0 is GradProm's own gate.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.average: Tensor | None = None

    def __call__(self, gram: Tensor, aux_weight: Tensor) -> tuple[Tensor, Tensor]:
        cosine = cosines(gram)  # [..., K] of gram [..., K + 1, K + 1], whose index 0 is the main gradient
        if self.average is None:
            self.average = cosine
        # A step with NaN in a gradient is skipped, and must not be remembered.
        mixed = self.decay * self.average + (1 - self.decay) * cosine
        self.average = torch.where(cosine.isfinite(), mixed, self.average)
        return torch.ones_like(gram[..., 0, 0]), (self.average >= 0).to(gram.dtype)

    def state_dict(self) -> dict[str, Any]:
        """What opt.state_dict() carries, so that a training can be resumed."""
        return {} if self.average is None else {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state.get("average")


def train(gate: str | gp.GatePolicy) -> tuple[nn.Module, list[float], list[float]]:
    """:returns: IP, and gate and cosine of every step."""
    ip, vr = networks()
    opt = gp.GradPromAdamW(ip.parameters(), lr=3e-3, aux_weight=0.02, gate=gate)
    vr_opt = torch.optim.AdamW(vr.parameters(), lr=3e-3)
    batches, gates, cosine = loader(), [], []
    for _ in range(EPOCHS):
        for degraded, clean, label, _ in batches:
            enhanced = ip(degraded)
            opt.backward(mse_loss(enhanced, clean), cross_entropy(vr(enhanced), label))
            opt.step()
            vr_opt.step()
            opt.zero_grad()
            vr_opt.zero_grad()
            gates.append(float(opt.stats.gate))
            cosine.append(float(opt.stats.cosine))
    return ip, gates, cosine


if __name__ == "__main__":
    for name, gate in (("hard", "hard"), ("SteadyGate", SteadyGate())):
        ip, gates, _ = train(gate)
        changes = sum(a != b for a, b in pairwise(gates))
        print(f"{name + ':':11} {report(ip, gates)}, and changed {changes} times")
