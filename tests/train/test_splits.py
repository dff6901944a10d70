"""Seeded splits: shares, patients, labels; and what a new image changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train.data import DataError
from train.data.base import Example
from train.data.readers import ImageFile
from train.data.splits import refuse_shared_patients, seeded

SPLITS = ("train", "val", "test")
# The same examples in every run, and no clock: a busy machine is no failure.
STEADY = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NOWHERE = ImageFile(Path("nowhere"))


def examples(labels: list[int | None], patients: list[str | None] | None = None) -> list[Example]:
    return [
        Example(f"{i}.png", NOWHERE, label=label, patient=patients[i] if patients else None)
        for i, label in enumerate(labels)
    ]


def split(given_examples: list[Example], seed: int = 0) -> dict[str, list[Example]]:
    return seeded(given_examples, seed=seed, what="this set")


@STEADY
@given(st.lists(st.integers(0, 3) | st.none(), min_size=12, max_size=120), st.integers(0, 5))
def test_shares_label_by_label(labels: list[int | None], seed: int) -> None:
    """Within two images of 70, 10 and 20 per cent, in all and of each label."""
    found = split(examples(labels), seed)
    for name, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        assert abs(len(found[name]) - share * len(labels)) <= 2
    assert sorted(e.id for each in found.values() for e in each) == sorted(e.id for e in examples(labels))
    for label, total in Counter(labels).items():
        for name, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
            number = sum(example.label == label for example in found[name])
            assert abs(number - share * total) <= 2
    assert all(found.values())


@STEADY
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([*"abcdefghijkl", None])), min_size=20, max_size=90),
    st.integers(0, 3),
)
def test_no_patient_is_in_two_splits(pairs: list[tuple[int, str | None]], seed: int) -> None:
    pairs += [(0, patient) for patient in "xyz"]  # as many as it takes
    found = split(examples([label for label, _ in pairs], [patient for _, patient in pairs]), seed)
    of = {name: {e.patient for e in found[name] if e.patient} for name in SPLITS}
    assert len(of["train"] | of["val"] | of["test"]) == sum(map(len, of.values()))
    assert all(found.values())


def test_many_rare_labels() -> None:
    found = split(examples([i // 3 for i in range(300)]))
    assert [len(found[name]) for name in SPLITS] == pytest.approx([210, 30, 60], abs=2)


def test_patients_of_many_sizes() -> None:
    """Forty patients with one to eight images each: the shares come out within the size of a patient."""
    patients = [f"p{i}" for i in range(40) for _ in range(1 + i % 8)]
    found = split(examples([int(patient[1:]) % 2 for patient in patients], patients))
    assert [len(found[name]) / len(patients) for name in SPLITS] == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
    for name in SPLITS:
        assert sum(e.label == 1 for e in found[name]) / len(found[name]) == pytest.approx(20 * 5 / 180, abs=0.1)


def test_the_seed_and_the_names_decide_and_nothing_else() -> None:
    base = examples([i % 3 for i in range(60)])
    names = {name: {e.id for e in each} for name, each in split(base).items()}
    assert {name: {e.id for e in each} for name, each in split(base[::-1]).items()} == names
    assert {name: {e.id for e in each} for name, each in split(base, seed=1).items()} != names
    assert [e.id for e in split(base)["train"]] == [e.id for e in base if e.id in names["train"]]


def test_never_changes() -> None:
    """The images that runs were tested on today are those of tomorrow."""
    found = split(examples([i % 2 for i in range(20)], [f"patient {i // 2}" for i in range(20)]))
    assert [e.id for e in found["test"]] == ["6.png", "7.png", "10.png", "11.png"]
    assert [e.id for e in found["val"]] == ["16.png", "17.png"]


@pytest.mark.parametrize("n", range(3, 12))
def test_few_images_fill_every_split(n: int) -> None:
    found = split(examples([0] * n))
    assert all(found.values())
    assert len(found["train"]) >= max(len(found["val"]), len(found["test"]))


@pytest.mark.parametrize(
    ("patients", "culprit"),
    [(None, "has 2 images"), ([*"aa"], r"has 1 patients \(2 images\)")],
)
def test_too_few(patients: list[str] | None, culprit: str) -> None:
    with pytest.raises(DataError, match=f"this set {culprit}"):
        split(examples([0, 1], patients))


def test_a_given_split_may_not_share_a_patient() -> None:
    a, b, c = examples([0, 0, 0], ["x", "y", "x"])
    refuse_shared_patients({"train": [a, c], "val": [], "test": [b]}, what="labels.csv")
    with pytest.raises(
        DataError, match=r"labels\.csv puts patient x into two splits: 0\.png into train, 2\.png into t"
    ):
        refuse_shared_patients({"train": [a], "val": [], "test": [b, c]}, what="labels.csv")
