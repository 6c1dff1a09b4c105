r"""A classifier with some of its latent sites fixed at values.

    p(free | y, fixed)  is proportional to  p(y | free, fixed) p(free, fixed)

as a new classifier, which every fit and sampler of this library accepts. The whole prior program runs,
conditional on the fixed sites, so that their densities still inform free hyper-parameters. Layers whose
adapters do not depend on a free site belong to the frozen trunk: their activations are cached with those
below, and a gradient costs only the layers above.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers

from bnlora._util.compilation import options
from bnlora._util.typing import Adapters, Parameters
from bnlora.adapters.sites import Sites
from bnlora.program.density import Density, density
from bnlora.program.protocol import Model
from bnlora.program.trunk import Trunk

M = TypeVar("M", bound=Model)


def condition(model: M, values: Mapping[str, Array], params: Parameters | None = None) -> M:
    """The classifier with some latent sites fixed at values.

    Args:
        model: A `Classifier`.
        values: Constrained value of each site to fix, by name; if empty, the model itself is returned.
        params: Values of the prior's NumPyro parameters, if it has any.

    Returns:
        A new classifier, in whose prior only the other sites are latent.

    Raises:
        ValueError: If a name is not a latent site, a shape does not fit, no site is left free, or the prior
            has a parameter without a value.

    Example:
        >>> conditional = bl.condition(model, {"lm_head.a": jnp.zeros((1, 1, 16))})
        >>> bl.guides.Guide(conditional.prior, bl.guides.mean_field())
        Guide(4 parameters)
          lm_head.b (1, 2, 1): mean-field Gaussian, 4
    """
    if not values:
        return model
    whole = density(model, params or {})
    _check(whole, values)
    prior = model.prior

    def conditioned(sites: Sites) -> Adapters:
        # The bound prior, with the likelihood's parameters; it knows its sites.
        return handlers.condition(prior, data=dict(values))(sites)

    plain = model.with_prior(conditioned)
    view = density(plain, params or {})
    # By family and factor, which layers a free site changes: factors have the shape (layer, row, column).
    first, second = _two_places(view)
    moves = {
        name: {f: np.any(np.asarray(first[name][f] != second[name][f]), axis=(1, 2)) for f in first[name]}
        for name in view.model.sites
    }
    lowest = min([model.base.num_layers, *_moving_layers(model.sites, moves)])
    if model.kind == "tangent":  # its features include all adapters, also fixed ones
        lowest = model.sites.first_layer
    return plain.above(Trunk(plain.sites, lowest, {**model.fixed, **values}, first, moves))


def matching(latent: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    r"""The latent sites that match patterns, in the order of `latent`.

    Args:
        latent: Names of all latent sites.
        wanted: Regular expressions that must match a whole site name, or the names of families and of
            factors before a dot: `"lm_head"`, `"lm_head.a"`, `"tau"`, `r".*\.V"`.

    Raises:
        ValueError: If a pattern matches nothing; the message names the nearest sites.
    """
    chosen = set()
    for pattern in wanted:
        matches = {n for n in latent if re.fullmatch(rf"(?:{pattern})(?:\..*)?", n)}
        if not matches:
            near = difflib.get_close_matches(pattern, latent, n=3, cutoff=0.3) or list(latent)
            raise ValueError(f"{pattern!r} matches no latent site; nearest are {', '.join(near)}")
        chosen |= matches
    return tuple(name for name in latent if name in chosen)


def _check(view: Density, values: Mapping[str, Array]) -> None:
    for name in values:
        matching(tuple(view.shapes), [re.escape(name)])
    if set(values) >= set(view.shapes):
        raise ValueError("every latent site is fixed; leave at least one free")
    shapes = {name: np.shape(x) for name, x in jax.eval_shape(view.sites, np.zeros(view.size)).items()}
    for name, value in values.items():
        if np.shape(value) != shapes[name]:
            raise ValueError(f"the value of {name!r} needs shape {shapes[name]}; got {np.shape(value)}")


def _two_places(view: Density) -> tuple[Adapters, Adapters]:
    """Adapters at two random vectors, which differ in every coordinate.

    Prior programs are smooth, so an entry that depends on a free site is equal at both with probability zero.
    """
    places = np.random.default_rng(0).normal(size=(2, view.size)).astype(np.float32)
    both = jax.jit(lambda u: jax.lax.map(view.adapters, u), compiler_options=options())(places)
    both = jax.tree.map(np.asarray, both)  # as NumPy, because JAX would compile a program for each index
    return jax.tree.map(lambda x: jnp.asarray(x[0]), both), jax.tree.map(lambda x: jnp.asarray(x[1]), both)


def _moving_layers(sites: Sites, moves: Mapping[str, Mapping[str, np.ndarray]]) -> set[int]:
    """The layers with a factor that depends on a free site."""
    return {
        layer
        for name, site in sites.items()
        for factor in moves[name].values()
        for layer, moved in zip(site.layers, factor, strict=True)
        if moved
    }
