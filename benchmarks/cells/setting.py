"""What a method of the grid gets, and what it gives back."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
from jax import Array

import bnlora as bl
from benchmarks.cells.tasks import QUIET, Rows
from benchmarks.timing import clock

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Setting:
    """The rows, the seed and the options of a cell.

    Attributes:
        rows: The rows of the cell.
        seed: Its seed.
        options: Its options; a method reads them by `option`.
        read: Options that were read.
        aside: Seconds that this cell spent on what later cells share.
    """

    rows: Rows
    seed: int
    options: Mapping[str, Any]
    read: set[str] = field(default_factory=set)
    aside: list[float] = field(default_factory=list)

    def option(self, name: str, default: Any) -> Any:
        """The value of an option of this cell, or `default`."""
        self.read.add(name)
        return self.options.get(name, default)

    def given(self, *names: str) -> dict[str, Any]:
        """The options of this cell among these, which count as read whether they are there or not."""
        self.read.update(names)
        return {name: self.options[name] for name in names if name in self.options}

    def key(self, purpose: str) -> Array:
        """A random key of this seed for a purpose; the same in every process."""
        return jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(purpose.encode()) % 2**31)

    def shared(self, name: str, make: Callable[[], Made]) -> tuple[Made, float]:
        """What several cells of the same rows need, and its seconds; the first of them makes it.

        Args:
            name: Name of what is made, with the options that it depends on.
            make: Makes it.
        """
        if name not in self.rows.made:
            with clock() as took:
                value = make()
            self.rows.made[name] = value, took.wall
            self.aside.append(took.wall)
        return self.rows.made[name]

    def check_all_read(self) -> None:
        """Raise `ValueError` if the method has no such option: it would change nothing."""
        unknown = sorted({*self.options} - self.read)
        if unknown:
            known = ", ".join(sorted(self.read)) or "none"
            raise ValueError(f"the method does not read the options {unknown}; it reads {known}")


class Fitted(NamedTuple):
    """A fitted method.

    Attributes:
        predict: The prediction of a set of rows by its name.
        parameters: Numbers that were fitted.
        about: What the method chose.
        earlier: Seconds by part of what it shares with other cells.
    """

    predict: Callable[[str], bl.Prediction]
    parameters: int
    about: Mapping[str, Any]
    earlier: Mapping[str, float] = {}


def by_posterior(
    setting: Setting,
    posterior: Any,
    num_draws: int,
    parameters: int,
    about: Mapping[str, Any],
    *,
    tests: Mapping[str, bl.Batch] | None = None,
) -> Fitted:
    """Predictions of the rows of a cell, or of `tests` in their place, from draws of a posterior."""
    key, draws = setting.key("predictions"), setting.option("draws", num_draws)
    rows = setting.rows.tests if tests is None else tests

    def predict(name: str) -> bl.Prediction:
        return bl.predict(key, posterior, rows[name], num_draws=draws, console=QUIET)

    return Fitted(predict, parameters, about)
