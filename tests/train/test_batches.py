from __future__ import annotations

import pytest
import torch

from train.degradations import DEGRADATIONS, Gaussian
from train.training.batches import Crops, Key, Order, batches

from .tiny import SIDE, subset

SIGMA = 0.1


def crops(seed: int = 0, **changes) -> Crops:
    return Crops(subset("train", 13), Gaussian(SIGMA), **({"crop": 8, "seed": seed} | changes))


def order(**changes) -> Order:
    return Order("train", **({"images": 13, "batch_size": 4, "steps": 9, "seed": 0} | changes))


def test_an_example_depends_on_its_key_alone():
    """Not on its place in the batch, nor on what was drawn before."""
    key = Key("train", 2, 5)
    alone = crops().__getitems__([key])
    torch.rand(3)
    among = crops().__getitems__([Key("train", 2, 1), key, Key("train", 0, 5)])
    for one, many in zip((alone.clean, alone.degraded), (among.clean, among.degraded), strict=True):
        assert torch.equal(one[0], many[1])


@pytest.mark.parametrize(
    ("seed", "other"), [(1, Key("train", 2, 5)), (0, Key("train", 3, 5)), (0, Key("pretrain", 2, 5))]
)
def test_seed_epoch_and_phase_each_change_crop_and_noise(seed, other):
    one, another = crops(0).__getitems__([Key("train", 2, 5)]), crops(seed).__getitems__([other])
    assert not torch.equal(one.clean, another.clean)
    assert not torch.allclose(one.degraded - one.clean, another.degraded - another.clean, atol=SIGMA)


def test_crops_are_cut_from_the_image_on_every_side():
    data = subset("train", 13)
    image = data.tensor([3])[0]
    places, mirrored = set(), 0
    for epoch in range(200):
        clean = crops().__getitems__([Key("train", epoch, 3)]).clean[0]
        found = [
            (top, left, flip)
            for flip in (False, True)
            for top in range(SIDE - 7)
            for left in range(SIDE - 7)
            if torch.equal(clean.flip(2) if flip else clean, image[:, top : top + 8, left : left + 8])
        ]
        assert len(found) == 1
        places |= {("top", found[0][0]), ("left", found[0][1])}
        mirrored += found[0][2]
    assert places == {(side, place) for side in ("top", "left") for place in range(SIDE - 7)}
    assert 70 < mirrored < 130


def test_noise_is_that_of_the_degradation():
    many = crops(crop=SIDE).__getitems__([Key("train", epoch, 0) for epoch in range(200)])
    noise = many.degraded - many.clean
    assert noise.std().item() == pytest.approx(SIGMA, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=SIGMA / 50)


def test_labels_follow_the_images():
    data = subset("train", 13)
    batch = crops().__getitems__([Key("train", 0, i) for i in (4, 1, 7)])
    assert batch.labels.tolist() == data.labels[[4, 1, 7]].tolist()
    unlabelled = Crops(type(data)(data.images, None, None, data.names), Gaussian(SIGMA), crop=8, seed=0)
    assert unlabelled.__getitems__([Key("train", 0, 4)]).labels.tolist() == [-1]


def test_every_epoch_shows_every_image_once_in_another_order():
    steps = list(order(batch_size=1, images=6, steps=18))
    epochs = [[key.image for (key,) in steps[6 * e : 6 * e + 6]] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4, 5]] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [key.epoch for (key,) in steps] == [0] * 6 + [1] * 6 + [2] * 6


@pytest.mark.parametrize("start", range(10))
def test_order_can_be_entered_anywhere(start):
    assert list(order(start=start)) == list(order())[start:]
    assert len(order(start=start)) == 9 - start


def test_order_depends_on_seed_and_phase():
    assert list(order(seed=1)) != list(order())
    images = [[key.image for key in step] for step in order()]
    other = Order("pretrain", images=13, batch_size=4, steps=9, seed=0)
    assert [[key.image for key in step] for step in other] != images


def test_workers_change_nothing():
    alone, helped = (list(batches(crops(), order(steps=3), num_workers=n)) for n in (0, 2))
    assert len(alone) == 3
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.degraded, other.degraded) and torch.equal(one.labels, other.labels)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    list(batches(crops(), order(), num_workers=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_super_resolution_halves_the_input():
    halved = Crops(subset("train", 13), DEGRADATIONS.build("downsample", scale=2), crop=8, seed=0)
    batch = halved.__getitems__([Key("train", 0, 0)])
    assert batch.clean.shape == (1, 1, 8, 8) and batch.degraded.shape == (1, 1, 4, 4)
