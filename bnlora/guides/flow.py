r"""Normalizing flows over a Gaussian base: x = f(loc + scale z), f near the identity at the start.

| family         | f                                               | parameters besides loc and scale     |
|----------------|-------------------------------------------------|--------------------------------------|
| `row_shared`   | affine autoregressive, one network for all rows | grow with columns, not with rows     |
| `iaf`          | affine autoregressive over a whole vector       | about 3 d h + 2 b h^2                |

`row_shared` is that of the published code; its rows are independent given the network. The vector families
take `over` (see `vector`): a joint autoregressive flow over all sites is `iaf(over="all")`, where that is
affordable.

Reference: Kingma et al. (2016), inverse autoregressive flow; Lin et al. (2026), arXiv 2601.21003.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from bnlora.flows import Conditioner, RowSharedAffine, near_identity
from bnlora.guides.family import Family, per_site
from bnlora.guides.latent import Latent
from bnlora.guides.vector import MAX_PARAMETERS, Over, vector_family


def row_shared(*, hidden: int = 16, blocks: int = 2, init_scale: float = 0.01) -> Family:
    """One autoregressive flow along the last axis of a site, shared by all rows, for each layer.

    A site of scalars has no row and stays Gaussian.

    Args:
        hidden: Width of the flow's hidden layers.
        blocks: Residual blocks of the flow's network (16 wide and 2 blocks in the published code).
        init_scale: Standard deviation of the base at the start, in unconstrained space.
    """

    def law(latent: Latent) -> dist.Distribution:
        base = dist.Normal(latent.location(), latent.scale(init_scale)).to_event(latent.event_dim)
        if not latent.event_dim:
            return latent.constrained(base)
        size = latent.event[-1]
        init = partial(near_identity, batch=latent.batch, features=size, hidden=hidden, blocks=blocks)
        flow = RowSharedAffine(Conditioner(*latent.parameter("flow", init)), latent.event_dim)
        return latent.constrained(base, [flow, *latent.to_values()])

    return per_site("Gaussian with row-shared flow", law)


def iaf(
    *,
    hidden: int | None = None,
    blocks: int = 1,
    over: Over = "layer",
    init_scale: float = 0.01,
    max_parameters: int = MAX_PARAMETERS,
) -> Family:
    """Inverse autoregressive flow over a whole vector.

    Args:
        hidden: Width of the hidden layers; as wide as the vector when omitted.
        blocks: Residual blocks of the network.
        over: What is one vector: `"layer"`, `"family"` or `"all"`.
        init_scale: Standard deviation of the base at the start, in unconstrained space.
        max_parameters: Refuse to be built with more.

    Raises:
        ValueError: When `over` is unknown. Building the guide raises it where the flow would be too large.
    """

    def width(size: int) -> int:
        return size if hidden is None else hidden

    def flow(prefix: str, batch: tuple[int, ...], size: int) -> RowSharedAffine:
        init = partial(near_identity, batch=batch, features=size, hidden=width(size), blocks=blocks)
        return RowSharedAffine(Conditioner(*numpyro.param(f"{prefix}.q.flow", init)), 1)

    def count(size: int) -> int:
        h = width(size)
        return 2 * size + (size + 1) * h + blocks * 2 * (h + 1) * h + (h + 1) * 2 * size

    return _flow_family("inverse autoregressive flow", flow, count, over, init_scale, max_parameters)


def _flow_family(
    label: str,
    flow: Callable[[str, tuple[int, ...], int], dist.transforms.Transform],
    count: Callable[[int], int],
    over: Over,
    init_scale: float,
    max_parameters: int,
) -> Family:
    def law(
        prefix: str, batch: tuple[int, ...], size: int, start: Callable[[Array], Array]
    ) -> dist.Distribution:
        loc = numpyro.param(f"{prefix}.q.loc", start)
        scale = numpyro.param(
            f"{prefix}.q.scale",
            jnp.full((*batch, size), init_scale),
            constraint=constraints.softplus_positive,
        )
        base = dist.Normal(loc, scale).to_event(1)
        return dist.TransformedDistribution(base, [flow(prefix, batch, size)])

    return vector_family(label, law, count=count, over=over, max_parameters=max_parameters)
