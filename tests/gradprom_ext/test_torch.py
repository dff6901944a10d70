"""Every private name of PyTorch that the library uses, used as the library does: a release that changes one is noticed
by name."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import gradprom_ext as gp
from gradprom_ext import _torch

PACKAGE = Path(gp.__file__).parent


def test_versions_move_with_what_is_done_in_place():
    t = torch.ones(3)
    before = _torch.version_of(t)
    t.mul_(2)
    assert _torch.version_of(t) == before + 1
    t.data.mul_(2)
    assert _torch.version_of(t) == before + 1, "not with what is done to .data: capture.py relies on neither"


def test_whether_an_optimizer_is_watched():
    opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert not _torch.is_watched(opt)
    for register in (
        opt.register_step_pre_hook,
        opt.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ):
        handle = register(lambda *_: None)
        assert _torch.is_watched(opt)
        handle.remove()
        assert not _torch.is_watched(opt)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert _torch.is_watched(opt)


def test_a_watched_step_calls_hooks():
    p = torch.nn.Parameter(torch.ones(2))
    opt = gp.GradPromSGD([p], lr=0.1)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    p.grad = torch.ones(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert calls == ["before", "after"]
    assert any("GradPromSGD.step" in event.key for event in profile.key_averages())


def test_an_untraced_function_runs_as_it_is():
    seen = []
    function = _torch.untraced(lambda: seen.append(torch.compiler.is_compiling()))
    torch.compile(lambda x: (function(), x + 1)[1], backend="eager")(torch.ones(2))
    assert seen == [False]


def test_kinds_of_tensors():
    plain = torch.ones(3)
    with FakeTensorMode():
        fake = torch.ones(3)
    for function, special in (
        (_torch.is_efficient_zero, torch._efficientzerotensor((3,))),
        (_torch.is_functional, torch._to_functional_tensor(torch.ones(3))),
        (lambda t: _torch.intercepts_operations(type(t)), fake),
    ):
        assert function(special)
        assert not function(plain)
        assert not function(torch.nn.Parameter(plain))


def test_distributed_tensors(tmp_path):
    """In a group of one process: the part is the whole, and the same object each time."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = torch.nn.Linear(3, 2)
        assert not _torch.is_dtensor(layer.weight) and not _torch.is_flattened_by_fsdp1(layer.weight)
        fully_shard(layer, mesh=mesh)
        assert _torch.is_dtensor(layer.weight)
        part = _torch.local_of(layer.weight)
        assert part is _torch.local_of(layer.weight) and part.shape == (2, 3)
        again = _torch.like(part, layer.weight)
        assert isinstance(again, DTensor) and again.placements == layer.weight.placements == (Shard(0),)
        assert again.shape == layer.weight.shape and _torch.local_of(again).data_ptr() == part.data_ptr()
        for use_orig_params in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                old = FullyShardedDataParallel(
                    torch.nn.Linear(3, 2), use_orig_params=use_orig_params, device_id=torch.device("cpu")
                )
            assert all(map(_torch.is_flattened_by_fsdp1, old.parameters()))
    finally:
        dist.destroy_process_group()


def test_keeping_a_stream_busy(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "_sleep", asked.append)
    _torch.keep_busy(5)
    assert asked == [5]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_are_in_one_file(path):
    """Attributes of torch, of its optimizers and of its tensors that begin with an underscore (``torch._foreach_*`` is
    documented)."""
    if path.name == "_torch.py":
        pytest.skip("the one file")
    private = re.compile(
        r"\btorch(?:\.\w+)*\._(?!foreach)[a-z]\w*|\._version\b|\b_optimizer_step_\w+|\bfrom torch\S* import _"
    )
    assert not private.findall(path.read_text())
