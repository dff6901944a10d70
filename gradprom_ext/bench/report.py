"""What was measured as a file and as Markdown tables."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .checking import is_ours
from .results import FLOOR, WANTED_OVERHEAD, YARDSTICKS, Result, StepResult, UpdateResult, WarmResult, bytes_read

_KINDS: dict[str, type[UpdateResult] | type[StepResult] | type[WarmResult]] = {
    "update": UpdateResult,
    "step": StepResult,
    "warm": WarmResult,
}

# ----------------------------------------------------------------------------------------------------------------------
# JSON


def machine(device: torch.device, arguments: Sequence[str]) -> dict[str, object]:
    """What the numbers were measured on, with which command, and from which commit."""
    about: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "gradprom_ext.bench", *arguments]),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        about |= {
            "processor": _processor(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
            "memory_bytes": gpu.total_memory,
            "l2_bytes": gpu.L2_cache_size,
            "multiprocessors": gpu.multi_processor_count,
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        }
    return about


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _output(program: str, *arguments: str) -> str:
    """What a program prints; empty where there is none, or where it fails."""
    if shutil.which(program) is None:
        return ""
    run = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent, timeout=60
    )
    return run.stdout.strip() if run.returncode == 0 else ""


def save(path: Path, about: Mapping[str, object], results: Iterable[Result], left_out: Sequence[str] = ()) -> None:
    """Writes ``{"machine": {...}, "results": [...], "left_out": [...]}``, samples included.

    :param left_out: a sentence for everything that was not measured.
    """
    kinds = {kind: what for what, kind in _KINDS.items()}
    entries = [{"what": kinds[type(r)], **asdict(r)} for r in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": about, "results": entries, "left_out": list(left_out)}, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """Reads what :func:`save` wrote, this version or an earlier one.

    :raises ValueError: the file cannot be read, or holds something else; names it.
    """
    try:
        content = json.loads(path.read_text())
        results = [_KINDS[entry.pop("what", "update")](**entry) for entry in content["results"]]
        return dict(content["machine"]), results
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of python -m gradprom_ext.bench ({error})") from error


# ----------------------------------------------------------------------------------------------------------------------
# Markdown


def markdown(about: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Everything measured in one run: where, a summary, and a table for each case."""
    parts = [where(about)]
    updates = [r for r in results if isinstance(r, UpdateResult)]
    if updates:
        parts += [summary(updates), *map(update_table, _cases(updates))]
    steps = [r for r in results if isinstance(r, StepResult)]
    for variant in dict.fromkeys((r.variant, r.optimizer) for r in steps):
        parts.append(step_table([r for r in steps if (r.variant, r.optimizer) == variant]))
    warm = [r for r in results if isinstance(r, WarmResult)]
    for case in dict.fromkeys((r.network, r.optimizer) for r in warm):
        parts.append(warm_table([r for r in warm if (r.network, r.optimizer) == case]))
    return "\n\n".join(parts)


def where(about: Mapping[str, Any]) -> str:
    """One line about the machine."""
    versions = [f"torch {about['torch']}"]
    if about.get("driver"):
        versions += [f"CUDA {about['cuda']}", f"driver {about['driver']}"]
    return (
        f"{about['device']}, {about['threads']} threads, {', '.join(versions)}, commit {about['commit'] or 'unknown'}, "
        f"{about['date']}: `{about['command']}`"
    )


