"""The folder of a run: one process at a time, recognizable data, and one line about whatever is wrong with it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from train.data.fingerprint import differences, fingerprint
from train.errors import RunError
from train.files import LOCK, is_locked, locked
from train.outputs.run_folder import new_folder
from train.run import main
from train.training import checkpoint

from .test_resume import wait_for_steps
from .tiny import arguments, digits, image_data, name_of

ROOT = Path(__file__).parents[2]


def start(*args: str, code: str | None = None, **options) -> subprocess.Popen[str]:
    program = ["-m", "tests.train.tiny"] if code is None else ["-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, *program, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in environment.items() if value is not None},
        **options,
    )


def one_line(process: subprocess.Popen[str]) -> str:
    """The one line of an error of the user's."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, (out, err)
    (line,) = err.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty working directory and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRADPROM_DATA", raising=False)
    return tmp_path


def unfinished(folder: Path) -> Path:
    """Makes a finished run one that was stopped just before its evaluation."""
    (folder / "metrics.json").unlink()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestOwnership:
    def test_two_runs_that_start_together(self, tmp_path):
        """Both have loaded their data before either makes its folder."""
        code = """if True:
            import pathlib, sys, time
            import tests.train.tiny
            from train import experiment, run

            mine, other = (pathlib.Path(each) for each in sys.argv[1:3])
            load_data = experiment.load_data

            def load_together(*args, **options):
                data = load_data(*args, **options)
                mine.touch()
                while not other.exists():
                    time.sleep(0.001)
                return data

            experiment.load_data = load_together
            sys.exit(run.main(sys.argv[3:]))
        """
        options = arguments(strategy="ip-only")
        both = [start(*names, *options, code=code, cwd=tmp_path) for names in (("a", "b"), ("b", "a"))]
        for process in both:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, (out, err)
        name = name_of(strategy="ip-only")
        folders = sorted((tmp_path / "runs").iterdir())
        assert [folder.name for folder in folders] == [name, f"{name}-2"]
        for folder in folders:
            steps = [line.split(",")[0] for line in (folder / "steps.csv").read_text().splitlines()]
            assert steps == ["step", *(str(step) for step in range(1, 7))]
            assert json.loads((folder / "metrics.json").read_text())["steps"] == 6

    def test_each_its_own(self):
        with new_folder(None, "run") as one, new_folder(None, "run") as other:
            assert (one, other) == (Path("runs/run"), Path("runs/run-2"))
            message = r"^runs/run is at work in another process \(process \d+ on "
            with pytest.raises(RunError, match=message), new_folder(one, "unused"):
                pass

    def test_nothing_is_left_of_a_run_that_wrote_nothing(self, tmp_path):
        (tmp_path / "there").mkdir()
        for out in (None, Path("a/b/c"), Path("there")):
            with pytest.raises(KeyboardInterrupt), new_folder(out, "run"):
                raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == [tmp_path / "there"], "which was there before"
        with new_folder(Path("a/b"), "run") as folder:
            (folder / "config.json").touch()
        assert [path.name for path in folder.iterdir()] == ["config.json"]

    def test_a_foreign_folder_gets_no_lock(self, tmp_path):
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter.txt").touch()
        with pytest.raises(RunError, match="--out thesis is not empty"), new_folder(Path("thesis"), "run"):
            pass
        assert os.listdir("thesis") == ["chapter.txt"]

    def test_one_at_work(self, tmp_path):
        folder = tmp_path / "runs" / "long"
        # The worker outlives its killed parent for a while, and must not keep the lock alive.
        process = start(*arguments(out=folder, epochs=100_000, num_workers=1, checkpoint_every=1), cwd=tmp_path)
        others: list[subprocess.Popen[str]] = []
        try:
            wait_for_steps(folder, process, 2)
            others = [
                start("--resume", str(folder), cwd=tmp_path),
                start(*arguments(out=folder), cwd=tmp_path),
                start("--resume", "latest", cwd=tmp_path),
            ]
            for other in others:
                line = one_line(other)
                assert f"{folder.name} is at work" in line or "every run under runs/ is at work" in line
            assert json.loads((folder / LOCK).read_text())["pid"] == process.pid
            assert is_locked(folder)
            assert process.poll() is None, "it was not disturbed"
        finally:
            for each in (*others, process):
                each.kill()
                each.wait()
        assert (folder / LOCK).exists()
        assert not is_locked(folder), "a lock does not outlive its process"
        with locked(folder):
            assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
        assert not (folder / LOCK).exists()
        process.communicate()
        steps = (folder / "steps.csv").read_text().splitlines()[1:-1]  # the last line may be cut off
        assert [int(row.split(",")[0]) for row in steps] == list(range(1, len(steps) + 1))

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\0"])
    def test_a_lock_that_says_nothing(self, tmp_path, content):
        (tmp_path / LOCK).write_text(content)
        assert not is_locked(tmp_path)
        with locked(tmp_path):
            (tmp_path / LOCK).write_text(content)
            message = f"^{tmp_path} is at work in another process; wait until"
            with pytest.raises(RunError, match=message), locked(tmp_path):
                pass


