"""What a comparison found, in rows and in words."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.evaluation.scores import REFERENCE_FREE
from train.outputs.remedies import remedies_of

LEVEL = 0.05
"""Corrected p values below this are called a difference."""

_TITLES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "reader_accuracy": "reader: diagnosis right",
    "reader_miou": "reader: mIoU",
    "reader_dice": "reader: Dice",
    "accuracy": "VR: diagnosis right",
    "miou": "VR: mIoU",
    "dice": "VR: Dice",
    **{score.key: score.title for score in REFERENCE_FREE},
}
_FORMS = {"psnr": ".2f", "reader_accuracy": ".1%", "accuracy": ".1%"}
_UNITS = {"psnr": " dB"}
_WORDS = {
    "psnr": ("above", "below", "in PSNR"),
    "reader_accuracy": ("better than", "worse than", "for the independent reader (share of right diagnoses)"),
    "reader_miou": ("better than", "worse than", "for the independent reader (mean IoU)"),
}


def number(key: str, value: float | None, *, sign: bool = False) -> str:
    """A score as people write it, without its unit.

    >>> number("psnr", 27.123), number("reader_accuracy", -0.01, sign=True), number("ssim", None)
    ('27.12', '-1.0%', '-')
    """
    form = _FORMS.get(key, ".3f")
    return "-" if value is None else format(value, ("+" if sign else "") + form)


def with_interval(key: str, found: Mapping[str, Any] | None) -> str:
    """A mean with its interval: ``27.12 [27.01, 27.23]``."""
    if not found:
        return "-"
    mean = number(key, found["mean"])
    if found.get("low") is None:
        return mean
    return f"{mean} [{number(key, found['low'])}, {number(key, found['high'])}]"


def columns_of(condition: Mapping[str, Any]) -> list[str]:
    """The scores that any arm of a condition has."""
    return [key for key in _TITLES if any(key in arm for arm in condition["arms"].values())]


def rows(condition: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of a condition: its header, and a row for each arm and each reference."""
    keys = columns_of(condition)
    against = sorted({other for arm in condition["arms"].values() for other in arm["against"]})
    paper = any("paper" in arm for arm in condition["arms"].values())
    header = ["", *(_TITLES[key] for key in keys)]
    header += [f"PSNR minus {other} (dB)" for other in against]
    header += ["lambda", "gate open", "mean cosine", *(["paper: PSNR / SSIM"] if paper else [])]
    table = []
    references = condition["references"]
    for end, title in (
        ("_degraded", "degraded"),
        *((end, f"classical: {title}") for end, title in remedies_of(references).items()),
        ("_clean", "clean"),
    ):
        cells = [number(key, references.get(f"{key}{end}")) for key in keys]
        if any(cell != "-" for cell in cells):
            table.append([title, *cells, *["-"] * (len(header) - 1 - len(cells))])
    for name, arm in condition["arms"].items():
        row = [name, *(with_interval(key, arm.get(key)) for key in keys)]
        row += [_difference(arm["against"].get(other, {}).get("psnr")) for other in against]
        row.append("-" if "aux_weight" not in arm else ", ".join(f"{weight:g}" for weight in arm["aux_weight"]))
        row.append(_each(arm["gate"], lambda share: f"{share:.0%}"))
        row.append(
            _each(
                arm["cosine"],
                lambda c: f"{c['mean']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]" if c["low"] is not None else "-",
            )
        )
        if paper:
            own = arm.get("paper")
            row.append("-" if own is None else f"{own['psnr']} / {own['ssim'] or '-'}")
        table.append(row)
    return header, table


def _each(found: Mapping[str, Any], form: Any) -> str:
    return ", ".join(f"{f'{name} ' if name else ''}{form(value)}" for name, value in found.items()) or "-"


def _difference(test: Mapping[str, Any] | None) -> str:
    if not test:
        return "-"
    if test["low"] is None:
        return number("psnr", test["mean"], sign=True)
    star = "*" if (test.get("p_corrected") or 1) < LEVEL else ""
    return (
        f"{number('psnr', test['mean'], sign=True)}{star} "
        f"[{number('psnr', test['low'], sign=True)}, {number('psnr', test['high'], sign=True)}]"
    )


