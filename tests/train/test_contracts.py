"""Every registered entry keeps the contract of its kind; an entry that is registered tomorrow is checked tomorrow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from models import CRITIC, IP, SEG, VR
from models.drunet import DRUNetOptions
from models.iconet import ICONetOptions
from models.srresnet import SRResNetOptions
from models.unet import UNetOptions
from train.data import DATASETS, load
from train.degradations import DEGRADATIONS, Chain, Gaussian, fixed_seeds, parse, stable_seed
from train.strategies import STRATEGIES, strategy_class
from train.strategies.base import Terms

from .contracts import (
    RECOGNIZING,
    check_checkpoints,
    check_dataset,
    check_degradation,
    check_network,
    check_strategy,
    phantoms,
)
from .layouts import SMALL

# --- data sets ---


# Other tests register data sets of their own.
DATA = {name: DATASETS.build(name) for name in DATASETS if DATASETS[name].__module__.startswith("train.")}


@pytest.mark.parametrize("name", [name for name, dataset in DATA.items() if dataset.has_phantoms])
def test_phantoms(name: str, tmp_path: Path) -> None:
    check_dataset(partial(load, name, source="phantom"), tmp_path, views=[(16, 1)])


@pytest.mark.parametrize("name", list(SMALL))
def test_small_data_sets(name: str, tmp_path: Path) -> None:
    root = SMALL[name](tmp_path / "data")
    check_dataset(partial(load, name, root=root, source="real"), tmp_path)


NOT_AT_HAND = {"camus", "lizard"}
"""Whose official files may not be passed on; who has them, tests with them."""


@pytest.mark.parametrize("name", [name for name, dataset in DATA.items() if dataset.folder])
def test_real_data_sets(name: str, shared_data: Callable[..., Path], tmp_path: Path) -> None:
    root = shared_data(DATA[name].folder, *DATA[name].copies, required=name not in NOT_AT_HAND)
    data = load(name, root=root, source="real", size=32, cache_dir=tmp_path / "cache")
    assert data.folder == root


def test_every_data_set_is_checked() -> None:
    """One without phantoms needs a small one in its layout, in ``layouts.SMALL``."""
    unchecked = [name for name, dataset in DATA.items() if not dataset.has_phantoms and name not in SMALL]
    assert unchecked == []


# --- degradations ---

CHAINS = ["blur:1.5+gaussian:0.1", "poisson:30+blur:1.5", "blur:1+downsample:2+poisson:50", "gaussian:0.1+gaussian:0.1"]


@pytest.mark.parametrize("name", list(DEGRADATIONS))
def test_degradations(name: str) -> None:
    check_degradation(DEGRADATIONS.build(name))


@pytest.mark.parametrize("text", ["gaussian:0.3", "downsample:4", "poisson:5", "blur:3", "jpeg:75", "mixture", *CHAINS])
def test_degradations_with_arguments(text: str) -> None:
    check_degradation(parse(text))


PAIRS = list(itertools.product(DEGRADATIONS, repeat=2))
TRIPLES = list(itertools.permutations(["gaussian", "jpeg", "downsample"]))


@pytest.mark.parametrize("names", [*PAIRS, *TRIPLES], ids="+".join)
def test_chains_in_any_order(names: tuple[str, ...]) -> None:
    """Each part is done to what the part before it has left, with the seeds that are documented."""
    chain = parse("+".join(names))
    check_degradation(chain, remedied=False)
    image = phantoms(2)
    seeds = fixed_seeds(chain, ["a", "b"])
    expected = image
    for place, name in enumerate(names):
        own = [stable_seed("part", place, seed) if place else seed for seed in seeds]
        expected = DEGRADATIONS.build(name)(expected, own)
    assert torch.equal(chain(image, seeds), expected)


def test_chain_of_one() -> None:
    check_degradation(Gaussian(0.2))
    assert Chain((Gaussian(0.2),)).remedy == Gaussian(0.2).remedy


# --- networks ---


NARROWER = {"drunet": DRUNetOptions(features=8, blocks=1), "iconet": ICONetOptions(blocks=2, features=16)}
"""Of networks whose usual form takes seconds to make and to train; tests/models counts the parameters of that one."""


@pytest.mark.parametrize(("registry", "name"), [(each, name) for each in (IP, VR, SEG, CRITIC) for name in each])
def test_networks(registry, name: str) -> None:
    check_network(registry, name, options=NARROWER.get(name))


def test_networks_with_other_options() -> None:
    check_network(IP, "srresnet", options=SRResNetOptions(blocks=2, features=6, kernel=5, norm="batch"), side=12)
    check_network(SEG, "unet", options=UNetOptions(features=4, norm="batch"))


# --- strategies ---

AUXILIARY_SETS = [("dia",), ("seg",), ("dia", "seg")]
TERMS = {"vr-only": [Terms(train_on="degraded"), Terms(train_on="clean")]}
# Gates that compare several gradients at once are checked with one auxiliary here, with more in the library's tests.
STRATEGY_CASES = [
    (name, auxiliaries)
    for name in RECOGNIZING
    for auxiliaries in AUXILIARY_SETS
    if isinstance(strategy_class(name).gate, str) or len(auxiliaries) == 1
]


@pytest.mark.parametrize(("name", "auxiliaries"), STRATEGY_CASES)
def test_strategies(name: str, auxiliaries: tuple[str, ...]) -> None:
    for terms in TERMS.get(name, [Terms()]):
        gates = check_strategy(name, auxiliaries, terms)
    if strategy_class(name).uses_auxiliaries and strategy_class(name).gate in ("hard", "soft"):
        assert 0 < sum(gate > 0 for gate in gates) < len(gates), "the test must see the gate open and closed"


@pytest.mark.parametrize(
    ("name", "auxiliaries"), [each for each in STRATEGY_CASES if not strategy_class(each[0]).guided]
)
@pytest.mark.parametrize("ip_aux", [(), ("flat",), ("rec", "flat")], ids=lambda each: "+".join(each) or "none")
def test_an_ip_that_owns_its_loss(name: str, auxiliaries: tuple[str, ...], ip_aux: tuple[str, ...]) -> None:
    if ip_aux and not isinstance(strategy_class(name).gate, str):
        pytest.skip("a gate of several gradients is the library's; test_own_loss.py checks what it is given")
    gates = check_strategy(name, auxiliaries, ip_aux=ip_aux)
    if ip_aux and strategy_class(name).trains_ip and strategy_class(name).gate in ("hard", "soft"):
        assert 0 < sum(gate > 0 for gate in gates) < len(gates), "the test must see the gate open and closed"


@pytest.mark.parametrize("auxiliaries", AUXILIARY_SETS, ids="+".join)
@pytest.mark.parametrize("loss", ["supervised", "unsupervised"])
@pytest.mark.parametrize("update", ["train", "fixed", "ema"])
@pytest.mark.parametrize("start", ["fresh", "clean"])
def test_what_becomes_of_vr(update: str, loss: str, start: str, auxiliaries: tuple[str, ...]) -> None:
    check_strategy("gradprom", auxiliaries, Terms(vr_update=update, vr_loss=loss, vr_start=start))


@pytest.mark.parametrize(("name", "aux"), [(name, "dia") for name in STRATEGIES] + [("frozen", "dia,seg")])
def test_checkpoints(name: str, aux: str, tmp_path: Path) -> None:
    check_checkpoints(name, aux, tmp_path)


@pytest.mark.parametrize("name", ["ip-only", "gradprom", "frozen"])
def test_checkpoints_of_an_ip_that_owns_its_loss(name: str, tmp_path: Path) -> None:
    changes = {"ip": "iconet", "ip.features": 4, "ip.blocks": 1, "ip_aux": "rec", "task": "joint2", "crop": 16}
    check_checkpoints(name, "dia", tmp_path, **changes)
