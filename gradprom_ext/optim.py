"""Drop-in optimizers: ``torch.optim``'s SGD, Adam and AdamW, fed with GradProm's combined gradient."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from . import _checks, rules
from ._device import refuse_capture
from ._step import StepConfig, Stepper, check_aux_weight
from .policy import GatePolicy
from .stats import GateStats

__all__ = ["GradPromAdam", "GradPromAdamW", "GradPromSGD"]


class _GradPromOptimizer(torch.optim.Optimizer):
    """Captures one gradient per loss, gates, and steps. See :class:`GradPromSGD` for the arguments all have."""

    _rule: rules.Rule

    # torch.amp.GradScaler then leaves the gradients scaled and says so through `found_inf`, where `step` sees it;
    # without this it would unscale the main gradients (in .grad) and silently leave the auxiliary ones scaled.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        config: StepConfig,
        *,
        capturable: bool,
        master_weights: bool,
    ) -> None:
        self._config = config
        self._capturable = capturable
        self._rule = dataclasses.replace(self._rule, master_weights=master_weights)
        self._forget()
        super().__init__(params, defaults)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                "several processes train together, but DistributedDataParallel reduces only the first backward of a "
                "forward: each process would gate by its own auxiliary gradients and the replicas drift apart. Reduce "
                "all gradients yourself (.grad and aux_grads) between backward() and step()",
                stacklevel=3,
            )

    def _forget(self) -> None:
        #: Of the last step, or ``None`` before the first.
        self.stats: GateStats | None = None
        self._skipped_steps = torch.zeros((), dtype=torch.float64)
        self._stepper: Stepper | None = None
        self._states: list[dict[str, Any]] = []
        self._versions: list[int] = []  # of the parameters, as the last step left them
        #: Gradients of the auxiliary losses, ``[k][i]`` for parameter ``i`` in the order of the groups; the main ones
        #: are in ``.grad``. Yours to read, and to change between :meth:`backward` and :meth:`step`.
        self.aux_grads: list[list[Tensor | None]] = []
        self._captured: list[tuple[Tensor | None, int]] = []  # .grad of each parameter as `backward` left it

    # -----------------------------------------------------------------------------------------------------------------
    # torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim``; before or after the first step.

        :raises ValueError: a hyper-parameter out of range.
        :raises TypeError: a parameter that is sparse or not of a supported floating-point type.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
            where = f" of group {len(self.param_groups) - 1}"
            for name, param in zip(names, group["params"], strict=True):
                _checks.check_param(f"{name}{where}", param)
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64)):
            raise ValueError(f"lr must be a number, or a float32 or float64 tensor of one element, got {lr}")
        for key in ("lr", "weight_decay"):
            if not group[key] >= 0:
                raise ValueError(f"{key} must be a number >= 0, got {group[key]}")

    def __getstate__(self) -> dict[str, Any]:
        ours = {"_config": self._config, "_capturable": self._capturable, "_rule": self._rule}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickling, copying and ``load_state_dict`` come through here."""
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)  # saved by torch.optim, or by an older version
            for param in group["params"]:
                step = self.state[param].get("step") if param in self.state else None
                if step is not None:
                    value = torch.as_tensor(step, dtype=torch.float32, device=param.device)
                    self.state[param]["step"] = value.detach().clone().reshape(())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim``, whose state dicts can be loaded too."""
        super().load_state_dict(state_dict)
        if not self._rule.master_weights:
            return
        # torch.optim casts every state to the parameter's type; masters and their moments are wider.
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, param in zip(saved, self._params(), strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if self._rule.has_master(param) and name != "step":
                    self.state[param][name] = value.to(param.device, torch.float32)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of every loss; ``set_to_none=False`` keeps ``.grad`` as zeros, as in ``torch.optim``."""
        super().zero_grad(set_to_none)
        self.aux_grads = []
        self._captured = []

    # -----------------------------------------------------------------------------------------------------------------
    # GradProm

    @property
    def backend(self) -> str:
        """Name of the backend that steps these parameters, e.g. ``"cpu"``; joined by ``+`` over several devices."""
        return "+".join(dict.fromkeys(b.name for b in self._plan(max(len(self.aux_grads), 1), self._params()).backends))

    @property
    def aux_weight(self) -> float | tuple[float, ...] | Tensor:
        """Lambda. A tensor may be written to between steps; assigning a number plans the next step anew."""
        return self._config.aux_weight

    @aux_weight.setter
    def aux_weight(self, value: float | Sequence[float] | Tensor) -> None:
        self._config = dataclasses.replace(self._config, aux_weight=check_aux_weight(value))

    @property
    def skipped_steps(self) -> Tensor:
        """Number of steps that changed nothing because a gradient was not finite: float64 ``[]`` on the device, counted
        there (also where a CUDA graph is replayed)."""
        return self._skipped_steps

    def backward(self, main_loss: Tensor, *aux_losses: Tensor, retain_graph: bool = False) -> None:
        """Back-propagates each loss and keeps its gradient apart.

        The parameters of this optimizer get one gradient per loss: the main one in ``.grad``, where other code expects
        it, the auxiliary ones in here. Every other leaf of the graphs (the recognition network's parameters) gets its
        ordinary ``.grad`` from whichever losses reach it. Gradients are captured by swapping ``.grad``, so nothing is
        copied; a loss that does not depend on a parameter contributes zero to it.

        Called several times before :meth:`step`, it accumulates; the gate is taken once, on the sums.

        :param main_loss: ``[]`` or one element: the loss of the main model.
        :param aux_losses: likewise, any number, the same number in every call before a step. None: a plain optimizer.
        :param retain_graph: keeps the graphs for another backward.
        :raises ValueError: a loss has no graph or more than one element; the number of auxiliaries changed.
        :raises RuntimeError: gradients were changed or cleared behind this optimizer's back since the last call.
        """
        for name, loss in [("main_loss", main_loss), *((f"aux_losses[{k}]", a) for k, a in enumerate(aux_losses))]:
            if not isinstance(loss, Tensor):
                raise TypeError(f"{name} is a {type(loss).__name__}, not a tensor")
            if loss.numel() != 1:
                raise ValueError(f"{name} must be a single number, its shape is {tuple(loss.shape)}")
            if not loss.requires_grad:
                raise ValueError(
                    f"{name} has no graph: it depends on no parameter that requires a gradient "
                    "(was it computed under torch.no_grad(), or from a detached tensor?)"
                )
        params = self._params()
        if self.aux_grads:
            self._check_untouched(params)
            if len(aux_losses) != len(self.aux_grads):
                raise ValueError(
                    f"{len(aux_losses)} auxiliary losses, but the gradients so far have {len(self.aux_grads)}; "
                    "every call between two steps must have the same number"
                )
        aux_grads = self.aux_grads or [[None] * len(params) for _ in aux_losses]

        main_loss.backward(retain_graph=retain_graph or bool(aux_losses))
        main_grads = [p.grad for p in params]
        try:
            for k, loss in enumerate(aux_losses):
                for p, g in zip(params, aux_grads[k], strict=True):
                    p.grad = g
                loss.backward(retain_graph=retain_graph or k + 1 < len(aux_losses))
                aux_grads[k] = [p.grad for p in params]
        finally:
            for p, g in zip(params, main_grads, strict=True):
                p.grad = g
        self.aux_grads = aux_grads
        self._captured = [(g, g._version if g is not None else 0) for g in main_grads] if aux_losses else []

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Gates and updates, from ``.grad`` (the main gradients) and what :meth:`backward` captured.

        Does not wait for the device (unless ``nonfinite="raise"``). Afterwards :attr:`stats` describes the step.

        :raises TypeError: a closure was given: it would evaluate one loss, GradProm needs the gradients of several.
        :raises RuntimeError: called through ``torch.amp.GradScaler``.
        :raises NonFiniteGradientError: ``nonfinite="raise"``, and a gradient holds NaN or infinity. Parameters and
            state are as before.
        """
        if closure is not None:
            raise TypeError(
                f"{type(self).__name__}.step takes no closure: call backward(main_loss, aux_loss) first, then step()"
            )
        if torch.compiler.is_compiling():
            self._untraced_step()
        elif self._is_watched():
            self._watched_step()
        else:
            self._step()

    # torch.optim wraps every `step` for profilers and hooks, whether there are any or not, and that takes as long as
    # binding a hundred tensors. This says that it has been done.
    step.hooked = True  # type: ignore[attr-defined]

    def _is_watched(self) -> bool:
        return bool(
            torch.autograd._profiler_enabled()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        )

    @torch.no_grad()
    def _step(self) -> None:
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                f"{type(self).__name__} does not work with torch.amp.GradScaler: the scaler does not see the auxiliary "
                "gradients. Use bfloat16 autocast, which needs no scaler"
            )
        params = self._params()
        main = [p.grad for p in params]
        hypers = self._prepare(params)
        stepper = self._plan(len(self.aux_grads), params)
        try:
            self.stats = stepper.step(main, self.aux_grads, hypers, self._skipped_steps)
        except (TypeError, ValueError, RuntimeError):
            self._explain(main, params)
            raise
        if self._rule.master_weights:
            self._versions = [p._version for p in params]

    _watched_step = torch.optim.Optimizer.profile_hook_step(_step)
    _untraced_step = torch._disable_dynamo(_watched_step)  # between the graphs, as torch.optim does with `zero_grad`

    def _prepare(self, params: list[Tensor]) -> list[rules.Hyper]:
        """What has to be in order before a step."""
        if self.aux_grads and len(self.aux_grads[0]) != len(params):  # a group was added since
            self.aux_grads = [gs + [None] * (len(params) - len(gs)) for gs in self.aux_grads]
        if self._capturable and params:
            self._put_numbers_on_device(params[0].device)
        if self._rule.master_weights:
            self._refresh_masters(params)
        return [self._rule.hyper(group) for group in self.param_groups]

    def _put_numbers_on_device(self, device: torch.device) -> None:
        """A captured graph knows a number as it was, and a tensor as it is. Schedulers write into tensors."""

        def settle(number: float | tuple[float, ...] | Tensor) -> Tensor:
            if isinstance(number, Tensor) and number.device == device:
                return number
            refuse_capture()
            return torch.as_tensor(number, dtype=torch.float64).to(device)

        for group in self.param_groups:
            group["lr"] = settle(group["lr"])
        aux_weight = settle(self.aux_weight)
        if aux_weight is not self.aux_weight:
            self.aux_weight = aux_weight

    def _refresh_masters(self, params: Sequence[Tensor]) -> None:
        """Somebody else has written to a parameter (loaded weights, say): where it is no longer its master's rounded
        value, the master follows."""
        versions = self._versions if len(self._versions) == len(params) else [-1] * len(params)
        for param, version in zip(params, versions, strict=True):
            master = self.state[param].get("master") if param in self.state else None
            if master is not None and param._version != version:
                master.copy_(torch.where(master.to(param.dtype) == param, master, param.to(torch.float32)))

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _plan(self, num_aux: int, params: list[Tensor]) -> Stepper:
        stepper = self._stepper
        if stepper is None or not self._same_states() or not stepper.fits(params, num_aux, self._config):
            groups = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
            states = [self.state[p] for p in params]
            self._states = list(self.state.values())
            self._stepper = stepper = Stepper(self._rule, params, groups, states, num_aux, self._config)
            if stepper.devices and self._skipped_steps.device != stepper.devices[0]:
                refuse_capture()
                self._skipped_steps = self._skipped_steps.to(stepper.devices[0])
        return stepper

    def _same_states(self) -> bool:
        """A plan keeps the state dicts of its parameters; somebody may have put others in their place."""
        return len(self.state) == len(self._states) and all(map(operator.is_, self.state.values(), self._states))

    def _check_untouched(self, params: Sequence[Tensor]) -> None:
        """Adding to auxiliary gradients whose main partner is gone would pair gradients of different batches."""
        captured = self._captured
        same = len(params) == len(captured) and all(
            p.grad is g and (g is None or g._version == version)
            for p, (g, version) in zip(params, captured, strict=True)
        )
        if not same:
            raise RuntimeError(
                "gradients were cleared or changed since the last backward() other than through this optimizer; "
                "call its zero_grad() after each step (module.zero_grad() does not know the auxiliary gradients)"
            )

    def _explain(self, main: Sequence[Tensor | None], params: Sequence[Tensor]) -> None:
        """Raises the clearest error about the gradients; returns where there is nothing to say about them."""
        _checks.check_gradients("main_grads", main, params)
        for k, grads in enumerate(self.aux_grads):
            _checks.check_gradients(f"aux_grads[{k}]", grads, params)


class GradPromSGD(_GradPromOptimizer):
    """``torch.optim.SGD``, fed with GradProm's combined gradient
    (`arXiv:2501.01114 <https://arxiv.org/abs/2501.01114>`_).

    :param params: parameters, groups of parameters or named parameters, as in ``torch.optim``: float32, float64,
        float16 or bfloat16. The gate is taken over all groups, dtypes and devices together.
    :param lr: learning rate, >= 0: a number, or a tensor of one element (float32 or float64). A tensor on the
        parameters' device is read there when the step runs.
    :param momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
    :param aux_weight: lambda of the auxiliary gradients, one number or one per auxiliary loss; or a tensor of those,
        read when the step runs.
    :param gate: ``"hard"`` (GradProm), ``"soft"``, ``"always"`` (joint training), ``"never"``, ``"project"``
        (one-sided PCGrad) or a :class:`~gradprom_ext.GatePolicy`.
    :param threshold: cosine at which the hard gate opens.
    :param granularity: ``"global"`` or ``"tensor"`` (each parameter is gated by its own cosine).
    :param max_grad_norm: clips the norm of the combined gradient, over all parameters.
    :param nonfinite: what a NaN or infinity in any gradient does: ``"skip"`` the step, parameters, state and step
        counters staying bit for bit, or ``"raise"``.
    :param master_weights: float16 and bfloat16 parameters are updated through a float32 twin, ``state["master"]``, and
        have float32 moments. Whoever writes to a parameter writes to its master.
    :param capturable: keeps ``lr`` and ``aux_weight`` in tensors on the parameters' device, so that the replay of a
        CUDA graph uses what a scheduler or you have written there (``opt.param_groups[0]["lr"].fill_(...)``). A step
        can be captured either way, after one step outside of the capture; plain numbers are then frozen in the graph.
    :param backend: ``"auto"`` or one of :func:`~gradprom_ext.available_backends`.
    :raises ValueError: an argument out of range.
    :raises TypeError: a parameter that no backend takes.

    >>> import torch, gradprom_ext as gp
    >>> enhance, recognise = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    >>> opt = gp.GradPromSGD(enhance.parameters(), lr=0.1)
    >>> x, clean, label = torch.randn(8, 4), torch.randn(8, 4), torch.randint(2, (8,))
    >>> y = enhance(x)
    >>> opt.backward(torch.nn.functional.mse_loss(y, clean), torch.nn.functional.cross_entropy(recognise(y), label))
    >>> opt.step(); opt.zero_grad()
    >>> opt.stats.cosine.shape, recognise.weight.grad is not None
    (torch.Size([1]), True)
    """

    _rule = rules.SGD

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
        aux_weight: float | Sequence[float] | Tensor = 1.0,
        gate: str | GatePolicy = "hard",
        threshold: float = 0.0,
        granularity: str = "global",
        max_grad_norm: float | None = None,
        nonfinite: str = "skip",
        master_weights: bool = False,
        capturable: bool = False,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        config = StepConfig.make(
            aux_weight=aux_weight,
            gate=gate,
            threshold=threshold,
            granularity=granularity,
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
            backend=backend,
        )
        super().__init__(params, defaults, config, capturable=capturable, master_weights=master_weights)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not group["momentum"] >= 0:
            raise ValueError(f"momentum must be a number >= 0, got {group['momentum']}")
        if not math.isfinite(group["dampening"]):
            raise ValueError(f"dampening must be finite, got {group['dampening']}")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError("nesterov needs a momentum and no dampening")


class GradPromAdam(_GradPromOptimizer):
    """``torch.optim.Adam``, fed with GradProm's combined gradient; both moments see the combined gradient.

    :param betas, eps, weight_decay, amsgrad, maximize: as in ``torch.optim.Adam``. Everything else as in
        :class:`GradPromSGD`.
    """

    _rule = rules.ADAM

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
        aux_weight: float | Sequence[float] | Tensor = 1.0,
        gate: str | GatePolicy = "hard",
        threshold: float = 0.0,
        granularity: str = "global",
        max_grad_norm: float | None = None,
        nonfinite: str = "skip",
        master_weights: bool = False,
        capturable: bool = False,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        config = StepConfig.make(
            aux_weight=aux_weight,
            gate=gate,
            threshold=threshold,
            granularity=granularity,
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
            backend=backend,
        )
        super().__init__(params, defaults, config, capturable=capturable, master_weights=master_weights)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        beta1, beta2 = group["betas"]
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"betas must lie in [0, 1), got {group['betas']}")
        if not group["eps"] >= 0:
            raise ValueError(f"eps must be a number >= 0, got {group['eps']}")


class GradPromAdamW(GradPromAdam):
    """``torch.optim.AdamW`` (decoupled weight decay), fed with GradProm's combined gradient; arguments as in
    :class:`GradPromAdam`, ``weight_decay`` 0.01 unless given."""

    _rule = rules.ADAMW

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **kwargs)
