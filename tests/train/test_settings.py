from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest

from models.srresnet import SRResNetOptions
from models.unet import UNetOptions
from train.errors import RunError
from train.files import locked
from train.outputs import run_folder as run_folder_file
from train.settings import CHANGEABLE, FIELDS, PRESETS, Settings, flag, from_json, parse, preset_settings, to_json
from train.strategies.base import Unpaired

from . import tiny

QUICK, PAPER = preset_settings("quick"), preset_settings("paper")


def test_presets_are_partial_and_different():
    assert QUICK != PAPER
    assert {name: preset_settings(name).preset for name in PRESETS} == {"quick": "quick", "paper": "paper"}
    said = {name for preset in PRESETS.values() for name in preset if "." not in name}
    assert said < set(FIELDS), "a preset overrides; what it does not say has its default"
    for name in set(FIELDS) - said - {"ip_options", "critic_options"}:
        assert QUICK.values[name] == PAPER.values[name]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_its_values(preset):
    assert parse(["--preset", preset]) == preset_settings(preset)
    assert parse([f"--preset={preset}"]) == preset_settings(preset)


@pytest.mark.parametrize("order", [1, -1])
def test_a_flag_beats_the_preset(order):
    pairs = [["--preset", "paper"], ["--batch-size", "3"], ["--lr", "0.5"]]
    parsed = parse([part for pair in pairs[::order] for part in pair])
    assert parsed == PAPER.change({"batch_size": 3, "lr": 0.5})


@pytest.mark.parametrize(
    ("gpu", "device", "preset"), [(True, "auto", PAPER), (True, "cpu", QUICK), (False, "auto", QUICK)]
)
def test_auto_goes_by_the_device(monkeypatch, gpu, device, preset):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert parse(["--device", device]) == preset.change({"device": device})


def test_options_belong_to_the_network():
    parsed = parse(["--ip.blocks", "3", "--ip.norm=batch", "--seg.features", "5"])
    assert parsed.network.ip_options == SRResNetOptions(blocks=3, features=32, norm="batch")
    assert parsed.auxiliary.seg_options == UNetOptions(features=5)
    assert parse(["--ip", "tiny", "--ip.width", "7"]).network.ip_options == tiny.TinyIPOptions(7)
    assert parse(["--ip", "tiny", "--preset", "paper"]).network.ip_options == tiny.TinyIPOptions()


def test_options_as_they_were_called_before():
    parsed = parse(["--blocks", "3", "--features=5"])
    assert parsed == QUICK.change({"ip.blocks": 3, "ip.features": 5})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ip.blocks=-1"], r"^--ip\.blocks must be at least 0, not -1$"),
        (["--blocks=-1"], r"^--ip\.blocks must be at least 0, not -1$"),
        (["--ip.kernel", "4"], r"^--ip\.kernel must be odd and at least 1, not 4$"),
        (["--ip", "tiny", "--ip.width", "0"], r"^--ip\.width must be at least 1, not 0$"),
        (["--seg.dropout", "1"], r"^--seg\.dropout must be at least 0 and below 1, not 1.0$"),
        (["--aux", "dia,dia"], "^--aux dia,dia: an auxiliary is named twice$"),
        (["--aux", "list"], "^--aux: unknown auxiliary 'list'; choose from: dia, seg$"),
        (["--aux", "dia,seg", "--aux-weight", "1", "2", "3"], "^--aux-weight takes one number, or one for each of"),
        (["--seg", "list"], "^--seg: unknown segmentation network 'list'; choose from: unet"),
    ],
)
def test_options_are_checked_before_anything_costs_time(argv, message):
    with pytest.raises(RunError, match=message):
        parse(argv)


def test_a_weight_for_each_auxiliary():
    assert parse(["--aux", "dia,seg", "--aux-weight", "0.1", "0.2"]).auxiliary.aux_weight == (0.1, 0.2)
    assert parse(["--aux", "dia,seg", "--aux-weight", "0.1"]).auxiliary.aux_weight == (0.1,)


def test_json_is_the_settings(tmp_path):
    changes = {"data_root": tmp_path, "out": tmp_path / "run", "max_steps": 5, "gate": "soft", "ip": "tiny"}
    settings = QUICK.change(changes | {"ip.width": 3, "aux": "dia,seg", "aux_weight": (0.5, 0.25)})
    assert from_json(json.loads(json.dumps(to_json(settings)))) == settings


