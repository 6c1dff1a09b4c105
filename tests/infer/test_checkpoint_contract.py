"""Priors and guides survive the disk: names, trees, shapes (also of scalars), types and values.

Nothing is compiled or fitted: a fit is made of numbers in the shapes that its programs declare.
"""

from types import SimpleNamespace

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from builders import guide_members, prior_members
from builders.thorough import EVERY, sample_of
from builders.unfitted import unfitted
from numpyro.distributions import constraints
from numpyro.infer import autoguide

import bnlora as bl
from bnlora.infer.svi.elbo import parameter_shapes
from bnlora.program.adapter_prior import AdapterPrior
from bnlora.program.likelihoods import Words
from bnlora.testing import tiny_rows

ROWS = tiny_rows(jax.random.key(2), 4)
FAMILIES = {name: member.make for name, member in guide_members.MEMBERS.items()}
FAMILIES |= {"delta": lambda scale: bl.guides.delta()}

SCALARS = ("sparse_gp random lam", "horseshoe", "pooled_scales learned")
"""Priors with scalar sites or parameters beside those of a layer, of a rank and of a matrix."""
AUTO = {
    "normal": autoguide.AutoNormal,
    "delta": autoguide.AutoDelta,
    "dense": autoguide.AutoMultivariateNormal,
    "low rank": autoguide.AutoLowRankMultivariateNormal,
    "flow, a tree of arrays": lambda prior: autoguide.AutoIAFNormal(prior, num_flows=2),
    "block flow, a tree of arrays": lambda prior: autoguide.AutoBNAFNormal(prior, num_flows=1),
}


def model_of(prior: str) -> SimpleNamespace:
    """A model without a language model: a prior of the table."""
    member = prior_members.MEMBERS[prior]
    base = SimpleNamespace(weights=None, mesh=None, config=SimpleNamespace(vocab_size=40))
    prior = AdapterPrior(member.sites, member.prior)
    return SimpleNamespace(
        prior=prior, sites=member.sites, base=base, likelihood=Words((3, 5)), num_classes=2
    )


def numbers(like, constraint, stream):
    """Numbers of some shape that a constraint allows, different ones where that is easy to say."""
    drawn = stream.normal(size=like.shape)
    positive = (constraints.positive, constraints.softplus_positive)
    value = np.exp(drawn) if constraint in positive else drawn
    return np.asarray(value if np.all(constraint(value)) else constraint.feasible_like(drawn), like.dtype)


def made(model, guide) -> bl.Fit:
    """A fit whose parameters are numbers of the right shapes."""
    shapes, allowed = parameter_shapes(model, guide, None, ROWS[:1], len(ROWS))
    stream = np.random.default_rng(0)
    params, last = (
        {n: jax.tree.map(lambda x, n=n: numbers(x, allowed[n], stream), tree) for n, tree in shapes.items()}
        for _ in range(2)
    )
    return unfitted(model, guide, ROWS, params, last)


def comes_back(folder, model, guide):
    """Write a fit and read it back."""
    before = made(model, guide)
    bl.save_fit(before, folder)
    after = bl.load_fit(folder, model, guide)
    for name in ("params", "last_params"):
        old, new = getattr(before, name), getattr(after, name)
        assert jax.tree.structure(old) == jax.tree.structure(new)
        for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            np.testing.assert_array_equal(x, y)
    return before


FIRST = {name.partition(" ")[0]: name for name in reversed(prior_members.MEMBERS)}.values()
"""One member of each prior."""


def mean_field(program):
    return bl.guides.Guide(program, bl.guides.mean_field())


@pytest.mark.slow
@pytest.mark.parametrize("prior", sample_of(prior_members.MEMBERS, FIRST))
def test_every_prior_and_every_guide(tmp_path, prior):
    """One member of each prior with an eighth of the guides; `make slow` has all pairs."""
    model, number = model_of(prior), list(prior_members.MEMBERS).index(prior)
    for place, make in enumerate(FAMILIES.values()):
        if EVERY or (number + place) % 8 == 0:
            comes_back(tmp_path, model, bl.guides.Guide(model.prior, make(0.1)))


@pytest.mark.parametrize("prior", SCALARS)
def test_priors_with_scalars(tmp_path, prior):
    model = model_of(prior)
    for guide in (mean_field(model.prior), bl.guides.SiteFlow(model.prior, hidden=4)):
        fit = comes_back(tmp_path, model, guide)
        assert any(np.shape(leaf) == () for leaf in jax.tree.leaves(fit.params))


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(AUTO, [name for name in AUTO if not name.startswith("block")]))
def test_autoguides(tmp_path, name):
    def prior(*_):
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        numpyro.sample("w", dist.Normal(0.0, tau).expand([3]).to_event(1))

    model = model_of("normal")
    model.prior = prior
    guide = AUTO[name](prior)
    comes_back(tmp_path, model, guide)
