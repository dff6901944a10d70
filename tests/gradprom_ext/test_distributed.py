"""Several processes, one model: they meet through gloo, and what they do is compared with one process that has all
batches."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import nn

import gradprom_ext as gp
from gradprom_ext import backends, distributed, self_check
from gradprom_ext.distributed import ReplicaError, Replicas

from .processes import start, together
from .test_backends import needs_kernels


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)).to(dtype)


def batch(rank: int, step: int, size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return (
        torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64),
        torch.randn(size, 3, generator=generator, dtype=torch.float64),
    )


def losses(model: nn.Module, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    images, wanted = given
    out = model(images.to(next(model.parameters()).dtype))
    return (out - wanted.to(out.dtype)).square().mean(), (out * wanted.to(out.dtype).flip(1)).sum(1).tanh().mean()


TRAININGS: dict[str, tuple[int, dict[str, Any]]] = {
    "sgd": (2, {"kind": "GradPromSGD", "settings": {"lr": 0.1, "momentum": 0.9}, "ddp": None, "sizes": [2, 2]}),
    "sent-during-backward": (
        2,
        {
            "kind": "GradPromAdamW",
            "settings": {"lr": 0.01, "gate": "soft"},
            "ddp": None,
            "sizes": [2, 2],
            "last": True,
        },
    ),
    "adamw-ddp": (
        2,
        {
            "kind": "GradPromAdamW",
            "settings": {"lr": 0.01, "gate": "soft", "max_grad_norm": 0.1},
            "ddp": {"gradient_as_bucket_view": True, "find_unused_parameters": True},
            "sizes": [2, 2],
        },
    ),
    "adam-three-uneven": (
        3,
        {
            "kind": "GradPromAdam",
            "settings": {"lr": 0.01, "granularity": "tensor", "backend": "reference"},
            "ddp": None,
            "sizes": [2, 1, 3],
        },
    ),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    works = {name: ("trained", options) for name, (number, options) in TRAININGS.items() if number == 2}
    others = ("naive", "not_finite_on_one", "overflow_on_one", "unequal_reach", "layouts", "finished_twice", "unfit")
    return together(tmp_path_factory.mktemp("two"), 2, __name__, {**works, **{name: (name, {}) for name in others}})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    works = {name: ("trained", options) for name, (number, options) in TRAININGS.items() if number == 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
        return together(tmp_path_factory.mktemp("three"), 3, __name__, {**works, "disagreeing": ("disagreeing", {})})


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# --- in the processes ---


def trained(
    rank: int,
    number: int,
    *,
    kind: str,
    settings: dict[str, Any],
    ddp: dict[str, bool] | None,
    sizes: list[int],
    last: bool = False,
) -> Any:
    model = net()
    outer: nn.Module = model if ddp is None else nn.parallel.DistributedDataParallel(model, **ddp)
    opt = getattr(gp, kind)(model.parameters(), **settings, process_group=dist.group.WORLD)
    gates = []
    for step in range(5):
        given = batch(rank, step, sizes[rank])
        if last:  # two micro-batches, with small buckets: the first ones are sent while the second backward still runs
            with mock.patch.object(distributed, "BUCKET", 64):
                for half, is_last in ((slice(0, 1), False), (slice(1, 2), True)):
                    main, aux = losses(outer, (given[0][half], given[1][half]))
                    opt.backward(main / 2, aux / 2, last=is_last)
            assert not any(p._post_accumulate_grad_hooks for p in model.parameters()), "a hook was left behind"
            with mock.patch.object(Replicas, "average", side_effect=AssertionError("averaged twice")):
                opt.step()
        else:
            opt.backward(*losses(outer, given))
            opt.step()
        gates.append([opt.stats.packed.clone(), opt.backend])
        opt.zero_grad()
    return parameters(model), gates


def not_finite_on_one(rank: int, number: int) -> Any:
    model = net()
    opt = gp.GradPromAdamW(model.parameters(), lr=0.1, process_group=dist.group.WORLD)
    main, aux = losses(model, batch(rank, 0))
    opt.backward(main, aux * (float("nan") if rank == 1 else 1.0))
    opt.step()
    return parameters(model), float(opt.skipped_steps)


def overflow_on_one(rank: int, number: int) -> Any:
    """With a scaler: the process whose own gradients are fine must back off, too."""
    p = nn.Parameter(torch.ones(3))
    opt = gp.GradPromSGD([p], lr=0.1, process_group=dist.group.WORLD)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    opt.backward((p * 1e-3).sum(), (p * (1e20 if rank == 0 else 1e-3)).sum(), scaler=scaler)
    scaler.step(opt)
    scaler.update()
    return p.detach().clone(), scaler.get_scale()


def unequal_reach(rank: int, number: int) -> Any:
    """Each loss reaches other parameters in each process, and the last parameter is reached nowhere."""
    a, b, c = (nn.Parameter(torch.full((2,), float(i + 1))) for i in range(3))
    opt = gp.GradPromSGD([a, b, c], lr=0.5, weight_decay=0.1, gate="always", process_group=dist.group.WORLD)
    opt.backward(a.sum() if rank == 0 else b.sum() * 3, (a.sum() * 2) if rank == 1 else (b * 0).sum())
    opt.step()
    return [p.detach().clone() for p in (a, b, c)], c.grad


def finished_twice(rank: int, number: int) -> Any:
    """Reentrant checkpointing adds to a gradient once per use of the parameter, within one backward pass."""
    layer = nn.Linear(2, 2)
    opt = gp.GradPromSGD(layer.parameters(), lr=0.1, process_group=dist.group.WORLD)
    x = torch.ones(1, 2, requires_grad=True)
    for _ in range(2):
        x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
    try:
        opt.backward(x.sum(), last=True)
    except RuntimeError as error:
        return str(error)
    return None


def layouts(rank: int, number: int) -> Any:
    """Parameters and gradients whose axes lie in other orders in memory, and several buckets."""
    generator = torch.Generator().manual_seed(rank)
    plain = torch.randn(2, 3, 4, 5, generator=generator)
    params = [
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(3, 2).t(),
        torch.zeros(()),
        torch.zeros(1, 4),
        torch.zeros(0, 3),
        torch.zeros(7, dtype=torch.float64),
    ]
    grads = [
        plain,
        torch.randn(2, 3, generator=generator),
        torch.randn((), generator=generator),
        torch.randn(1, 4, generator=generator),
        torch.zeros(0, 3),
        torch.randn(7, generator=generator, dtype=torch.float64),
    ]
    group = dist.group.WORLD
    assert group is not None
    with mock.patch.object(distributed, "BUCKET", 64):
        [found] = Replicas(group).average(params, [grads])
    return grads, found


def disagreeing(rank: int, number: int) -> Any:
    model = net()
    opt = gp.GradPromSGD(model.parameters(), lr=0.1, process_group=dist.group.WORLD)
    for step in range(4):
        opt.backward(*losses(model, batch(rank, step)))
        if step == 2 and rank == 1:
            with torch.no_grad():
                next(model.parameters()).add_(1e-6)
        try:
            opt.step()
        except ReplicaError as error:
            return step, str(error)
        opt.zero_grad()
    return None


def deserted(rank: int, number: int) -> Any:
    model = net()
    opt = gp.GradPromSGD(model.parameters(), lr=0.1, process_group=dist.group.WORLD)
    opt.backward(*losses(model, batch(rank, 0)))
    if rank == 1:
        os._exit(0)
    try:
        opt.step()
    except RuntimeError as error:
        Path(os.environ["DESERTED"]).write_text(str(error) or "an error")
    os._exit(0)


def unfit(rank: int, number: int) -> Any:
    """The second process cannot run the kernels: not alone, and not with one that can."""
    steps = []
    fault = mock.patch.object(self_check, "fault", return_value="a wrong sum" if rank == 1 else None)
    with warnings.catch_warnings(record=True) as said, fault, mock.patch.object(backends, "_proven", {}):
        warnings.simplefilter("always")
        for group in (None, dist.group.WORLD):
            model = net()
            opt = gp.GradPromAdamW(model.parameters(), lr=0.01)
            opt.step()  # without a gradient: it comes to a group that it has not begun with
            opt.process_group = group
            for step in range(5):
                opt.backward(*losses(model, batch(rank, step)))
                opt.step()
                opt.zero_grad()
            steps.append((opt.backend, parameters(model), opt.stats.packed.tolist()))
        main, aux = losses(model, batch(rank, 5))
        opt.backward(main, aux, aux)
        with mock.patch.object(self_check, "fault", return_value=None):  # a plan of another kind passes everywhere
            opt.step()
            steps.append((opt.backend,))
    return steps, [str(w.message) for w in said if "another process of this training" in str(w.message)]


def naive(rank: int, number: int) -> Any:
    """What DistributedDataParallel does by itself: the auxiliary gradients stay those of one's own batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = net()
        outer = nn.parallel.DistributedDataParallel(model)
        opt = gp.GradPromSGD(model.parameters(), lr=0.1)
    for step in range(5):
        opt.backward(*losses(outer, batch(rank, step)))
        opt.step(), opt.zero_grad()
    return parameters(model)