@pytest.fixture
def real_run(small_covidct) -> tuple[Path, Path]:
    """A run on the small data set that was stopped before its evaluation, and the data set's folder."""
    small = {"dataset": "covidct", "source": "auto", "max_steps": 1, "batch_size": 2}
    assert main(arguments(**small, data_root=small_covidct, out="run")) == 0
    return unfinished(Path("run")), small_covidct


def image(root: Path, name: str = "train COVID%0.png") -> Path:
    return root / "Images-processed" / "CT_COVID" / name


def invert(path: Path) -> None:
    """Keeps the size, the time and the place of a file, as far as a program can."""
    times = path.stat()
    pixels = np.asarray(Image.open(path))
    Image.fromarray(255 - pixels).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def reorder(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "images inverted": (
        lambda root: [invert(path) for path in root.rglob("*.png")],
        "training images: other pixels; validation images: other pixels; test images: other pixels",
    ),
    "one test image": (lambda root: invert(image(root, "test COVID%1.png")), ": test images: other pixels."),
    "list reordered": (
        lambda root: reorder(root / "Data-split/COVID/trainCT_COVID.txt"),
        ": training images: other names or order, pixels.",
    ),
    "image renamed": (
        lambda root: (
            image(root).rename(image(root, "other.png")),
            (root / "Data-split/COVID/trainCT_COVID.txt").write_text("other.png\ntrain COVID%1.png\n"),
        ),
        ": training images: other names or order.",
    ),
    "list shorter": (
        lambda root: (root / "Data-split/COVID/valCT_COVID.txt").write_text("val COVID%1.png\n"),
        "validation images: other number (4 then, 3 now), names or order, labels, pixels",
    ),
}


