"""Families of vectors: one law over all numbers of a layer, of a family of layers, or of several sites.

| `over`   | one vector is                          | how it is mapped to the sites                     |
|----------|----------------------------------------|---------------------------------------------------|
| "layer"  | one layer of a site (the default)      | a distribution with the layers as batch axis      |
| "family" | a site with all its layers             | an auxiliary site `<site>.q.vector`, reshaped     |
| "all"    | all the sites that the pattern matches | the same, split into all of them                  |
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array

from bnlora._util.checks import check_option
from bnlora.guides.family import Family, Form, per_site
from bnlora.guides.latent import Latent

Over = Literal["layer", "family", "all"]
VectorLaw = Callable[[str, tuple[int, ...], int, Callable[[Array], Array]], dist.Distribution]
"""`law(prefix, batch, size, start)`: declares parameters `<prefix>.q.*`, returns a law of `size` numbers."""

MAX_PARAMETERS = 50_000_000
"""Default limit on the parameters of a family: 200 MB in float32, three times that with Adam."""


def vector_family(
    label: str,
    law: VectorLaw,
    *,
    count: Callable[[int], int],
    over: Over = "layer",
    form: Form = "other",
    max_parameters: int = MAX_PARAMETERS,
) -> Family:
    """Make a family from a law of vectors.

    Args:
        label: Name of the family in the guide's repr.
        law: Declares parameters and returns the law of one vector.
        count: Number of parameters as a function of the length of a vector.
        over: The extent of one vector.
        form: As in `Family`.
        max_parameters: Largest number of parameters that is accepted.

    Raises:
        ValueError: If `over` is unknown. The family raises it if it would have too many parameters.
    """
    check_option("over", over, get_args(Over))

    def checked(prefix: str, batch: tuple[int, ...], size: int, start: Callable[[Array], Array]):
        _require_feasible(label, prefix, math.prod(batch), size, count, max_parameters)
        return law(prefix, batch, size, start)

    if over == "layer":
        return per_site(f"{label} over each layer", lambda latent: _by_layer(latent, checked), form=form)
    if over == "family":
        build = lambda latents: {n: q for one in latents for n, q in _joined([one], checked).items()}  # noqa: E731
        return Family(f"{label} over all layers together", build, form=form)
    return Family(label, lambda latents: _joined(latents, checked), joint=True, form=form)


def _by_layer(latent: Latent, law: VectorLaw) -> dist.Distribution:
    size = math.prod(latent.event)

    def start(key: Array) -> Array:
        return latent.start(key).reshape(*latent.batch, size)

    return latent.constrained(law(latent.name, latent.batch, size, start), latent.from_vector())


def _joined(latents: Sequence[Latent], law: VectorLaw) -> Mapping[str, dist.Distribution]:
    sizes = [math.prod(latent.shape) for latent in latents]

    def start(key: Array) -> Array:
        keys = jax.random.split(key, len(latents))
        return jnp.concatenate([one.start(k).reshape(-1) for one, k in zip(latents, keys, strict=True)])

    prefix = latents[0].name
    q = law(prefix, (), sum(sizes), start)
    vector = numpyro.sample(f"{prefix}.q.vector", q, infer={"is_auxiliary": True})
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return {
        one.name: placed(one, vector[end - size : end].reshape(one.shape))
        for one, size, end in zip(latents, sizes, ends, strict=True)
    }


def placed(latent: Latent, value: Array, log_density: Array | float = 0.0) -> dist.Delta:
    """A site at an unconstrained value whose density counts elsewhere; only the Jacobian is added here.

    Args:
        latent: The site.
        value: The value, unconstrained.
        log_density: Log-density to count here, divided evenly over the plates.
    """
    total = jnp.full(latent.batch, log_density / math.prod(latent.batch))
    for step in latent.to_values():
        moved = step(value)
        logdet = step.log_abs_det_jacobian(value, moved)
        total = total - logdet.reshape(*latent.batch, -1).sum(-1)
        value = moved
    return dist.Delta(value, total, event_dim=latent.site["fn"].event_dim)


def _require_feasible(
    label: str, name: str, copies: int, size: int, count: Callable[[int], int], limit: int
) -> None:
    total = copies * count(size)
    if total > limit:
        each = f" for each of {copies} layers" if copies > 1 else ""
        low_rank, diagonal = copies * size * 10, copies * size * 2
        raise ValueError(
            f"{label} over the {size:,} dimensions of {name!r}{each} has {total:,} parameters "
            f"({total * 4 / 2**30:,.1f} GiB), more than max_parameters={limit:,}; low_rank(rank=8) has "
            f"{low_rank:,}, mean_field() {diagonal:,}, and row_shared() shares one small flow among rows"
        )
