"""Progress: bars on a terminal, lines elsewhere; counts and time left in both."""

import io

import pytest
from rich.console import Console

from mfcompile.cli.console import BarProgress, LineProgress, Terminal, _bars


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("mfcompile.cli.console.time.monotonic", lambda: now[0])
    return now


def test_lines_tell_stage_count_and_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = LineProgress(Terminal())
    for done in range(1, 13):
        clock[0] += 1.0
        progress("calibrate", done, 12)
    progress("select", 0, None)
    clock[0] += 2.5
    progress.finish()
    assert capsys.readouterr().err.splitlines() == [
        "calibrating …",
        "  6 of 12, 5.0 s left",
        "  11 of 12, 0.9 s left",
        "  12 of 12, 11.0 s",
        "selecting the masks …",
        "  2.5 s",
    ]


def test_a_total_that_is_not_known_is_not_invented(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = LineProgress(Terminal())
    progress("calibrate", 1, None)
    clock[0] += 100.0
    progress("calibrate", 7, None)
    progress.finish()
    assert capsys.readouterr().err.splitlines() == ["calibrating …", "  7", "  7, 1 min 40 s"]


def test_stage_without_steps(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = LineProgress(Terminal())
    with progress.stage("something new"):
        clock[0] += 1.0
    progress.finish()
    assert capsys.readouterr().err.splitlines() == ["something new …", "  1.0 s"]


def test_bars_close_every_stage() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    with _bars(screen) as bars:
        progress = BarProgress(bars)
        progress("calibrate", 3, None)
        progress("select", 5, 10)
        progress("select", 10, 10)
        progress.finish()
        assert [(task.completed, task.total) for task in bars.tasks] == [(3, 3), (10, 10)]
        assert all(task.finished for task in bars.tasks)


def test_results_and_messages_go_to_their_own_streams(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.say("a result " * 40)
    terminal.note("a note")
    terminal.warn("a danger [0:4]")
    captured = capsys.readouterr()
    assert captured.out == "a result " * 40 + "\n"
    assert captured.err == "a note\nwarning: a danger [0:4]\n"
