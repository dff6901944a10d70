"""Numbered objects as class indices: what nuclei are annotated as, turned into what a segmentation learns."""

from __future__ import annotations

import numpy as np


def class_mask(instances: np.ndarray, ids: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The class of every pixel of an instance map.

    The class of an instance is found by its number, and not by its place in the list: numbers may have gaps, and may
    be in any order.

    :param instances: whole numbers ``[H, W]``: which object each pixel belongs to, 0 for none.
    :param ids: whole numbers ``[n]``: the numbers of the objects.
    :param classes: whole numbers ``[n]``, 1 to 255: the class of the object ``ids[i]``.
    :returns: ``uint8 [H, W]``, 0 where there is no object.
    :raises ValueError: an object has no class or two of them, or something else does not fit.

    >>> class_mask(np.array([[0, 7], [3, 7]]), np.array([7, 3]), np.array([2, 1])).tolist()
    [[0, 2], [1, 2]]
    """
    for what, array, ndim in (("instance map", instances, 2), ("numbers", ids, 1), ("classes", classes, 1)):
        if array.ndim != ndim or array.dtype.kind not in "iu":
            raise ValueError(f"the {what} must be whole numbers of {ndim} dimensions, not {array.dtype} {array.shape}")
    if len(ids) != len(classes):
        raise ValueError(f"there are {len(ids)} numbers of objects and {len(classes)} classes")
    if len(np.unique(ids)) < len(ids):
        numbers, times = np.unique(ids, return_counts=True)
        raise ValueError(f"object {numbers[times > 1][0]} is listed twice")
    if len(classes) and not 1 <= classes.min() <= classes.max() <= 255:
        raise ValueError(f"classes must be from 1 to 255, not from {classes.min()} to {classes.max()}")
    if instances.size and instances.min() < 0:
        raise ValueError(f"the instance map holds the number {instances.min()}")
    # Far cheaper than a comparison of the map with each of a thousand numbers.
    present, places = np.unique(instances, return_inverse=True)
    order = np.argsort(ids)
    known = np.concatenate([[0], ids[order]]).astype(np.int64)
    meaning = np.concatenate([[0], classes[order]]).astype(np.uint8)
    found = np.searchsorted(known, present).clip(max=len(known) - 1)
    if strange := present[known[found] != present].tolist():
        raise ValueError(f"object {strange[0]} of the instance map has no class")
    return meaning[found][places].reshape(instances.shape)
