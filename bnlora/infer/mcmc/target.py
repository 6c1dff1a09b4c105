r"""The target of a chain: the unconstrained density of some latent sites, with the others fixed.

    log p(u) + log p(y | u)        over all rows at once, no minibatch

with u the vector of `bnlora.program.density`. The activations below the lowest free adapter are computed
once. If only the head is free, only those of the last token are kept, and a gradient costs one pass of the
head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.checks import check_option
from bnlora._util.compilation import options
from bnlora.data.batch import Batch, check_rows
from bnlora.guides.affine import Affine
from bnlora.infer.mcmc.samplers import pathfinder
from bnlora.infer.svi.result import Fit
from bnlora.prediction.functions import log_likelihood
from bnlora.program.cache import cache_prefix
from bnlora.program.conditional import condition, matching
from bnlora.program.density import Density, density, require_inside
from bnlora.program.draws import draw_sites
from bnlora.program.likelihoods import Likelihood
from bnlora.program.model import Classifier
from bnlora.program.protocol import Model

FixAt = Literal["mean", "draw"]
"""Value of the sites that are not sampled: the mean of 256 draws of a fit, or one draw."""

Start = Literal["fit", "prior", "pathfinder", "zero"]
"""Where chains start: draws of the fit, the prior or Pathfinder, or where fits start, with small noise."""

MEAN_DRAWS = 256


@dataclass(frozen=True)
class Target:
    """A density over a vector, with the rows that it reads.

    Attributes:
        view: The unconstrained view of the (conditional) model.
        train: The rows, with activations up to the lowest free adapter.
        rows: The rows as they were passed, without these activations.
        held: How the sites that are not sampled were fixed, in words; "" if all are sampled.
        affine: The map from the sampler's coordinates to the vector; None if the sampler moves the vector.
    """

    view: Density
    train: Batch
    rows: Batch
    held: str = ""
    affine: Affine | None = None

    @property
    def model(self) -> Model:
        """The classifier, conditional on the fixed sites."""
        return self.view.model

    @property
    def inputs(self) -> tuple[Any, Batch, Affine | None]:
        """What the density reads besides the position; compiled programs take it as an argument."""
        return self.model.base.weights, self.train, self.affine

    def log_density(self, position: Float[Array, " p"], inputs: tuple) -> Float[Array, ""]:
        """Log prior plus log-likelihood of all rows, in nats, at a position of the sampler."""
        weights, batch, affine = inputs
        vector = position if affine is None else jnp.asarray(affine.apply(position))
        return self.view.log_joint(vector, weights, batch)

    @property
    def log_constant(self) -> float:
        """The constant log p(position, y) - `log_density`, in nats: the log-determinant of the map."""
        return 0.0 if self.affine is None else self.affine.log_determinant

    def log_likelihood(self, vector: Float[Array, " p"], inputs: tuple) -> Float[Array, ""]:
        """Log-likelihood of all rows, in nats."""
        weights, batch, _ = inputs
        return log_likelihood(self.model, weights, self.view.adapters(vector), batch)

    def vectors(self, positions: Float[np.ndarray, "... p"]) -> Float[np.ndarray, "... p"]:
        """The unconstrained vectors at positions of the sampler."""
        if self.affine is None:
            return positions
        return np.asarray(self.affine.apply(positions))

    def positions(self, vectors: Float[Array, "c p"]) -> Float[Array, "c p"]:
        """The positions of the sampler at vectors: the inverse of `vectors`."""
        if self.affine is None:
            return vectors
        return jnp.asarray(self.affine.invert(np.asarray(vectors)), vectors.dtype)


def target(
    key: Array,
    model: Classifier,
    train: Batch,
    *,
    sites: Sequence[str] | None,
    given: Fit | None,
    fix_at: FixAt,
    console: Console | None = None,
) -> Target:
    """Fix the sites that are not sampled and cache the activations that do not change.

    Args:
        key: Random key of the draws that give the values of fixed sites.
        model: The classifier.
        train: Rows with labels.
        sites: Patterns of the sites to sample (`bnlora.program.conditional.matching`); all when omitted.
        given: A fit of the same model, which gives the parameters of the prior.
        fix_at: Value of the other sites.
        console: Where to draw the progress bar of the cache.

    Raises:
        ValueError: If a pattern matches nothing, sites must be fixed and there is no fit, labels are missing,
            or the prior has parameters and there is no fit to give their values.
    """
    if isinstance(sites, str):
        raise ValueError(f"sites must be a list of names or patterns; got {sites!r}, write [{sites!r}]")
    check_option("fix_at", fix_at, get_args(FixAt))
    check_rows("training", train, model)
    params = {} if given is None else given.params
    latent = tuple(density(model, params).shapes)
    free = latent if sites is None else matching(latent, sites)
    if given is not None:
        _check_sites(given, latent)
    others = [name for name in latent if name not in free]
    if others and given is None:
        raise ValueError(
            f"{len(others)} sites are not sampled ({', '.join(others)}); pass `given`, a fit whose posterior "
            "gives their values, or sample all sites"
        )
    values, held = _fixed(key, given, others, fix_at)
    conditional = condition(model, values, params)
    cached = cache_prefix(conditional, train, console=console)
    if conditional.first_layer == model.base.num_layers:
        cached = _read_token(cached, model.likelihood)
    return Target(density(conditional, params), cached, train, held)


def starts(
    key: Array, chain_target: Target, given: Fit | None, init_strategy: Start, num_chains: int
) -> Float[Array, "c p"]:
    """Where the chains start, from different keys.

    Raises:
        ValueError: If they must start from a fit and there is none.
    """
    keys = jax.random.split(key, num_chains)
    if init_strategy == "fit":
        if given is None:
            raise ValueError(
                "init_strategy='fit' needs `given`, a fit to start from; got none, use init_strategy='prior'"
            )
        names = tuple(chain_target.view.shapes)
        return _each(lambda k: chain_target.view.vector_of(_draw(k, given, names)), keys)
    if init_strategy == "prior":
        return _each(chain_target.view.draw, keys)
    if (
        chain_target.affine is not None and init_strategy == "zero"
    ):  # standard normals become draws of the Gaussian
        normals = jnp.stack([jax.random.normal(k, (chain_target.view.size,)) for k in keys])
        return jnp.asarray(chain_target.affine.apply(normals))
    # The density of a bilinear adapter has a saddle at zero, so every chain gets a little noise.
    first = _each(chain_target.view.start, keys)
    first = first + 0.01 * jax.random.normal(jax.random.fold_in(key, 1), first.shape)
    if init_strategy == "zero":
        return first

    def climb(k: Array, u: Array, inputs: Any) -> Array:
        return pathfinder(k, lambda v: chain_target.view.log_joint(v, *inputs), u)

    return jax.jit(jax.vmap(climb, in_axes=(0, 0, None)))(keys, first, chain_target.inputs[:2])


def _each(function: Callable[[Array], Array], keys: Array) -> Float[Array, "c p"]:
    """A function of every key, in one program; without it, JAX compiles each operation by itself."""
    run = jax.jit(lambda k: jax.lax.map(function, k), compiler_options=options())
    return require_inside(run(keys))


def _draw(key: Array, given: Fit, names: Sequence[str] | None = None) -> dict[str, Array]:
    """A draw of the fit's sites: the named ones, or all."""
    sites = draw_sites(key, given.model, given.guide, given.params).sites
    return sites if names is None else {name: sites[name] for name in names}


