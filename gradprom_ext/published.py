"""Published methods that weigh several conflicts at once, as policies in plain PyTorch.

They are functions of the Gram matrix like every other gate, so they run on every backend, as a few small operations
between two kernels, and never wait for the device. Unlike the gates of :mod:`gradprom_ext.policy` they treat the main
gradient as one task among ``K + 1``: it may be turned or shrunk in favor of the auxiliary ones. The gradients of the
tasks are ``h_0 = g_0`` and ``h_k = lambda_k g_k``; with ``aux_cap`` the lambdas are the capped ones. A method weighs
each of them, so that here ``gate`` need not lie in [0, 1], and the cap bounds ``h_k`` but not what the method makes of
it.

A gradient of zero (lambda 0 counts) conflicts with nothing. That, the lambdas, the fixed order and the absence of an
epsilon are ours; what else is not the papers' is said with each class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._device import refuse_capture, to_device
from .policy import GatePolicy

__all__ = ["GradVacGate", "MGDAGate", "PCGradGate"]


class PCGradGate(GatePolicy):
    """PCGrad (Yu et al., NeurIPS 2020, `arXiv:2001.06782 <https://arxiv.org/abs/2001.06782>`_, Algorithm 1).

    Each gradient loses its component along every other one that it conflicts with, one after the other, and the
    results are added: ``h_i -= (<h_i, h_j> / |h_j|^2) h_j`` for every ``j`` in turn with ``<h_i, h_j> < 0``, where
    ``h_i`` is what the turns before have left and ``h_j`` is the gradient as it was. The paper draws the order of the
    ``j`` at random; here it is 0 (main), 1, ..., K, so that a step can be repeated. With one auxiliary there is no
    order. :class:`~gradprom_ext.ProjectGate` projects the auxiliary gradients alone.

    >>> import torch, gradprom_ext as gp
    >>> main, aux = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]
    >>> stats = gp.gradient_stats(main, aux, gate=gp.PCGradGate())  # (1/2, 1/2) + (0, 1)
    >>> float(stats.main_weight), stats.gate.tolist()
    (2.0, [1.5])
    """

    def __call__(self, gram: Tensor, aux_weight: Tensor) -> tuple[Tensor, Tensor]:
        cosine, length = _tasks(gram, aux_weight)
        parts = torch.diag_embed(length)  # [..., i, j]: of what is left of h_i, in units of h_j / |h_j|
        for j in range(gram.shape[-1]):
            along = _along(parts, cosine, j)
            parts = _minus(parts, j, along.clamp_max(0.0))
        return _weights(parts.sum(-2), length)


class GradVacGate(GatePolicy):
    """Gradient Vaccine (Wang et al., ICLR 2021, `arXiv:2010.05874 <https://arxiv.org/abs/2010.05874>`_, Algorithm 1).

    As PCGrad, but a gradient is turned towards another one wherever their cosine ``phi`` is below a target ``phi^``,
    and so far that it reaches it: ``h_i += |h_i| (phi^ sqrt(1 - phi^2) - phi sqrt(1 - phi^^2)) / (|h_j| sqrt(1 -
    phi^^2)) h_j``. Each pair's target begins at 0, where this is PCGrad, and follows the cosines that were met as an
    exponential moving average, ``phi^ = (1 - beta) phi^ + beta phi``. The order is 0 (main), 1, ..., K as in
    :class:`PCGradGate`. ``granularity="tensor"`` has targets for each parameter, as the paper recommends of its layers.

    The targets are the state of this object and stay on the device; every decision moves them, one that
    :func:`~gradprom_ext.gradient_stats` takes too, so that each optimizer needs a policy of its own. Copies and pickles
    of an optimizer have them, and its ``state_dict`` carries them under ``"gate"``. Ours: a step that is skipped
    because a gradient is not finite leaves them alone, a pair with a gradient of zero leaves its target alone, and
    nothing is turned towards a target of exactly 1 or -1, which no finite weight reaches.

    :param beta: in [0, 1]; the paper has 0.01. 0 is PCGrad for ever.
    :raises ValueError: ``beta`` out of range; or, in a step, the number of auxiliaries or, with
        ``granularity="tensor"``, of parameters is another than that of the targets.

    >>> import torch, gradprom_ext as gp
    >>> main, aux = [torch.tensor([3.0, 4.0])], [torch.tensor([-4.0, 3.0])]  # at a right angle: no conflict for PCGrad
    >>> gate = gp.GradVacGate(beta=1.0)
    >>> gate.load_state_dict({"target": torch.tensor([[[0.0, 0.8], [0.0, 0.0]]])})  # of main against aux
    >>> stats = gp.gradient_stats(main, aux, gate=gate)  # main is turned by |h_0| 0.8 / (|h_1| 0.6) aux, aux stays
    >>> float(stats.main_weight), round(float(stats.gate), 6)  # 1 + 4 / 3
    (1.0, 2.333333)
    """

    def __init__(self, beta: float = 0.01) -> None:
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must lie in [0, 1], got {beta}")
        self.beta = float(beta)
        #: float64 ``[rows, K + 1, K + 1]``, ``[i, j]`` that of task i against j; ``None`` before the first decision.
        self.target: Tensor | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(beta={self.beta})"

    def __call__(self, gram: Tensor, aux_weight: Tensor) -> tuple[Tensor, Tensor]:
        kept = self._target_like(gram)
        cosine, length = _tasks(gram, aux_weight)
        finite = gram.diagonal(dim1=-2, dim2=-1).isfinite().all()
        parts = torch.diag_embed(length)
        targets = []
        for j in range(gram.shape[-1]):
            target = kept[..., j]
            norm = (parts @ cosine * parts).sum(-1).clamp_min(0.0).sqrt()
            phi = (_along(parts, cosine, j) / torch.where(norm == 0, 1.0, norm)).clamp(-1.0, 1.0)
            pair = (norm != 0) & (length[..., j, None] != 0)
            pair = pair & (torch.arange(gram.shape[-1], device=gram.device) != j)
            sine, target_sine = (1 - phi.square()).sqrt(), (1 - target.square()).clamp_min(0.0).sqrt()
            turned = pair & (phi < target) & (target_sine != 0)
            ratio = (target * sine - phi * target_sine) / torch.where(turned, target_sine, 1.0)
            parts = _minus(parts, j, torch.where(turned, -norm * ratio, 0.0))
            targets.append(torch.where(pair & finite, (1 - self.beta) * target + self.beta * phi, target))
        kept.copy_(torch.stack(targets, dim=-1))
        return _weights(parts.sum(-2), length)

    def _target_like(self, gram: Tensor) -> Tensor:
        """The targets, on the device of ``gram``."""
        if self.target is None:
            refuse_capture()  # a CUDA graph would begin at 0 at every replay
            self.target = torch.zeros_like(gram)
        if self.target.shape != gram.shape:
            raise ValueError(
                f"{self!r} has targets for {self._what(self.target)}, and this step has {self._what(gram)}; give each "
                "optimizer a policy of its own, or assign None to its `target` to begin anew"
            )
        if self.target.device != gram.device:  # it was loaded
            refuse_capture()
            self.target = to_device(self.target, gram.device)
        return self.target

    @staticmethod
    def _what(matrices: Tensor) -> str:
        return f"{matrices.shape[-1] - 1} auxiliaries and {len(matrices)} Gram matrices"

    def state_dict(self) -> dict[str, Any]:
        return {} if self.target is None else {"target": self.target}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        target = state.get("target")
        self.target = None if target is None else target.to(torch.float64, copy=True)


class MGDAGate(GatePolicy):
    """Multiple gradient descent: the shortest vector of the gradients' convex hull (Désidéri 2012; Sener & Koltun,
    NeurIPS 2018, `arXiv:1810.04650 <https://arxiv.org/abs/1810.04650>`_, Algorithm 2).

    ``c = sum_i alpha_i h_i`` with ``alpha_i >= 0`` of sum 1 and ``|c|`` least, so that ``<c, h_i> >= |c|^2`` for every
    ``i``. ``gate`` is alpha. Two gradients have the closed form; more take ``iterations`` steps of Frank and Wolfe with
    exact line search, a dozen small operations each. After those ``|c|^2`` is at most ``4 d^2 / (iterations + 2)`` too
    large, ``d`` being the longest ``|h_i - h_j|``; on the random gradients of our tests 100 steps leave ``|c|`` within
    1%. The paper begins in the middle of the hull and stops by a tolerance; this begins at the shortest gradient, from
    where one step is the closed form for two, and never looks whether it has arrived.

    Ours: a gradient of zero takes no part. With it in the hull ``c`` would be zero, and a parameter that one of the
    losses does not reach would never move.

    :param iterations: of Frank and Wolfe, for more than one auxiliary.
    :param normalize: takes the gradients by their directions: ``h_0 = g_0`` and ``h_k = lambda_k (|g_0| / |g_k|) g_k``,
        so that for lambda 1 and one auxiliary the sum halves the angle. Ours: the authors' code also divides by the
        lengths before it looks for alpha, but then applies alpha to the undivided gradients, which gives up ``<c, h_i>
        >= 0``. A main gradient of zero leaves nothing.
    :raises ValueError: ``iterations`` is not a positive number.

    >>> import torch, gradprom_ext as gp
    >>> main, aux = [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 2.0])]
    >>> stats = gp.gradient_stats(main, aux, gate=gp.MGDAGate())  # (0.8, 0.4), at a right angle to aux - main
    >>> round(float(stats.main_weight), 6), round(float(stats.gate), 6)
    (0.8, 0.2)
    """

    def __init__(self, iterations: int = 100, normalize: bool = False) -> None:
        if iterations < 1:
            raise ValueError(f"iterations must be a positive number, got {iterations}")
        self.iterations = int(iterations)
        self.normalize = bool(normalize)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(iterations={self.iterations}, normalize={self.normalize})"

    def __call__(self, gram: Tensor, aux_weight: Tensor) -> tuple[Tensor, Tensor]:
        factor = torch.ones_like(gram[..., 0, :])
        if self.normalize:
            norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
            ratio = norms[..., :1] / torch.where(norms == 0, 1.0, norms)
            factor = torch.where(norms == 0, factor, ratio)
            factor[..., 0] = 1.0
        cosine, length = _tasks(gram, aux_weight * factor[..., 1:])
        taking_part = length != 0
        # In units of the longest gradient, so that squares stay within float64.
        longest = length.amax(-1, keepdim=True)
        unit = length / torch.where(longest == 0, 1.0, longest)
        products = cosine * unit[..., :, None] * unit[..., None, :]
        far = torch.full_like(length, torch.inf)
        # No one-hot of PyTorch's: it looks at the values to find out how many there are.
        numbers = torch.arange(length.shape[-1], device=length.device)
        first = torch.where(taking_part, unit, far).argmin(-1, keepdim=True)
        alpha = (numbers == first).to(gram.dtype)
        for _ in range(1 if length.shape[-1] <= 2 else self.iterations):
            slope = (products @ alpha[..., None])[..., 0]
            nearest = torch.where(taking_part, slope, far).argmin(-1, keepdim=True)
            here = (alpha * slope).sum(-1, keepdim=True)
            across = slope.gather(-1, nearest)
            there = products.diagonal(dim1=-2, dim2=-1).gather(-1, nearest)
            squared = here - 2 * across + there
            share = torch.where(squared > 0, (here - across) / torch.where(squared > 0, squared, 1.0), 0.0)
            alpha = alpha + share.clamp(0.0, 1.0) * ((numbers == nearest).to(gram.dtype) - alpha)
        weights = alpha * factor
        return weights[..., 0], weights[..., 1:]


def _tasks(gram: Tensor, aux_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines ``[..., n, n]`` and lengths ``[..., n]`` of the ``h_i``; one of length zero has a row of zeros."""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    factor = torch.cat([torch.ones_like(norms[..., :1]), aux_weight.expand(norms[..., 1:].shape)], dim=-1)
    length = factor.abs() * norms
    divisor = torch.where(length == 0, 1.0, norms)
    cosine = (
        gram / divisor[..., :, None] / divisor[..., None, :] * factor.sign()[..., :, None] * factor.sign()[..., None, :]
    )
    nothing = length == 0
    return torch.where(nothing[..., :, None] | nothing[..., None, :], 0.0, cosine), length


def _along(parts: Tensor, cosine: Tensor, j: int) -> Tensor:
    """Component along ``h_j`` of each vector in ``parts``, ``[..., i]``; 0 for ``i = j``, which is never compared."""
    along = (parts * cosine[..., None, :, j]).sum(-1)
    return torch.where(torch.arange(along.shape[-1], device=along.device) == j, 0.0, along)


def _minus(parts: Tensor, j: int, amount: Tensor) -> Tensor:
    """``parts`` with ``amount[..., i]`` less of ``h_j / |h_j|`` in vector ``i``."""
    columns = torch.arange(parts.shape[-1], device=parts.device)
    return parts - torch.where(columns == j, amount[..., :, None], 0.0)


def _weights(sums: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """From a sum in units of ``h_j / |h_j|`` to weights of the ``h_j``, as a policy returns them; 1 for one of zero."""
    weights = torch.where(length == 0, 1.0, sums / torch.where(length == 0, 1.0, length))
    return weights[..., 0], weights[..., 1:]
