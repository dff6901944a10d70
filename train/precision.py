"""Mixed precision: in which numbers networks compute, and the scale that keeps small float16 gradients from vanishing.

Weights, gradients, states of optimizers and losses are float32 whatever the precision. What changes is the forward
pass of a network, and thereby its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from train.strategies.base import SCALE, Measure, Measurements, Precision
from train.team import ALONE, Team

if TYPE_CHECKING:
    from train.strategies.base import Learner

DTYPES: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Output = TypeVar("Output")

# What /proc/cpuinfo calls arithmetic on 16-bit numbers, of x86 and of ARM.
_ARITHMETIC = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"}}


class MixedPrecision:
    """How the networks of a strategy compute.

    Called with a network (or any function of networks) and its inputs, it is the network under ``torch.autocast``, with
    16-bit outputs widened to float32, so that losses are computed there. Every call has an autocast context of its own:
    within one, weights that a pass without a graph has cast would be given, without a graph, to the pass that follows
    (https://github.com/pytorch/pytorch/issues/112583).

    What is differentiated twice is not called so but computed in float32: a gradient that is itself a term of a loss is
    not scaled, and in 16 bits it would lose what the loss is about.

    :param name: ``fp32``: nothing here does anything. ``fp16``: losses are scaled by ``torch.amp.GradScaler``.
    :param device: of the networks.
    :param team: of the processes that train together: a gradient that overflows in one of them does so in all.
    """

    def __init__(self, name: Precision = "fp32", device: torch.device | str = "cpu", team: Team = ALONE) -> None:
        self.name = name
        self.team = team
        self.dtype = DTYPES[name]
        self.device = torch.device(device)
        self.scaler = torch.amp.GradScaler(self.device.type) if name == "fp16" else None

    def __call__(self, network: Callable[..., Output], *inputs: Any) -> Output:
        if self.dtype is None:
            return network(*inputs)
        with torch.autocast(self.device.type, self.dtype):
            output = network(*inputs)
        return widened(output)

    @property
    def parts(self) -> dict[str, torch.amp.GradScaler]:
        """What a checkpoint must hold for a run to go on bit for bit."""
        return {} if self.scaler is None else {"scaler": self.scaler}

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is measured at every iteration, whatever the strategy."""
        return () if self.scaler is None else (SCALE,)

    @property
    def measured(self) -> Measurements:
        """These measurements now."""
        scale = self.scale
        return {} if scale is None else {SCALE.name: scale}

    @property
    def scale(self) -> Tensor | None:
        """What losses are multiplied with, float32 ``[]`` on the device; ``None``: they are not."""
        return None if self.scaler is None else self.scaler.scale(torch.ones((), device=self.device))

    def backward(self, loss: Tensor) -> None:
        """Back-propagates a loss, scaled."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def overflowed(self, learners: Iterable[Learner]) -> Tensor | None:
        """Whether the gradient of any of these networks is not finite, bool ``[]`` on the device; ``None``: nobody
        asks, as gradients that are not scaled are not finite only where the losses or theta's gradients are not."""
        if self.scaler is None:
            return None
        learners = list(learners)
        self._share(learners)
        return self._overflowed(learners)

    def _share(self, learners: Iterable[Learner]) -> None:
        for each in learners:
            self.team.average(each.optimizer)

    @staticmethod
    def _overflowed(learners: Iterable[Learner]) -> Tensor:
        gradients = [p.grad for each in learners for p in each.network.parameters() if p.grad is not None]
        return ~torch.nn.utils.get_total_norm(gradients).isfinite()

    def unscale(self, learners: Iterable[Learner]) -> Tensor | None:
        """Takes the scale out of the gradients of networks of which none has an optimizer that does so by itself.

        :returns: as :meth:`overflowed`.
        """
        if self.scaler is None:
            return None
        learners = list(learners)
        self._share(learners)
        for each in learners:
            self.scaler.unscale_(each.optimizer)
        return self._overflowed(learners)

    def step(self, optimizer: torch.optim.Optimizer, overflowed: Tensor | None = None) -> None:
        """A step of one of our optimizers, from scaled gradients.

        :param overflowed: where it is 1, a gradient of another network is not finite, and this step is to be skipped,
            too. The optimizer is told as it is told of any overflow: by a gradient that is not finite.
        """
        if self.scaler is None:
            optimizer.step()
            return
        if overflowed is not None:
            grads = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
            first = next(grads).data  # past the check of who has written to gradients since the backward pass
            first[(0,) * first.dim()].add_(torch.where(overflowed, torch.nan, 0.0))
        self.scaler.step(optimizer)

    def update(self) -> None:
        """Ends an iteration: the scale is backed off where a gradient overflowed, and grows where none has for long."""
        if self.scaler is not None:
            self.scaler.update()


def widened(output: Any) -> Any:
    """An output with its 16-bit tensors as float32, each with its graph.

    :param output: a tensor, or tensors in tuples, named tuples, lists and mappings.
    """
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, Mapping):
        return {name: widened(each) for name, each in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(widened, output))
    return type(output)(map(widened, output)) if isinstance(output, (tuple, list)) else output


def slowness(name: Precision, device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """What a person should know before 16-bit numbers turn out to be slower than float32: a sentence, or ``None``."""
    if name == "fp32":
        return None
    if device.type == "cuda":
        native = name == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
        return None if native else f"--precision {name}: this GPU emulates bfloat16; fp16 is faster here"
    try:
        words = set(cpuinfo.read_text().lower().split())
    except OSError:  # another system, which keeps it to itself
        return None
    if words & _ARITHMETIC[name]:
        return None
    other = "bf16 or fp32" if name == "fp16" and words & _ARITHMETIC["bf16"] else "fp32"
    has = "AVX512_BF16 nor AMX" if name == "bf16" else "AVX512_FP16 nor AMX-FP16"
    return (
        f"--precision {name} works on this processor, but slowly: it has neither {has}, and every number is converted "
        f"back and forth; {other} is faster here"
    )
