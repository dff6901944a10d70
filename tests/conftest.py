"""Data for tests: the real data sets where they are at hand, and a small one in the layout of COVID-CT."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Of several processes (`pytest -n 2`) each has one thread, unless a test takes more: before PyTorch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from train.data.cache import default_cache_dir

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Callable[..., Path]:
    """``shared_data("COVID-CT")`` is the folder of the real data set; the test is skipped where it is absent.

    Looked for in ``$GRADPROM_DATA`` and beside the repository, under any of several names. With
    ``GRADPROM_REQUIRE_DATA=1`` its absence is a failure, unless it is not ``required``: that is how CI makes sure that
    these tests did run.
    """
    roots = [Path(given) for given in (os.environ.get("GRADPROM_DATA"), SHARED) if given]

    def find(*names: str, required: bool = True) -> Path:
        for root in roots:
            for name in names:
                for folder in (root / name, root):
                    if folder.name == name and folder.is_dir():
                        return folder
        reason = f"the real {names[0]} is not at hand (set GRADPROM_DATA to the folder that holds it)"
        if required and os.environ.get("GRADPROM_REQUIRE_DATA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)

    return find


@pytest.fixture
def no_data_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no environment variable that leads to data or a cache."""
    for variable in ("GRADPROM_DATA", "GRADPROM_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.setenv("HOME", str(empty))
    assert default_cache_dir().is_relative_to(empty)
    return empty


@pytest.fixture
def small_covidct(tmp_path: Path) -> Path:
    """A complete data set in the layout of COVID-CT: two images per class and split, 20 x 30 pixels of noise."""
    rng = np.random.default_rng(0)
    root = tmp_path / "COVID-CT"
    for class_name in ("COVID", "NonCOVID"):
        images, lists = root / "Images-processed" / f"CT_{class_name}", root / "Data-split" / class_name
        images.mkdir(parents=True)
        lists.mkdir(parents=True)
        for split in ("train", "val", "test"):
            names = [f"{split} {class_name}%{i}.png" for i in range(2)]
            for name in names:
                Image.fromarray(rng.integers(0, 256, (20, 30), dtype=np.uint8)).save(images / name)
            (lists / f"{split}CT_{class_name}.txt").write_text("\n".join(names) + "\n")
    return root
