"""What every registered entry has to do, whatever it is: a new one is checked by its registration alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

# --- data sets and degradations ---
from train.data import ImageData, Subset
from train.data.fingerprint import differences, fingerprint
from train.data.phantoms.chest_ct import chest_slice
from train.degradations import Degradation, fixed_seeds, parse

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
        assert 0 <= subset.labels.min() <= subset.labels.max() < data.num_classes
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


def check_degradation(degrade: Degradation) -> None:
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
    _check_remedy(degrade, clean, degraded)


def _check_seeds(degrade: Degradation, clean: torch.Tensor, seeds: Sequence[int], degraded: torch.Tensor) -> None:
    assert torch.equal(degrade(clean, seeds), degraded)
    assert torch.equal(degrade(clean.flip(0), seeds[::-1]), degraded.flip(0)), "an image's place in the batch matters"
    assert torch.equal(degrade(clean[2:3], seeds[2:3]), degraded[2:3]), "other images of the batch matter"
    one = clean[:1].expand(2, -1, -1, -1)
    first, second = degrade(one, [1, 2])
    if not torch.equal(first, second):  # there is something random in it
        assert len({seed for name in "abcdef" for seed in fixed_seeds(degrade, [name])}) == 6


def _check_remedy(degrade: Degradation, clean: torch.Tensor, degraded: torch.Tensor) -> None:
    restored = degrade.restore_batch(degraded)
    if degrade.remedy is None:
        assert restored is None
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
    assert (psnr(restored, clean) > psnr(shown, clean)).all(), "the remedy does not restore"
    key = repr(degrade.remedy_settings)
    assert all(repr(value) in key for value in vars(degrade).values() if isinstance(value, float))


def psnr(images: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """In dB per image, written out."""
    error = (images.double().clamp(0, 1) - clean.double()).pow(2).mean((1, 2, 3))
    return -10 * error.log10()
