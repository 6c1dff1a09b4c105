"""Hyper-parameters of a prior: constants, type-II maximum-likelihood parameters, or random variables.

| argument                    | becomes                              | the bound is a bound on             |
|-----------------------------|--------------------------------------|-------------------------------------|
| a number or an array        | a constant                           | log p(y) at this value              |
| `learned(init_value)`       | `numpyro.param(name, init_value)`    | log p(y), maximised over the value  |
| a NumPyro distribution      | `numpyro.sample("<name>", ...)`      | log p(y), the value integrated out  |
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from bnlora._util.typing import FACTORS
from bnlora.adapters.sites import Site


@dataclass(frozen=True)
class Learned:
    """A hyper-parameter that the fit maximises over; `learned` makes it."""

    init_value: float
    constraint: Any = field(default_factory=lambda: constraints.softplus_positive)


Hyper: TypeAlias = float | Array | Learned | dist.Distribution
ByFactor: TypeAlias = Hyper | Mapping[str, Hyper]
"""One hyper-parameter for both factors, or one for each as `{"a": ..., "b": ...}`."""


def learned(init_value: float, constraint: Any = constraints.softplus_positive) -> Learned:
    """Mark a hyper-parameter to be learned by type-II maximum likelihood.

    Args:
        init_value: Value at the start of a fit.
        constraint: NumPyro constraint of the value; positive by default.

    Returns:
        A value for any hyper-parameter of a prior.
    """
    return Learned(init_value, constraint)


def is_random(hyper: Hyper | None) -> bool:
    """Whether a hyper-parameter is a random variable of the prior."""
    return isinstance(hyper, dist.Distribution)


def hyper_value(
    name: str,
    hyper: Hyper,
    *,
    event: tuple[int, ...] = (),
    site: Site | None = None,
    dims: tuple[str, ...] = (),
) -> Array:
    """The value of a hyper-parameter, declared under `name` if it is learned or random.

    Args:
        name: Name of the parameter or sample site.
        hyper: The hyper-parameter.
        event: Shape of the value, without the layer axis.
        site: The family whose layers each get their own value. If omitted, all layers share one value.
        dims: Names of the axes of `event`, such as `("rank",)`, for ArviZ.

    Returns:
        The value, shape `event`, or `(layer, *event)` with `site`.

    Raises:
        ValueError: If the hyper-parameter is a distribution of more than one number, or a value whose shape
            does not broadcast to the required shape.
    """
    shape = event if site is None else (site.depth, *event)
    if isinstance(hyper, Learned):
        return numpyro.param(name, jnp.full(shape, hyper.init_value), constraint=hyper.constraint)
    if isinstance(hyper, dist.Distribution):
        if hyper.event_shape:
            raise ValueError(f"{name} must be a distribution of a single number; got {_shown(hyper)}")
        law, infer = hyper.expand(shape).to_event(len(event)), {"init": "median", "dims": dims}
        if site is None:
            return numpyro.sample(name, law, infer=infer)
        with numpyro.plate(f"{site.name}.layer", site.depth):
            return numpyro.sample(name, law, infer=infer)
    value = jnp.asarray(hyper, jnp.result_type(float))
    # Check the shape here: the error of `broadcast_to` does not name the hyper-parameter.
    padded = (1,) * (len(shape) - value.ndim) + value.shape
    if len(padded) > len(shape) or any(n not in (1, m) for n, m in zip(padded, shape, strict=True)):
        raise ValueError(f"{name} needs a shape that broadcasts to {shape}; got {value.shape}")
    return jnp.broadcast_to(value, shape)


def by_factor(name: str, hyper: ByFactor) -> dict[str, Hyper]:
    """One hyper-parameter for each factor, checked to be positive.

    Raises:
        ValueError: If a factor is missing or unknown, or a value can be non-positive.
    """
    values = dict(hyper) if isinstance(hyper, Mapping) else dict.fromkeys(FACTORS, hyper)
    if set(values) != set(FACTORS):
        raise ValueError(f"{name} must be one value, or one each for 'a' and 'b'; got {sorted(values)}")
    for factor, value in values.items():
        require_positive(name if values[factor] is hyper else f"{name} of {factor!r}", value)
    return values


def require_positive(name: str, hyper: Hyper) -> None:
    """Raise `ValueError` unless every value that a hyper-parameter can take is positive and finite."""
    if not _inside(hyper, np.inf):
        raise ValueError(
            f"{name} must be a positive number, `learned`, or a distribution of positive values; "
            f"got {_shown(hyper)}"
        )


def require_unit(name: str, hyper: Hyper) -> None:
    """Raise `ValueError` unless every value that a hyper-parameter can take lies in (0, 1)."""
    if not _inside(hyper, 1.0):
        raise ValueError(
            f"{name} must lie strictly between 0 and 1: a number, `learned(init_value, "
            f"constraints.unit_interval)`, or a distribution such as `Beta`; got {_shown(hyper)}"
        )


def require_number(name: str, value: float, *, upper: float = np.inf) -> None:
    """Raise `ValueError` unless a setting that cannot be learned or random is a number in (0, upper)."""
    if isinstance(value, Learned | dist.Distribution) or not _inside(value, upper):
        wanted = "a positive number" if upper == np.inf else f"a number strictly between 0 and {upper:g}"
        raise ValueError(f"{name} must be {wanted}; got {_shown(value)}")


def require_count(name: str, value: Any) -> None:
    """Raise `ValueError` unless a setting is a whole number of at least 1."""
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")


def _inside(hyper: Any, upper: float) -> bool:
    """Whether every value that a hyper-parameter can take lies in (0, upper)."""
    if isinstance(hyper, jax.core.Tracer):
        return True  # inside a compiled function there is no value to check
    if isinstance(hyper, Learned):
        return _allows_only(hyper.constraint, upper) and _inside(hyper.init_value, upper)
    if isinstance(hyper, dist.Distribution):
        return _allows_only(hyper.support, upper)
    values = np.asarray(hyper)
    return values.dtype.kind in "fiu" and bool(np.all((values > 0) & (values < upper)))


def _allows_only(constraint: Any, upper: float) -> bool:
    """Whether a constraint keeps values within [0, upper]; its ends have probability zero."""
    constraint = getattr(constraint, "base_constraint", constraint)
    low, high = getattr(constraint, "lower_bound", -np.inf), getattr(constraint, "upper_bound", np.inf)
    if isinstance(low, jax.core.Tracer) or isinstance(high, jax.core.Tracer):
        return True
    return bool(np.all(np.asarray(low) >= 0) and np.all(np.asarray(high) <= upper))


def _shown(hyper: Any) -> str:
    """A hyper-parameter for an error message; the repr of a NumPyro distribution is only an address."""
    if isinstance(hyper, Learned):
        return f"learned({hyper.init_value}, {hyper.constraint})"
    return type(hyper).__name__ if isinstance(hyper, dist.Distribution) else repr(hyper)
