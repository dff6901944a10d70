"""``python -m train.enhance``: a person's files in, enhanced ones out, and nothing of that person's is ever lost."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from models import IP
from train.enhance import main
from train.enhancement import finished
from train.enhancement.network import EVERYWHERE, LUMA, SIDE, Enhancer, Options
from train.enhancement.noise import estimate
from train.experiment import do_run
from train.inference import enlarged, reach
from train.outputs.run_folder import RunFolder
from train.settings import Settings, to_json

from .test_page import browser  # noqa: F401 (a fixture)
from .tiny import config

CPU = torch.device("cpu")
NAME = "a-run"


def ip_of(settings: Settings, scale: int = 1) -> torch.nn.Module:
    """The IP of a run with random weights, none of them zero: what it makes of an image is another image."""
    torch.manual_seed(1)
    network = IP.build(settings.network.ip, settings.network.ip_options, channels=settings.data.channels, scale=scale)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point() and not tensor.any():
            torch.nn.init.normal_(tensor, std=0.1)
    return network.eval().requires_grad_(False)


def run_folder(folder: Path, scale: int = 1, **changes: Any) -> Path:
    """The folder of a run that was never done, with networks whose digits are known here too."""
    settings = config(**{"strategy": "ip-only", "vr": "resnet18"} | changes)
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    run.write_config(to_json(settings))
    run.write_weights({"ip": ip_of(settings, scale)}, to_json(settings))
    run.write_data({"splits": {"train": {"number": 13}}})
    run.write_metrics({"run": NAME, "data": "real", "psnr_degraded": 20.0, "psnr": 28.125, "n_test": 6})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of runs by their settings, each made once."""
    made: dict[str, Path] = {}

    def find(scale: int = 1, **changes: Any) -> Path:
        key = repr((scale, sorted(changes.items())))
        if key not in made:
            made[key] = run_folder(tmp_path_factory.mktemp("run") / "run", scale, **changes)
        return made[key]

    return find


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Four files in a folder and one below it, and what is no image."""
    folder = tmp_path / "scans"
    (folder / "Meier^Eva").mkdir(parents=True)
    Image.fromarray(gray((40, 30), 8)).save(folder / "a.png")
    Image.fromarray(gray((20, 51), 16)).save(folder / "b.png")
    tifffile.imwrite(folder / "c.tiff", np.stack([gray((33, 20), 0) for _ in range(3)]), photometric="minisblack")
    Image.fromarray(np.repeat(gray((24, 24), 8)[..., None], 3, 2)).save(folder / "Meier^Eva" / "d.jpg", quality=95)
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.png").write_bytes(b"what macOS leaves")
    return folder


def gray(size: tuple[int, int], bits: int, seed: int = 0) -> np.ndarray:
    """A smooth image with noise of 0.1: 8 or 16 bits, or (0) floats from -1000 to 3000."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = 0.5 + 0.3 * np.sin(rows / 7) * np.cos(columns / 9)
    image += 0.1 * np.random.default_rng([seed, *size]).standard_normal(size)
    if not bits:
        return (4000 * image - 1000).astype(np.float32)
    return np.clip(image * (2**bits - 1), 0, 2**bits - 1).round().astype(f"uint{bits}")


def enhance(run: Path, *arguments: Any) -> int:
    return main(["--run", str(run), "--device", "cpu", *map(str, arguments)])


def expected(
    run: Path, image: np.ndarray, low: float, high: float, strength: float = 1.0, scale: int = 1
) -> np.ndarray:
    """The definition, of a whole image ``[H, W]`` in float64."""
    network = ip_of(finished.read(run).settings, scale).double()
    z = torch.from_numpy((image.astype(np.float64) - low) / (high - low))[None, None]
    seen = z.clamp(0, 1)
    change = network(seen).clamp(0, 1) - enlarged(seen, scale)
    return ((enlarged(z, scale) + strength * change) * (high - low) + low)[0, 0].numpy()