def update_table(results: Sequence[UpdateResult]) -> str:
    """One case: every contestant beside the memory; the first result is the fused step."""
    first = results[0]
    unit, scale = _unit(first)
    by_name = {r.contestant: r for r in results}
    shown = [r for r in results if r.contestant not in YARDSTICKS]
    bandwidth = first.bytes * first.parameters / first.floor_ms / 1e6
    source = "`a += b`" if "memory" in by_name else "a copy"
    notes = [
        f"floor {first.bytes} B/parameter{' (gradients stay on chip)' if first.on_chip else ''} at the "
        f"{bandwidth:.1f} GB/s of {source} = {first.floor_ms * scale:.2f} {unit}"
    ]
    if "reads" in by_name:  # a dot product reads 8 bytes per element
        alone = by_name["reads"].median_ms * bytes_read(first.optimizer, first.precision) / 8
        notes.append(f"its reads alone {alone * scale:.2f} {unit}")
    if "host" in by_name:
        host = by_name["host"].median_ms
        what = "host work" if first.timed == "clock" else "launch and barrier"
        notes.append(f"{what} {host * scale:.2f} {unit}")
        if first.timed != "clock" and first.median_ms > host:
            share = 100 * first.floor_ms / (first.median_ms - host)
            notes.append(f"without them {first.contestant} moves its bytes at {share:.0f} % of that")
    rows = []
    for r in shown:
        ours = is_ours(r.contestant)
        rows.append(
            [
                r.contestant,
                f"{r.median_ms * scale:.2f}",
                f"{r.low_ms * scale:.2f} .. {r.high_ms * scale:.2f}",
                _marked(r, "over_floor", f"{r.over_floor:.2f}"),
                f"{r.bytes * r.parameters / r.median_ms / 1e6:.0f}" if ours else "",
                _marked(r, "over_floor", f"{100 / r.over_floor:.0f}") if ours else "",
                _marked(r, "speed_up", f"{r.speed_up:.2f}"),
                "" if r.host_us is None else _marked(r, "host_us", f"{r.host_us:.1f}"),
                *((r.timed, str(r.input_sets)) if r.timed != "clock" else ("", "")),
            ]
        )
    header = [
        "",
        f"median {unit}",
        "middle half",
        "x floor",
        "GB/s",
        "% of memory",
        "x fused",
        "host us",
        "timed",
        "sets",
    ]
    return "\n\n".join([f"**{_title(first)}**: {'; '.join(notes)}", _table(header, rows), *_doubts(shown)])


def summary(results: Sequence[UpdateResult]) -> str:
    """One line for each case: the fused step, which is the first result, and how many times longer the others take."""
    names = dict.fromkeys(r.contestant for r in results if r.contestant not in YARDSTICKS)
    others = [name for name in names if name != results[0].contestant]
    rows = []
    for case in _cases(results):
        by_name = {r.contestant: r for r in case}
        ours = case[0]
        unit, scale = _unit(ours)
        rows.append(
            [
                _title(ours),
                f"{ours.floor_ms * scale:.2f} {unit}",
                f"{ours.median_ms * scale:.2f} {unit}",
                _marked(ours, "over_floor", f"{100 / ours.over_floor:.0f}"),
                "" if ours.host_us is None else _marked(ours, "host_us", f"{ours.host_us:.1f}"),
                *(_marked(r, "speed_up", f"{r.speed_up:.2f}") if (r := by_name.get(name)) else "" for name in others),
            ]
        )
    note = f"\n\n{_MARK}" if any("?" in cell for row in rows for cell in row[1:]) else ""
    return _table(["", "floor", "fused", "% of memory", "host us", *(f"x {name}" for name in others)], rows) + note


def step_table(results: Sequence[StepResult]) -> str:
    """One setting: every contestant beside the two-backward floor, and the verdict."""
    first = results[0]
    rows = [
        [
            r.contestant,
            f"{r.median_ms:.2f}",
            f"{r.low_ms:.2f} .. {r.high_ms:.2f}",
            _marked(r, "overhead_percent", f"{r.overhead_percent:+.2f} %"),
            f"{r.overhead_low_percent:+.2f} .. {r.overhead_high_percent:+.2f}",
            "" if r.update_ms is None else f"{r.update_ms:.3f}",
            ""
            if r.update_overhead_percent is None
            else _marked(r, "update_overhead_percent", f"{r.update_overhead_percent:+.2f} %"),
        ]
        for r in results
    ]
    header = ["", "median ms", "middle half", f"over {FLOOR}", "middle half", "update ms", f"over {FLOOR}"]
    title = (
        f"{first.network} ({_count(first.parameters)} + {_count(first.vr_parameters)} parameters), batch "
        f"{first.batch}, {first.size} x {first.size}, {first.optimizer}, {first.variant}"
    )
    verdicts = [_verdict(r) for r in results if is_ours(r.contestant)]
    return "\n\n".join([f"**{title}**", _table(header, rows), *_doubts(results), *verdicts])