def test_a_setting_that_was_added_later_has_its_default():
    content = to_json(QUICK.change({"lr": 0.25}))
    del content["method"]["train_on"], content["auxiliary"]["seg_options"], content["network"]["ip_options"]["norm"]
    assert from_json(content) == QUICK.change({"lr": 0.25})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3 is unknown to this version of the project"),
        ({"version": "2"}, "version '2' is unknown"),
        ({"data": None}, "data must be an object each"),
        ({"data": {"warp": 9}}, "data: the settings warp are unknown to this version of the project"),
        ({"preset": "slow"}, "preset cannot be 'slow'"),
        ({"network": {"ip": "gone"}}, "--ip: unknown IP network 'gone'"),
        ({"network": {"ip_options": {"warp": 9}}}, "ip_options cannot be"),
        ({"network": {"ip_options": {"blocks": "many"}}}, "ip.blocks cannot be 'many'"),
        ({"network": {"ip_options": {"blocks": -1}}}, "ip.blocks must be at least 0, not -1"),
        ({"auxiliary": {"aux_weight": "heavy"}}, "aux_weight cannot be 'heavy'"),
    ],
)
def test_files_that_cannot_be_read(change, message):
    with pytest.raises(RunError, match=message):
        from_json(to_json(QUICK) | change)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("epochs", 0),
        ("max_steps", 0),
        ("seed", -1),
        ("sigma", -0.1),
        ("sigma", math.nan),
        ("aux_weight", math.nan),
        ("aux_weight", -1.0),
        ("aux_weight", math.inf),
        ("lr", 0.0),
        ("lr", math.nan),
        ("num_workers", -1),
    ],
)
def test_out_of_range(name, value):
    with pytest.raises(RunError, match=rf"^{flag(name)} must be .*, not {value}$"):
        parse([f"{flag(name)}={value}"])


def test_a_crop_larger_than_the_image():
    with pytest.raises(RunError, match="--crop 64 does not fit into images of --size 32"):
        parse(["--size", "32", "--crop", "64"])


def write_run(folder, **changes) -> None:
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    settings = QUICK.change({"lr": 0.125, "out": folder} | changes)
    (folder / "config.json").write_text(json.dumps(to_json(settings)))


@pytest.fixture
def run_folder(tmp_path):
    """A run of preset quick with a learning rate of its own, and an (empty) checkpoint."""
    folder = tmp_path / "runs" / "run"
    write_run(folder)
    return folder


def test_resume_takes_the_settings_of_the_run(run_folder):
    parsed = parse(["--resume", str(run_folder)])
    assert parsed == QUICK.change({"lr": 0.125, "out": run_folder, "resume": str(run_folder)})


def test_resume_allows_what_changes_no_result(run_folder):
    assert parse(["--resume", str(run_folder), "--num-workers", "3", "--lr", "0.125"]).training.num_workers == 3


@pytest.mark.parametrize(
    "change",
    [
        ["--lr", "0.5"],
        ["--strategy", "joint"],
        ["--seed", "7"],
        ["--out", "elsewhere"],
        ["--ip.blocks", "9"],
        ["--ip", "tiny"],
        ["--aux", "seg"],
        ["--ip-weights", "elsewhere"],
    ],
)
def test_resume_refuses_other_settings(run_folder, change):
    with pytest.raises(RunError, match=f"and {change[0]} would change them"):
        parse(["--resume", str(run_folder), *change])


def test_resume_latest(run_folder, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    with pytest.raises(RunError, match="--resume latest: no run with a checkpoint under runs/"):
        parse(["--resume", "latest"])
    monkeypatch.setattr(run_folder_file, "RUNS", run_folder.parent)
    assert parse(["--resume", "latest"]).output.out == run_folder


def test_resume_latest_passes_over_runs_at_work(run_folder, monkeypatch, caplog):
    monkeypatch.setattr(run_folder_file, "RUNS", run_folder.parent)
    newer = run_folder.with_name("newer")
    shutil.copytree(run_folder, newer)
    os.utime(run_folder / "checkpoint.pt", (1e9, 1e9))
    os.utime(newer / "checkpoint.pt", (2e9, 2e9))
    assert parse(["--resume", "latest"]).output.out == newer
    with locked(newer):
        assert parse(["--resume", "latest"]).output.out == run_folder
        assert f"{newer} is at work; the latest run that is not: {run_folder}" in caplog.text
        with locked(run_folder), pytest.raises(RunError, match=r"--resume latest: every run under .* is at work"):
            parse(["--resume", "latest"])
    assert parse(["--resume", "latest"]).output.out == newer


def test_resume_latest_of_several_that_differ(tmp_path, monkeypatch):
    """What is given with it says which run is meant: the latest one that has these settings."""
    monkeypatch.setattr(run_folder_file, "RUNS", tmp_path)
    for time, sigma in enumerate((0.1, 0.2, 0.3)):
        write_run(tmp_path / str(sigma), sigma=sigma)
        os.utime(tmp_path / str(sigma) / "checkpoint.pt", (1e9 + time, 1e9 + time))
    assert parse(["--resume", "latest"]).output.out == tmp_path / "0.3"
    for sigma in ("0.1", "0.2", "0.3"):
        assert parse(["--resume", "latest", "--sigma", sigma]).output.out == tmp_path / sigma
    with pytest.raises(
        RunError, match=r"none of the 3 runs under .* the latest one: --resume goes on .* --sigma would"
    ):
        parse(["--resume", "latest", "--sigma", "0.4"])


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("training", "lr", "fast"),
        ("training", "lr", None),
        ("training", "lr", True),
        ("data", "size", 1.5),
        ("data", "channels", 7),
        ("method", "gate", "iron"),
        ("training", "device", "tpu"),
        ("data", "dataset", 5),
        ("output", "out", 5),
        ("data", "data_root", [1]),
        ("output", "tensorboard", "yes"),
        ("training", "epochs", 0),
        ("network", "ip", 5),
    ],
)
def test_resume_with_a_damaged_setting(run_folder, section, name, value):
    path = run_folder / "config.json"
    content = json.loads(path.read_text())
    content[section][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=rf"config\.json does not hold the settings of a run: .*{flag(name)[2:6]}.*"):
        parse(["--resume", str(run_folder)])


