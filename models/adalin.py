"""Variational normalization: a normalization whose scale and shift come from a vector, not from the data set.

AdaLIN (J. Kim et al., "U-GAT-IT", ICLR 2020, arXiv:1907.10830) mixes instance and layer normalization. The block V_IN
around it is that of the figure of HQG-Net (arXiv:2307.07829); its formulas are not given there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5
FIRST_MIX = 2.1972  # logit of 0.9: features begin as 90 % instance and 10 % layer normalization, as in U-GAT-IT


def adalin(x: Tensor, mix: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS) -> Tensor:
    """``scale * (mix * a_I + (1 - mix) * a_L) + shift``.

    ``a_I`` is normalized over the pixels of a channel, ``a_L`` over pixels and channels, both with the biased variance
    of ``x`` itself.

    :param x: ``float [N, C, H, W]``.
    :param mix: ``float [C]`` in [0, 1]: 1 is instance normalization, 0 is layer normalization.
    :param scale: ``float [N, C]``.
    :param shift: ``float [N, C]``.
    """
    instance, layer = (_normalized(x, dims, eps) for dims in ((2, 3), (1, 2, 3)))
    mix = mix[:, None, None]
    return scale[..., None, None] * (mix * instance + (1 - mix) * layer) + shift[..., None, None]


def _normalized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) * (variance + eps).rsqrt()


class AdaLIN(nn.Module):
    """:func:`adalin` with a learned mix, ``1 + sigma`` as the scale and ``mu`` as the shift.

    ``(mu, sigma)`` are an affine function of a vector. The mix is a sigmoid of a free parameter, so that it stays
    between 0 and 1 without being clamped in place after a step, which an optimizer would not know of.

    :param features: C.
    :param code: length of the vector.
    """

    def __init__(self, features: int, code: int) -> None:
        super().__init__()
        self.affine = nn.Linear(code, 2 * features)
        self.mix = nn.Parameter(torch.full((features,), FIRST_MIX))

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """
        :param x: ``float [N, C, H, W]``.
        :param code: ``float [N, code]``.
        """
        mu, sigma = self.affine(code).chunk(2, dim=1)
        return adalin(x, self.mix.sigmoid(), 1 + sigma, mu)


class VIN(nn.Module):
    """The block V_IN: ``x + conv3(LeakyReLU_0.2(AdaLIN(x)))``.

    ``9 C^2 + 164 C`` parameters with a vector of 80 numbers.

    :param features: C.
    :param code: length of the vector.
    """

    def __init__(self, features: int, code: int) -> None:
        super().__init__()
        self.norm = AdaLIN(features, code)
        self.conv = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        return x + self.conv(F.leaky_relu(self.norm(x, code), 0.2))
