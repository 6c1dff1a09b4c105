r"""The model that evaluates both sides of a comparison: that of the second posterior.

Chains may sample some sites and fix the others. The comparison is then between

    p(free | y, fixed)      and      q(free)      of the approximation, with the same fixed values

For a fit, q(free) is the marginal law of the free sites. It equals the conditional law if the guide makes the
sites independent; otherwise it is wider. A posterior with draws of adapters but no sites is fixed at all
adapters that the free sites do not change. For an exact comparison, fit the conditional model `chains.model`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax import Array

from bnlora._util.checks import listed
from bnlora._util.typing import Adapters, Parameters
from bnlora.assess.comparison.side import Side
from bnlora.prediction.posterior import Posterior, SitePosterior
from bnlora.program.draws import adapters_at
from bnlora.program.protocol import Model


@dataclass(frozen=True)
class Problem:
    """The model of a comparison, and the sites that the approximation takes from the reference.

    Attributes:
        model: The classifier that evaluates draws of both sides.
        holds: Sites that the approximation takes from the reference.
        notes: Sentences that state which side fixes which sites.
    """

    model: Model
    holds: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def draw_adapters(self, key: Array, posterior: Posterior, num_draws: int) -> Adapters:
        """Adapters of the approximation, with the reference's values of the sites in `holds`."""
        if not self.holds:
            return posterior.draw_adapters(key, num_draws)
        if not isinstance(posterior, SitePosterior):
            return self.model.trunk.held(posterior.draw_adapters(key, num_draws))
        sites = posterior.draws(key, num_draws)[0].sites
        free = {name: values for name, values in sites.items() if name not in self.model.fixed}
        return jax.jit(partial(_adapters, self.model))(posterior.params, free)


def _adapters(model: Model, params: Parameters, free: Mapping[str, Array]) -> Adapters:
    return jax.lax.map(lambda sites: adapters_at(model, params, sites), dict(free))


def common_problem(posterior: Posterior, side: Side, other: str) -> Problem:
    """The model under which draws of both sides have the same meaning.

    Args:
        posterior: The approximation.
        side: The second posterior, or a stored reference.
        other: Name of the second posterior in sentences.

    Raises:
        ValueError: If both fix a site, at different values.
    """
    own_fixed, fixed = posterior.model.fixed, side.fixed
    unequal = [n for n in fixed if n in own_fixed and not np.array_equal(own_fixed[n], fixed[n])]
    if unequal:
        raise ValueError(
            "expected the same values of the sites that both posteriors fix; those of "
            f"{listed(unequal)} differ: fit the reference's model, `chains.model`"
        )
    holds = tuple(n for n in fixed if n not in own_fixed)
    notes = []
    if fixed:
        notes.append(f"both sides hold {listed(fixed)} at the values of the {other}")
    if holds:
        by_sites = "draws of the other sites are those of the whole fit, and so is k-hat"
        by_adapters = "adapters that the other sites change are those of the whole approximation"
        notes.append(by_sites if isinstance(posterior, SitePosterior) else by_adapters)
    if side.unknown:
        notes.append(f"only the {other} holds sites ({side.unknown}), for it was stored without their values")
    loose = [n for n in own_fixed if n not in fixed]
    if loose:
        notes.append(f"the approximation holds {listed(loose)}, which the {other} does not")
    model = side.model_for(posterior, holds)
    return Problem(model, holds, tuple(notes))
