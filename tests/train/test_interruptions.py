"""Whatever ends a command, and whenever: the same command goes on, and ends with the digits of one that was left alone.

``GRADPROM_KILLS=30`` makes the slow tests longer (``make interruptions``)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from train.errors import RunError
from train.files import LOCK, generations, is_leftover, locked
from train.training import checkpoint

from .killing import Command, Commands, commands, count_events, die
from .tiny import arguments, digits

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork, and no SIGKILL")
KILLS = int(os.environ.get("GRADPROM_KILLS", "0"))


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Commands:
    with commands(tmp_path_factory.mktemp("started")) as found:
        yield found


@pytest.fixture(scope="module")
def server(started) -> Commands:
    """Commands whose folder is ``out`` there."""
    return started


@pytest.fixture
def out(server) -> Path:
    shutil.rmtree(server.folder / "out", ignore_errors=True)
    return server.folder / "out"


LONG = {"epochs": 16, "checkpoint_every": 4, "log_every": 2}
STEPS = 48


@pytest.fixture(scope="module")
def whole(server) -> Path:
    """A run that was left alone."""
    folder = server.folder / "whole"
    status, log = server.run("run", arguments(out=folder, **LONG))
    assert status == 0, log
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    assert digits(folder / "steps.csv") == digits(whole / "steps.csv")
    assert (folder / "images.csv").read_bytes() == (whole / "images.csv").read_bytes()
    one, other = (load_file(path / "weights.safetensors") for path in (folder, whole))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    one, other = (json.loads((path / "metrics.json").read_text()) for path in (folder, whole))
    for each in (one, other):
        del each["seconds"], each["commit"]
    assert one == other
    assert [path.name for path in folder.iterdir() if is_leftover(path.name)] == []


# --- a checkpoint, at every moment of its being written ---


def sizes() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(1000.0), "b": torch.zeros(3)}


@pytest.mark.parametrize("keep", [1, 2, 4])
@pytest.mark.parametrize("links", [True, False])
def test_killed_at_every_moment_of_a_checkpoint(tmp_path, keep, links):
    """In a forked process, before each thing that it does to the disk, until one gets through."""
    path, at, reached = tmp_path / "checkpoint.pt", 0, []
    status = signal.SIGKILL
    while status == signal.SIGKILL:
        at += 1
        for each in generations(path):
            each.unlink()
        for step in range(1, 6):
            checkpoint.save(path, {"step": step, "tensors": sizes()}, keep=keep)
        pid = os.fork()
        if not pid:
            if not links:
                os.link = lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here"))
            count_events(str(tmp_path), lambda number, _, at=at: die() if number == at else None)
            checkpoint.save(path, {"step": 6, "tensors": sizes()}, keep=keep)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        state = checkpoint.load_newest(path)[1]
        reached.append(state["step"])
        assert torch.equal(state["tensors"]["a"], sizes()["a"])
        with locked(tmp_path):  # as a run that goes on does
            assert not [each.name for each in tmp_path.iterdir() if is_leftover(each.name)]
        steps = [checkpoint.load(each)["step"] for each in generations(path)]
        assert steps == sorted(steps, reverse=True)
        assert len(set(steps)) >= keep, steps
        checkpoint.save(path, {"step": 7, "tensors": sizes()}, keep=keep)
        assert checkpoint.load(path)["step"] == 7
        assert len(generations(path)) == keep
    assert status == 0
    assert set(reached) == {5, 6} and reached == sorted(reached)
    assert at > (8 if keep > 1 else 4), "the events are not seen"


def test_what_reaches_the_disk_in_which_order(tmp_path):
    """A checkpoint has its name only once it is on the disk, and then the name is written to the disk, too."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1}, keep=2)
    told, telling = os.pipe()
    pid = os.fork()
    if not pid:
        count_events(str(tmp_path), lambda _, name: os.write(telling, name.split()[0].encode() + b"\n"))
        checkpoint.save(path, {"step": 2}, keep=2)
        os._exit(0)
    os.close(telling)
    with os.fdopen(told) as file:
        events = file.read().split()
    assert os.waitpid(pid, 0)[1] == 0
    # The file; its predecessor's second name, which becomes the predecessor; its own name; the folder.
    assert events == ["open", "fsync", "os.link", "os.rename", "os.rename", "open", "fsync"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_at_every_moment_of_a_checkpoint(tmp_path, number):
    """A full one, one that has become read-only, one that breaks: an error that names the file, and nothing is lost."""
    path, at, status = tmp_path / "checkpoint.pt", 0, 3
    while status:
        at += 1
        for each in tmp_path.iterdir():
            each.unlink()
        for step in range(1, 4):
            checkpoint.save(path, {"step": step, "tensors": sizes()}, keep=2)
        pid = os.fork()
        if not pid:
            end, failed = 1, []
            try:

                def fail(reached: int, name: str, at: int = at, failed: list[str] = failed) -> None:
                    if reached == at:
                        failed.append(name)
                        raise OSError(number, os.strerror(number))

                count_events(str(tmp_path), fail)
                checkpoint.save(path, {"step": 4, "tensors": sizes()}, keep=2)
                end = 4 if failed else 0  # a second name, and the removal of an old file, can be done without
                assert not failed or failed[0].startswith(("os.link", "os.remove"))
            except RunError as error:
                told = f"the checkpoint {path} cannot be written: {os.strerror(number)}; the earlier one is untouched"
                end = 3 if str(error) == told else 2
            finally:
                os._exit(end)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 3, 4)
        steps = [checkpoint.load(each)["step"] for each in generations(path)]
        assert steps[0] in (3, 4) and len(set(steps)) >= 2, steps
        assert [each.name for each in tmp_path.iterdir() if is_leftover(each.name)] == []
    assert at > 8, "the events are not seen"


