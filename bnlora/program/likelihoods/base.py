r"""What every likelihood has, and the part of the network that it reads.

    logits_i = read(activations of row i),      theta ~ prior,      y_i ~ distribution(logits_i, theta)

A likelihood says which positions of the last layer it reads, which distribution the outcome has given the
logits, and which parameters theta (a noise scale, cutpoints) it adds to the prior. The defaults are those of
classes: y_i ~ Categorical(softmax(logits_i)), no parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Bool, Float, Int

from bnlora.adapters.sites import HEAD, Sites
from bnlora.data.batch import Batch, check_labels

PARAMETERS = "likelihood"
"""Key of the likelihood's parameters beside the adapters of a draw; their sites' names begin with it."""

Outcome = Literal["class", "votes", "value", "text"]

Parameters = Mapping[str, Array]


@dataclass(frozen=True)
class Upper:
    """The layers above the trunk, with adapters.

    Attributes:
        module: The base with its weights.
        hidden: Activations below the lowest adapted layer.
        mask: True at real tokens.
        num_layers: Number of layers of the base.
        first_layer: The lowest layer that runs.
        adapters: Adapters of the layers.
        head_adapter: Adapter of the head, or None.
    """

    module: Any
    hidden: Float[Array, "b t d"]
    mask: Bool[Array, "b t"]
    num_layers: int
    first_layer: int
    adapters: Mapping[str, Mapping[str, Array]]
    head_adapter: Mapping[str, Array] | None

    def final(self, at: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Activations after the last layer at some positions; the last layer runs only there."""
        return self.module.blocks(
            self.hidden,
            self.mask,
            first_layer=self.first_layer,
            stop=self.num_layers,
            adapters=self.adapters,
            at=at,
        )

    def head(self, final: Float[Array, "*b d"], rows: Int[Array, " c"] | None = None) -> Float[Array, "*b c"]:
        """Logits of some tokens, or of all."""
        return self.module.head(final, rows=rows, adapter=self.head_adapter)


@runtime_checkable
class Likelihood(Protocol):
    """How the logits of a row are read, and the distribution of its outcome.

    Subclass it for your own: the members without a default are `num_classes`, `check`, `check_rows`,
    `sites`, `logits`, `facts` and `record`. The defaults of the others are those of classes.
    """

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if the outcome is not a class."""
        ...

    @property
    def num_logits(self) -> int:
        """Number of logits of a row."""
        return self.num_classes

    @property
    def outcome(self) -> Outcome:
        """What is observed of a row: its class, votes for the classes, a value, or its text."""
        return "class"

    @property
    def is_softmax(self) -> bool:
        """Whether the outcome is the class of a row, distributed as the softmax of the logits.

        Functions that know the derivatives of this likelihood (evidence, Laplace) refuse others.
        """
        return type(self).distribution is Likelihood.distribution

    def check(self, base: Any) -> None:
        """Raise `ValueError` unless the base has what the likelihood reads."""
        ...

    def check_rows(self, batch: Batch) -> None:
        """Raise `ValueError` unless the rows have the form that the likelihood reads."""
        ...

    def check_outcomes(self, name: str, batch: Batch) -> None:
        """Raise `ValueError` unless every row has an outcome of this likelihood; `name` says which rows."""
        check_labels(name, batch, self.num_classes)

    def position(self, batch: Batch) -> Int[Array, " n"] | None:
        """The one position of each row that the head reads, or None if it reads several."""
        return None

    def sites(self, sites: Sites) -> Sites:
        """The sites with the rows of the head that the likelihood reads."""
        ...

    def logits(self, upper: Upper, batch: Batch) -> Float[Array, "n k"]:
        """Logits of every row."""
        ...

    def parameters(self) -> Parameters:
        """Sample the likelihood's own parameters, as a NumPyro program; most have none.

        Their sites are named `likelihood.<name>`. A prior that returns them under the key "likelihood",
        beside the adapters, takes the place of this program.
        """
        return {}

    def distribution(
        self, logits: Float[Array, "n k"], params: Parameters, batch: Batch
    ) -> dist.Distribution:
        """Distribution of the outcomes, one for each row."""
        return dist.Categorical(logits=logits)

    def observed(self, batch: Batch) -> Any:
        """The outcomes, as `distribution` takes them."""
        return batch.labels

    def simulate(self, key: Array, logits: Float[Array, "n k"], params: Parameters, batch: Batch) -> Batch:
        """The rows with outcomes drawn from the distribution."""
        drawn = self.distribution(logits, params, batch).sample(key)
        return replace(batch, labels=drawn.astype(batch.labels.dtype))

    def outputs(self, logits: Float[Array, "n k"], params: Parameters) -> Float[Array, "n m"]:
        """What a prediction keeps of every draw: log-probabilities of the classes, or moments of a value."""
        return jax.nn.log_softmax(logits)

    def log_prob(self, outputs: Float[Array, "*s n m"], batch: Batch) -> Float[Array, "*s n"]:
        """Log-probability of each row's outcome, in nats, from `outputs` with any axes of draws.

        A row without a label has NaN.
        """
        # JAX reads index -1 as the last class, but -1 marks a row without a label. Index C is out of range,
        # and `mode="fill"` returns NaN for it.
        labels = jnp.where(batch.labels < 0, outputs.shape[-1], batch.labels)
        labels = jnp.broadcast_to(labels, outputs.shape[:-1])
        return jnp.take_along_axis(outputs, labels[..., None], axis=-1, mode="fill")[..., 0]

    def facts(self, base: Any) -> dict[str, str]:
        """What a reader should know of it, by name."""
        ...

    def record(self) -> dict[str, Any]:
        """Values for a file, from which `likelihood_from` makes it again."""
        ...


def require_softmax(likelihood: Likelihood, what: str) -> None:
    """Raise `ValueError` unless the outcomes are classes with the softmax of the logits; `what` needs it."""
    if not likelihood.is_softmax:
        raise ValueError(
            f"{what} needs classes whose probabilities are the softmax of the logits; got "
            f"{type(likelihood).__name__}, for which bl.fit and bl.mcmc.sample_nuts work"
        )


def require_language_model(base: Any, classes: str) -> None:
    """Raise `ValueError` if the base is an encoder, whose head has no rows of tokens."""
    if getattr(base, "is_encoder", False):
        raise ValueError(
            f"{classes} need a base with a language-model head; this one is an encoder with a classification "
            f"head: give the classifier likelihood=bl.likelihoods.Labels({base.modules[HEAD][1]})"
        )


def require_plain_rows(batch: Batch, remedy: str) -> None:
    """Raise `ValueError` for rows with choices."""
    if batch.choices is not None:
        raise ValueError(f"the rows have several choices each, {remedy}")
