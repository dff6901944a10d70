"""The small problem that every example trains on: images of 16 x 16 pixels, half of them discs, half of them rings.

IP, the image processing network, removes their noise. VR, the recognition network, tells discs from rings by what IP
returns. Everything here is ordinary PyTorch; the loops are in the other files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SIZE, NOISE = 16, 0.3
EPOCHS = 5  #: of 16 batches


def images(count: int, seed: int) -> TensorDataset:
    """Generated images.

    :returns: degraded and clean images, float32 ``[count, 1, 16, 16]``; labels, int64 ``[count]``, 0 for a disc and 1
        for a ring; masks, int64 ``[count, 16, 16]``, 1 within the shape.
    """
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 2
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    center = 5 + 6 * torch.rand(count, 2, 1, 1, generator=generator)
    distance = ((row - center[:, :1]) ** 2 + (column - center[:, 1:]) ** 2).sqrt()
    hole = (distance < 2.5) & (label.view(-1, 1, 1, 1) == 1)
    shape = (distance < 5) & ~hole
    clean = 0.2 + 0.6 * shape
    degraded = clean + NOISE * torch.randn(clean.shape, generator=generator)
    return TensorDataset(degraded, clean, label, shape[:, 0].long())


def loader(batch_size: int = 8) -> DataLoader:
    """Batches of ``(degraded, clean, label, mask)``, 128 images in all, in the same order in every epoch, so that the
    examples can be compared with each other."""
    return DataLoader(images(128, seed=0), batch_size)


def networks() -> tuple[nn.Module, nn.Module]:
    """IP (``[B, 1, 16, 16]`` to the same) and VR (to ``[B, 2]``), always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ip = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 1, 3, padding=1),
        )  # fmt: skip
        vr = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, 2)
        )
    return ip, vr


@torch.no_grad()
def psnr(ip: nn.Module) -> float:
    """Mean PSNR in dB of 64 test images after ``ip``."""
    degraded, clean, *_ = images(64, seed=1).tensors
    error = (ip(degraded) - clean).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def report(ip: nn.Module, gates: Sequence[float | Tensor]) -> str:
    """One line: what the noise was, what is left of it, and how often the gate was open.

    :param gates: of every step, 0 or 1.
    """
    opened = sum(float(gate) > 0 for gate in gates)
    return (
        f"PSNR {psnr(nn.Identity()):.2f} dB -> {psnr(ip):.2f} dB; "
        f"the gate was open in {opened} of {len(gates)} steps ({opened / len(gates):.0%})"
    )