def test_the_last_ones_are_kept_and_no_more(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for step in range(1, 8):
        checkpoint.save(path, {"step": step}, keep=3)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1.pt", "checkpoint-2.pt", "checkpoint.pt"]
    assert [checkpoint.load(each)["step"] for each in generations(path)] == [7, 6, 5]
    checkpoint.save(path, {"step": 8}, keep=1)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


# --- a checkpoint that was damaged ---


def test_every_byte_counts(tmp_path):
    """A flipped bit is noticed wherever it is, in the tensors too, where PyTorch itself looks away."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1, "tensors": {"a": torch.arange(100.0)}})
    content = path.read_bytes()
    rng = random.Random(0)
    start = content.index(np.arange(100, dtype=np.float32).tobytes())
    places = [start + 40, len(content) - 1, len(content) - 65, len(content) - 70, len(content) - 85, 0]
    for place in [*places, *(rng.randrange(len(content)) for _ in range(60))]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(RunError, match=f"the checkpoint {path} cannot be read; it is damaged"):
            checkpoint.load(path)
        assert path.read_bytes() == flipped
    for length in [*range(len(content) - 100, len(content)), *range(0, len(content), 97)]:
        path.write_bytes(content[:length])
        with pytest.raises(RunError, match="cannot be read; it is damaged"):
            checkpoint.load(path)
    path.write_bytes(content)
    assert checkpoint.load(path)["step"] == 1
    assert torch.load(path, weights_only=True)["step"] == 1, "others can read it, too"


def damage(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.unlink()  # another file, should it have a second name
    path.write_bytes(content)
    return bytes(content)


def content(folder: Path) -> dict[Path, bytes]:
    """Of all files but the lock, and what a killed process had begun to write."""
    return {path: path.read_bytes() for path in folder.iterdir() if path.name != LOCK and not is_leftover(path.name)}


def test_the_next_older_one_is_taken(server, whole, out):
    status, log = server.run("run", arguments(out=out, **LONG), kill_at=90)
    assert status == -signal.SIGKILL, log
    steps = [checkpoint.load(path)["step"] for path in generations(out / "checkpoint.pt")]
    assert 0 < steps[-1] < steps[0] < STEPS
    for path in generations(out / "checkpoint.pt")[: steps.count(steps[0])]:  # killed while one had two names
        damage(path)
    whole_one = generations(out / "checkpoint.pt")[steps.count(steps[0])]
    status, log = server.run("run", ["--resume", str(out)])
    assert status == 0, log
    assert f"the checkpoint {out / 'checkpoint.pt'} cannot be read; it is damaged" in log
    assert f"The run goes on from an older one, {whole_one}." in log
    assert_same_run(out, whole)


def test_none_is_whole(server, out):
    status, log = server.run("run", arguments(out=out, **LONG), kill_at=90)
    assert status == -signal.SIGKILL, log
    for path in generations(out / "checkpoint.pt"):
        damage(path)
    before = content(out)
    status, log = server.run("run", ["--resume", str(out)])
    assert status == 2
    assert f"Error: the checkpoint {out / 'checkpoint.pt'} cannot be read; it is damaged" in log
    assert content(out) == before


def test_a_checkpoint_of_other_settings(server, whole, out):
    status, log = server.run("run", arguments(out=out, **LONG | {"ip.features": 5}), kill_at=90)
    assert status == -signal.SIGKILL, log
    (out / "checkpoint.pt").unlink()  # which may have a second name
    (out / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes())
    before = content(out)
    status, log = server.run("run", ["--resume", str(out)])
    assert status == 2
    assert "checkpoint.pt is that of another model: ip.head" in log
    assert content(out) == before


def test_a_run_on_a_full_disk(server, whole, out):
    """The first checkpoint fits, and a later one, which has the states of the optimizers, does not."""
    smallest = min(path.stat().st_size for path in whole.glob("checkpoint*.pt"))
    status, log = server.run("run", arguments(out=out, **LONG), longest=smallest // 2 + 6000)
    assert status == 2
    assert f"Error: the checkpoint {out / 'checkpoint.pt'} cannot be written: {os.strerror(errno.EFBIG)}" in log
    assert "the earlier one is untouched" in log
    assert checkpoint.load(out / "checkpoint.pt")["step"] == 0
    status, log = server.run("run", ["--resume", str(out)])
    assert status == 0, log
    assert_same_run(out, whole)


# --- a run ---


def until_done(server: Commands, command: str, first: list[str], again: list[str], out: Path, kills: list[int]) -> int:
    """Gives a command again and again, killed before its nth event each.

    :returns: how many of them were killed.
    """
    killed = 0
    for kill_at in kills:
        go_on = bool(generations(out / "checkpoint.pt")) or command == "compare"
        if not go_on and out.is_dir():  # killed before its first checkpoint: what the message says
            status, log = server.run(command, again)
            assert status == 2 and "remove the folder, and start the run again" in log.replace("\n", " "), log
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        status, log = server.run(command, again if go_on else first, kill_at=kill_at)
        assert status in (0, -signal.SIGKILL), log
        killed += status == -signal.SIGKILL
    return killed


def test_a_run_that_is_killed_thirty_times(server, whole, out):
    """At moments from the making of its folder to its last file."""
    rng = random.Random(1)
    first, again = arguments(out=out, **LONG), ["--resume", str(out)]
    kills = iter([1, 2, 3, 5, 8, 11, *(rng.randrange(6, 36) for _ in range(1000))])
    in_training = in_evaluation = 0
    while (step := newest_step(out)) != STEPS:
        in_training += until_done(server, "run", first, again, out, [next(kills)])
    for kill_at in (5, 9, 12, 15, 18, 21, 24):
        assert newest_step(out) == step
        in_evaluation += until_done(server, "run", first, again, out, [kill_at])
    assert in_training >= 24 and in_evaluation >= 6
    status, log = server.run("run", again)
    assert status == 0, log
    assert_same_run(out, whole)


def test_a_run_whose_best_networks_are_its_result_is_killed(server, out):
    """While it trains, looks at validation images, and evaluates the networks that were best."""
    looking = LONG | {"validate_every": 3, "select": "best", "lr": 0.05}
    left_alone = server.folder / "left alone"
    status, log = server.run("run", arguments(out=left_alone, **looking))
    assert status == 0, log
    rng = random.Random(3)
    first, again = arguments(out=out, **looking), ["--resume", str(out)]
    killed = until_done(server, "run", first, again, out, [30, *(rng.randrange(20, 60) for _ in range(5))])
    while newest_step(out) != STEPS:
        killed += until_done(server, "run", first, again, out, [90])
    killed += until_done(server, "run", first, again, out, [16, 20, 24])
    assert killed >= 7
    status, log = server.run("run", again)
    assert status == 0, log
    assert_same_run(out, left_alone)
    assert (out / "validation.csv").read_bytes() == (left_alone / "validation.csv").read_bytes()
    best, result = (load_file(out / f"{name}.safetensors") for name in ("best", "weights"))
    assert [name for name in best if not torch.equal(best[name], result[name])] == []


def newest_step(out: Path) -> int:
    path = out / "checkpoint.pt"
    return int(checkpoint.load_newest(path)[1]["step"]) if generations(path) else 0


def test_a_comparison_that_is_killed(server, out):
    """Runs one after the other, at moments from the first file to the last."""
    argv = ["--recipe", "tiny-throughout", "--jobs", "1", "--seeds", "0,1", "--out", str(out)]
    status, log = server.run("compare", argv)
    assert status == 0, log
    table = (out / "table.csv").read_bytes()
    shutil.rmtree(out)
    rng = random.Random(2)
    kills = [1, 2, 4, *(rng.randrange(10, 120) for _ in range(7))]
    assert until_done(server, "compare", argv, argv, out, kills) >= 8
    status, log = server.run("compare", argv)
    assert status == 0, log
    assert (out / "table.csv").read_bytes() == table


def processes_of(folder: Path) -> list[int]:
    """The processes of a comparison: those that have a run of it under lock."""
    return [json.loads(path.read_text())["pid"] for path in folder.glob("runs/**/run.lock") if path.stat().st_size]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_comparison_whose_processes_are_stopped_and_killed(server, out):
    """Side by side: asked to stop, then its first process killed, then one of the others, and then left alone."""
    slow = ["--set", "epochs=100", "--set", "checkpoint_every=100000", "--set", "log_every=1"]
    argv = ["--recipe", "tiny-throughout", "--out", str(out), *slow]

    def logged() -> int:
        return sum(each.read_text().count("\n") for each in out.glob("runs/**/steps.csv"))

    def start(steps: int) -> Command:
        """Until so many more steps are done."""
        before = logged()
        command = server.start("compare", [*argv, "--jobs", "2"])
        # What was done after the last checkpoint is forgotten first, and then done again.
        command.wait_for(lambda: logged() > before + steps and any(not gone(each) for each in processes_of(out)))
        return command

    command = start(20)
    (worker, *_) = processes_of(out)
    assert worker != command.pid
    command.send(signal.SIGTERM)
    assert command.status() == 143, command.log.read_text()
    log = command.log.read_text()
    assert "To go on, give the same command again:" in log and "Traceback" not in log
    assert gone(worker), "a process outlives the command"
    saved = [checkpoint.load(path)["step"] for path in out.glob("runs/**/checkpoint.pt")]
    assert any(step >= 20 for step in saved), "nothing was saved"

    command = start(20)
    (worker,) = (each for each in processes_of(out) if not gone(each))
    command.send(signal.SIGKILL)
    assert command.status() == -signal.SIGKILL
    command.wait_for(lambda: gone(worker))  # by itself, and not at once: it has a checkpoint to write
    again = [checkpoint.load(path)["step"] for path in out.glob("runs/**/checkpoint.pt")]
    assert sum(again) >= sum(saved) + 20

    if KILLS:
        command = start(20)
        (worker,) = (each for each in processes_of(out) if not gone(each))
        os.kill(worker, signal.SIGKILL)
        assert command.status() == 2
        assert "a process of the comparison was ended from outside" in command.log.read_text()

    status, log = server.run("compare", [*argv, "--jobs", "1"])
    assert status == 0, log
    table = (out / "table.csv").read_text()
    shutil.rmtree(out)
    status, log = server.run("compare", [*argv, "--jobs", "1"])
    assert status == 0, log
    assert (out / "table.csv").read_text() == table


def test_a_run_that_is_killed_by_the_clock(server, whole, out):
    """At random moments, whatever it is doing: computing, too."""
    rng, killed = random.Random(KILLS), 0
    begun = time.monotonic()
    status, log = server.run("run", arguments(out=out, **LONG))
    lasts = time.monotonic() - begun
    assert status == 0, log
    shutil.rmtree(out)
    while killed < (KILLS or 8):
        if not generations(out / "checkpoint.pt"):
            shutil.rmtree(out, ignore_errors=True)
            command = server.start("run", arguments(out=out, **LONG))
        else:
            command = server.start("run", ["--resume", str(out)])
        moment = time.monotonic() + rng.uniform(0.05, 0.8) * lasts
        while time.monotonic() < moment and not gone(command.pid):
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            command.send(signal.SIGKILL)
        status = command.status()
        assert status in (0, -signal.SIGKILL), command.log.read_text()
        killed += status != 0
        if status == 0:  # it was done before: kill another one
            assert_same_run(out, whole)
            shutil.rmtree(out)
    if generations(out / "checkpoint.pt"):
        status, log = server.run("run", ["--resume", str(out)])
        assert status == 0, log
        assert_same_run(out, whole)


@pytest.mark.skipif(not KILLS, reason="takes minutes; make interruptions")
def test_a_comparison_of_forty_runs_that_is_killed_by_the_clock(server, out):
    """Its first process or any other one, until it is done."""
    rng = random.Random(KILLS)
    argv = ["--recipe", "tiny-throughout", "--seeds", ",".join(map(str, range(20))), "--out", str(out)]
    status, log = server.run("compare", [*argv, "--jobs", "1"])
    assert status == 0, log
    table = (out / "table.csv").read_bytes()
    shutil.rmtree(out)
    killed = 0
    for _ in range(KILLS):
        command = server.start("compare", [*argv, "--jobs", "2"])
        moment = time.monotonic() + rng.uniform(2, 20)
        while time.monotonic() < moment and not gone(command.pid):
            time.sleep(0.05)
        victims = [command.pid, *processes_of(out)]
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(victims), signal.SIGKILL)
        status = command.status()
        assert status in (0, 2, -signal.SIGKILL), command.log.read_text()
        assert status != 2 or "ended from outside" in command.log.read_text()
        killed += status != 0
        for each in victims:
            command.wait_for(lambda each=each: gone(each))
        if status == 0:
            break
    assert killed >= min(KILLS, 4)
    status, log = server.run("compare", [*argv, "--jobs", "1"])
    assert status == 0, log
    assert (out / "table.csv").read_bytes() == table


# --- signals ---


def at_step(command: Command, folder: Path, step: int) -> None:
    table = folder / "steps.csv"
    command.wait_for(lambda: table.exists() and table.read_text().count("\n") > step)


ENDLESS = {"epochs": 100_000, "checkpoint_every": 10**6, "checkpoint_minutes": 1e6}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 1])
def test_asked_to_stop(server, out, number, workers):
    folder = out / "a run"  # the command that is printed must survive the blank
    command = server.start("run", arguments(out=folder, num_workers=workers, **ENDLESS))
    at_step(command, folder, 5)
    command.send(number)
    assert command.status() == 128 + number
    log = command.log.read_text()
    assert "Traceback" not in log
    assert f"To go on:\n  python -m train.run --resume '{folder}'" in log
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert step >= 5 and f"Stopped after step {step} of" in log
    assert (folder / "steps.csv").read_text().count("\n") == step + 1
    assert not (folder / LOCK).exists()


def test_a_pre_training_is_asked_to_stop(server, out):
    command = server.start("pretrain", arguments(out=out, vr="tiny-encoder", crop=16, **ENDLESS))
    at_step(command, out, 3)
    command.send(signal.SIGTERM)
    assert command.status() == 143, command.log.read_text()
    log = command.log.read_text()
    assert f"To go on:\n  python -m train.run --resume {out}" in log
    again = server.start("run", ["--resume", str(out)])
    at_step(again, out, torch.load(out / "checkpoint.pt", weights_only=True)["step"] + 2)
    again.send(signal.SIGTERM)
    assert again.status() == 143


def test_a_training_that_a_run_stands_on_is_asked_to_stop(server, whole, out):
    """The clean VR, in the cache: it goes on there, and the run begins with what it would have been."""
    argv = arguments(out=out, vr_start="clean", vr_update="fixed", clean_epochs=100, clean_batch_size=4, max_steps=3)
    cache, weights = server.folder / "cache", []
    for interrupted in (True, False):
        shutil.rmtree(cache, ignore_errors=True)
        if interrupted:
            command = server.start("run", argv)
            command.wait_for(lambda: any(t.read_text().count("\n") > 20 for t in cache.glob("*.unfinished/steps.csv")))
            command.send(signal.SIGTERM)
            assert command.status() == 143, command.log.read_text()
            assert "To go on, give the same command again:" in command.log.read_text()
            (left,) = cache.glob("*.unfinished/checkpoint.pt")
            assert 20 <= checkpoint.load(left)["step"] < 300
            assert not out.exists()
        status, log = server.run("run", argv)
        assert status == 0, log
        assert not list(cache.glob("*.unfinished"))
        weights.append(load_file(out / "weights.safetensors"))
        shutil.rmtree(out)
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []


def test_the_second_signal_ends_at_once(server, out):
    """Even where the first one waits for a step that does not end."""
    first = arguments(out=out, **ENDLESS | {"log_every": 10**6})
    command = server.start("run", [*first, "--checkpoint-every", "1"])
    command.wait_for(lambda: (out / "steps.csv").exists())
    os.kill(command.pid, signal.SIGSTOP)  # both signals meet it at the same instruction
    command.send(signal.SIGTERM)
    time.sleep(0.05)
    os.kill(command.pid, signal.SIGCONT)
    command.send(signal.SIGINT)
    status = command.status()
    assert status in (-signal.SIGINT, -signal.SIGTERM)  # whichever Python looks at last
    assert checkpoint.load_newest(out / "checkpoint.pt")[1]["step"] >= 0
