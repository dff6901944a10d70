"""Encoders that are judged without being trained: spectra by hand, probes against SciPy, and nothing that moves."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import VR
from models.decoder import Decoder
from models.slices import SliceHead
from train import experiment, probe, run
from train.data.base import Subset
from train.evaluation.frozen import embeddings, freeze, judge, linear_probe, stacks, train_head
from train.evaluation.spectrum import spectrum
from train.losses import image_loss

from . import tiny

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --- spectra ---


def test_equal_images() -> None:
    images = noise(2, 3, 32, 40)
    found = spectrum(images, images, bands=8)
    assert torch.allclose(found.correlation, torch.ones(2, 8, dtype=torch.float64))
    assert torch.allclose(found.energy, torch.ones(2, 8, dtype=torch.float64))
    assert found.frequencies.tolist() == pytest.approx([(i + 0.5) / 16 for i in range(8)])


def test_a_factor_and_an_offset() -> None:
    images = noise(1, 1, 32, 32)
    found = spectrum(0.5 * images + 0.2, images, bands=4)
    assert torch.allclose(found.correlation, torch.ones(1, 4, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found.energy, torch.full((1, 4), 0.25, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(spectrum(-images, images, bands=4).correlation, -torch.ones(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(32, 32), (33, 40)])
def test_a_sharp_low_pass(shape: tuple[int, int]) -> None:
    """1 below the cut, 0 above it: what rounding leaves there correlates with nothing."""
    clean = noise(1, 1, *shape)
    rows, columns = np.fft.fftfreq(shape[0]), np.fft.fftfreq(shape[1])
    low = np.fft.ifft2(np.fft.fft2(clean[0, 0].double()) * (np.hypot(rows[:, None], columns) <= 0.25)).real
    found = spectrum(torch.tensor(low)[None, None], clean, bands=4)
    assert found.correlation[0, :2].tolist() == pytest.approx([1, 1], abs=1e-6)
    assert found.correlation[0, 2:].tolist() == [0, 0]
    assert found.energy[0].tolist() == pytest.approx([1, 1, 0, 0], abs=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (15, 18), (16, 17)])
def test_against_the_whole_spectrum(shape: tuple[int, int]) -> None:
    one, other = noise(1, 2, *shape), noise(1, 2, *shape, seed=1)
    distance = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1]))
    a, b = (np.fft.fft2(each[0].double().numpy()) for each in (one, other))
    found = spectrum(one, other, bands=4)
    for band in range(4):
        ring = (distance > band / 8 + 1e-9) & (distance <= (band + 1) / 8 + 1e-9)
        cross = (a * b.conj())[:, ring].sum().real
        powers = [(abs(each[:, ring]) ** 2).sum() for each in (a, b)]
        assert found.correlation[0, band].item() == pytest.approx(cross / math.sqrt(powers[0] * powers[1]))
        assert found.energy[0, band].item() == pytest.approx(powers[0] / powers[1])


def test_a_constant_image_has_no_spectrum() -> None:
    found = spectrum(noise(1, 1, 16, 16), torch.full((1, 1, 16, 16), 0.3), bands=4)
    assert found.correlation.isnan().all() and found.energy.isnan().all()
    found = spectrum(torch.full((1, 1, 16, 16), 0.3), noise(1, 1, 16, 16), bands=4)
    assert not found.correlation.any() and not found.energy.any()


def test_wrong_spectra() -> None:
    with pytest.raises(ValueError, match="must share a shape"):
        spectrum(noise(1, 1, 16, 16), noise(1, 1, 16, 15))
    with pytest.raises(ValueError, match="8 x 8 px are too small for 16 bands"):
        spectrum(noise(1, 1, 8, 8), noise(1, 1, 8, 8))


# --- linear probes ---


def test_probe_is_the_solution() -> None:
    """Of the same problem, which SciPy solves too."""
    from scipy.optimize import minimize

    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (60,), generator=generator)
    features = torch.randn(60, 4, generator=generator, dtype=torch.float64) * 3 + labels[:, None]
    labels[:5] = -1
    found = linear_probe(features, labels, 3, penalty=0.1)

    known, target = features[5:].numpy(), labels[5:].numpy()
    scaled = (known - known.mean(0)) / known.std(0)

    def loss(flat: np.ndarray) -> float:
        weight, bias = flat[:12].reshape(3, 4), flat[12:]
        logits = scaled @ weight.T + bias
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -logs[range(55), target].mean() + 0.05 * (weight**2).sum()

    solved = minimize(loss, np.zeros(15), method="BFGS", options={"gtol": 1e-7}).x
    own = np.concatenate([found.linear.weight.detach().numpy().ravel(), np.zeros(3)])
    np.testing.assert_allclose(own[:12], solved[:12], atol=1e-4)
    again = linear_probe(features, labels, 3, penalty=0.1)
    assert torch.equal(again.linear.weight, found.linear.weight), "chance takes part"
    with pytest.raises(ValueError, match="at least one image whose label is known"):
        linear_probe(features, torch.full((60,), -1), 3, penalty=0.1)


def test_a_feature_that_never_changes() -> None:
    features = torch.cat([torch.randn(20, 1, generator=torch.Generator().manual_seed(0)), torch.ones(20, 1)], 1)
    found = linear_probe(features, (features[:, 0] > 0).long(), 2, penalty=1e-2)
    assert found(features.double()).isfinite().all()


# --- frozen ---


def test_frozen_means_frozen() -> None:
    network = tiny.TinyEncoder(channels=1, num_classes=2).train()
    nn.init.normal_(network.norm.running_mean)
    before = copy.deepcopy(network.state_dict())
    data = tiny.with_masks(tiny.image_data())
    found = judge(network, data, device=CPU, steps=3, seed=0)
    assert {"psnr", "psnr_high", "accuracy", "miou", "ring_correlation", "energy_ratio"} <= set(found)
    json.dumps(found)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} has moved"
    assert not network.training and not any(each.requires_grad for each in network.parameters())
    assert judge(network, data, device=CPU, steps=3, seed=0) == found


def test_what_the_data_lack_is_not_judged() -> None:
    data = tiny.image_data()
    found = judge(freeze(tiny.TinyEncoder(channels=1, num_classes=2)), data, device=CPU, steps=1, seed=0)
    assert "accuracy" in found and "miou" not in found
    unknown = replace(data, train=replace(data.train, labels=None), val=replace(data.val, labels=None))
    assert "accuracy" not in judge(tiny.TinyEncoder(channels=1, num_classes=2), unknown, device=CPU, steps=1, seed=0)


def test_embeddings_do_not_depend_on_their_neighbors() -> None:
    network, data = tiny.TinyEncoder(channels=1, num_classes=2), tiny.image_data()
    found = embeddings(network, data.train, device=CPU)
    assert found.shape == (13, 4, 8, 8) and not found.requires_grad
    alone = embeddings(network, data.train.take([4]), device=CPU)
    torch.testing.assert_close(found[4:5], alone)


def test_a_head_learns() -> None:
    """From an embedding that is the image itself, a decoder without stages finds the image."""
    images = noise(12, 1, 8, 8)
    torch.manual_seed(0)
    head = Decoder(1, 0, 1)
    trained = train_head(
        head, images, lambda out, index: image_loss(out, images[index]), steps=200, device=CPU, lr=0.05
    )
    assert image_loss(trained(images), images).item() < 1e-3
    assert not trained.training


# --- volumes ---


def test_a_head_over_the_slices_of_a_volume() -> None:
    torch.manual_seed(0)
    encoder = freeze(VR.build("resnet18", channels=1, num_classes=2))
    volume = noise(2, 5, 1, 32, 32)
    dense = encoder.features(volume.flatten(0, 1)).unflatten(0, (2, 5))
    head = SliceHead(encoder.width, 3)
    logits = head(dense)
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(each.grad is not None for each in head.parameters())
    assert all(each.grad is None for each in encoder.parameters())
    head.eval()
    with torch.no_grad():
        torch.testing.assert_close(head(dense.flip(1)), head(dense), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(head(dense[:1]), head(dense)[:1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(head(dense[:, :4]), head(dense), atol=1e-6), "a slice does not count"
        assert head(dense[:, :1]).shape == (2, 3), "a volume of one slice"
    with pytest.raises(ValueError, match="multiple of heads"):
        SliceHead(8, 2, features=10)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        SliceHead(8, 0)


def test_padding_is_no_slice() -> None:
    torch.manual_seed(0)
    head = SliceHead(6, 2).eval()
    dense = torch.randn(2, 3, 6, 2, 2)
    padded = torch.cat([dense, torch.full((2, 2, 6, 2, 2), float("nan"))], 1)
    with torch.no_grad():
        torch.testing.assert_close(head(padded), head(dense))
        padded[0, 3] = 1.0
        assert not torch.allclose(head(padded)[0], head(dense)[0], atol=1e-4), "the fourth slice does not count"
        torch.testing.assert_close(head(padded)[1], head(dense)[1])


def by_patient(labels: list[int], patients: list[str]) -> Subset:
    images = np.zeros((len(labels), 8, 8, 1), np.uint8)
    names = tuple(f"{place}.png" for place in range(len(labels)))
    return Subset(images, np.array(labels), None, names, tuple(patients))


def test_stacks_by_hand() -> None:
    """Of b, whose images disagree, and of d, whose label is not known, there is none."""
    dense = torch.arange(7.0).reshape(7, 1, 1, 1)
    found = stacks(by_patient([1, 0, 1, 1, 0, -1, 0], ["a", "b", "a", "b", "c", "d", "c"]), dense)
    assert found is not None
    assert found.labels.tolist() == [1, 0]
    assert found.embeddings.flatten(1).tolist() == [[0, 2], [4, 6]]
    found = stacks(by_patient([1, 1, 0], ["a", "a", "c"]), dense[:3])
    assert found is not None
    assert str(found.embeddings.flatten(1).tolist()) == "[[0.0, 1.0], [2.0, nan]]"
    assert stacks(by_patient([1, 0], ["a", "b"]), dense[:2]) is None, "nobody has a second image"
    assert stacks(by_patient([-1, -1], ["a", "a"]), dense[:2]) is None
    assert stacks(replace(by_patient([1, 1], ["a", "a"]), patients=None), dense[:2]) is None


def test_a_patient_is_diagnosed_by_one_slice_among_several() -> None:
    """Ill is who has one bright slice: no slice but that one tells, and which one it is differs."""
    generator = np.random.default_rng(0)

    def drawn(number: int) -> Subset:
        images, labels, patients = [], [], []
        for patient in range(number):
            ill, slices = patient % 2, int(generator.integers(2, 5))
            bright = int(generator.integers(slices))
            images += [np.full((16, 16, 1), 200 if ill and place == bright else 40) for place in range(slices)]
            labels += [ill] * slices
            patients += [f"{patient:02d}"] * slices
        subset = by_patient(labels, patients)
        return replace(subset, images=np.stack(images).astype(np.uint8))

    data = replace(tiny.image_data(), train=drawn(24), val=drawn(4), test=drawn(20))
    torch.manual_seed(0)
    network = tiny.TinyEncoder(channels=1, num_classes=2)
    found = judge(network, data, device=CPU, steps=120, seed=0)
    assert found["patients"] == 20 and found["accuracy_patients_majority"] == 0.5
    assert found["accuracy_patients"] == 1.0
    assert found["accuracy"] < 0.9, "a slice alone tells it, too"


# --- the command ---

FLAGS = ["--vr", "tiny-encoder", "--head-steps", "2", "--masked-steps", "2", "--masked-seed", "0"]


def flags(**changes: object) -> list[str]:
    given = tiny.arguments(**changes)
    place = given.index("--vr")
    return [*given[:place], *given[place + 2 :], *FLAGS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = ["--starts", "fresh,frepa", "--out", str(out), *flags(dataset="tiny-masks")]
    assert probe.main(argv) == 0, capsys.readouterr().err
    written = json.loads((out / "probe.json").read_text())
    assert list(written["starts"]) == ["fresh", "frepa"]
    assert written["starts"]["fresh"] != written["starts"]["frepa"]
    assert len(written["starts"]["frepa"]["ring_correlation"]) == len(written["starts"]["frepa"]["frequencies"]) == 4
    assert (out / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert "once: it is kept in the cache" in capsys.readouterr().out

    # Nothing is trained anew, and the same is said of it.
    assert probe.main(argv) == 0
    assert "once" not in capsys.readouterr().out
    assert json.loads((out / "probe.json").read_text()) == written


def test_the_pre_training_of_a_run_is_the_one_that_is_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where neither is told whether the data are real (the tiny ones never are)."""
    load = experiment.load_data
    monkeypatch.setattr(
        experiment, "load_data", lambda settings, **how: load(settings.change({"source": "phantom"}), **how)
    )
    own = flags(dataset="tiny-masks", source="auto", max_steps=1)
    place = own.index("--head-steps")
    del own[place : place + 2]
    assert run.main(["--vr-start", "frepa", "--out", str(tmp_path / "run"), *own]) == 0, capsys.readouterr().err
    assert "Pre-training (frepa)" in capsys.readouterr().out
    assert probe.main(["--starts", "frepa", "--head-steps", "1", "--out", str(tmp_path / "out"), *own]) == 0
    assert "Pre-training (frepa)" not in capsys.readouterr().out


def test_a_file_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    network = tiny.TinyEncoder(channels=1, num_classes=2)
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("last")}
    save_file({f"vr.{name}": value for name, value in state.items()}, tmp_path / "w.safetensors")
    out = tmp_path / "out"
    given = ["--starts", "", "--weights", f"mine={tmp_path / 'w.safetensors'}", "--out", str(out), *flags()]
    assert probe.main(given) == 0, capsys.readouterr().err
    assert list(json.loads((out / "probe.json").read_text())["starts"]) == ["mine"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--starts", "frepa,beit"], "there is no start 'beit'; choose from: fresh, clean, frepa, mae, mfm"),
        (["--starts", "frepa,frepa"], "a start is named twice"),
        (["--starts", ""], "nothing to compare"),
        (["--weights", "file"], "write NAME=FILE"),
        (["--weights", "fresh=file"], "the name fresh is taken"),
        (["--starts", "", "--weights", "a=nowhere.safetensors"], "cannot be read"),
        (["--head-steps", "0"], "--head-steps must be at least 1"),
    ],
)
def test_errors(given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [each for each in flags() if "--head-steps" not in given or each not in ("--head-steps", "2")]
    assert probe.main([*given, "--out", str(tmp_path / "out"), *own]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