# --- the tests ---


def alone(kind: str, settings: dict[str, Any], number: int, sizes: list[int]) -> tuple[list[torch.Tensor], list[Any]]:
    """One process with all batches: the mean of the processes' mean losses."""
    model = net()
    opt = getattr(gp, kind)(model.parameters(), **settings)
    gates = []
    for step in range(5):
        parts = [losses(model, batch(rank, step, sizes[rank])) for rank in range(number)]
        opt.backward(*(torch.stack(each).mean() for each in zip(*parts, strict=True)))
        opt.step()
        gates.append(opt.stats)
        opt.zero_grad()
    return parameters(model), gates


@pytest.mark.parametrize("name", TRAININGS)
def test_processes_step_as_one(name: str, two: dict[str, list[Any]], three: dict[str, list[Any]]) -> None:
    number, options = TRAININGS[name]
    found = {2: two, 3: three}[number][name]
    wanted, gates = alone(options["kind"], options["settings"], number, options["sizes"])
    assert any(stats.gate.any() for stats in gates) and not all(stats.gate.all() for stats in gates)
    for params, seen in found:
        for p, first, q in zip(params, found[0][0], wanted, strict=True):
            assert torch.equal(p, first), "replicas differ"
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        for (stats, _), expected in zip(seen, gates, strict=True):
            torch.testing.assert_close(stats, expected.packed, rtol=1e-7, atol=1e-9)


