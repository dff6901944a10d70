"""What the parts of benchmarks/gpu.sh have found: one JSON file for each, and all of them as one table.

    python -m benchmarks.gpu_table machine|build|tests|sanitizer|table OUTDIR

``machine`` ends with status 1 where there is no GPU, ``build`` where the CUDA kernels cannot be used.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# PyTorch is imported by those parts that ask it something.

#: The last word of each of compute-sanitizer's tools.
SUMMARY = re.compile(r"={5,} ((?:ERROR|RACECHECK) SUMMARY: .*)")
SANITIZERS = ("memcheck", "racecheck")
#: The parts that compare every kernel with the reference.
CHECKS = ("check", "check-triton")


def machine() -> dict[str, Any]:
    """The GPU and the software, as in the benchmark's files, and what belongs to the build and the kernels."""
    import torch

    from gradprom_ext.bench import report

    about = report.machine(torch.device("cuda"), [])
    del about["command"]
    try:
        import triton
    except ImportError:
        version = None
    else:
        version = triton.__version__
    major, minor = torch.cuda.get_device_capability()
    return {**about, "compute_capability": f"{major}.{minor}", "gpus": torch.cuda.device_count(), "triton": version}


def build() -> dict[str, Any]:
    """What was compiled and which backends take tensors of the GPU; a reason for each that does not."""
    import torch

    from gradprom_ext import backends

    extension, problem = backends.extension()
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release ([\d.]+)", nvcc.stdout)
    return {
        "module": problem or "imported",
        "architectures": getattr(extension, "CUDA_ARCHITECTURES", ""),
        "nvcc": release[1] if release else None,
        "backends": backends.explain(torch.device("cuda")),
    }


def tests(paths: Sequence[Path]) -> dict[str, Any]:
    """JUnit files of runs of pytest side by side: counts, seconds, what failed, and why how many were skipped."""
    suites = [suite for path in paths for suite in ET.parse(path).iter("testsuite")]
    reasons: Counter[str] = Counter()
    failures = []
    for case in (case for suite in suites for case in suite.iter("testcase")):
        for skipped in case.findall("skipped"):
            reasons[skipped.get("message", "")] += 1
        for bad in (*case.findall("failure"), *case.findall("error")):
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            failures.append({"test": name, "message": bad.get("message", "").partition("\n")[0]})
    # An interrupted test is among the cases, without an outcome; the suites' own counts leave it out.
    names = ("tests", "failures", "errors", "skipped")
    total, failed, errors, skips = (sum(int(suite.get(name, 0)) for suite in suites) for name in names)
    return {
        "passed": total - failed - errors - skips,
        "failed": failed + errors,
        "skipped": skips,
        "seconds": round(max((float(suite.get("time", 0)) for suite in suites), default=0.0), 1),
        "failures": failures,
        "skips": dict(reasons.most_common()),
    }


def sanitizer(logs: Path) -> dict[str, str]:
    """The verdict of each tool of compute-sanitizer, from its output."""
    verdicts = {}
    for tool in SANITIZERS:
        log = logs / f"{tool}.log"
        text = log.read_text(errors="replace") if log.exists() else "compute-sanitizer was not found"
        found = SUMMARY.findall(text)
        lines = [line for line in text.strip().splitlines() if line.strip()]
        verdicts[tool] = found[-1] if found else lines[-1] if lines else "no output"
    return verdicts


def parts(path: Path) -> list[tuple[str, str, str]]:
    """Name, outcome and seconds of every part, as gpu.sh wrote them down."""
    rows = []
    for line in path.read_text().splitlines():
        name, outcome, seconds = line.split("\t")
        rows.append((name, outcome, seconds))
    return rows


def table(out: Path) -> str:
    """Everything that is there, as Markdown."""

    from gradprom_ext.bench import report

    def loaded(name: str) -> dict[str, Any]:
        path = out / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    about, built, tested, checked = map(loaded, ("machine", "build", "tests", "sanitizer"))
    lines = [
        f"# {about.get('device', 'No GPU')}, {about.get('date', 'no date')}",
        "`bash benchmarks/gpu.sh OUTDIR`: "
        + ", ".join(
            f"{key} {about[key]}" for key in ("commit", "torch", "triton", "cuda", "driver", "python") if key in about
        ),
        "| part | outcome | seconds |\n| --- | --- | ---: |\n"
        + "\n".join(f"| {name} | {outcome} | {seconds} |" for name, outcome, seconds in parts(out / "parts.tsv")),
    ]
    if built:
        reasons = ", ".join(f"{name}: {reason or 'yes'}" for name, reason in built["backends"].items())
        lines += [
            "## Build",
            f"nvcc {built['nvcc']}, {built['architectures'] or 'no CUDA kernels'}. Backends: {reasons}.",
        ]
    checks = [out / "logs" / f"{name}.log" for name in CHECKS]
    if any(path.exists() for path in checks):
        lines += ["## Self-check, `python -m gradprom_ext.doctor --check`"]
        lines += [f"```text\n{path.read_text(errors='replace').strip()}\n```" for path in checks if path.exists()]
    if tested:
        lines += [
            "## Tests",
            "{passed} passed, {failed} failed, {skipped} skipped in {seconds} s.".format(**tested),
            "\n".join(
                [f"* failed: {f['test']}: {f['message']}" for f in tested["failures"]]
                + [f"* skipped {count}: {reason}" for reason, count in tested["skips"].items()]
            ),
        ]
    if checked:
        lines += ["## compute-sanitizer", "\n".join(f"* {tool}: {verdict}" for tool, verdict in checked.items())]
    for name, title in (("update", "The optimizer step"), ("step", "The whole training step")):
        if (out / f"{name}.json").exists():
            lines += [f"## {title}", report.markdown(*report.load(out / f"{name}.json"))]
    return "\n\n".join(line for line in lines if line) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("machine", "build", "tests", "sanitizer", "table"))
    parser.add_argument("out", type=Path, metavar="OUTDIR")
    args = parser.parse_args(argv)
    if args.part == "table":
        (args.out / "table.md").write_text(table(args.out))
        return 0
    if args.part == "machine":
        import torch

        if not torch.cuda.is_available():
            sys.exit(
                f"PyTorch {torch.__version__} finds no NVIDIA GPU here (torch.cuda.is_available() is False); this "
                "needs a GPU, its driver and a PyTorch built for CUDA"
            )
    collect: dict[str, Callable[[], dict[str, Any]]] = {
        "machine": machine,
        "build": build,
        "tests": lambda: tests(sorted((args.out / "logs").glob("*.xml"))),
        "sanitizer": lambda: sanitizer(args.out / "logs"),
    }
    found = collect[args.part]()
    (args.out / f"{args.part}.json").write_text(json.dumps(found, indent=1) + "\n")
    if args.part == "build" and found["backends"]["cuda"] is not None:
        sys.exit(f"the CUDA kernels cannot be used: {found['backends']['cuda']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
