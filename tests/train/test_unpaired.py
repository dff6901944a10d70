"""Images of low and of high quality that are no pairs: halves, data that say so, and runs without a truth."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from train.data import DataError, load
from train.data.unpaired import by_name, by_nature, recoverable
from train.degradations import Gaussian, Illumination, Untouched
from train.evaluation.evaluate import evaluate
from train.evaluation.reference_free import blur, features, frechet_distance, kernel_distance
from train.experiment import do_run
from train.outputs.report import summary
from train.training.batches import Crops, Key
from train.training.build import build

from .tiny import config, image_data, tiny_vr, with_masks

CPU = torch.device("cpu")


# --- halves ---


def test_no_image_is_in_both_halves():
    data = image_data()
    halves = by_name(data, seed=0)
    low, high = set(halves.train.names), set(halves.guides.names)
    assert not low & high
    assert low | high == set(data.train.names)
    assert {len(low), len(high)} == {6, 7}
    assert (halves.val, halves.test) == (data.val, data.test)
    # The hash is of the name: the order of the files decides nothing, the seed does.
    turned = dataclasses.replace(data, train=data.train.take(slice(None, None, -1)))
    assert set(by_name(turned, seed=0).train.names) == low
    assert {frozenset(by_name(data, seed=seed).train.names) for seed in range(5)} > {frozenset(low)}
    assert torch.equal(halves.guides.image(0), data.train.image(data.train.names.index(halves.guides.names[0])))


def test_images_of_a_patient_stay_together():
    data = image_data()
    patients = tuple(f"p{i // 3}" for i in range(13))
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, patients=patients))
    for seed in range(5):
        halves = by_name(data, seed=seed)
        assert not set(halves.train.patients) & set(halves.guides.patients)
        assert abs(len(halves.train) - len(halves.guides)) <= 3
    one = dataclasses.replace(data, train=dataclasses.replace(data.train, patients=("p",) * 13))
    with pytest.raises(DataError, match="too few training images"):
        by_name(one, seed=0)


def test_guides_are_a_function_of_seed_phase_epoch_and_image():
    halves = by_name(image_data(), seed=0)

    def crops(seed: int = 0, **options) -> Crops:
        return Crops(halves.train, Gaussian(0.1), crop=8, seed=seed, guides=halves.guides, **options)

    keys = [Key("train", 0, image) for image in range(5)]
    batch = crops().__getitems__(keys)
    assert batch.guide.shape == batch.clean.shape and batch.guide.dtype == torch.float32
    assert torch.equal(crops().__getitems__(keys[::-1]).guide, batch.guide.flip(0))
    for other in (crops(1).__getitems__(keys), crops().__getitems__([key._replace(epoch=1) for key in keys])):
        assert not torch.equal(other.guide, batch.guide)
    # Nothing else of the batch depends on whether there are guides.
    alone = Crops(halves.train, Gaussian(0.1), crop=8, seed=0).__getitems__(keys)
    assert alone.guide is None
    assert torch.equal(alone.clean, batch.clean) and torch.equal(alone.degraded, batch.degraded)
    # Every guide is a part of an image of the other half, mirrored or not.
    windows = halves.guides.tensor().unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 64)
    for guide in batch.guide:
        assert any((windows == each.flatten()).all(1).any() for each in (guide, guide.flip(-1)))


# --- data that are unpaired by nature ---


def test_bad_photographs_are_enhanced_and_good_ones_guide():
    data = load("drimdb", source="phantom", size=16)
    own = by_nature(data)
    names = set(data.low_quality)
    for split in ("train", "test"):
        subset = getattr(own, split)
        assert set(subset.names) <= names and set(subset.labels) == {1}
    assert set(own.guides.labels) == {0} and set(own.guides.names) < set(data.train.names)


def test_official_photographs(shared_data, tmp_path: Path, caplog):
    root = shared_data("DRIMDB")
    data = load("drimdb", root=root, source="real", size=128, channels=3, cache_dir=tmp_path)
    own = by_nature(data)
    assert sum(len(getattr(own, split)) for split in ("train", "val", "test")) == 59
    left_out = {1, 2, 4, 11, 18, 24, 35, 36, 39, 49}
    assert all(f"drimdb_bad ({number}).jpg" in caplog.text for number in left_out)
    assert "10 images of low quality are left out" in caplog.text


def test_what_cannot_be_recovered():
    rng = np.random.default_rng(0)
    scene = np.clip(0.4 + 0.1 * rng.standard_normal((40, 40)), 0, 1)
    assert recoverable(scene[None])
    assert not recoverable(0.9 + 0.1 * scene[None])
    assert not recoverable(0.1 * scene[None])
    assert not recoverable(0.4 + 0.01 * (scene[None] - 0.4))
    framed = np.zeros((40, 40))  # a black corner around a flat field is no scene
    framed[8:-8, 8:-8] = 0.4
    assert not recoverable(framed[None])


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    root = tmp_path / "set"
    for i in range(10):
        save(root / "images" / f"low{i}.png", rng.integers(0, 256, (32, 32), np.uint8))
    for i in range(4):
        save(root / "hq" / f"high{i}.png", rng.integers(0, 256, (40, 36), np.uint8))
    return root


def read(root: Path, **options):
    return load("folder", root=root, source="real", cache_dir=root.parent / "cache", **{"size": 16} | options)


def test_folder_with_images_of_high_quality(folder: Path):
    data = read(folder)
    assert data.guides.names == tuple(f"hq/high{i}.png" for i in range(4))
    assert data.low_quality == {f"low{i}.png" for i in range(10)}
    assert len(by_nature(data).train) == len(data.train)
    shutil.rmtree(folder / "hq")
    without = read(folder)
    assert without.guides is None
    assert np.array_equal(without.train.images, data.train.images)
    with pytest.raises(DataError, match=r"does not say which of them are of high quality.*hq/ beside images/"):
        by_nature(without)


def test_folders_of_floating_point_images_share_their_units(folder: Path):
    for path in [*(folder / "images").iterdir(), *(folder / "hq").iterdir()]:
        top = 2.0 if path.parent.name == "hq" else 1.5
        np.save(path.with_suffix(".npy"), np.linspace(0, top, 1024, dtype=np.float32).reshape(32, 32))
        path.unlink()
    data = read(folder, size=None)
    assert data.train.value_range == data.guides.value_range
    assert data.train.image(0).max() == pytest.approx(0.75) and data.guides.image(0).max() == 1


@pytest.mark.parametrize("name", ["low3.png", "low3.jpg"])
def test_a_name_on_both_sides(folder: Path, name: str):
    save(folder / "hq" / name, np.zeros((16, 16), np.uint8))
    with pytest.raises(DataError, match=rf"has low3.png in images/ and {name} in hq/; .* must be of different scenes"):
        read(folder)


def test_an_empty_side(folder: Path):
    for path in (folder / "hq").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="hq holds no image"):
        read(folder)


def test_sides_of_different_types(folder: Path):
    save(folder / "hq" / "high9.png", np.zeros((16, 16), np.uint16))
    for i in range(4):
        (folder / "hq" / f"high{i}.png").unlink()
    with pytest.raises(DataError, match=r"hq holds uint16 values and .*images uint8"):
        read(folder)


# --- runs ---

HQG_NET = {"strategy": "hqg-only", "ip": "hqgnet", "ip.width": 2, "ip.levels": 1, "max_steps": 2}


def test_a_run_without_a_truth(tmp_path: Path, folder: Path, capsys):
    settings = config(
        **HQG_NET, dataset="folder", data_root=folder, source="real", task="none", out=tmp_path / "run",
        reference_free=True,
    )  # fmt: skip
    result = do_run(settings)
    metrics = result.metrics
    scores = [name for name in metrics if name.startswith(("psnr", "ssim")) and name != "psnr_cap"]
    assert scores and all(metrics[name] is None for name in scores)
    assert metrics["blur"] > 0 and metrics["blur_degraded"] > 0 and metrics["blur_clean"] > 0
    assert metrics["critic"] == "patch" and metrics["steps"] == 2
    assert "psnr" not in (result.folder / "images.csv").read_text()
    assert (result.folder / "panel.png").stat().st_size > 0
    from rich.console import Console

    console = Console(width=200)
    console.print(summary(metrics, result.folder))
    shown = capsys.readouterr().out
    assert "clean" not in shown and "enhanced: hqgnet" in shown and "patch" in shown
    with safe_open(result.folder / "weights.safetensors", "pt") as file:
        names = set(file.keys())
        assert {"ip.guide", "critic.0.weight"} <= names
        assert file.get_tensor("ip.guide").any()
        stored = json.loads(file.metadata()["config"])
    assert stored["unpaired"]["critic"] == "patch"


def test_an_unpaired_run_is_scored_where_there_is_a_truth(tmp_path: Path):
    result = do_run(config(**HQG_NET, task="illumination", out=tmp_path / "run"))
    assert result.metrics["psnr_degraded"] > 5 and result.metrics["psnr"] > 5
    assert result.metrics["n_test"] == 6
    assert not any("blur" in name or "feature" in name for name in result.metrics)


def test_evaluation_does_not_depend_on_other_images():
    experiment = build(config(**HQG_NET), image_data(), Gaussian(0.1), device=CPU)
    torch.nn.init.normal_(experiment.strategy.networks["ip"].enhancer.last.weight)
    experiment.settle()
    data = experiment.data.test
    order = [3, 1, 4, 0, 5, 2]
    one, other = (evaluate(experiment.strategy, s, Gaussian(0.1), device=CPU) for s in (data, data.take(order)))
    torch.testing.assert_close(one.enhanced.psnr[order], other.enhanced.psnr, rtol=1e-5, atol=1e-5)
    assert evaluate(experiment.strategy, data, Untouched(), device=CPU).enhanced is None


# --- measures without a truth ---


def test_blur_is_scikit_images_and_rises():
    from scipy.ndimage import gaussian_filter

    sharp = np.random.default_rng(0).random((32, 32))
    images = [gaussian_filter(sharp, sigma) for sigma in (0.0, 1.0, 3.0)]
    found = blur(torch.tensor(np.stack(images))[:, None])
    assert found == sorted(found) and found[0] < 0.2 < 0.4 < found[2]


def test_frechet_distance_by_hand():
    """Of independent normal distributions: the distance of the means, and that of the standard deviations."""
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * (3 / 4) ** 0.5  # variance 1
    assert frechet_distance(square, square) == pytest.approx(0, abs=1e-6)
    moved = 3 * square + torch.tensor([1.0, 2.0])
    assert frechet_distance(moved, square) == pytest.approx(1 + 4 + 2 * (3 - 1) ** 2, rel=1e-6)
    assert np.isnan(frechet_distance(square[:1], square))


def test_kernel_distance_is_that_of_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    one, other = (torch.randn(20, 5, generator=torch.Generator().manual_seed(seed)) + seed for seed in (0, 1))
    assert kernel_distance(one, other) == pytest.approx(poly_mmd(one.double(), other.double()).item(), rel=1e-9)
    assert kernel_distance(one, other[:7]) > 0.5
    # Unbiased: over many pairs of samples of one distribution it is 0 on average, whatever their numbers.
    generator = torch.Generator().manual_seed(3)
    values = [kernel_distance(torch.randn(4, 5, generator=generator), torch.randn(9, 5, generator=generator))
              for _ in range(400)]  # fmt: skip
    assert abs(np.mean(values)) < 4 * np.std(values) / 20


def test_features_of_a_reader():
    network = tiny_vr(channels=1, num_classes=2).eval()
    images = torch.rand(20, 1, 16, 16)
    torch.testing.assert_close(features(network, images, device=CPU), network[:-1](images))
    maps = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Conv2d(3, 2, 1))
    torch.testing.assert_close(features(maps, images, device=CPU), maps[0](images).mean((2, 3)))


def test_distances_come_with_a_reader():
    data = with_masks(image_data())
    experiment = build(config(**HQG_NET), data, Gaussian(0.1), device=CPU)
    torch.nn.init.normal_(experiment.strategy.networks["ip"].enhancer.last.weight)
    from train.strategies.auxiliary import AUXILIARIES

    reader = (AUXILIARIES.build("dia", data=data), tiny_vr(channels=1, num_classes=2))
    found = evaluate(
        experiment.strategy, data.test, Gaussian(0.5), device=CPU, readers=[reader], reference_free=True
    ).reference_free
    assert set(found) == {
        "blur", "blur_degraded", "blur_clean",
        "feature_frechet", "feature_frechet_degraded", "feature_kernel", "feature_kernel_degraded",
    }  # fmt: skip
    clean, noisy = data.test.tensor(), Gaussian(0.5)
    from train.degradations import fixed_seeds

    given = noisy(clean, fixed_seeds(noisy, data.test.names)).clamp(0, 1)
    theirs = [reader[1][:-1](images) for images in (given, clean)]
    assert found["feature_frechet_degraded"] == pytest.approx(frechet_distance(*theirs), rel=1e-4)


# --- uneven light ---


def test_illumination_is_a_field_and_a_curve():
    degrade = Illumination()
    generator = torch.Generator().manual_seed(4)
    field, gamma = degrade.drawn(20, 30, generator)
    assert field.shape == (20, 30)
    assert 0.4 <= field.min() < field.max() <= 1.2 and 0.7 <= gamma <= 1.4
    # Smooth: neighbors on a grid of 4 numbers differ by little.
    assert max((field[1:] - field[:-1]).abs().max(), (field[:, 1:] - field[:, :-1]).abs().max()) < 0.25
    image = torch.rand(3, 20, 30, generator=generator)
    torch.testing.assert_close(degrade(image[None], [4])[0], (image * field).clamp(max=1) ** gamma)
    limits = [degrade.drawn(8, 8, torch.Generator().manual_seed(seed)) for seed in range(200)]
    gammas = [gamma for _, gamma in limits]
    assert min(gammas) < 0.72 and max(gammas) > 1.38
    assert min(field.min() for field, _ in limits) < 0.42 and max(field.max() for field, _ in limits) > 1.18


def test_illumination_of_no_strength_changes_nothing():
    image = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(Illumination(0.0)(image, [1, 2]), image)
    with pytest.raises(ValueError, match=r"strength must be a number from 0 to 1\.5, not 2"):
        Illumination(2)
