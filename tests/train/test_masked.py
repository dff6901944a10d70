"""Pre-training: a step against autograd written out, what a run of it leaves behind, and what begins with that."""

from __future__ import annotations

import copy
import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from models import CRITIC
from models.critic import PatchCriticOptions
from train import pretrain, run
from train.degradations import Frepa, FrequencyDisc, ZeroMask, parse
from train.errors import RunError
from train.experiment import do_run
from train.losses import frepa_loss
from train.seeds import stable_seed
from train.strategies.base import Batch, Learner, Terms
from train.strategies.masked import CONSISTENCY_WEIGHT, CRITIC_WEIGHT, METHODS, Masked
from train.training.batches import Crops, Key

from . import tiny
from .contracts import _moved, _same, check_checkpoints

LR = 1e-2
MODES = ("discriminator", "consistency", "both", "none")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def made(mode: str, ip_loss: str = "frepa") -> Masked:
    """In double precision and without dropout, so that two computations can be compared."""
    strategy = Masked(terms=Terms(adversarial=mode, ip_loss=ip_loss, epochs=1))  # type: ignore[arg-type]
    torch.manual_seed(3)
    networks: dict[str, nn.Module] = {"vr": tiny.TinyEncoder(channels=1, num_classes=2)}
    networks["vr"].dropout = nn.Identity()
    for role in strategy.roles[1:]:
        own = strategy.own_network(role, networks, channels=1)
        networks[role.key] = own or CRITIC.build("patch", PatchCriticOptions(width=2, blocks=1), channels=1)
    learners = {}
    for key, network in networks.items():
        network.double()
        optimizer = torch.optim.Adam(network.parameters(), lr=LR, fused=True)
        learners[key] = Learner(network, optimizer, LambdaLR(optimizer, lambda step: 1.0))
    strategy.equip(learners)
    (phase,) = strategy.phases(3)
    strategy.begin(phase)
    strategy.enter(phase)
    return strategy


def batches(n: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)

    def images() -> torch.Tensor:
        return torch.rand(4, 1, 16, 16, generator=generator, dtype=torch.float64)

    return [Batch(images(), images(), torch.zeros(4, dtype=torch.int64), second=images()) for _ in range(n)]


@pytest.mark.parametrize("mode", MODES)
def test_step_is_the_definition(mode: str) -> None:
    strategy = made(mode)
    own = copy.deepcopy(strategy.networks)
    optimizers = {key: torch.optim.Adam(network.parameters(), lr=LR) for key, network in own.items()}
    assert (mode in ("discriminator", "both")) == ("critic" in own)
    assert strategy.second == (mode in ("consistency", "both"))
    for batch in batches(3):
        found = strategy.update(strategy.losses(batch))
        assert set(found) == {each.name for each in strategy.measures}
        embedding = own["vr"].features(batch.degraded)
        decoded = own["decoder"](embedding)
        loss = frepa_loss(decoded, batch.clean)
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        if "critic" in own:
            made_up = own["critic"](decoded)
            loss = loss + CRITIC_WEIGHT * torch.log1p(torch.exp(-made_up)).mean()
            judged = torch.log1p(torch.exp(-own["critic"](batch.clean))).mean()
            judged = judged + torch.log1p(torch.exp(own["critic"](decoded.detach()))).mean()
            critic = torch.autograd.grad(judged, list(own["critic"].parameters()))
        if strategy.second:
            other = own["vr"].features(batch.second)
            apart = [1 - F.cosine_similarity(a, b.detach(), dim=1).mean() for a, b in
                     ((embedding, other), (other, embedding))]  # fmt: skip
            loss = loss + CONSISTENCY_WEIGHT * sum(apart) / 2
            assert found["consistency"].item() == pytest.approx((sum(apart) / 2).item(), rel=1e-6)
        learned = [p for key in ("vr", "decoder") for name, p in own[key].named_parameters() if "last" not in name]
        for p, grad in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            p.grad = grad
        if "critic" in own:
            for p, grad in zip(own["critic"].parameters(), critic, strict=True):
                p.grad = grad
        for optimizer in optimizers.values():
            optimizer.step()
    for key, network in strategy.networks.items():
        for (name, value), twin in zip(network.state_dict().items(), own[key].state_dict().values(), strict=True):
            torch.testing.assert_close(value, twin, rtol=1e-6, atol=1e-8, msg=lambda m, k=key, n=name: f"{k}.{n}: {m}")


