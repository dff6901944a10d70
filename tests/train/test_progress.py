from __future__ import annotations

import io
import os
import signal

import pytest
from rich.console import Console

from train.interruption import stop_on_signal
from train.strategies.auxiliary import Diagnosis
from train.strategies.base import AUX_LOSS, advised_measures
from train.training.progress import LINES_PER_PHASE, Display, measured

MEASURES = advised_measures([("dia", Diagnosis.measures)])

ROW = {"loss": 0.00123, "psnr": 29.1, "aux_loss": 0.69, "cosine": -0.2, "gate": 0.5, "skipped": 0.0}
TOLD = ("loss 0.0012", "PSNR 29.10 dB", "cosine -0.20", "gate 50%")


def shown(terminal: bool) -> str:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=terminal, width=200))
    display.begin(MEASURES, batch_size=4)
    with display.phase("training", done=100, steps=1100) as tell:
        for done in range(110, 1101, 10):
            tell(done, ROW)
    return out.getvalue()


def test_without_a_terminal_there_are_few_whole_lines():
    lines = shown(terminal=False).splitlines()
    assert 0.5 * LINES_PER_PHASE <= len(lines) <= LINES_PER_PHASE
    assert lines[-1].startswith("training: step 1100/1100")
    assert all("\x1b" not in line and all(part in line for part in (*TOLD, "images/s", "left")) for line in lines)


def test_on_a_terminal_there_is_a_bar():
    text = shown(terminal=True)
    assert "\x1b" in text and "1100/1100" in text and all(part in text for part in (*TOLD, "images/s"))


def test_a_narrow_terminal_cuts_nothing_off():
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=80, color_system=None))
    display.begin(MEASURES, batch_size=4)
    with display.phase("training", done=0, steps=424) as tell:
        tell(100, ROW)
    text = out.getvalue().replace("\x1b[2K", " ")  # erases the line
    words = {word for part in TOLD for word in part.split()}
    assert "…" not in text and "100/424" in text and words | {"training", "images/s"} <= set(text.split())


def test_only_what_was_measured_is_shown():
    assert measured({"aux_loss": 0.5}, MEASURES) == measured({"aux_loss": 0.5}, [AUX_LOSS]) == "VR loss 0.50"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_insists(number):
    def second(*_):
        raise KeyboardInterrupt

    usual = signal.signal(number, second)
    try:
        with stop_on_signal() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is second
    finally:
        signal.signal(number, usual)