def content(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# Values


def test_from_a_training_to_enhanced_files(tmp_path, monkeypatch, scans, capsys):
    """All of it: a run of the engine's own, every file in its own format, an account of it, and inputs as they were."""
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    result = do_run(config(strategy="ip-only", vr="resnet18", epochs=8, lr=0.01))
    before = content(scans)
    assert main(["--run", "latest", "scans", "out"]) == 0
    out = capsys.readouterr().out
    first, *_ = out.splitlines()
    assert result.metrics is not None
    assert first.startswith(f"{result.metrics['run']}: srresnet trained on 13 PHANTOM (generated) gray images of 16 px")
    assert "gaussian:0.1" in first and f"{result.metrics['psnr']:.2f} dB after. Not for diagnosis." in first
    assert "4 enhanced, in " in out
    assert content(scans) == before
    assert set(content(tmp_path / "out")) == {"a.png", "b.png", "c.tiff", "Meier^Eva/d.jpg", "enhanced.jsonl"}
    with Image.open("out/a.png") as image, Image.open("out/b.png") as deep, Image.open("out/Meier^Eva/d.jpg") as jpeg:
        assert (image.mode, image.size) == ("L", (30, 40)) and deep.mode == "I;16" and jpeg.format == "JPEG"
        assert np.abs(np.asarray(image).astype(int) - gray((40, 30), 8)).max() > 3
    with tifffile.TiffFile("out/c.tiff") as file:
        assert len(file.pages) == 3 and file.pages[0].dtype == np.float32
        assert "Not for diagnosis" in str(file.pages[0].tags[305].value) and "PHANTOM" in str(
            file.pages[0].tags[305].value
        )


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_values_are_those_of_the_definition(runs, tmp_path, scans, strength):
    assert enhance(runs(), scans, tmp_path / "out", "--strength", strength) == 0
    a, b = (np.asarray(Image.open(tmp_path / "out" / name)) for name in ("a.png", "b.png"))
    image = gray((40, 30), 8)
    assert np.abs(a - expected(runs(), image, 0, 255, strength)).max() <= 0.501
    assert np.abs(a.astype(float) - image).max() > 2, "the network must do something"
    assert np.abs(b - expected(runs(), gray((20, 51), 16), 0, 65535, strength)).max() <= 0.6
    pages = gray((33, 20), 0)
    c = tifffile.imread(tmp_path / "out" / "c.tiff")
    for page in c:
        np.testing.assert_allclose(page, expected(runs(), pages, pages.min(), pages.max(), strength), rtol=0, atol=2e-2)


def test_without_strength_it_is_the_input(runs, tmp_path, scans):
    assert enhance(runs(), scans, tmp_path / "out", "--strength", 0) == 0
    for name in ("a.png", "b.png", "c.tiff"):
        read = tifffile.imread if name.endswith("tiff") else lambda path: np.asarray(Image.open(path))
        assert np.array_equal(read(tmp_path / "out" / name), read(scans / name))


@pytest.mark.parametrize("given", [["--window", "-600/1500"], ["--window=-600/1500"]])
def test_nothing_outside_of_the_window_is_lost(runs, tmp_path, given):
    image = gray((40, 30), 0)
    image[:5], image[5:10] = 3071, -1024  # metal and air
    tifffile.imwrite(tmp_path / "ct.tif", image)
    assert enhance(runs(), tmp_path / "ct.tif", tmp_path / "out", *given) == 0
    found = tifffile.imread(tmp_path / "out" / "ct.tif")
    np.testing.assert_allclose(found, expected(runs(), image, -1350, 150), rtol=0, atol=1e-2)
    assert found.max() > 2900 and found.min() < -1000


def test_the_window_that_a_run_was_trained_with(runs, tmp_path, capsys):
    """Its own one where none is given; percentiles are those of each file."""
    image = gray((40, 30), 0)
    tifffile.imwrite(tmp_path / "ct.tif", image)
    for number, (window, limits) in enumerate(
        {"-600/1500": (-1350, 150), "P10-P90": tuple(np.percentile(image, [10, 90]))}.items()
    ):
        out = tmp_path / str(number)
        assert enhance(runs(window=window), tmp_path / "ct.tif", out) == 0
        np.testing.assert_allclose(tifffile.imread(out / "ct.tif"), expected(runs(), image, *limits), rtol=0, atol=1e-2)
    assert enhance(runs(window="P1-P99"), tmp_path / "ct.tif", tmp_path / "own", "--window", "0/2000") == 0
    found = tifffile.imread(tmp_path / "own" / "ct.tif")
    np.testing.assert_allclose(found, expected(runs(), image, -1000, 1000), rtol=0, atol=1e-2)
    assert "give --window" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("unit", "told"), [([-1024, 3071], "give --window 1023.5/4095"), ([0, 4095], ""), ([0, 1], "")]
)
def test_a_unit_that_a_run_knows(tmp_path, capsys, unit, told):
    run = run_folder(tmp_path / "run")
    RunFolder(run).write_data({"splits": {"train": {"number": 13, "value range": unit}}})
    tifffile.imwrite(tmp_path / "ct.tif", gray((40, 30), 0))
    assert enhance(run, tmp_path / "ct.tif", tmp_path / "out") == 0
    assert ("give --window" in (out := capsys.readouterr().out)) == bool(told) and told in out


def frame(run: Path, image: np.ndarray, window: tuple[float, float] = (0, 1), **options: Any) -> np.ndarray:
    return Enhancer(finished.read(run), Options(**options), CPU).frame(image.copy(), window)


def test_what_is_no_number_stays_and_spreads_nothing(runs):
    image = gray((40, 40), 0) / 4000
    holes = image.copy()
    holes[20, 20], holes[5, 5] = np.nan, np.inf
    found, whole = frame(runs(), holes[..., None])[..., 0], frame(runs(), image[..., None])[..., 0]
    assert np.isnan(found[20, 20]) and found[5, 5] == np.inf and np.isfinite(found).sum() == image.size - 2
    far = np.ones_like(image, bool)
    far[10:31, 10:31] = far[:16, :16] = False
    np.testing.assert_array_equal(found[far], whole[far])
    larger = frame(runs(2, task="sr2"), holes[..., None])[..., 0]
    assert np.isnan(larger[40:42, 40:42]).all() and np.isnan(larger).sum() == 4


