"""The state of a monitor as a JSON file, so that another process can go on.

Numbers are written in full, so that a monitor goes on exactly as if it had never been stored. The file is not
trusted: sizes, types and ranges are checked when it is read.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from bnlora._util.checks import brief, is_integer
from bnlora._util.files import read_json, write_json
from bnlora.assess.monitor import calibration, shift
from bnlora.assess.monitor.betting import FRACTIONS, Evidence
from bnlora.assess.monitor.calibration import Bins
from bnlora.assess.monitor.sequences import GRID, MeanSequence
from bnlora.assess.monitor.shift import Ranks
from bnlora.assess.monitor.state import GAP, POINTS, Monitor, Point
from bnlora.assess.monitor.watch import ACCURACY, CALIBRATION, ENTROPY, INFORMATION, TESTS, Alert, Watch

FORMAT = 1
"""Version of the file."""

T = TypeVar("T")

_BETS = {
    ACCURACY: len(FRACTIONS), CALIBRATION: calibration.NUM_BETS,
    ENTROPY: shift.NUM_BETS, INFORMATION: shift.NUM_BETS,
}  # fmt: skip
_LARGEST = 2**53


def save_monitor(monitor: Monitor, path: str | Path, *, notes: Mapping[str, Any] | None = None) -> None:
    """Write the state of a monitor as JSON; an existing file is replaced in one step.

    Args:
        monitor: The monitor.
        path: The file.
        notes: Values to keep beside it, such as names of classes; anything that JSON can hold.

    Example:
        >>> save_monitor(Monitor.start(key, floor=0.9), folder / "state.json", notes={"model": "films"})
        >>> load_monitor(folder / "state.json"), read_notes(folder / "state.json")
        (Monitor(0 rows, 0 labelled, alarms: none), {'model': 'films'})
    """
    record = {
        "format": FORMAT,
        "notes": dict(notes or {}),
        **{name: getattr(monitor, name) for name in ("alpha", "level", "nll_bound", "floor", "num_classes")},
        "num_rows": monitor.num_rows,
        "seed": list(monitor.seed),
        "sequences": {name: _sequence_record(x) for name, x in monitor.sequences.items()},
        "bins": {name: getattr(monitor.bins, name).tolist() for name in ("count", "confidence", "correct")},
        "ranks": {
            name: {"edges": x.edges.tolist(), "counts": x.counts.tolist()}
            for name, x in monitor.ranks.items()
        },
        "watches": {name: _watch_record(x) for name, x in monitor.watches.items()},
        "history": [list(point) for point in monitor.history],
    }
    write_json(Path(path), record)


def load_monitor(path: str | Path) -> Monitor:
    """Read a monitor that `save_monitor` wrote.

    Args:
        path: The file.

    Returns:
        The monitor.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not the state of a monitor, or a value in it is not possible.
    """
    read = _record(Path(path))
    floor = read.optional("floor", lambda: read.number("floor", 0, 1))
    watches = {name: _watch(part) for name, part in read.parts("watches", TESTS).items()}
    sequences = {name: _sequence(part) for name, part in read.parts("sequences").items()}
    ranks = {name: _ranks(part) for name, part in read.parts("ranks", (ENTROPY, INFORMATION)).items()}
    wanted = {*ranks, CALIBRATION, *([] if floor is None else [ACCURACY])}
    if set(watches) != wanted or set(sequences) != {"accuracy", "brier", "nll", GAP}:
        raise read.error("its tests or sequences are not those of its settings")
    read.floats("seed", 2, 0, 2**64, whole=True)
    return Monitor(
        read.number("alpha", 0, 1),
        read.number("level", 0, 1),
        read.number("nll_bound", 0, math.inf),
        floor,
        (read.values["seed"][0], read.values["seed"][1]),
        read.optional("num_classes", lambda: read.integer("num_classes")),
        read.integer("num_rows"),
        sequences,
        _bins(read.part("bins")),
        ranks,
        watches,
        tuple(_point(read, x) for x in read.items("history", POINTS)),
    )


def read_notes(path: str | Path) -> dict[str, Any]:
    """The notes beside a monitor.

    Args:
        path: The file.

    Returns:
        The notes; empty if there are none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not the state of a monitor.
    """
    return _record(Path(path)).part("notes").values


class _Reader:
    """Values of a JSON object, each checked when it is read.

    Args:
        path: The file, for messages.
        values: The object.
    """

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path, self.values = path, values

    def error(self, why: str) -> ValueError:
        return ValueError(f"{str(self.path)!r} is not the state of a monitor: {why}")

    def get(self, name: str) -> Any:
        if name not in self.values:
            raise self.error(f"{name!r} is missing")
        return self.values[name]

    def refuse(self, name: str, expected: str) -> ValueError:
        return self.error(f"{name!r} must be {expected}; got {brief(self.values[name])}")

    def optional(self, name: str, read: Callable[[], T]) -> T | None:
        return None if self.get(name) is None else read()

    def number(self, name: str, low: float | int, high: float | int) -> float:
        value = self.get(name)
        if not _is_number(value) or not low < value < high:
            raise self.refuse(name, f"a number in ({low}, {high})")
        return float(value)

    def integer(self, name: str) -> int:
        value = self.get(name)
        if not is_integer(value) or not 0 <= value < _LARGEST:
            raise self.refuse(name, "a whole number, at least 0")
        return int(value)

    def items(self, name: str, most: int) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list) or len(value) > most:
            raise self.refuse(name, f"a list of at most {most} values")
        return value

    def floats(
        self, name: str, size: int | None, low: float | int, high: float | int, *, whole: bool = False
    ) -> Float[np.ndarray, " n"]:
        values = self.items(name, 2 * shift.EDGES + 1 if size is None else size)
        right = all((is_integer(x) if whole else _is_number(x)) and low <= x < high for x in values)
        if not right or (size is not None and len(values) != size):
            raise self.refuse(name, f"{size or ''} {'whole ' if whole else ''}numbers in [{low}, {high})")
        return np.asarray(values, np.float64)

    def part(self, name: str) -> "_Reader":
        value = self.get(name)
        if not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return _Reader(self.path, value)

    def parts(self, name: str, known: tuple[str, ...] | None = None) -> dict[str, "_Reader"]:
        whole = self.part(name)
        if known is not None and not set(whole.values) <= set(known):
            raise self.refuse(name, f"an object with names among {known}")
        return {each: whole.part(each) for each in whole.values}


def _record(path: Path) -> _Reader:
    read = _Reader(path, read_json(path))
    if read.get("format") != FORMAT:
        raise read.refuse("format", str(FORMAT))
    return read


def _is_number(value: Any) -> bool:
    # Not `math.isfinite`: an integer may be too large for a float.
    return isinstance(value, float | int) and not isinstance(value, bool) and -1e308 < value < 1e308


def _sequence_record(sequence: MeanSequence) -> dict[str, Any]:
    names = ("low", "high", "level", "num_rows", "total", "squares")
    arrays = {name: getattr(sequence, name).tolist() for name in ("log_above", "log_below", "log_peak")}
    return {name: getattr(sequence, name) for name in names} | arrays


def _sequence(read: _Reader) -> MeanSequence:
    low, high = read.number("low", -_LARGEST, _LARGEST), read.number("high", -_LARGEST, _LARGEST)
    if not low < high:
        raise read.refuse("low", f"below {high}")
    sums = [read.number(name, -1, _LARGEST) for name in ("total", "squares")]
    above, below, peak = (
        read.floats(f"log_{name}", len(GRID), -_LARGEST, _LARGEST) for name in ("above", "below", "peak")
    )
    count = read.integer("num_rows")
    if not all(0 <= x <= count for x in sums):
        raise read.refuse("total", f"from 0 to {count}")
    return MeanSequence(low, high, read.number("level", 0, 1), count, sums[0], sums[1], above, below, peak)


def _bins(read: _Reader) -> Bins:
    sums = [read.floats(name, calibration.BINS, 0, _LARGEST) for name in ("count", "confidence", "correct")]
    return Bins(*sums)


def _ranks(read: _Reader) -> Ranks:
    edges = read.floats("edges", None, -_LARGEST, _LARGEST)
    counts = read.floats("counts", 2 * len(edges) + 1, 0, _LARGEST, whole=True)
    if not len(edges) or (np.diff(edges) <= 0).any():
        raise read.refuse("edges", "increasing")
    return Ranks(edges, counts.astype(int))


def _watch_record(watch: Watch) -> dict[str, Any]:
    evidence, alert = watch.evidence, watch.alert
    return {
        "threshold": watch.threshold,
        # Without rows the capital is log 0, which JSON cannot represent.
        "log_capital": evidence.log_capital.tolist() if evidence.num_rows else None,
        "num_rows": evidence.num_rows,
        "log_value": evidence.log_value,
        "log_peak": evidence.log_peak,
        "alert": None if alert is None else asdict(alert),
        "test": watch.test,
    }


def _watch(read: _Reader) -> Watch:
    test = read.get("test")
    if not isinstance(test, str) or test not in TESTS:
        raise read.refuse("test", f"one of {TESTS}")
    count, size = read.integer("num_rows"), _BETS[test]
    if count:
        capital = read.floats("log_capital", size, -_LARGEST, _LARGEST)
        logs = [read.number(name, -_LARGEST, _LARGEST) for name in ("log_value", "log_peak")]
        evidence = Evidence(capital, count, *logs)
    else:
        evidence = Evidence.start(size)
    alert = read.optional("alert", lambda: read.part("alert"))
    return Watch(
        test,
        evidence,
        read.number("threshold", 1, _LARGEST),
        None if alert is None else Alert(
            test, alert.integer("row"), _text(alert, alert.get("time")), alert.number("evidence", 0, math.inf)
        ),
    )  # fmt: skip


def _point(read: _Reader, values: Any) -> Point:
    if not isinstance(values, list) or len(values) != 5:
        raise read.error(f"a point of its history is {brief(values)}")
    point = _Reader(read.path, dict(zip(Point._fields, values, strict=True)))
    accuracy = point.optional("accuracy", lambda: point.floats("accuracy", 3, 0, 1 + 1e-9))
    evidence = point.part("log_evidence")
    return Point(
        point.integer("rows"),
        point.integer("labelled"),
        _text(point, point.get("time")),
        None if accuracy is None else (float(accuracy[0]), float(accuracy[1]), float(accuracy[2])),
        {name: evidence.number(name, -_LARGEST, _LARGEST) for name in evidence.values if name in TESTS},
    )


def _text(read: _Reader, value: Any) -> str:
    if not isinstance(value, str):
        raise read.error(f"a time must be a text; got {brief(value)}")
    return value
