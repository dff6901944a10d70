"""From the runs of a comparison to what it found: means, intervals, differences and tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.comparison.plan import Job, Plan
from train.errors import RunError
from train.evaluation.scores import REFERENCE_FREE
from train.evaluation.statistics import difference, holm, interval
from train.files import read_json
from train.outputs.provenance import provenance
from train.outputs.remedies import remedies_of
from train.outputs.run_folder import RunFolder

MEASURED = (
    *("psnr", "ssim", "reader_accuracy", "reader_miou", "reader_dice", "accuracy", "miou", "dice"),
    *(score.key for score in REFERENCE_FREE),
)
"""What is averaged over the runs of an arm, by the keys of ``metrics.json``."""
TESTED = ("psnr", "ssim", "reader_accuracy", "reader_miou")
"""What is tested for differences, image by image, by the columns of ``images.csv``."""
LEAST_SEEDS = 3
"""With fewer, nothing is tested: two seeds that happen to agree make any difference look certain."""


@dataclass(frozen=True)
class Record:
    """A finished run.

    :param metrics: ``metrics.json``.
    :param names: of the images that were scored.
    :param images: the scores of each, ``images.csv``.
    :param steps: what was measured at every step of IP's training.
    """

    job: Job
    folder: Path
    metrics: Mapping[str, Any]
    names: tuple[str, ...]
    images: Mapping[str, np.ndarray]
    steps: Mapping[str, np.ndarray]


def read_records(jobs: Sequence[Job], out: Path) -> list[Record]:
    """The runs that are finished.

    :raises RunError: a file is missing or damaged, or runs were made from different data.
    """
    from train.training.step_log import read_steps  # which imports PyTorch

    records: list[Record] = []
    data: dict[str, tuple[Any, Path]] = {}
    for job in jobs:
        folder = RunFolder(out / job.folder)
        if (metrics := folder.read_metrics()) is None:
            continue
        names, images = folder.read_images()
        facts = read_json(folder.data)
        known, where = data.setdefault(job.condition, (facts, folder.path))
        if known != facts:
            raise RunError(
                f"{where} and {folder.path} were made from different data (see data.json in both); remove the one "
                "whose data are not those you mean"
            )
        steps = read_steps(folder.steps, phase="train")
        records.append(Record(job, folder.path, metrics, tuple(names), images, steps))
    return records


def results(plan: Plan, records: Sequence[Record], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``results.json``, as JSON values.

    :param chosen: the tuned values.
    """
    conditions = [_condition(plan, each.name, records) for each in plan.conditions]
    _correct(conditions)
    first = records[0].metrics
    return {
        "recipe": plan.name,
        "title": plan.recipe.title,
        "question": plan.recipe.question,
        "preset": plan.preset,
        "data": first["data"],
        "dataset": first["dataset"],
        "test_images": first["n_test"],
        "seeds": list(plan.seeds),
        "steps": first["steps"],
        "chosen": {key: list(v) if isinstance(v, tuple) else v for key, v in chosen.items()},
        "set": {name: str(value) for name, value in plan.base.items()},
        **provenance(),
        # Of the runs; those of earlier versions do not say.
        "commit": " and ".join(sorted({made for record in records if (made := record.metrics.get("commit"))})) or None,
        "conditions": conditions,
    }


def _condition(plan: Plan, name: str, records: Sequence[Record]) -> dict[str, Any]:
    by_arm = {
        arm.name: sorted(
            (each for each in records if (each.job.condition, each.job.arm) == (name, arm.name)),
            key=lambda record: record.job.seed,
        )
        for arm in plan.arms
    }
    by_arm = {arm: found for arm, found in by_arm.items() if found}
    arms = {arm: _arm(found) for arm, found in by_arm.items()}
    for arm, found in by_arm.items():
        reported = next((r for r in plan.recipe.reported if (r.condition, r.arm) == (name, arm)), None)
        if reported is not None:
            arms[arm]["paper"] = {"psnr": reported.psnr, "ssim": reported.ssim}
        arms[arm]["against"] = {
            other: _differences(found, by_arm[other])
            for other in plan.recipe.against
            if other in by_arm and other != arm
        }
    any_record = next(iter(by_arm.values()), [None])[0]
    references: dict[str, Any] = {}
    if any_record is not None:
        pool = [record for found in by_arm.values() for record in found]
        titles = {key: title for r in pool for key, title in r.metrics.items() if key.startswith("remedy")}
        for end in ("_degraded", *remedies_of(titles), "_clean"):
            for key in MEASURED:
                if key.startswith(("reader_", "psnr", "ssim", "blur", "feature_")):
                    values = [v for v in (r.metrics.get(f"{key}{end}") for r in pool) if v is not None]
                    if values:
                        references[f"{key}{end}"] = float(np.mean(values))
        references |= titles
        references["accuracy_majority"] = any_record.metrics.get("accuracy_majority")
    return {"name": name, "references": references, "arms": arms}