class TestData:
    @pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
    def test_other_data_are_refused(self, real_run, capsys, change, message):
        folder, root = real_run
        before = contents(folder)
        change(root)
        assert main(["--resume", "run"]) == 2
        err = capsys.readouterr().err
        assert f"Error: --resume run: the images in {root} are not the data that the run began with" in err
        assert message in err
        assert contents(folder) == before

    def test_another_data_set_found_elsewhere(self, real_run, capsys, monkeypatch, tmp_path):
        _, root = real_run
        other = tmp_path / "other" / "COVID-CT"
        shutil.copytree(root, other)
        shutil.rmtree(root)
        invert(image(other))
        monkeypatch.setenv("GRADPROM_DATA", str(other.parent))
        assert main(["--resume", "run"]) == 2
        assert f"the images in {other} are not the data that the run began with" in capsys.readouterr().err
        assert main(["--resume", "run", "--data-root", str(other)]) == 2

    @pytest.mark.parametrize("found_by", ["--data-root", "$GRADPROM_DATA", "data/"])
    def test_the_same_data_may_move(self, real_run, monkeypatch, tmp_path, found_by):
        folder, root = real_run
        moved = tmp_path / "archive" / "COVID-CT-master"
        shutil.copytree(root, moved)
        shutil.rmtree(root)
        if found_by == "$GRADPROM_DATA":
            monkeypatch.setenv("GRADPROM_DATA", "archive")
        elif found_by == "data/":
            moved.parent.rename("data")
        options = ["--data-root", "archive"] if found_by == "--data-root" else []
        assert main(["--resume", "run", *options]) == 0
        assert json.loads((folder / "metrics.json").read_text())["data"] == "real"

    def test_real_data_do_not_turn_into_phantoms(self, real_run, capsys, monkeypatch):
        _, root = real_run
        shutil.rmtree(root)
        monkeypatch.setattr("train.data.sets.covidct.download", offline)
        assert main(["--resume", "run"]) == 2
        assert f"COVID-CT is not in {root}, data, and could not be downloaded" in capsys.readouterr().err

    def test_data_root_of_a_run_that_goes_on(self, real_run, capsys):
        assert main(["--resume", "run", "--data-root", "typo"]) == 2
        assert "--data-root typo: there is no such folder" in capsys.readouterr().err

    def test_a_run_of_an_earlier_version_goes_on(self, real_run):
        folder, _ = real_run
        (folder / "data.json").unlink()
        assert main(["--resume", "run"]) == 0

    def test_the_folder_used_is_shown_and_stored(self, small_covidct, monkeypatch, capsys):
        monkeypatch.setenv("GRADPROM_DATA", str(small_covidct.parent))
        small = {"dataset": "covidct", "source": "auto", "max_steps": 1, "batch_size": 2}
        assert main(arguments(**small, out="run")) == 0
        assert f"data folder: {small_covidct}" in capsys.readouterr().out
        assert json.loads(Path("run/config.json").read_text())["data"]["data_root"] == str(small_covidct)

    def test_every_fact_counts(self):
        """Each change alone makes another fingerprint, and the message names it."""
        then = fingerprint(image_data())
        assert differences(json.loads(json.dumps(then)), fingerprint(image_data())) == []
        for path, word in (
            (("source",), "source"),
            (("classes",), "classes"),
            (("splits", "val", "labels"), "validation images: other labels"),
            (("splits", "test", "masks"), "test images: other masks"),
            (("splits", "train", "shape"), "shape (other then, [16, 16, 1] now)"),
        ):
            stored = json.loads(json.dumps(then))
            place = stored
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = "other"
            (message,) = differences(stored, then)
            assert word in message

    def test_labels_swapped(self):
        """The oracle is another data set with the same images: only the labels differ."""
        one, other = image_data(), image_data()
        object.__setattr__(other.train, "labels", 1 - one.train.labels)
        assert differences(fingerprint(one), fingerprint(other)) == ["training images: other labels"]


def offline(*_: object, **__: object) -> None:
    from train.data import DataUnavailableError

    raise DataUnavailableError("no network")


@pytest.fixture(scope="module")
def run_of_two_steps(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("module")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADPROM_CACHE", str(place / "cache"))
        assert main(arguments(max_steps=2, out=place / "run")) == 0
    return place / "run"


@pytest.fixture
def copy(run_of_two_steps, tmp_path) -> Path:
    """A finished run."""
    shutil.copytree(run_of_two_steps, tmp_path / "run")
    return tmp_path / "run"


def edit_lines(edit: Callable[[list[str]], list[str]]) -> Callable[[bytes], bytes]:
    return lambda content: "".join(edit(content.decode().splitlines(keepends=True))).encode()


HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "blank last line": lambda content: content + b"\n",
    "blank lines": lambda content: content.replace(b"\n", b"\n \n\n"),
    "Windows line ends": lambda content: content.replace(b"\n", b"\r\n"),
    "byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "no last line end": lambda content: content.rstrip(b"\n"),
    "a line cut off after the checkpoint": lambda content: content + b"3,train,0.",
    "bytes that are no text after the checkpoint": lambda content: content + b"3,train,\xff\0\0\0",
}
HARMFUL: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "no header": (edit_lines(lambda lines: lines[1:]), "damaged at line 1: it must be the header step,phase,loss"),
    "another header": (lambda content: content.replace(b"psnr", b"snr"), "damaged at line 1: it must be the header"),
    "empty": (lambda content: b"", "damaged at line 1: it must be the header"),
    "first step missing": (edit_lines(lambda lines: [lines[0], lines[2]]), "line 2: it must be that of step 1"),
    "last step missing": (edit_lines(lambda lines: lines[:2]), "line 3: the steps 2 to 2"),
    "a step twice": (edit_lines(lambda lines: [*lines[:2], *lines[1:]]), "line 3: it must be that of step 2"),
    "a cell missing": (lambda content: content.replace(b"train,", b"", 1), "line 2: it has 13 cells instead of 14"),
    "no number": (lambda content: content.replace(b"2,train,", b"2,train,x"), "line 3: loss is 'x"),
    "binary": (lambda content: b"\x89PNG\0\xff\n", "damaged at line 1"),
}


