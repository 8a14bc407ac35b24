"""Progress on a terminal, and as plain lines where there is none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from localstack.cache import Progress, Silent


class Lines:
    """One line per step, for logs: what only counts on is told at its start and end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, str] = {}
        self._lock = threading.Lock()

    def step(self, name: str, text: str, done: int = 0, total: int = 0) -> None:
        with self._lock:
            if self._last.get(name) == text or (total and 1 < done < total):
                return
            self._last[name] = text
            counted = f" ({done} of {total})" if total else ""
            self._console.print(f"{name}: {text}{counted}", markup=False, highlight=False)


class Live:
    """One moving line per name."""

    def __init__(self, display: RichProgress) -> None:
        self._display = display
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def step(self, name: str, text: str, done: int = 0, total: int = 0) -> None:
        with self._lock:
            task = self._tasks.get(name)
            if task is None:
                task = self._tasks[name] = self._display.add_task(name, total=None, text="")
            finished = text == "ready"
            self._display.update(task, text=text, completed=1 if finished else done, total=1 if finished else total or None)


@contextmanager
def shown(progress: bool | Progress) -> Iterator[Progress]:
    """A Progress to use within the block: the one given, one on standard error for True, a silent one for False."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield Silent()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description:<10}"),
        TextColumn("{task.fields[text]}"),
        BarColumn(20),
        TimeElapsedColumn(),
    )
    with RichProgress(*columns, console=console, transient=True) as display:
        yield Live(display)
