"""Drop-in optimizers: ``torch.optim``'s SGD, Adam and AdamW, fed with GradProm's combined gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import rules
from ..settings import StepSettings, with_settings
from .optimizer import GradPromOptimizer, check_betas, check_momentum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

__all__ = ["GradPromAdam", "GradPromAdamW", "GradPromSGD"]


class GradPromSGD(GradPromOptimizer):
    """``torch.optim.SGD``, fed with GradProm's combined gradient
    (`arXiv:2501.01114 <https://arxiv.org/abs/2501.01114>`_).

    :param params: parameters, groups of parameters or named parameters, as in ``torch.optim``: float32, float64,
        float16 or bfloat16. The gate is taken over all groups, dtypes and devices together.
    :param lr: learning rate, >= 0: a number, or a tensor of one element (float32 or float64). A tensor on the
        parameters' device is read there when the step runs.
    :param momentum: as in ``torch.optim.SGD``, like the four that follow.
    :param dampening: of the momentum.
    :param weight_decay: added to the combined gradient, behind the gate.
    :param nesterov: Nesterov's momentum.
    :param maximize: climbs instead of descending.
    :param foreach: accepted so that a call of ``torch.optim`` need not be changed, and ignored: every step runs on the
        fused kernels of its backend.
    :param fused: likewise.
    :param master_weights: float16 and bfloat16 parameters are updated through a float32 twin, ``state["master"]``, and
        have float32 moments. A write to a parameter, by whatever means, is a write to its master.
    :param capturable: keeps ``lr`` and ``aux_weight`` in tensors on the parameters' device, so that the replay of a
        CUDA graph uses what a scheduler or you have written there (``opt.param_groups[0]["lr"].fill_(...)``). A step
        can be captured either way, after one step outside of the capture; plain numbers are then frozen in the graph.
    :param process_group: of ``torch.distributed`` (``torch.distributed.group.WORLD``: all processes). The gradients of
        every loss are averaged over its processes in ``step``, each of which must call it with as many losses; then
        all gate and update alike, with or without DistributedDataParallel around the model. With the environment
        variable ``TORCH_DISTRIBUTED_DEBUG=DETAIL``, every step checks that they did.
    :param settings: ``aux_weight``, ``gate``, ``threshold``, ``granularity``, ``aux_cap``, ``max_grad_norm``,
        ``nonfinite`` and ``backend``: see :class:`~gradprom_ext.StepSettings`.
    :raises ValueError: an argument out of range.
    :raises TypeError: a parameter that no backend takes, or an unknown argument.

    The limit of the gradient norm is ``max_grad_norm``; ``torch.nn.utils.clip_grad_norm_`` between ``backward`` and
    ``step`` would clip the main gradient alone.

    >>> import torch, gradprom_ext as gp
    >>> enhance, recognize = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    >>> opt = gp.GradPromSGD(enhance.parameters(), lr=0.1)
    >>> x, clean, label = torch.randn(8, 4), torch.randn(8, 4), torch.randint(2, (8,))
    >>> y = enhance(x)
    >>> opt.backward(torch.nn.functional.mse_loss(y, clean), torch.nn.functional.cross_entropy(recognize(y), label))
    >>> opt.step(); opt.zero_grad()
    >>> opt.stats.cosine.shape, recognize.weight.grad is not None
    (torch.Size([1]), True)
    """

    _rule = rules.SGD

    @with_settings
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        master_weights: bool = False,
        capturable: bool = False,
        process_group: ProcessGroup | None = None,
        **settings: Unpack[StepSettings],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(
            params,
            defaults,
            settings,
            capturable=capturable,
            master_weights=master_weights,
            process_group=process_group,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_momentum(group)


class GradPromAdam(GradPromOptimizer):
    """``torch.optim.Adam``, fed with GradProm's combined gradient; both moments see the combined gradient.

    ``betas``, ``eps``, ``weight_decay``, ``amsgrad`` and ``maximize`` are those of ``torch.optim.Adam``; for everything
    else see :class:`~gradprom_ext.GradPromSGD`.

    >>> import torch, gradprom_ext as gp
    >>> theta = torch.nn.Parameter(torch.ones(1))
    >>> opt = gp.GradPromAdam([theta], lr=0.1)
    >>> opt.backward(theta.sum(), 2 * theta.sum())  # gradients 1 and 2: they agree
    >>> opt.step()  # Adam's first step is as long as lr, whatever the gradient
    >>> round(theta.item(), 4), opt.stats.gate.tolist()
    (0.9, [1.0])
    """

    _rule = rules.ADAM

    @with_settings
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        master_weights: bool = False,
        capturable: bool = False,
        process_group: ProcessGroup | None = None,
        **settings: Unpack[StepSettings],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(
            params,
            defaults,
            settings,
            capturable=capturable,
            master_weights=master_weights,
            process_group=process_group,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas(group)


class GradPromAdamW(GradPromAdam):
    """``torch.optim.AdamW`` (decoupled weight decay), fed with GradProm's combined gradient; arguments as in
    :class:`~gradprom_ext.GradPromAdam`, ``weight_decay`` 0.01 unless given.

    >>> import torch, gradprom_ext as gp
    >>> theta = torch.nn.Parameter(torch.ones(1))
    >>> opt = gp.GradPromAdamW([theta], lr=0.1)
    >>> opt.backward(theta.sum(), -theta.sum())  # gradients 1 and -1: the gate closes
    >>> opt.step()  # 1 - 0.1 * 0.01 - 0.1
    >>> round(theta.item(), 4), opt.stats.gate.tolist()
    (0.899, [0.0])
    """

    _rule = rules.ADAMW

    @with_settings
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        master_weights: bool = False,
        capturable: bool = False,
        process_group: ProcessGroup | None = None,
        **settings: Unpack[StepSettings],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            master_weights=master_weights,
            capturable=capturable,
            process_group=process_group,
            **settings,
        )
