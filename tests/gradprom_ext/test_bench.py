"""The benchmark computes what it says: the contestants' steps, the bytes, the medians, and the tables made of them."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gradprom_ext as gp
from gradprom_ext.bench import __main__ as command
from gradprom_ext.bench import networks, report, rivals, step, timing, update, warm
from gradprom_ext.bench.checking import LeftOut, WrongResultError, leaving_out
from gradprom_ext.bench.results import (
    UpdateResult,
    bytes_per_parameter,
    bytes_read,
    step_results,
    update_results,
    warm_results,
)

from .targets import usable_on_host

HOST_BACKENDS = [name for name in ("cpu", "reference") if usable_on_host(name)]

CPU = torch.device("cpu")
TINY = step.Setting(blocks=1, width=4, depth=18, batch=2, size=8, vr_width=4)
OPTIMIZERS = pytest.mark.parametrize("optimizer", update.OPTIMIZERS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These tensors are too small to share, and the threads of a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("srresnet", 1_549_462, 159),
        ("unet", 7_759_554, 46),
        ("resnet50", 25_557_032, 161),
        ("0.1M", 100_000, 140),
        ("1B", 1_000_000_000, 140),
        ("1000x1001", 1_001_000, 1000),
    ],
)
def test_sizes(name, parameters, tensors):
    shapes = networks.parameter_shapes(name)
    assert (sum(map(math.prod, shapes)), len(shapes)) == (parameters, tensors)


@pytest.mark.parametrize(
    ("depth", "parameters"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160)]
)
def test_resnets_are_the_published_ones(depth, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in networks.ResNet(depth=depth).parameters()) == parameters


def test_networks_map_images_to_what_they_say():
    x = torch.rand(2, 3, 16, 16)
    assert networks.SRResNet(scale=1, blocks=1, width=4)(x).shape == (2, 3, 16, 16)
    assert networks.SRResNet(scale=4, blocks=1, width=4)(x).shape == (2, 3, 64, 64)
    assert networks.UNet(base=2, channels=3)(x).shape == (2, 2, 16, 16)
    assert networks.ResNet(depth=18, classes=5)(x).shape == (2, 5)


# ----------------------------------------------------------------------------------------------------------------------
# The method in PyTorch operations


@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize(
    "combine",
    [rivals.add_if_agreed_, rivals.add_gated_by_dots_, rivals.add_gated_by_foreach_, rivals.add_naively_],
)
def test_rivals_add_the_auxiliary_gradient_where_it_agrees(combine, agree):
    def layouts(tensors: list[Tensor]) -> list[Tensor]:
        return [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]

    noise = [torch.randn(s) for s in ((3, 4, 5, 5), (7,), (2, 3))]
    main = layouts([torch.randn_like(t) for t in noise])
    aux = layouts([(m if agree else -m) + t for m, t in zip(main, noise, strict=True)])
    expected = [m.double() + agree * a.double() for m, a in zip(main, aux, strict=True)]
    combine(main, aux)
    for actual, wanted in zip(main, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The optimizer step


@OPTIMIZERS
@pytest.mark.parametrize("precision", update.PRECISIONS)
def test_every_contestant_of_the_update_steps_rightly(optimizer, precision):
    """The check starts from zero, so it sees the update in full precision; a second oracle is float64 here."""
    case = update.Case("3x50", optimizer, precision)
    field = update.contestants(case, CPU, HOST_BACKENDS)
    assert {"gradprom reference", "best PyTorch", "plain optimizer"} <= set(field)
    for name, contestant in field.items():
        inputs = update.Inputs(case.shapes, optimizer, precision, CPU)
        pair = inputs.main, inputs.aux
        g = [m.double() + (contestant.gradient == "combined") * a.double() for m, a in zip(*pair, strict=True)]
        update.check(case, contestant, inputs, contestant.build(case, inputs))
        direction = g if optimizer == "sgd" else [t / (t.abs() + 1e-8) for t in g]
        for weight, d in zip(inputs.weights, direction, strict=True):
            torch.testing.assert_close(weight.double(), -update.LR * d, rtol=1e-4, atol=1e-4 * update.LR, msg=name)


@OPTIMIZERS
@pytest.mark.parametrize("precision", update.PRECISIONS)
def test_a_wrong_step_is_not_timed(optimizer, precision):
    def forgets_the_last_tensor(main: list[Tensor], aux: list[Tensor]) -> None:
        rivals.add_if_agreed_(main[:-1], aux[:-1])

    case = update.Case("3x50", optimizer, precision)
    contestant = update.Contestant(partial(update.pytorch, combine=forgets_the_last_tensor))
    inputs = update.Inputs(case.shapes, optimizer, precision, CPU)
    with pytest.raises(WrongResultError, match=r"of tensor 2 is off by [1-9]\.\de"):
        update.check(case, contestant, inputs, contestant.build(case, inputs))


def test_a_16_bit_parameter_that_is_not_its_rounded_master_is_seen():
    case = update.Case("3x50", "sgd", "bf16")
    inputs = update.Inputs(case.shapes, "sgd", "bf16", CPU)
    plain = update.plain(case, inputs)

    def spoiled() -> None:
        plain()
        inputs.params[1][49] *= 2

    with pytest.raises(WrongResultError, match="16-bit parameter of tensor 1"):
        update.check(case, update.Contestant(update.plain, gradient="main"), inputs, spoiled)


def test_the_two_launch_form_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(update, "gradprom", lambda case, inputs, *, backend: asked.append(backend))
    update.two_launches(None, None)
    assert [(b.name, b.options) for b in asked] == [("cuda", {"cooperative": False})]


@pytest.mark.parametrize(
    ("set_bytes", "budget", "sets"),
    [
        (1_200_000, 10**10, 167),  # 4 x 50 MB of cache
        (10_000, 10**10, 256),  # no more than 256
        (600_000_000, 10**10, 2),  # the end of one step must not serve the next one
        (5_000_000_000, 10**10, 1),  # a hundred times the cache: 1 % at most
        (600_000_000, 10**9, 1),  # memory for one
        (600_000_000, 5 * 10**8, 0),
        (600_000_000, -(10**8), -1),
    ],
)
def test_input_sets(set_bytes, budget, sets):
    assert update.input_sets(set_bytes, l2_bytes=50_000_000, budget=budget, held_bytes=0) == sets


# ----------------------------------------------------------------------------------------------------------------------
# A GPU's procedure, on the CPU


class PretendGpu:
    """Does at once what a GPU would do later; TorchJD and the naive form wait for it."""

    device = CPU
    free_bytes, l2_bytes, on_chip_bytes = 10**10, 5000, 10**6

    def __init__(self) -> None:
        self.captured: list[int] = []

    def synchronise(self) -> None:
        pass

    def is_awaited_by(self, step: Callable[[], object]) -> bool:
        step()
        owner = getattr(step, "__self__", None)
        return "torchjd" in step.__qualname__ or getattr(owner, "combine", None) is rivals.add_naively_

    def capture(self, steps: Sequence[Callable[[], object]]) -> Callable[[], object]:
        self.captured.append(len(steps))
        return lambda: [s() for s in steps]

    def queue_watch(self, run: Callable[[], object]) -> Callable[[], float]:
        return timing.stopwatch(run, CPU)


def measure_on_pretended_gpu(**sizes: int) -> tuple[list[UpdateResult], list[LeftOut], PretendGpu]:
    gpu: Any = PretendGpu()
    vars(gpu).update(sizes)
    case = update.Case("3x50", "adamw", "fp32")
    results, notes = update.measure_on_gpu(case, gpu, HOST_BACKENDS, 2)
    return results, notes, gpu


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is, no input set is left out; and the copy is a small one."""
    monkeypatch.setattr(update, "QUEUE_SECONDS", dict.fromkeys(update.QUEUE_SECONDS, math.inf))
    monkeypatch.setattr(update, "COPY_BYTES", 2**16)


