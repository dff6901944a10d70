"""What every registered entry has to do, whatever it is: a new one is checked by its registration alone."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import gradprom_ext as gp
from models import CRITIC, IP, Networks
from models.critic import PatchCriticOptions
from models.hqgnet import HQGNetOptions
from models.srresnet import SRResNetOptions
from train.data import ImageData, Subset
from train.data.base import UNKNOWN
from train.data.fingerprint import differences, fingerprint
from train.data.phantoms.chest_ct import chest_slice
from train.degradations import Degradation, fixed_seeds, parse
from train.interruption import Stop
from train.outputs.run_folder import RunFolder
from train.strategies import STRATEGIES, Strategy, strategy_class
from train.strategies.auxiliary import AUXILIARIES
from train.strategies.base import Batch, Learner, Terms
from train.training.build import build
from train.training.engine import Cadence, Engine
from train.training.progress import Display

from . import tiny

# --- data sets and degradations ---

SPLITS = ("train", "val", "test")


VIEWS = ((32, 1), (32, 3), (None, 1))


def check_dataset(
    load: Callable[..., ImageData], folder: Path, views: Sequence[tuple[int | None, int]] = VIEWS
) -> None:
    """
    :param load: ``train.data.load`` with everything given but ``size``, ``channels`` and ``cache_dir``.
    :param folder: for caches, empty.
    :param views: size and channels of what is checked.
    """
    for size, channels in views:
        data = load(size=size, channels=channels, cache_dir=folder / "cache")
        assert data.channels == channels
        assert data.title
        assert size is None or data.size == (size, size)
        assert len(data.train)
        assert len(data.test)
        names = [name for split in SPLITS for name in getattr(data, split).names]
        assert len(set(names)) == len(names), "two images of one name get one noise"
        patients = [set(getattr(data, split).patients or ()) for split in SPLITS]
        assert len(set.union(*patients)) == sum(map(len, patients)), "a patient is in two splits"
        for split in SPLITS:
            _check_subset(getattr(data, split), data)
        # From the cache, and decoded anew: the same data, and in the same order.
        for cache in (folder / "cache", folder / f"other-{size}-{channels}"):
            again = load(size=size, channels=channels, cache_dir=cache)
            assert differences(fingerprint(data), fingerprint(again)) == []
        pickle.loads(pickle.dumps(data.test))


def _check_subset(subset: Subset, data: ImageData) -> None:
    assert len(subset.names) == len(subset)
    if subset.labels is not None and len(subset):
        assert subset.labels.dtype == np.int64
        assert UNKNOWN <= subset.labels.min() <= subset.labels.max() < data.num_classes
        assert subset.labels.max() > UNKNOWN, "where no label is known, there are none"
    assert subset.has_masks == bool(data.mask_names) or not len(subset)
    flat = 0
    for i in range(len(subset)):
        image = subset.image(i)
        assert image.dtype == torch.float32
        assert image.shape == (data.channels, *subset.size(i))
        assert 0 <= image.min() <= image.max() <= 1
        flat += bool(image.min() == image.max())
        assert torch.equal(subset.tensor([i])[0], image)
        if subset.has_masks:
            mask = subset.mask(i)
            assert mask.dtype == torch.int64
            assert mask.shape == image.shape[1:]
            assert 0 <= mask.min() <= mask.max() < data.num_mask_classes
            assert torch.equal(subset.masks_tensor([i])[0], mask)
    assert flat <= len(subset) / 2, "most images are of a single value"
    if len(subset) > 1:
        image, chosen = subset.image(1), subset.take([1])
        assert torch.equal(chosen.image(0), image)
        assert chosen.names == subset.names[1:2]
        subset.image(1).zero_()
        subset.tensor([1]).zero_()
        assert torch.equal(subset.image(1), image), "a tensor is the cache's own memory"


def phantoms(n: int = 4, side: int = 48) -> torch.Tensor:
    """``float32 [n, 1, side, side]`` in [0, 1]."""
    slices = [chest_slice(seed, diseased=bool(seed % 2), size=side) for seed in range(n)]
    return torch.from_numpy(np.stack(slices))[:, None].float() / 255


def check_degradation(degrade: Degradation, *, remedied: bool = True) -> None:
    """
    :param remedied: whether the classical remedy has to be better than none, as it has to be for a single degradation.
        In some chains it is not: noise that is told to a remedy is less after a later reduction.
    """
    clean = phantoms()
    seeds = fixed_seeds(degrade, ["a", "b", "c", "d"])
    before, state, numpys = clean.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    degraded = degrade(clean, seeds)
    assert torch.equal(clean, before), "the clean image was changed"
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"
    assert np.array_equal(np.random.get_state()[1], numpys), "NumPy's global random state was used"

    assert degraded.dtype == torch.float32
    assert degraded.shape == (4, 1, 48 // degrade.scale, 48 // degrade.scale)
    assert degraded.isfinite().all()
    assert not torch.equal(degraded, clean)
    _check_seeds(degrade, clean, seeds, degraded)
    for image in (torch.zeros(1, 3, 24, 48), torch.ones(1, 3, 24, 48)):
        assert degrade(image, [0]).isfinite().all()

    # The text is the degradation: read back it has the same noise, in this process and in any other.
    for twin in (parse(str(degrade)), pickle.loads(pickle.dumps(degrade))):
        assert twin == degrade
        assert hash(twin) == hash(degrade)
        assert str(twin) == str(degrade)
        assert fixed_seeds(twin, ["a", "b", "c", "d"]) == seeds
        assert torch.equal(twin(clean, seeds), degraded)
    assert degrade.noise_level is None or degrade.noise_level >= 0
    _check_remedy(degrade, clean, degraded, gains=remedied)


def _check_seeds(degrade: Degradation, clean: torch.Tensor, seeds: Sequence[int], degraded: torch.Tensor) -> None:
    assert torch.equal(degrade(clean, seeds), degraded)
    assert torch.equal(degrade(clean.flip(0), seeds[::-1]), degraded.flip(0)), "an image's place in the batch matters"
    assert torch.equal(degrade(clean[2:3], seeds[2:3]), degraded[2:3]), "other images of the batch matter"
    one = clean[:1].expand(2, -1, -1, -1)
    first, second = degrade(one, [1, 2])
    if not torch.equal(first, second):  # there is something random in it
        assert len({seed for name in "abcdef" for seed in fixed_seeds(degrade, [name])}) == 6


def _check_remedy(degrade: Degradation, clean: torch.Tensor, degraded: torch.Tensor, *, gains: bool) -> None:
    restored = degrade.restore_batch(degraded)
    if degrade.remedy is None:
        assert restored is None
        assert degrade.remedies == {}
        assert degrade.restore(degraded[0]) is None
        return
    assert restored is not None
    assert restored.shape == clean.shape
    assert restored.dtype == torch.float32
    for image, alone in zip(restored, map(degrade.restore, degraded), strict=True):
        assert alone is not None
        assert torch.equal(alone, image), "the remedy depends on other images or on chance"
    shown = degraded
    if degrade.scale > 1:  # what has to be beaten is each pixel shown as a block
        shown = degraded.repeat_interleave(degrade.scale, 2).repeat_interleave(degrade.scale, 3)
    assert restored.isfinite().all()
    assert not gains or (psnr(restored, clean) > psnr(shown, clean)).all(), "the remedy does not restore"
    for remedy in degrade.remedies.values():
        for name, value in vars(degrade).items():
            if isinstance(value, float):
                assert repr(value) in repr(remedy.settings), f"{remedy.title} lacks {name}, and a cache is keyed by it"


def psnr(images: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """In dB per image, written out."""
    error = (images.double().clamp(0, 1) - clean.double()).pow(2).mean((1, 2, 3))
    return -10 * error.log10()


# --- networks ---


def check_network(registry: Networks, name: str, *, options: Any = None, side: int = 32) -> None:
    """
    :param options: of the network; its defaults where nothing is given.
    :param side: of the images it is tried on.
    """
    kind = registry.options(name)
    assert kind() == kind(), "options are compared"
    assert kind.__dataclass_params__.frozen, "options do not change"
    with pytest.raises(TypeError):
        registry.build(name, object(), channels=1)
    scales = _scales(name, options) if registry is IP else [1]
    shape = {"scale": scales[0]} if registry is IP else {} if registry is CRITIC else {"num_classes": 3}
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(registry.build(name, options, channels=1, **shape))
    state = networks[1].state_dict()
    assert all(torch.equal(value, state[key]) for key, value in networks[0].state_dict().items()), "seeded weights"
    _check_own_loss(networks[1], registry.terms(name), scales[0], side)
    _check_learning(networks[0], side, last_is_zero=registry is IP)
    for channels, scale in [(1, scales[0]), (3, scales[0]), *((1, scale) for scale in scales[1:])]:
        more = {"scale": scale} if registry is IP else shape
        network = registry.build(name, options, channels=channels, **more)
        # A network may work at the size of its output: half the side where that is larger saves most of the time.
        _check_answers(registry, network, channels, scale, side if scale == 1 else side // 2)


def _scales(name: str, options: Any) -> list[int]:
    """By what factors an IP enlarges; one that it does not know, it refuses by that name."""

    def knows(scale: int) -> bool:
        try:
            IP.build(name, options, channels=1, scale=scale)
        except ValueError as error:
            assert f"not {scale}" in str(error)
            return False
        return True

    return [scale for scale in (1, 2, 3, 4) if knows(scale)]


def _check_own_loss(network: nn.Module, terms: Mapping[str, float], scale: int, side: int) -> None:
    """A network that owns its loss has what the registry says of it, and enhances as in evaluation."""
    if not hasattr(network, "training_loss"):
        assert not terms, "terms are those of a training_loss"
        return
    generator = torch.Generator().manual_seed(1)
    degraded = torch.rand(2, 1, side, side, generator=generator)
    clean = torch.rand(2, 1, side * scale, side * scale, generator=generator)
    with torch.no_grad():
        found = network.training_loss(degraded, clean)
        torch.testing.assert_close(found.enhanced, network(degraded))
    assert {each: term.weight for each, term in found.terms.items()} == dict(terms)
    assert all(loss.shape == () and loss > 0 for loss in (found.main, *(term.loss for term in found.terms.values())))


def _check_learning(network: nn.Module, side: int, *, last_is_zero: bool) -> None:
    """Every parameter gets a gradient from what the network is trained with: a loss of its own, where it has one, else
    the mean squared error. The second time, where a last layer that begins at zero passes nothing on."""
    images = torch.rand(2, 1, side, side + 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    given = (images, images.detach().flip(0)) if getattr(network, "takes_guide", False) else (images,)
    optimizer = torch.optim.SGD(network.train().parameters(), lr=1e-2)
    for _ in range(1 + last_is_zero):
        optimizer.step()
        optimizer.zero_grad()
        output = network(*given)
        loss = (output - 0.3).square().mean()
        if hasattr(network, "training_loss"):
            loss = network.training_loss(images, torch.full_like(output, 0.3)).total()
        loss.backward()
    silent = [name for name, each in network.named_parameters() if each.grad is None or not each.grad.any()]
    # A shift in front of a normalization has no effect, and the gradient that says so is lost in rounding.
    assert all(name.endswith("bias") for name in silent), f"these parameters never learn: {silent}"
    assert images.grad is not None and images.grad.abs().sum() > 0, "a gradient reaches the images"


@torch.no_grad()
def _check_answers(registry: Networks, network: nn.Module, channels: int, scale: int, side: int) -> None:
    images = torch.rand(2, channels, side, side + 4, generator=torch.Generator().manual_seed(1))
    expected = {
        "IP network": (2, channels, side * scale, (side + 4) * scale),
        "VR network": (2, 3),
        "segmentation network": (2, 3, side, side + 4),
        "critic": (2, 1, side // 8, (side + 4) // 8),
    }[registry.kind]
    whole = network.eval()(images)
    assert whole.shape == expected and whole.isfinite().all()
    last = network(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network(images[1:]), whole[1:], rtol=1e-3, atol=1e-4, msg="other images matter")


# --- strategies ---

RECOGNIZING = [name for name in STRATEGIES if strategy_class(name).trains_ip or strategy_class(name).uses_auxiliaries]
"""The strategies of an IP, of VRs or of both; what else there is has tests of its own (``test_masked.py``)."""
LR = 1e-2
WEIGHTS = {"dia": 0.7, "seg": 0.3}
GATES: dict[str, Callable[[float], float]] = {
    "hard": lambda cosine: float(cosine >= 0),
    "soft": lambda cosine: max(0.0, cosine),
    "always": lambda cosine: 1.0,
    "never": lambda cosine: 0.0,
    "project": lambda cosine: 1.0,
}


class Combination:
    """What theta is stepped with, written out from the papers for flat gradients; it remembers what they remember.

    :param name: of the strategy.
    """

    def __init__(self, name: str) -> None:
        self.kind = strategy_class(name)
        self.name = name
        self.usual = 0.0  # the cosine that Gradient Vaccine expects

    def __call__(
        self, main: torch.Tensor, auxs: Sequence[torch.Tensor], weights: Sequence[float]
    ) -> tuple[torch.Tensor, list[float | None]]:
        """
        :returns: the combination, and the gate of each auxiliary where the strategy is one of gates.
        """
        if isinstance(self.kind.gate, str):
            return self._gated(main, auxs, weights)
        (aux,) = (weight * each for weight, each in zip(weights, auxs, strict=True))
        return getattr(self, f"_{self.name}")(main, aux), [None]

    def _gated(
        self, main: torch.Tensor, auxs: Sequence[torch.Tensor], weights: Sequence[float]
    ) -> tuple[torch.Tensor, list[float | None]]:
        combined, gates = main.clone(), []
        for aux, own in zip(auxs, weights, strict=True):
            weight = own
            if self.kind.aux_cap is not None:
                weight = min(weight, (self.kind.aux_cap * main.norm() / aux.norm()).item())
            cosine = nn.functional.cosine_similarity(main, aux, dim=0).item()
            gates.append(GATES[self.kind.gate](cosine))
            through = aux
            if self.kind.gate == "project" and cosine < 0:
                through = aux - torch.dot(main, aux) / torch.dot(main, main) * main
            combined += gates[-1] * weight * through
        return combined, gates

    def _pcgrad(self, main: torch.Tensor, aux: torch.Tensor) -> torch.Tensor:
        dot = torch.dot(main, aux)
        if dot >= 0:
            return main + aux
        return main - dot / aux.dot(aux) * aux + aux - dot / main.dot(main) * main

    def _gradvac(self, main: torch.Tensor, aux: torch.Tensor) -> torch.Tensor:
        cosine = nn.functional.cosine_similarity(main, aux, dim=0).item()
        new = [main, aux]
        if cosine < self.usual:
            rise = self.usual * math.sqrt(1 - cosine**2) - cosine * math.sqrt(1 - self.usual**2)
            rise /= math.sqrt(1 - self.usual**2)
            new = [g + g.norm() * rise / h.norm() * h for g, h in ((main, aux), (aux, main))]
        self.usual = 0.99 * self.usual + 0.01 * cosine
        return new[0] + new[1]

    def _mgda(self, main: torch.Tensor, aux: torch.Tensor) -> torch.Tensor:
        share = float(torch.dot(aux - main, aux) / (main - aux).dot(main - aux))
        share = min(1.0, max(0.0, share))
        return share * main + (1 - share) * aux


def batches(n: int) -> list[Batch]:
    """In double precision, so that two computations can be compared closely."""
    generator, others = (torch.Generator().manual_seed(seed) for seed in (5, 6))
    made = []
    for _ in range(n):
        clean = torch.rand(4, 1, 8, 8, generator=generator, dtype=torch.float64)
        degraded = clean + 0.1 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        labels = torch.randint(2, (4,), generator=generator)
        masks = torch.randint(2, (4, 8, 8), generator=generator)
        guide = torch.rand(clean.shape, generator=others, dtype=torch.float64)
        made.append(Batch(clean, degraded, labels, masks, guide))
    return made


def fresh_networks(
    auxiliaries: Sequence[str], name: str = "gradprom", *, ip_aux: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """By the keys of their roles, without dropout.

    :param name: of the strategy that they are for.
    :param ip_aux: where it is given, IP owns its loss.
    """
    torch.manual_seed(3)
    if ip_aux is None:
        ip = IP.build("srresnet", SRResNetOptions(blocks=1, features=4), channels=1).double()
        nn.init.normal_(ip.tail.weight, std=0.05)  # a head start: at zero, the first cosine is the last layer's alone
    else:
        ip = IP.build("tiny-staged", channels=1).double()
    vr = tiny.tiny_vr(channels=1, num_classes=2).double()
    vr[5] = nn.Identity()
    networks = {"ip": ip, "vr": vr, "seg": tiny.tiny_seg(channels=1, num_classes=2).double()}
    roles = {"ip", *(AUXILIARIES[each].role.key for each in auxiliaries)}
    if strategy_class(name).guided:
        roles.add("critic")
        networks["ip"] = IP.build("hqgnet", HQGNetOptions(width=2, levels=1), channels=1).double()
        nn.init.normal_(networks["ip"].enhancer.last.weight, std=0.5)
        networks["critic"] = CRITIC.build("patch", PatchCriticOptions(width=2, blocks=1), channels=1).double()
    return {key: network for key, network in networks.items() if key in roles}


def make_strategy(
    name: str,
    networks: Mapping[str, nn.Module],
    auxiliaries: Sequence[str] = ("dia",),
    *,
    weights: Sequence[float] | None = None,
    terms: Terms | None = None,
    gate: str | None = None,
) -> Strategy:
    """A strategy with these networks, and constant learning rates."""
    kind = strategy_class(name)
    data = tiny.with_masks(tiny.image_data())
    strategy = kind([AUXILIARIES.build(each, data=data) for each in auxiliaries], terms)
    learners = {}
    for role in strategy.roles:
        network = networks[role.key]
        if role.kind == "main":
            aux_weight = tuple(WEIGHTS[each] for each in auxiliaries) if weights is None else tuple(weights)
            own = strategy.gate() if callable(strategy.gate) else strategy.gate
            if strategy.aux_weight is not None and weights is None:
                aux_weight = (strategy.aux_weight,) * len(auxiliaries)
            if not strategy.auxiliaries:
                aux_weight = ()
            aux_weight = (*(IP.terms("tiny-staged")[each] for each in strategy.ip_aux), *aux_weight)
            optimizer = gp.GradPromAdam(
                network.parameters(),
                lr=LR,
                gate=gate or own,
                aux_weight=aux_weight or 1.0,
                aux_cap=strategy.aux_cap,
            )
        else:
            optimizer = torch.optim.Adam(network.parameters(), lr=LR, fused=True)
        learners[role.key] = Learner(network, optimizer, LambdaLR(optimizer, lambda step: 1.0))
    strategy.equip(learners)
    return strategy


def target_loss(auxiliary: str, output: torch.Tensor, batch: Batch, said: torch.Tensor | None = None) -> torch.Tensor:
    """``L_VR`` written out.

    :param said: of the clean image, in the unsupervised loss.
    """
    if said is not None:
        return ((output.exp() / output.exp().sum(1, True) - said.exp() / said.exp().sum(1, True)) ** 2).mean()
    logs = output - output.logsumexp(1, keepdim=True)
    if auxiliary == "dia":
        return -logs[range(4), batch.labels].mean()
    truth = nn.functional.one_hot(batch.masks, 2).permute(0, 3, 1, 2).to(output)
    entropy = -(logs * truth).sum(1).mean()
    share = logs.exp()
    both, all_ = (share * truth).sum((2, 3)), (share + truth).sum((2, 3))
    return entropy + (1 - (2 * both + 1e-5) / (all_ + 1e-5)).mean()


def check_strategy(
    name: str, auxiliaries: Sequence[str], terms: Terms | None = None, *, ip_aux: Sequence[str] | None = None
) -> list[float]:
    """
    :param auxiliaries: those it is given.
    :param ip_aux: where it is given, IP owns its loss, and these parts of it are auxiliaries.
    :returns: the gates that were seen.
    """
    terms = (terms or Terms())._replace(ip_aux=tuple(ip_aux or ()))
    if strategy_class(name).guided:
        gates = _check_unpaired_definition(name, auxiliaries, terms)
    else:
        gates = _check_definition(name, auxiliaries, terms, ip_aux)
    _check_nan(name, auxiliaries, terms, ip_aux)
    if strategy_class(name).trains_ip and not ip_aux:
        _check_without_weight(name, auxiliaries, ip_aux)
    return gates


def _flat(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([grad.flatten() for grad in grads])


def own_losses(ip: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The losses of IP written out, weighted: ``main``, and those that are IP's own."""
    enhanced = ip(batch.degraded)
    error = enhanced - batch.clean
    if isinstance(ip, tiny.TinyStaged):
        return {
            "main": error.abs().mean(),
            "rec": 0.25 * (ip.first(batch.degraded) - batch.clean).abs().mean(),
            "flat": 0.5 * (error.mean((2, 3)) ** 2).mean(),
        }
    return {"main": torch.mean(error**2)}


