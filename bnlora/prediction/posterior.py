"""The protocol of posteriors, which prediction, metrics and comparison use, and the posterior of one point.

A posterior is any object that has a classifier and draws its adapters. No base class is needed: a `Fit`,
chains, the Gaussians, ensembles and your own objects are posteriors because they have these two members.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import handlers

from bnlora._util.checks import check_at_least, check_key
from bnlora._util.display import Showable, Shown, facts
from bnlora._util.typing import Adapters, Parameters
from bnlora.data.batch import Batch
from bnlora.program.draws import Draw
from bnlora.program.likelihoods import PARAMETERS
from bnlora.program.model import kind_of
from bnlora.program.protocol import Model


@runtime_checkable
class Posterior(Protocol):
    """Any object that draws a classifier's adapters: a `Fit`, or a member of `bnlora.infer.approximate`.

    Prediction and metrics use only these two members, so the same code measures every kind of inference.

    Example:
        >>> def spread(posterior: bl.Posterior):
        ...     return posterior.draw_adapters(key, 10)["lm_head"]["b"].std(0).shape
        >>> spread(fit)
        (1, 2, 1)
        >>> isinstance(fit, bl.Posterior)
        True
    """

    @property
    def model(self) -> Model:
        """The classifier."""
        ...

    def draw_adapters(self, key: Array, num_draws: int) -> Adapters:
        """Posterior adapters with a leading draw axis; the same key gives the same draws.

        Raises:
            ValueError: If `key` is not a random key, or `num_draws` is below 1 or above the number of draws.
        """
        ...


@runtime_checkable
class SitePosterior(Posterior, Protocol):
    """A posterior that is a distribution over latent sites, such as a `Fit`.

    Comparisons that fix some sites at values, or weight draws by densities, need the sites and not only the
    adapters.
    """

    @property
    def guide(self) -> Callable[..., Any]:
        """The program of the distribution."""
        ...

    @property
    def params(self) -> Parameters:
        """NumPyro parameters of prior and guide."""
        ...

    @property
    def train(self) -> Batch:
        """The training rows."""
        ...

    def draws(self, key: Array, num_draws: int) -> tuple[Draw, Adapters]:
        """Draws of the sites with log-densities under prior and guide, and their adapters."""
        ...


@dataclass(frozen=True, repr=False, eq=False)  # arrays cannot be compared by one truth value
class PointPosterior(Shown):
    """The posterior of one set of adapters: every draw is that point.

    Use it to predict with adapters from elsewhere, such as those of the PEFT library.

    Attributes:
        model: The classifier.
        adapters: One pair of factors for each family of the model's sites, without an axis of draws.

    Raises:
        ValueError: If the adapters do not have the names and shapes of the model's sites.

    Example:
        >>> adapters = {"lm_head": {"a": jnp.ones((1, 1, 16)), "b": jnp.zeros((1, 40, 1))}}
        >>> bl.save_peft(adapters, folder / "point", sites=sites, base=base)
        >>> imported = bl.load_peft(folder / "point", model.sites, head_rows=model.label_ids)
        >>> point = bl.PointPosterior(model, imported)
        >>> point
        PointPosterior(18 adapter weights)
        >>> bl.predict(key, point, rows, num_draws=1).probs.shape
        (8, 2)
    """

    model: Model
    adapters: Adapters

    def __post_init__(self) -> None:
        _check_adapters(self.model, self.adapters)

    @classmethod
    def untouched(cls, model: Model) -> "PointPosterior":
        """The base itself: all adapters are zero.

        Args:
            model: The classifier, whose adapters are left out.

        Raises:
            ValueError: If the likelihood has parameters of its own, which no value leaves out.

        Example:
            >>> base = bl.predict(key, bl.PointPosterior.untouched(model), rows, num_draws=1)
            >>> base.probs.shape
            (8, 2)
        """
        zeros = {
            name: {factor: jnp.zeros(shape) for factor, shape in site.shapes.items()}
            for name, site in model.sites.items()
        }
        return cls(model, zeros)

    def draw_adapters(self, key: Array, num_draws: int) -> Adapters:
        """The point, repeated along a leading draw axis; the key has no effect.

        Raises:
            ValueError: If `key` is not a random key, or `num_draws` is below 1.
        """
        check_key(key)
        check_at_least({"num_draws": num_draws}, 1)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_draws, *jnp.shape(x))), self.adapters)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """The model of the point, and its sites."""
        about = {"model": kind_of(self.model), "adapter weights": f"{self.model.sites.num_parameters:,}"}
        return (facts("Posterior of one point", about), *self.model.sites.overview)

    def __repr__(self) -> str:
        return f"PointPosterior({self.model.sites.num_parameters:,} adapter weights)"


def _check_adapters(model: Model, adapters: Any) -> None:
    """Raise `ValueError` unless the adapters have the names and shapes of the sites.

    Parameters of the likelihood, if it has any, are beside them under the key "likelihood".
    """
    if not isinstance(adapters, Mapping):
        raise ValueError(
            "expected adapters by family, such as those of bl.load_peft or one draw of a posterior; got a "
            f"{type(adapters).__name__}"
        )
    needed = {(name, f): shape for name, site in model.sites.items() for f, shape in site.shapes.items()}
    parameters = jax.eval_shape(handlers.seed(model.likelihood.parameters, 0))
    needed |= {(PARAMETERS, name): x.shape for name, x in parameters.items()}
    shapes = {(name, f): jnp.shape(x) for name, pair in adapters.items() for f, x in pair.items()}
    for place in sorted(needed | shapes):
        if needed.get(place) != shapes.get(place):
            expected, got = (of.get(place, "no such factor") for of in (needed, shapes))
            raise ValueError(
                "the adapters must have the names and shapes of the model's sites; expected for "
                f"{'.'.join(place)!r} {expected}, got {got}"
            )
