"""Gate policies: from the Gram matrix of the gradients to the weights of their sum.

Every method that compares gradients before it adds them needs only their inner products. With ``g_0`` the main
gradient and ``g_1 .. g_K`` the auxiliary ones, a policy maps ``gram[i, j] = <g_i, g_j>`` to the combined gradient

.. code-block:: text

    c = main_weight * g_0 + sum_k gate_k * aux_weight_k * g_k

where ``aux_weight_k`` is lambda, reduced by ``aux_cap`` if there is one (:func:`caps`). So a new method is a few lines
here and runs on every backend. The built-in policies also exist as a case of ``csrc/gradprom/policy.h`` and of
``gradprom_ext/triton_kernels.py``, where the fused kernels apply them without leaving the device; a policy of your own,
a subclass of a built-in one too, runs as PyTorch operations between two kernels, still without waiting for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "GATES",
    "AlwaysGate",
    "GatePolicy",
    "HardGate",
    "NeverGate",
    "ProjectGate",
    "SoftGate",
    "caps",
    "cosines",
    "kernel_of",
    "resolve_policy",
]


def cosines(gram: Tensor) -> Tensor:
    """Cosine of the main gradient with each auxiliary one; 0 where either is zero, no epsilon anywhere.

    :param gram: float64 ``[..., K + 1, K + 1]``.
    :returns: float64 ``[..., K]``.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    main, aux = norms[..., :1], norms[..., 1:]
    return torch.where((main == 0) | (aux == 0), 0.0, gram[..., 0, 1:] / main / aux)


def caps(gram: Tensor, aux_weight: Tensor, aux_cap: float) -> Tensor:
    """The factors in [0, 1] that bring the lambdas down to ``|lambda_k * g_k| <= aux_cap * |g_0|``.

    No epsilon anywhere. A factor is exactly 1 where nothing is to be reduced, and where lambda or ``g_k`` is zero. A
    main gradient of zero leaves no room: 0 for every other auxiliary.

    :param gram: float64 ``[..., K + 1, K + 1]``.
    :param aux_weight: float64 ``[K]``, the lambdas; of either sign.
    :param aux_cap: kappa > 0.
    :returns: float64 ``[..., K]``.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    main, aux = norms[..., :1], norms[..., 1:]
    # The norms are divided first, so that a common scale of the gradients cancels.
    limit = main / aux * aux_cap
    size = aux_weight.abs()
    return torch.where((aux == 0) | (size <= limit), 1.0, limit / size)


class GatePolicy(ABC):
    """A function from the Gram matrix to the weights of the combined gradient.

    Subclass it and pass an instance as ``gate``. This one lets an auxiliary gradient through only while it is no
    longer than the main one:

    >>> import torch, gradprom_ext as gp
    >>> class NotLouder(gp.GatePolicy):
    ...     def __call__(self, gram, aux_weight):
    ...         squared = gram.diagonal(dim1=-2, dim2=-1)
    ...         gate = (squared[..., 1:] <= squared[..., :1]).to(gram.dtype)
    ...         return torch.ones_like(gram[..., 0, 0]), gate
    >>> main, aux = [torch.tensor([1.0, 0.0])], [torch.tensor([3.0, 4.0])]
    >>> gp.gradient_stats(main, aux, gate=NotLouder()).gate.tolist()
    [0.0]
    """

    #: The cosine that :class:`HardGate` and :class:`SoftGate` compare with.
    threshold: float = 0.0

    @abstractmethod
    def __call__(self, gram: Tensor, aux_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Decides. Must not read values back to the host (no ``.item()``, no ``if`` on a tensor).

        :param gram: float64 ``[..., K + 1, K + 1]``; index 0 is the main gradient. The leading dimension runs over
            tensors where ``granularity="tensor"``.
        :param aux_weight: float64 ``[K]``, the lambdas; those that ``aux_cap`` leaves, if there is one. With
            ``aux_cap`` and ``granularity="tensor"`` every tensor has its own: ``[..., K]``.
        :returns: ``main_weight`` ``[...]`` and ``gate`` ``[..., K]``, the weights before lambda. A weight of exactly 0
            deselects its gradient; nothing is multiplied by it.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a policy remembers from step to step, tensors by their names; empty for one that remembers nothing. An
        optimizer's ``state_dict`` carries it under ``"gate"`` where it is not empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most policies remember nothing
        """Takes what :meth:`state_dict` returned; that of another type of policy too, since a run may be resumed with
        another gate. Empty: as if no step had been taken."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class _ThresholdGate(GatePolicy):
    def __init__(self, threshold: float = 0.0) -> None:
        if not -1.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be a cosine in [-1, 1], got {threshold}")
        self.threshold = float(threshold)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(threshold={self.threshold})"


class HardGate(_ThresholdGate):
    """GradProm (`arXiv:2501.01114 <https://arxiv.org/abs/2501.01114>`_): open where ``cos >= threshold``.

    :param threshold: a cosine in [-1, 1]; the method has 0.
    :raises ValueError: ``threshold`` is no cosine.

    >>> import torch, gradprom_ext as gp
    >>> main, aux = [torch.tensor([3.0, 4.0])], [torch.tensor([4.0, 3.0])]  # their cosine is 24 / 25
    >>> gp.gradient_stats(main, aux, gate=gp.HardGate()).gate.tolist()
    [1.0]
    >>> gp.gradient_stats(main, aux, gate=gp.HardGate(threshold=0.97)).gate.tolist()
    [0.0]
    """

    def __call__(self, gram: Tensor, aux_weight: Tensor) -> tuple[Tensor, Tensor]:
        gate = (cosines(gram) >= self.threshold).to(gram.dtype)
        return torch.ones_like(gram[..., 0, 0]), gate


