"""Warns of what makes a long training worthless without making it fail: an auxiliary that drowns the main loss, a gate
that decides nothing, steps that are not taken."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from train.strategies.base import AUX_NORM, GATE, MAIN_NORM, SKIPPED, Strategy, column
from train.training.step_log import Row

WINDOW = 100
"""Successive steps that were taken which a sentence about a gate is about: a gate that is open (or closed) in one of 30
is taken for one that never is, in error, with a probability of 3 %; shorter trainings are not judged."""
DWARFS = 10.0
"""How many times as long as the main gradient an auxiliary one is, weighted, where theta goes its way and no other."""
OFTEN = 0.05
"""Share of the steps that may be skipped."""
IN_A_ROW = 20
"""Steps that may be skipped in succession: float16's scale, which begins at 65,536, is below 1 by then."""


class _Seen(NamedTuple):
    """What was measured of an auxiliary at a step that was taken.

    :param gate: weight before lambda.
    :param main: length of the main gradient.
    :param aux: and of the auxiliary one.
    """

    step: float
    gate: float
    main: float
    aux: float


class Watch:
    """Looks at the measurements of a run, and says each thing once.

    Gates that decide nothing by design (``always``, ``never``, ``project``, those of published methods) are not judged
    by how often they are open, auxiliaries without a weight not at all, and where the user has capped an auxiliary, its
    length is what the user wants. Phases without a gate have no such columns, and steps that were skipped say nothing
    of gradients. After an interruption the windows begin anew.

    :param strategy: tells the auxiliaries, and which settings a person can change.
    :param gate: what IP's optimizer was told (:func:`train.training.build.gate_of`).
    """

    def __init__(self, strategy: Strategy, gate: Mapping[str, Any]) -> None:
        self._strategy = strategy
        self._gate = gate
        names = strategy.advising if strategy.trains_ip else ()
        weight = gate.get("aux_weight", 1.0)
        weights = weight if isinstance(weight, tuple) else (weight,) * len(names)
        self._weights = {name: own for name, own in zip(names, weights, strict=True) if own}
        self._seen: dict[str, deque[_Seen]] = {name: deque(maxlen=WINDOW) for name in self._weights}
        self._skips: deque[bool] = deque(maxlen=WINDOW)
        self._in_a_row = 0
        self._moved = False
        self._said: set[tuple[str, str]] = set()

    def look(self, rows: Sequence[Row]) -> list[str]:
        """
        :param rows: of the steps since the last look.
        :returns: what is worth a warning now, and was not said before.
        """
        found: list[str] = []
        for row in rows:
            if SKIPPED.name in row:
                found += self._look_at_skips(row)
            if not row.get(SKIPPED.name):
                for name in self._seen:
                    found += self._look_at_gate(name, row)
        return found

    def _once(self, kind: str, name: str, text: str) -> list[str]:
        if (kind, name) in self._said:
            return []
        self._said.add((kind, name))
        return [text]

    # --- skipped steps ---

    def _look_at_skips(self, row: Row) -> list[str]:
        skipped = bool(row[SKIPPED.name])
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        self._moved |= not skipped
        # Before the first step that is taken, float16 is still looking for its scale.
        if self._moved:
            self._skips.append(skipped)
        number = sum(self._skips)
        if self._in_a_row == IN_A_ROW:
            what = f"the last {IN_A_ROW} steps, up to step {row['step']:.0f}, were skipped: in each a gradient"
        elif len(self._skips) == WINDOW and number > OFTEN * WINDOW:
            what = (
                f"{number} of the last {WINDOW} steps, up to step {row['step']:.0f}, were skipped: in each a gradient"
            )
        else:
            return []
        return self._once("skips", "", f"{what} was not finite, and nothing was learned. {self._against_skips()}")

    def _against_skips(self) -> str:
        rates = "--lr or --vr-lr" if self._strategy.trains_ip else "--vr-lr"
        if self._strategy.terms.precision == "fp16":
            return f"Give --precision bf16 or fp32, whose numbers are as large as they need to be, or a lower {rates}"
        weight = " or --aux-weight" if "aux_weight" in self._strategy.settings else ""
        return f"The step log shows whether a loss went first; give a lower {rates}{weight}, and look at the images"

    # --- gates ---

    def _look_at_gate(self, name: str, row: Row) -> list[str]:
        gate, aux = (column(each.name, name, self._strategy.among) for each in (GATE, AUX_NORM))
        if gate not in row:
            return []
        seen = self._seen[name]
        seen.append(_Seen(row["step"], row[gate], row[MAIN_NORM.name], row[aux]))
        if len(seen) < WINDOW:
            return []
        last = f"in the last {WINDOW} steps ({seen[0].step:.0f} to {seen[-1].step:.0f})"
        silent = sum(each.aux == 0 for each in seen)
        if silent > WINDOW / 2:
            return self._once("silent", name, f"{last} the gradient of {name} was zero {silent} times: {self._silence}")
        return self._dwarfing(name, last) + self._deciding(name, last)

    @property
    def _silence(self) -> str:
        return (
            "IP learns nothing from it. Are its labels known, is its loss down to zero already, or is what it looks at "
            "independent of IP?"
        )

    def _dwarfing(self, name: str, last: str) -> list[str]:
        if not isinstance(self._gate.get("gate"), str) or "aux_cap" in self._gate:
            return []
        weight = self._weights[name]
        ratios = [each.gate * weight * each.aux / each.main for each in self._seen[name] if each.gate and each.main]
        if len(ratios) < WINDOW / 4 or (ratio := median(ratios)) <= DWARFS:
            return []
        steps = "" if len(ratios) == WINDOW else f" of the {len(ratios)} with an open gate"
        ways = ["--aux-cap 1" if self._has("aux_cap") else "--strategy gradprom-capped"]
        ways += ["a lower --aux-weight"] if self._has("aux_weight") else []
        return self._once(
            "dwarfs",
            name,
            f"{last} the gradient of {name}, times its weight {weight:g}, was {ratio:.3g} times as long as that of "
            f"IP's own loss (the median{steps}): IP follows {name} alone. {self._advice(name, ways)}",
        )

    def _deciding(self, name: str, last: str) -> list[str]:
        kind, threshold = self._gate.get("gate"), self._gate.get("threshold", 0.0)
        if kind not in ("hard", "soft"):
            return []
        gates, guided = [each.gate for each in self._seen[name]], self._strategy.guided
        if not any(gates):
            ways = ["a lower --threshold"] if self._has("threshold") else []
            if self._has("vr_start") and self._strategy.terms.vr_start != "clean":
                ways.append("--vr-start clean, so that VR knows its task before it advises")
            ways.append(f"--strategy {'hqg-only' if guided else 'ip-only'}, which costs less")
            return self._once(
                "never opens",
                name,
                f"{last} the gate of {name} never opened: its gradient points away from that of IP's own loss each "
                f"time, and takes no part. {self._advice(name, ways)}",
            )
        # With a gate for each tensor the log has their mean, which of soft gates does not say whether any is closed.
        if kind == "soft" and self._gate.get("granularity") == "tensor":
            return []
        if threshold <= -1 or not all(gate == 1 if kind == "hard" else gate for gate in gates):
            return []
        ways = ["a higher --threshold"] if self._has("threshold") else []
        if kind == "hard":
            ways.append("--gate always" if guided else "--strategy joint")
        return self._once(
            "never closes",
            name,
            f"{last} the gate of {name} never closed: so far there was nothing that it protects IP from, and no harm "
            f"in that. Where you expect conflicts: {self._advice(name, ways, always=', which is the same then')}",
        )

    def _has(self, setting: str) -> bool:
        return setting in self._strategy.settings

    def _advice(self, name: str, ways: Sequence[str], *, always: str = "") -> str:
        if name in self._strategy.ip_aux:
            # Its weight is its network's, and the strategies with other gates are about VR.
            ways = [way for way in ways if not way.startswith(("--strategy", "--vr-start", "a lower --aux-weight"))]
            ways = [*ways, f"leave {name} out of --ip-aux"]
            return f"Give {', or '.join(ways)}" if len(ways) > 1 else f"You may {ways[0]}"
        return f"Give {', or '.join(ways)}{always}"
