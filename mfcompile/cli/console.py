"""What the commands share of the terminal: results on stdout, messages and progress on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_WIDTH = 200
"""Width of tables where no terminal gives one: wide enough that parameter names are not cut."""

LINE_INTERVAL = 5.0
"""Seconds between two lines about the same stage where no terminal can redraw a bar."""

STAGES = {
    "load": "loading the model",
    "capture": "capturing the graph",
    "export": "exporting the graph",
    "regions": "finding the regions",
    "calibrate": "calibrating",
    "select": "selecting the masks",
    "update": "rewriting the kept weights",
    "apply": "applying the masks",
    "evaluate": "evaluating",
    "onnx": "writing the ONNX file",
    "verify": "comparing the file with the model",
    "latency": "measuring latency",
    "variants": "writing the forms of the model",
    "cost": "measuring memory and loading",
    "write": "writing the artefacts",
}
"""Stage -> what is being done, for people; a stage that is not listed is shown by its own name."""


class Terminal:
    """The two consoles of a command.

    Attributes:
        out: results and tables, on stdout.
        err: messages and progress, on stderr.
    """

    def __init__(self) -> None:
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)

    def say(self, text: str) -> None:
        """One line on stdout, never cut or wrapped."""
        self.out.print(text, markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """One line on stderr."""
        self.err.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One warning on stderr."""
        self.err.print(Text.assemble(("warning: ", "bold yellow"), text), highlight=False, soft_wrap=True)

    def fail(self, text: str) -> None:
        """One error message on stderr."""
        self.err.print(Text.assemble(("error: ", "bold red"), text), highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self) -> Iterator[StageProgress]:
        """A report of progress on stderr: bars on a terminal, lines elsewhere."""
        if self.err.is_terminal:
            with _bars(self.err) as bars:
                stages: StageProgress = BarProgress(bars)
                yield stages
                stages.finish()
        else:
            stages = LineProgress(self)
            yield stages
            stages.finish()


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=PLAIN_WIDTH)


class StageProgress:
    """Called with the stage, how much of it is done, and of how much (None while that is not known).

    It is what ``compile_pruned`` takes as ``progress``.
    """

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Show that ``done`` of ``total`` steps of a stage are done."""
        raise NotImplementedError

    def finish(self) -> None:
        """Close the last stage."""
        raise NotImplementedError

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage without steps to count."""
        self(name, 0, None)
        yield
        self(name, 1, 1)
        self.finish()


class BarProgress(StageProgress):
    """One bar per stage, with counts and the time left."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._current: str | None = None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """See StageProgress."""
        if stage != self._current:
            self.finish()
            self._current = stage
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(STAGES.get(stage, stage), total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def finish(self) -> None:
        """See StageProgress."""
        if self._current is not None:
            task = self._tasks[self._current]
            steps = max(1, int(next(item.completed for item in self._bars.tasks if item.id == task)))
            self._bars.update(task, completed=steps, total=steps)
            self._current = None


class LineProgress(StageProgress):
    """One line when a stage begins, one every few seconds while it lasts, one with its count and time at the end."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._current: str | None = None
        self._began = self._told = 0.0
        self._done, self._total = 0, None

    _total: int | None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """See StageProgress."""
        now = time.monotonic()
        if stage != self._current:
            self.finish()
            self._current, self._began, self._told = stage, now, now
            self._terminal.note(f"{STAGES.get(stage, stage)} …")
        self._done, self._total = done, total
        if now - self._told >= LINE_INTERVAL and done and done != total:
            self._told = now
            left = f", {_seconds((now - self._began) * (total - done) / done)} left" if total else ""
            self._terminal.note(f"  {self._count()}{left}")

    def finish(self) -> None:
        """See StageProgress."""
        if self._current is not None:
            count = f"{self._count()}, " if self._done > 1 else ""
            self._terminal.note(f"  {count}{_seconds(time.monotonic() - self._began)}")
            self._current = None

    def _count(self) -> str:
        return f"{self._done} of {self._total}" if self._total else f"{self._done}"


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