@pytest.mark.usefixtures("patient")
def test_update_on_a_gpu():
    results, notes, gpu = measure_on_pretended_gpu()
    assert notes == []
    by_name = {r.contestant: r for r in results}
    assert {"copy", "host", "gradprom reference", "best PyTorch", "plain optimizer"} <= set(by_name)
    sets = math.ceil(4 * 5000 / (150 * 20))  # the inputs of AdamW: three tensors and two moments
    for name, r in by_name.items():
        assert r.on_chip
        assert r.bytes == 32
        assert r.over_floor > 0
        if name != "copy":
            assert r.host_us > 0
            assert len(r.host_samples_us) == 2
            assert r.input_sets == (256 if name == "host" else sets)
            assert r.timed == {"TorchJD PCGrad": "eager", "gradprom cpu": "queue", "host": "queue"}.get(name, "graph")
    assert by_name["copy"].host_us is None
    assert set(gpu.captured) == {sets}
    # The floor is what a copy of 64 KiB (read and written) takes, scaled to the bytes of 150 parameters.
    ratio = by_name["copy"].floor_ms / by_name["copy"].median_ms
    assert ratio == pytest.approx(32 * 150 / (2 * 2**16), rel=1e-6)
    table = report.update_table(results)
    assert "floor 32 B/parameter (gradients stay on chip)" in table
    assert "host us" in table


@pytest.mark.usefixtures("patient")
def test_gradients_that_do_not_stay_on_chip_have_the_larger_floor():
    results, _, _ = measure_on_pretended_gpu(on_chip_bytes=2 * 150 * 4 - 1)
    assert {r.bytes for r in results} == {40}


def test_a_size_that_does_not_fit_says_so():
    results, [note], _ = measure_on_pretended_gpu(free_bytes=10**8)
    assert results == []
    assert note.reason.startswith("3x50, adamw, fp32 is left out: it needs 0.6 GB of device memory, 0.1 GB are free")
    assert not note.is_failure