def refused(capsys, *args: str) -> str:
    assert main(list(args)) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("Error: "), err
    return err


class TestDamage:
    @pytest.mark.parametrize("edit", HARMLESS.values(), ids=HARMLESS)
    def test_step_logs_as_people_leave_them(self, copy, edit):
        table = unfinished(copy) / "steps.csv"
        original, written = table.read_bytes(), digits(table)
        table.write_bytes(edit(original))
        assert main(["--resume", str(copy)]) == 0
        assert digits(table) == written and table.read_bytes() == original
        assert json.loads((copy / "metrics.json").read_text())["steps"] == 2

    @pytest.mark.parametrize(("edit", "message"), HARMFUL.values(), ids=HARMFUL)
    def test_step_logs_that_lack_something(self, copy, capsys, edit, message):
        table = unfinished(copy) / "steps.csv"
        table.write_bytes(edit(table.read_bytes()))
        before = contents(copy)
        err = refused(capsys, "--resume", str(copy))
        assert f"the step log {table} is damaged at" in err and message in err
        assert contents(copy) == before

    def test_no_step_log(self, copy, capsys):
        (unfinished(copy) / "steps.csv").unlink()
        assert f"the step log {copy}/steps.csv cannot be read: No such file" in refused(capsys, "--resume", str(copy))

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"run": "x"}', b"\xff", b"[" * 100_000])
    @pytest.mark.parametrize("name", ["metrics.json", "config.json", "data.json"])
    def test_json_files(self, copy, capsys, name, content):
        if name != "metrics.json":
            unfinished(copy)
        (copy / name).write_bytes(content)
        err = refused(capsys, "--resume", str(copy))
        assert f"{copy}/{name}" in err

    @pytest.mark.parametrize("value", ["many", None, [1]])
    def test_a_metric_of_another_kind(self, copy, capsys, value):
        path = copy / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": value}))
        err = refused(capsys, "--resume", str(copy))
        assert f"{path} is damaged" in err and "--resume evaluates the run again" in err
        path.unlink()
        assert main(["--resume", str(copy)]) == 0

    @pytest.mark.parametrize("name", ["metrics.json", "config.json", "data.json", "steps.csv", "checkpoint.pt"])
    def test_a_folder_in_place_of_a_file(self, copy, capsys, name):
        if name != "metrics.json":
            unfinished(copy)
        for each in copy.glob(name.replace(".pt", "*.pt")):  # where one checkpoint is whole, the run goes on from it
            each.unlink()
        (copy / name).mkdir()
        assert name in refused(capsys, "--resume", str(copy))

    def test_a_checkpoint_that_lacks_something(self, copy, capsys):
        path = unfinished(copy) / "checkpoint.pt"
        state = torch.load(path, weights_only=True)
        checkpoint.save(path, {name: value for name, value in state.items() if name != "random"})
        assert f"the checkpoint {path} is none of a run: it has no random" in refused(capsys, "--resume", str(copy))

    @pytest.mark.parametrize("flag", ["--out", "--resume", "--data-root"])
    def test_a_name_too_long(self, capsys, flag):
        others = arguments(dataset="covidct", source="real") if flag == "--data-root" else arguments()
        options = [] if flag == "--resume" else others
        assert "File name too long" in refused(capsys, *options, flag, "x" * 300)

    @pytest.mark.parametrize("obstacle", ["file", "link"])
    def test_runs_is_no_folder(self, capsys, tmp_path, obstacle):
        Path("runs").touch() if obstacle == "file" else Path("runs").symlink_to("nowhere")
        assert f"the run folder runs/{name_of()} cannot be made" in refused(capsys, *arguments())


