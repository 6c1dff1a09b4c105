"""The contract of every prior, tested for each member of one table.

Densities are compared in float64, within rounding. Draws are compared at a level of 1e-3 for each factor of
each member, shared by Bonferroni among its weights or pairs: Kolmogorov-Smirnov for the margins, and for
correlations Fisher's atanh(r) ~ N(atanh(rho), 1 / (n - 3)). `prior_members` has the table,
`prior_laws` the laws.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.prior_laws import TINY, At
from builders.prior_members import CENTRE, MEMBERS
from builders.thorough import sample_of
from numpyro import handlers
from scipy import stats

from bnlora import guides
from bnlora.program.model import Classifier
from bnlora.testing import tiny_rows

SIZE, LEVEL = 3000, 1e-3
KEYS = jax.random.split(jax.random.key(0), SIZE)


def run(member, program):
    """One run of a prior: values of its sites and parameters, log-densities, supports, and adapters."""
    trace = handlers.trace(program)
    adapters = trace(member.sites)
    found = {n: s for n, s in trace.trace.items() if s["type"] in ("sample", "param")}
    sampled = {n: s for n, s in found.items() if s["type"] == "sample"}
    return {
        "values": {n: s["value"] for n, s in found.items()},
        "densities": {n: s["fn"].log_prob(s["value"]).sum() for n, s in sampled.items()},
        "inside": {n: s["fn"].support(s["value"]).all() for n, s in sampled.items()},
        "adapters": adapters,
    }


@cache
def exact(name):
    """A run of the prior, and the run that a guide starts from; compiled, in float64."""
    member = MEMBERS[name]

    @jax.jit
    def both(key):
        seeded = handlers.seed(member.prior, key)
        return run(member, seeded), run(
            member, handlers.substitute(seeded, substitute_fn=guides.init_to_base)
        )

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, both(jax.random.key(1)))


@cache
def drawn(name):
    """Parameters at one start, and weights of many draws under them: jit around vmap, float32."""
    member = MEMBERS[name]

    def parameters(key):
        trace = handlers.trace(handlers.seed(member.prior, key)).get_trace(member.sites)
        return {n: s["value"] for n, s in trace.items() if s["type"] == "param"}

    @jax.jit
    def program(keys):
        start = parameters(jax.random.key(99))
        fixed = handlers.substitute(member.prior, data=start)
        return start, jax.vmap(lambda key: handlers.seed(fixed, key)(member.sites))(keys)

    return program(KEYS)


def each(member, values):
    """Every factor of every family, with the values of its sites and parameters."""
    for site in member.sites.values():
        for factor in site.factors:
            yield f"{site.name}.{factor}", At(values, site, factor)


def named(member, values):
    """The same for the sites' names: factors, or the matrix that defines both."""
    for site in member.sites.values():
        for part in member.parts(site):
            yield f"{site.name}.{part}", At(values, site, part)


def weights(adapters, at):
    return np.asarray(adapters[at.site.name][at.factor], np.float64).reshape(SIZE, -1)


FIRST = {name.partition(" ")[0]: name for name in reversed(MEMBERS)}.values()
"""One member of each prior. Only `make slow` draws from the variants."""
VARIANTS = (
    "sparse_gp bases",
    "sparse_gp unwhitened lam",
    "sparse_gp weights lam",
    "sparse_gp random lam",
    "sparse_gp random scale",
    "normal learned",
    "normal random",
    "pooled_scales random",
    "core by layer",
)
"""Variants whose densities are compared in `make test` too: one of each form and of each kind of scale."""

every_member = pytest.mark.parametrize("name", sample_of(MEMBERS, {*FIRST, *VARIANTS}))
first_members = pytest.mark.parametrize("name", sample_of(MEMBERS, FIRST))


