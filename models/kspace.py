"""Low resolution as a scanner makes it: k-space, the Fourier transform of an image, measured in its middle alone.

Conventions, for images ``[..., H, W]`` with values at the centers of their pixels:

* A pixel of an image of 1 / s of the side is s pixels wide, and its center lies at ``s j + (s - 1) / 2`` among them. A
  bare crop of k-space samples at ``s j`` instead, and shifts the image by ``(s - 1) / 2`` large pixels. A phase ramp in
  k-space samples at the centers.
* For an even number M of frequencies the band is ``-M/2 .. M/2 - 1``: ``-M/2`` has lost its partner ``M/2``, and alone
  it would be half a cosine and an imaginary rest. A crop leaves it out.
* Transforms have the factor 1 / (number of pixels) in the forward direction, so that an image keeps its brightness.
  (With PyTorch's default, the crop has to be divided by s^2.)

With the first two, what a crop makes of a real image is real and commutes with a mirror.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reduced(images: Tensor, scale: int, columns: Tensor | None = None) -> Tensor:
    """The magnitude image of the middle of k-space.

    :param images: ``float [..., H, W]``.
    :param scale: by what both sides shrink; 1 keeps all of k-space.
    :param columns: ``bool [W / scale]``: which columns of the reduced k-space were measured, the lowest frequency
        first; the others are zero. All of them by default.
    :returns: ``float [..., H / scale, W / scale]``, not negative. Fine structures ring around sharp edges; where they
        ring below 0, the magnitude is above it.
    :raises ValueError: the images are complex, ``scale`` is below 1 or does not divide a side, or there are not as many
        ``columns``.
    """
    height, width = _sides(images, scale)
    if height % scale or width % scale:
        raise ValueError(f"images of {height} x {width} pixels have no k-space that {scale} divides without a rest")
    small = height // scale, width // scale
    spectrum = torch.fft.fftshift(torch.fft.fft2(images, norm="forward"), dim=(-2, -1))
    # From the center of the large image's first pixel to that of the small one's.
    shift = (scale - 1) / 2
    spectrum = spectrum * _ramp(height, shift, images)[:, None] * _ramp(width, shift, images)
    top, left = (large // 2 - few // 2 for large, few in zip((height, width), small, strict=True))
    spectrum = spectrum[..., top : top + small[0], left : left + small[1]].clone()
    if scale > 1:
        if small[0] % 2 == 0:
            spectrum[..., 0, :] = 0
        if small[1] % 2 == 0:
            spectrum[..., :, 0] = 0
    if columns is not None:
        if columns.shape != (small[1],):
            raise ValueError(f"a k-space of {small[1]} columns needs as many, not {list(columns.shape)}")
        spectrum = torch.where(columns.to(spectrum.device), spectrum, torch.zeros_like(spectrum))
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)), norm="forward").abs()


def enlarged(images: Tensor, scale: int) -> Tensor:
    """Zero-filling: the image whose k-space is that of the small one in the middle, and zero around it (a sinc
    interpolation with periodic borders). ``reduced(enlarged(x), scale)`` is ``x`` without its highest frequency.

    :param images: ``float [..., h, w]``.
    :param scale: by what both sides grow.
    :returns: ``float [..., h * scale, w * scale]``, not clipped: it rings around sharp edges.
    :raises ValueError: the images are complex, or ``scale`` is below 1.
    """
    _sides(images, scale)
    # One direction after the other: the highest frequency is then shared out alike between its sides in both.
    return _wider(_wider(images, scale).mT, scale).mT.contiguous()


def _wider(images: Tensor, scale: int) -> Tensor:
    """``[..., w] -> [..., w * scale]``."""
    few = images.shape[-1]
    many = few * scale
    spectrum = torch.fft.fftshift(torch.fft.fft(images, norm="forward"), dim=-1)
    # The first center of the large image lies (s - 1) / 2 of its pixels before that of the small one.
    spectrum = spectrum * _ramp(few, -(scale - 1) / 2 / scale, images)
    left = many // 2 - few // 2
    filled = F.pad(spectrum, (left, many - few - left))
    # The real part is what half of a frequency without a partner gives on either side.
    return torch.fft.ifft(torch.fft.ifftshift(filled, dim=-1), norm="forward").real


def cartesian_columns(width: int, acceleration: float, center: float, generator: torch.Generator) -> Tensor:
    """Which columns of k-space an accelerated scan measures: those in the middle, and others at random, so that about
    ``width / acceleration`` are measured in all.

    The scheme of fastMRI (Zbontar et al., arXiv:1811.08839, section 6.1.2): with ``low`` columns in the middle, each
    other one with the probability ``(width / acceleration - low) / (width - low)``.

    :param width: columns of the k-space.
    :param acceleration: at least 1; 1 measures all of them.
    :param center: share of the columns that lie in the middle; at least one does.
    :param generator: of the CPU, the only source of randomness.
    :returns: ``bool [width]``, the lowest frequency first.
    """
    low = min(width, max(1, round(width * center)))
    probability = max(0.0, (width / acceleration - low) / max(1, width - low))
    columns = torch.rand(width, generator=generator, dtype=torch.float64) < probability
    first = (width - low + 1) // 2
    columns[first : first + low] = True
    return columns


def _sides(images: Tensor, scale: int) -> tuple[int, int]:
    if images.is_complex():
        raise ValueError("images must be real, not complex: take the magnitude first")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, not {scale}")
    height, width = images.shape[-2:]
    return height, width


def _ramp(side: int, shift: float, images: Tensor) -> Tensor:
    """Moves an image by ``shift`` pixels towards its first one; ``complex [side]``, for spectra with the zero frequency
    in the middle."""
    frequencies = torch.fft.fftshift(torch.fft.fftfreq(side, dtype=images.dtype, device=images.device))
    angle = 2 * torch.pi * shift * frequencies
    return torch.polar(torch.ones_like(angle), angle)
