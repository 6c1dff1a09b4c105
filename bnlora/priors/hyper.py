"""Hyper-parameters of a prior: constants, type-II maximum-likelihood parameters, or random variables.

| given                       | becomes                              | the bound then bounds               |
|-----------------------------|--------------------------------------|-------------------------------------|
| a number or an array        | itself                               | log p(y), at this value             |
| `learned(start)`            | `numpyro.param("<name>", start)`     | log p(y), maximised over the value  |
| a NumPyro distribution      | `numpyro.sample("<name>", ...)`      | log p(y), the value integrated out  |
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from bnlora.sites import Site
from bnlora.typing import FACTORS


@dataclass(frozen=True)
class Learned:
    """A hyper-parameter that the fit maximises over; made by `learned`."""

    start: float
    constraint: Any = field(default_factory=lambda: constraints.softplus_positive)


Hyper: TypeAlias = float | Array | Learned | dist.Distribution
ByFactor: TypeAlias = Hyper | Mapping[str, Hyper]
"""One hyper-parameter for both factors, or one for each as `{"a": ..., "b": ...}`."""


def learned(start: float, constraint: Any = constraints.softplus_positive) -> Learned:
    """Mark a hyper-parameter to be learned by type-II maximum likelihood.

    Args:
        start: Value at the start of a fit.
        constraint: NumPyro constraint of the value; positive by default.
    """
    return Learned(start, constraint)


def is_random(hyper: Hyper | None) -> bool:
    """Whether a hyper-parameter is a random variable of the prior."""
    return isinstance(hyper, dist.Distribution)


def hyper_value(name: str, hyper: Hyper, *, event: tuple[int, ...] = (), site: Site | None = None) -> Array:
    """The value of a hyper-parameter, declared under `name` where it is learned or random.

    Args:
        name: Name of the parameter or sample site.
        hyper: The hyper-parameter.
        event: Shape of the value, without the layer axis.
        site: The family whose layers each have a value of their own; one value serves them all when omitted.

    Returns:
        The value, shape `event`, or `(layer, *event)` with `site`.
    """
    shape = event if site is None else (site.depth, *event)
    if isinstance(hyper, Learned):
        return numpyro.param(name, jnp.full(shape, hyper.start), constraint=hyper.constraint)
    if isinstance(hyper, dist.Distribution):
        law, infer = hyper.expand(shape).to_event(len(event)), {"start": "median"}
        if site is None:
            return numpyro.sample(name, law, infer=infer)
        with numpyro.plate(f"{site.name}.layer", site.depth):
            return numpyro.sample(name, law, infer=infer)
    return jnp.broadcast_to(jnp.asarray(hyper, jnp.result_type(float)), shape)


def by_factor(name: str, hyper: ByFactor) -> dict[str, Hyper]:
    """One hyper-parameter for each factor, each checked to be positive.

    Raises:
        ValueError: When a factor is missing or unknown, or a value may not be positive.
    """
    values = dict(hyper) if isinstance(hyper, Mapping) else dict.fromkeys(FACTORS, hyper)
    if set(values) != set(FACTORS):
        raise ValueError(f"{name} must be one value, or one each for 'a' and 'b'; got {hyper}")
    for factor, value in values.items():
        require_positive(name if values[factor] is hyper else f"{name} of {factor!r}", value)
    return values


def require_positive(name: str, hyper: Hyper) -> None:
    """Raise `ValueError` unless every value that a hyper-parameter can take is positive."""
    if isinstance(hyper, jax.core.Tracer):
        return  # a value inside a compiled function: nothing to look at
    if isinstance(hyper, dist.Distribution):
        lower = getattr(hyper.support, "lower_bound", None)
        if lower is None or not np.all(np.asarray(lower) >= 0):
            raise ValueError(
                f"{name} must be positive; got {type(hyper).__name__}, which has other values too"
            )
        return
    value = hyper.start if isinstance(hyper, Learned) else hyper
    if isinstance(value, str) or not np.all(np.asarray(value) > 0):
        raise ValueError(f"{name} must be a positive number, `learned`, or a distribution; got {hyper}")
