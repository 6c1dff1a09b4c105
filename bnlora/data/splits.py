"""What every reader of a task shares: its splits, its tokenizer, the longest row, the width of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from bnlora._util.checks import check_at_least
from bnlora._util.display import Shown
from bnlora.data.batch import Batch
from bnlora.data.formats import check_columns

if TYPE_CHECKING:
    from datasets import Dataset

_MULTIPLE = 8  # pad rows to a multiple, so that data sets of similar length share a compiled program


@dataclass(frozen=True, repr=False)
class Splits(Shown):
    """Tokenised splits of a task.

    Attributes:
        splits: Batches by name.
    """

    splits: Mapping[str, Batch]

    def __getitem__(self, name: str) -> Batch:
        """The split of this name; a `KeyError` lists the existing splits."""
        if name not in self.splits:
            raise KeyError(f"no split {name!r}; the splits are {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def train(self) -> Batch:
        """The split `"train"`."""
        return self["train"]

    @property
    def validation(self) -> Batch:
        """The split `"validation"`."""
        return self["validation"]

    @property
    def test(self) -> Batch:
        """The split `"test"`."""
        return self["test"]


class Source(NamedTuple):
    """What a reader tokenises, and with what.

    Attributes:
        splits: Data sets by name.
        tokenizer: The tokenizer.
        base: The base model, if it was given in place of its tokenizer.
        limit: Most tokens of a row.
    """

    splits: "dict[str, Dataset]"
    tokenizer: Any
    base: Any
    limit: int


def opened(
    dataset: "Dataset | Mapping[str, Dataset]", tokenizer: Any, max_length: int | None, *, least: int
) -> Source:
    """Read the arguments that all readers have.

    Args:
        dataset: A data set, or several by split name. A single data set becomes the split `"train"`.
        tokenizer: A tokenizer, or a base model with one.
        max_length: Most tokens of a row; the tokenizer's own limit if None.
        least: Fewest tokens that a row may be limited to.

    Raises:
        ValueError: If there are no splits, or the limit is too small.
    """
    splits = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    if not splits:
        raise ValueError("the data set has no splits")
    base = tokenizer if hasattr(tokenizer, "modules") else None
    tokenizer = tokenizer if base is None else base.tokenizer
    limit = min(int(tokenizer.model_max_length), 2**20) if max_length is None else max_length
    check_at_least({"max_length": limit}, least)
    return Source(splits, tokenizer, base, limit)


def check_split(name: str, rows: "Dataset", columns: Sequence[str]) -> None:
    """Raise `ValueError` unless a split is a data set with these columns and at least one row."""
    if not hasattr(rows, "column_names"):
        raise ValueError(
            f"split {name!r} must be a datasets.Dataset; got {type(rows).__name__}. Make one by "
            "datasets.Dataset.from_dict(columns) or datasets.Dataset.from_pandas(frame), and pass that"
        )
    check_columns(f"split {name!r}", rows.column_names, columns)
    if len(rows) == 0:
        raise ValueError(f"split {name!r} is empty")


def padded(length: int) -> int:
    """The width of rows of at most this length."""
    return -(-length // _MULTIPLE) * _MULTIPLE


def filler(tokenizer: Any) -> int:
    """The token at padding, which no model reads."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
