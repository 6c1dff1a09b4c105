"""A core prior in the terms of the controls: scales in nats, layers in use, law of the scales, rows in use.

| law           | the scales are                                                            |
|---------------|---------------------------------------------------------------------------|
| `fixed`       | those of the settings                                                     |
| `flat`        | chosen by the evidence, without a prior: type-II maximum likelihood       |
| `half-normal` | chosen by the evidence times a half-normal density of each scale          |
| `half-Cauchy` | the same with a half-Cauchy density, whose tail is heavier                |
| `log-normal`  | the same with a log-normal density around `width`, of log deviation one   |

`width` is the scale of that density, in nats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from bnlora._util.checks import check_option, check_positive, is_integer, is_positive, listed
from bnlora.adapters.sites import HEAD, Sites

Law = Literal["fixed", "flat", "half-normal", "half-Cauchy", "log-normal"]

LAWS: Mapping[str, Callable[[Any], dist.Distribution]] = MappingProxyType(
    {
        "half-normal": dist.HalfNormal,
        "half-Cauchy": dist.HalfCauchy,
        "log-normal": lambda width: dist.LogNormal(jnp.log(width), 1.0),
    }
)
"""Density of a scale as a function of its width."""

OFF = 1e-6
"""Scale in nats of what is switched off. Positive, because a core prior has no scale of zero."""


@dataclass(frozen=True)
class Settings:
    """A prior, and the rows that it meets.

    Attributes:
        scales: Prior standard deviation of a logit contrast in nats, by family; zero switches a family off.
            Under another law than `"fixed"` the search for the scales starts there.
        layers: Layers in use, by their number in the base. Families of the head are not in a layer.
        law: How the scales come about; see the table of this file.
        width: Width of the density of the scales in nats, for a law that has one.
        rows: Number of training rows in use: the first ones.

    Example:
        >>> Settings({"v_proj": 1.0, "slope": 0.0}, layers=(1,), rows=100)
        Settings(scales={'v_proj': 1.0, 'slope': 0.0}, layers=(1,), law='fixed', width=5.0, rows=100)
    """

    scales: Mapping[str, float]
    layers: tuple[int, ...]
    law: Law = "fixed"
    width: float = 5.0
    rows: int = 0


def check_settings(settings: Settings, sites: Sites, num_rows: int) -> None:
    """Raise `ValueError` unless the settings fit the families, their layers and the number of rows."""
    if set(settings.scales) != set(sites):
        raise ValueError(
            f"scales must have one number for each family {listed(tuple(sites))}; "
            f"got {listed(tuple(settings.scales))}"
        )
    for name, scale in settings.scales.items():
        if not (is_positive(scale) or (np.ndim(scale) == 0 and scale == 0)):
            raise ValueError(
                f"the scale of {name!r} must be a number of nats of at least 0, which is off; got {scale!r}"
            )
    known = layers_of(sites)
    if not set(settings.layers) <= set(known):
        raise ValueError(f"layers must be among {known}, those of the frames; got {settings.layers}")
    check_option("law", settings.law, get_args(Law))
    check_positive({"width": settings.width})
    if not is_integer(settings.rows) or not 2 <= settings.rows <= num_rows:
        nearest = f", nearest is {min(max(int(settings.rows), 2), num_rows)}" * is_integer(settings.rows)
        raise ValueError(f"rows must be an integer from 2 to {num_rows}; got {settings.rows!r}{nearest}")


def layers_of(sites: Sites) -> tuple[int, ...]:
    """Numbers of the layers that have families, increasing."""
    inner = (site for site in sites.values() if site.module != HEAD)
    return tuple(sorted({layer for site in inner for layer in site.layers}))


def in_use(settings: Settings, sites: Sites) -> dict[str, np.ndarray]:
    """Whether each layer of each family is in use."""
    return {
        name: np.array([
            settings.scales[name] > 0 and (site.module == HEAD or layer in settings.layers)
            for layer in site.layers
        ])
        for name, site in sites.items()
    }  # fmt: skip


def rounded(scale: float) -> float:
    """A scale with four significant digits, so that the numbers of the code are short and exact."""
    return float(f"{scale:.4g}")
