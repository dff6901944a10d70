"""Pre-training without labels: ``python -m train.pretrain --network vr --method frepa``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from train.errors import RunError
from train.run import guarded, run
from train.settings import Settings, parse
from train.settings.sections import Pretraining
from train.strategies.masked import METHODS

ABOUT = """Pre-train a network to find the clean image in a corrupted one. A pre-training is a run like any other, with
the strategy masked (or, for IP, ip-only): it takes the flags of train.run shown below, can be resumed, and ends with
weights.safetensors, which --vr-weights and --ip-weights of train.run take."""

KEYS = {"vr": "dia", "seg": "seg"}
"""The networks that are encoders, and the auxiliary whose network each is."""


def over(network: str, method: str) -> dict[str, Any]:
    """The settings of a pre-training that differ from the preset's; flags stand over these."""
    chosen = METHODS[method]
    if network == "ip":
        return {"strategy": "ip-only", "task": chosen.task, "ip_loss": chosen.ip_loss}
    return {**chosen.settings, "aux": KEYS[network], "vr_lr": Pretraining().masked_lr, "crop": 128}


def settings_of(argv: Sequence[str]) -> Settings:
    """The settings of a command line.

    :raises RunError: a value is out of range, or flags contradict each other.
    :raises SystemExit: ``--help``, or a flag that cannot be read.
    """
    parser = argparse.ArgumentParser(prog="python -m train.pretrain", add_help=False, allow_abbrev=False)
    parser.add_argument("--network", choices=(*KEYS, "ip"), default="vr")
    parser.add_argument("--method", choices=tuple(METHODS), default="frepa")
    given, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(f"{ABOUT}\n\n  --network {{{','.join((*KEYS, 'ip'))}}}\n  --method {{{','.join(METHODS)}}}\n")
    flags = {each.split("=")[0] for each in rest}
    if "--resume" not in flags and (fixed := flags & {"--strategy", "--aux"}):
        raise RunError(f"{' and '.join(sorted(fixed))} follows from --network here; leave it out, or use train.run")
    return parse(rest, over(given.network, given.method), "python -m train.pretrain")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    :returns: the exit status: 0, 2 (an error of the user's, explained on stderr), 130 (SIGINT) or 143 (SIGTERM).
    """
    return guarded(lambda: run(settings_of(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
