r"""Texts: language modelling. The outcome of a row is its text, token by token.

    log p(row | adapters) = sum_j log p(token_j | tokens before j),      over the tokens that are scored

The probabilities are normalised over the whole vocabulary. The tokens of a prompt are conditioned on and not
scored. One draw of the adapters serves a whole text, so the posterior predictive probability of a text is the
mean over draws of the product over its tokens.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from bnlora.adapters.sites import Sites
from bnlora.data.batch import Batch, check_form
from bnlora.program.likelihoods.base import Likelihood, Outcome, Parameters, Upper, require_language_model
from bnlora.program.likelihoods.completions import completion_scores


@dataclass(frozen=True)
class Texts(Likelihood):
    """The outcome is the text of the row, as from `bl.language_modelling`.

    Example:
        >>> model = bl.Classifier(base, sites, bl.priors.normal(), likelihood=bl.likelihoods.Texts())
        >>> model.num_classes, model.likelihood.outcome
        (0, 'text')
    """

    @property
    def num_classes(self) -> int:
        """Zero: a text is not a class."""
        return 0

    @property
    def num_logits(self) -> int:
        """One number for each row: its log-likelihood."""
        return 1

    @property
    def outcome(self) -> Outcome:
        """What is observed is a text."""
        return "text"

    def check(self, base: Any) -> None:
        """Raise `ValueError` for an encoder."""
        require_language_model(base, "texts")

    def check_rows(self, batch: Batch) -> None:
        """Raise `ValueError` unless every row is one text with scored tokens."""
        if batch.choices is None or batch.tokens.shape[1] != 1:
            got = "rows without them" if batch.choices is None else f"{batch.tokens.shape[1]} texts a row"
            raise ValueError(
                "the model reads rows of one text with scored tokens, as from bl.language_modelling; got "
                f"{got}"
            )

    def check_outcomes(self, name: str, batch: Batch) -> None:
        """Raise `ValueError` unless the rows are texts."""
        check_form(name, batch)
        self.check_rows(batch)

    def sites(self, sites: Sites) -> Sites:
        """The sites as they are: the likelihood reads all rows of the head."""
        return sites

    def logits(self, upper: Upper, batch: Batch) -> Float[Array, "n 1"]:
        """Log-likelihood of every text, in nats."""
        self.check_rows(batch)
        return completion_scores(upper, batch)

    def distribution(
        self, logits: Float[Array, "n 1"], params: Parameters, batch: Batch
    ) -> dist.Distribution:
        """A factor of this log-likelihood for each row: the tokens are in the batch."""
        return dist.Unit(logits[..., 0])

    def observed(self, batch: Batch) -> Float[Array, "n 0"]:
        """The value of a factor, which has no numbers."""
        return jnp.zeros((len(batch), 0))

    def simulate(self, key: Array, logits: Float[Array, "n 1"], params: Parameters, batch: Batch) -> Batch:
        """Refused: a text is drawn token by token (`bl.generate`), not from its log-likelihood.

        Raises:
            ValueError: Always.
        """
        raise ValueError("texts cannot be simulated from one pass of the model; simulate classes or values")

    def outputs(self, logits: Float[Array, "n 1"], params: Parameters) -> Float[Array, "n 1"]:
        """The log-likelihoods."""
        return logits

    def log_prob(self, outputs: Float[Array, "*s n 1"], batch: Batch) -> Float[Array, "*s n"]:
        """Log-likelihood of each text, in nats."""
        return outputs[..., 0]

    def facts(self, base: Any) -> dict[str, str]:
        """That all tokens are modelled."""
        return {"outcome": "the text of a row, token by token"}

    def record(self) -> dict[str, Any]:
        """Its name."""
        return {"kind": "texts"}
