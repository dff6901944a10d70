"""HQG-Net: an enhancer whose normalization is told by images of high quality what to look like."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.adalin import VIN
from models.blocks import PreActivation, widths
from models.hqgnet import HQGNetOptions

CUE, CONTENT = 64, 16  # lengths of v_z and v_y, as the figure has them
DARKEST = 1e-3  # what the input is clamped to before its logit is taken, and 1 minus this


class Description(NamedTuple):
    """What the guidance encoder says of images.

    :param mean: ``float [N, 64]``: v_z, or the mean of its distribution.
    :param log_variance: ``float [N, 64]``, of the distribution; ``None`` where v_z is a vector.
    """

    mean: Tensor
    log_variance: Tensor | None

    def sample(self) -> Tensor:
        """v_z in training: drawn from the distribution, with PyTorch's global generator, where it is one."""
        if self.log_variance is None:
            return self.mean
        return self.mean + (self.log_variance / 2).exp() * torch.randn_like(self.mean)


class GuidanceEncoder(nn.Module):
    """An image of high quality as a vector: residual blocks that halve it, a global average, and a linear layer.

    The blocks and the length 64 of v_z are drawn in the figure; the average, which makes it work for any size, is ours.
    Parameters at one channel: 459,824 (width 16), 7,248,896 (width 64); 8,256 or 32,832 more where it is variational.
    """

    def __init__(self, options: HQGNetOptions, channels: int) -> None:
        super().__init__()
        wide = widths(options.width, options.levels)
        self.variational = options.variational
        self.head = nn.Conv2d(channels, wide[0], 3, padding=1)
        self.blocks = nn.Sequential(*(PreActivation(inputs, outputs, pool=True) for inputs, outputs in pairwise(wide)))
        self.last = nn.Linear(wide[-1], CUE * (1 + options.variational))

    def forward(self, images: Tensor) -> Description:
        """
        :param images: ``float [N, C, H, W]``.
        """
        features = F.leaky_relu(self.blocks(self.head(images)), 0.2).mean((2, 3))
        if not self.variational:
            return Description(self.last(features), None)
        mean, log_variance = self.last(features).chunk(2, dim=1)
        return Description(mean, log_variance)


