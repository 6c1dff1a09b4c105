"""Progress bars, which appear only on a terminal or in a notebook, and timing of the parts of a job."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


def speaker(console: Console | None) -> Console:
    """The console for output: `console`, else rich's own on a terminal or in a notebook, else a quiet one."""
    if console is not None:
        return console
    own = get_console()
    return own if own.is_terminal or own.is_jupyter else Console(quiet=True)


def progress_bar(console: Console | None, *fields: str) -> Progress:
    """A bar with a description, a count, the named text fields and the time left.

    Args:
        console: Console for the bar (see `speaker`); without a terminal or notebook there is no bar.
        *fields: Names of task fields to show as text.
    """
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()]
    columns += [TextColumn(f"{{task.fields[{name}]}}") for name in fields]
    console = speaker(console)
    shown = not console.quiet and (console.is_terminal or console.is_jupyter)
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown)


class OneBar(Console):
    """A mute console that turns the bars of the parts of a job into one, with the time left for all of them.

    Args:
        console: Where to draw the bar (see `speaker`).
        work: Work of the whole job, in a unit that all parts share.
    """

    def __init__(self, console: Console | None, work: int):
        super().__init__(quiet=True)
        self.bar = progress_bar(console)
        self.task = self.bar.add_task("start", total=work)
        self.work = 0

    def show(self, label: str) -> None:
        """Show what is being computed."""
        self.bar.update(self.task, description=label, refresh=True)

    @contextmanager
    def part(self, label: str, work: int) -> Iterator[None]:
        """Show the label, and let what is tracked inside count as this much work."""
        self.show(label)
        self.work, done = work, self.bar.tasks[0].completed
        yield
        self.bar.update(self.task, completed=done + work)
        self.work = 0  # what is tracked outside of a part is no work

    def more(self, work: int) -> None:
        """Add work that was not foreseen."""
        self.bar.update(self.task, total=(self.bar.tasks[0].total or 0) + work)

    def count(self, items: Iterable[Item], total: int) -> Iterator[Item]:
        """Yield `items`, which together are the work of the present part."""
        for item in items:
            yield item
            self.bar.advance(self.task, self.work / total)


def track(items: Iterable[Item], total: int, label: str, console: Console | None) -> Iterator[Item]:
    """Yield `items` while a bar counts them."""
    if isinstance(console, OneBar):
        yield from console.count(items, total)
        return
    with progress_bar(console) as bar:
        task = bar.add_task(label, total=total)
        for item in items:
            yield item
            bar.advance(task)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Record the seconds that a part of a job takes."""
    began = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - began
