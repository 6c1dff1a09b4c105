"""The record of the steps of a fit: a column of numbers for each name, with eight bytes for a step."""

from array import array
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float


class Record:
    """Numbers of steps by name; columns are as long as each other."""

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns; none before the first step."""
        return tuple(self._columns)

    def add(self, columns: Mapping[str, Float[np.ndarray, " steps"]]) -> None:
        """Append steps, as many in each column."""
        for name, values in columns.items():
            self._columns.setdefault(name, array("d")).frombytes(np.asarray(values, np.float64).tobytes())

    def cut(self, length: int) -> None:
        """Forget the steps after the first `length`."""
        for values in self._columns.values():
            del values[length:]

    def column(self, name: str, begin: int = 0) -> Float[np.ndarray, " steps"]:
        """The numbers of a name from step `begin` on; a negative one counts from the end."""
        return np.array(self._columns.get(name, array("d"))[begin:])