@pytest.mark.usefixtures("patient")
def test_memory_that_contestants_hold_counts():
    """0.9 of this is two copies of 64 KiB and one set of 150 parameters with two gradients and two moments, no more."""
    free = math.ceil((2 * 2**16 + 150 * 20) / 0.9)
    results, [note], _ = measure_on_pretended_gpu(free_bytes=free)
    assert results == []
    assert "3x50, adamw, fp32 is left out: it needs" in note.reason


@pytest.mark.parametrize(
    ("waits", "few", "how", "sets"), [(False, False, "graph", 3), (False, True, "queue", 3), (True, True, "eager", 1)]
)
def test_a_slow_step_is_timed_over_fewer_input_sets(monkeypatch, waits, few, how, sets):
    """As many as the host queues in a tenth of a second, or in a fiftieth where each round waits for them."""
    clock, log = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def slow(number: int) -> None:
        log.append(number)
        clock[0] += 0.03

    gpu: Any = PretendGpu()
    gpu.is_awaited_by = lambda step: waits
    watches = update.GpuWatches([partial(slow, n) for n in range(9)], gpu, few)
    assert (watches.sets, watches.timed, gpu.captured) == (sets, how, [sets] if how == "graph" else [])
    assert watches.on_device() == pytest.approx(0.03)
    assert watches.on_host() == pytest.approx(0.03)
    assert set(log) == set(range(sets))


def test_a_failing_contestant_leaves_the_others_alone(monkeypatch):
    def fails(main: list[Tensor], aux: list[Tensor]) -> None:
        raise RuntimeError("no such kernel\nlong story")

    monkeypatch.setattr(rivals, "best_pytorch", lambda device: fails)
    results, [note] = update.measure(update.Case("2x3", "sgd", "fp32"), CPU, ["reference"], 2)
    assert note == LeftOut("best PyTorch is left out of 2x3, sgd, fp32: RuntimeError: no such kernel", False)
    assert "gradprom reference" in {r.contestant for r in results}


def test_a_wrong_step_of_ours_is_a_failure():
    notes: list[LeftOut] = []
    with leaving_out(notes, "gradprom cuda", "1B"):
        raise WrongResultError("it steps wrongly")
    assert notes == [LeftOut("gradprom cuda is left out of 1B: it steps wrongly", True)]


# ----------------------------------------------------------------------------------------------------------------------
# The training step


def oracle(problem: step.Problem) -> dict[str, Tensor]:
    """The gradients of both losses with respect to IP, and of the auxiliary one to VR, in float64."""
    ip, vr = (net.double() for net in problem.networks())
    enhanced = ip(problem.degraded.double())
    aux_loss = problem.aux_scale * F.cross_entropy(vr(enhanced), problem.labels)
    flat = lambda loss, net: torch.cat(  # noqa: E731
        [g.reshape(-1) for g in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)]
    )
    return {
        "main": flat(F.mse_loss(enhanced, problem.clean.double()), ip),
        "aux": flat(aux_loss, ip),
        "vr": flat(aux_loss, vr),
    }


@pytest.fixture(scope="module", params=["open", "closed"])
def problem(request: pytest.FixtureRequest) -> step.Problem:
    """A gate that is open, or closed by turning the auxiliary loss round."""
    problem = step.Problem(step.Setting(**{**vars(TINY), "optimizer": "sgd"}), CPU)
    grads = oracle(problem)
    if (torch.dot(grads["main"], grads["aux"]) >= 0) != (request.param == "open"):
        problem.aux_scale = -problem.aux_scale
    return problem


def test_all_trainers_take_the_step_they_should(problem):
    """Those of GradProm the same one; the others what their names say. VR's is the same for all that have one."""
    grads = oracle(problem)
    is_open = bool(torch.dot(grads["main"], grads["aux"]) >= 0)
    assert grads["main"].norm() == pytest.approx(float(grads["aux"].norm()), rel=1e-3)
    gated = grads["main"] + is_open * grads["aux"]
    expected = {"IP alone": grads["main"], step.FLOOR: grads["main"], "joint": grads["main"] + grads["aux"]}
    field = step.contestants(problem, HOST_BACKENDS)
    assert len(field) >= 6
    for name, make in field.items():
        trainer = make()
        vr_before = torch.cat([p.detach().reshape(-1).clone() for p in trainer.vr.parameters()])
        actual = step.first_gradient(trainer)
        vr_after = torch.cat([p.detach().reshape(-1) for p in trainer.vr.parameters()])
        wanted = expected.get(name, gated)
        if name == "TorchJD PCGrad" and not is_open:  # PCGrad projects both gradients instead
            wanted = sum(
                g - torch.dot(g, o) / torch.dot(o, o) * o
                for g, o in ((grads["main"], grads["aux"]), (grads["aux"], grads["main"]))
            )
        assert (actual - wanted).abs().max() <= 1e-3 * wanted.abs().max(), name
        vr_step = 0 if name == "IP alone" else grads["vr"]
        assert (vr_before - vr_after - step.LR * vr_step).abs().max() <= 1e-3 * step.LR * grads["vr"].abs().max(), name
        assert all(p.grad is None for p in (*trainer.params, *trainer.vr.parameters())), name