def warm_table(results: Sequence[WarmResult]) -> str:
    """One case: warm steps by threads, then the host's share of them."""
    first = results[0]
    counts = sorted({r.threads for r in results})
    by_place = {(r.contestant, r.is_host, r.threads): r for r in results}
    rows = []
    for name, is_host in dict.fromkeys((r.contestant, r.is_host) for r in results):
        here = [by_place.get((name, is_host, count)) for count in counts]
        cells = [cell for r in here for cell in (("", "") if r is None else (f"{r.least_us:.1f}", f"{r.low_us:.1f}"))]
        one, most = here[0], here[-1]
        ratio = (
            f"{most.least_us / one.least_us:.2f}" if len(counts) > 1 and one is not None and most is not None else ""
        )
        rows.append([("host: " if is_host else "") + ("a += b" if name == "memory" else name), *cells, ratio])
    header = ["", *(cell for n in counts for cell in (f"{n} thr., least us", "first quartile")), "ratio of the least"]
    title = (
        f"{first.network}, {_count(first.parameters)} parameters in {first.tensors} tensors, {first.optimizer}**: warm "
        f"steps, {len(first.samples_us)} samples; host: the same on tensors of one element"
    )
    return "\n\n".join([f"**{title}", _table(header, rows)])


def _verdict(r: StepResult) -> str:
    alone = "" if r.update_overhead_percent is None else f", {r.update_overhead_percent:+.2f} % by its update alone"
    wanted = f"wanted: at most {WANTED_OVERHEAD:.0f} %"
    if "overhead_percent" in r.unreliable:
        wanted += "; the spread of whole steps is too wide to tell"
    return f"{r.contestant} costs {r.overhead_percent:+.2f} % over its two-backward floor{alone} ({wanted})"


#: What stands behind a figure that is not to be believed, and under the table.
_MARK = (
    "?: the spread is too wide to believe this figure, most likely because the machine was busy; measure again on a "
    "quiet one, or with more --rounds."
)
_NAMES = {
    "over_floor": "x floor",
    "speed_up": "x fused",
    "host_us": "host us",
    "overhead_percent": f"over {FLOOR}",
    "update_overhead_percent": f"update over {FLOOR}",
}


def _marked(r: UpdateResult | StepResult, field: str, figure: str) -> str:
    return f"{figure} ?" if field in r.unreliable else figure


def _doubts(results: Sequence[UpdateResult | StepResult]) -> list[str]:
    """What the marks of a table mean, and a line for each reason; nothing where there is no mark."""
    reasons = [f"- {r.contestant}, {_NAMES[field]}: {why}" for r in results for field, why in r.unreliable.items()]
    return ["\n".join([_MARK, *reasons])] if reasons else []


def _cases(results: Sequence[UpdateResult]) -> list[list[UpdateResult]]:
    cases: dict[tuple[str, str, str], list[UpdateResult]] = {}
    for r in results:
        cases.setdefault((r.network, r.optimizer, r.precision), []).append(r)
    return list(cases.values())


def _title(r: UpdateResult) -> str:
    precision = "" if r.precision == "fp32" else f", {r.precision} with float32 masters"
    return f"{r.network}, {_count(r.parameters)} parameters in {r.tensors} tensors, {r.optimizer}{precision}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else str(parameters)


def _unit(r: UpdateResult) -> tuple[str, float]:
    return ("ms", 1.0) if r.timed == "clock" else ("us", 1e3)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown that reads well unrendered too: columns of one width, the first to the left, figures to the right; none
    without figures."""
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        for cells in zip(*columns, strict=True)
    ]
    lines.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
