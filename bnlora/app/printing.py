"""What all commands share: progress and errors on standard error, results on standard output."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import typer
from rich.console import Console
from rich.markup import escape

from bnlora.app.outcome import ExitCode, as_json
from bnlora.infer.svi.result import Fit, FitDiverged
from bnlora.models.hosts import HostLost


@contextmanager
def reporting() -> Iterator[Console]:
    """A console for progress. An error inside the block prints one sentence and exits with its exit code."""
    progress = Console(stderr=True)
    try:
        yield progress
    except KeyboardInterrupt as error:
        progress.print("interrupted")
        raise _exit(ExitCode.INTERRUPTED) from error
    except (ValueError, OSError, MemoryError) as error:
        progress.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        codes = {FitDiverged: ExitCode.DIVERGED, HostLost: ExitCode.LOST}
        raise _exit(codes.get(type(error), ExitCode.BAD_INPUT)) from error


def _exit(code: ExitCode) -> typer.Exit:
    """The end of a command; one of several processes ends here, for JAX would wait for the others."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    return typer.Exit(code)


def print_result(result: Mapping[str, Any], *shown: Any, json: bool) -> None:
    """Print to standard output: `result` as one JSON object, or the parts `shown` as text."""
    if json:
        typer.echo(as_json(result))
        return
    for part in shown:
        Console().print(part, highlight=False)


def exit_if_interrupted(*fits: Fit) -> None:
    """Exit with the code of an interrupt if one stopped a fit; call after the result is printed."""
    if any(fit.stopped == "interrupted" for fit in fits):
        raise typer.Exit(ExitCode.INTERRUPTED)


def write(path: Path, text: str) -> None:
    """Write a page."""
    path.write_text(text, encoding="utf-8")