def test_one_value_all_over_is_left_alone(runs):
    flat = np.full((9, 9, 1), 7.0, np.float32)
    assert np.array_equal(frame(runs(), flat, (7.0, 7.0)), flat)


# ----------------------------------------------------------------------------------------------------------------------
# Color


def test_gray_that_is_stored_as_color_is_gray(runs):
    image = gray((40, 30), 8).astype(np.float32)[..., None] / 255
    np.testing.assert_array_equal(frame(runs(), np.repeat(image, 3, 2)), np.repeat(frame(runs(), image), 3, 2))


def test_color_for_a_gray_network(runs, tmp_path, capsys):
    pixels = np.stack([gray((40, 30), 8, seed) for seed in range(3)], 2)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "color.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "in" / "gray.png")
    assert enhance(runs(), tmp_path / "in", tmp_path / "out") == 1
    out = capsys.readouterr().out
    assert "color.png: a color image, and the network is for gray ones; --color luma" in out
    assert sorted(content(tmp_path / "out")) == ["enhanced.jsonl", "gray.png"], "the others go on"
    assert enhance(runs(), tmp_path / "in", tmp_path / "luma", "--color", "luma") == 0
    with Image.open(tmp_path / "luma" / "color.png") as image:
        assert "luma (BT.601)" in image.info["Description"]
    image = pixels.astype(np.float32) / 255
    found = frame(runs(), image, color="luma")
    luma = image @ np.array(LUMA, np.float32)
    np.testing.assert_allclose(found @ np.array(LUMA, np.float32), expected(runs(), luma, 0, 1), atol=1e-5)
    np.testing.assert_allclose(found - found[..., :1], image - image[..., :1], atol=1e-6)
    assert np.abs(found - image).max() > 0.02


def test_gray_for_a_color_network(runs):
    run = runs(channels=3)
    image = gray((40, 30), 8).astype(np.float32) / 255
    network = ip_of(finished.read(run).settings)
    three = network(torch.from_numpy(image).expand(1, 3, -1, -1)).clamp(0, 1)
    np.testing.assert_allclose(frame(run, image[..., None])[..., 0], three.mean((0, 1)).numpy(), atol=1e-5)
    color = np.stack([gray((40, 30), 8, seed) for seed in range(3)], 2).astype(np.float32) / 255
    own = network(torch.from_numpy(color.transpose(2, 0, 1)[None])).clamp(0, 1)[0].permute(1, 2, 0)
    np.testing.assert_allclose(frame(run, color), own.numpy(), atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Networks and sizes

SMALL = {
    "srresnet": {},
    "drunet": {"ip.features": 4, "ip.levels": 4, "ip.blocks": 1},
    "hqgnet": {"ip.width": 4, "ip.levels": 3, "size": 64, "crop": 16},
    "iconet": {"ip.blocks": 2, "ip.features": 8, "task": "kspace2"},
}
SCALES = {"kspace2": 2, "sr2": 2, "sr3": 3, "joint2": 2}


def test_every_network_is_here():
    assert {name for name in IP if not name.startswith("tiny")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(1, 1), (5, 70), (41, 33)])
def test_every_network_and_any_size(runs, name, size):
    scale = SCALES.get(SMALL[name].get("task", ""), 1)
    image = np.random.default_rng(0).random((*size, 1), np.float32)
    found = frame(runs(scale, ip=name, **SMALL[name]), image)
    assert found.shape == (size[0] * scale, size[1] * scale, 1) and np.isfinite(found).all()
    if scale == 1:
        assert np.abs(found - image).max() > 1e-4


def test_the_cue_of_an_unpaired_training_is_part_of_the_network(runs, tmp_path):
    """HQG-Net's guide is a buffer: without it, every image would be enhanced for no guide at all."""
    run = runs(ip="hqgnet", strategy="hqg", task="none", **SMALL["hqgnet"])
    assert finished.read(run).trained.endswith("images that are poor as they are")
    image = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    network: Any = ip_of(finished.read(run).settings)
    assert network.guide.any()
    np.testing.assert_allclose(frame(run, image[0].permute(1, 2, 0).numpy())[..., 0], network(image)[0, 0], atol=1e-5)
    assert not np.allclose(network(image), network.enhance(image, torch.zeros(1, 64)), atol=1e-5)


