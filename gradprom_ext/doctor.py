"""``python -m gradprom_ext.doctor``: what was built, what can run here, and why the rest cannot.

With ``--check`` every backend takes steps on every device that it can run on, in a process of its own with a time
limit, and a table compares them with the reference; the status is 1 where something is wrong. What is found is
remembered: ``backend="auto"`` does not take what failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch

from . import backends, self_check
from .backends import Backend
from .version import TESTED_TORCH, __version__


def devices() -> list[torch.device]:
    """The CPU and every GPU PyTorch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(count))]


def standing_of(version: str) -> str:
    """What is known about a version of PyTorch.

    >>> standing_of("2.13.0+cpu")
    'tested with 2.10 to 2.14, which 2.13.0+cpu is one of'
    >>> standing_of("3.0.0")
    'tested with 2.10 to 2.14; 3.0.0 is newer: run the tests (pip install -e ".[test]" && pytest)'
    """
    known = " to ".join(".".join(map(str, pair)) for pair in TESTED_TORCH)
    own = tuple(map(int, version.split(".")[:2]))
    if TESTED_TORCH[0] <= own <= TESTED_TORCH[1]:
        return f"tested with {known}, which {version} is one of"
    relation = "newer" if own > TESTED_TORCH[1] else "older"
    return f'tested with {known}; {version} is {relation}: run the tests (pip install -e ".[test]" && pytest)'


def report() -> str:
    """The text that ``main`` prints."""
    extension, problem = backends.extension()
    lines = [
        f"gradprom_ext {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}",
    ]
    lines.append(f"PyTorch: {standing_of(torch.__version__)}")
    if extension is None:
        lines.append(f"compiled module: no ({problem})")
    else:
        cuda = extension.CUDA_ARCHITECTURES
        path = extension.tensor_path(torch.empty(0))
        lines += [
            f"compiled module: {extension.__file__}",
            f"  compiler          {extension.COMPILER}",
            f"  CPU kernels       {extension.cpu_isa()}, "
            + (
                f"OpenMP, {torch.get_num_threads()} threads"
                if extension.OPENMP
                else "one thread (built without OpenMP)"
            ),
            f"  CUDA kernels      {cuda or 'not built (no nvcc was found when the package was installed)'}",
            "  tensors read by   "
            + {"exchange": "the DLPack exchange API", "attributes": "attributes (this PyTorch has no exchange API)"}[
                path
            ],
        ]
    lines.append("backends, in order of preference:")
    for backend in backends.BACKENDS:
        reason = backend.missing()
        lines.append(f"  {backend.name:<11}{'yes' if reason is None else 'no: ' + reason}")
    folder = self_check.cache_folder()
    off = "off (GRADPROM_SELF_CHECK)" if self_check.switched_off() else f"remembered in {folder or 'memory alone'}"
    lines.append(f"self-check before the first step: {off}; --check is its long form")
    lines.append("what runs where:")
    for device in devices():
        chosen = next(name for name, reason in backends.explain(device).items() if reason is None)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        lines.append(f"  {str(device) + ' (' + name + ')':<32}{chosen}")
        for other, reason in backends.explain(device).items():
            if reason is not None:
                lines.append(f"    not {other}: {reason}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The long form of the self-check


#: Importing PyTorch and starting a driver may take so long, in seconds.
START_LIMIT = 60.0


class Finding(NamedTuple):
    """A line of the table.

    :param worst: the number that came nearest to its limit, or went farthest beyond it.
    :param seconds: that it took, compiling included.
    """

    backend: str
    device: str
    what: str
    fault: str | None
    worst: self_check.Row | None = None
    seconds: float = 0.0


def backend_of(name: str) -> Backend:
    """By its name, or as ``MODULE:NAME`` of a class.

    :raises ValueError: there is no such backend.
    """
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            return getattr(importlib.import_module(module), attribute)()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"--backend {name}: there is no such class ({error})") from error
    backends.check_name(name)
    return next((b for b in backends.BACKENDS if b.name == name), backends.BACKENDS[-1])


def to_be_checked(name: str | None, device: torch.device | None) -> list[tuple[str, torch.device]]:
    """Every backend that has something to prove, with every device that it takes.

    :raises ValueError: there is no such backend.
    """
    names = [name] if name else [b.name for b in backends.BACKENDS if b.missing() is None]
    known = {each: backend_of(each) for each in names}
    places = [device] if device else devices()
    return [
        (n, d) for n, b in known.items() if b.forms() for d in places if b.missing() is None and not b.rejects(d, 1)
    ]


