"""Instances as classes: against a loop over the objects, and against both maps of real tissue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from train.data.instances import class_mask


def written_out(instances: np.ndarray, ids: list[int], classes: list[int]) -> np.ndarray:
    """As the authors of Lizard explain it: the class of a number is looked up, one object after the other."""
    mask = np.zeros(instances.shape, np.uint8)
    for number in np.unique(instances)[1:].tolist():
        mask[instances == number] = classes[ids.index(number)]
    return mask


@pytest.mark.parametrize("seed", range(5))
def test_numbers_with_gaps_in_no_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1000)[:30] + 1
    classes = rng.integers(1, 7, 30)
    instances = rng.choice(np.concatenate([[0], ids]), (40, 50)).astype(np.int32)
    found = class_mask(instances, ids, classes)
    assert found.dtype == np.uint8
    assert (found == written_out(instances, ids.tolist(), classes.tolist())).all()
    assert (found != written_out(instances, sorted(ids.tolist()), classes.tolist())).any(), "the trap is in the test"


def test_objects_that_are_not_in_the_map() -> None:
    """As where an image is cut."""
    assert class_mask(np.array([[0, 2]]), np.array([5, 2]), np.array([1, 3])).tolist() == [[0, 3]]


def test_no_objects() -> None:
    nothing = np.empty(0, np.int64)
    assert class_mask(np.zeros((2, 3), int), nothing, nothing).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize(
    ("instances", "ids", "classes", "culprit"),
    [
        ([[0, 4]], [1, 3], [1, 1], "object 4 of the instance map has no class"),
        ([[0, 2]], [1, 3], [1, 1], "object 2 of the instance map has no class"),
        ([[0, 1]], [1, 3, 1], [1, 1, 2], "object 1 is listed twice"),
        ([[0, 1]], [1, 3], [1], "2 numbers of objects and 1 classes"),
        ([[0, 1]], [1, 3], [0, 1], "from 1 to 255, not from 0 to 1"),
        ([[0, 1]], [1], [256], "from 1 to 255"),
        ([[-1, 1]], [1], [1], "holds the number -1"),
        ([[0.0, 1.0]], [1], [1], "instance map must be whole numbers of 2 dimensions, not float64"),
        ([0, 1], [1], [1], "instance map must be whole numbers of 2 dimensions"),
        ([[0, 1]], [[1]], [1], "numbers must be whole numbers of 1 dimensions"),
    ],
)
def test_refused(instances: list, ids: list, classes: list, culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        class_mask(np.array(instances), np.array(ids), np.array(classes))


def test_real_nuclei(shared_data: Callable[[str], Path]) -> None:
    """The class of each nucleus, taken from one map, gives that map again."""
    root = shared_data("HGSC_NUCLEI")
    with np.load(root / "hgsc_nest_inst_mask.npz") as file:
        instances = file["nuc_raster"]
    with np.load(root / "hgsc_nest_type_mask.npz") as file:
        types = file["nuc_raster"]
    ids = np.unique(instances)[1:]
    first = np.array([np.flatnonzero(instances == number)[0] for number in ids])
    order = np.random.default_rng(0).permutation(len(ids))
    found = class_mask(instances, ids[order], types.flat[first][order])
    assert len(ids) == 1294
    inside = instances > 0
    assert set(np.unique(found[inside])) == {1, 2, 3}
    assert (found[inside] == types[inside]).mean() > 0.999
    assert not found[~inside].any()
