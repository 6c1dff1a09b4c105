r"""What a chain samples: the unconstrained density of some latent sites, with the others held fixed.

    log p(u) + log p(y | u)        over all rows at once, no minibatch

with u the vector of `bnlora.program.density`. The activations below the lowest free adapter are computed
once; where the head alone is free, those of the last token are all that is kept, and a gradient costs the
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
from bnlora.program.model import Classifier
from bnlora.program.protocol import Model

FixAt = Literal["mean", "draw"]
"""Where sites that are not sampled are held: the mean of 256 draws of a fit, or one draw."""

Start = Literal["fit", "prior", "pathfinder", "zero"]
"""Where chains start: draws of the fit, of the prior, of Pathfinder, or where fits start, moved a little."""

MEAN_DRAWS = 256


@dataclass(frozen=True)
class Target:
    """A density over a vector, with the rows that it reads.

    Attributes:
        view: The unconstrained view of the (conditional) model.
        train: The rows, with activations up to the lowest free adapter.
        rows: The rows as they were given.
        held: How the sites that are not sampled were fixed, in words; "" where all are sampled.
        affine: The map from the coordinates that the sampler moves in to the vector; None where it moves the
            vector itself.
    """

    view: Density
    train: Batch
    rows: Batch
    held: str = ""
    affine: Affine | None = None

    @property
    def model(self) -> Model:
        """The classifier, conditional where sites are fixed."""
        return self.view.model

    @property
    def inputs(self) -> tuple[Any, Batch, Affine | None]:
        """What the density reads beside its position; to be passed into compiled programs as an argument."""
        return self.model.base.weights, self.train, self.affine

    def log_density(self, position: Float[Array, " p"], inputs: tuple) -> Float[Array, ""]:
        """Log prior plus log-likelihood of all rows, in nats, where the sampler stands."""
        weights, batch, affine = inputs
        vector = position if affine is None else jnp.asarray(affine.apply(position))
        return self.view.log_joint(vector, weights, batch)

    @property
    def log_constant(self) -> float:
        """What `log_density` lacks to be the density of position and labels, in nats: the Jacobian."""
        return 0.0 if self.affine is None else self.affine.log_determinant

    def log_likelihood(self, vector: Float[Array, " p"], inputs: tuple) -> Float[Array, ""]:
        """Log-likelihood of all rows, in nats."""
        weights, batch, _ = inputs
        return log_likelihood(self.model, weights, self.view.adapters(vector), batch)

    def vectors(self, positions: Float[np.ndarray, "... p"]) -> Float[np.ndarray, "... p"]:
        """The unconstrained vectors of positions of the sampler."""
        if self.affine is None:
            return positions
        return np.asarray(self.affine.apply(positions))

    def positions(self, vectors: Float[Array, "c p"]) -> Float[Array, "c p"]:
        """Where the sampler stands at given vectors: the inverse of `vectors`."""
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
    """Fix what is not sampled and cache what does not change.

    Args:
        key: Random key of the draws that fixed sites are held at.
        model: The classifier.
        train: Rows with labels.
        sites: Patterns of the sites to sample (`bnlora.program.conditional.matching`); all when omitted.
        given: A fit of the same model, whose parameters of the prior hold here too.
        fix_at: Where the other sites are held.
        console: Where to draw the progress bar of the cache.

    Raises:
        ValueError: When a pattern matches nothing, sites are to be fixed without a fit, labels are missing,
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
            "says where to hold them, or sample all"
        )
    values, held = _fixed(key, given, others, fix_at)
    conditional = condition(model, values, params)
    cached = cache_prefix(conditional, train, console=console)
    if conditional.start == model.base.num_layers:
        cached = _last_token(cached)
    return Target(density(conditional, params), cached, train, held)


def starts(
    key: Array, made: Target, given: Fit | None, init_strategy: Start, num_chains: int
) -> Float[Array, "c p"]:
    """Where the chains start, from different keys.

    Raises:
        ValueError: When they are to start from a fit and there is none.
    """
    keys = jax.random.split(key, num_chains)
    if init_strategy == "fit":
        if given is None:
            raise ValueError(
                "init_strategy='fit' needs `given`, a fit to start from; got none, use init_strategy='prior'"
            )
        names = tuple(made.view.shapes)
        return _each(lambda k: made.view.vector_of(_draw(k, given, names)), keys)
    if init_strategy == "prior":
        return _each(made.view.draw, keys)
    if made.affine is not None and init_strategy == "zero":  # draws of the Gaussian
        normals = jnp.stack([jax.random.normal(k, (made.view.size,)) for k in keys])
        return jnp.asarray(made.affine.apply(normals))
    # At zero the density of a bilinear adapter has a saddle, so every chain is moved off it a little.
    first = _each(made.view.start, keys)
    first = first + 0.01 * jax.random.normal(jax.random.fold_in(key, 1), first.shape)
    if init_strategy == "zero":
        return first

    def climb(k: Array, u: Array, inputs: Any) -> Array:
        return pathfinder(k, lambda v: made.view.log_joint(v, *inputs), u)

    return jax.jit(jax.vmap(climb, in_axes=(0, 0, None)))(keys, first, made.inputs[:2])


def _each(function: Callable[[Array], Array], keys: Array) -> Float[Array, "c p"]:
    """A function of every key, in one program: run as it is, a prior compiles each of its operations."""
    run = jax.jit(lambda k: jax.lax.map(function, k), compiler_options=options(0))
    return require_inside(run(keys))


def _draw(key: Array, given: Fit, names: Sequence[str] | None = None) -> dict[str, Array]:
    """A draw of the fit's sites: the named ones, or all."""
    drawn = draw_sites(key, given.model, given.guide, given.params).sites
    return drawn if names is None else {name: drawn[name] for name in names}


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
    """Raise `ValueError` unless the fit has a law for every latent site of the model."""
    known = jax.eval_shape(lambda key: _draw(key, given), jax.random.key(0))
    absent = [name for name in latent if name not in known]
    if absent:
        raise ValueError(
            f"`given` must be a fit of the same prior; it has no site {absent[0]!r}, only {', '.join(known)}"
        )


def _last_token(batch: Batch) -> Batch:
    """The rows cut to the one position that the head reads."""
    pick = np.arange(len(batch)), np.asarray(batch.last)

    def cut(x: Array) -> Array:
        return jnp.asarray(np.asarray(x)[pick][:, None])

    hidden = None if batch.hidden is None else cut(batch.hidden)
    return replace(batch, tokens=cut(batch.tokens), mask=cut(batch.mask), hidden=hidden, whole=False)
