"""`bnlora monitor`: alarms about a deployed classifier from its log of predictions.

The command reads a log once, piece by piece. With `--state` it goes on tomorrow: the log then has new rows
only, and a log that was read before is refused.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer

from bnlora._util.files import file_checksum, room_for
from bnlora.app import options
from bnlora.app.kept import exit_if_elsewhere, keep
from bnlora.app.logs import Log, LogFormat, LogPiece
from bnlora.app.outcome import ExitCode
from bnlora.app.printing import print_result, reporting, write
from bnlora.app.report import page
from bnlora.assess.monitor import Logged, Monitor, Observed, load_monitor, read_notes, save_monitor
from bnlora.assess.monitor.tables import means
from bnlora.data.formats import ENCODING

REMEMBERED = 1000
"""Logs that a state remembers, so that none is read twice."""

_START = {"alpha": 0.05, "floor": None, "tolerance": 0.0}


class Reference(NamedTuple):
    """Rows like those that are expected.

    Attributes:
        path: Their file.
        classes: Names of the classes.
        read: Gives their prediction, and their labels or None.
    """

    path: Path
    classes: tuple[str, ...]
    read: Callable[[], tuple[Observed, Any]]


def monitor(
    log: Annotated[
        Path, typer.Argument(help="Table that `bnlora predict` wrote, with new rows.", show_default=False)
    ],
    reference: Annotated[
        Path | None,
        typer.Option(help="Log of rows like those that are expected; at least 30.", show_default=False),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="JSON file of the monitor; read if it exists, and written.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write an HTML page with a chart.", show_default=False)
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Column of the labels; an empty cell is a row without one.", show_default=False),
    ] = None,
    labels_are: options.LabelsAre = None,
    time: Annotated[
        str | None, typer.Option(help="Column of the times, any text.", show_default=False)
    ] = None,
    prefix: options.Prefix = "",
    probability: Annotated[
        list[str] | None,
        typer.Option(help="Column of the probability of a class; repeat it for each.", show_default=False),
    ] = None,
    mutual_information: Annotated[
        str | None,
        typer.Option(help="Column of the mutual information.", show_default="'mutual information', if any"),
    ] = None,
    encoding: options.Encoding = ENCODING,
    alpha: options.Alpha = None,
    floor: options.Floor = None,
    tolerance: options.Tolerance = None,
    every: Annotated[int, typer.Option(help="Rows per point of the chart.", min=1)] = 100,
    late_labels: Annotated[
        bool, typer.Option("--late-labels", help="The rows were monitored before; read their labels only.")
    ] = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Monitor a deployed classifier: accuracy, calibration, and shift of unlabelled rows.

    The tests may be read after every row, for any number of runs. The exit code is 5 if any of them has
    raised an alarm, and 0 otherwise.
    """
    with reporting() as progress, ExitStack() as rooms:
        for file in (state, html):
            rooms.enter_context(room_for(file, source=log))
        columns = LogFormat(
            prefix, tuple(probability or ()), mutual_information, label, time, labels_are, encoding
        )
        if late_labels and label is None:
            raise ValueError("--late-labels reads labels: name their column with --label")
        start = {"alpha": alpha, "floor": floor, "tolerance": tolerance}
        source = Log(log, columns)
        known = None if reference is None else reference_log(reference, columns)
        begun, notes = started(jax.random.key(seed), state, known, start, source.classes)
        notes = remembering(notes, source)
        after = monitored(begun, source, every, late_labels=late_labels)
        if state is not None:
            save_monitor(after, state, notes=notes)
        result, shown = monitor_result(after), [*after.overview]
        if html is not None:
            text = monitor_page(f"Monitor of {log.name}", after)
            place = keep(html, lambda path: write(path, text), progress)
            result["html"] = str(place)
            shown.append(f"report: {place}")
        print_result(result, *shown, json=json)
        if html is not None:
            exit_if_elsewhere(html, place)
        if after.alerts:
            raise typer.Exit(ExitCode.ALARM)


def reference_log(path: Path, columns: LogFormat) -> Reference:
    """The reference of a log, which may lack labels and times."""
    source = Log(path, columns, optional=_names(columns))

    def read() -> tuple[Observed, Any]:
        whole = joined(list(source.pieces(4096)))
        return whole.prediction, whole.labels

    return Reference(path, source.classes, read)


