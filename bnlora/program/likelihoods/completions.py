r"""Classes that are completions of any length: multiple choice, and classes of several tokens.

    score_c = 1/|c| sum_j log p(token j of completion c | its context, tokens before j)
    p(y = c | x) = softmax_c(score_c)

The tokens' probabilities are normalised over the whole vocabulary, the scores over the choices of the row.
|c| is 1, or the length of the completion (`Choices.size`). Contexts may differ by choice.

Reference: Brown et al. (2020), Language models are few-shot learners, section 2.4, for both normalisations.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import check_at_least
from bnlora.adapters.sites import Sites
from bnlora.data.batch import Batch
from bnlora.program.likelihoods.base import Likelihood, Upper, require_language_model

ABSENT = -1e9
"""Score of a choice that a row does not have, where other rows have more choices."""


@dataclass(frozen=True)
class Completions(Likelihood):
    """Each class is a completion of the row's text.

    Attributes:
        num_choices: Most choices of a row.

    Raises:
        ValueError: If it is not an integer of at least two.

    Example:
        >>> likelihood = bl.likelihoods.Completions(4)
        >>> model = bl.Classifier(base, sites, bl.priors.normal(), likelihood=likelihood)
        >>> model.num_classes, model.label_ids
        (4, ())
    """

    num_choices: int

    def __post_init__(self) -> None:
        """Check the number of choices."""
        check_at_least({"num_choices": self.num_choices}, 2)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.num_choices

    def check(self, base: Any) -> None:
        """Raise `ValueError` for an encoder; every language model has all tokens."""
        require_language_model(base, "completions")

    def check_rows(self, batch: Batch) -> None:
        """Raise `ValueError` unless every row has this number of choices."""
        got = "rows without choices" if batch.choices is None else f"{batch.tokens.shape[1]} choices"
        if batch.choices is None or batch.tokens.shape[1] != self.num_choices:
            raise ValueError(
                f"the classifier reads {self.num_choices} choices of each row, as from bl.multiple_choice; "
                f"got {got}"
            )

    def position(self, batch: Batch) -> None:
        """None: the head reads the positions of all tokens of a completion."""

    def sites(self, sites: Sites) -> Sites:
        """The sites as they are: the scores read all rows of the head."""
        return sites

    def logits(self, upper: Upper, batch: Batch) -> Float[Array, "n c"]:
        """Scores of the choices (`completion_scores`)."""
        self.check_rows(batch)
        assert batch.choices is not None  # checked above
        return jnp.where(batch.choices.scored.any(-1), completion_scores(upper, batch), ABSENT)

    def facts(self, base: Any) -> dict[str, str]:
        """The number of choices."""
        return {"choices": f"up to {self.num_choices}, by the log-likelihood of their completions"}

    def record(self) -> dict[str, Any]:
        """The number of choices."""
        return {"num_choices": self.num_choices}


def completion_scores(upper: Upper, batch: Batch) -> Float[Array, "n c"]:
    """Log-likelihood of every completion, divided by its `Choices.size`; 0 for an absent one.

    The last layer runs at the completions' positions only. The rows of a batch pass the head one after the
    other: the logits of all tokens of the vocabulary would take more memory than the layers.
    """
    assert batch.choices is not None  # the caller has checked the rows
    rows, choices, length = batch.tokens.shape
    span = batch.choices.span
    # Choices end at the last column, so the tokens before their completions are at fixed positions.
    before = jnp.arange(length - span - 1, length - 1)
    final = upper.final(jnp.broadcast_to(before, (rows * choices, span)))

    @jax.checkpoint
    def scores(row: tuple[Array, Array, Array]) -> Array:
        final, tokens, scored = row
        log_probs = jax.nn.log_softmax(upper.head(final), axis=-1)
        own = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(scored, own, 0.0), axis=-1)

    parts = (
        final.reshape(rows, choices, span, -1),
        batch.tokens[..., length - span :],
        batch.choices.scored[..., length - span :],
    )
    return jax.lax.map(scores, parts) / batch.choices.size
