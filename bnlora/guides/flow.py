r"""Normalizing flows: a map f of a standard normal z, near the identity at the start, and location and scale.

| family         | law                                      | weights of f for d numbers, h hidden units   |
|----------------|------------------------------------------|----------------------------------------------|
| `row_shared`   | x = f(loc + scale z), one f for all rows | those of `iaf`, d the length of a row        |
| `iaf`          | x = loc + scale f(z), autoregressive     | (d+1) h + 2 b h (h+1) + 2 (h+1) d            |
| `spline`       | x = loc + scale f(z), spline couplings   | about (h+1) d (3 bins - 1) for two couplings |
| `block_neural` | x = loc + scale f(z), autoregressive     | d + 2 (d+1) d h + d (h+1)                    |

`row_shared` is the flow of the published code; its rows are independent given the network. The others are
families of vectors and take `over` (see `vector`): `iaf(over="all")` is a joint autoregressive flow over all
sites, if its size is affordable. Each flow has limits, which its label states. Affine flows change a scale by
at most a factor e^3 up or down, and with fewer hidden units than predecessors some entries do not depend on
all of these. Splines bend within five scales of the location and are the identity outside.

Reference: Kingma et al. (2016), inverse autoregressive flow; Durkan et al. (2019), neural spline flows; De
Cao et al. (2020), block neural autoregressive flow; Lin et al. (2026), arXiv 2601.21003, for the row-shared
one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform

from bnlora.guides.family import Family, per_site
from bnlora.guides.flows import (
    BlockNet,
    BlockNeural,
    Conditioner,
    Flow,
    RowSharedAffine,
    SplineCoupling,
    near_identity,
)
from bnlora.guides.flows import block_neural as blocks_flow
from bnlora.guides.flows import spline as spline_flow
from bnlora.guides.flows.autoregressive import LOG_SCALE_BOUND
from bnlora.guides.latent import Latent
from bnlora.guides.vector import MAX_PARAMETERS, Over, vector_family
from bnlora.priors.hyper import require_count, require_number

Weights = Callable[[Callable[[Array], Any]], Any]
"""Declares the flow's parameter from a function of a key, and returns its value."""


