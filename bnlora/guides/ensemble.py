r"""A mixture of Gaussians over all sites jointly; each component has its own start.

    q(x) = 1/K sum_k prod_sites N(x_site; loc_k, scale_k^2)

One component is drawn for all sites together, so the mixture has K joint modes instead of products of
per-site modes. The weights are fixed, so the draw of a component needs no gradient. The bound is the evidence
bound of the mixture: it uses the entropy of q, not of the components.

Reference: Jaakkola and Jordan (1998) for mixtures as variational families; Lin et al. (2026), arXiv
2601.21003, name an ensemble as one of the choices of q(U).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from bnlora.guides.family import Family
from bnlora.guides.latent import Latent
from bnlora.guides.vector import placed
from bnlora.priors.hyper import require_count, require_number


def ensemble(*, size: int = 4, init_scale: float = 0.01) -> Family:
    """Mixture, with equal weights, of mean-field Gaussians over all sites that the pattern matches.

    Args:
        size: Number of components K. Each starts from its own random key.
        init_scale: Standard deviation at the start, in unconstrained space.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: If `size` is not a whole number of at least one, or `init_scale` is not a positive
            number.
    """
    require_count("the size of an ensemble", size)
    require_number("init_scale", init_scale)

    def build(latents: Sequence[Latent]) -> Mapping[str, dist.Distribution]:
        mixed = dist.Categorical(probs=jnp.full(size, 1 / size)).mask(mask=False)
        member = numpyro.sample(f"{latents[0].name}.q.member", mixed, infer={"is_auxiliary": True})
        values, log_q = {}, jnp.full(size, -jnp.log(size))
        for latent in latents:
            values[latent.name], by_member = _component(latent, size, init_scale, member)
            log_q = log_q + by_member
        total = jax.nn.logsumexp(log_q)  # log q(x) over all sites, in nats; counted once, with the first site
        return {
            latent.name: placed(latent, values[latent.name], total if latent is latents[0] else 0.0)
            for latent in latents
        }

    return Family(f"mixture of {size} mean-field Gaussians", build, joint=True)


def _component(latent: Latent, size: int, init_scale: float, member: Array) -> tuple[Array, Array]:
    """A draw of the chosen component, and its log-density under each component, shape (size,)."""

    def starts(key: Array) -> Array:
        return jnp.stack([latent.start(k) for k in jax.random.split(key, size)])

    shape = (size, *latent.shape)
    loc = latent.parameter("loc", starts)
    scale = latent.parameter("scale", jnp.full(shape, init_scale), constraints.softplus_positive)
    unit = dist.Normal(jnp.zeros(latent.shape), 1.0).to_event(len(latent.shape)).mask(mask=False)
    z = numpyro.sample(f"{latent.name}.q.z", unit, infer={"is_auxiliary": True})
    value = loc[member] + scale[member] * z
    log_q = dist.Normal(loc, scale).log_prob(value)
    return value, log_q.reshape(size, -1).sum(-1)