def _fixed(
    key: Array, given: Fit | None, names: Sequence[str], fix_at: FixAt
) -> tuple[Mapping[str, Array], str]:
    if not names or given is None:
        return {}, ""
    count = MEAN_DRAWS if fix_at == "mean" else 1
    draw = jax.jit(lambda keys: jax.lax.map(lambda k: _draw(k, given, names), keys))
    draws = draw(jax.random.split(key, count))
    where = f"the mean of {count} draws" if fix_at == "mean" else "one draw"
    return {n: x.mean(0) for n, x in draws.items()}, f"{', '.join(names)} held at {where} of a fit"


def _check_sites(given: Fit, latent: Sequence[str]) -> None:
    """Raise `ValueError` unless the fit has every latent site of the model."""
    known = jax.eval_shape(lambda key: _draw(key, given), jax.random.key(0))
    absent = [name for name in latent if name not in known]
    if absent:
        raise ValueError(
            f"`given` must be a fit of the same prior; it has no site {absent[0]!r}, only {', '.join(known)}"
        )


def _read_token(batch: Batch, likelihood: Likelihood) -> Batch:
    """The rows cut to the one position that the head reads; completions are read at several."""
    position = likelihood.position(batch)
    if position is None:
        return batch
    pick = np.arange(len(batch)), np.asarray(position)

    def cut(x: Array) -> Array:
        return jnp.asarray(np.asarray(x)[pick][:, None])

    tokens, mask, cached = jax.tree.map(cut, (batch.tokens, batch.mask, batch.cached))
    return replace(batch, tokens=tokens, mask=mask, cached=cached, whole=False)