class ContentEncoder(nn.Module):
    """The features of an image before the first level and after each: ``levels + 1`` tensors, the last one smallest."""

    def __init__(self, options: HQGNetOptions, channels: int) -> None:
        super().__init__()
        wide = widths(options.width, options.levels)
        self.head = nn.Conv2d(channels, wide[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            PreActivation(inputs, outputs, pool=True, norm=True) for inputs, outputs in pairwise(wide)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """
        :param images: ``float [N, C, H, W]``, sides multiples of ``2^levels``.
        """
        features = [self.head(images)]
        for block in self.blocks:
            features.append(block(features[-1]))
        return features


class Enhancer(nn.Module):
    """A U-shaped network: its encoder's last features become v_y, and every level of its decoder is normalized as
    ``v_c = [v_z, v_y]`` says.

    Parameters at one channel: 2,204,881 (width 16), 34,750,225 (width 64).
    """

    def __init__(self, options: HQGNetOptions, channels: int) -> None:
        super().__init__()
        wide = widths(options.width, options.levels)
        self.residual = options.residual
        self.encoder = ContentEncoder(options, channels)
        self.content = nn.Linear(wide[-1], CONTENT)
        self.blocks = nn.ModuleList()
        self.norms = nn.ModuleList()
        inputs = wide[-1]
        for skipped in reversed(wide[:-1]):
            self.blocks.append(PreActivation(inputs + skipped, skipped))
            self.norms.append(VIN(skipped, CUE + CONTENT))
            inputs = skipped
        self.last = nn.Conv2d(inputs, channels, 1)
        if options.residual:
            nn.init.zeros_(self.last.weight)
            assert self.last.bias is not None
            nn.init.zeros_(self.last.bias)

    def forward(self, images: Tensor, cue: Tensor) -> Tensor:
        """
        :param images: ``float [N, C, H, W]``, sides multiples of ``2^levels``.
        :param cue: v_z, ``float [N, 64]``.
        :returns: ``float [N, C, H, W]``, above 0 and below 1.
        """
        *skips, x = self.encoder(images)
        code = torch.cat([cue, self.content(x.mean((2, 3)))], dim=1)
        for block, norm, skip in zip(self.blocks, self.norms, reversed(skips), strict=True):
            x = norm(block(torch.cat([F.interpolate(x, scale_factor=2.0), skip], dim=1)), code)
        correction = self.last(x)
        if self.residual:
            correction = correction + torch.logit(images, DARKEST)
        return correction.sigmoid()


class HQGNet(nn.Module):
    """HQG-Net (C. He et al., "HQG-Net: Unpaired Medical Image Enhancement with High-Quality Guidance", IEEE TNNLS 2024,
    arXiv:2307.07829): v_z of an unpaired image of high quality steers the normalization of the enhancer.

    From the abstract: cues of high quality enter through a variational normalization. From the figure: the blocks,
    their order, the lengths of v_z and v_y, V_IN, the 1 x 1 convolution and the sigmoid at the end. Ours, as the text
    could not be read and the published code holds another method:

    * the output is a correction of the input's *logit*, and the last convolution starts at zero: the untrained network
      is the identity for values in [0.001, 0.999] (``residual=False``: the figure);
    * without a guide, v_z is the buffer ``guide``: the mean over some images of high quality, taken when a training is
      over (:meth:`remember`). Inference then needs the image alone, and is deterministic. It is zero before that;
    * ``variational``: a guide is a normal distribution, drawn from in training; the figure shows no drawing;
    * a smaller image (super-resolution) is enlarged bicubically first.

    A whole image is seen at once, by instance normalization and by v_y: tiles of a large image differ from it a little.

    Parameters at one channel: 2,664,705 (width 16), 41,999,121 (width 64).

    :param options: :class:`HQGNetOptions` has refused what is out of range.
    :param channels: image channels, in and out.
    :param scale: by what factor images are enlarged.
    :raises ValueError: an argument out of range, named in the message.
    """

    takes_guide = True
    guide: Tensor

    def __init__(self, options: HQGNetOptions | None = None, *, channels: int, scale: int = 1) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("scale", scale)):
            if value < 1:
                raise ValueError(f"HQG-Net: {name} must be at least 1, not {value}")
        options = options or HQGNetOptions()
        self.scale = scale
        self.channels = channels
        self.guided = options.guided
        self.crop_multiple = 2**options.levels
        """Crops have to have sides that are multiples of this, and at least twice as long."""
        self.multiple = self.crop_multiple
        self.guidance = GuidanceEncoder(options, channels)
        self.enhancer = Enhancer(options, channels)
        self.register_buffer("guide", torch.zeros(CUE))

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """
        :param x: ``float [N, C, H, W]`` in [0, 1] (clamped to [0.001, 0.999]), of any size of at least twice
            ``crop_multiple`` pixels after enlargement: what the levels leave over is mirrored at the border, and cut
            off again.
        :param guide: images of high quality, ``float [N, C, h, w]`` or ``[1, C, h, w]``; ``None``: those that are
            remembered.
        :returns: ``float [N, C, H * scale, W * scale]``, above 0 and below 1.
        :raises ValueError: the images have another number of channels, or are too small; the message says so.
        """
        if guide is None:
            return self.enhance(x, self.guide.expand(len(x), -1))
        description = self.describe(guide)
        cue = description.sample() if self.training else description.mean
        return self.enhance(x, cue.expand(len(x), -1))

    def describe(self, guide: Tensor) -> Description:
        """What the guidance encoder says of images of high quality, ``float [N, C, h, w]``."""
        self._check(guide)
        return self.guidance(self._padded(guide))

    def enhance(self, x: Tensor, cue: Tensor) -> Tensor:
        """:meth:`forward` with v_z, ``float [N, 64]``."""
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=float(self.scale), mode="bicubic")
        self._check(x)
        height, width = x.shape[2:]
        cue = cue if self.guided else torch.zeros_like(cue)
        return self.enhancer(self._padded(x), cue)[..., :height, :width]

    @torch.no_grad()
    def remember(self, images: Sequence[Tensor]) -> None:
        """Sets the guide of inference: the mean of v_z over images of high quality.

        :param images: each ``float [C, h, w]``; they may differ in size.
        """
        self.guide.copy_(torch.stack([self.describe(image[None]).mean[0] for image in images]).mean(0))

    def _check(self, images: Tensor) -> None:
        if images.shape[1] != self.channels:
            raise ValueError(f"HQG-Net was made for {self.channels} channel(s), and the images have {images.shape[1]}")
        least = 2 * self.crop_multiple
        if min(images.shape[2:]) < least:
            height, width = images.shape[2:]
            raise ValueError(f"HQG-Net needs images of at least {least} x {least} px, not {height} x {width}")

    def _padded(self, images: Tensor) -> Tensor:
        """To multiples of ``crop_multiple``, mirrored below and to the right."""
        below, right = (-side % self.crop_multiple for side in images.shape[2:])
        return F.pad(images, (0, right, 0, below), mode="reflect") if below or right else images