def _arm(found: Sequence[Record]) -> dict[str, Any]:
    keys = [key for key in MEASURED if any(record.metrics.get(key) is not None for record in found)]
    own: dict[str, Any] = {"seeds": [record.job.seed for record in found], "strategy": found[0].metrics["strategy"]}
    settings = found[0].job.settings
    if "aux_weight" in settings.concerned:
        own["aux_weight"] = list(settings.auxiliary.aux_weight)
    for key in keys:
        values = [record.metrics[key] for record in found if record.metrics.get(key) is not None]
        own[key] = _interval(values)
    shares = {k: [r.metrics[k] for r in found] for k in found[0].metrics if k.startswith("gate_open_share")}
    own["gate"] = {
        key.removeprefix("gate_open_share").removeprefix("_"): float(np.mean(values))
        for key, values in shares.items()
        if None not in values
    }
    cosines = [name for name in found[0].steps if name.split("_")[0] == "cosine"]
    own["cosine"] = {
        name.removeprefix("cosine").removeprefix("_"): _cosine([record.steps[name] for record in found])
        for name in cosines
        if np.isfinite(found[0].steps[name]).any()
    }
    own["steps_skipped"] = sum(record.metrics["steps_skipped"] for record in found)
    own["seconds"] = float(np.mean([record.metrics["seconds"] for record in found]))
    return own


def _interval(values: Sequence[float]) -> dict[str, Any]:
    found = interval(values)
    return _finite({"mean": found.mean, "low": found.low, "high": found.high, "values": list(values)})


def _cosine(steps: Sequence[np.ndarray]) -> dict[str, Any]:
    """The mean cosine over all steps of all seeds, with the 95 % interval of that mean: batches are drawn anew at every
    step, so that the cosines of successive steps are taken for independent."""
    pool = np.concatenate(steps)
    pool = pool[np.isfinite(pool)]
    error = 1.96 * float(pool.std(ddof=1)) / math.sqrt(len(pool)) if len(pool) > 1 else math.nan
    mean = float(pool.mean())
    return _finite({"mean": mean, "low": mean - error, "high": mean + error, "steps": len(pool)})


def _differences(one: Sequence[Record], other: Sequence[Record]) -> dict[str, Any]:
    """What is tested, of the seeds that both arms have."""
    pairs = [(a, b) for a in one for b in other if a.job.seed == b.job.seed]
    if not pairs:
        return {}
    found = {}
    for key in TESTED:
        if not all(key in record.images for pair in pairs for record in pair):
            continue
        if any(a.names != b.names for a, b in pairs):
            raise RunError(f"{pairs[0][0].folder} and {pairs[0][1].folder} scored different images")
        test = difference(np.stack([a.images[key] for a, _ in pairs]), np.stack([b.images[key] for _, b in pairs]))
        own: dict[str, Any] = {"mean": test.mean, "low": test.low, "high": test.high, "p": test.p}
        if len(pairs) < LEAST_SEEDS:
            own |= dict.fromkeys(("low", "high", "p"))
        found[key] = _finite({**own, "seeds": len(pairs)})
    return found


def _correct(conditions: Sequence[dict[str, Any]]) -> None:
    """Adds the p values corrected for the number of comparisons that the whole table makes of the same thing (Holm)."""
    for key in TESTED:
        tests = [
            against[key]
            for condition in conditions
            for arm in condition["arms"].values()
            for against in arm["against"].values()
            if key in against and against[key]["p"] is not None
        ]
        for test, corrected in zip(tests, holm([test["p"] for test in tests]), strict=True):
            test["p_corrected"] = corrected
            test["comparisons"] = len(tests)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
