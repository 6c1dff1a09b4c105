r"""Ordered classes (grades) along the contrast of two words: the cumulative logit model.

    eta = logit(second word) - logit(first word)
    p(y <= c | eta) = sigmoid(cut_c - eta),      cut_c = logit(pi_1 + ... + pi_c),      pi ~ Dirichlet(alpha, ..., alpha)

so pi are the class probabilities of a text whose contrast is zero, and a larger contrast moves all mass to
higher grades. For two classes and pi = (1/2, 1/2) this is the softmax over the two words.

References: McCullagh (1980), Regression models for ordinal data, JRSS B 42; Betancourt (2019), Ordinal
regression, for the prior of the cutpoints.
"""  # noqa: E501

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import check_at_least, check_positive
from bnlora.data.batch import Batch
from bnlora.program.likelihoods.base import PARAMETERS, Parameters
from bnlora.program.likelihoods.reading import Contrast, contrast


@dataclass(frozen=True)
class Ordinal(Contrast):
    """Each class is a grade; higher grades are nearer to the second word.

    The class probabilities pi at contrast zero are the site `likelihood.rates`, with a Dirichlet prior.

    Attributes:
        reads: What reads the two logits, such as `Words`.
        num_grades: Number of grades.
        concentration: Concentration alpha of the Dirichlet prior of pi.

    Raises:
        ValueError: If there are fewer than two grades, `concentration` is not positive, or `reads` has not
            exactly two classes.

    Example:
        >>> likelihood = bl.likelihoods.Ordinal(bl.likelihoods.Words([3, 5]), num_grades=5)
        >>> bl.Classifier(base, sites, bl.priors.normal(), likelihood=likelihood).num_classes
        5
    """

    num_grades: int
    concentration: float = 2.0

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        check_at_least({"num_grades": self.num_grades}, 2)
        check_positive({"concentration": self.concentration})

    @property
    def num_classes(self) -> int:
        """Number of grades."""
        return self.num_grades

    def parameters(self) -> Parameters:
        """Sample the class probabilities of a text with contrast zero."""
        prior = dist.Dirichlet(jnp.full(self.num_grades, float(self.concentration)))
        return {"rates": numpyro.sample(f"{PARAMETERS}.rates", prior)}

    def distribution(
        self, logits: Float[Array, "n 2"], params: Parameters, batch: Batch
    ) -> dist.Distribution:
        """The categorical distribution of the grades."""
        return dist.Categorical(logits=self.outputs(logits, params))

    def outputs(self, logits: Float[Array, "n 2"], params: Parameters) -> Float[Array, "n c"]:
        """Log-probabilities of the grades.

        With upper and lower cutpoints a > b relative to eta: log(sigmoid(a) - sigmoid(b)) =
        log sigmoid(a) + log sigmoid(-b) + log(1 - exp(b - a)), which does not cancel in the tails.
        """
        below = jnp.cumsum(params["rates"])[:-1]
        above = jnp.cumsum(params["rates"][::-1])[::-1][1:]  # 1 - below, without cancellation
        tiny = jnp.finfo(below.dtype).tiny
        cuts = jnp.log(jnp.maximum(below, tiny)) - jnp.log(jnp.maximum(above, tiny))
        moved = cuts - contrast(logits)[:, None]
        low, high = jax.nn.log_sigmoid(moved), jax.nn.log_sigmoid(-moved)
        gap = jnp.maximum(moved[:, 1:] - moved[:, :-1], jnp.finfo(moved.dtype).eps)
        inner = low[:, 1:] + high[:, :-1] + jnp.log(-jnp.expm1(-gap))
        return jnp.concatenate([low[:, :1], inner, high[:, -1:]], axis=1)

    def record(self) -> dict[str, Any]:
        """What is read, and the sizes."""
        sizes = {"num_grades": self.num_grades, "concentration": self.concentration}
        return {"kind": "ordinal", "reads": self.reads.record(), **sizes}