def test_the_referee_lets_no_wrong_training_step_through(problem):
    def adds_twice(main: list[Tensor], aux: list[Tensor]) -> None:
        torch._foreach_add_(main, aux, alpha=2)

    with pytest.raises(WrongResultError, match="another gradient than GradProm's"):
        step.Referee(problem).check(step.PyTorchGradProm(problem, combine=adds_twice))


def test_graphs_leave_out_who_waits():
    """AdamW, so the gradient is read off the first moment."""
    setting = step.Setting(**{**vars(TINY), "variant": "graph"})
    gpu: Any = PretendGpu()
    results, notes = step.measure_on(gpu, setting, CPU, ["reference"], 2)
    assert [r.contestant for r in results[:4]] == ["IP alone", "joint", "two backwards", "gradprom reference"]
    assert {(r.update_ms, r.update_overhead_percent) for r in results} == {(None, None)}
    assert [note.reason.partition(" is ")[0] for note in notes][:1] == ["naive PyTorch"]
    assert all("waits for the device" in note.reason and not note.is_failure for note in notes)
    assert gpu.captured == [1] * len(results)


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic of the report


@pytest.mark.parametrize(
    ("optimizer", "precision", "on_chip", "moved"),
    [
        ("sgd", "fp32", False, 4 * 4 + 4 + 4),
        ("sgd", "fp32", True, 2 * 4 + 4 + 4),
        ("adamw", "fp32", False, 4 * 4 + 3 * 8),
        ("adamw", "fp32", True, 2 * 4 + 3 * 8),
        ("sgd", "bf16", False, 4 * 2 + 2 + 8),
        ("adamw", "bf16", True, 2 * 2 + 2 + 3 * 8),
    ],
)
def test_bytes_per_parameter(optimizer, precision, on_chip, moved):
    assert bytes_per_parameter(optimizer, precision, on_chip) == moved


def test_bytes_read():
    assert [bytes_read(o, p) for p in ("fp32", "bf16") for o in ("sgd", "adamw")] == [20, 28, 12, 20]


COMMON = {"network": "net", "parameters": 10**6, "tensors": 3, "optimizer": "sgd"}


def test_update_results():
    """Rounds of one million parameters; the memory moves 12 MB in 1, 2 and 1 ms, so 24 MB in 2, 4 and 2 ms."""
    samples = {
        "gradprom cuda": [4e-3, 4e-3, 3e-3],
        "best PyTorch": [8e-3, 40e-3, 9e-3],
        "copy": [1e-3, 2e-3, 1e-3],
        "host": [5e-6, 5e-6, 5e-6],
    }
    host = {"gradprom cuda": [30e-6, 10e-6, 20e-6]}
    ours, best, *_ = results = update_results(
        COMMON,
        samples,
        fused="gradprom cuda",
        yardstick="copy",
        moved=12e6,
        timed={"best PyTorch": "graph", "gradprom cuda": "graph"},
        input_sets={"gradprom cuda": 7},
        host=host,
    )
    assert (ours.low_ms, ours.median_ms, ours.high_ms) == pytest.approx((3.5, 4, 4))
    assert ours.floor_ms == pytest.approx(2)
    assert ours.over_floor == pytest.approx(1.5)  # of 2, 1 and 1.5
    assert best.speed_up == pytest.approx(3)  # of 2, 10 and 3
    assert (ours.host_us, best.host_us) == (pytest.approx(20), None)
    assert (ours.samples_ms, ours.host_samples_us) == ([4, 4, 3], [30, 10, 20])
    cells = rows(report.update_table(results))
    # 24 bytes x 1e6 / 4 ms = 6 GB/s; 1 / 1.5 of what the memory gives.
    # Three ratios that differ this much say little: of 2, 1 and 1.5, and of 2, 10 and 3.
    assert cells["gradprom cuda"] == [
        *("4000.00", "3500.00 .. 4000.00", "1.50 ?", "6", "67 ?", "1.00", "20.0 ?", "graph", "7")
    ]
    assert cells["best PyTorch"][:1] + cells["best PyTorch"][3:6] == ["9000.00", "", "", "3.00 ?"]
    assert "copy" not in cells
    assert "floor 24 B/parameter at the 12.0 GB/s of a copy = 2000.00 us" in report.update_table(results)
    # 2 ms of 4 - 0.005 ms.
    assert (
        "launch and barrier 5.00 us; without them gradprom cuda moves its bytes at 50 % of that"
        in report.update_table(results)
    )
    assert rows(report.summary(results))["net, 1.00 M parameters in 3 tensors, sgd"] == [
        "2000.00 us",
        "4000.00 us",
        "67 ?",
        "20.0 ?",
        "3.00 ?",
    ]


