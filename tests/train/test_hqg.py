"""HQG-Net's losses and its step: examples worked by hand. That the step is its definition is a contract of strategies
(``contracts.check_strategy``)."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import gradprom_ext as gp
from train import losses
from train.degradations import Gaussian, Untouched, parse
from train.errors import RunError
from train.features import penultimate
from train.strategies import strategy_class
from train.strategies.auxiliary import Diagnosis
from train.strategies.base import Batch, Learner, Terms, Unpaired
from train.strategies.hqg import HQG, Snapshot, called, fixed
from train.training.build import build

from .contracts import LR, batches, fresh_networks, make_strategy
from .test_strategies import assert_same_weights, enter, step
from .tiny import config, image_data, tiny_vr

CPU = torch.device("cpu")


# --- losses ---


def test_haar_by_hand():
    """The block [[1, 2], [3, 6]]: 6, -2, -3 and 1; the energy, 50, stays."""
    image = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    assert losses.haar(image).flatten().tolist() == [6, -2, -3, 1]
    image = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses.haar(image).square().sum(), image.square().sum())
    shifted = losses.haar(image + 0.3) - losses.haar(image)
    torch.testing.assert_close(shifted[:, :, 0], torch.full((2, 3, 3, 4), 0.6))
    torch.testing.assert_close(shifted[:, :, 1:], torch.zeros(2, 3, 3, 3, 4), atol=1e-6, rtol=0)


def test_haar_is_that_of_pywavelets():
    pywt = pytest.importorskip("pywt")
    image = torch.rand(2, 3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    average, (rows, columns, diagonal) = pywt.dwt2(image.numpy(), "haar")
    theirs = np.stack([average, columns, rows, diagonal], 2)
    np.testing.assert_allclose(losses.haar(image).numpy(), theirs, atol=1e-12)


@pytest.mark.parametrize(("keeps", "offset", "checkered"), [("details", 0.1, 1.0), ("brightness", 1.0, 0.1)])
def test_wavelet_loss_holds_on_to_what_it_is_told(keeps: str, offset: float, checkered: float):
    image = torch.rand(1, 1, 4, 4)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).tile(2, 2)
    assert losses.wavelet_loss(image + 0.3, image, keeps=keeps).item() == pytest.approx(0.6 * offset, rel=1e-5)
    assert losses.wavelet_loss(image + 0.2 * checks, image, keeps=keeps).item() == pytest.approx(
        0.4 * checkered, rel=1e-4
    )


def test_adversarial_losses_by_hand():
    zero = torch.zeros(2, 1, 3, 3)
    assert losses.adversarial_loss(zero).item() == pytest.approx(0.693147, abs=1e-6)
    assert losses.critic_loss(zero, zero).item() == pytest.approx(2 * 0.693147, abs=1e-6)
    assert losses.critic_loss(zero + 3, zero - 3) < 0.1 < 5 < losses.critic_loss(zero - 3, zero + 3)
    assert losses.adversarial_loss(zero + 3) < 0.1 < 3 < losses.adversarial_loss(zero - 3)
    assert losses.adversarial_loss(zero - 1e4).item() == 1e4  # no logarithm of 0


def test_r1_of_a_linear_critic():
    """D(z) = 3 z_0 + 4 z_1, whatever z: (9 + 16) / 2. The batch does not add up, nor do the patches."""
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    images = torch.rand(5, 1, 1, 2, requires_grad=True)
    logits = (images * weight).sum((1, 2, 3)).view(5, 1, 1, 1)
    penalty = losses.r1_penalty(logits, images)
    assert penalty.item() == pytest.approx(12.5)
    assert losses.r1_penalty(logits.expand(5, 1, 2, 3), images).item() == pytest.approx(12.5)
    penalty.backward()
    assert weight.grad.tolist() == pytest.approx([3, 4])


def test_kl_by_hand():
    def kl(mean: float, variance: float) -> float:
        return losses.kl_loss(torch.tensor([[mean]]), torch.tensor([[variance]]).log()).item()

    assert kl(0, 1) == 0
    assert kl(1, 1) == pytest.approx(0.5)
    assert kl(0, 4) == pytest.approx(0.806853, abs=1e-6)


def test_targets_get_no_gradient():
    ours, target = (torch.rand(2, 3, requires_grad=True) for _ in range(2))
    (losses.feature_loss([ours], [target]) + losses.consistency_loss(ours, target)).backward()
    assert ours.grad is not None and target.grad is None
    pair = [torch.zeros(2), torch.zeros(4)], [torch.full((2,), 1.0), torch.full((4,), -3.0)]
    assert losses.feature_loss(*pair) == 2


# --- parts of the step ---


def test_penultimate_features():
    from models import SEG, VR

    images = torch.rand(2, 1, 32, 32)
    for network, last in (
        (VR.build("resnet18", channels=1, num_classes=3).eval(), lambda net: net.fc),
        (SEG.build("unet", channels=1, num_classes=3).eval(), lambda net: net.final_conv),
        (tiny_vr(channels=1, num_classes=2).eval(), lambda net: net[-1]),
    ):
        with penultimate(network) as seen:
            output = network(images)
        torch.testing.assert_close(last(network)(seen[0]), output)
        network(images)
        assert len(seen) == 1, "it still listens"
    with pytest.raises(ValueError, match="no layer with parameters"), penultimate(nn.ReLU()):
        pass


def test_a_fixed_network_passes_a_gradient_to_the_images_alone():
    network = fresh_networks(["dia"])["vr"].train()
    before = copy.deepcopy(network.state_dict())
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    made = fixed(network, images)
    made.sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(network(images), made)


class Scalar(nn.Module):
    """phi, whatever the image."""

    def __init__(self, phi: float) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.tensor(phi))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.phi - images.mean()


class HalfSquare(Diagnosis):
    """L_task = (phi - theta)^2 / 2."""

    def __init__(self) -> None:
        self.num_classes = 2

    def loss(self, output, batch):
        return output.square() / 2

    def measure(self, output, batch):
        return {"accuracy": output.detach()}


class Theta(nn.Module):
    """The enhanced image is theta everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.theta.expand_as(images)