class SoftGate(_ThresholdGate):
    """The form of GradProm's Lemma 3.1: the auxiliary gradient is weighted with ``max(0, cos)``.

    :param threshold: below this cosine, in [-1, 1], the weight is 0.
    :raises ValueError: ``threshold`` is no cosine.

    >>> import torch, gradprom_ext as gp
    >>> main, aux = [torch.tensor([3.0, 4.0])], [torch.tensor([4.0, 3.0])]
    >>> round(float(gp.gradient_stats(main, aux, gate=gp.SoftGate()).gate), 6)  # 24 / 25
    0.96
    """

    def __call__(self, gram: Tensor, aux_weight: Tensor) -> tuple[Tensor, Tensor]:
        cosine = cosines(gram)
        gate = torch.where(cosine >= self.threshold, cosine.clamp_min(0.0), 0.0)
        return torch.ones_like(gram[..., 0, 0]), gate


class AlwaysGate(GatePolicy):
    """Joint training: the plain sum of the gradients, whatever their directions.

    >>> import torch, gradprom_ext as gp
    >>> main, aux = [torch.tensor([3.0, 4.0])], [torch.tensor([-4.0, -4.0])]
    >>> stats = gp.gradient_stats(main, aux, gate=gp.AlwaysGate())  # the sum is (-1, 0)
    >>> stats.gate.tolist(), round(float(stats.combined_norm), 6)
    ([1.0], 1.0)
    """

    def __call__(self, gram: Tensor, aux_weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(gram[..., 0, 0]), torch.ones_like(gram[..., 0, 1:])


class NeverGate(GatePolicy):
    """The main gradient alone; the auxiliary ones are measured but never added.

    >>> import torch, gradprom_ext as gp
    >>> main, aux = [torch.tensor([3.0, 4.0])], [torch.tensor([4.0, 3.0])]
    >>> stats = gp.gradient_stats(main, aux, gate=gp.NeverGate())
    >>> stats.gate.tolist(), float(stats.combined_norm)
    ([0.0], 5.0)
    """

    def __call__(self, gram: Tensor, aux_weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(gram[..., 0, 0]), torch.zeros_like(gram[..., 0, 1:])


class ProjectGate(GatePolicy):
    """One-sided PCGrad (`arXiv:2001.06782 <https://arxiv.org/abs/2001.06782>`_).

    Where an auxiliary gradient conflicts with the main one (``cos < 0``), its component along the main gradient is
    removed; the main gradient itself is never projected, so it cannot be biased:
    ``g_k - (<g_0, g_k> / |g_0|^2) g_0``, whose second term is a weight on ``g_0``.

    >>> import torch, gradprom_ext as gp
    >>> main, aux = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]
    >>> stats = gp.gradient_stats(main, aux, gate=gp.ProjectGate())  # (1, 0) + (0, 1) = 2 main + aux
    >>> float(stats.main_weight), stats.gate.tolist()
    (2.0, [1.0])
    """

    def __call__(self, gram: Tensor, aux_weight: Tensor) -> tuple[Tensor, Tensor]:
        conflict = cosines(gram) < 0
        along = gram[..., 0, 1:] / gram[..., 0, :1]
        main_weight = 1.0 - (aux_weight * torch.where(conflict, along, 0.0)).sum(-1)
        return main_weight, torch.ones_like(along)


#: The one table of gates: the name on every interface, which is also that of the kernels' case, and the class.
GATES: dict[str, type[GatePolicy]] = {
    "hard": HardGate,
    "soft": SoftGate,
    "always": AlwaysGate,
    "never": NeverGate,
    "project": ProjectGate,
}


_KERNELS = {gate: name for name, gate in GATES.items()}


def kernel_of(policy: GatePolicy) -> str | None:
    """Name of the case that the kernels have for exactly this class; ``None`` for a policy that exists in Python
    alone. A subclass may override anything, so it is not its parent."""
    return _KERNELS.get(type(policy))


def resolve_policy(gate: str | GatePolicy, threshold: float = 0.0) -> GatePolicy:
    """The policy that a ``gate`` argument means.

    :param gate: ``"hard"``, ``"soft"``, ``"always"``, ``"never"``, ``"project"`` or a :class:`GatePolicy`.
    :param threshold: for ``"hard"`` and ``"soft"``.
    :raises ValueError: an unknown name, or a threshold that is no cosine or that the gate does not have.
    """
    if math.isnan(threshold):
        raise ValueError("threshold must be a cosine in [-1, 1], got nan")
    if isinstance(gate, GatePolicy):
        if threshold != 0.0:
            raise ValueError(f"threshold={threshold} has no effect on a policy object; give it to {gate!r} itself")
        return gate
    if gate not in GATES:
        known = ", ".join(repr(name) for name in GATES)
        raise ValueError(f"unknown gate {gate!r}; choose {known}, or pass a gradprom_ext.GatePolicy")
    policy = GATES[gate]
    if issubclass(policy, _ThresholdGate):
        return policy(threshold)
    if threshold != 0.0:
        raise ValueError(f"threshold={threshold} has no meaning for gate={gate!r}; only 'hard' and 'soft' have one")
    return policy()