def test_the_head_is_never_reached() -> None:
    strategy = made("both")
    before = copy.deepcopy(strategy.networks["vr"].state_dict())
    for batch in batches(2):
        strategy.update(strategy.losses(batch))
    after = strategy.networks["vr"].state_dict()
    assert strategy.untrained == {"vr.last.weight", "vr.last.bias"}
    unmoved = {f"vr.{name}" for name in after if torch.equal(before[name], after[name])}
    assert unmoved == strategy.untrained


@pytest.mark.parametrize("mode", ["both", "none"])
@pytest.mark.parametrize("where", ["clean", "degraded", "second"])
def test_nan_moves_nothing(mode: str, where: str) -> None:
    if mode == "none" and where == "second":
        return
    disturbed, other = made(mode), made(mode)
    good, bad, after = batches(3)
    images = {"clean": bad.clean, "degraded": bad.degraded, "second": bad.second}
    images[where] = images[where] * math.nan  # type: ignore[operator]
    for strategy in (disturbed, other):
        strategy.update(strategy.losses(good))
    before = _moved(disturbed)
    nan = Batch(images["clean"], images["degraded"], bad.labels, second=images["second"])  # type: ignore[arg-type]
    found = disturbed.update(disturbed.losses(nan))
    assert found["skipped"]
    assert _same(_moved(disturbed), before)
    for strategy in (disturbed, other):
        strategy.update(strategy.losses(after))
    assert _same(_moved(disturbed), _moved(other))
    assert not _same(_moved(disturbed), before)


def test_the_critic_learns_to_tell() -> None:
    strategy = made("discriminator")
    first, *_, last = [strategy.update(strategy.losses(batch))["critic_loss"].item() for batch in batches(1) * 30]
    assert last < first


@pytest.mark.parametrize("mode", ["both", "none"])
def test_checkpoints(mode: str, tmp_path: Path) -> None:
    check_checkpoints("masked", "dia", tmp_path, adversarial=mode, ip_loss="frepa")


def test_smaller_images_are_enlarged_first() -> None:
    one, other = made("consistency"), made("consistency")
    (batch,) = batches(1)
    small = replace(batch, degraded=batch.degraded[..., :8, :8], second=batch.second[..., 8:, 8:])
    large = [F.interpolate(each, scale_factor=2, mode="bicubic") for each in (small.degraded, small.second)]
    found = one.update(one.losses(small))
    expected = other.update(other.losses(replace(batch, degraded=large[0], second=large[1])))
    assert _same(found, expected) and not found["skipped"]


def test_the_second_corruption_is_another_one() -> None:
    data = tiny.image_data()
    crops = Crops(data.train, ZeroMask(), crop=8, seed=1, second=True)
    keys = [Key("train", 0, 2), Key("train", 0, 3)]
    batch = crops.__getitems__(keys)
    plain = Crops(data.train, ZeroMask(), crop=8, seed=1).__getitems__(keys)
    assert plain.second is None
    assert torch.equal(plain.degraded, batch.degraded), "the first one must not know of the second"
    assert batch.second is not None and not torch.equal(batch.second, batch.degraded)
    alone = crops.__getitems__(keys[1:])
    assert alone.second is not None and torch.equal(alone.second[0], batch.second[1])
    expected = ZeroMask()(batch.clean[:1], [stable_seed("second noise", 1, *keys[0])])
    assert torch.equal(batch.second[:1], expected)
    assert batch.to(torch.device("cpu")).second is not None


# --- runs ---


def arguments(**changes: object) -> list[str]:
    """Flags of a pre-training of seconds."""
    return tiny.arguments(**{"vr": "tiny-encoder", "crop": 16, "max_steps": 4, **changes})


