r"""Classes that are completions of any length: multiple choice, and classes of several tokens.

    score_c = 1/|c| sum_j log p(token j of completion c | its context, tokens before j)
    p(y = c | x) = softmax_c(score_c)

The tokens' probabilities are normalised over the whole vocabulary, the scores over the choices of the row.
|c| is 1, or the length of the completion (`Choices.size`). Contexts may differ by choice.

Reference: Brown et al. (2020), Language models are few-shot learners, section 2.4, for both normalisations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Bool, Float, Int

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


PIECE = 64
"""Positions that pass the head together."""


def completion_scores(upper: Upper, batch: Batch) -> Float[Array, "n c"]:
    """Log-likelihood of every completion, divided by its `Choices.size`; 0 for an absent one.

    The last layer runs at the completions' positions only.
    """
    assert batch.choices is not None  # the caller has checked the rows
    rows, choices, length = batch.tokens.shape
    span = min(batch.choices.span, length - 1)  # columns that these rows do not use may have been cut
    # Choices end at the last column, so the tokens before their completions are at fixed positions.
    before = jnp.arange(length - span - 1, length - 1)
    final = upper.final(jnp.broadcast_to(before, (rows * choices, span)))
    tokens, scored = (x[..., length - span :].ravel() for x in (batch.tokens, batch.choices.scored))
    log_probs = _log_probs_of(upper, final.reshape(-1, final.shape[-1]), tokens, scored)
    return log_probs.reshape(rows, choices, span).sum(-1) / batch.choices.size


def _log_probs_of(
    upper: Upper, final: Float[Array, "p d"], tokens: Int[Array, " p"], scored: Bool[Array, " p"]
) -> Float[Array, " p"]:
    """Log-probability of the token of every scored position, and 0 elsewhere.

    Positions pass the head in pieces: the logits of all of them would take more memory than the layers. Most
    completions are far shorter than the longest one. Scored positions come first, so that pieces without any
    are skipped.
    """
    size = min(PIECE, len(tokens))
    order = jnp.argsort(~scored, stable=True)

    def in_pieces(values: Array) -> Array:
        filling = [(0, -len(tokens) % size), *((0, 0) for _ in values.shape[1:])]
        return jnp.pad(values[order], filling).reshape(-1, size, *values.shape[1:])

    def own(final: Array, tokens: Array) -> Array:
        log_probs = jax.nn.log_softmax(upper.head(final), axis=-1)
        return jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]

    one = _piecewise(_with_slopes(own, final[:size], tokens[:size]))
    found = jax.lax.map(one, (in_pieces(final), in_pieces(tokens), in_pieces(scored)))
    return jnp.zeros(len(tokens), found.dtype).at[order].set(found.ravel()[: len(tokens)])


Own = Callable[[Float[Array, "p d"], Int[Array, " p"]], Float[Array, " p"]]


def _piecewise(own: Own) -> Callable[[tuple[Array, Array, Array]], Array]:
    """A function of a piece, which computes nothing if no position of it is scored."""

    def one(piece: tuple[Array, Array, Array]) -> Array:
        final, tokens, scored = piece
        nothing = jnp.zeros(len(tokens), final.dtype)
        found = jax.lax.cond(scored.any(), own, lambda *_: nothing, final, tokens)
        return jnp.where(scored, found, 0.0)

    return one


def _with_slopes(own: Own, final: Float[Array, "p d"], tokens: Int[Array, " p"]) -> Own:
    """The same function, whose derivative is computed together with its value.

    The derivative of a position is a vector of the width of the model. To keep it takes less memory than to
    keep the logits, and less time than to compute these again. If the head itself is differentiated, because
    it is adapted, its logits are computed again.

    Args:
        own: A function of activations and tokens.
        final: Activations of the shape that it will get.
        tokens: Tokens of the shape that it will get.
    """
    traced = jax.make_jaxpr(own)(final, tokens)

    def of_all(final: Array, tokens: Array, *weights: Array) -> Array:
        """`own` with the weights of the head as arguments, because a rule cannot see what it closes over."""
        (found,) = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, weights))(final, tokens)
        return found

    value = jax.custom_jvp(of_all)

    @partial(value.defjvp, symbolic_zeros=True)
    def derivative(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

        def of_moving(*values: Array) -> Array:
            at = dict(enumerate(primals)) | dict(zip(moving, values, strict=True))
            return of_all(*at.values())

        values, along = ([x[i] for i in moving] for x in (primals, tangents))
        if moving != [0]:
            return jax.jvp(jax.checkpoint(of_moving), values, along)
        found, pull = jax.vjp(of_moving, *values)
        (slopes,) = pull(jnp.ones_like(found))
        return found, (slopes * along[0]).sum(-1)

    return lambda final, tokens: value(final, tokens, *traced.consts)
