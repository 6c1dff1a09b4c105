"""Classes that are words of one token each.

    p(y = c | x) = softmax_c(logit of the token of word c after x)

The softmax runs over the label tokens only, so the likelihood is normalised over the classes.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from bnlora._util.checks import brief
from bnlora.adapters.sites import HEAD, Sites
from bnlora.data.batch import Batch, unknown_token
from bnlora.program.likelihoods.base import (
    Likelihood,
    Upper,
    require_language_model,
    require_plain_rows,
)


@dataclass(frozen=True)
class Words(Likelihood):
    """Each class is one token.

    Attributes:
        label_ids: Token id of each class's word.

    Raises:
        ValueError: If they are not at least two different integers.

    Example:
        >>> bl.likelihoods.Words([3, 5])
        Words(label_ids=(3, 5))
    """

    label_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        """Turn any list of integers into a tuple."""
        given = np.asarray(self.label_ids)
        if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
            raise ValueError(f"label_ids must be a list of integers; got {brief(self.label_ids)}")
        ids = tuple(map(int, given))
        if len(ids) < 2 or len(set(ids)) < len(ids):
            raise ValueError(f"label_ids must be at least two different token ids; got {ids}")
        object.__setattr__(self, "label_ids", ids)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.label_ids)

    def check(self, base: Any) -> None:
        """Raise `ValueError` unless the base has a row for every label token."""
        require_language_model(base, "label words")
        size = base.modules[HEAD][1]
        unknown = [i for i in self.label_ids if not 0 <= i < size]
        if unknown:
            named = unknown_token(unknown[0], size, getattr(base, "tokenizer", None))
            raise ValueError(f"label_ids have {named}")

    def check_rows(self, batch: Batch) -> None:
        """Raise `ValueError` for rows with choices."""
        require_plain_rows(
            batch,
            "which label words do not read; give the classifier "
            "likelihood=bl.likelihoods.Completions(data.num_choices)",
        )

    def position(self, batch: Batch) -> Int[Array, " n"]:
        """The last real token of each row."""
        return batch.last

    def sites(self, sites: Sites) -> Sites:
        """The sites with only the label rows of the head."""
        return sites.with_head_rows(len(self.label_ids))

    def logits(self, upper: Upper, batch: Batch) -> Float[Array, "n c"]:
        """Logits of the label tokens after the last real token; the last layer runs only there."""
        final = upper.final(batch.last[:, None])
        return upper.head(final[:, 0], rows=jnp.asarray(self.label_ids))

    def facts(self, base: Any) -> dict[str, str]:
        """The label tokens."""
        tokenizer = getattr(base, "tokenizer", None)
        named = {} if tokenizer is None else {i: f" {tokenizer.decode([i])!r}" for i in self.label_ids}
        return {"label tokens": ", ".join(f"{i}{named.get(i, '')}" for i in self.label_ids)}

    def record(self) -> dict[str, Any]:
        """The label tokens."""
        return {"ids": list(self.label_ids)}
