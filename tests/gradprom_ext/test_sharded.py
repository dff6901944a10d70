"""Parameters of which each process holds a part (FSDP2, tensor parallelism, both): the same steps as one process that
holds all. Four processes do all of it, as two by two where they are so arranged."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gradprom_ext as gp
from gradprom_ext import backends, self_check
from gradprom_ext.distributed import ReplicaError

from .processes import together
from .test_backends import needs_kernels

STEPS = 4


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Of parameters that four processes cannot share evenly, one of them of a single element."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 1)).to(dtype)


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def losses(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = model(images.to(next(model.parameters()).dtype)).double()
    return out.square().mean(), (out * images.sum(1, keepdim=True)).tanh().mean()


# How the parameters lie, and which of the batch's parts a process of this rank gets, of how many.
Part = tuple[int, int]


def fsdp(model: nn.Sequential, mesh: DeviceMesh, **options: Any) -> None:
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def all_sharded(model: nn.Sequential, rank: int) -> Part:
    fsdp(model, init_device_mesh("cpu", (4,)))
    return rank, 4


def two_copies(model: nn.Sequential, rank: int) -> Part:
    """Two processes share the parameters, and the other two hold the same."""
    fsdp(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return rank, 4


def in_tensors(model: nn.Sequential, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def tensor_parallel(model: nn.Sequential, rank: int) -> Part:
    """The last layers are whole in each process, and plain tensors."""
    in_tensors(model, init_device_mesh("cpu", (4,)))
    return 0, 1


def both(model: nn.Sequential, rank: int) -> Part:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    in_tensors(model, mesh["tensor"])
    fsdp(model, mesh["data"])
    return mesh["data"].get_local_rank(), 2


ARRANGEMENTS: dict[str, tuple[Callable[[nn.Sequential, int], Part], str, dict[str, Any]]] = {
    "fsdp": (all_sharded, "GradPromAdamW", {"lr": 0.05, "gate": "soft", "max_grad_norm": 0.4}),
    "fsdp, per tensor, reference": (
        all_sharded,
        "GradPromAdam",
        {"lr": 0.02, "granularity": "tensor", "backend": "reference", "amsgrad": True},
    ),
    "two copies": (two_copies, "GradPromSGD", {"lr": 0.2, "momentum": 0.9, "max_grad_norm": 0.4}),
    "tensor parallel": (tensor_parallel, "GradPromAdamW", {"lr": 0.05, "max_grad_norm": 0.4}),
    "both": (both, "GradPromAdamW", {"lr": 0.05, "max_grad_norm": 0.4}),
}


def optimizer(model: nn.Module, kind: str, settings: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        # Of plain parameters in several processes: here all have the same batch.
        warnings.filterwarnings("ignore", "several processes train together")
        return getattr(gp, kind)(model.parameters(), **settings)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(rank: int, number: int, *, name: str) -> Any:
    arrange, kind, settings = ARRANGEMENTS[name]
    model = net()
    part, parts = arrange(model, rank)
    opt = optimizer(model, kind, settings)
    seen = []
    for step in range(STEPS):
        opt.backward(*losses(model, batch(step).chunk(parts)[part]))
        versions = [p._version for p in model.parameters()]
        opt.step(), opt.zero_grad()
        assert all(p._version > before for p, before in zip(model.parameters(), versions, strict=True)), (
            "autograd would not notice that a parameter which it has saved was written to"
        )
        seen.append(opt.stats.packed.clone())
    moments = [whole(value) for p in model.parameters() for key, value in opt.state[p].items() if key != "step"]
    distributed = [isinstance(opt.state[p][key], DTensor) for p in model.parameters() for key in opt.state[p]]
    return [whole(p) for p in model.parameters()], moments, seen, opt.backend, any(distributed)


def not_finite_on_one(rank: int, number: int) -> Any:
    model = net()
    all_sharded(model, rank)
    opt = gp.GradPromAdamW(model.parameters(), lr=0.1)
    opt.backward(*losses(model, batch(0)))
    if rank == 2:
        opt.aux_grads[0][0].to_local()[0, 0] = float("nan")
    opt.step()
    return [whole(p) for p in model.parameters()], float(opt.skipped_steps)


def scaled(rank: int, number: int) -> Any:
    """An overflow of the auxiliary gradient of one process's batch alone."""
    model = net(torch.float32)
    all_sharded(model, rank)
    opt = gp.GradPromSGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    scales = []
    for step in range(2):
        main, aux = losses(model, batch(step).chunk(4)[rank])
        opt.backward(main, aux * (1e38 if (step, rank) == (0, 3) else 1.0), scaler=scaler)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        scales.append((scaler.get_scale(), float(opt.skipped_steps)))
    return scales