def on_a_machine(busy: bool) -> list[UpdateResult]:
    """Eight rounds; on a busy machine, the others' steps wait for a processor in half of them."""
    slow = [1.0, 143.0] if busy else [1.0, 1.05]
    samples = {
        "gradprom cpu": [1e-3] * 8,
        "best PyTorch": [3e-3 * slow[i % 2] for i in range(8)],
        "plain optimizer": [2e-3] * 8,
        "memory": [0.5e-3] * 8,
    }
    return update_results(COMMON, samples, fused="gradprom cpu", yardstick="memory", moved=12e6)


def test_a_ratio_of_a_busy_machine_is_not_printed_without_a_word(tmp_path):
    results = on_a_machine(busy=True)
    for text in (report.update_table(results), report.summary(results)):
        assert "216.00 ?" in text and "2.00 |" in text and "2.00 ?" not in text
        assert "\n\n?: the spread is too wide to believe this figure" in text
    reason = "the middle half of 8 ratios is 3.00 .. 429.00, wider than 25 % of their median 216.00"
    assert f"- best PyTorch, x fused: {reason}" in report.update_table(results)
    report.save(tmp_path / "busy.json", {"torch": "2"}, results)
    stored = json.loads((tmp_path / "busy.json").read_text())["results"]
    assert [entry["unreliable"].get("speed_up") for entry in stored] == [None, reason, None, None]
    assert report.load(tmp_path / "busy.json")[1] == results


def test_a_quiet_machine_gets_no_question_marks():
    results = on_a_machine(busy=False)
    assert [r.unreliable for r in results] == [{}] * 4
    assert "?" not in report.update_table(results) + report.summary(results)


@pytest.mark.parametrize(
    ("ratios", "believed"),
    [([-1.0, 1.0], True), ([-3.0, 1.0], True), ([-8.0, 8.0], False), ([-60.0, -50.0], True), ([18.0, 32.0], False)],
)
def test_an_overhead_is_believed_if_it_can_be_told_from_what_is_wanted(ratios, believed):
    """Percentages: their middle half, half as wide as the two, may span 2, or a quarter of the median."""
    samples = {"two backwards": [[1.0], [1.0]], "gradprom cpu": [[1 + r / 100] for r in ratios]}
    common = {"network": "a + b", "parameters": 5, "vr_parameters": 6, "optimizer": "sgd"}
    _, ours = results = step_results({**common, "variant": "graph", "batch": 4, "size": 32}, samples)
    table = report.step_table(results)
    assert ("overhead_percent" not in ours.unreliable) == believed
    assert (" % ?" not in table) == ("too wide to tell" not in table) == believed


def test_step_results():
    """Two backwards take 100, 200 and 100 ms, of which the update 1, 2 and 3."""
    samples = {
        "two backwards": [[0.098, 0.001, 0.001], [0.196, 0.002, 0.002], [0.096, 0.003, 0.001]],
        "gradprom cpu": [[0.099, 0.002, 0.001], [0.200, 0.002, 0.002], [0.101, 0.004, 0.001]],
    }
    common = {"network": "a + b", "parameters": 5, "vr_parameters": 2 * 10**6, "optimizer": "sgd"}
    floor, ours = results = step_results({**common, "variant": "eager", "batch": 4, "size": 32}, samples)
    assert (floor.median_ms, floor.overhead_percent, floor.update_overhead_percent) == (pytest.approx(100), 0, 0)
    # Whole steps: 102/100, 204/200, 106/100; updates: +1/100, +0/200, +1/100.
    assert ours.overhead_percent == pytest.approx(2)
    assert (ours.overhead_low_percent, ours.overhead_high_percent) == pytest.approx((2, 4))
    assert ours.update_overhead_percent == pytest.approx(1)
    assert ours.update_ms == pytest.approx(2)
    table = report.step_table(results)
    assert rows(table)["gradprom cpu"][2:] == ["+2.00 %", "+2.00 .. +4.00", "2.000", "+1.00 %"]
    assert table.endswith(
        "gradprom cpu costs +2.00 % over its two-backward floor, +1.00 % by its update alone (wanted: at most 2 %)"
    )
    assert "a + b (5 + 2.00 M parameters), batch 4, 32 x 32, sgd, eager" in table


def test_step_results_of_whole_graphs():
    samples = {"two backwards": [[0.1], [0.1]], "gradprom cuda": [[0.101], [0.103]]}
    common = {"network": "a + b", "parameters": 5, "vr_parameters": 6, "optimizer": "sgd"}
    _, ours = results = step_results({**common, "variant": "graph", "batch": 4, "size": 32}, samples)
    assert (ours.overhead_percent, ours.update_ms) == (pytest.approx(2), None)
    assert "costs +2.00 % over its two-backward floor (wanted" in report.step_table(results)


