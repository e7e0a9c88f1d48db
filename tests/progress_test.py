"""What a run says while it goes on, where nobody watches a terminal."""

import io

import pytest
from rich.console import Console

from swe_prune.training.progress import EVERY, Progress, duration


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def lines_of(advances, terminal=False):
    """The lines that a phase prints whose steps are reached at these seconds."""
    clock, file = Clock(), io.StringIO()
    progress = Progress(Console(file=file, force_terminal=terminal, width=60), clock)
    with progress.phase("training, seed 0", 5000) as advance:
        for seconds, step, known in advances:
            clock.now = 1000.0 + seconds
            advance(step, known)
    return file.getvalue()


def test_off_a_terminal_a_phase_prints_one_plain_line_every_half_minute():
    steps = [(seconds, 10 * seconds, {"loss": 4 - seconds / 100}) for seconds in range(1, 100)]
    assert lines_of(steps).splitlines() == [
        "training, seed 0: 300 of 5000, loss 3.700, 30 s",
        "training, seed 0: 600 of 5000, loss 3.400, 1 min 0 s",
        "training, seed 0: 900 of 5000, loss 3.100, 1 min 30 s",
    ]


def test_what_is_not_known_is_left_out_and_long_lines_are_not_wrapped():
    assert lines_of([(40, 3, {})]) == "training, seed 0: 3 of 5000, 40 s\n"
    known = {"loss": 2.5, "validation": 2.75, "tokens/s": 12345.6}
    (line,) = lines_of([(7300, 3, known)]).splitlines()
    shown = "loss 2.500, validation 2.750, 12,346 tokens/s"
    assert line == f"training, seed 0: 3 of 5000, {shown}, 2 h 1 min"


@pytest.mark.parametrize("terminal", [False, True])
def test_names_in_a_line_are_no_markup_and_no_control_characters(terminal):
    file = io.StringIO()
    progress = Progress(Console(file=file, force_terminal=terminal, width=20))
    progress.say("cell a[red]-2:4[/red] of seed 0: \x1b[2Jdone\nagain")
    assert file.getvalue() == "cell a[red]-2:4[/red] of seed 0: \\x1b[2Jdone\nagain\n"
    with progress.phase("cut [b]", 3):  # which ends before its bar is drawn again
        pass
    assert ("cut [b]" in file.getvalue()) == terminal


def test_a_short_phase_prints_nothing_and_a_terminal_no_plain_lines():
    assert lines_of([(EVERY - 1, 5000, {"loss": 1.0})]) == ""
    assert "5000, loss 1.000, 40 s" not in lines_of([(40, 3, {"loss": 1.0})], terminal=True)


def test_a_quiet_console_prints_nothing():
    clock = Clock()
    console = Console(file=io.StringIO(), quiet=True)
    with Progress(console, clock).phase("training", 5) as advance:
        clock.now += 2 * EVERY
        advance(3, {})
    assert console.file.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (90000, "25 h 0 min"),
    ],
)
def test_durations_roll_over(seconds, text):
    assert duration(seconds) == text
