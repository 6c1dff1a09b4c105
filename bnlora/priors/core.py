r"""The core prior: one Gaussian matrix between fixed frames for each layer of a family.

    dW = s L U R^T / unit,      U_kl ~ N(0, 1),      L, R fixed with orthonormal columns
    (`bnlora.adapters.frames`)

Each module and layer has one inducing matrix, as in the first figure of the paper, with lam = 0. The adapter
is `a = R^T`, `b = s L U / unit`. So `s` is the prior standard deviation of a logit contrast in nats (exactly
on the tangent model, to first order on the network). Only U is random: the posterior has neither the scaling
and rotation invariances of two random factors nor their dead zone around zero.

References: Lin et al. (2026), Bayesian-LoRA, arXiv 2601.21003, for the inducing matrix; Nakajima and
Sugiyama (2011), JMLR 12, for the dead zone of two random factors.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import listed
from bnlora._util.typing import FACTORS, WEIGHT, Adapters
from bnlora.adapters.frames import Frame, Frames
from bnlora.adapters.sites import Site, Sites
from bnlora.priors.base import Prior, layers
from bnlora.priors.hyper import Hyper, hyper_value, require_positive

Scale = Hyper | Mapping[str, Hyper]


def core(frames: Frames, *, scale: Scale = 1.0, by_layer: bool = False) -> Prior:
    """A standard normal core between fixed frames, times one scale for each family.

    Args:
        frames: Frames of the families that the prior fills, from `bnlora.frames`.
        scale: Prior standard deviation of a logit contrast in nats, for all families or by family: a number,
            an array with one number for each layer, `learned(init_value)`, or a distribution of positive
            values.
        by_layer: Whether each layer has its own learned or random scale. If False, a family shares one.

    Returns:
        A prior with one sample site `<family>.U` of shape (layer, m_o, m_i) for each family, and
        `<family>.scale` if that is learned or random.

    Raises:
        ValueError: If a scale is not positive or belongs to a family without frames. The prior itself raises
            it if the frames do not belong to its sites, or if the sites request one factor only.

    Example:
        >>> prior = bl.priors.core(frames, scale=dist.HalfNormal(1.0))
        >>> sites = frames.sites.with_head_rows(2)  # as a Classifier of two classes has them
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(prior, key)).get_trace(sites)
        >>> [name for name, site in trace.items() if site["type"] == "sample"]
        ['lm_head.scale', 'lm_head.U']
    """
    scales = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(frames, scale)
    if set(scales) != set(frames):
        raise ValueError(
            f"scale must be one value, or one for each family {listed(tuple(frames))}; "
            f"got {listed(tuple(scales))}"
        )
    for name, value in scales.items():
        require_positive(f"scale of {name!r}", value)

    def prior(sites: Sites) -> Adapters:
        frames.check(sites)
        return {name: _adapter(frames, name, sites, scales[name], by_layer=by_layer) for name in sites}

    prior.frames = frames  # type: ignore[attr-defined]  # read by a tangent model of this prior
    return prior


def frames_of(prior: Prior) -> Frames | None:
    """The frames that span every update of a prior, or None if the prior has no frames."""
    return getattr(prior, "frames", None)


def _adapter(frames: Frames, name: str, sites: Sites, scale: Hyper, *, by_layer: bool) -> Mapping:
    site, frame = sites[name], frames[name]
    if site.factors != FACTORS:
        raise ValueError(
            f"the core prior fills both factors of {name!r} from one matrix; it cannot fill only "
            f"{site.factors[0]!r}: use by_family instead of per_factor"
        )
    start: Any = getattr(scale, "init_value", scale)
    each = by_layer or (not hasattr(scale, "sample") and jnp.ndim(start) > 0)
    spread = hyper_value(f"{name}.scale", scale, site=site if each else None)
    with layers(site):
        law = dist.Normal(jnp.zeros(frame.size), 1.0).to_event(2)
        U = numpyro.sample(f"{name}.U", law, infer={"init": "zero", WEIGHT: True})
    return filled(frame, site, spread, U)


def filled(frame: Frame, site: Site, scale: Any, U: Float[Array, "l m_o m_i"]) -> Mapping[str, Array]:
    """The adapter of a family whose cores are `U`, at a scale for all layers or one for each."""
    # In nats: `unit` is the standard deviation of a logit contrast under a standard normal U.
    weight = jnp.broadcast_to(scale / frame.unit, (site.depth,))
    left, right = jnp.asarray(frame.left), jnp.asarray(frame.right)
    scaled = numpyro.deterministic(core_name(site.name), weight[:, None, None] * U)
    # Divide by alpha / rank, so that the update does not depend on LoRA's alpha.
    return {"a": jnp.swapaxes(right, 1, 2), "b": left @ scaled / site.scale}


def core_name(family: str) -> str:
    """Name of the deterministic site with the update in the frames, L^T dW R."""
    return f"{family}.core"