def rows(table: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by the first cell of their row."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_results_survive_their_file(tmp_path):
    samples = {"gradprom cpu": [2e-3, 3e-3], "memory": [1e-3, 1e-3]}
    one = update_results(COMMON, samples, fused="gradprom cpu", yardstick="memory", moved=12e6)
    common = {"network": "a + b", "parameters": 5, "vr_parameters": 6, "optimizer": "sgd"}
    two = step_results({**common, "variant": "bf16", "batch": 4, "size": 32}, {"two backwards": [[0.1], [0.2]]})
    report.save(tmp_path / "new" / "file.json", {"torch": "2"}, [*one, *two], ["1B is left out"])
    assert report.load(tmp_path / "new" / "file.json") == ({"torch": "2"}, [*one, *two])


def test_results_of_the_first_version_can_be_read(tmp_path):
    """Its entries had no precision, no GPU and no kind; all were of the optimizer step on a CPU."""
    entry = {**COMMON, "low_ms": 1.5, "high_ms": 3.0, "floor_ms": 1.0, "samples_ms": [2.0]}
    entries = [
        {**entry, "contestant": "gradprom cpu", "median_ms": 2.0, "over_floor": 2.0, "speed_up": 1.0},
        {**entry, "contestant": "best PyTorch", "median_ms": 6.0, "over_floor": 6.0, "speed_up": 3.0},
        {**entry, "contestant": "reads", "median_ms": 0.4, "over_floor": 0.4, "speed_up": 0.2},
    ]
    about = {"device": "EPYC", "threads": 2, "torch": "2.13", "commit": "abc", "date": "2026-01-01", "command": "go"}
    (tmp_path / "old.json").write_text(json.dumps({"machine": about, "results": entries}))
    text = report.markdown(*report.load(tmp_path / "old.json"))
    assert text.startswith("EPYC, 2 threads, torch 2.13, commit abc, 2026-01-01: `go`\n")
    assert "floor 24 B/parameter at the 24.0 GB/s of a copy = 1.00 ms; its reads alone 1.00 ms" in text
    assert "| net, 1.00 M parameters in 3 tensors, sgd | 1.00 ms | 2.00 ms |          50 |           3.00 |" in text


def test_the_committed_results_make_tables():
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu.json"
    entries = json.loads(file.read_text())["results"]
    ours = [e for e in entries if e["contestant"] == "gradprom cpu"]
    assert ours
    lines = list(rows(report.summary(report.load(file)[1])).values())
    assert [cells[1] for cells in lines[2:]] == [f"{e['median_ms']:.2f} ms" for e in ours]


# ----------------------------------------------------------------------------------------------------------------------
# Timing


def test_laps_are_the_seconds_of_each_part(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def takes(seconds: float) -> None:
        clock[0] += seconds

    run = timing.laps([partial(takes, 1.0), partial(takes, 0.25)], CPU)
    assert run() == [1.0, 0.25]
    assert timing.stopwatch(partial(takes, 3.0), CPU)() == 3.0


def test_the_host_is_timed_between_synchronisations(monkeypatch):
    clock, log = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def step(name: str, seconds: float) -> None:
        log.append(name)
        clock[0] += seconds

    run = timing.host_watch(
        [partial(step, "a", 1.0), partial(step, "b", 3.0)], synchronise=partial(step, "|", 100.0), queued=3
    )
    assert run() == pytest.approx((1 + 3 + 1) / 3)
    assert run() == pytest.approx((3 + 1 + 3) / 3)
    assert "".join(log) == "|aba||bab|"


class FakeCuda:
    """As much of ``torch.cuda`` as is used, on a clock that only steps move; names that torch lacks cannot be faked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log, self.mode = 0.0, [], 0
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = fake.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return (end.time - self.time) * 1e3

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self.name = "side"

            def wait_stream(self, other: Stream) -> None:
                fake.log.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                fake.takes(2e-3, "replay")

        @contextlib.contextmanager
        def within(name: str) -> Iterator[None]:
            fake.log.append(f"{name} begins")
            yield
            fake.log.append(f"{name} ends")

        main = Stream(torch.device("cuda"))
        main.name = "main"
        properties = SimpleNamespace(L2_cache_size=7, multi_processor_count=3, shared_memory_per_block=5)
        names = {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "stream": lambda stream: within(stream.name),
            "graph": lambda graph, pool: within(f"capture in {pool}"),
            "current_stream": lambda device: main,
            "graph_pool_handle": lambda: "the pool",
            "synchronize": lambda device: None,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (11, 13),
            "get_device_properties": lambda device: properties,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "_sleep": lambda cycles: self.log.append(cycles),
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        self.properties = properties
        self.gpu = timing.Gpu(torch.device("cuda"))

    def takes(self, seconds: float, name: str) -> None:
        self.now += seconds
        self.log.append(name)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_sizes_of_a_gpu(fake):
    assert (fake.gpu.free_bytes, fake.gpu.l2_bytes, fake.gpu.on_chip_bytes) == (11, 7, 15)
    fake.properties.shared_memory_per_block_optin = 20
    assert timing.Gpu(torch.device("cuda")).on_chip_bytes == 60


def test_laps_on_a_gpu(fake):
    run = timing.laps([partial(fake.takes, 1.0, "a"), partial(fake.takes, 0.25, "b")], fake.gpu.device)
    assert run() == pytest.approx([1.0, 0.25])


def test_a_graph_is_captured_after_a_warm_up_on_a_stream_of_its_own(fake):
    replay = fake.gpu.capture([partial(fake.takes, 0.0, "a"), partial(fake.takes, 0.0, "b")])
    assert fake.log == [
        "side waits for main",
        *("side begins", "a", "b", "a", "b", "side ends"),
        "main waits for side",
        *("capture in the pool begins", "a", "b", "capture in the pool ends"),
    ]
    replay()
    assert fake.log[-1] == "replay"


def test_the_device_starts_when_everything_is_queued(fake):
    """Four runs of 0.3 ms fill a sample of 1 ms; queueing them took 1.2 ms, so it is held back for 0.1 + 2.4 ms."""
    watch = fake.gpu.queue_watch(partial(fake.takes, 0.3e-3, "run"))
    fake.log.clear()
    assert watch() == pytest.approx(0.3e-3)
    assert fake.log == [round(2e9 * 2.5e-3), "run", "run", "run", "run"]


def test_waiting_for_the_device_is_noticed(fake):
    def asks() -> None:
        assert fake.mode == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    def fails() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    assert fake.gpu.is_awaited_by(asks)
    assert not fake.gpu.is_awaited_by(lambda: None)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fake.gpu.is_awaited_by(fails)
    assert fake.mode == 0


def test_quartiles():
    assert timing.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2, 3, 4)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def test_update_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "out.json"
    arguments = ["--networks", "2x30", "--optimizers", "sgd", "--rounds", "2", "--json", str(file), "--device", "cpu"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["machine"]["command"] == "python -m gradprom_ext.bench " + " ".join(arguments)
    names = [r["contestant"] for r in content["results"]]
    assert names[: len(HOST_BACKENDS)] == [f"gradprom {backend}" for backend in HOST_BACKENDS]
    assert names[-4:] == ["plain optimizer", "memory", "reads", "host"]
    assert all(len(r["samples_ms"]) == 2 and r["parameters"] == 60 for r in content["results"])

    assert command.main(["--table", str(file)]) == 0
    table = capsys.readouterr().out
    block = printed[printed.index("**2x30") : printed.index("\n\nwritten")]
    assert block in table


def test_a_file_of_any_name(tmp_path):
    """On a terminal that cannot show it: nothing measured is lost."""
    arguments = [
        "--networks",
        "2x3",
        "--optimizers",
        "sgd",
        "--rounds",
        "2",
        "--device",
        "cpu",
        "--json",
        "[/b] Ü.json",
    ]
    shown = subprocess.run(
        [sys.executable, "-m", "gradprom_ext.bench", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "written: [/b] \\xdc.json" in shown.stdout
    assert report.load(tmp_path / "[/b] Ü.json")[1]


def test_step_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "out.json"
    sizes = [
        "--blocks",
        "1",
        "--width",
        "4",
        "--vr-width",
        "4",
        "--batch",
        "2",
        "--size",
        "8",
        "--rounds",
        "2",
        "--device",
        "cpu",
    ]
    assert command.main(["--what", "step", "--variants", "eager", "channels_last", *sizes, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(file.read_text())
    by_name = {(r["variant"], r["contestant"]): r for r in content["results"]}
    floor = by_name["eager", "two backwards"]
    ours = by_name["eager", f"gradprom {HOST_BACKENDS[0]}"]
    expected = sorted(a / b - 1 for a, b in zip(ours["samples_ms"], floor["samples_ms"], strict=True))
    assert ours["overhead_percent"] == pytest.approx(100 * sum(expected) / 2, abs=1e-3)
    assert "over its two-backward floor" in printed
    if ("eager", "TorchJD PCGrad") in by_name:  # its gradients are not laid out as the parameters, and it says nothing
        assert ("channels_last", "TorchJD PCGrad") not in by_name
        assert "TorchJD PCGrad is left out of channels_last: it steps with another gradient" in printed
        assert content["left_out"] == [line for line in printed.splitlines() if " is left out of " in line]


def test_warm_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warm, "REST", 0.0)
    file = tmp_path / "out.json"
    arguments = ["--what", "warm", "--networks", "2x30", "--rounds", "2", "--device", "cpu", "--json", str(file)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    entries = json.loads(file.read_text())["results"]
    ours = f"gradprom {HOST_BACKENDS[0]}, "
    for optimizer, functions in (("sgd", ["opt.step()", "gradprom_()", "gradient_stats()"]), ("adamw", ["opt.step()"])):
        names = [*(ours + f for f in functions), "plain optimizer"]
        here = [(e["contestant"], e["is_host"]) for e in entries if e["optimizer"] == optimizer]
        assert here == [*((n, False) for n in names), *((n, True) for n in names), ("memory", False)]
    assert all(len(e["samples_us"]) == 2 and e["threads"] == 1 and e["parameters"] == 60 for e in entries)
    assert command.main(["--table", str(file)]) == 0
    table = capsys.readouterr().out
    assert printed[printed.index("**2x30") : printed.index("\n\n**2x30, 60 parameters in 2 tensors, adamw")] in table


def test_a_warm_step_is_the_quickest_of_a_few_with_its_number_of_threads(monkeypatch):
    clock, log, threads = [0.0], [], []
    durations = iter([9.0, 9.0, 3.0, 2.0, 4.0])
    monkeypatch.setattr(warm.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(warm.time, "sleep", lambda seconds: log.append("rest"))
    monkeypatch.setattr(warm.torch, "set_num_threads", threads.append)

    def one() -> None:
        log.append("step")
        clock[0] += next(durations)

    assert warm.stopwatch(one, threads=2)() == 2.0
    assert log == ["rest", *["step"] * 5]
    assert threads == [2]


def test_warm_results_and_their_table():
    samples = {
        ("gradprom cpu, opt.step()", False, 1): [4e-4, 2e-4, 3e-4],
        ("gradprom cpu, opt.step()", False, 2): [2e-4, 1e-4, 9e-4],
        ("gradprom cpu, opt.step()", True, 1): [5e-5, 5e-5, 6e-5],
        ("memory", False, 1): [1e-4] * 3,
        ("memory", False, 2): [5e-5] * 3,
    }
    results = warm_results("net", 10**6, 3, "sgd", samples)
    first = results[0]
    assert (first.least_us, first.low_us, first.median_us) == pytest.approx((200, 250, 300))
    cells = rows(report.warm_table(results))
    assert cells["gradprom cpu, opt.step()"] == ["200.0", "250.0", "100.0", "150.0", "0.50"]
    assert cells["host: gradprom cpu, opt.step()"] == ["50.0", "50.0", "", "", ""]
    assert cells["a += b"] == ["100.0", "100.0", "50.0", "50.0", "0.50"]


def test_a_wrong_warm_contestant_is_named(monkeypatch):
    wrong = lambda case, inputs, backend: lambda: gp.gradient_stats(inputs.main, inputs.main, backend=backend)  # noqa: E731
    monkeypatch.setattr(warm, "statistics", wrong)
    monkeypatch.setattr(warm, "REST", 0.0)
    results, left_out = warm.measure(update.Case("2x30", "sgd", "fp32"), HOST_BACKENDS[0], 2)
    assert [note.is_failure for note in left_out] == [True, True]
    assert "gradient_stats() is left out of 2x30, sgd, fp32: it measures wrongly" in left_out[0].reason
    assert not any(r.contestant.endswith("gradient_stats()") for r in results)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rounds", "1"], "--rounds must be at least 2, got 1"),
        (["--networks", "resnet51"], "'resnet51' is no set of parameters: choose srresnet, unet, resnet50, a number"),
        (["--networks", "0.1k"], "'0.1k' is no set of parameters"),
        (["--networks", "0x5"], "'0x5' is no set of parameters"),
        (["--batch", "4"], "--batch belongs to --what step, not to --what update"),
        (["--what", "step", "--networks", "unet"], "--networks belongs to --what update and warm, not to --what step"),
        (["--what", "warm", "--precisions", "bf16"], "--precisions belongs to --what update, not to --what warm"),
        (["--what", "step", "--batch", "1"], "--batch must be at least 2, got 1"),
        (["--what", "step", "--variants", "graph", "--device", "cpu"], "--variants graph needs a CUDA device, not cpu"),
        (["--device", "gpu"], "--device gpu is no device; choose cpu, cuda or cuda:INDEX"),
        (["--device", "meta"], "--device meta cannot be timed"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch"),
        (["--json", "."], "--json . is a directory; name a file"),
        (["--table", "absent.json"], "absent.json cannot be read: No such file or directory"),
        (["--table", __file__], "test_bench.py is no result of python -m gradprom_ext.bench"),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert sentence in error


def test_a_failure_of_ours_is_the_exit_status_and_the_rest_is_kept(tmp_path, monkeypatch, capsys):
    kept, _ = update.measure(update.Case("2x3", "sgd", "fp32"), CPU, ["reference"], 2)
    failure = LeftOut("gradprom cpu is left out of 2x3, sgd, fp32: it steps wrongly", True)
    monkeypatch.setattr(update, "measure", lambda *_: (copy.deepcopy(kept), [failure]))
    file = tmp_path / "out.json"
    assert command.main(["--networks", "2x3", "--optimizers", "sgd", "--device", "cpu", "--json", str(file)]) == 1
    assert failure.reason in capsys.readouterr().out
    assert report.load(file)[1] == kept
    assert json.loads(file.read_text())["left_out"] == [failure.reason]
