"""Likelihoods that read the logits of another one and give them another distribution."""

from dataclasses import dataclass
from typing import Any

from jax import Array
from jaxtyping import Float, Int

from bnlora.adapters.sites import Sites
from bnlora.data.batch import Batch
from bnlora.program.likelihoods.base import Likelihood, Upper


@dataclass(frozen=True)
class Reading(Likelihood):
    """A likelihood whose logits are those of another.

    Attributes:
        reads: The likelihood that reads the logits, such as `Words`.
    """

    reads: Likelihood

    def __post_init__(self) -> None:
        """Refuse what reads no logits of classes."""
        if not (isinstance(self.reads, Likelihood) and self.reads.is_softmax):
            raise ValueError(
                f"{type(self).__name__} reads the logits of classes, such as "
                f"bl.likelihoods.Words(data.label_ids); got {type(self.reads).__name__}"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.reads.num_classes

    @property
    def num_logits(self) -> int:
        """Number of logits of a row."""
        return self.reads.num_logits

    @property
    def label_ids(self) -> tuple[int, ...]:
        """Token ids of the words that are read, if they are words."""
        return getattr(self.reads, "label_ids", ())

    def check(self, base: Any) -> None:
        """Raise `ValueError` unless the base has what is read."""
        self.reads.check(base)

    def check_rows(self, batch: Batch) -> None:
        """Raise `ValueError` unless the rows have the form that is read."""
        self.reads.check_rows(batch)

    def position(self, batch: Batch) -> Int[Array, " n"] | None:
        """The one position of each row that the head reads, or None if it reads several."""
        return self.reads.position(batch)

    def sites(self, sites: Sites) -> Sites:
        """The sites with the rows of the head that are read."""
        return self.reads.sites(sites)

    def logits(self, upper: Upper, batch: Batch) -> Float[Array, "n k"]:
        """The logits of the other likelihood."""
        return self.reads.logits(upper, batch)

    def facts(self, base: Any) -> dict[str, str]:
        """What is read, and how it is distributed."""
        return {**self.reads.facts(base), "outcome": repr(self)}


@dataclass(frozen=True)
class Contrast(Reading):
    """A likelihood of one number for each row: the logit of the second class minus that of the first."""

    def __post_init__(self) -> None:
        """Refuse what has not exactly two logits."""
        super().__post_init__()
        if self.reads.num_logits != 2:
            raise ValueError(
                f"{type(self).__name__} reads the contrast of two words, such as "
                "bl.likelihoods.Words(data.label_ids) with the words ' bad' and ' good'; got "
                f"{self.reads.num_logits} words"
            )


def readout(likelihood: Likelihood) -> Likelihood:
    """The likelihood that reads the logits: itself, or the one that it gives another distribution."""
    return likelihood.reads if isinstance(likelihood, Reading) else likelihood


def contrast(logits: Float[Array, "n 2"]) -> Float[Array, " n"]:
    """The second logit minus the first."""
    return logits[..., 1] - logits[..., 0]
