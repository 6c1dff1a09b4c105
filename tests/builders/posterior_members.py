"""The posteriors, for the contract that each of them must keep; one line of `MEMBERS` adds one.

Their numbers are nobody's results: fits of no steps and Gaussians of given moments, so that almost nothing is
compiled. The head of one layer is adapted; `TANGENT` is its tangent model.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
from builders.unfitted import unfitted
from numpyro.infer.autoguide import AutoIAFNormal, AutoNormal

import bnlora as bl
from bnlora import guides
from bnlora.infer import approximate
from bnlora.infer.approximate.curvature import Diagonal
from bnlora.infer.approximate.swag import Moments
from bnlora.infer.approximate.training_free import Rotated
from bnlora.infer.core.scales import Scales
from bnlora.infer.mcmc.chains import Chains
from bnlora.infer.mcmc.samplers import Tuning
from bnlora.infer.mcmc.target import Target
from bnlora.infer.mcmc.whitened import whitened
from bnlora.infer.svi.elbo import initial_parameters
from bnlora.program.density import Density, density
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=1)
ROWS = tiny_rows(jax.random.key(2), 6)
SITES = bl.select(BASE, ["lm_head"], rank=1)
MODEL = bl.Classifier(BASE, SITES, bl.priors.horseshoe(), label_ids=(3, 5))
FRAMES = bl.frames(KEY, BASE, ["lm_head"], ROWS, label_ids=(3, 5), size=2)
TANGENT = bl.Tangent(bl.Classifier(BASE, FRAMES.sites, bl.priors.core(FRAMES), label_ids=(3, 5)))


def at_start(guide, model=MODEL) -> bl.Fit:
    """A fit of no steps."""
    start, constrain = initial_parameters(KEY, model, guide, BASE.weights, ROWS[:1], len(ROWS))
    return unfitted(model, guide, ROWS, constrain(start))


def of_family(model=MODEL, family=None) -> bl.Fit:
    """A fit of no steps of a family, independent Gaussians when omitted."""
    return at_start(guides.Guide(model.prior, guides.mean_field() if family is None else family), model)


def weights() -> dict:
    """Adapters of the model."""
    stream = np.random.default_rng(0)
    return {
        name: {f: stream.normal(size=s) for f, s in site.shapes.items()} for name, site in MODEL.sites.items()
    }


SIZE = sum(x.size for x in jax.tree.leaves(weights()))
ONE = np.ones(SIZE)
ROTATED = {"lm_head": Rotated(weights()["lm_head"]["a"], weights()["lm_head"]["b"], np.ones((1, 1)))}


@cache
def gaussian() -> bl.Gaussian:
    """Laplace's Gaussian of the tangent model under the core prior."""
    return bl.laplace(TANGENT, ROWS)


def chains(target: Target, view: Density) -> Chains:
    """Two chains of six draws."""
    vectors = np.random.default_rng(1).normal(size=(2, 6, view.size)).astype(np.float32)
    nothing = np.zeros((2, 6))
    reports = {"divergent": nothing > 0, "energy": nothing, "acceptance": nothing, "num_gradients": nothing}
    tuning = Tuning(vectors[:, 0], nothing[:, 0], nothing[:, 0], nothing[:, 0], np.ones(2, int))
    record = {"sampler": "NUTS", "bias": "none", "seconds": 1.0, "stopped": "done"}
    return Chains(target, vectors, reports, tuning, record)


def plain_chains() -> Chains:
    """Chains of the vector itself."""
    view = density(MODEL, {})
    return chains(Target(view, ROWS, ROWS), view)


def whitened_chains() -> Chains:
    """Chains in the coordinates of a Gaussian, of a tangent model."""
    view = gaussian().view
    return chains(whitened(Target(view, ROWS, ROWS), gaussian()), view)


def stochastic_chain() -> Chains:
    """One chain by stochastic gradients."""
    return approximate.sgld(KEY, MODEL, ROWS, approximate.Schedule(4, 0, 3), step_size=1e-4)


def core_fit() -> bl.CoreFit:
    """A fit around the Gaussian, with what led to it."""
    scales = Scales({"lm_head": 1.0}, -5.0, {"lm_head": -6.0}, -6.0, {"lm_head": 0.1})
    return bl.CoreFit(FRAMES, scales, gaussian(), of_family(TANGENT, guides.around(gaussian())), {"fit": 1.0})


def held(model: bl.Classifier, name: str) -> bl.Classifier:
    """The model with one site held at ones."""
    shape = dict(density(model, {}).shapes)[name]
    return bl.condition(model, {name: np.ones(shape, np.float32)})


class Member(NamedTuple):
    """A posterior.

    Attributes:
        make: Makes it.
        most: Draws that it has; None where it draws any number.
        model: "network" or "tangent".
        spread: Whether draws differ.
    """

    make: Callable[[], bl.Posterior]
    most: int | None = None
    model: str = "network"
    spread: bool = True


MEMBERS = {
    "Fit": Member(of_family),
    "Fit of a SiteFlow": Member(lambda: at_start(guides.SiteFlow(MODEL.prior, hidden=4, blocks=1))),
    "Fit of an AutoNormal": Member(lambda: at_start(AutoNormal(MODEL.prior))),
    "Fit of an AutoIAFNormal": Member(lambda: at_start(AutoIAFNormal(MODEL.prior, num_flows=1))),
    "Fit of a point": Member(lambda: of_family(MODEL.with_prior(bl.priors.point())), spread=False),
    "Fit with a site held": Member(lambda: of_family(held(MODEL, "lm_head.a"))),
    "Fit around a Gaussian": Member(
        lambda: of_family(TANGENT, guides.around(gaussian())), model="tangent"
    ),
    "CoreFit": Member(core_fit, model="tangent"),
    "Gaussian": Member(gaussian, model="tangent"),
    "Laplace": Member(
        lambda: approximate.Laplace(MODEL, weights(), "diagonal", Diagonal(ONE), ONE, 1.0, 0.0)
    ),
    "Swag": Member(lambda: approximate.Swag(MODEL, weights(), Moments(3, ONE, ONE, np.ones((2, SIZE))))),
    "TrainingFree": Member(lambda: approximate.TrainingFree(MODEL, ROTATED, 0.1)),
    "Ensemble": Member(lambda: approximate.Ensemble((of_family(), of_family()))),
    "PointPosterior": Member(lambda: bl.PointPosterior(MODEL, weights()), spread=False),
    "Chains": Member(plain_chains, most=12),
    "Chains of SGLD": Member(stochastic_chain, most=4),
    "Chains in a Gaussian's coordinates": Member(whitened_chains, most=12, model="tangent"),
}  # fmt: skip
