r"""The prior's latent sites as one unconstrained vector, and its densities.

Every latent site x has a support. With NumPyro's bijection T to this support, u = T^{-1}(x) is unconstrained.
The vector contains the u of all sites, in the order of the trace, and

    log p(u) = log p(T(u)) + log |det dT/du|,      log p(u, y) = log p(y | T(u)) + log p(u)

with the minibatch's likelihood scaled by N / B by the plate of the model. Parameters of the prior are fixed.
Samplers and optimisers over vectors (`bnlora.infer.mcmc`, `bnlora.infer.approximate`) use this view.

Reference: Kucukelbir et al. (2017), Automatic differentiation variational inference, section 2.3.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from numpyro import handlers
from numpyro.distributions.transforms import biject_to

from bnlora._util.typing import Adapters, Parameters
from bnlora.guides import init_to_base
from bnlora.priors.declared import declared, require_proper, runnable
from bnlora.program.draws import adapters_at, log_density_of
from bnlora.program.protocol import Program


@dataclass(frozen=True)
class Density:
    """The joint density of a model over the unconstrained vector of its prior's latent sites.

    Attributes:
        model: The NumPyro model, with `prior` as an attribute.
        params: Values of the prior's NumPyro parameters.
        shapes: Unconstrained shape of each latent site by name, in the order of the vector.
        observed: Names of the factors and observed sites of the prior.
    """

    model: Any
    params: Parameters
    shapes: Mapping[str, tuple[int, ...]]
    observed: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    @property
    def places(self) -> dict[str, np.ndarray]:
        """Indices of every latent site in the vector."""
        return _cut(np.arange(self.size), self.shapes)

    def log_prior(self, vector: Float[Array, " p"]) -> Float[Array, ""]:
        """Log-density of the vector under the prior, in nats, with the log-determinants of T.

        It includes factors and observed sites of the prior, so it may not be normalised.
        """
        return self._log_density(self.model.prior, vector, ())

    def log_observed(self, vector: Float[Array, " p"]) -> Float[Array, ""]:
        """The part of `log_prior` that `draw` leaves out, in nats: the prior's factors and observed sites."""
        if not self.observed:
            return jnp.zeros(())
        trace, _ = self._at(self.model.prior, vector, ())
        return sum((jnp.sum(log_density_of(trace[name])) for name in self.observed), start=jnp.zeros(()))

    def log_joint(self, vector: Float[Array, " p"], *args: Any) -> Float[Array, ""]:
        """Log prior plus scaled log-likelihood, in nats; `args` are those of the model."""
        return self._log_density(self.model, vector, args)

    def sites(self, vector: Float[Array, " p"]) -> dict[str, Array]:
        """Constrained value of every latent site."""
        trace, _ = self._at(self.model.prior, vector, ())
        return {name: trace[name]["value"] for name in self.shapes}

    def adapters(self, vector: Float[Array, " p"]) -> Adapters:
        """The adapters that the prior makes of the vector."""
        return adapters_at(self.model, self.params, self.sites(vector))

    def vector(self, sites: Mapping[str, Array]) -> Float[Array, " p"]:
        """The vector of constrained sites: the inverse of `sites`.

        Raises:
            ValueError: If the names are not those of the latent sites, or a value is outside its support.
        """
        if set(sites) != set(self.shapes):
            raise ValueError(f"the latent sites are {sorted(self.shapes)}; got {sorted(sites)}")
        return require_inside(self.vector_of(sites))

    def vector_of(self, sites: Mapping[str, Array]) -> Float[Array, " p"]:
        """`vector` without checks, so that it can be compiled; see `require_inside`."""
        return self._joined(_trace(self.model.prior, jax.random.key(0), data={**self.params, **sites}))

    def start(self, key: Array) -> Float[Array, " p"]:
        """The start of fits: zero for sites whose prior requests this, a draw of the prior for others.

        It is a pure function, so that it can be compiled; see `require_inside`.
        """
        placed = handlers.substitute(self.model.prior, data=dict(self.params))
        trace = _trace(placed, key, substitute_fn=init_to_base)
        return self._joined(trace)

    def draw(self, key: Array) -> Float[Array, " p"]:
        """A draw of the prior's latent sites; a pure function, so that it can be compiled.

        Raises:
            ValueError: If a distribution of the prior is improper.
        """
        require_proper(self.model.prior)
        return self._joined(_trace(handlers.substitute(self.model.prior, data=dict(self.params)), key))

    def split(self, vector: Float[Array, " p"]) -> dict[str, Array]:
        """The unconstrained value of every latent site."""
        return _split(vector, self.shapes)

    def _joined(self, trace: Mapping[str, dict]) -> Float[Array, " p"]:
        parts = [biject_to(trace[n]["fn"].support).inv(jnp.asarray(trace[n]["value"])) for n in self.shapes]
        return jnp.concatenate([part.ravel() for part in parts])

    def _log_density(self, program: Callable, vector: Array, args: tuple) -> Array:
        trace, total = self._at(program, vector, args)
        for site in trace.values():
            if site["type"] == "sample":
                total = total + jnp.sum(log_density_of(site))
        return total

    def _at(self, program: Callable, vector: Array, args: tuple) -> tuple[dict, Array]:
        """The trace of a program at the vector, and the sum of the log-determinants of T, in nats."""
        free = _split(vector, self.shapes)
        log_dets = []

        def value(site: dict) -> Array | None:
            if site["type"] != "sample" or site["name"] not in free:
                return None
            transform, u = biject_to(site["fn"].support), free[site["name"]]
            x = transform(u)
            log_dets.append(jnp.sum(transform.log_abs_det_jacobian(u, x)))
            return x

        # A support may depend on earlier sites, so values are computed while the program runs.
        placed = handlers.substitute(program, data=dict(self.params))
        trace = _trace(placed, jax.random.key(0), *args, substitute_fn=value)
        return trace, sum(log_dets, start=jnp.zeros(()))


