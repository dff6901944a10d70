"""The examples: each runs as a user runs it, and does what it says, by GradProm written out with torch.optim."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "problem")
#: What an example needs beside the library; its test skips itself without.
NEEDS = {"with_accelerate": "accelerate", "with_lightning": "lightning", "with_monai": "ignite"}
RATE, LAMBDA = 3e-3, 0.02  # of most examples


def skip_without(name: str) -> None:
    needed = NEEDS.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f'{needed} is not installed (pip install -e ".[frameworks]")')


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], SimpleNamespace]]:
    """What the file of that name defines, trained in float64: two programs that compute the same round differently, and
    a training at large rates makes much of the difference, the more where it decides a gate."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)

    def load(name: str) -> SimpleNamespace:
        skip_without(name)
        return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))

    yield load
    torch.set_default_dtype(default)


# As a user runs them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_and_tells_of_a_training(name, tmp_path):
    skip_without(name)
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    if name not in NEEDS:
        assert run.stderr == ""
    lines = re.findall(r"PSNR (\S+) dB -> (\S+) dB; the gate was open in (\d+) of (\d+) steps", run.stdout)
    assert lines, run.stdout
    for before, after, opened, steps in lines:
        assert float(after) > float(before) + 5
        assert 0 < int(opened) < int(steps) or "without VR" in run.stdout
    if name == "with_lightning":
        assert "automatic optimization: " in run.stdout
        assert "set self.automatic_optimization = False" in run.stdout


def test_names_hide_no_module():
    """The folder of a script is the first in which Python looks: a `monai.py` there would be MONAI to itself."""
    for name in [*NAMES, "problem"]:
        assert name not in sys.stdlib_module_names
        assert importlib.util.find_spec(name) is None


