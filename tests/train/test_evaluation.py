from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from train.data import Subset
from train.data.base import Ragged
from train.data.cache import ArrayCache
from train.degradations import CLASSICAL, DEGRADATIONS, Degradation, Gaussian, enlarge, fixed_seeds, parse
from train.evaluation import evaluate as module
from train.evaluation.evaluate import TOGETHER, Evaluation, classical_quality, evaluate, examples, groups
from train.evaluation.metrics import Quality, confusion, image_quality, overlap
from train.inference import BATCH
from train.strategies.auxiliary import Auxiliary, Diagnosis, Segmentation

from .tiny import image_data, subset, with_masks

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """Diagnoses by the mean brightness, as the tiny data set's classes are made."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([torch.zeros_like(mean), mean - 0.5], 1)


class Trained:
    """What an evaluation wants to know of a strategy."""

    def __init__(self, ip: nn.Module | None, *judges: tuple[Auxiliary, nn.Module]) -> None:
        self.ip = ip
        self.judges = judges
        self.trains_ip = ip is not None

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        own = {} if self.ip is None else {"ip": self.ip}
        return own | {each.role.key: network for each, network in self.judges}

    def enhance(self, degraded: Tensor) -> Tensor:
        assert self.ip is not None
        return self.ip(degraded)


@pytest.fixture
def images() -> Subset:
    return subset("test", TOGETHER + BATCH + 3)  # more than one group, the last batch incomplete


GAUSSIAN = Gaussian(0.1)
NON_LOCAL_MEANS = GAUSSIAN.remedies[CLASSICAL]
DIAGNOSIS = Diagnosis(image_data())


def classical(result: Evaluation) -> Quality:
    return result.remedies[CLASSICAL].quality


def run(trained: Trained, images: Subset, degrade: Degradation = GAUSSIAN, **options) -> Evaluation:
    return evaluate(trained, images, degrade, device=CPU, **options)


def given(images: Subset, degrade: Degradation = GAUSSIAN) -> Tensor:
    return degrade(images.tensor(), fixed_seeds(degrade, images.names))


def test_an_ip_that_does_nothing_gains_nothing(images):
    result = run(Trained(nn.Identity()), images)
    clean = images.tensor()
    assert torch.equal(result.degraded.psnr, image_quality(given(images), clean).psnr)
    assert torch.equal(result.enhanced.psnr, result.degraded.psnr)
    assert result.scores == {}
    title, quality = result.remedies[CLASSICAL]
    assert len(quality.psnr) == len(images) and title == "non-local means"


def test_the_images_shown_are_those_that_were_scored(images):
    index = [len(images) - 1, 0, TOGETHER - 1]
    shown = examples(Trained(nn.Identity()), images, GAUSSIAN, index, device=CPU)
    degraded, clean = given(images), images.tensor()
    for place, each in zip(index, shown, strict=True):
        assert torch.equal(each.degraded[0], degraded[place]) and torch.equal(each.clean[0], clean[place])
        assert torch.equal(each.enhanced[0], degraded[place].clamp(0, 1))


def test_diagnosis_on_each_kind_of_image(images):
    darken = nn.Hardtanh(-1.0, 0.0)  # everything is black: no image is bright
    result = run(Trained(darken, (DIAGNOSIS, Brightness())), images)
    clean, labels = images.tensor(), torch.tensor(images.labels)
    right = ((clean.mean((1, 2, 3)) > 0.5).long() == labels).double().mean().item()
    accuracies = {kind: scores["accuracy"] for kind, scores in result.scores.items()}
    assert accuracies == {
        "clean": pytest.approx(right),
        "degraded": pytest.approx(right, abs=0.2),
        "enhanced": pytest.approx((labels == 0).double().mean().item()),
    }


def test_without_an_ip_nothing_is_enhanced(images):
    result = run(Trained(None, (DIAGNOSIS, Brightness())), images)
    assert result.enhanced is None and set(result.scores) == {"clean", "degraded"}


def test_super_resolution_is_compared_at_full_size(images):
    degrade = DEGRADATIONS.build("downsample", scale=2)
    result = run(Trained(nn.Upsample(scale_factor=2), (DIAGNOSIS, Brightness())), images, degrade)
    small, clean = given(images, degrade), images.tensor()
    assert torch.equal(result.enhanced.psnr, image_quality(nn.Upsample(scale_factor=2)(small), clean).psnr)
    assert torch.equal(result.degraded.psnr, image_quality(enlarge(small, 2), clean).psnr)
    assert torch.equal(classical(result).psnr, result.degraded.psnr)  # both are bicubic interpolation


def test_the_test_noise_never_changes(images):
    results = [run(Trained(nn.Identity()), images).degraded.psnr for _ in range(2)]
    assert torch.equal(*results)


def test_networks_are_evaluated_in_eval_mode(images):
    result = run(Trained(nn.Dropout(0.9).train()), images)
    assert torch.equal(result.enhanced.psnr, result.degraded.psnr)


@pytest.mark.parametrize("task", ["poisson:30", "blur:1.5", "poisson:30+blur:1.5", "gaussian:0.1+downsample:2"])
def test_degradations_without_a_sigma(images, task):
    """These once trained to the end and died here."""
    few, degrade = images.take(range(4)), parse(task)
    ip = nn.Upsample(scale_factor=degrade.scale)
    result = run(Trained(ip, (DIAGNOSIS, Brightness())), few, degrade)
    restored = torch.stack([degrade.restore(image) for image in given(few, degrade)])
    assert list(result.remedies) == [CLASSICAL] and result.remedies[CLASSICAL].title == degrade.remedy
    torch.testing.assert_close(classical(result).psnr, image_quality(restored, few.tensor()).psnr)


def test_a_degradation_without_a_remedy(images):
    class Inverted(Degradation):
        name = "inverted"

        def degrade(self, image, generator):
            return 1 - image

    result = run(Trained(nn.Identity()), images, Inverted())
    assert result.remedies == {} and result.qualities["_classical"] is None


def test_the_classical_scores_are_kept(images, tmp_path, monkeypatch):
    few, cache = images.take(range(4)), ArrayCache(tmp_path)
    first = run(Trained(nn.Identity()), few, cache=cache)
    assert torch.equal(classical(first).psnr, classical_quality(few, GAUSSIAN, NON_LOCAL_MEANS).psnr)
    assert list(tmp_path.iterdir())
    monkeypatch.setattr(Gaussian, "_each", None)
    again = run(Trained(nn.Identity()), few, cache=cache)
    assert torch.equal(classical(first).psnr, classical(again).psnr)
    assert torch.equal(classical(first).ssim, classical(again).ssim)
    dark = dataclasses.replace(few, images=few.images // 2)
    others = [(few, Gaussian(0.2)), (dark, GAUSSIAN), (dataclasses.replace(few, names=tuple("abcd")), GAUSSIAN)]
    for other, degrade in others:
        with pytest.raises(TypeError):  # the remedy is called again
            run(Trained(nn.Identity()), other, degrade, cache=cache)


class Gain(nn.Module):
    """Brightness with one weight, and a count of the images that it was asked about."""

    def __init__(self, gain: float, *, moved: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain), requires_grad=moved)
        self.asked = 0

    def forward(self, x):
        self.asked += len(x)
        return Brightness()(x) * self.gain


def test_what_an_unmoved_network_says_of_unchanged_images_is_kept(images, tmp_path):
    cache, n = ArrayCache(tmp_path), len(images)

    def scored(gain: float, of: Subset = images, sigma: float = 0.1, moved: bool = False):
        ip = nn.Identity()
        reader, plain = Gain(gain, moved=moved), Gain(gain, moved=moved)
        kept = run(Trained(ip), of, Gaussian(sigma), readers=[(DIAGNOSIS, reader)], cache=cache)
        never = run(Trained(ip), of, Gaussian(sigma), readers=[(DIAGNOSIS, plain)])
        assert plain.asked == 3 * n
        assert kept.scores == never.scores
        assert kept.per_image.keys() == never.per_image.keys()
        for kind, found in never.per_image.items():
            for key, values in found.items():
                np.testing.assert_array_equal(kept.per_image[kind][key], values)
        return reader.asked / n

    assert scored(1.0) == 3
    assert scored(1.0) == 1  # the enhanced images alone
    assert scored(-1.0) == 3  # another network
    assert scored(-1.0, moved=True) == 3  # which is trained: it will never be the same again
    assert scored(1.0, sigma=0.4) == 3  # other images, though the clean ones are the same
    relabeled = dataclasses.replace(images, labels=1 - images.labels)
    assert scored(1.0, relabeled) == 3  # other answers are right
    assert scored(1.0, relabeled) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_classical_denoising_gains(channels):
    """Smooth images, so that there is something to restore."""
    coarse = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear").repeat(1, channels, 1, 1)
    pixels = (smooth * 255).round().byte().permute(0, 2, 3, 1).numpy()
    images = Subset(pixels, None, None, tuple("abcdef"))
    quality = classical_quality(images, GAUSSIAN, NON_LOCAL_MEANS)
    gain = quality.psnr - image_quality(given(images), images.tensor()).psnr
    assert (gain > 5).all()
    one = classical_quality(images.take([2]), GAUSSIAN, NON_LOCAL_MEANS)
    assert torch.equal(one.psnr, quality.psnr[2:3])


# ----------------------------------------------------------------------------------------------------------------------
# Memory and sizes


def test_memory_does_not_grow_with_the_number_of_images(monkeypatch):
    """The images that exist at the same time are counted where they are made, and where they are let go."""
    most, alive = 0, 0
    original = Subset.tensor

    def counted(self, index=slice(None)):
        nonlocal most, alive
        made = original(self, index)
        alive += len(made)
        most = max(most, alive)

        def gone(n):
            nonlocal alive
            alive -= n

        weakref.finalize(made.untyped_storage(), gone, len(made))
        return made

    monkeypatch.setattr(Subset, "tensor", counted)
    seen = []
    for groups_of_images in (4, 8):
        most = alive = 0
        trained = Trained(nn.Upsample(scale_factor=2), (DIAGNOSIS, Brightness()))
        run(trained, subset("test", groups_of_images * TOGETHER), parse("sr2"))
        seen.append(most)
    assert TOGETHER <= seen[0] == seen[1] < 4 * TOGETHER


def ragged(shapes: list[tuple[int, int]]) -> Subset:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (*shape, 1)).astype(np.uint8) for shape in shapes]
    images = Ragged.of(arrays, dtype=np.dtype(np.uint8), ndim=3)
    labels = np.arange(len(shapes)) % 2
    return Subset(images, labels, None, tuple(f"{i}.png" for i in range(len(shapes))))


def test_images_of_different_sizes_are_scored_as_if_alone():
    images = ragged([(16, 16), (16, 16), (20, 14), (16, 16), (11, 30)])
    assert [list(group) for group in groups(images)] == [[0, 1], [2], [3], [4]]
    together = run(Trained(nn.Identity(), (DIAGNOSIS, Brightness())), images)
    alone = [run(Trained(nn.Identity()), images.take([i])) for i in range(5)]
    assert set(together.qualities) == {"_degraded", "_classical", ""}
    for kind, quality in together.qualities.items():
        torch.testing.assert_close(quality.psnr, torch.cat([each.qualities[kind].psnr for each in alone]))


def test_large_images_are_scored_in_small_groups(monkeypatch):
    monkeypatch.setattr(module, "PIXELS", 3 * 16 * 16)
    assert [len(group) for group in groups(subset("test", 8))] == [3, 3, 2]


# ----------------------------------------------------------------------------------------------------------------------
# Segmentation


def counted(answers: np.ndarray, masks: np.ndarray, classes: int) -> tuple[float, float]:
    """The oracle: intersections and unions of sets of pixels, class by class."""
    ious, dices = [], []
    for each in range(classes):
        answer, mask = answers == each, masks == each
        if not (answer | mask).any():
            continue
        both = (answer & mask).sum()
        ious.append(both / (answer | mask).sum())
        dices.append(2 * both / (answer.sum() + mask.sum()))
    return float(np.mean(ious)), float(np.mean(dices))


@pytest.mark.parametrize("missing", [False, True])
def test_overlap_is_that_of_sets_of_pixels(missing):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, 4, 9, 7))
    masks = rng.integers(0, 4, (5, 9, 7))
    if missing:  # a class that is nowhere, and pixels without an answer
        masks[masks == 3] = 0
        logits[:, 3] = -9
        logits[0, 1, :3] = np.nan
    answers = np.where(np.isnan(logits).any(1), -1, np.nan_to_num(logits, nan=-99).argmax(1))
    parts = [confusion(torch.tensor(logits[i : i + 2]), torch.tensor(masks[i : i + 2])) for i in (0, 2, 4)]
    found = overlap(sum(parts))
    assert (found.iou.item(), found.dice.item()) == pytest.approx(counted(answers, masks, 4))


def test_overlap_is_that_of_the_libraries():
    """Those of torchmetrics count all pixels together, too; MONAI's are means over images."""
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_jaccard_index

    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(3, 4, 8, 8, generator=generator), torch.randint(4, (3, 8, 8), generator=generator)
    found = overlap(confusion(logits, masks))
    assert found.iou.item() == pytest.approx(multiclass_jaccard_index(logits, masks, 4).item(), rel=1e-6)
    assert found.dice.item() == pytest.approx(multiclass_f1_score(logits, masks, 4, average="macro").item(), rel=1e-6)


class Bright(nn.Module):
    """Segments by a threshold."""

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), x - 0.5], 1)


def test_segmentation_on_each_kind_of_image():
    data = with_masks(image_data())
    darken = nn.Hardtanh(-1.0, 0.0)
    result = run(Trained(darken, (Segmentation(data), Bright()), (DIAGNOSIS, Brightness())), data.test)
    masks = data.test.masks.astype(int)
    answers = {
        "clean": data.test.images[..., 0] / 255 > 0.5,
        "degraded": given(data.test)[:, 0].numpy() > 0.5,
        "enhanced": np.zeros_like(masks),
    }
    assert set(result.scores) == set(answers)
    for kind, answer in answers.items():
        scores = result.scores[kind]
        assert set(scores) == {"miou", "dice", "accuracy"}
        assert (scores["miou"], scores["dice"]) == pytest.approx(counted(answer.astype(int), masks, 2))
