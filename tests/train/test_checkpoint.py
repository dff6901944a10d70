from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from train.errors import RunError
from train.training import checkpoint


def parts(width: int = 3) -> dict[str, checkpoint.Part]:
    network = nn.Linear(2, width)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"net": network, "net_optimizer": optimizer}


def state_of(parts: dict[str, checkpoint.Part]) -> dict:
    return {name: part.state_dict() for name, part in parts.items()}


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoint.pt"
    saved, other = parts(), parts()
    checkpoint.save(path, {"step": 7, **state_of(saved)})
    state = checkpoint.load(path)
    checkpoint.restore(path, state, other)
    assert state["step"] == 7
    assert torch.equal(other["net"].weight, saved["net"].weight)
    assert str(other["net_optimizer"].state_dict()) == str(saved["net_optimizer"].state_dict())
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.fixture
def small_disk():
    """Files cannot grow beyond 64 KiB: writing fails in the midst of a file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("earlier", [True, False])
def test_a_write_that_fails_halfway(tmp_path, small_disk, earlier):
    path = tmp_path / "checkpoint.pt"
    if earlier:
        checkpoint.save(path, {"step": 1})
    kept = path.read_bytes() if earlier else None
    with pytest.raises(RunError) as error:
        checkpoint.save(path, {"big": torch.zeros(1 << 18)})
    assert str(path) in str(error.value)
    assert os.strerror(errno.EFBIG) in str(error.value)
    assert ("the earlier one is untouched" in str(error.value)) == earlier
    assert (path.read_bytes() if earlier else None) == kept
    assert os.listdir(tmp_path) == (["checkpoint.pt"] if earlier else [])


def test_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="cannot be written: No space left on device; the earlier one is untouched"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated(tmp_path, share):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1, **state_of(parts())})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(RunError, match=f"the checkpoint {path} cannot be read; it is damaged"):
        checkpoint.load(path)


def test_missing(tmp_path):
    with pytest.raises(RunError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "checkpoint.pt")


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_executes_nothing(tmp_path):
    path, folder = tmp_path / "checkpoint.pt", tmp_path / "trapped"
    torch.save({"version": checkpoint.VERSION, "trap": Trap(folder)}, path)
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.load(path)
    assert not folder.exists()


@pytest.mark.parametrize("content", [{"step": 1}, {"version": 0}, [1, 2]])
def test_something_else(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(RunError, match="is not a checkpoint of this version"):
        checkpoint.load(path)


def test_another_model(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state_of(parts(width=3)))
    others = parts(width=4)
    before = str(state_of(others))
    with pytest.raises(RunError, match=r"another model: net\.weight is \[3, 2\] there and \[4, 2\] here"):
        checkpoint.restore(path, checkpoint.load(path), others)
    assert str(state_of(others)) == before


def test_another_kind_of_run(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state_of(parts()))
    with pytest.raises(RunError, match="another kind of run: it has no vr"):
        checkpoint.restore(path, checkpoint.load(path), parts() | {"vr": nn.Linear(1, 1)})