def _check_definition(name: str, auxiliaries: Sequence[str], terms: Terms, ip_aux: Sequence[str] | None) -> list[float]:
    """Against autograd and torch.optim: the combination written out, every loss from a forward pass of its own."""
    networks = fresh_networks(auxiliaries, ip_aux=ip_aux)
    own = copy.deepcopy(networks)
    terms = terms._replace(epochs=1, pretrain_epochs=1)
    strategy = make_strategy(name, networks, auxiliaries, terms=terms)
    update, unsupervised = strategy.terms.vr_update, strategy.uses_auxiliaries and terms.vr_loss == "unsupervised"
    combination, teachers = Combination(name), dict(own)
    assert {role.key for role in strategy.roles} <= set(networks)
    optimizers = {key: torch.optim.Adam(network.parameters(), lr=LR) for key, network in own.items()}
    declared = {each.name for each in strategy.measures}
    names, gates = [*strategy.ip_aux, *(auxiliaries if strategy.uses_auxiliaries else ())], []
    several = len(names) > 1 or bool(strategy.ip_aux)
    phases = strategy.phases(12)
    assert phases[-1].name == "train" and all(set(phase.moves) <= set(networks) for phase in phases)
    for phase in phases:
        strategy.begin(phase)
        strategy.enter(phase)
        with_ip = "ip" in phase.moves
        for key, network in own.items():
            network.train(key in phase.moves)
        if with_ip and update != "fixed":
            teachers = {key: copy.deepcopy(network).eval() for key, network in own.items()}
        for batch in batches(phase.iterations):
            found = strategy.update(strategy.losses(batch))
            assert set(found) <= declared
            images = batch.clean if terms.train_on == "clean" or len(phases) > 1 else batch.degraded
            theta = list(own["ip"].parameters())
            if with_ip:
                parts = own_losses(own["ip"], batch)
                loss = sum(part for each, part in parts.items() if each not in strategy.ip_aux)
                main = torch.autograd.grad(loss, theta, retain_graph=True, allow_unused=True)
                main = [torch.zeros_like(p) if g is None else g for p, g in zip(theta, main, strict=True)]
                assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
            auxs = []
            for each in strategy.ip_aux if with_ip else ():
                weight = IP.terms("tiny-staged")[each]
                assert found[f"aux_loss_{each}"].item() == pytest.approx(parts[each].item() / weight, rel=1e-9)
                found_grads = torch.autograd.grad(parts[each] / weight, theta, retain_graph=True, allow_unused=True)
                auxs.append(
                    _flat([p * 0 if g is None else g for p, g in zip(theta, found_grads, strict=True)]).detach()
                )
                cosine = nn.functional.cosine_similarity(_flat(main), auxs[-1], dim=0).item()
                assert found[f"cosine_{each}"].item() == pytest.approx(cosine, abs=1e-6)
            for each in auxiliaries if strategy.uses_auxiliaries else ():
                suffix, key = f"_{each}" if several else "", AUXILIARIES[each].role.key
                phi = list(own[key].parameters())
                given = own["ip"](batch.degraded) if with_ip else images
                with torch.no_grad():
                    said = teachers[key](batch.clean) if with_ip and unsupervised else None
                advisor = teachers[key] if with_ip and update == "ema" else own[key]
                # The order of these two matters to nothing but the batch statistics, which one of them moves alone.
                loss = target_loss(each, advisor(given), batch, said)
                assert found[f"aux_loss{suffix}"].item() == pytest.approx(loss.item(), rel=1e-5)
                if with_ip:
                    reached = torch.autograd.grad(loss, theta, retain_graph=True, allow_unused=True)
                    auxs.append(
                        _flat([p * 0 if g is None else g for p, g in zip(theta, reached, strict=True)]).detach()
                    )
                    cosine = nn.functional.cosine_similarity(_flat(main), auxs[-1], dim=0).item()
                    assert found[f"cosine{suffix}"].item() == pytest.approx(cosine, abs=1e-6)
                if advisor is not own[key]:
                    loss = target_loss(each, own[key](given.detach()), batch, said)
                if key in phase.moves:
                    for p, g in zip(phi, torch.autograd.grad(loss, phi), strict=True):
                        p.grad = g
            if with_ip:
                weights = [IP.terms("tiny-staged")[each] for each in strategy.ip_aux]
                weights += [strategy.aux_weight or WEIGHTS[each] for each in auxiliaries if each in names]
                combined, opened = combination(_flat(main), auxs, weights)
                for each, gate in zip(names, opened, strict=True):
                    suffix = f"_{each}" if several else ""
                    if gate is not None:
                        gates.append(gate)
                        assert found[f"gate{suffix}"].item() == pytest.approx(gate, abs=1e-6)
                for p, g in zip(theta, combined.split([p.numel() for p in theta]), strict=True):
                    p.grad = g.view_as(p)
                assert not found["skipped"]
            for key in phase.moves:
                optimizers[key].step()
            if with_ip and update == "ema":
                for key, slow in teachers.items():
                    for mean, value in zip(slow.state_dict().values(), own[key].state_dict().values(), strict=True):
                        # In double precision, as these networks are; a count of batches is copied.
                        mean.copy_(0.99 * mean + 0.01 * value if mean.is_floating_point() else value)
    for key, network in (networks | strategy.companions).items():
        twin = own[key] if key in own else teachers[key.removesuffix("_teacher")]
        for (what, value), other in zip(network.state_dict().items(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(
                value, other, rtol=2e-5, atol=1e-7, msg=lambda text, what=what, key=key: f"{key}.{what}: {text}"
            )
    return gates


def _check_unpaired_definition(name: str, auxiliaries: Sequence[str], terms: Terms | None) -> list[float]:
    """The same for a strategy that has no pairs: the step of HQG-Net, from losses written out. What takes part in the
    step of theta as a fixed function is a copy here, whose parameters and statistics nothing reads afterwards."""
    networks = fresh_networks(auxiliaries, name)
    own = copy.deepcopy(networks)
    strategy = make_strategy(name, networks, auxiliaries, terms=(terms or Terms())._replace(epochs=1))
    auxiliaries = [each.name for each in strategy.auxiliaries]
    optimizers = {key: torch.optim.Adam(network.parameters(), lr=LR) for key, network in own.items()}
    keys = {each: AUXILIARIES[each].role.key for each in auxiliaries}
    (phase,) = strategy.phases(12)
    assert set(phase.moves) == {"ip", "critic", *keys.values()}
    strategy.begin(phase)
    strategy.enter(phase)
    combination, gates = Combination(name), []

    def step(key: str, loss: torch.Tensor) -> None:
        optimizers[key].zero_grad()
        loss.backward()
        optimizers[key].step()

    def fixed(key: str) -> nn.Module:
        return copy.deepcopy(own[key])

    for batch in batches(phase.iterations):
        found = strategy.update(strategy.losses(batch))
        assert set(found) <= {each.name for each in strategy.measures}
        theta = list(own["ip"].parameters())
        described = own["ip"].guidance(batch.guide).mean
        images = own["ip"].enhancer(batch.degraded, described)
        real = batch.guide.clone().requires_grad_()
        answers = own["critic"](real)
        (slope,) = torch.autograd.grad(answers.mean((1, 2, 3)).sum(), real, create_graph=True)
        told = (1 + (-answers).exp()).log().mean() + (1 + own["critic"](images.detach()).exp()).log().mean()
        assert found["critic_loss"].item() == pytest.approx(told.item(), rel=1e-6)
        step("critic", told + (slope**2).sum((1, 2, 3)).mean() / 2)
        for each, key in keys.items():
            step(key, target_loss(each, own[key](images.detach()), batch))

        loss = (1 + (-fixed("critic")(images)).exp()).log().mean()
        error = images - batch.degraded
        corners = [error[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        for weight, signs in ((0.1, (1, 1, 1, 1)), (1, (1, -1, 1, -1)), (1, (1, 1, -1, -1)), (1, (1, -1, -1, 1))):
            band = sum(sign * corner for sign, corner in zip(signs, corners, strict=True)) / 2
            loss = loss + weight * band.abs().mean()
        loss = loss + (fixed("ip").guidance(images).mean - described.detach()).abs().mean()
        differences = [
            (fixed(key)[:-1](images) - fixed(key)[:-1](batch.degraded)).abs().mean() for key in keys.values()
        ]
        pairs = zip(fixed("ip").enhancer.encoder(images), fixed("ip").enhancer.encoder(batch.degraded), strict=True)
        differences += [(a - b.detach()).abs().mean() for a, b in pairs]
        loss = loss + sum(differences) / len(differences)
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        main = _flat(torch.autograd.grad(loss, theta, retain_graph=True))
        auxs = []
        for each, key in keys.items():
            suffix = f"_{each}" if len(keys) > 1 else ""
            task = target_loss(each, fixed(key)(images), batch)
            assert found[f"aux_loss{suffix}"].item() == pytest.approx(task.item(), rel=1e-5)
            auxs.append(_flat(torch.autograd.grad(task, theta, retain_graph=True)))
        combined, opened = combination(main, auxs, [WEIGHTS[each] for each in auxiliaries])
        for each, gate in zip(auxiliaries, opened, strict=True):
            assert found[f"gate_{each}" if len(keys) > 1 else "gate"].item() == pytest.approx(gate, abs=1e-6)
            gates.append(gate)
        for p, g in zip(theta, combined.split([p.numel() for p in theta]), strict=True):
            p.grad = g.view_as(p)
        optimizers["ip"].step()
    for key in strategy.networks:
        for (what, value), other in zip(
            networks[key].state_dict().items(), own[key].state_dict().values(), strict=True
        ):
            torch.testing.assert_close(
                value, other, rtol=2e-5, atol=1e-7, msg=lambda text, what=what, key=key: f"{key}.{what}: {text}"
            )
    return gates


def _everything(strategy: Strategy) -> dict[str, Any]:
    companions = {key: (network.state_dict(),) for key, network in strategy.companions.items()}
    return copy.deepcopy(
        companions
        | {
            key: (learner.network.state_dict(), learner.optimizer.state_dict()["state"], learner.schedule.last_epoch)
            for key, learner in strategy.learners.items()
        }
    )


def _moved(strategy: Strategy) -> dict[str, Any]:
    """Without the schedules: they count iterations, those that were skipped among them."""
    return {key: value[:2] for key, value in _everything(strategy).items()}


def _check_nan(name: str, auxiliaries: Sequence[str], terms: Terms, ip_aux: Sequence[str] | None) -> None:
    """In every phase, once the optimizers have their state: networks, batch statistics and optimizers stay as they are,
    and the step after it is as if there had been no NaN."""
    terms = terms._replace(epochs=1, pretrain_epochs=1)
    disturbed, other = (
        make_strategy(name, fresh_networks(auxiliaries, name, ip_aux=ip_aux), auxiliaries, terms=terms)
        for _ in range(2)
    )
    good, bad, after = batches(3)
    nan = Batch(bad.clean * math.nan, bad.degraded * math.nan, bad.labels, bad.masks, bad.guide)
    for phase in disturbed.phases(1):
        for strategy in (disturbed, other):
            strategy.begin(phase)
            strategy.enter(phase)
            strategy.update(strategy.losses(good))
        before = _moved(disturbed)
        found = disturbed.update(disturbed.losses(nan))
        assert found.get("skipped", True)
        assert _same(_moved(disturbed), before), f"NaN moved something in phase {phase.name}"
        for strategy in (disturbed, other):
            strategy.update(strategy.losses(after))
        assert _same(_moved(disturbed), _moved(other)), f"NaN left something in phase {phase.name}"
        assert not _same(_moved(disturbed), before), "the test must be able to see a step"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _check_without_weight(name: str, auxiliaries: Sequence[str], ip_aux: Sequence[str] | None) -> None:
    """With lambda 0, IP is trained as if there were no VR; without pairs, as if the gate were closed for good."""
    advised, alone = (fresh_networks(auxiliaries, name, ip_aux=ip_aux) for _ in range(2))
    guided = strategy_class(name).guided
    pair = (
        make_strategy(name, advised, auxiliaries, weights=[0.0] * len(auxiliaries)),
        make_strategy(name if guided else "ip-only", alone, auxiliaries, gate="never" if guided else None),
    )
    for strategy in pair:
        strategy.begin(strategy.phases(1)[-1])
        strategy.enter(strategy.phases(1)[-1])
        for batch in batches(4):
            strategy.update(strategy.losses(batch))
    for one, other in zip(advised["ip"].parameters(), alone["ip"].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def check_checkpoints(name: str, aux: str, folder: Path, **changes: Any) -> None:
    """Stopped in the midst of each phase and taken up by objects that know nothing of it, a run ends as a whole one.

    :param changes: of the settings.
    """

    def make(where: str) -> Engine:
        guided = {"ip": "hqgnet", "ip.width": 2, "ip.levels": 1} if strategy_class(name).guided else {}
        settings = tiny.config(strategy=name, aux=aux, seg="tiny", **guided | changes)
        (folder / where).mkdir(exist_ok=True)
        data = tiny.with_masks(tiny.image_data())
        degrade = parse(settings.degradation.task, sigma=settings.degradation.sigma)
        experiment = build(settings, data, degrade, device=torch.device("cpu"))
        return Engine(experiment, RunFolder(folder / where), Cadence(log_every=1), begun=0.0)

    class StopAt(Stop):
        def __init__(self, engine: Engine, step: int) -> None:
            self.engine, self.step = engine, step

        @property
        def requested(self) -> bool:  # type: ignore[override]
            return self.engine.step >= self.step

    display = Display(Console(quiet=True))
    whole = make("whole")
    assert whole.train(display, Stop())
    ends = itertools.accumulate(phase.iterations for phase in whole.experiment.phases)
    for end in ends:
        first = make("parts")
        if (folder / "parts" / "checkpoint.pt").exists():
            first.resume()
        assert not first.train(display, StopAt(first, end - 1))
    torch.manual_seed(99)  # another process would be in another random state
    last = make("parts")
    last.resume()
    assert last.train(display, Stop())
    assert tiny.digits(last.log.path) == tiny.digits(whole.log.path)
    assert _same(_everything(last.strategy), _everything(whole.strategy))
