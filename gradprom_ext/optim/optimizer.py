"""What the three optimizers share: citizenship in ``torch.optim``, one gradient per loss, the gated step."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks, _torch, rules
from .._device import refuse_capture
from .._extension import grads_of, parameters_moved, same_objects
from .._step import Stepper, named
from ..backends import BACKENDS, passed_over
from ..distributed import Average, Replicas, compare, union
from ..plan import PlanSpec
from ..settings import StepConfig, StepSettings, check_aux_weight
from ..sharded import ShardedStepper, check_sharding, own_gradient, own_part
from ..stats import GateStats
from .capture import Capture, Freshness, back_propagate, check_owners, in_order_of, register

__all__ = ["GradPromOptimizer"]


class Workspace:
    """Everything about an optimizer that changes from step to step, in one object.

    Wrappers share it: PyTorch Lightning's, for one, is made a subclass of the optimizer's class and hands reads of
    attributes on to the optimizer, so that an attribute which a method *sets* would stay in the wrapper, unseen.
    """

    def __init__(self, config: StepConfig, skipped_steps: Tensor) -> None:
        self.config = config
        self.skipped_steps = skipped_steps
        self.stats: GateStats | None = None
        self.aux_grads: list[list[Tensor | None]] = []
        self.aux_params: list[Tensor] = []  # in whose order they are
        self.capture: Capture | None = None  # what `backward` left; None where the user assigned aux_grads
        self.backward_calls = 0
        self.scaler: torch.amp.GradScaler | None = None  # with whose scale the losses of the capture were multiplied
        self.scale: Tensor | None = None  # that scale, [], on the device
        self.replicas: Replicas | None = None
        self.agreed = False  # all processes take the same backends
        self.lost_replicas = False  # a copy has no process group, which cannot be copied
        self.averaged = False  # backward() has averaged the gradients already
        self.steps = 0
        self.warned_of_writing = False
        self.stepper: Stepper | None = None
        self.states: list[dict[str, Any]] = []
        self.numbers: list[Any] = []  # of all groups, at the last step
        self.hypers: list[rules.Hyper] = []  # made from them

    def drop_aux(self) -> None:
        self.aux_grads, self.capture = [], None
        self.scaler = self.scale = None
        self.averaged = False

    def forget_plan(self) -> None:
        self.stepper, self.states = None, []


class GradPromOptimizer(torch.optim.Optimizer):
    """Captures one gradient per loss, gates, and steps; the base of :class:`~gradprom_ext.GradPromSGD` and its kin.

    :param defaults: hyper-parameters of a parameter group, as in ``torch.optim``.
    :param settings: see :class:`~gradprom_ext.settings.StepSettings`.
    """

    _rule: rules.Rule

    # torch.amp.GradScaler then leaves the gradients scaled and says so through `found_inf`, where `step` sees it;
    # without this it would unscale the main gradients (in .grad) and leave the auxiliary ones scaled.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        settings: StepSettings,
        *,
        capturable: bool,
        master_weights: bool,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._capturable = capturable
        self._rule = self._rule.with_masters(master_weights)
        self._work = Workspace(StepConfig.make(**settings), torch.zeros((), dtype=torch.float64))
        super().__init__(params, defaults)
        register(self)
        if process_group is not None:
            self.process_group = process_group
        elif (
            dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
            and not all(map(_torch.is_dtensor, self._params()))
        ):
            warnings.warn(
                "several processes train together, but DistributedDataParallel reduces only the first backward of a "
                "forward: each process would gate by its own auxiliary gradients and the replicas drift apart. Give "
                "process_group=torch.distributed.group.WORLD, or reduce all gradients yourself (.grad and aux_grads) "
                "between backward() and step()",
                stacklevel=3,
            )

    # -----------------------------------------------------------------------------------------------------------------
    # torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim``; before or after the first step.

        :raises ValueError: a hyper-parameter out of range.
        :raises TypeError: a parameter that is sparse, without memory, or not of a supported floating-point type.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
            where = f" of group {len(self.param_groups) - 1}"
            for name, param in zip(names, group["params"], strict=True):
                if isinstance(param, Tensor):
                    check_sharding(f"{name}{where}", param)
                    param = own_part(param)
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
        kept = {"_capturable": self._capturable, "_rule": self._rule}
        work = Workspace(self._work.config, self._work.skipped_steps)
        work.lost_replicas = self._work.replicas is not None or self._work.lost_replicas
        return {**super().__getstate__(), **kept, "_work": work}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickling, copying and ``load_state_dict`` come through here."""
        super().__setstate__(state)
        # load_state_dict leaves gradients and counts alone, as in torch.optim; a new object has none yet.
        register(self)
        self._work.forget_plan()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # PyTorch's own addition to the defaults, of which nothing here knows
                    group.setdefault(key, value)  # saved by torch.optim, or by an older version
            for param in group["params"]:
                if param not in self.state:
                    continue
                own = self.state[param]
                for key in [key for key, value in own.items() if value is None]:
                    del own[key]  # `momentum_buffer` of SGD without momentum, as PyTorch saved it for years
                if "step" in own:
                    value = torch.as_tensor(own["step"], dtype=torch.float32, device=param.device)
                    own["step"] = value.detach().clone().reshape(())

    def state_dict(self) -> dict[str, Any]:
        """As in ``torch.optim``; with ``"gate"`` where the gate is a policy that remembers something."""
        gate = self._work.config.policy.state_dict()
        return {**super().state_dict(), **({"gate": gate} if gate else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim``, whose state dicts can be loaded too. :attr:`skipped_steps` goes on counting."""
        super().load_state_dict(state_dict)
        self._work.config.policy.load_state_dict(state_dict.get("gate", {}))
        if not self._rule.master_weights:
            return
        # torch.optim casts every state to the parameter's type; masters and their moments are wider.
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, param in zip(saved, self._params(), strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if self._rule.has_master(param) and name != "step" and value is not None:
                    self.state[param][name] = value.to(param.device, torch.float32)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of every loss; ``set_to_none=False`` keeps ``.grad`` as zeros, as in ``torch.optim``."""
        super().zero_grad(set_to_none)
        self._work.drop_aux()

    # -----------------------------------------------------------------------------------------------------------------
    # GradProm

    @property
    def stats(self) -> GateStats | None:
        """Of the last step, or ``None`` before the first."""
        return self._work.stats

    @property
    def backend(self) -> str:
        """Name of the backend that steps these parameters, e.g. ``"cpu"``; joined by ``+`` over several devices."""
        params, num_aux = self._params(), max(len(self._work.aux_grads), 1)
        stepper = self._plan(num_aux, params)
        if {p.device for p in params} != set(stepper.devices):  # they have been moved since the last step
            self._work.forget_plan()
            stepper = self._plan(num_aux, params)
        return "+".join(dict.fromkeys(b.name for b in stepper.backends))

    @property
    def aux_weight(self) -> float | tuple[float, ...] | Tensor:
        """Lambda. A tensor may be written to between steps; assigning a number plans the next step anew."""
        return self._work.config.aux_weight

    @aux_weight.setter
    def aux_weight(self, value: float | Sequence[float] | Tensor) -> None:
        self._work.config = dataclasses.replace(self._work.config, aux_weight=check_aux_weight(value))

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Whose processes average their gradients at every step; ``None``: no others. May be assigned."""
        return None if self._work.replicas is None else self._work.replicas.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group must be a group of torch.distributed, not {group!r}; torch.distributed.group.WORLD is "
                "that of all processes, after init_process_group()"
            )
        self._work.replicas = None if group is None else Replicas(group)
        self._work.agreed = False
        self._work.lost_replicas = False

    @property
    def skipped_steps(self) -> Tensor:
        """Number of steps that changed nothing because a gradient was not finite: float64 ``[]`` on the device, counted
        there (also where a CUDA graph is replayed)."""
        return self._work.skipped_steps

    @property
    def aux_grads(self) -> list[list[Tensor | None]]:
        """Gradients of the auxiliary losses, ``[k][i]`` for parameter ``i`` in the order of the groups; the main ones
        are in ``.grad``. Yours to read, and to change between :meth:`backward` and :meth:`step`.

        What :meth:`backward` captured serves one step: where ``.grad`` has been cleared or recomputed since that step
        by other means than this optimizer's, it is dropped. What you assign stays until you assign anew or call
        :meth:`zero_grad`.
        """
        return self._work.aux_grads

    @aux_grads.setter
    def aux_grads(self, value: Sequence[Sequence[Tensor | None]]) -> None:
        self._work.aux_grads = value if isinstance(value, list) else list(map(list, value))
        self._work.aux_params = self._params()
        self._work.capture = None
        self._work.averaged = False  # to average an average changes nothing

    def backward(
        self,
        main_loss: Tensor,
        *aux_losses: Tensor,
        retain_graph: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        last: bool = False,
    ) -> None:
        """Back-propagates each loss and keeps its gradient apart.

        The parameters of this optimizer get one gradient per loss: the main one in ``.grad``, where other code expects
        it, the auxiliary ones in here. Every other leaf of the graphs (the recognition network's parameters) gets its
        ordinary ``.grad`` from whichever losses reach it. Gradients are captured by swapping ``.grad``, so nothing is
        copied; a loss that does not depend on a parameter contributes zero to it.

        Called several times before :meth:`step`, it accumulates; the gate is taken once, on the sums. Clearing the
        gradients in between starts anew, by whatever means: ``opt.zero_grad()``, ``module.zero_grad()``, ``p.grad =
        None``.

        :param main_loss: ``[]`` or one element: the loss of the main model.
        :param aux_losses: likewise, any number, the same number in every call before a step. None: a plain optimizer.
        :param retain_graph: keeps the graphs for another backward.
        :param scaler: multiplies every loss by its scale, so that small float16 gradients survive. Then
            ``scaler.step(opt)`` and ``scaler.update()`` are to be called, as with any optimizer; the scale is taken out
            where the kernels add the gradients up, and an overflow in any of them skips the step and backs it off.
        :param last: no other call comes before :meth:`step`. With a process group the averages are then taken while the
            backward passes run, bucket by bucket, and are in ``.grad`` and :attr:`aux_grads` afterwards; otherwise they
            are taken in :meth:`step`. Without a group it changes nothing.
        :raises ValueError: a loss has no graph or more than one element; the number of auxiliaries, or the scaler,
            changed.
        :raises RuntimeError: main and auxiliary gradients are no longer of the same batches: ``.grad`` was changed
            since the last call, or still holds the gradients of the last step. Or they would mix with those of another
            optimizer of this kind.
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
        self._make_room(params)
        check_owners(self, params)
        if self._work.aux_grads and len(aux_losses) != len(self._work.aux_grads):
            raise ValueError(
                f"{len(aux_losses)} auxiliary losses, but the gradients so far have {len(self._work.aux_grads)}; "
                "every call between two steps must have the same number"
            )
        losses = self._scaled((main_loss, *aux_losses), scaler)
        aux_grads = [list(gs) for gs in self._work.aux_grads] or [[None] * len(params) for _ in aux_losses]
        work = self._work
        averages: list[Average] = []
        whole = [i for i, p in enumerate(params) if not _torch.is_dtensor(p)]
        if last and work.replicas is not None and work.replicas.number > 1:
            averages = [Average(work.replicas, [params[i] for i in whole]) for _ in losses]
        back_propagate(self, params, losses, aux_grads, retain_graph, averages)
        if averages:
            main, *aux_grads = _merged([grads_of(params), *aux_grads], whole, [each.result() for each in averages])
            for p, g in zip(params, main, strict=True):
                p.grad = g
        work.averaged = bool(averages)
        work.aux_grads, work.aux_params = aux_grads, params
        work.capture = Capture(params, grads_of(params), aux_grads)
        work.backward_calls += 1

    def _scaled(self, losses: Sequence[Tensor], scaler: torch.amp.GradScaler | None) -> Sequence[Tensor]:
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        work = self._work
        if work.capture is not None and not work.capture.spent and work.scaler is not scaler:
            raise ValueError("every call of backward() between two steps must be given the same scaler")
        work.scaler, work.scale = scaler, None
        if scaler is None:
            return losses
        work.scale = scaler.scale(torch.ones((), device=losses[0].device))
        return list(scaler.scale(losses))

    def _make_room(self, params: list[Tensor]) -> None:
        """Before gradients are added: those of the last step make room where they were cleared, and are refused where
        they were not, since adding to auxiliary gradients whose main partner is gone would pair different batches."""
        if not self._work.aux_grads:
            return
        capture = self._work.capture
        if capture is None:
            raise RuntimeError("aux_grads were assigned; call zero_grad() before backward() captures others")
        freshness = capture.main_freshness()
        if freshness is Freshness.CLEARED or (capture.spent and capture.every_main_gradient_changed()):
            self._work.drop_aux()
        elif capture.spent:
            raise RuntimeError(
                "the gradients of the last step() are still in .grad; call zero_grad() after each step, this "
                "optimizer's or the module's (p.grad.data.zero_() leaves no trace that could be seen)"
            )
        elif freshness is Freshness.UNTOUCHED:
            self._work.aux_grads, self._work.aux_params = self._aux_in_order(params), params
        else:
            raise RuntimeError(
                f".grad was {freshness.value} since the last backward() other than through this optimizer, while the "
                "auxiliary gradients of that call wait for a step; call zero_grad() to start anew, or change .grad and "
                "aux_grads only between the last backward() and step()"
            )

    def _aux_in_order(self, params: list[Tensor]) -> list[list[Tensor | None]]:
        """Parameters may have been put into a group, or taken out, since the gradients were captured or assigned."""
        old = self._work.aux_params
        if same_objects(old, params):
            return self._work.aux_grads
        if any(len(gs) != len(old) for gs in self._work.aux_grads):
            return self._work.aux_grads  # the kernels say what is wrong with them
        return in_order_of(old, self._work.aux_grads, params)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Gates and updates, from ``.grad`` (the main gradients) and what :meth:`backward` captured.

        Does not wait for the device (unless ``nonfinite="raise"``). Afterwards :attr:`stats` describes the step.

        :param closure: evaluated first, as in ``torch.optim``. It calls :meth:`backward` itself, or leaves the
            gradients alone (PyTorch Lightning's manual optimization passes one that does nothing).
        :returns: what the closure returned, else ``None``.
        :raises TypeError: the closure back-propagated on its own. It evaluated one loss, while GradProm needs the
            gradients of several; nothing was updated.
        :raises RuntimeError: called through a ``torch.amp.GradScaler`` that :meth:`backward` was not given, or not
            through the one that it was given; or ``.grad`` was replaced since :meth:`backward` and ``aux_grads`` was
            not, so that they are of different batches; or another process of the group has gone.
        :raises NonFiniteGradientError: ``nonfinite="raise"``, and a gradient holds NaN or infinity. Parameters and
            state are as before.
        """
        value = None if closure is None else self._evaluate(closure)
        if torch.compiler.is_compiling():
            self._untraced_step()
        elif _torch.is_watched(self):
            self._watched_step()
        else:
            self._step()
        return value

    # torch.optim wraps every `step` for profilers and hooks, whether there are any or not, and that takes as long as
    # binding a hundred tensors. This says that it has been done.
    step.hooked = True  # type: ignore[attr-defined]

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        def gradients() -> list[tuple[int, int]]:
            return [(0, 0) if p.grad is None else (id(p.grad), _torch.version_of(p.grad)) for p in self._params()]

        kept = [p.grad for p in self._params()]  # so that their identities stay theirs
        before, calls = gradients(), self._work.backward_calls
        with torch.enable_grad():
            value = closure()
        if self._work.backward_calls == calls and gradients() != before:
            raise TypeError(
                f"the closure given to {type(self).__name__}.step back-propagated a loss on its own; GradProm needs "
                "one gradient per loss, so let it call backward(main_loss, aux_loss) of this optimizer. In PyTorch "
                "Lightning set self.automatic_optimization = False and call backward and step in training_step"
            )
        del kept
        return value

    def _step(self) -> None:
        try:
            self._gate_and_update()
        except BaseException:
            # What a scaler has left here for this step it removes after the step alone, and the next one is another.
            for name in ("found_inf", "grad_scale"):
                vars(self).pop(name, None)
            raise

    def _gate_and_update(self) -> None:
        params = self._params()
        main = grads_of(params)
        if self._work.aux_grads:
            self._work.aux_grads, self._work.aux_params = self._matching_aux(main, params), params
        scales = self._scales()
        if (self._work.replicas is not None or self._work.lost_replicas) and not self._work.averaged:
            main = self._average(main, params)
        if self._capturable and params:
            self._put_numbers_on_device(params[0].device)
        self._work.stats = stats = self._gated(main, params, scales)
        if scales is not None and self._work.scaler is not None:
            _torch.tell_scaler(self._work.scaler, self, stats.skipped)
        if dist.is_available() and dist.is_initialized() and dist.get_debug_level() == dist.DebugLevel.DETAIL:
            self._compare(stats, params)
        self._work.steps += 1
        if self._work.capture is not None:
            self._work.capture.spent = True

    def _gated(
        self, main: list[Tensor | None], params: list[Tensor], scales: Tensor | None, moved: bool = False
    ) -> GateStats:
        """
        :param moved: the parameters have been found on another device than that of the last step.
        """
        if moved:
            self._work.forget_plan()
        stepper = self._plan(len(self._work.aux_grads), params)
        if not self._work.agreed:
            self._agree(stepper)
            stepper = self._plan(len(self._work.aux_grads), params)
        try:
            return stepper.step(main, self._work.aux_grads, self._hypers(), self._work.skipped_steps, scales)
        except (TypeError, ValueError, RuntimeError) as error:
            if parameters_moved(error) and not moved:
                return self._gated(main, params, scales, moved=True)
            self._explain(main, params)
            raise

    def _agree(self, stepper: Stepper) -> None:
        """Before the first step together: what one process cannot run, none does, as backends differ in their last
        digits, and with them the gates and parameters of the processes would."""
        work = self._work
        work.agreed = True
        groups = stepper.groups() if isinstance(stepper, ShardedStepper) else []
        if work.replicas is not None and work.replicas.number > 1:
            groups.append((work.replicas.group, stepper.devices[0].type))
        if not groups:
            return
        own: set[str] = set()
        if work.config.backend == "auto":
            own = set().union(*map(passed_over, stepper.backends, stepper.devices))
        without = union(own, [b.name for b in BACKENDS], groups)
        if work.config.backend != "auto" or not without:
            return
        # Also where it changes nothing now: a later plan is of another kind, for which all might pass their self-check.
        work.config = dataclasses.replace(work.config, without=frozenset(without))
        if without & {b.name for b in stepper.backends}:
            others = ", ".join(sorted(without - own))
            warnings.warn(
                f"another process of this training cannot run the backend {others}, so that this one does not either; "
                "that process has said why",
                stacklevel=5,
            )

    _watched_step = _torch.watched(_step)
    _untraced_step = _torch.untraced(_watched_step)

    def _scales(self) -> Tensor | None:
        """What a scaler has multiplied the gradients of each loss with, float64 ``[K + 1]``; ``None`` without one."""
        work, called = self._work, hasattr(self, "found_inf")
        if work.scale is None:
            if called:
                raise RuntimeError(
                    f"torch.amp.GradScaler steps {type(self).__name__}, whose backward() it was not given: it does not "
                    "see the auxiliary gradients. Call backward(main_loss, aux_loss, scaler=scaler), with losses that "
                    "are not scaled yet"
                )
            return None
        if not called:
            raise RuntimeError(
                "backward() was given a scaler, so that the gradients are multiplied by its scale: call "
                "scaler.step(optimizer) and scaler.update() in the place of optimizer.step()"
            )
        scales = work.scale.to(torch.float64).repeat(len(work.aux_grads) + 1)
        if self.grad_scale is None:  # type: ignore[attr-defined]
            scales[0] = 1.0  # unscale_ has divided the main gradients, which are all that it knows of
        return scales

    def _compare(self, stats: GateStats, params: list[Tensor]) -> None:
        """
        :raises ReplicaError: the processes have come to differ.
        """
        work = self._work
        if work.replicas is not None:
            whole = [p for p in params if not _torch.is_dtensor(p)]
            sums = [p.detach().to(stats.packed.device, torch.float64).sum().reshape(1) for p in whole]
            compare(work.replicas.group, torch.cat([stats.packed, *sums]), work.steps)
        if isinstance(work.stepper, ShardedStepper):
            work.stepper.compare(stats, work.steps)

    def _average(self, main: list[Tensor | None], params: list[Tensor]) -> list[Tensor | None]:
        """The gradients of all processes; also in ``.grad`` and :attr:`aux_grads` from now on."""
        work = self._work
        if work.replicas is None:
            raise RuntimeError(
                "this optimizer was copied or unpickled from one with a process group, which cannot be copied: assign "
                "process_group again (None, if it is to train alone)"
            )
        if work.replicas.number == 1:
            return main
        losses = [main, *work.aux_grads]
        # FSDP has averaged those of sharded parameters in its backward passes.
        whole = [i for i, p in enumerate(params) if not _torch.is_dtensor(p)]
        averages = work.replicas.average([params[i] for i in whole], [[gs[i] for i in whole] for gs in losses])
        main, *work.aux_grads = _merged(losses, whole, averages)
        for p, g in zip(params, main, strict=True):
            p.grad = g
        if work.capture is not None:
            work.capture = Capture(params, main, work.aux_grads)
        return main

    def _matching_aux(self, main: list[Tensor | None], params: list[Tensor]) -> list[list[Tensor | None]]:
        """The auxiliary gradients that belong to the main ones, in the order of the parameters."""
        capture = self._work.capture
        if capture is None:  # the user's
            return self._aux_in_order(params)
        if len(capture.params) == len(params) and capture.main_looks_untouched(main):
            return self._aux_in_order(params)
        freshness = capture.main_freshness()
        if freshness is Freshness.UNTOUCHED or not capture.aux_untouched():  # the groups changed, or both were changed
            capture.look_again()
            return self._aux_in_order(params)
        if capture.spent:  # the last backward was an ordinary one
            self._work.drop_aux()
            return []
        if freshness is Freshness.WRITTEN:
            self._warn_of_writing()
            capture.look_again()
            return self._aux_in_order(params)
        if any(p.grad is not None and p.grad is not g for p, g in zip(capture.params, capture.main, strict=True)):
            raise RuntimeError(
                ".grad was replaced since backward(), and aux_grads was not: are they of the same batch? Call "
                "zero_grad() before an ordinary backward, or assign aux_grads too"
            )
        # Some gradients were set to None, to leave their parameters alone; a loss may not have reached a parameter.
        left_alone = {
            id(p) for p, g in zip(capture.params, capture.main, strict=True) if g is not None and p.grad is None
        }
        return [
            [None if id(p) in left_alone else g for p, g in zip(params, gs, strict=True)]
            for gs in self._aux_in_order(params)
        ]

    def _warn_of_writing(self) -> None:
        if self._work.warned_of_writing:
            return
        self._work.warned_of_writing = True
        warnings.warn(
            ".grad was written to between backward() and step(), and aux_grads was not (clip_grad_norm_?): the "
            "auxiliary gradients are added as they were. max_grad_norm=... clips the combined gradient; other changes "
            "are to be made to aux_grads too",
            stacklevel=5,
        )

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

    def _hypers(self) -> list[rules.Hyper]:
        """The groups' hyper-parameters; the very list of the last step where no number has been replaced since."""
        numbers = [x for group in self.param_groups for x in self._rule.numbers(group)]
        if not same_objects(numbers, self._work.numbers) or not self._work.hypers:
            self._work.numbers = numbers
            self._work.hypers = [self._rule.hyper(self._rule.numbers(group)) for group in self.param_groups]
        return self._work.hypers

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _plan(self, num_aux: int, params: list[Tensor]) -> Stepper:
        stepper = self._work.stepper
        if stepper is None or not self._same_states() or not stepper.fits(params, num_aux, self._work.config):
            groups = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
            states = [self.state[p] for p in params]
            self._work.states = list(self.state.values())
            spec = PlanSpec(self._rule, params, groups, states, num_aux, self._work.config.per_tensor)
            kind = ShardedStepper if any(map(_torch.is_dtensor, params)) else Stepper
            self._work.stepper = stepper = kind(spec, self._work.config)
            if stepper.devices and self._work.skipped_steps.device != stepper.devices[0]:
                refuse_capture()
                self._work.skipped_steps = self._work.skipped_steps.to(stepper.devices[0])
        return stepper

    def _same_states(self) -> bool:
        """A plan keeps the state dicts of its parameters; others may have been put in their place."""
        return same_objects(list(self.state.values()), self._work.states)

    def _explain(self, main: Sequence[Tensor | None], params: Sequence[Tensor]) -> None:
        """Raises the clearest error about the gradients; returns where there is nothing to say about them."""
        own = [own_part(p) for p in params]
        for name, grads in named(main, self._work.aux_grads):
            if len(grads) == len(params):  # else the check says so
                grads = [own_gradient(f"{name}[{i}]", g, p) for i, (g, p) in enumerate(zip(grads, params, strict=True))]
            _checks.check_gradients(name, grads, own)


def _merged(
    losses: Sequence[Sequence[Tensor | None]], places: Sequence[int], averages: Sequence[Sequence[Tensor | None]]
) -> list[list[Tensor | None]]:
    """Gradients of each loss, with others at some places."""
    merged = [list(grads) for grads in losses]
    for grads, others in zip(merged, averages, strict=True):
        for i, g in zip(places, others, strict=True):
            grads[i] = g
    return merged


def check_momentum(group: dict[str, Any]) -> None:
    """:raises ValueError: hyper-parameters of SGD out of range."""
    if not group["momentum"] >= 0:
        raise ValueError(f"momentum must be a number >= 0, got {group['momentum']}")
    if not math.isfinite(group["dampening"]):
        raise ValueError(f"dampening must be finite, got {group['dampening']}")
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError("nesterov needs a momentum and no dampening")


def check_betas(group: dict[str, Any]) -> None:
    """:raises ValueError: hyper-parameters of Adam out of range."""
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must lie in [0, 1), got {group['betas']}")
    if not group["eps"] >= 0:
        raise ValueError(f"eps must be a number >= 0, got {group['eps']}")
