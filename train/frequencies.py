"""Frequencies of images: what degradations, losses and measures do with spectra."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def radius(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """The distance from frequency 0 of every bin of ``rfft2``, in cycles per pixel, ``float32 [height, width//2 + 1]``.

    A distance of ``k`` bins at ``N`` pixels is ``k / N``, so that one number stands for images of every size.
    """
    import torch

    rows = torch.fft.fftfreq(height, device=device)
    columns = torch.fft.rfftfreq(width, device=device)
    return torch.hypot(rows[:, None], columns)


def filtered(image: Tensor, gain: Tensor) -> Tensor:
    """Multiplies the spectrum of images.

    :param image: ``float [..., H, W]``.
    :param gain: ``[H, W // 2 + 1]`` (or broadcastable to ``[..., H, W // 2 + 1]``), real: one number for each frequency
        and its opposite, so that nothing imaginary arises which taking the real part would hide.
    """
    import torch

    return torch.fft.irfft2(torch.fft.rfft2(image) * gain, s=image.shape[-2:])
