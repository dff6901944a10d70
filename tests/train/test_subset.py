"""Subsets: what is refused, and how values of any depth become images in [0, 1]."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.data import ImageData, Subset
from train.data.base import Ragged

RNG = np.random.default_rng(0)
SHAPES = [(5, 7, 1), (9, 4, 1), (5, 7, 1)]


def names(n: int) -> tuple[str, ...]:
    return tuple(f"{i}.png" for i in range(n))


def ragged(shapes: list[tuple[int, ...]], dtype: type = np.uint8) -> tuple[Ragged, list[np.ndarray]]:
    arrays = [RNG.integers(0, 4, shape).astype(dtype) for shape in shapes]
    return Ragged.of(arrays, dtype=np.dtype(dtype), ndim=len(shapes[0])), arrays


class TestRagged:
    def test_like_a_list(self) -> None:
        found, arrays = ragged(SHAPES)
        assert len(found) == 3
        assert all((a == b).all() for a, b in zip(found, arrays, strict=True))
        assert (found[-1] == arrays[2]).all()
        assert (found[np.int64(1)] == arrays[1]).all()
        for i in (3, -4):
            with pytest.raises(IndexError):
                found[i]
        assert (found.take(np.array([2, 1]))[1] == arrays[1]).all()

    def test_nothing(self) -> None:
        empty = Ragged.of([], dtype=np.dtype(np.uint8), ndim=3)
        assert len(empty) == 0
        assert list(empty) == []
        assert empty.stacked() is empty

    def test_equal_shapes_are_one_array(self) -> None:
        found, arrays = ragged([(5, 7, 1)] * 3)
        stacked = found.stacked()
        assert isinstance(stacked, np.ndarray)
        assert (stacked == np.stack(arrays)).all()
        assert np.shares_memory(stacked, found.flat)
        assert ragged(SHAPES)[0].stacked().__class__ is Ragged

    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="do not describe"):
            Ragged(np.zeros(5), np.array([[2, 2]]))


class TestSubset:
    @pytest.mark.parametrize(
        ("dtype", "value_range", "stored", "unit"),
        [
            (np.uint8, None, [0, 51, 255], [0, 0.2, 1]),
            (np.uint16, None, [0, 13107, 65535], [0, 0.2, 1]),
            (np.uint16, (0, 4095), [0, 819, 5000], [0, 0.2, 1]),
            (np.float32, None, [-0.1, 0.2, 1.3], [0, 0.2, 1]),
            (np.float32, (-1000, 3000), [-1000, -200, 3100], [0, 0.2, 1]),
        ],
    )
    def test_values(self, dtype: type, value_range: tuple | None, stored: list[float], unit: list[float]) -> None:
        """What a filter has overshot is clipped, as a detector would have."""
        images = np.array(stored, dtype).reshape(1, 3, 1, 1).repeat(2, 0)
        subset = Subset(images, None, None, names(2), value_range=value_range)  # type: ignore[arg-type]
        expected = torch.tensor(unit, dtype=torch.float32).reshape(1, 3, 1)
        torch.testing.assert_close(subset.image(1), expected)
        torch.testing.assert_close(subset.tensor(), expected.expand(2, 1, 3, 1))

    def test_eight_bits_are_divided_as_ever(self) -> None:
        """Every one of the 256 values, bit for bit."""
        images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
        expected = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16) / 255
        subset = Subset(images, None, None, names(1))
        assert torch.equal(subset.tensor(), expected)
        assert torch.equal(subset.image(0), expected[0])

    def test_different_sizes(self) -> None:
        images, arrays = ragged(SHAPES)
        masks, indices = ragged([shape[:2] for shape in SHAPES])
        subset = Subset(images, np.arange(3), masks, names(3), ("a", "b", "a"))
        assert [subset.size(i) for i in range(3)] == [shape[:2] for shape in SHAPES]
        assert torch.equal(subset.image(1), torch.from_numpy(arrays[1]).permute(2, 0, 1).float() / 255)
        assert torch.equal(subset.mask(1), torch.from_numpy(indices[1]).long())
        assert subset.tensor([0, 2]).shape == (2, 1, 5, 7)
        assert subset.masks_tensor([2]).shape == (1, 5, 7)
        for call in (subset.tensor, subset.masks_tensor):
            with pytest.raises(ValueError, match=r"different sizes .*\(5, 7\)"):
                call()
        chosen = subset.take([2, 1])
        assert (chosen.names, chosen.patients, chosen.labels.tolist()) == (("2.png", "1.png"), ("a", "b"), [2, 1])
        assert torch.equal(chosen.image(1), subset.image(1))
        assert torch.equal(chosen.mask(0), subset.mask(2))
        assert subset.take(slice(0, 1)).names == ("0.png",)

    def test_no_masks(self) -> None:
        subset = Subset(np.zeros((2, 4, 4, 1), np.uint8), None, None, names(2))
        assert not subset.has_masks
        for call in (lambda: subset.mask(0), subset.masks_tensor):
            with pytest.raises(ValueError, match="there are no masks"):
                call()

    @pytest.mark.parametrize(
        ("change", "culprit"),
        [
            ({"images": np.zeros((2, 4, 4, 1))}, "images must be uint8, uint16, float32"),
            ({"images": np.zeros((3, 4, 4, 1), np.uint8)}, r"\[2, H, W, C\]"),
            ({"images": np.zeros((2, 4, 4), np.uint8)}, r"\[2, H, W, C\]"),
            ({"labels": np.zeros(2)}, r"labels must be int64 \[2\]"),
            ({"labels": np.zeros(3, np.int64)}, r"labels must be int64 \[2\]"),
            ({"labels": np.array([0, -2])}, "or -1 where there is none, not -2"),
            ({"masks": np.zeros((2, 4, 5), np.uint8)}, "masks must be uint8 and of the size"),
            ({"masks": np.zeros((2, 4, 4), np.int64)}, "masks must be uint8"),
            ({"masks": ragged([(4, 4), (4, 5)])[0]}, "masks must be uint8 and of the size"),
            ({"patients": ("a",)}, "2 images need as many patients, not 1"),
            ({"value_range": (1, 1)}, "value_range must rise"),
        ],
    )
    def test_refused(self, change: dict, culprit: str) -> None:
        good = {"images": np.zeros((2, 4, 4, 1), np.uint8), "labels": None, "masks": None, "names": names(2)}
        with pytest.raises(ValueError, match=culprit):
            Subset(**(good | change))


def test_size_of_a_data_set() -> None:
    one = Subset(np.zeros((2, 4, 6, 1), np.uint8), None, None, names(2))
    other = Subset(np.zeros((2, 6, 4, 1), np.uint8), None, None, names(2))
    none = Subset(np.zeros((0, 3, 3, 1), np.uint8), None, None, ())
    assert ImageData("x", "real", (), one, none, one).size == (4, 6)
    assert ImageData("x", "real", (), one, one, other).size is None
    assert ImageData("x", "real", (), one, one, one).title == "x"
