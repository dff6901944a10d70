"""The definition of GradProm in plain PyTorch. Tests, documentation and benchmarks compare against this.

``combined_gradient`` is the method. The rest makes it a backend: it runs on every device and dtype, with any number of
auxiliaries, slowly, and is used where no kernel can be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks
from . import stats as _stats
from ._device import to_device
from .plan import Gradients, PlanSpec, StatesByName
from .policy import GatePolicy, caps, cosines
from .rules import Hyper, apply_rule
from .stats import GateStats

__all__ = ["combined_gradient", "decide", "gram_matrix"]


def gram_matrix(grads: Sequence[Gradients], per_tensor: bool = False) -> Tensor:
    """Inner products of the gradients, in float64.

    :param grads: the main gradient and the K auxiliary ones, each a sequence of one tensor per parameter; ``None`` is
        a zero.
    :param per_tensor: one matrix per parameter instead of one for the model.
    :returns: float64 ``[rows, K + 1, K + 1]``.
    """
    device = next((g.device for gs in grads for g in gs if g is not None), torch.device("cpu"))
    rows, n = len(grads[0]) if per_tensor else 1, len(grads)
    gram = torch.zeros(rows, n, n, dtype=torch.float64, device=device)
    for p, tensors in enumerate(zip(*grads, strict=True)):
        flat = [None if t is None else t.detach().to(torch.float64).reshape(-1) for t in tensors]
        for i, a in enumerate(flat):
            for j, b in enumerate(flat[: i + 1]):
                if a is not None and b is not None:
                    entry = torch.dot(a, b)
                    row = p if per_tensor else 0
                    gram[row, i, j] += entry
                    if i != j:
                        gram[row, j, i] += entry
    return gram


def decide(
    gram: Tensor,
    policy: GatePolicy,
    aux_weight: Sequence[float] | Tensor,
    aux_cap: float | None,
    max_grad_norm: float | None,
    per_tensor: bool,
) -> tuple[Tensor, GateStats]:
    """Weights of the combined gradient, clipping included, and the statistics of the step.

    :param gram: float64 ``[rows, K + 1, K + 1]``.
    :param aux_weight: K lambdas, or a tensor of one or K.
    :param aux_cap: kappa of :func:`gradprom_ext.policy.caps`; the policy sees the lambdas that it leaves. ``None``: no
        cap.
    :param max_grad_norm: as in ``torch.nn.utils.clip_grad_norm_``, applied to the combined gradient; its norm is
        ``sqrt(w' G w)``, so no further pass over the gradients is needed.
    :returns: weights float64 ``[rows, K + 1]`` and :class:`~gradprom_ext.GateStats`.
    """
    if isinstance(aux_weight, Tensor):
        lambdas = to_device(aux_weight, gram.device).to(torch.float64).expand(gram.shape[-1] - 1)
    else:
        lambdas = gram.new_empty(len(aux_weight))
        for k, weight in enumerate(aux_weight):
            lambdas[k].fill_(weight)  # no copy from the host: it would wait, and a CUDA graph would read freed memory
    cap = torch.ones_like(gram[:, 0, 1:])
    if aux_cap is not None:
        cap = caps(gram, lambdas, aux_cap)
        lambdas = cap * lambdas if per_tensor else cap[0] * lambdas
    main_weight, gate = policy(gram, lambdas)
    weights = torch.cat([main_weight[:, None], gate * lambdas], dim=1)
    norm = torch.einsum("ri,rij,rj->", weights, gram, weights).clamp_min(0.0).sqrt()
    clip = torch.ones_like(norm) if max_grad_norm is None else (max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    stats = _stats.pack(
        skipped=~squares.isfinite().all(),
        combined_norm=norm,
        clip_coefficient=clip,
        main_norm=squares[:, 0].sqrt(),
        main_weight=main_weight,
        cosine=cosines(gram),
        gate=gate,
        aux_norm=squares[:, 1:].sqrt(),
        cap=cap,
        per_tensor=per_tensor,
    )
    return weights * clip, stats


def combined_gradient(grads: Sequence[Tensor | None], weights: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``sum_k w_k g_k`` of one parameter; a weight of 0 selects, it never multiplies (0 * inf is NaN).

    :param grads: K + 1 tensors of one shape, ``None`` for zero; all ``None`` gives ``None``.
    :param weights: float64 ``[K + 1]``.
    :param dtype: of the arithmetic and of the result.
    """
    total = None
    for g, w in zip(grads, weights.unbind(), strict=True):
        if g is not None:
            term = torch.where(w == 0, 0.0, w.to(dtype) * g.to(dtype))
            total = term if total is None else total + term
    return total


class ReferencePlan(StatesByName):
    """The reference as a backend; see :class:`gradprom_ext.plan.PlanBase`."""

    def __init__(self, spec: PlanSpec) -> None:
        super().__init__(spec)
        self._grads: list[Gradients] = []

    def bind_gradients(self, main: Gradients, aux: Sequence[Gradients]) -> None:
        for name, grads in [("main_grads", main), *((f"aux_grads[{k}]", gs) for k, gs in enumerate(aux))]:
            _checks.check_gradients(name, grads, self.spec.params)
        self._grads = [main, *aux]

    def is_active(self, i: int) -> bool:
        return any(gs[i] is not None for gs in self._grads)

    def gram(self) -> Tensor:
        return gram_matrix(self._grads, self.spec.per_tensor)

    def update(self, hypers: Sequence[Hyper], weights: Tensor, skipped: Tensor) -> None:
        spec = self.spec
        for i, param in enumerate(spec.params):  # everything is checked before anything is written
            _checks.check_param(f"params[{i}]", param)
            _checks.check_writable(f"params[{i}]", param)
        for i, names in self.needed_states(hypers):
            for name in names:
                if name != "step":
                    _checks.check_state(f"state of params[{i}]['{name}']", spec.states[i][name], spec.params[i])
        for i, param in enumerate(spec.params):
            grads = [gs[i] for gs in self._grads]
            # float64 where any tensor is, else float32: 16-bit tensors are only storage.
            dtype = torch.float32
            for t in (param, *(g for g in grads if g is not None)):
                dtype = torch.promote_types(dtype, t.dtype)
            gradient = combined_gradient(grads, weights[i if spec.per_tensor else 0], dtype)
            if gradient is not None:
                apply_rule(spec.rule, hypers[spec.groups[i]], param, gradient, spec.states[i], skipped)
