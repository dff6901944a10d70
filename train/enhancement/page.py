"""The page of what was enhanced: before, after, difference and noise of each file; of bounded size for any number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.enhancement.finished import NOT_FOR_DIAGNOSIS, FinishedRun
from train.enhancement.noise import middle
from train.enhancement.plan import Job
from train.errors import RunError
from train.inference import enlarged
from train.outputs.page import Comparison, Page, Table, png, write_page
from train.scans import open_scan

SHOWN = 12  # files with pictures
LISTED = 500  # rows of the table
SIDE = 384  # pixels that are shown of a file, from its middle: reduced images would hide what was changed
TIMES = 4  # by what differences are multiplied


def write(
    path: Path,
    run: FinishedRun,
    jobs: Sequence[Job],
    done: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
    facts: Mapping[str, str],
    verdict: Sequence[str],
) -> None:
    """Writes the page.

    :param jobs: all that were asked for.
    :param done: what is known of those that are enhanced, by their names.
    :param failed: why others are not, by their names.
    :param facts: what was asked for, in words.
    :param verdict: what came out, in sentences.
    :raises RunError: the page cannot be written.
    """
    enhanced = [job for job in jobs if job.name in done]
    places = np.linspace(0, len(enhanced) - 1, min(SHOWN, len(enhanced))).round().astype(int)
    comparisons = [each for place in places if (each := _comparison(enhanced[place], done[enhanced[place].name]))]
    rows = [_row(job.name, done[job.name]) for job in enhanced[:LISTED]]
    rows += [[name, "not enhanced", "", "", "", why] for name, why in list(failed.items())[:LISTED]]
    cut = len(enhanced) > LISTED or len(failed) > LISTED
    note = "Noise: standard deviation as estimated from wavelet coefficients, in units of the window."
    if cut:
        note += f" The first {LISTED} of {len(enhanced)} enhanced files, and of {len(failed)} others."
    shown = f"{len(comparisons)} of {len(enhanced)} enhanced files are shown"
    write_page(
        path,
        Page(
            title=f"Enhanced by {run.name}",
            source="real",  # a person's own, whatever the network has learned from: the introduction says that
            verdict=[NOT_FOR_DIAGNOSIS, run.introduction, *verdict, f"{shown}, evenly chosen among them."],
            facts=facts,
            tables=[Table("Files", ["file", "pixels", "frames", "noise before", "noise after", "remarks"], rows, note)],
            comparisons=comparisons,
        ),
    )


def _row(name: str, facts: Mapping[str, Any]) -> list[str]:
    height, width = facts["size"]
    noise = ["-" if facts[each] is None else f"{facts[each]:.3f}" for each in ("noise before", "noise after")]
    return [name, f"{width} x {height}", str(facts["frames"]), *noise, "; ".join(facts["warnings"])]


def _comparison(job: Job, facts: Mapping[str, Any]) -> Comparison | None:
    """The middle of the middle frame, before and after; ``None`` where a file has gone."""
    try:
        source, target = open_scan(job.source), open_scan(job.target)
        frame = source.frames // 2
        scale = target.size(frame)[0] // source.size(frame)[0]
        low, high = facts["window"]
        before, after = (
            _tensor(middle(scan.read(frame), side), low, high)
            for scan, side in ((source, SIDE // scale), (target, SIDE // scale * scale))
        )
    except (RunError, OSError, ValueError):
        return None
    before = enlarged(before[None], scale)[0]
    if before.shape != after.shape:  # of the middle of an image with an odd side
        before, after = (each[:, : min(before.shape[1], after.shape[1]), : min(before.shape[2], after.shape[2])]
                         for each in (before, after))  # fmt: skip
    noise = facts["noise before"]
    told = "" if noise is None else f", noise estimated as {noise:.3f} before"
    told += "" if facts["noise after"] is None or noise is None else f" and {facts['noise after']:.3f} after"
    where = f"frame {frame + 1} of {source.frames}" if source.frames > 1 else "the image"
    return Comparison(
        title=job.name,
        before=png(before),
        after={"enhanced": png(after), f"difference x {TIMES}": png(0.5 + TIMES * (after - before))},
        before_name="input" if scale == 1 else "input, enlarged",
        caption=f"The middle of {where}{told}. In the difference, gray is no change. {' '.join(facts['warnings'])}",
    )


def _tensor(image: np.ndarray, low: float, high: float) -> torch.Tensor:
    """``float32 [H, W, C]`` in the file's values as ``[C, H, W]`` in units of the window."""
    span = high - low if high > low else 1.0
    return torch.from_numpy(np.ascontiguousarray((image - low) / span).transpose(2, 0, 1)).float()