def examine_here(name: str, device: torch.device) -> Iterator[Finding]:
    """The long form in this process. What it finds is what ``auto`` will know."""
    backend = backend_of(name)
    faults: dict[str, str | None] = {}
    for needs, elements in self_check.long_form(device):
        what = f"{needs}, up to {elements:,}"
        print(json.dumps({"begun": what, "needs": str(needs)}), flush=True)
        worst: self_check.Row | None = None
        fault: str | None = None
        start = time.perf_counter()
        try:
            rows = self_check.examine(backend, device, needs, elements)
        except Exception as error:
            fault = self_check.in_a_line(error)
        else:
            worst = max(
                rows, key=lambda row: math.inf if row.wrong else row.error / row.allowed if row.allowed else 0.0
            )
            fault = str(worst) if worst.wrong else None
        faults[str(needs)] = faults.get(str(needs)) or fault
        yield Finding(backend.name, str(device), what, fault, worst, time.perf_counter() - start)
        if fault is not None and not self_check.is_alive(device):
            break
    if ":" not in name:
        record = self_check.Record(backend, device)
        # Where all is well, faults that were found before are gone too.
        record.add(faults) if any(faults.values()) else record.write(faults)


def examine_apart(name: str, device: torch.device, limit: float) -> list[Finding]:
    """The same in a process of its own, which may die or never end.

    :param limit: seconds for each line of the table.
    """
    command = [sys.executable, "-m", "gradprom_ext.doctor", "--check", "--in-this-process"]
    command += ["--backend", name, "--device", str(device)]
    root = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        status = _status(process, out, limit)
        for file in (out, err):
            file.seek(0)
        said, complaint = out.read(), err.read().strip().splitlines()
    findings: list[Finding] = []
    begun = {"begun": "its start", "needs": ""}
    for line in said.splitlines():
        told = json.loads(line)
        if "begun" in told:
            begun = told
        else:
            worst = told.pop("worst")
            findings.append(Finding(**told, worst=worst and self_check.Row(*worst)))
            begun = {"begun": "its end", "needs": ""}
    if status not in (0, 1):
        if status is None:
            fault = f"did not finish within {limit:.0f} s: a kernel that never ends, or a busy machine"
        else:
            fault = f"the process ended with status {status}"
            if status < 0:
                fault += f", {signal.Signals(-status).name}"
            if complaint:
                fault += f": {complaint[-1]}"
        findings.append(Finding(backend_of(name).name, str(device), begun["begun"], fault))
        if ":" not in name and begun["needs"]:
            self_check.Record(backend_of(name), device).add({begun["needs"]: fault})
    return findings


def _status(process: subprocess.Popen[bytes], out: IO[str], limit: float) -> int | None:
    """Of a process at its end; ``None`` of one that wrote nothing to ``out`` for ``limit`` seconds and was killed."""
    written, deadline = 0, time.monotonic() + max(limit, START_LIMIT)
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(0.1)
            size = os.fstat(out.fileno()).st_size
            if size > written:
                written, deadline = size, time.monotonic() + limit
        return None
    finally:  # also where this process is interrupted
        if process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)  # a driver may hold on to it


def table(findings: Sequence[Finding]) -> str:
    """
    >>> print(table([Finding("cpu", "cpu", "sgd", None, self_check.Row("inner products", 2e-15, 1e-11), 0.02)]))
    backend  device  what  ms  result  off by   allowed
    cpu      cpu     sgd   20  ok      2.0e-15  1e-11    inner products
    """
    rows = [("backend", "device", "what", "ms", "result", "off by", "allowed", "")]
    for f in findings:
        result, ms = "ok" if f.fault is None else "wrong", f"{1000 * f.seconds:.0f}"
        if f.worst is None:
            rows.append((f.backend, f.device, f.what, ms, result, "-", "-", f.fault or ""))
        else:
            error, allowed = f"{f.worst.error:.1e}", f"{f.worst.allowed:g}"
            rows.append((f.backend, f.device, f.what, ms, result, error, allowed, f.worst.what))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def check(name: str | None, device: torch.device | None, limit: float) -> int:
    """Prints the table. Returns 1 where something is wrong, or where there is nothing to be checked."""
    found = [f for each in to_be_checked(name, device) for f in examine_apart(*each, limit)]
    if not found:
        print("nothing but the reference can run here: there is nothing to compare with it")
        return 1
    print(table(found))
    wrong = sum(f.fault is not None for f in found)
    if wrong:
        print(f"{wrong} of {len(found)} are wrong: please report this, with the output of the doctor without --check")
    else:
        print(f"all {len(found)} agree with the reference")
    return int(wrong > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gradprom_ext.doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare every backend with the reference on every device")
    parser.add_argument("--backend", metavar="NAME", help="this one alone; MODULE:CLASS for one of your own")
    parser.add_argument("--device", type=torch.device, help="this one alone: cpu, cuda:0, ...")
    parser.add_argument(
        "--time-limit", type=float, default=120.0, metavar="SECONDS", help="for each line of the table (120)"
    )
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report. Returns 1 where only the reference can run, or where ``--check`` finds a fault, else 0."""
    parser = _parser()
    given = parser.parse_args(argv)
    if not given.check:
        if given.backend or given.device:
            parser.error("--backend and --device are for --check")
        print(report())
        return 0 if backends.extension()[0] is not None else 1
    try:
        if not given.in_this_process:
            return check(given.backend, given.device, given.time_limit)
    except ValueError as error:
        parser.error(str(error))
    bad = 0
    for finding in examine_here(given.backend, given.device):
        print(json.dumps(finding._asdict()), flush=True)
        bad |= finding.fault is not None
    return bad


if __name__ == "__main__":
    sys.exit(main())
