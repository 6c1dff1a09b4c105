r"""Values: regression on the contrast of two words, with Gaussian or Student-t noise.

    eta = logit(second word) - logit(first word)
    y = location + unit (b + eta + s e),      e ~ N(0, 1) or Student-t(df),      b ~ N(0, 1),      s ~ HalfNormal(1)

`location` and `unit` are the centre and spread of the values, from training rows; in these units the prior
of the noise scale s and of the intercept b has a scale of one. Student-t noise makes outliers cheap.
"""  # noqa: E501

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import check_option, check_positive
from bnlora.data.batch import Batch, check_form
from bnlora.program.likelihoods.base import PARAMETERS, Outcome, Parameters
from bnlora.program.likelihoods.reading import Contrast, contrast

Noise = Literal["normal", "student_t"]


@dataclass(frozen=True)
class Regression(Contrast):
    """Each row has a real value, in `Batch.outcomes`.

    The sites are `likelihood.intercept` and `likelihood.scale`, in units of `unit`.

    Attributes:
        reads: What reads the two logits, such as `Words`.
        location: Centre of the values, such as their mean over the training rows.
        unit: Spread of the values, such as their standard deviation over the training rows.
        noise: Distribution of the noise, "normal" or "student_t".
        df: Degrees of freedom of Student-t noise; not used by normal noise.

    Raises:
        ValueError: If `unit` or `df` is not positive, `noise` is unknown, or `reads` has not exactly two
            classes.

    Example:
        >>> likelihood = bl.likelihoods.Regression(bl.likelihoods.Words([3, 5]), location=2.5, unit=1.0)
        >>> model = bl.Classifier(base, sites, bl.priors.normal(), likelihood=likelihood)
        >>> [name for name in bl.priors.declared.declared(model.prior).latent if "likelihood" in name]
        ['likelihood.intercept', 'likelihood.scale']
    """

    location: float = 0.0
    unit: float = 1.0
    noise: Noise = "normal"
    df: float = 4.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_option("noise", self.noise, get_args(Noise))
        check_positive({"unit": self.unit, "df": self.df})
        if not np.isfinite(self.location):
            raise ValueError(f"location must be finite; got {self.location}")

    @property
    def num_classes(self) -> int:
        """Zero: a value is not a class."""
        return 0

    @property
    def outcome(self) -> Outcome:
        """What is observed is a value."""
        return "value"

    def check_outcomes(self, name: str, batch: Batch) -> None:
        """Raise `ValueError` unless every row has a finite value."""
        check_form(name, batch)
        values = batch.outcomes
        if values is None or values.shape != (len(batch),):
            got = "none" if values is None else f"an array of shape {values.shape}"
            raise ValueError(
                f"the {name} rows must have one value each, as from bl.text_outcomes(..., "
                f'kind="values"); got {got}'
            )
        if not np.isfinite(np.asarray(values)).all():
            raise ValueError(f"the values of the {name} rows must be finite")

    def parameters(self) -> Parameters:
        """Sample intercept and noise scale."""
        return {
            "intercept": numpyro.sample(f"{PARAMETERS}.intercept", dist.Normal(0.0, 1.0)),
            "scale": numpyro.sample(f"{PARAMETERS}.scale", dist.HalfNormal(1.0)),
        }

    def distribution(
        self, logits: Float[Array, "n 2"], params: Parameters, batch: Batch
    ) -> dist.Distribution:
        """The distribution of the values."""
        return self.noise_of(self.outputs(logits, params))

    def noise_of(self, outputs: Float[Array, "*s n 2"]) -> dist.Distribution:
        """The distribution of values with these locations and scales."""
        loc, scale = outputs[..., 0], outputs[..., 1]
        if self.noise == "normal":
            return dist.Normal(loc, scale)
        return dist.StudentT(self.df, loc, scale)

    def observed(self, batch: Batch) -> Float[Array, " n"]:
        """The values."""
        assert batch.outcomes is not None  # `check_outcomes` comes first
        return batch.outcomes

    def simulate(self, key: Array, logits: Float[Array, "n 2"], params: Parameters, batch: Batch) -> Batch:
        """The rows with values drawn from the distribution."""
        return replace(batch, outcomes=self.distribution(logits, params, batch).sample(key))

    def outputs(self, logits: Float[Array, "n 2"], params: Parameters) -> Float[Array, "n 2"]:
        """Location and scale of the value of each row, in units of the values."""
        loc = self.location + self.unit * (params["intercept"] + contrast(logits))
        return jnp.stack([loc, jnp.broadcast_to(self.unit * params["scale"], loc.shape)], axis=-1)

    def log_prob(self, outputs: Float[Array, "*s n 2"], batch: Batch) -> Float[Array, "*s n"]:
        """Log-density of each row's value, in nats."""
        return self.noise_of(outputs).log_prob(self.observed(batch))

    def record(self) -> dict[str, Any]:
        """What is read, and the options."""
        options = {"location": self.location, "unit": self.unit, "noise": self.noise, "df": self.df}
        return {"kind": "regression", "reads": self.reads.record(), **options}
