"""All that a comparison leaves in its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.comparison import tables
from train.comparison.collect import read_records, results
from train.comparison.draw import Drawn, Seen, draw
from train.comparison.plan import Job, Plan
from train.errors import RunError
from train.files import write_file, write_json
from train.outputs.page import Comparison, Figure, Page, Table, png, write_page
from train.training.progress import Display

_PHANTOM = "PHANTOM (generated) data, no patients: this says nothing about the method.\n\n"


def write(plan: Plan, jobs: Sequence[Job], chosen: Mapping[str, Any], out: Path, display: Display) -> Iterator[str]:
    """Writes ``results.json``, ``table.md``, ``table.csv``, ``verdict.md``, ``figures/`` and ``report.html``.

    :param chosen: the tuned values.
    :param display: shows the training of a reader that the cache has lost.
    :returns: lines for a person: the verdict, and where the rest is.
    :raises RunError: a file cannot be read or written.
    """
    records = read_records(jobs, out)
    if not records:
        raise RunError(f"{out} holds no finished run, so there is nothing to compare")
    found = results(plan, records, chosen)
    verdict = tables.verdict(found)
    write_json(out / "results.json", found)
    write_file(out / "table.md", tables.markdown(found).encode())
    write_file(out / "table.csv", tables.comma_separated(found).encode())
    head = _PHANTOM if found["data"] == "phantom" else ""
    write_file(out / "verdict.md", (head + "\n".join(f"- {each}" for each in verdict) + "\n").encode())
    drawn, images = draw(plan, records, out, display)
    write_page(out / "report.html", page(found, verdict, drawn, images))
    yield ""
    yield from verdict
    yield ""
    yield f"The table is in {out / 'table.md'}, pictures and all the rest in {out / 'report.html'}."


def page(found: Mapping[str, Any], verdict: Sequence[str], drawn: Sequence[Drawn], images: Sequence[Seen]) -> Page:
    """The report of a comparison.

    :param found: the content of ``results.json``.
    :param images: one of each condition, for the sliders.
    """
    shown = []
    for condition in found["conditions"]:
        if condition["arms"]:
            header, rows = tables.rows(condition)
            shown.append(Table(condition["name"] or "Results", [header[0] or "images", *header[1:]], rows))
    if shown:
        note = " ".join(each for each in tables.notes(found) if each)
        shown[-1] = dataclasses.replace(shown[-1], note=note)
    return Page(
        title=found["title"],
        source=found["data"],
        verdict=verdict,
        facts=tables.facts(found),
        tables=shown,
        figures=[Figure(each.path.read_bytes(), f"{each.title}. {each.caption}") for each in drawn],
        comparisons=[
            Comparison(
                f"Before and after{f': {each.condition}' if each.condition else ''}",
                png(each.degraded),
                {"clean": png(each.clean)} | {arm: png(image) for arm, image in each.enhanced.items()},
                caption=f"The test image {each.name}.",
            )
            for each in images
        ],
    )