@pytest.mark.parametrize("method", ["frepa", "mae"])
def test_a_pretraining_ends_with_weights(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pre"
    assert pretrain.main(["--network", "vr", "--method", method, *arguments(out=out)]) == 0, capsys.readouterr().err
    with (out / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert ("critic_loss" in rows[0]) == (method == "frepa"), "the others have no critic unless they are asked to"
    weights = load_file(out / "weights.safetensors")
    assert "vr.first.weight" in weights and "decoder.1.weight" in weights
    assert not [name for name in weights if name.startswith("vr.last")]

    capsys.readouterr()
    begun = tiny.arguments(vr="tiny-encoder", vr_weights=out / "weights.safetensors", max_steps=1, out=tmp_path / "run")
    assert run.main(begun) == 0
    said = capsys.readouterr().out
    assert "VR begins with the weights of an encoder; its last layer (last.weight, last.bias) is random" in said


def test_resumed_by_its_own_command(tmp_path: Path) -> None:
    out = tmp_path / "pre"
    assert pretrain.main(arguments(out=out)) == 0
    assert pretrain.main(["--resume", str(out)]) == 0


def test_ip_is_pretrained_as_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pre"
    given = tiny.arguments(crop=16, max_steps=3, out=out)
    assert pretrain.main(["--network", "ip", *given]) == 0, capsys.readouterr().err
    settings = pretrain.settings_of(["--network", "ip", *given])
    assert settings.method.strategy == "ip-only"
    assert (settings.degradation.task, settings.network.ip_loss) == ("frepa", "frepa")
    begun = tiny.arguments(ip_weights=out / "weights.safetensors", max_steps=1, out=tmp_path / "run")
    assert run.main(begun) == 0, capsys.readouterr().err
    # The loss that is logged is the one that was asked for: far above a mean squared error.
    with (out / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["loss"]) > 3 * 10 ** (-float(rows[0]["psnr"]) / 10)


def test_methods() -> None:
    corruptions = {name: parse(method.task) for name, method in METHODS.items()}
    assert corruptions == {"frepa": Frepa(), "mae": ZeroMask(), "mfm": FrequencyDisc()}
    settings = pretrain.settings_of(["--method", "mae", *arguments()])
    assert (settings.degradation.task, settings.network.ip_loss, settings.method.adversarial) == (
        "zero-mask",
        "mse",
        "none",
    )
    assert (settings.training.optimizer, settings.training.vr_lr) == ("adamw", 3e-4)
    assert pretrain.settings_of(arguments(task="histogram-mask", optimizer="sgd")).degradation.task == "histogram-mask"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--strategy", "joint"], "--strategy follows from --network"),
        (["--aux", "dia"], "--aux follows from --network"),
        (["--vr", "tiny"], "needs a network with an embedding for --vr"),
        (["--ip-loss", "psnr"], "unknown image loss 'psnr'; choose from: mse, frepa"),
    ],
)
def test_errors_before_anything_is_made(given: list[str], said: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "pre"
    keep = arguments(out=out)
    for name in given[::2]:
        if name in keep:
            place = keep.index(name)
            del keep[place : place + 2]
    assert pretrain.main([*keep, *given]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_two_networks_are_refused() -> None:
    with pytest.raises(RunError, match="pre-trains one network, and --aux dia,seg names 2"):
        tiny.config(strategy="masked", aux="dia,seg")


# --- runs that begin with a pre-training ---


def start(method: str, out: str, **changes: object) -> dict[str, torch.Tensor]:
    settings = tiny.config(
        vr="tiny-encoder", vr_start=method, masked_steps=2, masked_seed=0, max_steps=1, strategy="gradprom",
        vr_lr=1e-9, out=Path(out), **changes,
    )  # fmt: skip
    do_run(settings)
    return {name: value for name, value in load_file(f"{out}/weights.safetensors").items() if name.startswith("vr.")}


def test_vr_begins_with_a_pretraining(tmp_path: Path) -> None:
    fresh, frepa, mae = (start(method, method) for method in ("fresh", "frepa", "mae"))

    def kept() -> list[str]:
        return sorted(each.name for each in (tmp_path / "cache").iterdir() if each.name.startswith(("frepa-", "mae-")))

    before = kept()
    assert len(before) == 2
    weights = [each["vr.first.weight"] for each in (fresh, frepa, mae)]
    assert all(not torch.allclose(a, b, atol=1e-6) for i, a in enumerate(weights) for b in weights[:i])
    assert torch.allclose(frepa["vr.last.weight"], fresh["vr.last.weight"], atol=1e-6), "the head is the seed's own"
    other = start("frepa", "again", seed=5)
    assert torch.allclose(other["vr.first.weight"], frepa["vr.first.weight"], atol=1e-6), "seeds share it"
    assert not torch.allclose(other["vr.last.weight"], fresh["vr.last.weight"], atol=1e-3)
    assert kept() == before


def test_what_a_start_concerns() -> None:
    for start, concerned in [("fresh", False), ("clean", False), ("frepa", True)]:
        assert ("masked_epochs" in tiny.config(vr_start=start).concerned) == concerned
    assert "adversarial" not in tiny.config(vr_start="frepa").concerned
    assert {"adversarial", "ip_loss", "vr"} <= tiny.config(strategy="masked").concerned
    assert "seg" in tiny.config(strategy="masked", aux="seg").concerned
    assert "ip_loss" not in tiny.config(strategy="vr-only").concerned
    with pytest.raises(RunError, match="--vr-start frepa and --vr-weights both say"):
        tiny.config(vr_start="frepa", vr_weights=Path("x"))


def test_no_embedding_no_start(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="needs a network with an embedding for --vr"):
        do_run(tiny.config(vr_start="frepa", max_steps=1, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