def markdown(found: Mapping[str, Any]) -> str:
    """``table.md``."""
    lines = [
        f"# {found['title']}{' - PHANTOM (generated) data' if found['data'] == 'phantom' else ''}",
        "",
        *about(found),
    ]
    for condition in found["conditions"]:
        if not condition["arms"]:
            continue
        header, table = rows(condition)
        if condition["name"]:
            lines += ["", f"## {condition['name']}"]
        lines += ["", _line(header), _line(["---"] + ["---:"] * (len(header) - 1)), *map(_line, table)]
    return "\n".join([*lines, "", *notes(found)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def about(found: Mapping[str, Any]) -> list[str]:
    """What was run, a line each."""
    return [found["question"], "", *(f"- {name}: {value}" for name, value in facts(found).items())]


def facts(found: Mapping[str, Any]) -> dict[str, str]:
    """What was run, by what it is called."""
    data = "PHANTOM: generated images, no patients" if found["data"] == "phantom" else f"real {found['dataset']}"
    seeds = ", ".join(map(str, found["seeds"]))
    told = {
        "recipe": f"{found['recipe']}, preset {found['preset']}",
        "data": f"{data}, {found['test_images']} test images",
        "seeds": f"{len(found['seeds'])} ({seeds})",
        "steps": str(found["steps"]),
        "set": ", ".join(f"{name} {value}" for name, value in found["set"].items()),
        "version": f"{found['version']} ({found['commit'] or 'no commit'}), PyTorch {found['torch']}",
        "machine": found["machine"],
    }
    return {name: value for name, value in told.items() if value}


def notes(found: Mapping[str, Any]) -> list[str]:
    """How the table is to be read."""
    lines = [
        "In brackets: 95 % intervals; of scores over seeds (Student's t), of differences over seeds and test "
        "images, both taken as random (paired). A star: the corrected p value (Holm, over all tests of that score) "
        "is below 0.05; fewer than three seeds are not tested. The independent reader took no part in any of these "
        "trainings: it learned from clean training images. The interval of the mean cosine is over training steps.",
    ]
    if found["chosen"]:
        lines.append(
            "Chosen for each arm by validation images (the value at which the reader was right most often among those "
            "within 0.1 dB of the arm's best PSNR), with the same number of trials for each and a seed that is not in "
            f"the table: {'; '.join(f'{key}: {_plain(value)}' for key, value in found['chosen'].items())}."
        )
    else:
        lines.append("Nothing was chosen by looking at scores: every arm has the settings that its recipe states.")
    return [line for each in lines for line in (each, "")][:-1]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def comma_separated(found: Mapping[str, Any]) -> str:
    """``table.csv``: a row for each score of each run, to be read by programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["recipe", "data", "condition", "arm", "strategy", "seed", "score", "value"])
    for condition in found["conditions"]:
        for name, arm in condition["arms"].items():
            for key in columns_of(condition):
                if key in arm:
                    for seed, value in zip(arm["seeds"], arm[key]["values"], strict=True):
                        front = [found["recipe"], found["data"], condition["name"], name, arm["strategy"]]
                        writer.writerow([*front, seed, key, f"{value:.9g}"])
    return text.getvalue()


def verdict(found: Mapping[str, Any]) -> list[str]:
    """In plain words, a sentence each: what differs from what, by how much, and whether that is more than noise."""
    sentences = []
    for condition in found["conditions"]:
        where = f"{condition['name']}: " if condition["name"] else ""
        compared_with = {other for arm in condition["arms"].values() for other in arm["against"]}
        for name, arm in condition["arms"].items():
            # Where networks are compared and not strategies, all of them are trained alone.
            alone = arm["strategy"] == "ip-only" and name not in compared_with
            if alone or arm["strategy"] not in ("ip-only", "joint", "frozen"):
                sentences += [where + sentence for sentence in _sentences(name, arm["against"])]
        sentences += [where + sentence for sentence in _signal(condition)]
    return sentences


def _sentences(name: str, against: Mapping[str, Any]) -> Iterator[str]:
    """Of one arm, a sentence for each score: against which others there is a difference, and against which none."""
    for key, (more, less, of) in _WORDS.items():
        tests = {other: found[key] for other, found in against.items() if key in found}
        different, same, untested = [], [], []
        for other, test in tests.items():
            if test["low"] is None or test.get("p_corrected") is None:
                untested.append(f"{number(key, test['mean'], sign=True)}{_UNITS.get(key, '')} against {other}")
                continue
            unit = _UNITS.get(key, "")
            low, high, mean = (number(key, test[each], sign=True) for each in ("low", "high", "mean"))
            numbers = f"95 % CI {low} to {high}{unit}, p = {test['p_corrected']:.2g}"
            if test["p_corrected"] < LEVEL:
                size, relation = number(key, abs(test["mean"])), more if test["mean"] > 0 else less
                different.append(f"{size}{unit} {relation} {other} ({numbers})")
            else:
                same.append(f"{other} ({mean}{unit}, {numbers})")
        said = different + ([f"not distinguishable from {', '.join(same)}"] if same else [])
        said += [f"{', '.join(untested)}, not tested, as that takes three seeds"] if untested else []
        if said:
            test = next(iter(tests.values()))
            corrected = f"corrected for {test['comparisons']} comparisons; " if "comparisons" in test else ""
            yield f"{name}, {of}: {'; '.join(said)}. ({corrected}{_seeds(test['seeds'])})"


def _seeds(number: int) -> str:
    return f"{number} seed{'s' if number != 1 else ''}"


def _signal(condition: Mapping[str, Any]) -> Iterator[str]:
    """Whether the auxiliary's gradient is signal at all."""
    for name, arm in condition["arms"].items():
        if arm["strategy"] not in ("gradprom", "ip-only"):  # of ip-only, the losses of IP's own have gates
            continue
        for auxiliary, cosine in arm["cosine"].items():
            if cosine["low"] is None:
                continue
            of = f" of {auxiliary}" if auxiliary else ""
            lies = "above 0" if cosine["low"] > 0 else "below 0" if cosine["high"] < 0 else "not distinguishable from 0"
            yield (
                f"{name}: the mean cosine{of} is {cosine['mean']:+.4f} (95 % CI {cosine['low']:+.4f} to "
                f"{cosine['high']:+.4f} over {cosine['steps']} steps): {lies}."
            )
