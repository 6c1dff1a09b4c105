"""Progress bars: shown on a terminal or in a notebook, silent elsewhere."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


def progress_bar(console: Console | None, *fields: str) -> Progress:
    """A bar with a description, a count, the named text fields and the time left.

    Args:
        console: Where to draw; nothing is drawn without one or where it is no terminal.
        *fields: Names of task fields to show as text.
    """
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()]
    columns += [TextColumn(f"{{task.fields[{name}]}}") for name in fields]
    shown = console is not None and (console.is_terminal or console.is_jupyter)
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown)


def track(items: Iterable[Item], total: int, label: str, console: Console | None) -> Iterator[Item]:
    """Yield `items` while a bar counts them."""
    with progress_bar(console) as bar:
        task = bar.add_task(label, total=total)
        for item in items:
            yield item
            bar.advance(task)
