"""Which images are for training, for validation and for testing, where a data set has no official split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from train.data.base import SPLITS, DataError, Example
from train.seeds import stable_seed

SHARES = {"train": 7, "val": 1, "test": 2}
"""Tenths of the images of each split."""


def seeded(examples: Sequence[Example], *, seed: int, what: str) -> dict[str, list[Example]]:
    """Splits a data set by patient (by image where the patient is not known), each label shared out alike.

    A patient's place in the order of assignment depends on the seed and on the patient alone, not on where files lie
    or in which order they are listed. Patients with many images come first, and each goes where images, and above all
    images of the same labels, are missed most. Where every patient has one image, each split is within about two images
    of its share, in all and label by label.

    :param examples: in any order.
    :param seed: decides the order of assignment.
    :param what: the data set in words, for the message.
    :returns: split -> examples in their order in ``examples``; none is empty.
    :raises DataError: there are fewer than three patients or images.
    """
    units: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        # A pair, as a patient may be called like another one's image.
        key = ("image", example.id) if example.patient is None else ("patient", example.patient)
        units.setdefault(key, []).append(example)
    if len(units) < len(SPLITS):
        kind = "images" if len(units) == len(examples) else f"patients ({len(examples)} images)"
        raise DataError(
            f"{what} has {len(units)} {kind}, and training, validation and test need one each; add some, or give each "
            "image its split"
        )
    totals = Counter(example.label for example in examples)
    order = sorted(
        units,
        key=lambda unit: (-len(units[unit]), stable_seed("split", seed, *unit)),
    )
    counts = {split: Counter[int | None]() for split in SPLITS}
    chosen: dict[tuple[str, str], str] = {}
    for unit in order:
        labels = Counter(example.label for example in units[unit])

        def missed(split: str, labels: Mapping[int | None, int] = labels) -> int:
            # In tenths of images, so that it is exact. The labels alone would give hardly anything to validation where
            # there are many rare ones, none of which has a whole image for it.
            overall = SHARES[split] * len(examples) - 10 * counts[split].total()
            return sum(
                n * (3 * (SHARES[split] * totals[k] - 10 * counts[split][k]) + overall) for k, n in labels.items()
            )

        chosen[unit] = max(SPLITS, key=missed)
        counts[chosen[unit]].update(labels)
    for split in SPLITS:
        if split not in chosen.values():  # a few patients only: the last one of the fullest split moves
            held = Counter(chosen.values())
            fullest = max(SPLITS, key=lambda each: held[each])
            chosen[next(unit for unit in reversed(order) if chosen[unit] == fullest)] = split
    of = {example.id: chosen[unit] for unit, members in units.items() for example in members}
    return {split: [example for example in examples if of[example.id] == split] for split in SPLITS}


def refuse_shared_patients(splits: Mapping[str, Sequence[Example]], *, what: str) -> None:
    """
    :param what: where the split comes from, for the message.
    :raises DataError: images of one patient are in two splits; the message names them.
    """
    first: dict[str, tuple[str, Example]] = {}
    for split, examples in splits.items():
        for example in examples:
            if example.patient is None:
                continue
            where, other = first.setdefault(example.patient, (split, example))
            if where != split:
                raise DataError(
                    f"{what} puts patient {example.patient} into two splits: {other.id} into {where}, {example.id} "
                    f"into {split}; a network would be tested on a patient it has seen"
                )
