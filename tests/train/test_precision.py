"""``--precision bf16|fp16``: every strategy computes in 16 bits what it computes in float32, and survives overflows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.hqgnet.network import Description
from train import losses
from train.degradations import Gaussian
from train.precision import DTYPES, MixedPrecision, slowness, widened
from train.run import main
from train.settings.naming import identity
from train.strategies import STRATEGIES, Strategy, strategy_class
from train.training.build import build
from train.training.prepared import alone_settings, clean_settings
from train.training.step_log import read_steps

from .contracts import _moved, _same, check_checkpoints
from .tiny import arguments, config, image_data, name_of

HALVES = ("bf16", "fp16")
PATHS = ("gradprom", "pcgrad", "frozen", "hqg", "hqg-only", "ip-only", "vr-only", "masked")
"""Of all strategies, those that differ in more than their gate."""
CPU = torch.device("cpu")


def make(name: str, precision: str, **changes: Any) -> tuple[Strategy, Any]:
    """A strategy with its networks in float32, and what it is trained on. Nothing in it is random, and no layer is at
    zero, where a gradient would be that of one layer alone."""
    guided = {"ip": "hqgnet", "ip.width": 2, "ip.levels": 1} if strategy_class(name).guided else {}
    settings = config(strategy=name, precision=precision, crop=16, **guided | changes)
    experiment = build(settings, image_data(), Gaussian(0.1), device=CPU)
    torch.manual_seed(5)
    for learner in experiment.strategy.learners.values():
        for module in learner.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.Conv2d) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.05)
    return experiment.strategy, experiment


def iterations(experiment: Any, phase: Any, n: int) -> list[dict[str, float]]:
    """What was measured in the first iterations of a phase."""
    strategy, found = experiment.strategy, []
    strategy.begin(phase)
    strategy.enter(phase)
    for keys in list(experiment.order(phase._replace(iterations=n))):
        measured = strategy.update(strategy.losses(experiment.crops.__getitems__(keys)))
        found.append({key: float(value) for key, value in measured.items()})
    return found


def gradients(strategy: Strategy) -> dict[str, list[torch.Tensor]]:
    """Of every network, and of every auxiliary loss of theta, whatever their scale."""
    found = {
        key: [p.grad.clone() for p in each.network.parameters() if p.grad is not None]
        for key, each in strategy.learners.items()
    }
    if strategy.trains_ip:
        for k, grads in enumerate(strategy.learners["ip"].optimizer.aux_grads):
            found[f"auxiliary {k}"] = [g.clone() for g in grads if g is not None]
    return {key: each for key, each in found.items() if each}


def apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The distance of two gradients, once both have length 1: the angle between them."""
    a, b = (torch.cat([g.flatten().double() for g in each]) for each in (one, other))
    return float((a / a.norm() - b / b.norm()).norm())


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "bf16") for name in STRATEGIES), *((name, "fp16") for name in PATHS)]
)
def test_it_is_float32_within_its_roundings(name: str, precision: str) -> None:
    """A number that is rounded to p bits is wrong by u = 2^-p of itself at most. On its way through L = 9 layers a
    value is rounded some 4 L times (operands and results), at random: a loss is wrong by sqrt(4 L) u = 6 u or so, of
    which four times as much is allowed. Of the places of a ReLU, a share of that order is so near to zero that it
    decides otherwise, and takes its part of a gradient with it: as vectors, gradients are wrong by the root of that
    share. Nothing of it is exactly zero, or the networks were not computed in 16 bits."""
    dtype = DTYPES[precision]  # type: ignore[index]
    assert dtype is not None
    bound = 4 * 6 * torch.finfo(dtype).eps / 2
    turned = math.sqrt(bound / 4)
    (plain, one), (half, other) = (make(name, each) for each in ("fp32", precision))
    if precision == "fp16":
        half.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for phase in one.phases:
        expected, found = (iterations(each, phase, 1)[0] for each in (one, other))
        assert found.keys() == expected.keys() and not found.get("skipped")
        for what, value in expected.items():
            if "loss" in what:
                assert found[what] == pytest.approx(value, rel=bound), what
            if "cosine" in what:
                assert found[what] == pytest.approx(value, abs=turned), what
        reference, computed = gradients(plain), gradients(half)
        assert computed.keys() == reference.keys()
        for what, grads in reference.items():
            assert len(computed[what]) == len(grads), f"{what}: a parameter got no gradient"
            assert 0 < apart(computed[what], grads) < turned, what
        # And a few iterations later, by when a gate may have decided otherwise about a cosine near zero.
        later, now = (iterations(each, phase, 3)[-1] for each in (one, other))
        for what, value in later.items():
            if "loss" in what:
                assert now[what] == pytest.approx(value, rel=10 * bound), what


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("name", PATHS)
def test_layers_are_16_bits_and_losses_are_not(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, experiment = make(name, precision)
    seen: dict[str, set[torch.dtype]] = {}
    given: list[torch.dtype] = []
    for key, learner in strategy.learners.items():
        for module in learner.network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(lambda *args, key=key: seen.setdefault(key, set()).add(args[2].dtype))

    def spied(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def spy(*args: Any, **options: Any) -> torch.Tensor:
            given.extend(x.dtype for x in args if isinstance(x, torch.Tensor) and x.is_floating_point())
            given.extend(x.dtype for y in args if isinstance(y, (list, tuple)) for x in y)
            result = original(*args, **options)
            given.append(result.dtype)
            return result

        return spy

    for each in [name for name in vars(losses) if name.endswith("_loss")]:
        monkeypatch.setattr(losses, each, spied(getattr(losses, each)))
    for each in losses.IMAGE_LOSSES:
        monkeypatch.setitem(losses.IMAGE_LOSSES._factories, each, spied(losses.IMAGE_LOSSES[each]))
    for phase in experiment.phases:
        iterations(experiment, phase, 1)
    assert given and set(given) == {torch.float32}
    # What the critic says of images of high quality is differentiated twice.
    both = {DTYPES[precision], torch.float32}  # type: ignore[index]
    twice = {"critic"} if strategy_class(name).guided else set()
    assert seen == {key: both if key in twice else {DTYPES[precision]} for key in strategy.learners}  # type: ignore[index]
    for learner in strategy.learners.values():
        tensors = [*learner.network.parameters(), *learner.network.buffers()]
        tensors += [x for state in learner.optimizer.state.values() for x in state.values()]
        assert {x.dtype for x in tensors} <= {torch.float32, torch.int64}


def test_the_unrolled_step_is_float32() -> None:
    """VR within the step that is differentiated twice: to the last digit that of a training in float32."""
    (plain, one), (half, other) = (make("hqg", each, hyper="unrolled") for each in ("fp32", "fp16"))
    for strategy, experiment in ((plain, one), (half, other)):
        strategy.enter(experiment.phases[0])
        (keys, *_) = experiment.order(experiment.phases[0])
        batch = experiment.crops.__getitems__(keys)
        strategy._batch, strategy._enhanced = batch, batch.degraded.clone().requires_grad_()  # type: ignore[attr-defined]
        strategy.unrolled = strategy._unrolled(strategy.auxiliaries[0])  # type: ignore[attr-defined]
    assert torch.equal(plain.unrolled, half.unrolled)  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------------------------------
# The scale of float16


@pytest.mark.parametrize("name", PATHS)
def test_an_overflow_skips_the_iteration_and_backs_the_scale_off(name: str) -> None:
    """In every phase of train's own loop: until the scale is low enough nothing has moved, then everything has."""
    strategy, experiment = make(name, "fp16")
    for phase in experiment.phases:
        iterations(experiment, phase, 1)  # the optimizers have their states
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**36, backoff_factor=2.0**-6)
        strategy.precision.scaler = scaler
        before, scale, taken = _moved(strategy), 2.0**36, 0
        (keys, *_) = experiment.order(phase)
        batch = experiment.crops.__getitems__(keys)
        for _ in range(6):
            found = strategy.update(strategy.losses(batch))
            assert all(math.isfinite(float(value)) for key, value in found.items() if "loss" in key)
            if scaler.get_scale() == scale:
                taken += 1
                break
            assert _same(_moved(strategy), before), "a skipped iteration moved something"
            assert found.get("skipped", True)
            scale /= 2**6
            assert scaler.get_scale() == scale
        assert taken and scale < 2.0**36, "the test must see an overflow, and the end of them"
        assert not found.get("skipped") and not _same(_moved(strategy), before)
        after = _moved(strategy)
        assert all(not _same(after[key], before[key]) for key in phase.moves)


@pytest.mark.parametrize("name", [name for name in PATHS if name not in ("ip-only", "vr-only")])
def test_an_overflow_in_one_network_skips_them_all(name: str) -> None:
    """Also where the gradients of theta are finite: networks that learn from one batch learn from it together."""
    strategy, experiment = make(name, "fp16")
    for phase in experiment.phases:
        iterations(experiment, phase, 1)  # the optimizers have their states
        for key in phase.moves:
            if key == "ip":
                continue
            before, scale = _moved(strategy), strategy.precision.scaler.get_scale()  # type: ignore[union-attr]
            parameter = next(strategy.learners[key].network.parameters())
            hook = parameter.register_hook(lambda grad: grad * math.inf)
            (keys, *_) = experiment.order(phase)
            found = strategy.update(strategy.losses(experiment.crops.__getitems__(keys)))
            hook.remove()
            assert found.get("skipped", True), key
            assert _same(_moved(strategy), before), f"an overflow in {key} moved something"
            assert strategy.precision.scaler.get_scale() == scale / 2  # type: ignore[union-attr]


@pytest.mark.parametrize("name", PATHS)
def test_a_scale_is_taken_out_again(name: str) -> None:
    """In float32, a power of two changes no digit of any network; it is seen by whoever forgets it."""
    (plain, one), (scaled, other) = (make(name, "fp32") for _ in range(2))
    scaled.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for phase in one.phases:
        expected, found = (iterations(each, phase, 3) for each in (one, other))
        assert [
            {key: pytest.approx(value, rel=1e-5, abs=1e-5) for key, value in row.items()} for row in expected
        ] == found
    for key, learner in plain.learners.items():
        for a, b in zip(
            learner.network.state_dict().values(), scaled.learners[key].network.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "precision"), [*((name, "fp16") for name in PATHS), ("gradprom", "bf16")])