def require_inside(vectors: Float[Array, "... p"]) -> Float[Array, "... p"]:
    """The same vectors; raises `ValueError` if a site is on the edge of its support or outside."""
    # The inverse of a bijection is not finite on the edge of its support or outside.
    if not jnp.isfinite(vectors).all():
        raise ValueError("every site must lie inside its support; a value is on its edge or outside")
    return vectors


def density(model: Program, params: Parameters) -> Density:
    """The unconstrained view of a model's prior.

    Args:
        model: A NumPyro model with `prior` as an attribute.
        params: Values of the prior's NumPyro parameters by name, `{}` if it has none. Other names are
            ignored, so you can pass the `params` of a fit.

    Raises:
        ValueError: If the prior has no latent site, a discrete one, a name that the model owns, or a
            parameter without a value.
    """
    prior = declared(model.prior)
    prior.check()
    _require_values(prior.params, params)
    if not prior.latent:
        raise ValueError(
            "a density needs a prior with latent sites, such as priors.normal(); this one has none"
        )
    fixed = {name: params[name] for name in prior.params}
    shapes = {name: site.free for name, site in prior.latent.items() if site.free is not None}
    return Density(model, fixed, shapes, tuple(prior.observed))


def check_parameters(prior: Callable, params: Parameters) -> None:
    """Raise `ValueError` unless `params` has a value for every NumPyro parameter that the prior declares.

    Other names are allowed, because the `params` of a fit include those of the guide.
    """
    _require_values(declared(prior).params, params)


def _require_values(names: Sequence[str], params: Parameters) -> None:
    for name in names:
        if name not in params:
            near = difflib.get_close_matches(name, list(params), n=1, cutoff=0.0)
            raise ValueError(
                f"`params` must have a value for every parameter of the prior, as `fit.params` has; {name!r} "
                f"is missing, nearest is {near[0] if near else 'nothing'!r}"
            )


def _trace(program: Callable, key: Array, *args: Any, **values: Any) -> dict[str, dict]:
    # `seed` is the inner handler, because start strategies draw with the key that it has given to the site.
    seeded = handlers.seed(runnable(program), key)
    placed = handlers.substitute(seeded, **values) if values else seeded
    return handlers.trace(placed).get_trace(*args)


def _split(vector: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    return {name: part.reshape(shapes[name]) for name, part in _cut(vector, shapes).items()}


def _cut(vector: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The part of a vector that belongs to each site."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()]).tolist()
    return {name: vector[a:b] for name, (a, b) in zip(shapes, pairwise([0, *ends]), strict=True)}