def sixteen_bits(rank: int, number: int) -> Any:
    """Parameters of 16 bits with masters of 32: the states of another type than their parameters are sharded, too."""
    model = net(torch.bfloat16)
    all_sharded(model, rank)
    opt = gp.GradPromAdamW(model.parameters(), lr=0.01, master_weights=True)
    for step in range(STEPS):
        opt.backward(*losses(model, batch(step)))
        opt.step(), opt.zero_grad()
    return [whole(opt.state[p]["master"]) for p in model.parameters()]


def in_sixteen_bits(rank: int, number: int) -> Any:
    """FSDP computes in bfloat16 and sums in float32: gradients of float32 from an arithmetic of 16 bits."""
    model = net(torch.float32)
    fsdp(
        model,
        init_device_mesh("cpu", (4,)),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    opt = gp.GradPromSGD(model.parameters(), lr=0.1)
    opt.backward(*losses(model, batch(0).chunk(4)[rank]))
    opt.step()
    return [whole(p) for p in model.parameters()], float(opt.stats.cosine)


def saved(rank: int, number: int, *, folder: str) -> Any:
    """Two steps, a checkpoint, and two more."""
    model = net()
    two_copies(model, rank)
    opt = gp.GradPromAdamW(model.parameters(), lr=0.05, amsgrad=True)
    for step in range(STEPS):
        if step == 2:
            networks, states = get_state_dict(model, opt)
            dcp.save({"model": networks, "optimizer": states}, checkpoint_id=folder)
        opt.backward(*losses(model, batch(step).chunk(4)[rank]))
        opt.step(), opt.zero_grad()
    # And back, into the same optimizer: what it does next is what it did.
    networks, states = get_state_dict(model, opt)
    stored = {"model": networks, "optimizer": states}
    with contextlib.redirect_stderr(io.StringIO()):
        dcp.load(stored, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=stored["model"], optim_state_dict=stored["optimizer"])
    for step in range(2, STEPS):
        opt.backward(*losses(model, batch(step).chunk(4)[rank]))
        opt.step(), opt.zero_grad()
    return [whole(p) for p in model.parameters()]


def unfit(rank: int, number: int) -> Any:
    """One process cannot run the kernels; two by two, neither those of its copy nor those of its parts may."""
    model = net()
    two_copies(model, rank)
    fault = mock.patch.object(self_check, "fault", return_value="a wrong sum" if rank == 3 else None)
    with warnings.catch_warnings(), fault, mock.patch.object(backends, "_proven", {}):
        warnings.simplefilter("ignore")
        opt = gp.GradPromSGD(model.parameters(), lr=0.1)
        before = opt.backend
        opt.backward(*losses(model, batch(0)))
        opt.step()
        return before, opt.backend


def disagreeing(rank: int, number: int) -> Any:
    """With the debug switch, a process whose policy is another one."""
    model = net()
    all_sharded(model, rank)
    opt = gp.GradPromSGD(model.parameters(), lr=0.1, gate="always")
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        for step in range(3):
            opt.backward(*losses(model, batch(step)))
            if step == 1 and rank == 3:
                opt.aux_weight = 0.5
            opt.step(), opt.zero_grad()
    except ReplicaError as error:
        return step, str(error)
    finally:
        dist.set_debug_level(level)
    return None


def refused(rank: int, number: int) -> Any:
    """What a step could not do with, and what it says."""
    messages = {}

    def tried(name: str, what: Callable[[], Any]) -> None:
        try:
            what()
            messages[name] = None
        except (TypeError, ValueError, RuntimeError) as error:
            messages[name] = str(error)

    mesh = init_device_mesh("cpu", (4,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Partial()]))
    tried("partial", lambda: gp.GradPromSGD([partial]))
    flat = nn.Parameter(torch.ones(2))
    flat._fsdp_flattened = True  # type: ignore[attr-defined]
    tried("fsdp1", lambda: gp.GradPromSGD([flat]))

    p = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Shard(0)]))
    opt = gp.GradPromAdam([p])
    opt.aux_grads = [[torch.ones(8)]]
    tried("plain gradient", opt.step)
    opt.aux_grads = [[torch.ones_like(p)]]
    opt.state[p]["exp_avg"] = torch.zeros(8)
    p.grad = torch.ones_like(p)
    tried("plain state", opt.step)
    tried("functional form", lambda: gp.gradprom_([p], [torch.ones_like(p)], [torch.ones_like(p)], lr=0.1))
    return messages


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    works: dict[str, tuple[str, dict[str, Any]]] = {name: ("trained", {"name": name}) for name in ARRANGEMENTS}
    alone = ("not_finite_on_one", "scaled", "sixteen_bits", "in_sixteen_bits", "disagreeing", "refused", "unfit")
    folder = tmp_path_factory.mktemp("four")
    works |= {name: (name, {}) for name in alone} | {"saved": ("saved", {"folder": str(folder / "checkpoint")})}
    return {"folder": [folder / "checkpoint"], **together(folder, 4, __name__, works)}


