"""What was measured: the bytes a step must move, and from samples to results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .timing import quartiles, ratios

#: Measured with the contestants of the optimizer step, printed above them.
YARDSTICKS = ("memory", "reads", "copy", "host")
#: The contestant that every training step is compared with, and the overhead over it that is wanted at most.
FLOOR, WANTED_OVERHEAD = "two backwards", 2.0

#: Share of a median that its middle half may be wide; beyond it the figure says more about what else the machine did
#: than about the contestant. Where :mod:`torch.utils.benchmark` warns that measurements are "highly variable".
WIDEST = 0.25

# ----------------------------------------------------------------------------------------------------------------------
# Spread


def doubt(samples: Sequence[float], what: str, least: float = 0.0) -> str | None:
    """Why the median of ``samples`` should not be believed; ``None`` where it may be.

    :param what: the samples are, in the plural.
    :param least: a middle half that is no wider than this is fine, whatever the median.

    >>> doubt([1.0, 72.0, 140.0], "ratios")
    'the middle half of 3 ratios is 36.50 .. 106.00, wider than 25 % of their median 72.00'
    >>> doubt([2.9, 3.0, 3.1], "ratios"), doubt([0.9, 1.0, 2.0], "percent", least=2.0)
    (None, None)
    """
    low, median, high = quartiles(samples)
    if high - low <= max(least, WIDEST * abs(median)) * (1 + 1e-9):  # rounding is no spread
        return None
    limit = f"{100 * WIDEST:.0f} % of their median {median:.2f}" + (f" and than {least:g}" if least else "")
    return f"the middle half of {len(samples)} {what} is {low:.2f} .. {high:.2f}, wider than {limit}"


def _doubts(**samples: tuple[Sequence[float], str, float]) -> dict[str, str]:
    """:func:`doubt` of each field that there are samples of."""
    found = {field: doubt(*arguments) for field, arguments in samples.items() if arguments[0]}
    return {field: reason for field, reason in found.items() if reason is not None}


# ----------------------------------------------------------------------------------------------------------------------
# Bytes


def bytes_per_parameter(optimizer: str, precision: str, on_chip: bool) -> int:
    """What a step must move for one parameter, with one auxiliary gradient.

    Two gradients are read, and read again for the update unless they stay ``on_chip``; the parameter is read and
    written, and so are AdamW's two moments. With ``bf16`` gradients and parameters the float32 master is read and
    written in the parameter's place, which is only written.

    >>> [bytes_per_parameter(o, "fp32", c) for o in ("sgd", "adamw") for c in (True, False)]
    [16, 24, 32, 40]
    """
    gradients = 2 * _GRADIENT_BYTES[precision] * (1 if on_chip else 2)
    parameter = 8 if precision == "fp32" else 8 + 2
    return gradients + parameter + (16 if optimizer == "adamw" else 0)


def bytes_read(optimizer: str, precision: str) -> int:
    """Those of :func:`bytes_per_parameter` that are read, with gradients that do not stay on chip."""
    written = (4 if precision == "fp32" else 4 + 2) + (8 if optimizer == "adamw" else 0)
    return bytes_per_parameter(optimizer, precision, on_chip=False) - written


_GRADIENT_BYTES = {"fp32": 4, "bf16": 2}


# ----------------------------------------------------------------------------------------------------------------------
# Results


@dataclass
class UpdateResult:
    """One contestant's optimizer step at one size."""

    network: str
    parameters: int
    tensors: int
    optimizer: str
    contestant: str
    median_ms: float  #: on a GPU: of the device
    low_ms: float  #: first quartile
    high_ms: float  #: third quartile
    floor_ms: float  #: bytes a step must move / measured bandwidth
    over_floor: float  #: median over rounds of time / floor in the same round
    speed_up: float  #: median over rounds of contestant's time / fastest GradProm's time
    samples_ms: list[float] = field(repr=False, default_factory=list)
    precision: str = "fp32"
    on_chip: bool = False  #: the floor supposes that the gradients are read once
    input_sets: int = 1  #: that the contestant took turns over
    timed: str = "clock"  #: on a CPU; on a GPU "queue", "graph" or "eager" (gradprom_ext/bench/__init__.py)
    host_us: float | None = None  #: microseconds to queue a step
    host_samples_us: list[float] = field(repr=False, default_factory=list)
    unreliable: dict[str, str] = field(
        default_factory=dict
    )  #: names of fields above, and why each is not to be believed

    @property
    def bytes(self) -> int:
        """That a step must move for one parameter."""
        return bytes_per_parameter(self.optimizer, self.precision, self.on_chip)


@dataclass
class StepResult:
    """One contestant's whole training step."""

    network: str
    parameters: int  #: of IP
    vr_parameters: int
    optimizer: str
    variant: str
    batch: int
    size: int
    contestant: str
    median_ms: float
    low_ms: float  #: first quartile
    high_ms: float  #: third quartile
    overhead_percent: float  #: median over rounds of time / the floor's time in the same round, - 1
    overhead_low_percent: float  #: first quartile
    overhead_high_percent: float  #: third quartile
    update_ms: float | None  #: of which the update of IP; unknown inside a CUDA graph
    update_overhead_percent: float | None  #: median over rounds of (update - the floor's update) / the floor's time
    samples_ms: list[float] = field(repr=False, default_factory=list)
    update_samples_ms: list[float] = field(repr=False, default_factory=list)
    unreliable: dict[str, str] = field(
        default_factory=dict
    )  #: names of fields above, and why each is not to be believed