@pytest.mark.parametrize(("hyper", "expected"), [("first-order", -1.5), ("unrolled", -1.125)])
def test_bilevel_gradient_by_hand(hyper: str, expected: float):
    """theta = 1, phi = 3, beta = 1/4: phi moves to 2.5. The gradient there is theta - phi = -1.5 to first order, and
    (theta - phi)(1 - 1/4) = -1.125 through the step."""
    weights = Unpaired(adversarial_weight=0, wavelet_weight=0, feature_weight=0, hyper=hyper)
    strategy = HQG([HalfSquare()], Terms(unpaired=weights))
    networks = {"ip": Theta(), "vr": Scalar(3.0), "critic": nn.Conv2d(1, 1, 1)}
    optimizers = {
        "ip": gp.GradPromSGD(networks["ip"].parameters(), lr=1.0, gate="always", aux_weight=1.0),
        "vr": torch.optim.SGD(networks["vr"].parameters(), lr=0.25),
        "critic": torch.optim.SGD(networks["critic"].parameters(), lr=0.1),
    }
    strategy.equip({k: Learner(n, optimizers[k], LambdaLR(optimizers[k], lambda _: 1.0)) for k, n in networks.items()})
    enter(strategy)
    images = torch.full((1, 1, 2, 2), 0.5)
    found = step(strategy, Batch(images, images, torch.tensor([0]), guide=images))
    assert networks["vr"].phi.item() == 2.5
    assert found["accuracy"] == 2.0  # of VR before it moved
    assert found["aux_loss"].item() == pytest.approx(1.5**2 / 2)
    assert networks["ip"].theta.item() == pytest.approx(1.0 - expected)


def test_unrolled_is_the_derivative_of_the_whole_step():
    """Against finite differences, with a network that has batch statistics."""
    networks = fresh_networks(["dia"], "hqg")
    strategy = enter(make_strategy("hqg", networks, terms=Terms(unpaired=Unpaired(hyper="unrolled"))))
    (batch,) = batches(1)
    strategy.losses(batch)
    (auxiliary,) = strategy.auxiliaries
    point, direction = batch.degraded, batch.guide - 0.5

    def value(shift: float) -> torch.Tensor:
        strategy._enhanced = (point + shift * direction).requires_grad_()
        return strategy._unrolled(auxiliary)

    loss = value(0.0)
    (slope,) = torch.autograd.grad(loss, strategy._enhanced)
    h = 1e-5
    numeric = (value(h) - value(-h)) / (2 * h)
    assert (slope * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-5)
    plain = called(networks["vr"], dict(networks["vr"].named_parameters()), point)
    assert not torch.isclose(auxiliary.loss(plain, batch), loss)
    # VR's own step, in place and in between, changes nothing of it.
    strategy._enhanced = point.clone().requires_grad_()
    again = strategy._unrolled(auxiliary)
    strategy._move_vr(auxiliary, point)
    torch.testing.assert_close(torch.autograd.grad(again, strategy._enhanced)[0], slope, rtol=1e-12, atol=0)


