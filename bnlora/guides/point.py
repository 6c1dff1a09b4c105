r"""Points, and points under dropout: families without a density; their objective does not bound the evidence.

`delta` maximises log p(y, x): a maximum a posteriori fit in the prior's own coordinates. `dropout` multiplies
each input of a factor by 0 or 1 / (1 - rate), with one mask for all rows and tokens, in fits and in
predictions. This is Monte Carlo dropout; a draw is a function, as for every guide.

Reference: Gal and Ghahramani (2016), Dropout as a Bayesian approximation.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from bnlora.guides.family import Family, per_site
from bnlora.guides.latent import Latent
from bnlora.priors.hyper import require_number


def delta() -> Family:
    """A point for every number: a maximum a posteriori fit. The objective is not a bound.

    Returns:
        A family for `Guide`.
    """

    def law(latent: Latent) -> dist.Distribution:
        value = latent.parameter("loc", latent.start)
        for step in latent.to_values():
            value = step(value)
        return dist.Delta(value, event_dim=latent.site["fn"].event_dim)

    return per_site("point (maximum a posteriori, not a bound)", law, has_density=False)


def dropout(*, rate: float = 0.1) -> Family:
    r"""A point whose input columns are dropped at random: Monte Carlo dropout. The objective is not a bound.

    Use it for factors, whose columns are the inputs of a layer: `{r".*\.a": dropout(), ".*": delta()}`.

    Args:
        rate: Probability of dropping a column, in (0, 1).

    Returns:
        A family for `Guide`.

    Raises:
        ValueError: If `rate` is outside (0, 1), or a site has no columns or is constrained.
    """
    require_number("the dropout rate", rate, upper=1.0)

    def law(latent: Latent) -> dist.Distribution:
        if latent.event_dim < 1 or latent.to_values():
            raise ValueError(f"dropout needs sites of unconstrained matrices; {latent.name!r} is not one")
        columns = (*latent.batch, *(1 for _ in latent.event[:-1]), latent.event[-1])
        kept = numpyro.sample(
            f"{latent.name}.q.kept",
            # No density: the masks belong to a randomised likelihood, not to a posterior.
            dist.Bernoulli(1 - rate).expand(columns).to_event(len(columns)).mask(mask=False),
            infer={"is_auxiliary": True},
        )
        value = latent.location() * kept / (1 - rate)
        return dist.Delta(jnp.asarray(value), event_dim=latent.event_dim)

    return per_site(f"point under dropout of {rate:g} (not a bound)", law, has_density=False)