def row_shared(*, hidden: int = 16, blocks: int = 2, init_scale: float = 0.01) -> Family:
    """One autoregressive flow along the last axis of a site, shared by all rows, for each layer.

    A site of scalars has no row and stays Gaussian.

    Args:
        hidden: Width of the flow's hidden layers. In rows of more than `hidden + 1` numbers, some entries do
            not depend on all entries before them.
        blocks: Residual blocks of the flow's network (16 wide and 2 blocks in the published code).
        init_scale: Standard deviation of the base at the start, in unconstrained space.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: If a size is not a whole number of at least one, or `init_scale` is not a positive number.
    """
    require_number("init_scale", init_scale)
    _require_sizes(hidden=hidden, blocks=blocks)

    def law(latent: Latent) -> dist.Distribution:
        base = dist.Normal(latent.location(), latent.scale(init_scale)).to_event(latent.event_dim)
        if not latent.event_dim:
            return latent.constrained(base)
        size = latent.event[-1]
        init = partial(near_identity, batch=latent.batch, features=size, hidden=hidden, blocks=blocks)
        flow = RowSharedAffine(Conditioner(*latent.parameter("flow", init)), latent.event_dim)
        return latent.constrained(base, [flow, *latent.to_values()])

    return per_site(f"Gaussian with row-shared flow{_affine_limits(hidden)}", law, form="flow")


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
        hidden: Width of the hidden layers; the length of the vector if omitted. In vectors of more than
            `hidden + 1` numbers, some entries do not depend on all entries before them.
        blocks: Residual blocks of the network.
        over: The extent of one vector: `"layer"`, `"family"` or `"all"`.
        init_scale: Standard deviation of the base at the start, in unconstrained space.
        max_parameters: Largest number of parameters that is accepted.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: If `over` is unknown, a size is not a whole number of at least one, or `init_scale` is not
            a positive number. `Guide` raises it if the flow has too many parameters.
    """
    _require_sizes(hidden=1 if hidden is None else hidden, blocks=blocks)

    def width(size: int) -> int:
        return size if hidden is None else hidden

    def flow(weights: Weights, batch: tuple[int, ...], size: int) -> Flow:
        init = partial(near_identity, batch=batch, features=size, hidden=width(size), blocks=blocks)
        return RowSharedAffine(Conditioner(*weights(init)), 1)

    def count(size: int) -> int:
        h = width(size)
        return (size + 1) * h + blocks * 2 * (h + 1) * h + (h + 1) * 2 * size

    label = f"inverse autoregressive flow{_affine_limits(hidden)},"
    return _flow_family(label, flow, count, over, init_scale, max_parameters)


def spline(
    *,
    hidden: int = 16,
    bins: int = 8,
    couplings: int = 2,
    over: Over = "layer",
    init_scale: float = 0.01,
    max_parameters: int = MAX_PARAMETERS,
) -> Family:
    """Couplings by rational-quadratic splines over a vector. The law can be skewed and have several modes.

    Args:
        hidden: Hidden units of each coupling's network.
        bins: Bins of each spline.
        couplings: Number of couplings; the two halves of the vector change roles from one to the next.
        over: The extent of one vector: `"layer"`, `"family"` or `"all"`.
        init_scale: Standard deviation at the start, in unconstrained space.
        max_parameters: Largest number of parameters that is accepted.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: If `over` is unknown, a size is not a whole number of at least one, or `init_scale` is not
            a positive number. `Guide` raises it if the flow has too many parameters.
    """
    _require_sizes(hidden=hidden, bins=bins, couplings=couplings)

    def flow(weights: Weights, batch: tuple[int, ...], size: int) -> Flow:
        init = partial(
            spline_flow.near_identity,
            batch=batch,
            features=size,
            hidden=hidden,
            bins=bins,
            couplings=couplings,
        )
        return SplineCoupling(weights(init), size)

    def count(size: int) -> int:
        half = max(size // 2, 1)
        sides = [(half, max(size - half, 1)), (max(size - half, 1), half)]
        each = [(a + 1) * hidden + (hidden + 1) * b * (3 * bins - 1) for a, b in sides]
        return sum(each[step % 2] for step in range(couplings))

    label = "spline coupling flow, the identity beyond 5 scales,"
    return _flow_family(label, flow, count, over, init_scale, max_parameters)


def block_neural(
    *,
    hidden: int = 4,
    over: Over = "layer",
    init_scale: float = 0.01,
    max_parameters: int = MAX_PARAMETERS,
) -> Family:
    """Block neural autoregressive flow over a vector: each number has its own monotone network.

    The density of the flow's own draws costs one pass; the density at other points needs bisection.

    Args:
        hidden: Hidden units for each number.
        over: The extent of one vector: `"layer"`, `"family"` or `"all"`.
        init_scale: Standard deviation at the start, in unconstrained space.
        max_parameters: Largest number of parameters that is accepted.

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: If `over` is unknown, a size is not a whole number of at least one, or `init_scale` is not
            a positive number. `Guide` raises it if the flow has too many parameters.
    """
    _require_sizes(hidden=hidden)

    def flow(weights: Weights, batch: tuple[int, ...], size: int) -> Flow:
        init = partial(blocks_flow.near_identity, batch=batch, features=size, hidden=hidden)
        return BlockNeural(BlockNet(*weights(init)))

    def count(size: int) -> int:
        return size + 2 * (size + 1) * size * hidden + size * (hidden + 1)

    return _flow_family("block neural autoregressive flow", flow, count, over, init_scale, max_parameters)


def _require_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        require_count(name, size)


def _affine_limits(hidden: int | None) -> str:
    """The limits of an affine autoregressive flow, for its label."""
    scales = f", scales within e^{LOG_SCALE_BOUND:g} of the base's"
    # With fewer hidden units than predecessors, some predecessors are ignored: see `conditioner_masks`.
    return scales if hidden is None else f"{scales}, beyond {hidden + 1} numbers blind to some predecessors"


def _flow_family(
    label: str,
    flow: Callable[[Weights, tuple[int, ...], int], Flow],
    count: Callable[[int], int],
    over: Over,
    init_scale: float,
    max_parameters: int,
) -> Family:
    require_number("init_scale", init_scale)

    def law(
        prefix: str, batch: tuple[int, ...], size: int, start: Callable[[Array], Array]
    ) -> dist.Distribution:
        loc = numpyro.param(f"{prefix}.q.loc", start)
        scale = numpyro.param(
            f"{prefix}.q.scale",
            jnp.full((*batch, size), init_scale),
            constraint=constraints.softplus_positive,
        )
        unit = dist.Normal(jnp.zeros((*batch, size)), 1.0).to_event(1)
        bent = flow(lambda init: numpyro.param(f"{prefix}.q.flow", init), batch, size)
        # Apply the flow before the scale, so that its input is of order one for every scale of the site.
        return dist.TransformedDistribution(unit, [bent, AffineTransform(loc, scale)])

    return vector_family(
        label,
        law,
        count=lambda size: 2 * size + count(size),
        over=over,
        form="flow",
        max_parameters=max_parameters,
    )