def test_without_a_group_replicas_drift_apart(two: dict[str, list[Any]]) -> None:
    """The trap itself: if this fails, PyTorch has begun to reduce every backward."""
    one, other = two["naive"]
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_gradient_that_is_not_finite_anywhere_skips_everywhere(two: dict[str, list[Any]]) -> None:
    for params, skipped in two["not_finite_on_one"]:
        assert skipped == 1
        assert all(torch.equal(a, b) for a, b in zip(params, parameters(net()), strict=True))


def test_an_overflow_anywhere_backs_the_scale_off_everywhere(two: dict[str, list[Any]]) -> None:
    for p, scale in two["overflow_on_one"]:
        assert torch.equal(p, torch.ones(3)) and scale == 2.0**99


def test_losses_that_reach_other_parameters_in_each_process(two: dict[str, list[Any]]) -> None:
    """By hand: main (0.5, 1.5), auxiliary (1, 0); a: 1 - 0.5 (0.5 + 1 + 0.1), b: 2 - 0.5 (1.5 + 0.2)."""
    for (a, b, c), grad in two["unequal_reach"]:
        torch.testing.assert_close(a, torch.full((2,), 0.2))
        torch.testing.assert_close(b, torch.full((2,), 1.15))
        assert torch.equal(c, torch.full((2,), 3.0)) and grad is None, "what no loss reaches is left alone"


def test_a_gradient_that_is_finished_twice_is_not_sent_half(two: dict[str, list[Any]]) -> None:
    for message in two["finished_twice"]:
        assert message is not None and "leave last=True out" in message


@needs_kernels
def test_what_one_process_cannot_run_none_does(two: dict[str, list[Any]]) -> None:
    (first, said), (second, nothing) = two["unfit"]
    assert [backend for backend, *_ in first] == ["cpu", "reference", "reference"]
    assert [backend for backend, *_ in second] == ["reference", "reference", "reference"]
    assert first[1][2] == second[1][2]
    for p, q in zip(first[1][1], second[1][1], strict=True):
        assert torch.equal(p, q)
    wanted, _ = alone("GradPromAdamW", {"lr": 0.01, "backend": "reference"}, 2, [2, 2])
    torch.testing.assert_close(first[1][1], wanted, rtol=1e-9, atol=1e-11)
    assert len(said) == 1
    assert "another process of this training cannot run the backend cpu" in said[0]
    assert nothing == []


def test_averages_of_any_layout_in_small_buckets(two: dict[str, list[Any]]) -> None:
    (ours, found), (theirs, again) = two["layouts"]
    for a, b, mean, same in zip(ours, theirs, found, again, strict=True):
        torch.testing.assert_close(mean, (a + b) / 2)
        assert torch.equal(mean, same)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_the_debug_switch_names_the_first_process_and_step_that_differ(three: dict[str, list[Any]]) -> None:
    for step, message in three["disagreeing"]:
        assert step == 2
        assert "at step 2 process 1 of 3 decided otherwise than process 0" in message


def test_a_process_that_goes_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    monkeypatch.setenv("DESERTED", str(told))
    start(tmp_path, 2, __name__, {"deserted": ("deserted", {})})
    assert told.read_text()


def test_groups_that_are_none() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"torch\.distributed\.group\.WORLD is that of all processes"):
        gp.GradPromSGD([p], process_group="gloo")  # type: ignore[arg-type]


def test_a_copy_must_be_given_its_group_again(tmp_path: Path) -> None:
    p = nn.Parameter(torch.ones(2))
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        opt = gp.GradPromSGD([p], lr=0.5, process_group=dist.group.WORLD)
        opt.backward(p.sum(), p.sum())
        opt.step()
        assert p.tolist() == [0.0, 0.0], "a group of one process"
        opt.zero_grad()
        for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            assert other.process_group is None
            [own] = other.param_groups[0]["params"]
            other.backward(own.sum(), own.sum())
            with pytest.raises(RuntimeError, match="assign process_group again"):
                other.step()
            other.process_group = None
            other.step()
            assert own.tolist() == [-1.0, -1.0]
        opt.load_state_dict(opt.state_dict())
        assert opt.process_group is dist.group.WORLD
    finally:
        dist.destroy_process_group()
