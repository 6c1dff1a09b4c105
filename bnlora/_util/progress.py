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


def track(items: Iterable[Item], total: int, label: str, console: Console | None) -> Iterator[Item]:
    """Yield `items` while a bar counts them."""
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