@pytest.mark.parametrize("task", ["sr2", "sr3", "joint2"])
def test_larger_images(runs, tmp_path, task):
    scale = SCALES[task]
    run = runs(scale, task=task, size=48, crop=24)
    Image.fromarray(gray((20, 31), 16)).save(tmp_path / "a.png")
    assert enhance(run, tmp_path / "a.png", tmp_path / "out") == 0
    found = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    wanted = expected(run, gray((20, 31), 16), 0, 65535, scale=scale)
    assert found.shape == (20 * scale, 31 * scale)
    assert np.abs(found - wanted.clip(0, 65535)).max() < 1
    assert enhance(run, tmp_path / "a.png", tmp_path / "plain", "--strength", 0) == 0
    plain = np.asarray(Image.open(tmp_path / "plain" / "a.png"))
    bicubic = enlarged(torch.from_numpy(gray((20, 31), 16).astype(np.float64))[None, None], scale)[0, 0].numpy()
    assert np.abs(plain - bicubic.clip(0, 65535)).max() < 1


@pytest.mark.parametrize(
    ("name", "options"), [("srresnet", {}), ("srresnet", {"task": "sr2"}), ("drunet", SMALL["drunet"])]
)
def test_no_seams(runs, name, options):
    """Tiles against the whole image, which is two tiles wide and several high."""
    scale = SCALES.get(options.get("task", ""), 1)
    run = runs(scale, ip=name, **options)
    image = np.random.default_rng(0).random((2 * SIDE + 45, SIDE + 31, 1), np.float32)
    enhancer = Enhancer(finished.read(run), Options(), CPU)
    tiling = enhancer.tiling
    assert tiling != EVERYWHERE and tiling.side < len(image) and enhancer.needs_tiles(image.shape[:2])
    multiple = enhancer.multiple
    assert not tiling.side % multiple and not tiling.overlap % multiple
    z = torch.from_numpy(image[..., 0])[None, None]
    whole = ip_of(finished.read(run).settings, scale)(z).clamp(0, 1)
    whole = enlarged(z, scale) + whole - enlarged(z, scale)
    difference = np.abs(enhancer.frame(image.copy(), (0, 1))[..., 0] - whole[0, 0].numpy())
    assert difference.max() < 1e-4