def test_a_stopped_run_goes_on_bit_for_bit(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scale that has grown and was backed off before the run is stopped."""
    usual = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda device: usual(device, init_scale=2.0**16, growth_interval=1, growth_factor=2.0**12),
    )
    check_checkpoints(name, "dia", tmp_path, precision=precision)
    log = read_steps(tmp_path / "whole" / "steps.csv")
    assert ("scale" in log) == (precision == "fp16")
    if precision == "fp16":
        assert len(set(log["scale"])) >= min(3, len(log["scale"]))


def test_the_rehearsal_leaves_the_scale_alone() -> None:
    strategy, _ = make("gradprom", "fp16")
    assert strategy.precision.scaler is not None
    assert strategy.precision.scaler.state_dict() == torch.amp.GradScaler("cpu").state_dict()


# ----------------------------------------------------------------------------------------------------------------------
# What people see


@pytest.mark.parametrize("precision", HALVES)
def test_a_run_from_the_command_line(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(arguments(precision=precision, out=out)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"on cpu in {precision}" in text
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["precision"] == precision and math.isfinite(metrics["psnr"])
    assert json.loads((out / "config.json").read_text())["training"]["precision"] == precision
    assert main(["--resume", str(out), "--precision", "fp32"]) == 2
    assert "--precision would change" in capsys.readouterr().err


def test_it_is_a_part_of_what_a_run_is() -> None:
    """And float32, which all runs were computed in before there was a choice, has left no trace."""
    plain, half = (identity(config(precision=each), {}, degradation="") for each in ("fp32", "bf16"))
    assert plain == identity(config(), {}, degradation="") != half
    assert name_of(precision="bf16") == name_of().replace("-s0", "-bf16-s0") != name_of()


def test_readers_are_trained_in_float32() -> None:
    """The judge of two runs is one, whatever they were computed in; an IP to begin with is part of its run."""
    settings = config(precision="bf16", size=64)
    assert clean_settings(settings, "dia", 0).training.precision == "fp32"
    assert alone_settings(settings).training.precision == "bf16"


def test_in_float32_nothing_is_touched() -> None:
    plain, image = MixedPrecision(), torch.rand(2)
    assert plain(lambda x: x, image) is image
    assert (plain.parts, plain.measures, plain.measured, plain.scale) == ({}, (), {}, None)


def test_outputs_of_every_kind_are_widened() -> None:
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    found = widened({"a": [half, (half, 3)], "b": Description(half, None)})
    assert isinstance(found["b"], Description) and found["b"].log_variance is None
    assert [x.dtype for x in (found["a"][0], found["a"][1][0], found["b"].mean)] == [torch.float32] * 3
    assert found["a"][0].requires_grad and found["a"][1][1] == 3
    for kept in (torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64)):
        assert widened(kept) is kept


@pytest.mark.parametrize(
    ("precision", "flags", "says"),
    [
        ("fp32", "fma avx2", None),
        ("bf16", "fma avx512f avx512_bf16", None),
        ("bf16", "avx512f amx_bf16", None),
        ("bf16", "fp asimd bf16", None),
        ("bf16", "fma avx2 avx512f", "neither AVX512_BF16 nor AMX"),
        ("fp16", "avx512_fp16", None),
        ("fp16", "fma avx512_bf16 avx512f", "bf16 or fp32 is faster here"),
        ("fp16", "fma avx2", "; fp32 is faster here"),
        ("bf16", None, None),
    ],
)
def test_processors_that_are_slow_at_it_are_named(tmp_path: Path, precision: Any, flags: str | None, says: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    said = slowness(precision, CPU, cpuinfo)
    assert (said is None) if says is None else (said is not None and says in said)