def test_the_index_has_each_of_them():
    listed = re.findall(r"^\| \[`(\w+)\.py`\]\((\w+)\.py\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert all(text == link for text, link in listed)
    assert sorted(text for text, _ in listed) == NAMES


# By an independent oracle ---------------------------------------------------------------------------------------------


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


def combine(
    params: Sequence[Tensor], main: Tensor, aux: Sequence[Tensor], weights: Sequence[float], decide: Callable
) -> list[float]:
    """Puts GradProm's sum into ``.grad`` of ``params``, by autograd.

    :returns: the gate of each auxiliary.
    """
    main_grads = torch.autograd.grad(main, params, retain_graph=True)
    total, gates = [g.clone() for g in main_grads], []
    for loss, weight in zip(aux, weights, strict=True):
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        a, b = flat(main_grads), flat(grads)
        gates.append(float(decide(float(a @ b / a.norm() / b.norm()))))
        if gates[-1]:
            total = [t + weight * g for t, g in zip(total, grads, strict=True)]
    for p, g in zip(params, total, strict=True):
        p.grad = g
    return gates


def by_hand(
    *,
    batch_size: int = 8,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = lambda ip: torch.optim.AdamW(ip.parameters(), lr=RATE),
    vr_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = lambda vr: torch.optim.AdamW(vr.parameters(), lr=RATE),
    weight: Callable[[int], float] = lambda step: LAMBDA,
    decide: Callable[[float], bool] = lambda cosine: cosine >= 0,
    before: Callable[[int, nn.Module, torch.optim.Optimizer], None] = lambda step, ip, opt: None,
    after: Callable[[nn.Module], None] = lambda ip: None,
) -> tuple[nn.Module, list[float]]:
    """The loop of the examples without this library. ``before`` and ``after`` are called around every step."""
    import problem

    ip, vr = problem.networks()
    opt, vr_opt = optimizer(ip), vr_optimizer(vr)
    batches, gates = problem.loader(batch_size), []
    for _ in range(problem.EPOCHS):
        for degraded, clean, label, _ in batches:
            before(len(gates), ip, opt)
            enhanced = ip(degraded)
            aux = cross_entropy(vr(enhanced), label)
            params = [p for p in ip.parameters() if p.requires_grad]
            vr_grads = torch.autograd.grad(aux, list(vr.parameters()), retain_graph=True)
            gates += combine(params, mse_loss(enhanced, clean), [aux], [weight(len(gates))], decide)
            for p, g in zip(vr.parameters(), vr_grads, strict=True):
                p.grad = g
            opt.step()
            vr_opt.step()
            after(ip)
    return ip, gates


def distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of two weights."""
    with torch.no_grad():
        return max(float((p - q).abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def assert_same(found: nn.Module, expected: nn.Module, atol: float = 1e-4) -> None:
    import problem

    assert distance(problem.networks()[0], expected) > 100 * atol, "weights that hardly moved say nothing"
    assert distance(found, expected) < atol


def numbers(gates: Sequence[Any]) -> list[float]:
    return [float(gate) for gate in gates]


def test_plain_loop(example):
    train = example("plain_loop").train
    ip, gates = train()
    expected, expected_gates = by_hand()
    assert gates == expected_gates
    assert_same(ip, expected)
    alone, _ = train(gate="never")
    assert_same(alone, by_hand(decide=lambda cosine: False)[0])


@pytest.mark.parametrize("name", ["compiled_models", "activation_checkpointing", "with_lightning", "with_monai"])
def test_the_loop_is_the_plain_one(example, name):
    """What surrounds it changes nothing."""
    module = example(name)
    if name == "compiled_models":
        ip, gates = module.train("aot_eager")
        ip = ip._orig_mod
    elif name == "activation_checkpointing":
        (_, _, kept), (ip, gates, again) = module.train(False), module.train(True)
        image = 8 * 16 * 16 * torch.get_default_dtype().itemsize  # bytes of a batch of one channel
        # The input of each convolution, which for the last two is what the ReLU before them returned, and its weights.
        weights = sum(p.nbytes for p in ip.parameters() if p.ndim > 1)
        assert kept == 33 * image + weights
        assert again == image
    elif name == "with_lightning":
        model = module.Denoiser()
        module.trainer().fit(model, module.loader())
        ip, gates = model.ip, model.gates
    else:
        ip, gates = module.train([])
    expected, expected_gates = by_hand()
    assert numbers(gates) == expected_gates
    assert_same(ip, expected)


def test_reading_statistics(example, capsys):
    ip, table = example("reading_statistics").train()
    cosines: list[float] = []
    expected, gates = by_hand(decide=lambda cosine: cosines.append(cosine) or cosine >= 0)
    assert_same(ip, expected)
    torch.testing.assert_close(table[:, 0], torch.tensor(cosines, dtype=torch.float64), rtol=0, atol=2e-3)
    assert table[:, 1].tolist() == gates
    first = re.search(r"epoch 0: .*mean cosine (\S+), gate open (\d+)%", capsys.readouterr().out)
    assert float(first[1]) == pytest.approx(sum(cosines[:16]) / 16, abs=2e-3)
    assert int(first[2]) == pytest.approx(100 * sum(gates[:16]) / 16, abs=0.51)


def test_several_auxiliaries(example):
    """The first two steps, with a segmenter that begins with the same weights."""
    import problem

    module = example("several_auxiliaries")
    torch.manual_seed(3)
    ip, gates = module.train()
    torch.manual_seed(3)
    other, vr = problem.networks()
    segmenter = nn.Conv2d(1, 2, 5, padding=2)
    opt = torch.optim.AdamW(other.parameters(), lr=RATE)
    aux_opt = torch.optim.AdamW([*vr.parameters(), *segmenter.parameters()], lr=RATE)
    batches, expected = problem.loader(), []
    for _ in range(problem.EPOCHS):
        for degraded, clean, label, mask in batches:
            enhanced = other(degraded)
            aux = [cross_entropy(vr(enhanced), label), cross_entropy(segmenter(enhanced), mask)]
            learning = [*vr.parameters(), *segmenter.parameters()]
            grads = torch.autograd.grad(sum(aux), learning, retain_graph=True)
            main = mse_loss(enhanced, clean)
            expected.append(combine(list(other.parameters()), main, aux, [0.02, 0.05], lambda cosine: cosine >= 0))
            for p, g in zip(learning, grads, strict=True):
                p.grad = g
            opt.step()
            aux_opt.step()
    assert [gate.tolist() for gate in gates] == expected
    assert {tuple(gate) for gate in expected} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert_same(ip, other)


SGD = {
    "optimizer": lambda ip: torch.optim.SGD(ip.parameters(), lr=0.2, momentum=0.9),
    "vr_optimizer": lambda vr: torch.optim.SGD(vr.parameters(), lr=0.2),
}
"""For what depends on the size of the gradients, which Adam does not."""


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("name", ["micro_batches", "with_accelerate"])
def test_micro_batches(example, name, parts):
    """All are one batch of 16 images."""
    ip, gates = example(name).train(parts)
    expected, expected_gates = by_hand(batch_size=16, **SGD)
    assert gates == expected_gates
    assert_same(ip, expected)


def test_schedulers(example):
    ip, gates, seen = example("schedulers").train()
    steps = len(gates)
    made: list[Any] = []

    def before(step: int, ip: nn.Module, opt: torch.optim.Optimizer) -> None:
        if step == 0:
            made.append(torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=6e-3, total_steps=steps))
        else:
            made[0].step()

    expected, expected_gates = by_hand(weight=lambda step: 0.05 * min(1.0, step / 20), before=before)
    assert gates == expected_gates
    assert_same(ip, expected)
    assert [weight for _, weight in seen[:3]] == pytest.approx([0.0, 0.0025, 0.005])
    assert {weight for _, weight in seen[20:]} == {0.05}
    rates = [rate for rate, _ in seen]
    assert max(rates) == pytest.approx(6e-3, rel=1e-2)
    assert rates.index(max(rates)) not in (0, steps - 1)


def test_ema(example):
    module = example("ema")
    ip, average, _ = module.train()
    means: list[nn.Module] = []

    def after(ip: nn.Module) -> None:
        if not means:
            means.append(copy.deepcopy(ip))  # the average begins with the first weights that it is shown
            return
        with torch.no_grad():
            for mean, p in zip(means[0].parameters(), ip.parameters(), strict=True):
                mean.copy_(0.9 * mean + 0.1 * p)

    expected, _ = by_hand(**SGD, after=after)
    assert_same(ip, expected)
    assert_same(average.module, means[0])
    assert distance(ip, means[0]) > 1e-3, "the average is another network"


@pytest.mark.parametrize("gate", ["hard", "never"])
def test_parameter_groups(example, capsys, gate):
    ip, gates = example("parameter_groups").train(gate)
    start: list[Tensor] = []

    def groups(ip: nn.Module) -> torch.optim.Optimizer:
        ip[:2].requires_grad_(False)
        start.extend(p.clone() for p in ip[0].parameters())
        convolutions = [ip[2], ip[4]]
        return torch.optim.AdamW(
            [{"params": [c.weight for c in convolutions]},
             {"params": [c.bias for c in convolutions], "weight_decay": 0.0}],
            lr=RATE, weight_decay=0.01,
        )  # fmt: skip

    def before(step: int, ip: nn.Module, opt: torch.optim.Optimizer) -> None:
        if step == 32:
            assert all(torch.equal(p, q) for p, q in zip(ip[0].parameters(), start, strict=True))
            ip[:2].requires_grad_(True)
            opt.add_param_group({"params": ip[0].parameters(), "lr": 1e-3})

    decide = (lambda cosine: cosine >= 0) if gate == "hard" else (lambda cosine: False)
    expected, expected_gates = by_hand(optimizer=groups, before=before, decide=decide)
    assert gates == expected_gates
    assert_same(ip, expected)
    assert "epoch 1: learning rates [0.003, 0.003]\n" in capsys.readouterr().out


def test_own_gate(example):
    module = example("own_gate")
    gate = module.SteadyGate()
    ip, gates, cosines = module.train(gate)
    average: list[float] = []
    for cosine in cosines:
        average.append(cosine if not average else 0.9 * average[-1] + 0.1 * cosine)
    assert gates == [float(mean >= 0) for mean in average]
    assert gates != [float(cosine >= 0) for cosine in cosines]
    assert sum(a != b for a, b in pairwise(gates)) < 10
    state = iter(average)
    expected, _ = by_hand(decide=lambda cosine: next(state) >= 0)
    assert_same(ip, expected)

    import gradprom_ext as gp

    saved = gate.state_dict()
    fresh = module.SteadyGate()
    fresh.load_state_dict(saved)
    assert float(fresh.average) == pytest.approx(average[-1])
    # NaN is not remembered.
    stats = gp.gradient_stats([torch.ones(2)], [torch.tensor([1.0, torch.nan])], gate=fresh)
    assert bool(stats.skipped)
    assert float(fresh.average) == pytest.approx(average[-1])
