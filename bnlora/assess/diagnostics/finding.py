"""One thing that a diagnosis says: what was measured, against which threshold, and what to do about it."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["problem", "caution", "fine", "not asked"]

MARKS: dict[Status, str] = {"problem": "✗", "caution": "!", "fine": "✓", "not asked": "–"}
COLOURS: dict[Status, str] = {
    "problem": "red",
    "caution": "dark_orange",
    "fine": "green",
    "not asked": "grey50",
}


@dataclass(frozen=True)
class Finding:
    """What one diagnostic says.

    Attributes:
        name: What was asked.
        status: "problem" (do not use the fit so), "caution" (know this before you report numbers), "fine", or
            "not asked" (undefined here, or its own preconditions failed).
        measured: The measurement in words, with its number, its error and the threshold.
        value: The number that was held against the threshold; None where there is none.
        threshold: The threshold; None where there is none.
        remedy: What to do about it, in one sentence; empty where all is fine.
    """

    name: str
    status: Status
    measured: str
    value: float | None = None
    threshold: float | None = None
    remedy: str = ""