def run(name: str = "hqg", n: int = 3, spoil=lambda batch: batch, **options) -> dict[str, nn.Module]:
    networks = fresh_networks(["dia"], name)
    strategy = enter(make_strategy(name, networks, **options))
    for batch in batches(n):
        step(strategy, spoil(batch))
    return networks


def test_an_unrolled_step_moves_theta_elsewhere():
    """And nothing else: critic and VR take the same steps."""
    first, unrolled = (
        run(n=1, gate="always", terms=Terms(unpaired=Unpaired(hyper=h))) for h in ("first-order", "unrolled")
    )
    assert not torch.equal(first["ip"].enhancer.last.weight, unrolled["ip"].enhancer.last.weight)
    for key in ("critic", "vr"):
        assert_same_weights(first[key], unrolled[key], rtol=0, atol=0)


def test_clean_images_are_never_read():
    networks = run()
    blind = run(spoil=lambda batch: dataclasses.replace(batch, clean=batch.clean * math.nan))
    for key, network in networks.items():
        assert_same_weights(network, blind[key], rtol=0, atol=0)


def test_guides_are_read():
    for key, network in run().items():
        other = run(spoil=lambda batch: dataclasses.replace(batch, guide=batch.guide.flip(0)))[key]
        assert not all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_a_gate_that_is_closed_is_enhancement_alone():
    """And the weight of the task is the same whether a gate lets a gradient through always or because it fits."""
    closed, weightless = run(gate="never"), run(weights=[0.0])
    assert_same_weights(closed["ip"], weightless["ip"], rtol=1e-9, atol=1e-12)
    always = run(gate="always")
    assert not torch.equal(always["ip"].guide, always["ip"].guide + 1)
    pairs = zip(closed["ip"].parameters(), always["ip"].parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("where", ["guide", "degraded"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_moves_where_a_loss_is_not_finite(where: str, value: float):
    """One pixel of one image: critic and VR have moved before theta's gradient is known, and must be taken back."""
    networks = fresh_networks(["dia"], "hqg")
    strategy = enter(make_strategy("hqg", networks))
    first, second = batches(2)
    step(strategy, first)
    before = copy.deepcopy({key: network.state_dict() for key, network in networks.items()})
    states = copy.deepcopy([each.optimizer.state_dict()["state"] for each in strategy.learners.values()])
    spoiled = getattr(second, where).clone()
    spoiled[2, 0, 3, 4] = value
    found = step(strategy, dataclasses.replace(second, **{where: spoiled}))
    assert found["skipped"] == 1
    for key, network in networks.items():
        for name, now in network.state_dict().items():
            assert torch.equal(now, before[key][name]), f"{key}.{name}"
    for own, learner in zip(states, strategy.learners.values(), strict=True):
        for place, state in learner.optimizer.state_dict()["state"].items():
            for name, now in state.items():
                assert torch.equal(torch.as_tensor(now), torch.as_tensor(own[place][name])), name


def test_a_loss_of_vr_that_is_not_finite_stops_critic_and_theta_too():
    """Also where its gradient is finite."""
    networks = fresh_networks(["dia"], "hqg")
    strategy = enter(make_strategy("hqg", networks, gate="never"))
    (auxiliary,) = strategy.auxiliaries
    before = copy.deepcopy(networks)
    auxiliary.loss = lambda output, batch: output.sum() + math.nan  # type: ignore[method-assign]
    assert step(strategy, batches(1)[0])["skipped"] == 1
    for key, network in networks.items():
        assert_same_weights(network, before[key], rtol=0, atol=0)


def test_a_snapshot_forgets_states_that_were_not_there():
    """Moments that a first step has made begin at zero again."""
    network = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, fused=True)
    learner = Learner(network, optimizer, LambdaLR(optimizer, lambda _: 1.0))
    start = copy.deepcopy(network)
    for skipped, inputs in ((1, [1.0, 1.0]), (0, [1.0, -2.0])):
        before = Snapshot([learner])
        network(torch.tensor([inputs])).sum().backward()
        optimizer.step()
        before.restore_if(torch.tensor(skipped))
        optimizer.zero_grad()
    other = torch.optim.Adam(start.parameters(), lr=LR)
    start(torch.tensor([[1.0, -2.0]])).sum().backward()
    other.step()
    assert_same_weights(network, start)


def test_more_inner_steps_move_vr_further_on():
    one, two = (run(n=1, terms=Terms(unpaired=Unpaired(inner_steps=steps))) for steps in (1, 2))
    assert not torch.equal(one["vr"][0].weight, two["vr"][0].weight)
    assert int(two["vr"][1].num_batches_tracked) == 2
    for a, b in zip(one["critic"].parameters(), two["critic"].parameters(), strict=True):
        assert torch.equal(a, b)


def test_kl_is_a_term_of_a_variational_network_alone():
    from models import IP
    from models.hqgnet import HQGNetOptions

    networks = fresh_networks(["dia"], "hqg")
    assert "kl" not in step(enter(make_strategy("hqg", networks)), batches(1)[0])
    networks["ip"] = IP.build("hqgnet", HQGNetOptions(width=2, levels=1, variational=True), channels=1).double()
    assert step(enter(make_strategy("hqg", networks)), batches(1)[0])["kl"] > 0


@pytest.mark.parametrize(("weight", "least", "most"), [(1.0, 0.05, 0.5), (10.0, -0.02, 0.02)])
def test_dark_images_become_brighter_without_pairs(weight: float, least: float, most: float):
    """Of 0.35 on average, with guides of 0.65: from the identity, with the critic alone to say so. A tenfold weight of
    the wavelet loss holds the images where they are."""
    from models import CRITIC
    from models.critic import PatchCriticOptions

    networks = fresh_networks([], "hqg-only")
    nn.init.zeros_(networks["ip"].enhancer.last.weight)
    networks["critic"] = CRITIC.build("patch", PatchCriticOptions(width=4, blocks=1), channels=1).double()
    strategy = enter(make_strategy("hqg-only", networks, terms=Terms(unpaired=Unpaired(wavelet_weight=weight))))
    generator = torch.Generator().manual_seed(0)
    gains = []
    for _ in range(80):
        dark, bright = torch.rand(2, 8, 1, 8, 8, generator=generator, dtype=torch.float64)
        dark, bright = 0.2 + 0.3 * dark, 0.45 + 0.4 * bright
        step(strategy, Batch(dark * math.nan, dark, torch.zeros(8, dtype=torch.long), guide=bright))
        gains.append((strategy._enhanced.detach() - dark).mean().item())
    assert least < np.mean(gains) < most


def test_any_ip_learns_without_pairs():
    """One that takes no guide has no consistency to keep."""
    networks = fresh_networks(["dia"], "hqg") | {"ip": fresh_networks(["dia"])["ip"]}
    found = step(enter(make_strategy("hqg", networks)), batches(1)[0])
    assert "consistency" not in found and found["feature"] > 0


# --- a run ---

HQG_NET = {"strategy": "hqg", "ip": "hqgnet", "ip.width": 2, "ip.levels": 1}


def test_guide_of_inference_is_that_of_training_images_of_high_quality():
    experiment = build(config(**HQG_NET), image_data(), Gaussian(0.1), device=CPU)
    network = experiment.strategy.networks["ip"]
    assert not network.guide.any()
    experiment.settle()
    guides = experiment.crops.guides.tensor()
    with torch.no_grad():
        expected = network.describe(guides).mean.mean(0)
    torch.testing.assert_close(network.guide, expected)


def test_the_critic_has_a_rate_and_betas_of_its_own():
    experiment = build(config(**HQG_NET, critic_lr=0.5), image_data(), Gaussian(0.1), device=CPU)
    group = experiment.strategy.learners["critic"].optimizer.param_groups[0]
    assert group["initial_lr"] == 0.5 and group["betas"] == (0.5, 0.999)
    assert experiment.strategy.learners["vr"].optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    experiment = build(config(**HQG_NET, optimizer="sgd"), image_data(), Gaussian(0.1), device=CPU)
    assert type(experiment.strategy.learners["critic"].optimizer) is torch.optim.SGD


@pytest.mark.parametrize(
    ("changes", "task", "message"),
    [
        (
            {"ip.levels": 3, "crop": 12},
            "denoise",
            "--crop 12 does not fit --ip hqgnet, which needs a multiple of 8 and ",
        ),
        ({"ip.levels": 3, "crop": 8}, "denoise", "at least 16; give --crop 16"),
        ({}, "none", "tiny does not say which of them are of high quality"),
        ({"strategy": "ip-only"}, "none", "^--strategy ip-only compares images with clean ones"),
        ({"batch_size": 8}, "denoise", "--batch-size 8 exceeds the 6 training images"),
    ],
)
def test_what_does_not_fit(changes: dict, task: str, message: str):
    settings = config(**HQG_NET | changes)
    with pytest.raises(RunError, match=message):
        build(settings, image_data(), parse(task), device=CPU)


def test_first_weights_of_another_width(tmp_path):
    """Shapes are listed, and nothing is loaded; those of the same width are taken, with their guide."""
    from safetensors.torch import save_file

    from models import IP
    from models.hqgnet import HQGNetOptions

    def saved(width: int):
        network = IP.build("hqgnet", HQGNetOptions(width=width, levels=1), channels=1)
        torch.nn.init.ones_(network.guide)
        save_file({f"ip.{name}": value for name, value in network.state_dict().items()}, tmp_path / f"{width}")
        return {**HQG_NET, "ip_weights": tmp_path / f"{width}"}

    with pytest.raises(
        RunError, match=r"misshapen: ip.guidance.head.weight \(\[3, 1, 3, 3\] there, \[2, 1, 3, 3\] here"
    ):
        build(config(**saved(3)), image_data(), Gaussian(0.1), device=CPU)
    experiment = build(config(**saved(2)), image_data(), Gaussian(0.1), device=CPU)
    assert experiment.strategy.networks["ip"].guide.eq(1).all()


def test_what_is_measured(tmp_path):
    from train.experiment import do_run

    result = do_run(config(**HQG_NET, task="illumination", out=tmp_path / "run"))
    header, *rows = (result.folder / "steps.csv").read_text().splitlines()
    assert header == (
        "step,phase,loss,adversarial,wavelet,feature,consistency,kl,critic_loss,r1,aux_loss,accuracy,cosine,gate,"
        "aux_norm,main_norm,skipped,lr,images_per_s,memory_mib"
    )
    for row in rows:
        cells = dict(zip(header.split(","), row.split(","), strict=True))
        assert cells.pop("kl") == "" and cells["skipped"] == "0"
        loss, *parts = (float(cells[n]) for n in ("loss", "adversarial", "wavelet", "feature", "consistency"))
        assert loss == pytest.approx(sum(parts), rel=1e-5)
    assert 0 <= result.metrics["gate_open_share"] <= 1 and result.metrics["vr"] == "tiny"


def test_settings_reach_the_strategy():
    settings = config(**HQG_NET, wavelet_weight=3.0, keeps="brightness", hyper="unrolled", inner_steps=2)
    terms = build(settings, image_data(), Gaussian(0.1), device=CPU).strategy.terms.unpaired
    assert terms == Unpaired(wavelet_weight=3.0, keeps="brightness", hyper="unrolled", inner_steps=2)
    assert {"critic", "critic_lr", "r1_weight"} <= settings.concerned
    assert not {"critic", "critic_lr", "r1_weight"} & config().concerned
    assert "aux" not in config(**HQG_NET | {"strategy": "hqg-only"}).concerned
    assert strategy_class("hqg-only").guided


def test_untouched_is_no_part_of_a_chain():
    assert parse("none") == Untouched() and str(Untouched()) == "none"
    with pytest.raises(RunError, match="none does nothing, and stands alone"):
        parse("none+gaussian:0.1")
    image = torch.rand(1, 1, 4, 4)
    assert torch.equal(Untouched()(image, [0]), image)
    assert F.mse_loss(Untouched()(image, [1]), image) == 0
