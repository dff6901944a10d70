"""What pre-trained encoders are worth while they stay frozen: ``python -m train.probe --starts fresh,frepa``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import RunError
from train.files import expanded
from train.run import guarded
from train.settings import Settings, parse
from train.text import printable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from train.data.base import ImageData
    from train.training.progress import Display

ABOUT = """Freeze encoders that were pre-trained in different ways, and compare what can be read from their embeddings:
the image, frequency by frequency (a small decoder), the diagnosis (a linear layer; where patients have several slices,
also one layer of attention over these), the segmentation (a small decoder).
Pre-trainings are those of --vr-start and come from the cache, or are trained now with the settings --masked-*; the
other flags are those of train.run. Writes probe.json and spectrum.png into --out."""


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    """The command line.

    :raises RunError: a value is out of range.
    :raises SystemExit: ``--help``, or a flag that cannot be read.
    """
    parser = argparse.ArgumentParser(prog="python -m train.probe", add_help=False, allow_abbrev=False)
    parser.add_argument("--starts", default="fresh,mae,mfm,frepa")
    parser.add_argument("--weights", metavar="NAME=FILE", action="append", default=[])
    parser.add_argument("--head-steps", type=int, default=300)
    parser.add_argument("--out", default="results-of/probe")
    given, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(f"{ABOUT}\n")
        print("  --starts A,B           which ones: fresh, clean, mae, mfm, frepa (fresh,mae,mfm,frepa)")
        print("  --weights NAME=FILE    also an encoder with these weights; may be given several times")
        print("  --head-steps N         steps of each small decoder (300)")
        print("  --out FOLDER           where the results go (results-of/probe)\n")
    if given.head_steps < 1:
        raise RunError(f"--head-steps must be at least 1, not {given.head_steps}")
    return given, parse(rest, {"strategy": "gradprom", "vr_update": "train"}, "python -m train.probe")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    :returns: the exit status: 0, 2 (an error of the user's, explained on stderr), 130 (SIGINT) or 143 (SIGTERM).
    """
    return guarded(lambda: run(*arguments(sys.argv[1:] if argv is None else argv)))


def run(given: argparse.Namespace, settings: Settings) -> int:
    """Does what the command line asks.

    :raises RunError: something the user can put right.
    """
    from rich.console import Console

    from train.data.fingerprint import fingerprint
    from train.evaluation.frozen import judge
    from train.experiment import load_data, look_up
    from train.files import write_json
    from train.inference import choose_device
    from train.outputs.figures import save_spectrum
    from train.training.progress import Brief

    display = Brief(Console(markup=False, emoji=False, highlight=False))
    starts = [each.strip() for each in given.starts.split(",") if each.strip()]
    known = _known(starts)
    files = _files(given.weights, known)
    look_up(settings)
    device = choose_device(settings.training.device)
    data = load_data(settings, progress=display.console.is_terminal)
    if data.size is None:
        raise RunError("embeddings are compared between images of one size; give a --size")
    # As a run does, with which pre-trainings are shared.
    settings = settings.change({"source": data.source})
    planned = {start: settings.change({"vr_start": start}) for start in known}
    facts = fingerprint(data)
    out = expanded(given.out, "--out")
    # All encoders first: what cannot be had is said before anything is judged.
    encoders = {name: encoder(each, data, facts, device, display) for name, each in planned.items()}
    encoders |= {name: encoder(settings, data, facts, device, display, file=file) for name, file in files.items()}
    found = {}
    for name, network in encoders.items():
        found[name] = judge(network, data, device=device, steps=given.head_steps, seed=settings.training.seed)
        display.announce(f"{name}: {_words(found[name])}")
    middles = next(iter(found.values()))["frequencies"]
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "dataset": settings.data.dataset,
        "data": data.source,
        "vr": settings.auxiliary.vr,
        "head_steps": given.head_steps,
        "seed": settings.training.seed,
        "n_test": len(data.test),
    }
    write_json(out / "probe.json", about | {"starts": found})
    save_spectrum(
        out / "spectrum.png",
        frequencies=middles,
        curves={name: (each["ring_correlation"], each["energy_ratio"]) for name, each in found.items()},
        title=f"{data.title}: what a decoder finds in frozen embeddings of {settings.auxiliary.vr}",
        source=data.source,
    )
    display.announce(printable(f"{out / 'probe.json'}, {out / 'spectrum.png'}"))
    return 0


def _known(starts: Sequence[str]) -> list[str]:
    """
    :raises RunError: a start is unknown, or named twice.
    """
    from typing import get_args

    from train.strategies.base import VRStart

    for each in starts:
        if each not in get_args(VRStart):
            raise RunError(f"--starts: there is no start {each!r}; choose from: {', '.join(get_args(VRStart))}")
    if len(set(starts)) != len(starts):
        raise RunError(f"--starts {','.join(starts)}: a start is named twice")
    return list(starts)


def _files(texts: Sequence[str], taken: Sequence[str]) -> dict[str, Path]:
    """
    :raises RunError: a text is not ``NAME=FILE``, or its name is taken.
    """
    files: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise RunError(f"--weights {text}: write NAME=FILE")
        if name in taken or name in files:
            raise RunError(f"--weights {text}: the name {name} is taken")
        files[name] = expanded(file, "--weights")
    if not files and not taken:
        raise RunError("there is nothing to compare; give --starts or --weights")
    return files


def encoder(
    settings: Settings,
    data: ImageData,
    facts: dict[str, Any],
    device: torch.device,
    display: Display,
    *,
    file: Path | None = None,
) -> nn.Module:
    """The frozen encoder of a start, or that of a file.

    :param settings: whose ``vr_start`` says which.
    :raises RunError: the network has no embedding, or the weights do not fit it.
    """
    import torch

    from models import VR
    from models.encoder import Encoder
    from train.evaluation.frozen import freeze
    from train.experiment import Prepared, look_up
    from train.seeds import stable_seed
    from train.training.weights import load_state, load_weights

    auxiliary = settings.auxiliary
    torch.manual_seed(stable_seed("VR", settings.training.seed))
    classes = max(2, data.num_classes)
    network = VR.build(auxiliary.vr, auxiliary.vr_options, channels=data.channels, num_classes=classes)
    if not isinstance(network, Encoder):
        raise RunError(f"--vr {auxiliary.vr} has no embedding to judge; choose resnet18, resnet50, swin or vit")
    if file is not None:
        load_weights(file, {"vr": network}, flag="--weights")
    else:
        first = Prepared(settings, data, facts, look_up(settings), device, display).first()
        for key, weights in first.items():
            load_state(network, weights, key=key)
    return freeze(network.to(device))


def _words(found: Mapping[str, Any]) -> str:
    told = [f"PSNR {found['psnr']:.2f} dB, high frequencies {found['psnr_high']:.2f} dB"]
    if "accuracy" in found:
        told.append(f"accuracy {found['accuracy']:.1%} +- {found['accuracy_half_width']:.1%}")
    if "accuracy_patients" in found:
        told.append(f"by patient {found['accuracy_patients']:.1%} of {found['patients']}")
    if "miou" in found:
        told.append(f"mIoU {found['miou']:.3f}")
    return ", ".join(told)


if __name__ == "__main__":
    sys.exit(main())