def test_a_tilde_is_the_home_in_every_path(tmp_path, monkeypatch, run_folder):
    """A shell does not expand the one in ``--out=~/x``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = parse(["--out=~/x", "--data-root=~/y"])
    assert (parsed.output.out, parsed.data.data_root) == (tmp_path / "x", tmp_path / "y")
    parsed = parse(["--resume=~/runs/run", "--out=~/runs/run", "--data-root=~/y"])
    assert (parsed.output.out, parsed.data.data_root) == (run_folder, tmp_path / "y")


@pytest.mark.parametrize("name", ["out", "data_root", "resume", "ip_weights", "vr_weights"])
def test_a_tilde_without_a_home(name):
    with pytest.raises(RunError, match=f"^{flag(name)} ~no-such-user/x: there is no such home directory"):
        parse([f"{flag(name)}=~no-such-user/x"])


@pytest.mark.parametrize("missing", ["checkpoint.pt", "config.json"])
def test_resume_without_a_file(run_folder, missing):
    (run_folder / missing).unlink()
    with pytest.raises(RunError, match=f"the folder has no {missing}"):
        parse(["--resume", str(run_folder)])


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"lr": 1}'])
def test_resume_with_damaged_settings(run_folder, content):
    (run_folder / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json (is damaged|does not hold the settings of a run): "):
        parse(["--resume", str(run_folder)])


def shown_help(*argv: str) -> str:
    code = (
        "import sys, train.settings\n"
        "try: train.settings.parse([*sys.argv[1:], '--help'])\n"
        "finally: assert not {'torch', 'monai', 'skimage', 'matplotlib'} & set(sys.modules)"
    )
    environment = os.environ | {"COLUMNS": "200"}
    shown = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60, env=environment
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


EVERYWHERE = {name for name, field in FIELDS.items() if not field.metadata["concerns"]}
PAIRED = {"validate_every", "validation_images", "select"}  # where there is something to compare images with
IMAGES = {"ip", "ip_weights", "ip_start", "ip_loss", "lr"}
ADVISED = IMAGES | {"aux", "vr_weights", "aux_weight", "vr_update", "vr_loss", "vr_start", "vr_lr"}
DIA = {"vr", "label_smoothing"}
GATED = {"gate", "threshold", "granularity", "aux_cap"}
MASKED = {f"masked_{name}" for name in ("epochs", "steps", "lr", "batch_size", "crop", "seed", "adversarial")}
CLEAN = {f"clean_{name}" for name in ("epochs", "lr", "batch_size", "crop", "augment", "smoothing", "seed")}


@pytest.mark.parametrize(
    ("argv", "names", "options"),
    [
        ([], ADVISED | DIA | GATED, {"--ip.blocks"}),
        (["--strategy", "ip-only"], IMAGES, {"--ip.blocks"}),
        (
            ["--strategy", "ip-only", "--ip-start", "alone"],
            IMAGES | {"alone_steps", "alone_lr", "alone_batch_size", "alone_crop"},
            {"--ip.blocks"},
        ),
        (
            ["--strategy", "ip-only", "--reader"],
            IMAGES | {"aux", "vr_weights", "vr_lr"} | DIA | CLEAN,
            {"--ip.blocks"},
        ),
        (["--strategy", "vr-only"], {"aux", "vr_weights", "train_on", "vr_lr"} | DIA, set()),
        (
            ["--strategy", "hqg-only"],
            IMAGES | {"critic", "critic_lr"} | set(Unpaired._fields),
            {"--ip.blocks"},
        ),
        (
            ["--strategy", "frozen", "--aux=seg"],
            ADVISED - {"vr_update"} | {"seg", "pretrain_epochs"},
            {"--ip.blocks", "--seg.features"},
        ),
        (["--strategy", "frozen", "--vr-start", "clean"], ADVISED - {"vr_update"} | DIA | CLEAN, {"--ip.blocks"}),
        (["--vr-start", "mfm"], ADVISED | DIA | GATED | MASKED, {"--ip.blocks"}),
        (
            ["--strategy", "masked", "--vr", "vit"],
            {"aux", "vr_weights", "vr_lr", "adversarial", "ip_loss", "critic", "critic_lr"} | DIA,
            {"--vr.patch"},
        ),
        (["--vr-update", "ema"], ADVISED | DIA | GATED | {"pretrain_epochs", "ema_decay"}, {"--ip.blocks"}),
        (["--vr-loss", "unsupervised"], ADVISED | DIA | GATED | {"pretrain_epochs"}, {"--ip.blocks"}),
        (
            ["--strategy", "gradprom-capped"],
            ADVISED - {"aux_weight"} | DIA | GATED - {"gate"},
            {"--ip.blocks"},
        ),
        (
            ["--strategy", "joint", "--aux", "dia,seg"],
            ADVISED | DIA | {"seg"},
            {"--ip.blocks", "--seg.features"},
        ),
    ],
)
def test_help_shows_what_concerns_the_run(argv, names, options):
    """And needs none of the libraries that take seconds to import."""
    # At the beginning of a line stands a flag with its other spellings; in a text one may be mentioned.
    lines = re.findall(r"^│ ((?:--[\w.-]+(?:, )?)+)", shown_help(*argv), flags=re.MULTILINE)
    words = set(re.findall(r"--[\w.-]+", "\n".join(lines)))
    names = names if "hqg-only" in argv else names | PAIRED
    expected = {flag(name) for name in (EVERYWHERE | names)} | options | {"--preset"}
    assert words >= expected
    hidden = {flag(name) for name in FIELDS} - {flag(name) for name in EVERYWHERE | names}
    assert not words & hidden and not {"--ip.blocks", "--seg.features"} - options & words


def test_everything_has_a_help_text():
    assert all(field.metadata["help"] for name, field in FIELDS.items() if not name.endswith("_options"))
    assert set(FIELDS) >= CHANGEABLE >= {"data_root", "device", "num_workers", "resume"}


OF_BEFORE = {
    "--dataset": "covidct", "--data-root": ".", "--source": "real", "--size": "64", "--channels": "3", "--task": "sr2",
    "--sigma": "0.2", "--ip": "srresnet", "--blocks": "2", "--features": "3", "--vr": "resnet50",
    "--strategy": "gradprom", "--gate": "soft", "--aux-weight": "0.5", "--optimizer": "sgd", "--lr": "0.1",
    "--vr-lr": "0.2", "--batch-size": "2", "--crop": "8", "--epochs": "3", "--max-steps": "4", "--pretrain-epochs": "2",
    "--seed": "5", "--device": "cpu", "--preset": "paper", "--num-workers": "1", "--out": "x",
    "--checkpoint-every": "7", "--log-every": "8",
}  # fmt: skip


def test_every_flag_of_before_works():
    """All of them, whether they concern the chosen strategy or not."""
    parsed = parse([*(part for pair in OF_BEFORE.items() for part in pair), "--tensorboard"])
    assert parsed.output.tensorboard
    for name, value in OF_BEFORE.items():
        if name == "--preset":
            assert parsed.preset == value
        elif name in ("--blocks", "--features"):
            assert getattr(parsed.network.ip_options, name[2:]) == int(value)
        elif name == "--aux-weight":
            assert parsed.auxiliary.aux_weight == (float(value),)
        else:
            assert str(parsed.values[name[2:].replace("-", "_")]) == value
    del OF_BEFORE["--gate"]
    assert parse([*(part for pair in OF_BEFORE.items() for part in pair), "--strategy", "ip-only"])


def test_unknown_settings():
    with pytest.raises(RunError, match="there is no setting warp"):
        Settings().change({"warp": 9})


@pytest.mark.parametrize("wrong", [["--preset", "slow"], ["--gate", "iron"], ["--epochs", "many"], ["--nonsense"]])
def test_unreadable_flags_end_with_status_2(wrong, capsys):
    with pytest.raises(SystemExit) as error:
        parse(wrong)
    assert error.value.code == 2
    assert wrong[-1] in capsys.readouterr().err
