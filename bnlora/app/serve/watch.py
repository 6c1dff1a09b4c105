"""The monitor of the service: every prediction and every label reaches it once, in the order of arrival.

A monitor is a value, and the thread of the event loop replaces it. So another thread can store it without a
lock. Its file has the form of `bnlora monitor`, and either command goes on where the other has ended.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnlora._util.files import file_checksum
from bnlora.app.monitor import Reference, started
from bnlora.app.serve.counts import Labelled
from bnlora.app.serve.service import Service
from bnlora.assess.monitor import Logged, Monitor, Observed, save_monitor
from bnlora.assess.monitor.rows import UNLABELLED
from bnlora.data.formats import check_columns
from bnlora.data.labels import read_labels
from bnlora.data.tables import RowError, existing, naming_lines, read_table
from bnlora.infer.svi.checkpoint import RECORD
from bnlora.prediction.predict import Prediction

SAVE_SECONDS = 60.0
"""Seconds between two writes of the state, so that a killed process loses little."""


@dataclass
class Watching:
    """The monitor now, and the file that keeps it.

    Attributes:
        monitor: The monitor.
        notes: What is stored beside it.
        file: Its file, if it is kept.
        saved: The monitor that the file has.
    """

    monitor: Monitor
    notes: Mapping[str, Any]
    file: Path | None = None
    saved: Monitor | None = None

    def predicted(self, prediction: Prediction) -> None:
        """Rows that were served."""
        self.monitor = self.monitor.update(prediction, time=_now())

    def labelled(self, rows: Labelled) -> None:
        """First labels of rows that were served before."""
        self.monitor = self.monitor.label(Logged(np.exp(rows.log_probs)), rows.labels, _now())

    def save(self) -> None:
        """Write the state if there is anything new.

        Raises:
            OSError: If it cannot be written.
        """
        if self.file is not None and self.monitor is not self.saved:
            self.write(self.file)

    def write(self, path: Path) -> None:
        """Write the state to a path."""
        now = self.monitor  # the event loop may go on meanwhile
        save_monitor(now, path, notes=self.notes)
        self.saved = now

    def try_to_save(self) -> None:
        """Write the state; standard error says so if that fails."""
        try:
            self.save()
        except OSError as error:
            logging.getLogger(__name__).warning("the state of the monitor could not be written: %s", error)


def start_watching(
    key: jax.Array,
    folder: Path,
    service: Service,
    file: Path | None,
    reference: Reference | None,
    start: Mapping[str, float | None],
    seed: int,
) -> Watching:
    """The monitor of a service: that of a file if it exists, otherwise a new one.

    Args:
        key: Random key of a new monitor.
        folder: Folder of the fit.
        service: What answers.
        file: File of the monitor, if it is kept.
        reference: Rows like those that are expected, if there are any.
        start: Options of a new monitor, None where they were not given.
        seed: Seed of the draws.

    Raises:
        ValueError: If the file belongs to another fit, or was started with other options.
    """
    monitor, notes = started(key, file, reference, start, tuple(service.names))
    fit = {"fit": file_checksum(folder / RECORD), "draws": service.num_draws, "seed": seed}
    if notes.get("served", fit) != fit:
        raise ValueError(
            f"{str(file)!r} is the monitor of another fit, --draws or --seed, whose predictions differ; "
            "name another state to start anew"
        )
    return Watching(monitor, dict(notes) | {"served": fit}, file)


def reference_of(service: Service, path: Path, text: str, label: str, encoding: str) -> Reference:
    """A table of texts as a reference, which the service itself predicts.

    Args:
        service: What predicts.
        path: Table of rows that were not used for the fit.
        text: Column of the texts.
        label: Column of the labels, if the table has it; an empty cell is a row without one. Votes are not
            read: they are no class.
        encoding: Encoding of the table.

    Raises:
        ValueError: If there is no such file.
    """
    path = existing(path)

    def read() -> tuple[Observed, Any]:
        rows = read_table(path, encoding=encoding)
        check_columns(repr(str(path)), rows.column_names, [text])
        with naming_lines({"rows": path}, encoding=encoding):
            data = service.recipe.read({"rows": rows}, service.drawn.model.base, text=text, label=None)
            labelled = label in rows.column_names and service.recipe.task != "votes"
            labels = _labels(service, rows[label][:]) if labelled else None
        return service.predict(data["rows"]), labels

    return Reference(path, tuple(service.names), read)


def _labels(service: Service, cells: list[Any]) -> np.ndarray:
    """The class of each cell, -1 for an empty one."""
    texts = [(cell or "").strip() for cell in cells]
    labels, at = np.full(len(texts), UNLABELLED), np.array([i for i, x in enumerate(texts) if x], int)
    if len(at):
        values = [texts[i] for i in at]
        try:
            labels[at] = read_labels("rows", values, service.names, labels_are=service.recipe.labels_are)
        except RowError as error:
            error.row = int(at[error.row])  # the row of the table
            raise
    return labels


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
