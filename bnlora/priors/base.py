r"""The parts of every prior: a law for one stack of matrices, applied to the factors of all families.

A *law* samples one factor of one family, for all layers at once: `law(site, factor) -> (layer, d_o, d_i)`.
A *prior* runs a law over every factor that its sites request. Sites can request some of the factors or
families (`Sites.only`); this is how priors are composed.

Guides and diagnostics of this library read these marks in the `infer` dictionary of a sample site:

| mark                | meaning                                                                           |
|---------------------|-----------------------------------------------------------------------------------|
| `init`              | start of the optimisation: "zero", a "draw" or the "median" of the prior, a value |
| `conditional_noise` | a standard normal that completes the conditional W \| U; one `lam` per matrix     |
| `weight`            | the site belongs to a factor and is not a hyper-parameter                         |
| `dims`              | names of the last axes of a hyper-parameter, such as `("rank",)`                  |
"""

from collections.abc import Callable
from typing import Literal, Protocol, get_args, runtime_checkable

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import check_option
from bnlora._util.typing import WEIGHT, Adapters
from bnlora.adapters.sites import Site, Sites
from bnlora.priors.hyper import Hyper, is_random

Start = Literal["draw", "zero", "median"]
Width = Literal["scaled", "unscaled"]
Law = Callable[[Site, str], Float[Array, "layer d_o d_i"]]

START: dict[str, Start] = {"a": "draw", "b": "zero"}
"""LoRA's start: `a` is a draw and `b` is zero, so that step 0 is the base model."""


@runtime_checkable
class Prior(Protocol):
    """A NumPyro program over the adapters of the selected sites."""

    def __call__(self, sites: Sites) -> Adapters:
        """Sample (or declare) every adapter of `sites` and return them."""
        ...


def each_factor(law: Law) -> Prior:
    """Make a prior that applies `law` to every factor of every family, independently.

    Args:
        law: Samples the weights of one factor, shape (layer, d_o, d_i), from a site and the name of the
            factor.

    Returns:
        A prior that fills the factors that its sites request.
    """

    def prior(sites: Sites) -> Adapters:
        return {name: {factor: law(site, factor) for factor in site.factors} for name, site in sites.items()}

    prior.__qualname__ = getattr(law, "__qualname__", prior.__qualname__)  # name in messages
    return prior


def layers(site: Site) -> numpyro.plate:
    """The plate over the layers of a family. Every value in it has the layer axis first.

    Args:
        site: The family.

    Returns:
        A NumPyro plate of size `site.depth`.
    """
    return numpyro.plate(f"{site.name}.layer", site.depth)


def require_width(width: Width) -> None:
    """Raise `ValueError` unless `width` is one of the options of `Width`."""
    check_option("width", width, get_args(Width))


def width_factor(site: Site, factor: str, width: Width) -> float:
    """The factor between a scale and a standard deviation: `1 / sqrt(d_i)` if scaled, else 1.

    With `1 / sqrt(d_i)`, an input of unit variance gives an output of unit variance.

    Args:
        site: The family.
        factor: `"a"` or `"b"`.
        width: `"scaled"` or `"unscaled"`.

    Returns:
        The factor that turns a scale into a standard deviation.

    Raises:
        ValueError: If `width` is unknown.
    """
    require_width(width)
    return site.shapes[factor][-1] ** -0.5 if width == "scaled" else 1.0


def sample_matrices(
    site: Site,
    factor: str,
    unit: Callable[[Array], dist.Distribution],
    sigma: Array,
    *,
    hyper: Hyper | None = None,
) -> Float[Array, "layer d_o d_i"]:
    """Sample one factor whose law is a scale family: `W = sigma z`.

    Args:
        site: The family.
        factor: `"a"` or `"b"`.
        unit: The law of one entry as a function of its standard deviation.
        sigma: Standard deviation of the entries; must broadcast against the factor's shape.
        hyper: The hyper-parameter behind `sigma`. If it is random, the site is `<family>.<factor>.z` with
            unit spread, and `W = sigma z`. This avoids the funnel of a random scale and weights of that
            scale, which guides and samplers handle badly. Otherwise the site is `<family>.<factor>`.

    Returns:
        The weights, shape (layer, d_o, d_i).
    """
    shape, name, infer = site.shapes[factor], f"{site.name}.{factor}", {"init": START[factor], WEIGHT: True}
    with layers(site):
        if is_random(hyper):
            z = numpyro.sample(f"{name}.z", unit(jnp.ones(shape)).to_event(2), infer=infer)
            return sigma * z
        law = unit(jnp.broadcast_to(jnp.asarray(sigma, jnp.result_type(float)), shape))
        return numpyro.sample(name, law.to_event(2), infer=infer)