@dataclass
class WarmResult:
    """One contestant's warm step with so many threads."""

    network: str
    parameters: int
    tensors: int
    optimizer: str
    contestant: str
    is_host: bool  #: on tensors of one element each: all that is not work on the elements
    threads: int
    least_us: float  #: of all samples; whatever else the machine does only adds to a step
    low_us: float  #: first quartile
    median_us: float
    samples_us: list[float] = field(repr=False, default_factory=list)


Result = UpdateResult | StepResult | WarmResult


def update_results(
    common: Mapping[str, Any],
    samples: Mapping[str, Sequence[float]],
    *,
    fused: str,
    yardstick: str,
    moved: float,
    timed: Mapping[str, str] | None = None,
    input_sets: Mapping[str, int] | None = None,
    host: Mapping[str, Sequence[float]] | None = None,
) -> list[UpdateResult]:
    """Results of one case.

    :param common: the fields that all contestants share.
    :param samples: seconds of a step, of every contestant and yardstick in every round.
    :param fused: the contestant that the others are compared with.
    :param yardstick: the one whose bandwidth makes the floor; ``moved`` are the bytes it moves.
    :param timed, input_sets, host: by contestant, where they are not the defaults; ``host`` in seconds.
    """
    needed = common["parameters"] * bytes_per_parameter(
        common["optimizer"], common.get("precision", "fp32"), common.get("on_chip", False)
    )
    floors = [t * needed / moved for t in samples[yardstick]]
    results = []
    for name, times in samples.items():
        low, median, high = quartiles(times)
        queued = (host or {}).get(name, [])
        over_floor, speed_up = ratios(times, floors), ratios(times, samples[fused])
        results.append(
            UpdateResult(
                **common,
                contestant=name,
                median_ms=median * 1e3,
                low_ms=low * 1e3,
                high_ms=high * 1e3,
                floor_ms=statistics.median(floors) * 1e3,
                over_floor=statistics.median(over_floor),
                speed_up=statistics.median(speed_up),
                samples_ms=_rounded(times, 1e3),
                timed=(timed or {}).get(name, "clock"),
                input_sets=(input_sets or {}).get(name, 1),
                host_us=statistics.median(queued) * 1e6 if queued else None,
                host_samples_us=_rounded(queued, 1e6),
                unreliable=_doubts(
                    over_floor=(over_floor, "ratios", 0.0),
                    speed_up=(speed_up, "ratios", 0.0),
                    host_us=(_rounded(queued, 1e6), "times", 0.0),
                ),
            )
        )
    return results


def step_results(common: Mapping[str, Any], samples: Mapping[str, Sequence[Sequence[float]]]) -> list[StepResult]:
    """Results of one setting.

    :param common: the fields that all contestants share.
    :param samples: per contestant and round the seconds of the step's parts: forward and backward, update of IP, the
        rest; or one number, the whole step.
    """
    totals = {name: [sum(parts) for parts in rounds] for name, rounds in samples.items()}
    updates = {name: [parts[1] for parts in rounds if len(parts) > 1] for name, rounds in samples.items()}
    results = []
    for name, times in totals.items():
        low, median, high = quartiles(times)
        overheads = [100 * (r - 1) for r in ratios(times, totals[FLOOR])]
        overhead = quartiles(overheads)
        update = updates[name]
        both = zip(update, updates[FLOOR], totals[FLOOR], strict=True) if update else ()
        more = [100 * (u - f) / t for u, f, t in both]
        results.append(
            StepResult(
                **common,
                contestant=name,
                median_ms=median * 1e3,
                low_ms=low * 1e3,
                high_ms=high * 1e3,
                overhead_percent=overhead[1],
                overhead_low_percent=overhead[0],
                overhead_high_percent=overhead[2],
                update_ms=statistics.median(update) * 1e3 if update else None,
                update_overhead_percent=statistics.median(more) if more else None,
                samples_ms=_rounded(times, 1e3),
                update_samples_ms=_rounded(update, 1e3),
                unreliable=_doubts(
                    overhead_percent=(overheads, "overheads in percent", WANTED_OVERHEAD),
                    update_overhead_percent=(more, "overheads in percent", WANTED_OVERHEAD),
                ),
            )
        )
    return results


#: A contestant's name, whether its tensors are of one element each, and its threads.
Place = tuple[str, bool, int]


def warm_results(
    network: str,
    parameters: int,
    tensors: int,
    optimizer: str,
    samples: Mapping[Place, Sequence[float]],
) -> list[WarmResult]:
    """Results of one case.

    :param samples: seconds of a step.
    """
    results = []
    for (contestant, is_host, threads), times in samples.items():
        low, median, _ = quartiles(times)
        results.append(
            WarmResult(
                network,
                parameters,
                tensors,
                optimizer,
                contestant,
                is_host,
                threads,
                least_us=min(times) * 1e6,
                low_us=low * 1e6,
                median_us=median * 1e6,
                samples_us=_rounded(times, 1e6),
            )
        )
    return results


def _rounded(seconds: Sequence[float], unit: float) -> list[float]:
    return [round(t * unit, 6) for t in seconds]
