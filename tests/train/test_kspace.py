"""``kspace`` as a task: what the command line means, its columns, its remedies, its bad input. What it does to waves is
tested with :mod:`models.kspace`."""

from __future__ import annotations

import pytest
import torch

from models.kspace import cartesian_columns, reduced
from train.degradations import CLASSICAL, Gaussian, KSpace, enlarge, fixed_seeds, parse
from train.degradations.kspace import BICUBIC
from train.errors import RunError
from train.experiment import do_run

from .contracts import check_degradation, phantoms, psnr
from .tiny import config


@pytest.mark.parametrize("text", ["kspace:4", "kspace:2,4", "kspace:4,4", "kspace:1,4,0.1", "kspace:3"])
def test_the_contract(text):
    # What undersampling has taken, no interpolation brings back.
    check_degradation(parse(text), remedied=parse(text).acceleration == 1)


@pytest.mark.parametrize(
    ("task", "means", "written"),
    [
        ("kspace2", KSpace(2), "kspace:2,1,0.08"),
        ("kspace4", KSpace(4), "kspace:4,1,0.08"),
        ("joint2", KSpace(2, 4), "kspace:2,4,0.08"),
        ("joint4", KSpace(4, 4), "kspace:4,4,0.08"),
    ],
)
def test_tasks(task, means, written):
    assert parse(task) == means
    assert str(means) == written
    assert parse(task).scale == int(task[-1])
    with pytest.raises(RunError, match=f"{task} takes no argument; it is {written}"):
        parse(f"{task}:3")


def test_an_image_has_columns_of_its_own():
    """The same ones for one seed, in every channel, in whatever batch; those of ``models.kspace``."""
    image = phantoms(1).expand(1, 3, -1, -1).contiguous()
    joint = parse("joint2")
    one, other, again = joint(image.expand(3, -1, -1, -1), [1, 2, 1])
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one[0], one[2])
    columns = cartesian_columns(24, 4, 0.08, torch.Generator().manual_seed(5))
    assert 2 <= columns.sum() < 24
    assert torch.equal(joint(image, [5]), reduced(image, 2, columns).clamp(0, 1))


def test_it_flips_with_the_image():
    """Which columns are measured says left from right; without that, nothing does."""
    image = phantoms(2)
    for dim in (-1, -2):
        torch.testing.assert_close(KSpace(2)(image.flip(dim), [1, 2]), KSpace(2)(image, [1, 2]).flip(dim))
    torch.testing.assert_close(KSpace(2, 4)(image.flip(-2), [1, 2]), KSpace(2, 4)(image, [1, 2]).flip(-2))


def test_what_rings_above_white_is_cut_off():
    edge = torch.zeros(1, 1, 32, 32)
    edge[..., 8:24] = 1
    assert reduced(edge, 2).max() > 1.005
    assert KSpace(2)(edge, [0]).max() == 1


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_image_stays(value):
    """Undersampled too: all of it is in the lowest frequency, which is always measured."""
    for task in ("kspace2", "joint4"):
        found = parse(task)(torch.full((1, 1, 64, 64), value), [3])
        torch.testing.assert_close(found, torch.full_like(found, value))


def test_it_does_not_shift_the_image():
    """Enlarged bicubically, the image comes closer to the clean one than shifted by half a pixel to any side."""
    clean = phantoms()
    shown = enlarge(KSpace(2)(clean, [0] * 4), 2)
    twice = enlarge(shown, 2)
    here = psnr(shown, clean).mean()
    for dim, step in ((-1, 1), (-1, -1), (-2, 1), (-2, -1)):
        shifted = torch.nn.functional.avg_pool2d(twice.roll(step, dim), 2)
        assert psnr(shifted, clean).mean() < here - 0.5


def test_remedies():
    degrade = KSpace(2)
    assert {name: remedy.title for name, remedy in degrade.remedies.items()} == {
        CLASSICAL: "zero-filling",
        BICUBIC: "bicubic",
    }
    clean = phantoms()
    given = degrade(clean, [0] * 4)
    restored = {name: remedy.restore(given) for name, remedy in degrade.remedies.items()}
    assert torch.equal(restored[BICUBIC], enlarge(given, 2))
    torch.testing.assert_close(reduced(restored[CLASSICAL], 2), reduced(given, 1), rtol=0, atol=0.1)
    assert (psnr(restored[CLASSICAL], clean) > psnr(restored[BICUBIC], clean)).all()


def test_remedies_of_a_chain():
    """Each of them after what undoes the noise."""
    chain = parse("kspace2+gaussian:0.1")
    given = chain(phantoms(), fixed_seeds(chain, list("abcd")))
    for name in (CLASSICAL, BICUBIC):
        expected = KSpace(2).remedies[name].restore(Gaussian(0.1).restore_batch(given))
        assert torch.equal(chain.remedies[name].restore(given), expected)


def test_a_run_has_both(tmp_path):
    settings = config(task="kspace2", strategy="ip-only", max_steps=1, out=tmp_path / "run")
    metrics = do_run(settings).metrics
    assert (metrics["remedy"], metrics["remedy_bicubic"]) == ("zero-filling", "bicubic")
    assert metrics["psnr_bicubic"] == pytest.approx(metrics["psnr_degraded"], abs=1e-4)
    assert metrics["psnr_classical"] != metrics["psnr_bicubic"]
    assert metrics["run"].startswith("tiny-kspace2-ip-only-")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kspace:0", "scale must be an integer >= 1, not 0"),
        ("kspace:2.5", "scale must be an integer, not '2.5'"),
        ("kspace:2,0.5", "acceleration must be a finite number >= 1, not 0.5"),
        ("kspace:2,inf", "acceleration must be a finite number >= 1, not inf"),
        ("kspace:2,4,0", "center must be above 0 and at most 1, not 0.0"),
        ("kspace:2,4,1.5", "center must be above 0 and at most 1, not 1.5"),
        ("kspace:2,10,0.2", "an acceleration of 10 measures 0.1 of the columns, and the center of 0.2 alone"),
    ],
)
def test_arguments_out_of_range(text, said):
    with pytest.raises(RunError, match=said):
        parse(text)


def test_bad_images():
    with pytest.raises(ValueError, match=r"clean images must be float32 .*, not torch.complex64"):
        KSpace(2)(torch.zeros(1, 1, 8, 8, dtype=torch.complex64), [0])
    with pytest.raises(ValueError, match="images of 9 x 8 pixels have no k-space that 2 divides without a rest"):
        KSpace(2)(torch.zeros(1, 1, 9, 8), [0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "--ip iconet: ICONet: scale must be 2 or 4, not 1: it enlarges in stages of 2; give a --task"),
        ({"task": "kspace4", "crop": 16}, "--crop 16 .*does not work with --ip iconet: ICONet needs 7 x 7 pixels"),
        ({"task": "kspace4", "crop": 14}, "--crop 14 is no multiple of 4, which --task kspace4 needs; give --crop 16"),
        ({"task": "kspace2", "ip_aux": "vr"}, "--ip-aux vr: iconet has no loss 'vr' of its own; it has rec"),
    ],
)
def test_runs_that_cannot_begin(changes, said, tmp_path):
    with pytest.raises(RunError, match=said):
        do_run(config(**{"strategy": "ip-only", "ip": "iconet", "ip.features": 4, "out": tmp_path / "run"} | changes))
    assert not (tmp_path / "run").exists()