def without_privileges() -> None:
    """Takes from root what lets it pass every permission; takes effect with the program that is started next."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.fixture
def closed() -> Iterator[Callable[[Path, int], Path]]:
    """Sets permissions until the test is over."""
    paths: list[Path] = []

    def close(path: Path, mode: int) -> Path:
        paths.append(path)
        path.chmod(mode)
        return path

    yield close
    for path in paths:
        path.chmod(0o755)


@pytest.mark.skipif(sys.platform != "linux", reason="drops capabilities of Linux")
class TestPermissions:
    def test_folders_that_may_not_be_used(self, tmp_path, small_covidct, copy, closed):
        probe = "import os, sys; sys.exit(os.access('shut', os.W_OK))"
        shut = tmp_path / "shut"
        (shut / "inner" / "COVID-CT").mkdir(parents=True)
        closed(shut, 0o000)
        if subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, preexec_fn=without_privileges).returncode:
            pytest.skip("this user passes every permission")
        shutil.copytree(copy, tmp_path / "read-only")
        closed(unfinished(tmp_path / "read-only"), 0o555)
        shutil.copytree(copy, tmp_path / "secret")
        closed(unfinished(tmp_path / "secret") / "steps.csv", 0o000)
        closed(small_covidct / "Images-processed" / "CT_COVID", 0o000)
        closed(copy, 0o555)
        real = {"dataset": "covidct", "source": "real", "vr": "tiny"}
        cases = [
            (arguments(out="shut"), "shut cannot be read: Permission denied"),
            (arguments(out="shut/inner/run"), "shut/inner/run cannot be made: Permission denied"),
            (arguments(**real, data_root="shut/inner"), "shut/inner cannot be read: Permission denied"),
            (arguments(**real, data_root="shut"), "shut/Images-processed cannot be read: Permission denied"),
            (arguments(**real, data_root=small_covidct), "CT_COVID"),
            (["--resume", "shut/inner"], "shut/inner: the folder cannot be read: Permission denied"),
            (["--resume", "read-only"], "the run folder read-only cannot be written: Permission denied"),
            (["--resume", "secret"], "secret/steps.csv cannot be read: Permission denied"),
        ]
        cases.append((["--resume", "run"], ""))  # finished: shown without a permission to write
        # All in one process, which takes seconds to start.
        code = """if True:
            import contextlib, io, json, sys
            import tests.train.tiny
            from train.run import main

            results = []
            for args in json.loads(sys.argv[1]):
                with contextlib.redirect_stderr(io.StringIO()) as err:
                    results.append((main(args), err.getvalue()))
            print(json.dumps(results))
        """
        process = start(json.dumps([args for args, _ in cases]), code=code, cwd=tmp_path, preexec_fn=without_privileges)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        *results, finished = json.loads(out.splitlines()[-1])
        for (status, shown), (_, message) in zip(results, cases[:-1], strict=True):
            assert status == 2 and shown.startswith("Error: ") and len(shown.splitlines()) == 1
            assert message in shown and "Permission denied" in shown
        assert finished == [0, ""] and "nothing to continue" in out


def test_a_user_without_a_home(tmp_path):
    """As in a container that is run under a bare number: no HOME, and no entry in the list of users."""
    code = """if True:
        import pwd, sys

        def getpwuid(number):
            raise KeyError(number)

        pwd.getpwuid = getpwuid
        import tests.train.tiny
        from train.run import main

        sys.exit(main(sys.argv[1:]))
    """
    environment = {"HOME": None, "GRADPROM_CACHE": None, "MPLCONFIGDIR": str(tmp_path)}
    process = start(*arguments(max_steps=1, out="run"), code=code, cwd=tmp_path, env=environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    assert "this user has no home directory; give a folder with $GRADPROM_CACHE" in err and "Traceback" not in err
    assert (tmp_path / "run" / "metrics.json").exists() and not (tmp_path / "~").exists()


def test_files_for_others_hold_no_path_of_the_machine(small_covidct, tmp_path, monkeypatch):
    """The run was also continued: the folder that was given to --resume is a path, too."""
    secret = "home-of-a-patient"
    home = tmp_path / secret
    home.mkdir()
    shutil.move(small_covidct, home / "COVID-CT")
    monkeypatch.chdir(home)
    small = {"dataset": "covidct", "source": "real", "max_steps": 1, "batch_size": 2}
    assert main(arguments(**small, data_root=home, out=home / "run")) == 0
    assert main(["--resume", str(unfinished(home / "run"))]) == 0
    with safe_open(home / "run" / "weights.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["config"])
    output = settings["output"]
    assert (settings["data"]["data_root"], output["out"], output["resume"]) == (None, None, None)
    assert settings["method"]["strategy"] == "gradprom"
    for name in ("panel.png", "gate.png"):
        assert Image.open(home / "run" / name).info.keys() <= {"dpi"}
    files = contents(home / "run")
    assert secret in files.pop("config.json").decode()  # the run's own
    assert [name for name, content in files.items() if secret.encode() in content] == []
