"""A latent site from the guide's side: unconstrained shape, start value, and parameters named after it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ReshapeTransform, Transform, biject_to
from numpyro.infer import init_to_median, init_to_sample

from bnlora._util.checks import check_key, check_option
from bnlora._util.typing import NOISE
from bnlora.priors.base import Start
from bnlora.priors.declared import is_improper, runnable


def init_to_base(site: Mapping[str, Any] | None = None) -> Any:
    """NumPyro start strategy: the start that the prior marks as `init`; without a mark, a draw of the prior.

    With the priors of this library, every guide then starts at the base model with a random `a`.

    Args:
        site: A site of a NumPyro trace; NumPyro passes it.

    Returns:
        The start value of the site, or the strategy itself without a site.

    Raises:
        ValueError: If the mark is unknown, or an improper law has no start value.
    """
    if site is None:
        return partial(init_to_base)  # as NumPyro's own strategies do; NumPyro reads `.func`
    if site["type"] == "sample" and not site["is_observed"]:
        start = site["infer"].get("init", "draw")
        if not isinstance(start, str):
            return jnp.broadcast_to(jnp.asarray(start, jnp.result_type(float)), site["fn"].shape())
        check_option(f"the mark `init` of {site['name']!r}", start, get_args(Start))
        if start == "zero":
            return jnp.zeros(site["fn"].shape())
        if is_improper(site["fn"]):
            raise ValueError(
                f"the site {site['name']!r} has an improper law, so its start cannot be drawn; give it a "
                f"start value: infer={{'init': 1.0}} in the prior, or the guide's "
                f"init_loc_fn=numpyro.infer.init_to_value(values={{{site['name']!r}: 1.0}})"
            )
        if start == "median":
            return init_to_median()(site)
    return init_to_sample()(site)


@dataclass(frozen=True)
class Latent:
    """One latent site of a prior.

    Attributes:
        site: The site's entry in a trace of the prior on shapes only; it has no numbers.
        support: The site's support.
        prior: The prior program. It is traced again if a start value needs the numbers of the site's law.
        init_loc_fn: NumPyro start strategy.
    """

    site: Mapping[str, Any]
    support: constraints.Constraint
    prior: Callable[..., Any]
    init_loc_fn: Callable[..., Any] = init_to_base

    @property
    def name(self) -> str:
        """Name of the site."""
        return self.site["name"]

    @property
    def is_noise(self) -> bool:
        """Whether the prior marks the site as noise that only completes a conditional."""
        return bool(self.site["infer"].get(NOISE))

    @property
    def to_support(self) -> Transform:
        """The map from real values to the support."""
        return biject_to(self.support)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unconstrained value, with the axes of plates first."""
        return self.to_support.inverse_shape(self.site["fn"].shape())

    @cached_property
    def event_dim(self) -> int:
        """Number of axes of the unconstrained value that are not those of plates."""
        return self.to_support.domain.event_dim + self.site["fn"].event_dim - self.support.event_dim

    @property
    def batch(self) -> tuple[int, ...]:
        """Lengths of the plates, such as `(layer,)`."""
        return self.shape[: len(self.shape) - self.event_dim]

    @property
    def event(self) -> tuple[int, ...]:
        """Unconstrained shape within the plates."""
        return self.shape[len(self.shape) - self.event_dim :]

    def start(self, key: Array) -> Array:
        """Unconstrained start value."""
        key = check_key(key)
        with handlers.block(), handlers.seed(rng_seed=key):
            entry = self.site if self._starts_at_zero else _trace(self.prior, jax.random.key(0))[self.name]
            site = {**entry, "value": None, "kwargs": {**entry["kwargs"], "rng_key": key}}
            value = self.init_loc_fn(site)
        return jnp.broadcast_to(self.to_support.inv(value), self.shape)

    @property
    def _starts_at_zero(self) -> bool:
        """Whether the start needs only the shape, so that the prior need not be traced."""
        return self.init_loc_fn is init_to_base and self.site["infer"].get("init") == "zero"

    def parameter(self, suffix: str, start: Any, constraint: Any = constraints.real) -> Any:
        """Declare the guide's parameter `<site>.q.<suffix>`; `start` is a value, or a function of a key."""
        return numpyro.param(f"{self.name}.q.{suffix}", start, constraint=constraint)

    def location(self) -> Array:
        """Parameter `loc` of the site's unconstrained shape, at the start value."""
        return self.parameter("loc", self.start)

    def scale(self, start: float) -> Array:
        """Parameter `scale` of the site's unconstrained shape, positive."""
        return self.parameter("scale", jnp.full(self.shape, start), constraints.softplus_positive)

    def from_vector(self) -> list[Transform]:
        """Transforms that map vectors, with plates as batch axes, to values in the support."""
        size = 1
        for length in self.event:
            size *= length
        reshape = [] if self.event == (size,) else [ReshapeTransform(self.event, (size,))]
        return reshape + self.to_values()

    def to_values(self) -> list[Transform]:
        """Transforms that map unconstrained values to values in the support."""
        free = getattr(self.support, "base_constraint", self.support) is constraints.real
        return [] if free else [self.to_support]

    def constrained(
        self, q: dist.Distribution, transforms: list[Transform] | None = None
    ) -> dist.Distribution:
        """The law `q` after some transforms, by default those from unconstrained values to the support."""
        chosen = self.to_values() if transforms is None else transforms
        return dist.TransformedDistribution(q, chosen) if chosen else q


def latents_of(
    prior: Callable[..., Any], init_loc_fn: Callable[..., Any] = init_to_base
) -> dict[str, Latent]:
    """The latent sites of a prior, in program order, from a trace that compiles and computes nothing.

    There is one exception: a support whose ends the prior computes must be computed.
    """
    sites: dict[str, dict[str, Any]] = {}
    key = jax.random.key(0)

    def look(key: Array) -> dict[str, constraints.Constraint]:
        trace = _trace(prior, key)
        sites.update({n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]})
        return {n: s["fn"].support for n, s in sites.items() if jax.tree.leaves(s["fn"].support)}

    computed = jax.jit(look)(key) if jax.eval_shape(look, key) else {}
    return {
        name: Latent(_shapes_alone(site), computed.get(name, site["fn"].support), prior, init_loc_fn)
        for name, site in sites.items()
    }


def _shapes_alone(site: dict[str, Any]) -> dict[str, Any]:
    """A site of a trace with shapes instead of tracers, which are invalid outside of the trace."""

    def shape(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.core.Tracer) else leaf

    return jax.tree.map(shape, {**site, "value": None})


def _trace(prior: Callable[..., Any], key: Array) -> dict[str, dict[str, Any]]:
    return handlers.trace(handlers.seed(runnable(prior), key)).get_trace()