def in_one(kind: str, settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, list[Any]]:
    """One process with all parameters and all batches."""
    model = net(dtype)
    opt = getattr(gp, kind)(model.parameters(), **settings)
    seen = []
    for step in range(STEPS):
        opt.backward(*losses(model, batch(step)))
        opt.step(), opt.zero_grad()
        seen.append(opt.stats)
    return model, opt, seen


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_parts_step_as_the_whole(name: str, four: dict[str, list[Any]]) -> None:
    _, kind, settings = ARRANGEMENTS[name]
    model, opt, gates = in_one(kind, settings)
    gated = torch.stack([stats.gate.flatten() for stats in gates])
    assert gated.any() and not gated.all(), "the gate both opens and closes"
    moments = [value for p in model.parameters() for key, value in opt.state[p].items() if key != "step"]
    for params, own_moments, seen, backend, distributed in four[name]:
        assert backend == settings.get("backend", "cpu") and distributed
        for found, wanted in zip((*params, *own_moments), (*model.parameters(), *moments), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        for stats, first, wanted in zip(seen, four[name][0][2], gates, strict=True):
            torch.testing.assert_close(stats, wanted.packed, rtol=1e-7, atol=1e-9)
            assert torch.equal(stats, first), "each process decided by itself"


def test_a_gradient_that_is_not_finite_in_one_part_skips_everywhere(four: dict[str, list[Any]]) -> None:
    for params, skipped in four["not_finite_on_one"]:
        assert skipped == 1
        assert all(torch.equal(a, b) for a, b in zip(params, net().parameters(), strict=True))


def test_an_overflow_backs_the_scale_off_once_everywhere(four: dict[str, list[Any]]) -> None:
    for scales in four["scaled"]:
        assert scales == [(2.0**19, 1.0), (2.0**19, 1.0)]


def test_masters_are_sharded_as_their_parameters(four: dict[str, list[Any]]) -> None:
    model, opt, _ = in_one("GradPromAdamW", {"lr": 0.01, "master_weights": True}, torch.bfloat16)
    for masters in four["sixteen_bits"]:
        for found, p in zip(masters, model.parameters(), strict=True):
            assert found.dtype == torch.float32
            # Gradients of bfloat16 differ in their last bit with the order of sums: 4 steps of Adam's, 0.01 long each.
            torch.testing.assert_close(found, opt.state[p]["master"], rtol=0, atol=2e-3)


def test_with_mixed_precision_of_fsdp(four: dict[str, list[Any]]) -> None:
    model = net(torch.float32)
    opt = gp.GradPromSGD(model.parameters(), lr=0.1)
    opt.backward(*losses(model, batch(0)))
    opt.step()
    for params, cosine in four["in_sixteen_bits"]:
        assert cosine == pytest.approx(float(opt.stats.cosine), abs=0.05)
        for found, wanted, start in zip(params, model.parameters(), net(torch.float32).parameters(), strict=True):
            moved = float((wanted - start).detach().norm())
            assert float((found - wanted).norm()) <= 0.05 * moved + 1e-3


def test_a_distributed_checkpoint_goes_on_in_another_number_of_processes(four: dict[str, list[Any]]) -> None:
    wanted, _, _ = in_one("GradPromAdamW", {"lr": 0.05, "amsgrad": True})
    for params in four["saved"]:
        for found, p in zip(params, wanted.parameters(), strict=True):
            torch.testing.assert_close(found, p.detach(), rtol=1e-9, atol=1e-12)
    # Four processes wrote it, and one reads it, which knows of no other.
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    opt = gp.GradPromAdamW(model.parameters(), lr=0.05, amsgrad=True)
    networks, states = get_state_dict(model, opt)
    stored = {"model": networks, "optimizer": states}
    dcp.load(stored, checkpoint_id=four["folder"][0], no_dist=True)
    set_state_dict(model, opt, model_state_dict=stored["model"], optim_state_dict=stored["optimizer"])
    for step in range(2, STEPS):
        opt.backward(*losses(model, batch(step)))
        opt.step(), opt.zero_grad()
    for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_the_debug_switch_names_the_process_that_decided_otherwise(four: dict[str, list[Any]]) -> None:
    for step, message in four["disagreeing"]:
        assert step == 1 and "at step 1 process 3 of 4 decided otherwise than process 0" in message


@needs_kernels
def test_what_one_process_cannot_run_none_does(four: dict[str, list[Any]]) -> None:
    assert four["unfit"] == [("cpu", "reference")] * 3 + [("reference", "reference")]


def test_what_is_refused(four: dict[str, list[Any]]) -> None:
    for messages in four["refused"]:
        assert "redistribute() it to Shard or Replicate" in messages["partial"]
        assert "use torch.distributed.fsdp.fully_shard" in messages["fsdp1"]
        assert "aux_grads[0][0] is a Tensor, and its parameter is a DTensor" in messages["plain gradient"]
        assert "set_optimizer_state_dict" in messages["plain state"]
        assert "is a DTensor" in messages["functional form"]