@pytest.mark.slow
@every_member
def test_the_log_density_of_every_site_is_the_oracles_and_no_site_is_without_one(name):
    """Sigma's condition number, below 20 here, and a hundred terms leave 1e-11 of float64."""
    member, (got, _) = MEMBERS[name], exact(name)
    expected = {
        prefix + suffix: np.sum(density)
        for prefix, at in named(member, got["values"])
        for suffix, density in member.density(at).items()
    }
    assert got["densities"].keys() == expected.keys()
    for site, density in expected.items():
        assert got["densities"][site] == pytest.approx(density, rel=1e-10, abs=1e-10), site


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sample_of([name for name, member in MEMBERS.items() if member.weights], {*FIRST, *VARIANTS})
)
def test_weights_are_the_stated_function_of_the_sites(name):
    member, (got, _) = MEMBERS[name], exact(name)
    for prefix, at in each(member, got["values"]):
        weights = got["adapters"][at.site.name][at.factor]
        np.testing.assert_allclose(weights, member.weights(at), rtol=1e-9, atol=1e-12, err_msg=prefix)


@pytest.mark.slow
@every_member
def test_shapes_and_dtype_are_those_of_the_sites_in_float64(name):
    member, (got, _) = MEMBERS[name], exact(name)
    member.sites.check(got["adapters"])
    for leaf in jax.tree.leaves((got["values"], got["adapters"])):
        assert leaf.dtype == np.float64
        assert np.all(np.isfinite(leaf))


@pytest.mark.slow
@every_member
def test_names_carry_family_and_factor(name):
    member, (got, _) = MEMBERS[name], exact(name)
    for site in got["values"]:
        family, factor, *_ = site.split(".")
        # The scale of a family can be a parameter, which has no density.
        assert factor in (*member.parts(member.sites[family]), "scale")


@pytest.mark.slow
@every_member
def test_guides_start_at_the_base_model_inside_every_support(name):
    """`b @ a` is zero, or that of the adapters at the centre of the prior."""
    _, start = exact(name)
    assert all(start["inside"].values()), start["inside"]
    assert all(np.isfinite(x) for x in start["densities"].values()), start["densities"]
    for family, pair in start["adapters"].items():
        centre = CENTRE[family] if "centered" in name else jax.tree.map(np.zeros_like, pair)
        np.testing.assert_array_equal(pair["b"] @ pair["a"], centre["b"] @ centre["a"])


@pytest.mark.slow
@every_member
def test_a_classifier_is_traced_under_the_prior(name):
    member = MEMBERS[name]
    model = Classifier(TINY, member.sites, member.prior, label_ids=(3, 7, 9))
    rows = tiny_rows(jax.random.key(4), 2)

    def logits(key):
        trace = handlers.trace(handlers.seed(model, key)).get_trace(TINY.weights, rows)
        return trace["y"]["fn"].logits

    assert jax.eval_shape(logits, jax.random.key(5)).shape == (2, 3)


@pytest.mark.slow
@first_members
def test_draws_have_the_stated_margins(name):
    member, (start, adapters) = MEMBERS[name], drawn(name)
    for prefix, at in each(member, start):
        if member.marginal is not None:
            u = member.marginal(at)(weights(adapters, at))
            p_values = [stats.kstest(column, "uniform").pvalue for column in u.T]
            assert min(p_values) * len(p_values) > LEVEL, prefix


@pytest.mark.slow
@first_members
def test_draws_have_the_stated_correlations(name):
    member, (start, adapters) = MEMBERS[name], drawn(name)
    for prefix, at in each(member, start):
        if member.joint is not None:
            w = weights(adapters, at)
            scores = member.score(w, member.marginal(at))
            pairs = np.triu_indices(w.shape[1], 1)
            got, expected = np.corrcoef(scores.T)[pairs], member.joint(at)[pairs]
            z = (np.arctanh(got) - np.arctanh(expected)) * (SIZE - 3) ** 0.5
            assert np.abs(z).max() < stats.norm.isf(LEVEL / 2 / len(z)), prefix


@pytest.mark.slow
@first_members
def test_one_run_without_jit_has_the_values_of_the_compiled_draws(name):
    """Both are in float32; the tolerance is a few dozen roundings of the largest weight."""
    member, (start, adapters) = MEMBERS[name], drawn(name)
    got = handlers.seed(handlers.substitute(member.prior, data=start), KEYS[0])(member.sites)
    for one, many in zip(jax.tree.leaves(got), jax.tree.leaves(adapters), strict=True):
        assert one.dtype == many.dtype == jnp.float32
        assert np.all(np.isfinite(many))
        np.testing.assert_allclose(one, many[0], atol=64 * np.finfo(np.float32).eps * np.abs(one).max())
