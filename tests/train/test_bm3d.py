"""BM3D as a further classical remedy: with a stand-in for the package, whose license keeps it out of what the tests
require, and with the package itself where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from train.data.cache import ArrayCache
from train.degradations import CLASSICAL, Blur, Gaussian, Poisson, fixed_seeds, parse
from train.degradations.bm3d import BM3D, bm3d, require_bm3d
from train.degradations.remedies import anscombe, inverse_anscombe
from train.errors import RunError
from train.evaluation.evaluate import evaluate
from train.evaluation.metrics import image_quality
from train.run import main

from .contracts import phantoms, psnr
from .test_evaluation import Trained
from .tiny import arguments, subset

STAND_IN = """
import os
class BM3DProfile:
    num_threads = 0
def bm3d(z, sigma, profile):
    assert profile.num_threads == 1 and z.dtype == "float64"
    if z.shape[:2] == (8, 8):
        os.abort()
    if z.shape[:2] == (7, 7):
        raise ValueError("smaller than a block")
    return z[..., 0] * 0.5 + sigma if z.shape[-1:] == (1,) else z * 0.5 + sigma
def bm3d_rgb(z, sigma, profile):
    return z[..., ::-1] - sigma
"""
BOTH = (CLASSICAL, BM3D)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "bm3d.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr("train.degradations.bm3d.version", "of {}".format)


def random(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_go_there_and_back(package, count: int, channels: int) -> None:
    """In their order, gray ones without a channel."""
    images = random(count, channels, 10, 12)
    expected = images.flip(1) - 0.25 if channels == 3 else images * 0.5 + 0.25
    restored = bm3d(images, 0.25)
    assert restored.dtype == torch.float32 and restored.is_contiguous()
    torch.testing.assert_close(restored, expected)


def test_without_noise_there_is_nothing_to_do() -> None:
    images = random(2, 1, 8, 8)
    assert torch.equal(bm3d(images, 0.0), images)


@pytest.mark.parametrize(
    ("side", "said"), [(8, "8 x 8 px (SIGABRT: it said nothing)"), (7, "(ValueError: smaller than a block)")]
)
def test_a_failure_is_an_error_of_one_line(package, side: int, said: str) -> None:
    """The compiled library ends the process with an assertion or a fault of memory on small images."""
    with pytest.raises(RunError) as caught:
        bm3d(random(1, 1, side, side), 0.1)
    assert said in str(caught.value) and "--no-bm3d" in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Degradations


def test_counts_are_stabilized_first(package) -> None:
    degraded = Poisson(20)(random(2, 1, 10, 10), [0, 1])
    title, restore, settings = Poisson(20).remedies[BM3D]
    unit = 2 * np.sqrt(20 + 3 / 8)
    denoised = anscombe(degraded.double().numpy() * 20) / unit * 0.5 + 1 / unit
    np.testing.assert_allclose(restore(degraded), inverse_anscombe(denoised * unit) / 20, atol=1e-5)
    assert title == "Anscombe + BM3D" and settings["peak"] == 20 and settings["bm3d"] == "of bm3d"


def test_in_a_chain_it_takes_the_place_of_non_local_means(package) -> None:
    chain = parse("downsample:2+blur:1+gaussian:0.1")
    degraded = random(2, 1, 10, 10)
    title, restore, settings = chain.remedies[BM3D]
    expected = torch.stack([Blur(1).restore(image) for image in degraded * 0.5 + 0.1])
    expected = torch.nn.functional.interpolate(expected, scale_factor=2, mode="bicubic")
    torch.testing.assert_close(restore(degraded), expected)
    assert title == "BM3D, Richardson-Lucy, bicubic" and list(chain.remedies) == [CLASSICAL, BM3D]
    assert settings["2"] == ["gaussian", {"sigma": 0.1, "bm3d": "of bm3d", "bm4d": "of bm4d"}]


@pytest.mark.parametrize("task", ["blur:1", "sr2", "jpeg", "jpeg+gaussian:0.1"])
def test_no_such_remedy(package, task: str) -> None:
    """Where nothing is noise, and where a part of a chain cannot be undone."""
    degrade = parse(task)
    assert BM3D not in degrade.remedies
    with pytest.raises(RunError, match=f"--task {degrade} has none".replace("+", r"\+")):
        require_bm3d(degrade)


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.degradations.bm3d.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install bm3d.*non-commercial"):
        require_bm3d(Gaussian(0.1))


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def test_every_remedy_is_scored_and_kept(package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, degrade = subset("test", 4), Gaussian(0.1)

    def scored(remedies=BOTH):
        cache = ArrayCache(tmp_path / "cache")
        return evaluate(
            Trained(nn.Identity()), images, degrade, device=torch.device("cpu"), cache=cache, remedies=remedies
        )

    first = scored()
    given = degrade(images.tensor(), fixed_seeds(degrade, images.names))
    torch.testing.assert_close(
        first.remedies[BM3D].quality.psnr, image_quality(given * 0.5 + 0.1, images.tensor()).psnr
    )
    assert [(name, each.title) for name, each in first.remedies.items()] == [
        (CLASSICAL, "non-local means"),
        (BM3D, "BM3D"),
    ]
    assert list(first.table())[:4] == ["psnr_degraded", "psnr_classical", "psnr_bm3d", "psnr"]
    monkeypatch.setattr("train.degradations.bm3d._elsewhere", None)
    again = scored()
    assert all(torch.equal(again.remedies[name].quality.psnr, first.remedies[name].quality.psnr) for name in BOTH)
    assert list(scored((CLASSICAL,)).remedies) == [CLASSICAL]


def test_a_run_has_a_row_of_its_own_for_it(package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    assert main([*arguments(max_steps=1, strategy="ip-only", out="run"), "--bm3d"]) == 0
    metrics, out = json.loads(Path("run/metrics.json").read_text()), capsys.readouterr().out
    assert metrics["remedy"] == "non-local means" and metrics["remedy_bm3d"] == "BM3D"
    assert metrics["psnr_bm3d"] != metrics["psnr_classical"] and 0 < metrics["ssim_bm3d"] < 1
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
    assert list(rows)[:3] == ["degraded", "classical: non-local means", "classical: BM3D"]
    assert f"{metrics['psnr_bm3d']:.2f}" in rows["classical: BM3D"]
    # Without it, the run is the same, its name and identity among that.
    assert main(arguments(max_steps=1, strategy="ip-only", out="other")) == 0
    other = json.loads(Path("other/metrics.json").read_text())
    same = {key: value for key, value in metrics.items() if "bm3d" not in key}
    assert same | {"seconds": 0} == other | {"seconds": 0}


def test_what_cannot_be_tried_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(task="blur:1", out="run"), "--bm3d"]) == 2
    assert "--bm3d: BM3D removes noise" in capsys.readouterr().err
    assert not Path("run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# The package itself


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("task", ["gaussian:0.1", "poisson:30", "blur:0.7+gaussian:0.1"])
def test_it_is_better_than_non_local_means(task: str, channels: int) -> None:
    pytest.importorskip("bm3d")
    degrade = parse(task)
    clean = phantoms(2).expand(-1, channels, -1, -1)
    degraded = degrade(clean, [1, 2])
    classical, other = (remedy.restore(degraded) for remedy in degrade.remedies.values())
    assert torch.equal(degrade.remedies[BM3D].restore(degraded[1:])[0], other[1]), (
        "depends on other images or on chance"
    )
    assert (psnr(other, clean) > psnr(degraded, clean) + 3).all()
    assert psnr(other, clean).mean() > psnr(classical, clean).mean()


def test_it_is_what_the_package_computes() -> None:
    package = pytest.importorskip("bm3d")
    image = Gaussian(0.1)(phantoms(1), [0])
    expected = package.bm3d(image[0, 0].double().numpy(), 0.1)
    np.testing.assert_allclose(bm3d(image, 0.1)[0, 0], expected, atol=1e-5)


def test_small_images_do_not_end_the_process() -> None:
    pytest.importorskip("bm3d")
    with pytest.raises(RunError, match="BM3D fails on images of 8 x 8 px"):
        bm3d(random(1, 1, 8, 8), 0.1)