def started(
    key: jax.Array,
    state: Path | None,
    reference: Reference | None,
    start: Mapping[str, float | None],
    classes: tuple[str, ...],
) -> tuple[Monitor, dict[str, Any]]:
    """The monitor that goes on, or a new one, and its notes.

    Args:
        key: Random key of a new monitor.
        state: Its file, if it is kept.
        reference: The reference, which is read for a new monitor alone.
        start: Options of a new monitor, None where they were not given.
        classes: Classes of the new rows.

    Raises:
        ValueError: If the classes differ, or an option is not that of the state.
    """
    checksum = None if reference is None else file_checksum(reference.path)
    if state is not None and state.exists():
        notes, kept = read_notes(state), load_monitor(state)
        path = None if reference is None else reference.path
        _check_same(state, kept, notes, path, checksum, start, classes)
        return kept, notes
    notes = {"classes": list(classes), "reference": checksum, "start": dict(start), "logs": []}
    given: dict[str, Any] = {name: value for name, value in start.items() if value is not None}
    if reference is None:
        return Monitor.start(key, **given), notes
    _check_classes(reference.path, reference.classes, classes)
    return Monitor.start(key, *reference.read(), **given), notes


def monitored(monitor: Monitor, source: Log, every: int, *, late_labels: bool = False) -> Monitor:
    """The monitor after the rows of a log, with a point of its chart after every so many."""
    for prediction, labels, times in source.pieces(every):
        update = monitor.label if late_labels else monitor.update
        monitor = update(prediction, labels, times)
    return monitor


def remembering(notes: dict[str, Any], source: Log) -> dict[str, Any]:
    """The notes with one more log; `ValueError` if it was read before."""
    checksum, logs = file_checksum(source.path), notes.get("logs")
    logs = logs if isinstance(logs, list) else []
    if checksum in logs:
        raise ValueError(f"{str(source.path)!r} was monitored before; pass a log with new rows only")
    return notes | {"logs": [*logs, checksum][-REMEMBERED:]}


def joined(pieces: list[LogPiece]) -> LogPiece:
    """All pieces as one."""
    information = [piece.prediction.mutual_information for piece in pieces]
    labels = [piece.labels for piece in pieces]
    return LogPiece(
        Logged(
            np.concatenate([piece.prediction.probs for piece in pieces]),
            None if information[0] is None else np.concatenate([x for x in information if x is not None]),
        ),
        None if labels[0] is None else np.concatenate([x for x in labels if x is not None]),
        None,
    )


def monitor_result(monitor: Monitor) -> dict[str, Any]:
    """The monitor as one JSON object."""
    means_of = {
        name: {"value": x.mean, "low": x.interval[0], "high": x.interval[1], "fits": x.fits}
        for name, x in monitor.sequences.items()
    }
    return {
        "rows": monitor.num_rows,
        "labelled": monitor.num_labelled,
        "alpha": monitor.alpha,
        "floor": monitor.floor,
        "alerts": [asdict(alert) for alert in monitor.alerts],
        "findings": [asdict(finding) for finding in monitor.findings],
        "means": means_of if monitor.num_labelled else {},
        "ece": monitor.bins.ece,
        "recommendation": monitor.recommendation,
    }


def monitor_page(title: str, monitor: Monitor) -> str:
    """HTML page with findings, a chart over time, and tables."""
    from bnlora import plots

    parts: list[Any] = [monitor.recommendation, monitor.overview[0]]
    figure = plots.monitoring(monitor)
    parts.append((figure, "Running accuracy and evidence of each test"))
    if monitor.num_labelled:
        parts += [means(monitor), monitor.bins.table]
    return page(title, parts)


def _names(columns: LogFormat) -> list[str]:
    return [name for name in (columns.label, columns.time) if name is not None]


def _check_classes(path: Path, classes: tuple[str, ...], expected: tuple[str, ...]) -> None:
    if classes != expected:
        raise ValueError(f"{str(path)!r} has the classes {list(classes)}; the log has {list(expected)}")


def _check_same(
    state: Path,
    monitor: Monitor,
    notes: Mapping[str, Any],
    reference: Path | None,
    checksum: str | None,
    start: Mapping[str, float | None],
    classes: tuple[str, ...],
) -> None:
    """Raise `ValueError` unless the options are those with which the state was started."""
    if notes.get("classes") != list(classes):
        raise ValueError(
            f"{str(state)!r} has the classes {notes.get('classes')}; the new rows have {list(classes)}"
        )
    if reference is not None and checksum != notes.get("reference"):
        raise ValueError(
            f"{str(state)!r} was started with another reference than {str(reference)!r}; leave out "
            "--reference to go on, or name another state to start anew"
        )
    begun = notes.get("start")
    begun = begun if isinstance(begun, dict) else {}
    for name, value in start.items():
        if value is not None and value != begun.get(name, _START[name]):
            raise ValueError(
                f"{str(state)!r} was started with another --{name} than {value:g}; leave it out to go on, or "
                "name another state to start anew"
            )
