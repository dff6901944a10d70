"""The command line of :mod:`gradprom_ext.bench`."""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .. import backends as _backends
from . import report, step, update, warm
from .checking import LeftOut
from .networks import GPU_SIZES, NETWORKS, RESNETS, parameter_shapes
from .results import Result

#: Of the training step.
SIZES = ("batch", "size", "blocks", "width", "depth", "vr_width")
#: Options that not every kind of benchmark has, and which have them.
OPTIONS = {"networks": ("update", "warm"), "precisions": ("update",), **dict.fromkeys(("variants", *SIZES), ("step",))}
#: Of a warm step.
WARM_NETWORKS = ("140x1", "1M", "srresnet")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gradprom_ext.bench",
        description="The speed of GradProm beside what PyTorch can do without it, and beside the memory.",
    )
    parser.add_argument("--what", choices=("update", "step", "warm"), default="update",
                        help="the optimizer step alone (default), a whole training step, or the optimizer step and the "
                             "functions with warm caches, by one thread and by all, and the host's share")  # fmt: skip
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--optimizers", nargs="+", choices=update.OPTIMIZERS,
                        help="default: both for update and warm, adamw for step")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=31, help="samples of each contestant (default 31)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the samples and the machine there")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE",
                        help="measure nothing; print the tables of such files as Markdown")  # fmt: skip
    group = parser.add_argument_group("update, warm")
    group.add_argument("--networks", nargs="+", metavar="SIZE",
                       help=f"{', '.join(NETWORKS)}; a number of parameters such as 0.1M or 1B; TENSORSxELEMENTS. "
                            f"Default: the networks on a CPU, {', '.join(GPU_SIZES)} on a GPU; for warm "
                            f"{', '.join(WARM_NETWORKS)}")  # fmt: skip
    group.add_argument("--precisions", nargs="+", choices=update.PRECISIONS,
                       help="fp32 (default), bf16: 16-bit gradients and parameters with float32 masters")  # fmt: skip
    group = parser.add_argument_group("step")
    group.add_argument("--variants", nargs="+", choices=step.VARIANTS,
                       help="default: eager on a CPU, all on a GPU")  # fmt: skip
    group.add_argument("--batch", type=int, help="images (GPU 16, CPU 4)")
    group.add_argument("--size", type=int, help="side of an image in pixels (GPU 128, CPU 32)")
    group.add_argument("--blocks", type=int, help="residual blocks of SR-ResNet (GPU 16, CPU 4)")
    group.add_argument("--width", type=int, help="features of SR-ResNet (64)")
    group.add_argument("--depth", type=int, choices=sorted(RESNETS), help="of the ResNet (GPU 50, CPU 18)")
    group.add_argument("--vr-width", type=int, help="features of the ResNet's first stage (64)")
    return parser


def _device(name: str) -> torch.device:
    """:raises ValueError: no device, or one that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; choose cpu, cuda or cuda:INDEX") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} cannot be timed; choose cpu, cuda or cuda:INDEX")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees {count} CUDA devices here")
        torch.cuda.set_device(device.index or 0)
        return torch.device("cuda", device.index or 0)
    return device


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(args: argparse.Namespace, device: torch.device) -> None:
    """:raises ValueError: an option out of range, or one that does not belong to the others."""
    if args.rounds < 2:
        raise ValueError(f"--rounds must be at least 2, got {args.rounds}")
    for name, kinds in OPTIONS.items():
        if getattr(args, name) is not None and args.what not in kinds:
            raise ValueError(f"{_option(name)} belongs to --what {' and '.join(kinds)}, not to --what {args.what}")
    if args.what == "warm" and device.type != "cpu":
        raise ValueError(f"--what warm times a CPU, not {device}: give --device cpu")
    for name, least in (("batch", 2), ("size", 8), ("blocks", 1), ("width", 1), ("vr_width", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{_option(name)} must be at least {least}, got {value}")
    for network in args.networks or ():
        parameter_shapes(network)
    if args.json is not None and args.json.is_dir():
        raise ValueError(f"--json {args.json} is a directory; name a file")
    if "graph" in (args.variants or ()) and device.type != "cuda":
        raise ValueError(f"--variants graph needs a CUDA device, not {device}")


Measured = tuple[Sequence[Result], list[LeftOut]]


def run_update(args: argparse.Namespace, device: torch.device, backends: Sequence[str]) -> Iterator[Measured]:
    """Measures and prints case by case."""
    for network in args.networks or (NETWORKS if device.type == "cpu" else GPU_SIZES):
        for optimizer in args.optimizers or update.OPTIMIZERS:
            for precision in args.precisions or ("fp32",):
                case = update.Case(network, optimizer, precision)
                results, left_out = update.measure(case, device, backends, args.rounds)
                if results:
                    print("\n" + report.update_table(results))
                yield results, left_out


def run_step(args: argparse.Namespace, device: torch.device, backends: Sequence[str]) -> Iterator[Measured]:
    """Measures and prints variant by variant."""
    chosen = {name: getattr(args, name) for name in SIZES}
    setting = dataclasses.replace(step.DEFAULTS[device.type], **{k: v for k, v in chosen.items() if v is not None})
    for optimizer in args.optimizers or ("adamw",):
        for variant in args.variants or (("eager",) if device.type == "cpu" else step.VARIANTS):
            case = dataclasses.replace(setting, optimizer=optimizer, variant=variant)
            results, left_out = step.measure(case, device, backends, args.rounds)
            if results:
                print("\n" + report.step_table(results))
            yield results, left_out


def run_warm(args: argparse.Namespace, device: torch.device, backends: Sequence[str]) -> Iterator[Measured]:
    """Measures and prints case by case."""
    for network in args.networks or WARM_NETWORKS:
        for optimizer in args.optimizers or update.OPTIMIZERS:
            results, left_out = warm.measure(update.Case(network, optimizer, "fp32"), backends[0], args.rounds)
            if results:
                print("\n" + report.warm_table(results))
            yield results, left_out


#: By ``--what``.
RUNS = {"update": run_update, "step": run_step, "warm": run_warm}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints tables and, with ``--json FILE``, writes everything measured.

    :returns: 1 where something of ours failed, stepped wrongly or could not be timed; else 0.
    """
    parser = _parser()
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(arguments)
    try:
        if args.table:
            print("\n\n".join(report.markdown(*report.load(path)) for path in args.table))
            return 0
        device = _device(args.device)
        _check(args, device)
    except ValueError as error:
        parser.error(str(error))

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name with a letter that the terminal lacks is no crash
    # The same optimizers run in graphs and outside of them; the detector of waits is used as it is meant to be.
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
    warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
    about = report.machine(device, arguments)
    print(report.where(about), flush=True)
    backends = [name for name, reason in _backends.explain(device).items() if reason is None]
    everything: list[Result] = []
    notes: list[LeftOut] = []
    for results, left_out in RUNS[args.what](args, device, backends):
        for note in left_out:
            print(f"\n{note.reason}")
        sys.stdout.flush()
        everything += results
        notes += left_out
        if args.json is not None:  # each time: a long run may be cut short
            report.save(args.json, about, everything, [note.reason for note in notes])
    if args.json is not None:
        print(f"\nwritten: {args.json}")
    return int(any(note.is_failure for note in notes))


if __name__ == "__main__":
    sys.exit(main())