def test_the_reach_is_measured():
    """Against what the layers say: a convolution of 3 x 3 sees a pixel further."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(1, 1, 3, padding=1) for _ in range(5)]
    for layer in layers:
        torch.nn.init.uniform_(layer.weight, 0.2, 0.5)
    assert reach(torch.nn.Sequential(*layers), 1, device=CPU) == 5
    assert reach(torch.nn.Sequential(*layers, torch.nn.Upsample(scale_factor=2)), 1, device=CPU) == 5
    assert reach(torch.nn.Identity(), 1, device=CPU) == 0
    assert reach(lambda images: images - images.mean((2, 3), keepdim=True), 1, device=CPU) is None
    # A gate that hardly opens, as of ICONet, moves with the brightness of an image and not with its noise.
    assert reach(lambda images: images * (1 + images.mean((2, 3), keepdim=True) / 1000), 1, device=CPU) is None


MEASURED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from train.enhance import main
status = main(sys.argv[1:])
# Of this program: the resources of a process count what it was forked from, too.
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_twenty_megapixels_within_a_gigabyte(runs, tmp_path):
    """Of the whole process: Python, PyTorch, the image as it is read and as it is written."""
    rows, columns = np.mgrid[:5000, :4000].astype(np.float32)
    Image.fromarray((127 + 60 * np.sin(rows / 90) + 60 * np.sin(columns / 70)).astype(np.uint8)).save(
        tmp_path / "a.png"
    )
    del rows, columns
    arguments = ["--run", str(runs()), "--device", "cpu", str(tmp_path / "a.png"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out" / "a.png").size == (4000, 5000)
    assert int(done.stdout.split("VmHWM:")[1].split()[0]) < 1e6  # kB


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, with everything untouched


def refused(capsys, run: Path, *arguments: Any) -> str:
    assert enhance(run, *arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("output", ["scans", "scans/out", "scans/Meier^Eva/out", "link/out", "."])
def test_output_and_input_do_not_nest(runs, scans, tmp_path, capsys, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("scans")
    before = content(tmp_path)
    assert re.search(r"OUTPUT \S+ lies in INPUT scans|lies in OUTPUT", refused(capsys, runs(), "scans", output))
    assert content(tmp_path) == before and not (scans / "out").exists()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_input_is_never_written_over(runs, scans, tmp_path, capsys, link):
    out = tmp_path / "out"
    out.mkdir()
    link(scans / "a.png", out / "a.png")
    before = content(tmp_path)
    assert f"{out / 'a.png'} is the input" in refused(capsys, runs(), scans, out)
    one = refused(capsys, runs(), scans / "a.png", out / "a.png")
    assert "is the input" in one or "lies in OUTPUT" in one
    assert content(tmp_path) == before


def test_a_foreign_file_is_never_written_over(runs, scans, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "Meier^Eva").mkdir(parents=True)
    (out / "Meier^Eva" / "d.jpg").write_text("mine")
    assert "d.jpg is there already, and was not written by" in refused(capsys, runs(), scans, out)
    (out / "Meier^Eva" / "d.jpg").unlink()
    (out / "Meier^Eva" / "d.jpg").symlink_to("nowhere")
    assert "is there already" in refused(capsys, runs(), scans, out)
    assert list(content(out)) == []
    single = tmp_path / "one.png"
    single.write_text("mine")
    assert "one.png is a file that is there already" in refused(capsys, runs(), scans / "a.png", single)
    assert single.read_text() == "mine"
    assert "one.png is a file; give a folder" in refused(capsys, runs(), scans, single)
    (out / "report.html").write_text("mine")
    assert "report.html is there already" in refused(capsys, runs(), scans / "a.png", out, "--report")


def test_names_that_would_be_one(runs, scans, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.png").write_bytes((scans / "a.png").read_bytes())
    (other / "B.png").write_bytes((scans / "b.png").read_bytes())
    message = refused(capsys, runs(), scans / "a.png", other / "a.png", tmp_path / "out")
    assert str(scans / "a.png") in message and str(other / "a.png") in message and "both become" in message
    message = refused(capsys, runs(), scans / "b.png", other / "B.png", tmp_path / "out")
    assert "differ in the case of letters alone" in message
    assert not (tmp_path / "out").exists()


def test_nothing_to_do(runs, tmp_path, capsys, scans):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    (tmp_path / "gone").symlink_to("nowhere")
    out = tmp_path / "out"
    assert "there is no image here" in refused(capsys, runs(), tmp_path / "empty", out)
    assert "1 other files are no images" in refused(capsys, runs(), tmp_path / "text", out)
    assert "there is no such file or folder" in refused(capsys, runs(), tmp_path / "missing", out)
    assert "no file has a name like that" in refused(capsys, runs(), f"{scans}/*.gif", out)
    assert "a link to something that is not there" in refused(capsys, runs(), tmp_path / "gone", out)
    assert "is no image that can be read" in refused(capsys, runs(), scans / "notes.txt", out)
    assert "is written in its own format" in refused(capsys, runs(), scans / "a.png", tmp_path / "a.tif")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "1.5"], "--strength must be at least 0 and at most 1, not 1.5"),
        (["--strength", "nan"], "--strength must be"),
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--limit", "0"], "--limit must be at least 1, not 0"),
    ],
)
def test_numbers_out_of_range(runs, scans, tmp_path, capsys, arguments, message):
    assert message in refused(capsys, runs(), scans, tmp_path / "out", *arguments)


@pytest.mark.parametrize("window", ["40", "40/0", "40/-3", "a/b", "nan/1", "1/inf", ""])
def test_windows_that_are_none(runs, scans, tmp_path, capsys, window):
    with pytest.raises(SystemExit, match="2"):
        enhance(runs(), scans, tmp_path / "out", "--window", window)
    assert "--window" in capsys.readouterr().err


def test_no_room_on_the_disk(runs, scans, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    assert "the disk has 0.0 GB left" in refused(capsys, runs(), scans, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up(runs, scans, tmp_path, capsys, monkeypatch):
    """In the midst of the second file: it leaves nothing, the first one stays, and the rest is not tried."""
    from train.scans.raster import Raster

    write = Raster.write

    def full(self: Any, target: Path, *others: Any) -> None:
        if self.path.name == "a.png":
            raise OSError(28, "No space left on device", str(target))
        write(self, target, *others)

    monkeypatch.setattr(Raster, "write", full)
    assert enhance(runs(), scans, tmp_path / "out") == 2
    found = capsys.readouterr()
    assert "No space left on device" in found.out and "2 not tried" in found.out and "is full; make room" in found.err
    assert set(content(tmp_path / "out")) == {"Meier^Eva/d.jpg", "enhanced.jsonl"}
    monkeypatch.undo()
    assert enhance(runs(), scans, tmp_path / "out") == 0
    assert "3 enhanced, 1 skipped" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(runs, scans, tmp_path, capsys, monkeypatch):
    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "cannot be made: Permission denied" in refused(capsys, runs(), scans, tmp_path / "out")


def test_circles_of_links_end(runs, scans, tmp_path):
    (scans / "Meier^Eva" / "circle").symlink_to(scans)
    (scans / "again").symlink_to(scans / "Meier^Eva")
    assert enhance(runs(), scans, tmp_path / "out") == 0
    names = {name for name in content(tmp_path / "out") if name != "enhanced.jsonl"}
    assert len(names) == 4, "each file once"


def damage(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "weights.safetensors").unlink(), "has no weights.safetensors: the run is not finished"),
        (lambda run: (run / "metrics.json").unlink(), "has no metrics.json: the run is not finished"),
        (lambda run: (run / "config.json").unlink(), "is no folder of a run: it has no config.json"),
        (lambda run: damage(run, "config.json", '{"version": 99}'), "version 99 is unknown"),
        (lambda run: damage(run, "config.json", "{"), "config.json is damaged"),
        (lambda run: damage(run, "metrics.json", "[]"), "metrics.json is damaged"),
        (lambda run: damage(run, "weights.safetensors", "no tensors"), "weights.safetensors is damaged"),
    ],
)
def test_runs_that_are_none(tmp_path, scans, capsys, change, message):
    run = run_folder(tmp_path / "run")
    change(run)
    assert message in refused(capsys, run, scans, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_of_another_kind(tmp_path, scans, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    assert "there is no such folder" in refused(capsys, tmp_path / "missing", scans, out)
    assert "--run latest: there is no finished run under runs/" in refused(capsys, Path("latest"), scans, out)
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "comparison.json").write_text("{}")
    assert "is the folder of a comparison; give one of its runs" in refused(capsys, tmp_path / "comparison", scans, out)
    vr = run_folder(tmp_path / "vr")
    content = json.loads((vr / "config.json").read_text())
    content["method"]["strategy"] = "vr-only"
    (vr / "config.json").write_text(json.dumps(content))
    assert "strategy vr-only trains no image processing network" in refused(capsys, vr, scans, out)
    other = run_folder(tmp_path / "other", **{"ip.features": 6})
    content["method"]["strategy"] = "ip-only"
    (other / "config.json").write_text(json.dumps(content))
    assert "does not fit --ip; misshapen: ip." in refused(capsys, other, scans, out)
    nan = run_folder(tmp_path / "nan")
    settings = finished.read(nan).settings
    network = ip_of(settings)
    next(iter(network.parameters())).data.fill_(torch.nan)
    RunFolder(nan).write_weights({"ip": network}, to_json(settings))
    assert "weights that are no numbers" in refused(capsys, nan, scans, out)
    assert not out.exists()


def test_a_run_of_an_earlier_version(tmp_path, scans, capsys):
    old = Path(__file__).parent / "old_runs" / "version-1"
    run = tmp_path / "run"
    shutil.copytree(old / "finished", run)
    shutil.copy(old / "config.json", run)
    assert enhance(run, scans, tmp_path / "out") == 0
    assert "srresnet trained on PHANTOM (generated) gray images of 16 px (tiny)" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Going on


def test_given_again_it_does_nothing_twice(runs, scans, tmp_path, capsys):
    out = tmp_path / "out"
    assert enhance(runs(), scans, out, "--limit", 2) == 0
    assert "2 enhanced, in" in capsys.readouterr().out
    first = {name: (out / name).stat().st_ino for name in content(out) if name != "enhanced.jsonl"}
    assert len(first) == 2
    assert enhance(runs(), scans, out) == 0
    assert "2 enhanced, 2 skipped, as they were done before, in" in capsys.readouterr().out
    assert {name: (out / name).stat().st_ino for name in first} == first
    assert enhance(runs(), scans, out) == 0
    assert "0 enhanced, 4 skipped" in capsys.readouterr().out
    (out / "b.png").unlink()
    Image.fromarray(gray((40, 30), 8, seed=5)).save(scans / "a.png")
    os.utime(scans / "a.png", ns=(1, 1))
    assert enhance(runs(), scans, out) == 0
    assert "2 enhanced, 2 skipped" in capsys.readouterr().out, "what was removed, and what was made of another input"
    assert np.abs(np.asarray(Image.open(out / "a.png")) - expected(runs(), gray((40, 30), 8, 5), 0, 255)).max() <= 0.501


@pytest.mark.parametrize(
    "options", [["--strength", "0.5"], ["--window", "100/200"], ["--color", "luma"], ["--anonymize"]]
)
def test_other_options_want_another_folder(runs, scans, tmp_path, capsys, options):
    out = tmp_path / "out"
    assert enhance(runs(), scans, out) == 0
    before = content(out)
    assert f"what was enhanced in another way ({options[0][2:]} was " in refused(capsys, runs(), scans, out, *options)
    assert "run was" not in refused(capsys, runs(**{"ip.features": 6}), scans, out), "they have one name"
    assert content(out) == before


def test_a_record_that_is_damaged(runs, scans, tmp_path, capsys):
    out = tmp_path / "out"
    assert enhance(runs(), scans, out) == 0
    record = out / "enhanced.jsonl"
    whole = record.read_bytes()
    record.write_bytes(whole + b'{"file": "a.p')  # a process was killed
    (out / "b.png").unlink()
    assert enhance(runs(), scans, out) == 0
    assert all(json.loads(line) for line in record.read_text().splitlines())
    record.write_bytes(b"{\n" + whole)
    assert "enhanced.jsonl is damaged" in refused(capsys, runs(), scans, out)


def start(*arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train.enhance", "--device", "cpu", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def many(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        Image.fromarray(gray((300, 300), 8, number)).save(folder / f"{number:03d}.png")


@pytest.mark.parametrize(("how", "jobs"), [(signal.SIGKILL, 1), (signal.SIGINT, 2)])
def test_it_goes_on_after_a_kill(runs, tmp_path, how, jobs):
    """Killed while it is at work: files are whole, and those of one run, whoever made them."""
    many(tmp_path / "in", 15)
    out = tmp_path / "out"
    process = start("--run", runs(), tmp_path / "in", out, "--jobs", jobs)
    assert process.stdout is not None
    while "2/15" not in process.stdout.readline():
        assert process.poll() is None, process.stderr and process.stderr.read()
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
    told, errors = process.communicate()
    if how == signal.SIGINT:
        assert process.returncode == 130 and "To go on, give the same command again" in told and not errors
    done = {name: data for name, data in content(out).items() if name.endswith(".png") and not name.startswith(".")}
    assert 2 <= len(done) < 15
    for name in done:
        assert Image.open(out / name).size == (300, 300)
    assert enhance(runs(), tmp_path / "in", out) == 0
    assert enhance(runs(), tmp_path / "in", tmp_path / "whole") == 0
    names = {f"{number:03d}.png" for number in range(15)} | {"enhanced.jsonl"}
    assert set(content(out)) == names, "nothing half is left"
    whole = content(tmp_path / "whole")
    assert all(data == whole[name] for name, data in content(out).items() if name.endswith(".png"))


def test_processes_have_the_same_digits(runs, scans, tmp_path, capsys):
    (scans / "bad.png").write_bytes((scans / "a.png").read_bytes()[:200])
    assert enhance(runs(), scans, tmp_path / "one") == 1
    assert enhance(runs(), scans, tmp_path / "two", "--jobs", 2) == 1
    out = capsys.readouterr().out
    assert out.count("Not enhanced: ") == 2 and out.count("4 enhanced, 1 not enhanced") == 2
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 5
    assert all(one[name] == two[name] for name in one if name != "enhanced.jsonl")


def test_a_process_that_is_ended_from_outside(runs, scans, tmp_path, capsys, monkeypatch):
    """For lack of memory, say: what it was at work on is named, and the rest is done by new ones."""
    from train.enhancement import work

    class Pool:
        """The first one breaks at its second file, one that is made after it does not."""

        made = 0

        def __init__(self, *arguments: Any) -> None:
            Pool.made += 1
            self.breaks, self.submitted = Pool.made == 1, 0

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exception: Any) -> None:
            pass

        def submit(self, do: Any, job: Any) -> Any:
            self.submitted += 1
            future: Any = Future()
            if self.breaks and self.submitted == 2:
                future.set_exception(BrokenProcessPool("ended abruptly"))
            elif self.breaks and self.submitted > 2:
                raise BrokenProcessPool("ended before")
            else:
                future.set_result(work.Outcome(job, facts=dict(FACTS)))
            return future

    monkeypatch.setattr(work, "ProcessPoolExecutor", Pool)
    assert enhance(runs(), scans, tmp_path / "out", "--jobs", 2) == 1
    out = capsys.readouterr().out
    assert "3 enhanced, 1 not enhanced" in out and Pool.made == 2
    assert out.count("Not enhanced: ") == 1 and "perhaps for lack of memory; give fewer --jobs" in out


FACTS = {"size": [1, 1], "frames": 1, "noise before": None, "noise after": None, "warnings": [], "seconds": 0.0}


def test_two_commands_at_once(runs, scans, tmp_path, capsys):
    from train.files import locked

    (tmp_path / "out").mkdir()
    script = (
        "import sys, time; from pathlib import Path; from train.files import locked\n"
        "with locked(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline()
    try:
        assert "is at work in another process" in refused(capsys, runs(), scans, tmp_path / "out")
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with locked(tmp_path / "out"):
        pass


# ----------------------------------------------------------------------------------------------------------------------
# What is told


def test_a_damaged_file_is_named_and_the_others_go_on(runs, scans, tmp_path, capsys):
    (scans / "bad.png").write_bytes((scans / "a.png").read_bytes()[:200])
    (scans / "empty.dcm").write_bytes(b"")
    assert enhance(runs(), scans, tmp_path / "out") == 1
    out = capsys.readouterr().out
    assert "4 enhanced, 2 not enhanced, in" in out
    assert re.search(r"Not enhanced: \S*bad\.png cannot be read", out) and re.search(
        r"Not enhanced: \S*empty\.dcm ", out
    )
    assert "bad.png" not in content(tmp_path / "out")


def test_a_dry_run_writes_nothing(runs, scans, tmp_path, capsys):
    (scans / "bad.png").write_bytes((scans / "a.png").read_bytes()[:200])
    before = content(tmp_path)
    assert enhance(runs(), scans, tmp_path / "out", "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"{scans / 'c.tiff'} -> {tmp_path / 'out' / 'c.tiff'} (TIFF, 20 x 33 px, 3 frames, gray)" in out
    assert "5 files would be enhanced, 0 are done already, 1 other files are no images. Nothing was written." in out
    assert content(tmp_path) == before and not (tmp_path / "out").exists()


def test_patterns_and_names_of_files(runs, scans, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert enhance(runs(), "scans/*.png", "out") == 0
    assert set(content(Path("out"))) == {"a.png", "b.png", "enhanced.jsonl"}
    assert enhance(runs(), "scans/*/*.jpg", "deep") == 0
    assert set(content(Path("deep"))) == {"Meier^Eva/d.jpg", "enhanced.jsonl"}
    assert enhance(runs(), "scans/a.png", "one.PNG", "--report") == 0
    assert Path("one.PNG").read_bytes() == Path("out/a.png").read_bytes() and Path("one-report.html").is_file()


def test_noise_is_estimated():
    """Against what was added."""
    smooth = gray((256, 256), 0) * 0 + 0.5
    for sigma in (0.02, 0.1, 0.3):
        noisy = smooth + sigma * np.random.default_rng(0).standard_normal(smooth.shape).astype(np.float32)
        assert estimate(noisy) == pytest.approx(sigma, rel=0.03)
    assert estimate(smooth) is None and estimate(noisy[:9, :9]) is None


@pytest.mark.parametrize(("sigma", "word"), [(0.01, "much less noise"), (0.1, ""), (0.4, "much more noise")])
def test_a_mismatch_is_warned_about(runs, tmp_path, capsys, sigma, word):
    (tmp_path / "in").mkdir()
    for number in range(2):
        image = 128 + 255 * sigma * np.random.default_rng(number).standard_normal((64, 64))
        tifffile.imwrite(tmp_path / "in" / f"{number}.tif", image.astype(np.float32))
    assert enhance(runs(), tmp_path / "in", tmp_path / "out", "--window", "127.5/255") == 0
    out = capsys.readouterr().out
    assert out.count("; WARNING: much") == (2 if word else 0)
    assert (f"WARNING for 2 of 2 files: {word} than the network was trained for" in out) == bool(word)


def test_where_noise_cannot_be_judged_that_is_said(runs, scans, tmp_path, capsys):
    run = runs(task="blur:1")
    assert enhance(run, scans, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "was not trained to remove noise of one strength (blur:1)" in out and "WARNING" not in out


def test_the_page(runs, scans, tmp_path):
    out = tmp_path / "out"
    assert enhance(runs(), scans, out, "--report") == 0
    text = (out / "report.html").read_text()
    assert "Not for diagnosis" in text and NAME in text and "4 of 4 enhanced files are shown" in text
    for name in ("a.png", "b.png", "c.tiff", "Meier^Eva/d.jpg"):
        assert f'<th scope="row">{name}</th>' in text
    assert text.count('<section class="comparison"') == 4 and text.count("difference x 4") >= 4
    assert enhance(runs(), scans, out, "--report") == 0, "it is ours"


def test_the_page_is_bounded(runs, tmp_path):
    many(tmp_path / "in", 15)
    assert enhance(runs(), tmp_path / "in", tmp_path / "out", "--report") == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "12 of 15 enhanced files are shown" in text and text.count('<section class="comparison"') == 12


def test_nobody_is_named(runs, scans, tmp_path, capsys):
    """Neither in names nor in the record nor on the page; what can be read of a person is the pixels."""
    (scans / "Meier^Eva" / "bad.png").write_bytes((scans / "a.png").read_bytes()[:200])
    out = tmp_path / "out"
    assert enhance(runs(), scans, out, "--report", "--anonymize") == 1
    assert set(content(out)) == {"0002.jpg", "0003.png", "0004.png", "0005.tiff", "enhanced.jsonl", "report.html"}
    for name, data in content(out).items():
        for word in (b"Meier", str(tmp_path).encode(), b"a.png", b"bad"):
            assert word not in data, (name, word)
    assert "0001.png" in (out / "report.html").read_text()
    assert enhance(runs(), scans, out, "--report", "--anonymize") == 1
    assert "0 enhanced, 4 skipped" in capsys.readouterr().out


def test_the_page_in_a_browser(runs, scans, tmp_path, browser):  # noqa: F811
    """Chromium shows it without an error or a request, and the slider has input and result on its sides."""
    out = tmp_path / "out"
    assert enhance(runs(), scans, out, "--report") == 0
    browser.get_log("browser")
    browser.get((out / "report.html").as_uri())
    images = browser.execute_script(
        "return Promise.all([...document.images].map(image => image.decode()))"
        ".then(() => [...document.images].map(image => image.naturalWidth));"
    )
    assert len(images) == 12 and all(images)
    assert browser.get_log("browser") == []
    text = browser.execute_script("return document.body.innerText")
    assert "Not for diagnosis" in text and "Meier^Eva/d.jpg" in text
    choices = browser.execute_script("return [...document.querySelector('select').options].map(each => each.text)")
    assert choices == ["enhanced", "difference x 4"]


def test_the_commands_of_the_readme(runs, scans, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    commands = re.findall(r"^    python -m train\.enhance (.*)$", text, flags=re.MULTILINE)
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs(), Path("runs") / NAME)
    for command in commands:
        assert main(["--device", "cpu", *shlex.split(command)]) == 0, capsys.readouterr().err
    assert Path("enhanced/report.html").is_file() and not Path("numbered").exists()


def test_help_is_quick():
    """Without PyTorch, which takes seconds to import."""
    script = (
        "import sys; from train.enhance import arguments\ntry: arguments(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.endswith("False\n") and "--anonymize" in told
