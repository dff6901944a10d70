"""All that a comparison leaves in its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.comparison import tables
from train.comparison.collect import read_records, results, to_text
from train.comparison.draw import draw
from train.comparison.plan import Job, Plan
from train.files import write_file
from train.training.progress import Display


def write(plan: Plan, jobs: Sequence[Job], chosen: Mapping[str, Any], out: Path, display: Display) -> Iterator[str]:
    """Writes ``results.json``, ``table.md``, ``table.csv``, ``verdict.md``, figures and ``report.html``.

    :param chosen: the tuned values.
    :param display: shows the training of a reader that the cache has lost.
    :returns: lines for a person: the verdict, and where the rest is.
    :raises RunError: a file cannot be read or written.
    """
    records = read_records(jobs, out)
    found = results(plan, records, chosen)
    verdict = tables.verdict(found)
    write_file(out / "results.json", to_text(found).encode())
    write_file(out / "table.md", tables.markdown(found).encode())
    write_file(out / "table.csv", tables.comma_separated(found).encode())
    head = (
        "PHANTOM (generated) data, no patients: this says nothing about the method.\n\n"
        if found["data"] == "phantom"
        else ""
    )
    write_file(out / "verdict.md", (head + "\n".join(f"- {each}" for each in verdict) + "\n").encode())
    draw(plan, records, out, display)
    yield ""
    yield from verdict
    yield f"The table is in {out / 'table.md'}."
