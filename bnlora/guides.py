r"""Normalizing-flow guides built on the prior alone, one small flow a family.

`SiteFlow` gives every latent site its own factor of q:

* a site marked `conditional_noise` (the `E` of the sparse GP): N(0, lam^2), one `lam` a layer in
  (0, lam_max], so that KL(q(W|U) || p(W|U)) = d_o d_i (lam^2/2 - log lam - 1/2) in closed form;
* a scalar site: a Gaussian with location and scale;
* every other site: x = f(loc + scale * z), z standard normal, with `f` an affine autoregressive
  map along the last axis whose weights all rows of the site share and each layer has its own of
  (`bnlora.flows`). It starts at the identity.

Reference: Lin et al. (2026), arXiv 2601.21003 (row-shared flow on the inducing matrix).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to
from numpyro.infer import init_to_sample

from bnlora.flows import Conditioner, RowSharedAffine, near_identity
from bnlora.typing import NOISE


def init_to_base(site: Mapping[str, Any] | None = None):
    """NumPyro start strategy: the value that a prior marked as `start`, else a draw of the prior.

    With the priors of this library every guide then starts at the base model with an informative `a`.
    """
    if site is None:
        return partial(init_to_base)  # NumPyro's own strategies do the same, and it reads `.func`
    if site["type"] == "sample" and not site["is_observed"] and site["infer"].get("start") == "zero":
        return jnp.zeros(site["fn"].shape())
    return init_to_sample()(site)


@dataclass(frozen=True)
class SiteFlow:
    """Guide with one Gaussian base and one row-shared flow for every latent site of a prior.

    Args:
        prior: The prior program, `model.prior`. It is traced once for shapes; the language model
            never is.
        hidden: Width of the flow's hidden layers.
        blocks: Residual blocks of the flow's network (16 wide and 2 blocks in the published code).
        init_scale: Standard deviation of the base at the start, in unconstrained space.
        lam_init: Start of every `lam`; small, so that optimisation finds the signal before noise.
        lam_max: Cap on `lam`. 1 is the full family; a smaller one is a restricted family.
        init_loc_fn: NumPyro start strategy for the location, e.g.
            `numpyro.infer.init_to_value(values={...})`; by default the start that the prior marks.

    Raises:
        ValueError: When a latent site is discrete, or `0 < lam_init < lam_max <= 1` fails.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def prior(*_):
        ...     return numpyro.sample("w", dist.Normal(0, 1).expand([3, 9]).to_event(2))
        >>> SiteFlow(prior)
        SiteFlow(1,608 parameters)
          w (3, 9): Gaussian with row-shared flow, 1,608
    """

    prior: Callable[..., Any]
    hidden: int = 16
    blocks: int = 2
    init_scale: float = 0.01
    lam_init: float = 0.01
    lam_max: float = 1.0
    init_loc_fn: Callable[..., Any] = init_to_base
    latent: Mapping[str, Mapping[str, Any]] = field(init=False, compare=False)

    def __post_init__(self):
        if not 0 < self.lam_init < self.lam_max <= 1:
            raise ValueError(
                f"lam needs 0 < lam_init < lam_max <= 1; got lam_init={self.lam_init}, lam_max={self.lam_max}"
            )
        trace = handlers.trace(handlers.seed(self.prior, jax.random.key(0))).get_trace()
        latent = {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
        for name, site in latent.items():
            if site["fn"].support.is_discrete:
                raise ValueError(f"SiteFlow needs continuous sites; {name!r} is {type(site['fn']).__name__}")
        object.__setattr__(self, "latent", latent)

    def __call__(self, *args, **kwargs) -> dict[str, Array]:
        """Run the guide; arguments (those of the model) are ignored. Returns the draws by site."""
        draws = {}
        for name, site in self.latent.items():
            q = self._noise(name, site) if _is_noise(site) else self._flow(name, site)
            frames = [numpyro.plate(f.name, f.size, dim=f.dim) for f in site["cond_indep_stack"]]
            draws[name] = _sample_inside(frames, name, q)
        return draws

    def __repr__(self) -> str:
        counts = self._counts()
        lines = [f"SiteFlow({sum(counts.values()):,} parameters)"]
        for name, site in self.latent.items():
            kind = "Gaussian with row-shared flow" if site["fn"].event_dim else "Gaussian"
            kind = f"noise with lam in (0, {self.lam_max:g}]" if _is_noise(site) else kind
            lines.append(f"  {name} {jnp.shape(site['value'])}: {kind}, {counts[name]:,}")
        return "\n".join(lines)

    def _counts(self) -> dict[str, int]:
        """Number of parameters by site."""
        trace = jax.eval_shape(lambda key: _param_values(handlers.seed(self, key)), jax.random.key(0))
        sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(value)) for name, value in trace.items()}
        return {s: sum(n for name, n in sizes.items() if name.startswith(f"{s}.q.")) for s in self.latent}

    def _noise(self, name: str, site: Mapping[str, Any]) -> dist.Distribution:
        fn = site["fn"]
        start = jnp.full(fn.batch_shape, self.lam_init)
        lam = numpyro.param(f"{name}.q.lam", start, constraint=constraints.interval(0.0, self.lam_max))
        width = jnp.expand_dims(lam, range(-fn.event_dim, 0))
        return dist.Normal(jnp.zeros(fn.shape()), width).to_event(fn.event_dim)

    def _flow(self, name: str, site: Mapping[str, Any]) -> dist.Distribution:
        fn = site["fn"]
        to_support = biject_to(fn.support)
        shape = to_support.inverse_shape(fn.shape())
        event_dim = to_support.domain.event_dim + fn.event_dim - fn.support.event_dim

        def start(key: Array) -> Array:
            with handlers.block(), handlers.seed(rng_seed=key):
                value = self.init_loc_fn(
                    {**site, "value": None, "kwargs": {**site["kwargs"], "rng_key": key}}
                )
            return jnp.broadcast_to(to_support.inv(value), shape)

        loc = numpyro.param(f"{name}.q.loc", start)
        scale = numpyro.param(
            f"{name}.q.scale", jnp.full(shape, self.init_scale), constraint=constraints.softplus_positive
        )
        base = dist.Normal(loc, scale).to_event(event_dim)
        transforms = []
        if event_dim:
            batch, features = shape[: len(shape) - event_dim], shape[-1]
            init = partial(
                near_identity, batch=batch, features=features, hidden=self.hidden, blocks=self.blocks
            )
            net = Conditioner(*numpyro.param(f"{name}.q.flow", init))
            transforms.append(RowSharedAffine(Conditioner(*net), event_dim))
        if fn.support is not constraints.real and not _is_real(fn.support):
            transforms.append(to_support)
        return dist.TransformedDistribution(base, transforms) if transforms else base


def _is_noise(site: Mapping[str, Any]) -> bool:
    return bool(site["infer"].get(NOISE))


def _is_real(support: constraints.Constraint) -> bool:
    base = getattr(support, "base_constraint", support)
    return base is constraints.real


def _param_values(program: Callable[..., Any]) -> dict[str, Array]:
    trace = handlers.trace(program).get_trace()
    return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}


def _sample_inside(plates: list, name: str, q: dist.Distribution) -> Array:
    if not plates:
        return numpyro.sample(name, q)
    with plates[0]:
        return _sample_inside(plates[1:], name, q)
