"""What a person sees while a run trains."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import RunError
from train.strategies.base import Measure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

    from train.training.step_log import Row
    from train.training.validation import Look

LINES_PER_PHASE = 20


class Display:
    """A progress bar on a terminal; elsewhere about twenty plain lines per phase.

    :param console: where it is shown.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.batch_size = 1
        self.measures: tuple[Measure, ...] = ()
        self.events: Path | None = None
        self._writing: SummaryWriter | None = None

    def begin(self, measures: Sequence[Measure], *, batch_size: int, events: Path | None = None) -> None:
        """Tells what the run that follows is like.

        :param measures: of its strategy.
        :param batch_size: images per step.
        :param events: a folder for TensorBoard events as well; only where :func:`summary_writer` has found it.
        """
        self.measures = tuple(measures)
        self.batch_size = batch_size
        self.events = events

    def say(self, text: Any) -> None:
        """Shows a text whole, however narrow the terminal is.

        :param text: a string, or something that rich renders.
        """
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def announce(self, text: str) -> None:
        """Says that something takes minutes, which a person would otherwise take for a standstill."""
        self.say(text)

    def warn(self, text: str) -> None:
        """Says what a person should know who sees nothing else of a training."""
        self.announce(f"Warning: {text}")

    @contextlib.contextmanager
    def phase(self, title: str, done: int, steps: int, *, before: int = 0) -> Iterator[Callable[[int, Row], None]]:
        """
        :param title: what is going on ("training").
        :param done: steps of the phase that an earlier process has done.
        :param steps: steps of the phase in all.
        :param before: steps of the phases before this one; TensorBoard counts as ``steps.csv`` does.
        :returns: a function to be told, now and then, how many steps are done, and the means of what was measured.
        """
        begun = time.monotonic()
        first, said = done, done

        def tell(done: int, row: Row) -> None:
            nonlocal said
            rate = (done - first) / max(time.monotonic() - begun, 1e-9)
            told = f"{measured(row, self.measures)}  {rate * self.batch_size:.0f} images/s"
            if events is not None:
                for name, value in row.items():
                    if math.isfinite(value):  # NaN: nothing was measured since the last look
                        events.add_scalar(f"{title}/{name}", value, before + done)
            if bar is not None:
                bar.update(task, completed=done, told=told)
            elif done - said >= steps / LINES_PER_PHASE or done == steps:
                said = done
                left = timedelta(seconds=round((steps - done) / rate))
                self.say(f"{title}: step {done}/{steps}  {told}  {left} left")

        with self._bar() as bar, self._writer(before + done) as events:
            if bar is not None:
                task = bar.add_task(title, total=steps, completed=done, told="")
            self._writing = events
            try:
                yield tell
            finally:
                self._writing = None

    def validated(self, measure: Measure, look: Look, *, best: bool) -> None:
        """Tells what a look at the validation images has found, within a phase.

        :param measure: what was found.
        :param best: whether it is the best so far.
        """
        when = f"after epoch {look.epoch:g} (step {look.step})"
        if math.isnan(look.score):
            self.warn(
                f"{when} the {measure.word} of the validation images is not a number: the networks as they are now are "
                "worth nothing, and are not taken for the best"
            )
            return
        self.say(f"validation {when}: {measure.word} {measure.form.format(look.score)}{', the best so far' * best}")
        if self._writing is not None:
            self._writing.add_scalar(f"validation/{measure.name}", look.score, look.step)

    def _bar(self) -> contextlib.AbstractContextManager[Progress | None]:
        if not self.console.is_terminal:
            return contextlib.nullcontext()
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        whole = partial(Column, no_wrap=True)
        return Progress(
            TextColumn("{task.description}", style="bold", markup=False, table_column=whole()),
            BarColumn(bar_width=20, table_column=whole()),
            MofNCompleteColumn(table_column=whole()),
            # The one that takes more lines where the terminal is narrow; columns are cut off otherwise.
            TextColumn("{task.fields[told]}", markup=False, table_column=Column()),
            TimeRemainingColumn(table_column=whole()),
            console=self.console,
        )

    def _writer(self, done: int) -> contextlib.AbstractContextManager[SummaryWriter | None]:
        """
        :param done: steps; what a process that was interrupted has written of later ones is forgotten.
        """
        if self.events is None:
            return contextlib.nullcontext()
        return summary_writer()(str(self.events), purge_step=done + 1)


def measured(row: Row, measures: Sequence[Measure]) -> str:
    """The part of a row that fits into a line; a dash where nothing finite was measured (all steps were skipped, say).

    >>> from train.strategies.base import LOSS, PSNR, GATE, SKIPPED
    >>> measured({"loss": 0.00123, "psnr": 29.1, "gate": 0.5, "skipped": 0}, [LOSS, PSNR, GATE, SKIPPED])
    'loss 0.0012  PSNR 29.10 dB  gate 50%'
    """
    return "  ".join(
        f"{each.word} {each.form.format(row[each.name]) if math.isfinite(row[each.name]) else '-'}"
        for each in measures
        if each.word and each.name in row
    )


def summary_writer() -> type[SummaryWriter]:
    """TensorBoard's writer.

    :raises RunError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError(
            f"--tensorboard needs TensorBoard, which is not there ({error}): pip install tensorboard"
        ) from error
    return SummaryWriter


class Brief(Display):
    """For a run among many: progress bars on a terminal, and what is announced."""

    def say(self, text: Any) -> None:
        pass

    def announce(self, text: str) -> None:
        super().say(text)
