"""Every private name of PyTorch that this package uses, and what it is used for; tests/gradprom_ext/test_torch.py has a
test for each, so that a release which drops or changes one is noticed by name."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as _optimizer

#: Raised by every in-place operation on a tensor (not by what is done to ``tensor.data``).
version_of: Callable[[Tensor], int] = operator.attrgetter("_version")


def is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a profiler or a hook wants to know of this optimizer's steps."""
    return bool(
        torch.autograd._profiler_enabled()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _optimizer._global_optimizer_pre_hooks
        or _optimizer._global_optimizer_post_hooks
    )


def watched(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` with calls to profilers and hooks around it."""
    return torch.optim.Optimizer.profile_hook_step(step)  # type: ignore[arg-type]


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` between the graphs of ``torch.compile``, as torch.optim has its ``zero_grad``."""
    return torch._disable_dynamo(function)


def is_compiled_for_one_backward(error: RuntimeError) -> bool:
    """Whether a backward pass failed because torch.compile lets it overwrite what the forward pass saved. It does so
    where the first backward of a model was without ``retain_graph`` (``torch._functorch.config.donated_buffer``)."""
    return "donated" in str(error)


def is_efficient_zero(tensor: Tensor) -> bool:
    """Whether a tensor of zeros has no memory: ``torch._efficientzerotensor``, which forward-mode AD makes."""
    return tensor._is_zerotensor()


def is_functional(tensor: Tensor) -> bool:
    """Whether a tensor stands for another one during functionalization."""
    return torch._is_functional_tensor(tensor)


def intercepts_operations(kind: type[Tensor]) -> bool:
    """Whether a class of tensors handles every operation itself, as those of fake tensors and DTensor do: such a tensor
    need not have memory of its own."""
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is distributed over processes. Where nothing has imported the class there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(dtensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, the very object (``to_local`` makes another view each time), once
    it has arrived."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    local = dtensor._local_tensor  # type: ignore[attr-defined]
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def like(local: Tensor, dtensor: Tensor) -> Tensor:
    """The DTensor whose part in this process is ``local``, distributed as another one is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        dtensor.device_mesh,  # type: ignore[attr-defined]
        dtensor.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=dtensor.shape,
        stride=dtensor.stride(),
    )


def is_flattened_by_fsdp1(param: Tensor) -> bool:
    """Whether a parameter is one of FullyShardedDataParallel, or is part of one."""
    return bool(getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False))


def tell_scaler(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Lets a scaler know of an overflow that it could not see, as it looks at ``.grad`` alone; the device is not waited
    for. Its ``update`` then backs the scale off.

    :param skipped: ``[]``, other than 0 where there was one.
    """
    for found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
        found.add_(skipped.to(found.device, found.dtype, non_blocking=True))


def keep_busy(cycles: int) -> None:
    """Lets the current CUDA stream wait for so many cycles."""
    torch.cuda._sleep(cycles)
