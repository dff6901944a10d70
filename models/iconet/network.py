"""ICONet: super-resolution guided by the prior of a reconstruction, in stages of x2.

"ICONet", IEEE Transactions on Computational Imaging 2025, doi 10.1109/TCI.2025.3577340, arXiv:2504.16958. What could be
read of it is its abstract. *From the abstract*: a reconstruction (Rec) branch whose artifact-free image is the prior of
a super-resolution (SR) branch; RSCFL, a residual module of two branches for spatial and for channel relationships, in
the place of both local convolutions and quadratic transformers; an SR-Rec fusion "in an adaptive manner"; iterative
upscaling in steps of 2; both branches supervised in every stage. *Ours*: every formula, width and depth below, the
k-space targets and the zero start. *From T2Net* (C.-M. Feng et al., MICCAI 2021): the weights 0.8 and 0.2 of the two
losses. No figure of the paper is claimed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kspace
from models.iconet import REC_WEIGHT, ICONetOptions
from models.training import Term, TrainingLoss

STAGES = {2: 1, 4: 2}
"""How many stages of x2 each scale takes."""
SR_WEIGHT = 1 - REC_WEIGHT
KERNEL = 7
"""Side of the neighborhood that a block looks at."""
REDUCTION = 4
LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss}


def _conv(inputs: int, outputs: int, kernel: int = 3, *, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)


class RSCFL(nn.Module):
    """Residual spatial and channel feature learning: ``x + conv1([S, Ch])``, linear in the number of pixels.

    With ``u = GELU(conv3(x))``: the spatial branch is ``S = conv1(GELU(depthwise 7x7(u)))``, the channel branch ``Ch =
    u * sigmoid(conv1(ReLU(conv1(mean of u))))``, as in squeeze and excitation (arXiv:1709.01507), reduced by 4.

    Parameters: 14,536 (32 features), 54,672 (64).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shared = nn.Sequential(_conv(features, features), nn.GELU())
        self.spatial = nn.Sequential(
            _conv(features, features, KERNEL, groups=features), nn.GELU(), _conv(features, features, 1)
        )
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            _conv(features, features // REDUCTION, 1),
            nn.ReLU(),
            _conv(features // REDUCTION, features, 1),
            nn.Sigmoid(),
        )
        self.mix = _conv(2 * features, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, features, H, W]``, the same shape out."""
        u = self.shared(x)
        return x + self.mix(torch.cat([self.spatial(u), u * self.channel(u)], 1))


class Fusion(nn.Module):
    """SR-Rec fusion: each branch takes from the other one as much as a gate, which has seen both, lets through::

        g_sr, g_rec = split(sigmoid(conv1([sr, rec])))
        sr' = sr + g_sr * conv1(rec)        rec' = rec + g_rec * conv1(sr)

    Parameters: 6,272 (32 features), 24,832 (64).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gates = _conv(2 * features, 2 * features, 1)
        self.to_sr = _conv(features, features, 1)
        self.to_rec = _conv(features, features, 1)

    def forward(self, sr: Tensor, rec: Tensor) -> tuple[Tensor, Tensor]:
        """Two of ``[N, features, H, W]``, the same shapes out."""
        g_sr, g_rec = self.gates(torch.cat([sr, rec], 1)).sigmoid().chunk(2, 1)
        return sr + g_sr * self.to_sr(rec), rec + g_rec * self.to_rec(sr)


class Stage(nn.Module):
    """One step of x2. Its last convolutions start at zero: untrained, ``rec`` is the input, ``sr`` its bicubic
    enlargement."""

    def __init__(self, options: ICONetOptions, channels: int) -> None:
        super().__init__()
        features, blocks = options.features, range(options.blocks)
        self.sr_head, self.rec_head = _conv(channels, features), _conv(channels, features)
        self.sr_blocks = nn.ModuleList(RSCFL(features) for _ in blocks)
        self.rec_blocks = nn.ModuleList(RSCFL(features) for _ in blocks)
        self.fusions = nn.ModuleList(Fusion(features) for _ in blocks if options.fusion)
        self.sr_body, self.rec_body = _conv(features, features), _conv(features, features)
        self.upsample = nn.Sequential(_conv(features, 4 * features), nn.PixelShuffle(2))
        self.sr_tail, self.rec_tail = _conv(features, channels), _conv(features, channels)
        for tail in (self.sr_tail, self.rec_tail):
            for parameter in tail.parameters():
                nn.init.zeros_(parameter)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """
        :param image: ``[N, C, h, w]``.
        :returns: ``sr [N, C, 2 h, 2 w]`` and ``rec [N, C, h, w]``.
        """
        sr = sr_first = self.sr_head(image)
        rec = rec_first = self.rec_head(image)
        for i, (sr_block, rec_block) in enumerate(zip(self.sr_blocks, self.rec_blocks, strict=True)):
            sr, rec = sr_block(sr), rec_block(rec)
            if self.fusions:
                sr, rec = self.fusions[i](sr, rec)
        restored = image + self.rec_tail(self.rec_body(rec) + rec_first)
        # The restored image answers for its own loss alone. Otherwise the loss of the large image sharpens the small
        # one in the place of the SR branch, which the loss of the small one undoes: 0.3 dB in 100 steps of kspace2.
        skip = F.interpolate(restored.detach(), scale_factor=2, mode="bicubic", align_corners=False)
        return skip + self.sr_tail(self.upsample(self.sr_body(sr) + sr_first)), restored


class ICONet(nn.Module):
    """Stages of x2, none of which shares weights with another; each enlarges what the one before it has made.

    It is not told how its input was degraded. Untrained, it is bicubic enlargement by 2 (for x4: twice).

    Parameters at one channel, 4 blocks x 32 features: 198,082 (x2), 396,164 (x4); 8 blocks x 64 features: 1,297,410
    and 2,594,820. A fusion is left out with its parameters.

    :param options: depth, width, fusion; :class:`ICONetOptions` has refused what is out of range.
    :param channels: image channels, in and out.
    :param scale: 2 or 4.
    :raises ValueError: an argument out of range, named in the message.
    """

    def __init__(self, options: ICONetOptions | None = None, *, channels: int, scale: int) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"ICONet: channels must be at least 1, not {channels}")
        if scale not in STAGES:
            raise ValueError(
                f"ICONet: scale must be 2 or 4, not {scale}: it enlarges in stages of 2; give a --task that reduces "
                "images by as much, such as kspace2 or joint4"
            )
        options = options or ICONetOptions()
        self.scale = scale
        self.loss = options.loss
        self.stages = nn.ModuleList(Stage(options, channels) for _ in range(STAGES[scale]))

    def _forward(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each stage makes: ``sr`` and ``rec``."""
        if min(image.shape[-2:]) < KERNEL:
            height, width = image.shape[-2:]
            raise ValueError(
                f"ICONet needs {KERNEL} x {KERNEL} pixels at least, which its blocks look at, and was given "
                f"{height} x {width}: an image of {self.scale * KERNEL} pixels at x{self.scale}"
            )
        found = []
        for stage in self.stages:
            found.append(stage(image))
            image = found[-1][0]
        return found

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C, H * scale, W * scale]``; the values are not clipped.

        :raises ValueError: a side has fewer than 7 pixels.
        """
        return self._forward(x)[-1][0]

    def training_loss(self, degraded: Tensor, clean: Tensor) -> TrainingLoss:
        """``sum over stages of 0.8 L1(sr, clean at its size) + 0.2 L1(rec, clean at the size of its input)``, or mean
        squared errors in the place of L1 (option ``loss``).

        The clean image at a smaller size is the crop of its k-space (:func:`models.kspace.reduced`), which is what a
        scan without undersampling would have measured there.

        :param degraded: ``float [N, C, H, W]``.
        :param clean: ``float [N, C, H * scale, W * scale]``.
        :returns: the super-resolution losses as the main loss, the reconstruction losses as the term ``rec``.
        :raises ValueError: the shapes do not fit each other, or a side of ``degraded`` has fewer than 7 pixels.
        """
        expected = (*degraded.shape[:2], *(self.scale * side for side in degraded.shape[2:]))
        if clean.shape != expected:
            raise ValueError(f"clean images must be {list(expected)}, not {list(clean.shape)}")
        stages = self._forward(degraded)
        # From the size of the input to that of the output.
        scales = [self.scale // 2**stage for stage in range(len(stages) + 1)]
        targets = [clean if scale == 1 else kspace.reduced(clean, scale).clamp(0, 1) for scale in scales]
        distance = LOSSES[self.loss]
        main = sum((distance(sr, to) for (sr, _), to in zip(stages, targets[1:], strict=True)), clean.new_zeros(()))
        rec = sum((distance(rec, to) for (_, rec), to in zip(stages, targets[:-1], strict=True)), clean.new_zeros(()))
        return TrainingLoss(stages[-1][0], SR_WEIGHT * main, {"rec": Term(REC_WEIGHT, rec)})
