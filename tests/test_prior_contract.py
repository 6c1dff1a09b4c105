"""What every prior promises, checked for each member of one table: one line adds a prior.

Densities are compared in float64, within rounding. Draws are compared at a level of 1e-3 for each factor of
each member, shared by Bonferroni among its weights or pairs: Kolmogorov-Smirnov for the margins, and for
correlations Fisher's atanh(r) ~ N(atanh(rho), 1 / (n - 3)). `prior_laws` has the laws.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import prior_laws as law
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from prior_laws import (
    IID,
    ONE,
    SCALE,
    TINY,
    TWO,
    At,
    Member,
    extended,
    factors,
    mixture,
    quantiles,
    signs,
    white,
)
from scipy import stats

from bnlora import guides, priors
from bnlora.model import Classifier
from bnlora.priors import learned
from bnlora.testing import tiny_rows

SIZE, LEVEL = 3000, 1e-3
NORM, HALF, UNIFORM = stats.norm, stats.halfnorm, stats.uniform
HALF_NORMAL, ON_UNIT = dist.HalfNormal(1.0), dist.Uniform(0.0, 1.0)
RANDOM = {f: dist.HalfNormal(s) for f, s in SCALE.items()}
SIZED = {"rows": 3, "cols": 3, "scale": SCALE}
HALVED = {f: learned(s / 2) for f, s in SCALE.items()}
LEARNED = {f: learned(s) for f, s in SCALE.items()}
KEYS = jax.random.split(jax.random.key(0), SIZE)
CENTRE = {"q_proj": {f: np.full(ONE["q_proj"].shapes[f], 0.3) for f in "ab"}}


def unit(start):
    return learned(start, constraints.unit_interval)


def gp(**options):
    return priors.sparse_gp(**SIZED | options)


def bases(**options):
    return priors.sparse_gp(**SIZED | {"inducing": "bases"} | options)


def spiky(inclusion):
    return priors.spike_and_slab(scale=SCALE, inclusion=inclusion, spike=0.1)


def with_scale(density):
    """A density beside that of the random scale of `RANDOM`."""
    return lambda at: density(at) | {".scale": HALF(scale=SCALE[at.factor]).logpdf(at[".scale"])}


def sharing(marginal):
    """Weights that share a random scale: their signs alone are independent."""
    return {"marginal": marginal, "score": signs}


def weighed(marginal_of_b):
    """Priors that weigh ranks: `a` is normal."""
    return sharing(factors(a=PLAIN, b=marginal_of_b))


def at_lam(lam):
    return law.gp_law(lam=lambda at: lam)


def pooled(rho):
    return priors.pooled_sparse_gp(rho=rho, **SIZED)


def scales(spread):
    return priors.pooled_scales(priors.normal(scale=SCALE), spread=spread)


A, LAPLACE, VE = law.entries(law.plain), law.entries(law.laplace), white(".V", ".E")
V0 = white(".V_0", ".V", ".E")
PLAIN = IID["marginal"]
WIDE = mixture(**quantiles(HALF))
TAU = {"tau": stats.halfcauchy(scale=0.5), "local": stats.halfcauchy}
POOL = factors(a=A, b=extended(A, pool=NORM))

# One line a prior: its program, the log-density of its sites, the margins and correlations of its weights.
MEMBERS = {
    "sparse_gp": Member(gp(), VE, **IID),
    "sparse_gp random frames": Member(gp(frames=jax.random.key(5)), VE, **IID),
    "sparse_gp given frames": Member(gp(frames=law.FRAMES, lam=0.5), VE, **at_lam(0.5)),
    "sparse_gp bases": Member(bases(), VE, **IID),
    "sparse_gp bases kept": Member(bases(oversize="keep"), VE, **IID),
    "sparse_gp bases lam": Member(bases(lam=0.5), VE, **at_lam(0.5)),
    "sparse_gp unwhitened": Member(bases(form="unwhitened"), law.inducing, **IID),
    "sparse_gp unwhitened lam": Member(bases(form="unwhitened", lam=0.5), law.inducing, **at_lam(0.5)),
    "sparse_gp weights": Member(gp(form="weights"), law.conditional(1.0), **IID),
    "sparse_gp weights lam": Member(gp(form="weights", lam=0.5), law.conditional(0.5), **at_lam(0.5)),
    "sparse_gp lam": Member(gp(lam=0.5), VE, **at_lam(0.5)),
    "sparse_gp no noise": Member(gp(lam=0), white(".V"), **at_lam(0.0)),
    "sparse_gp learned lam": Member(gp(lam=unit(0.3)), VE, **law.gp_law(lam=lambda at: at[".lam"])),
    "sparse_gp random lam": Member(gp(lam=ON_UNIT), extended(VE, lam=UNIFORM), law.some_lam, None),
    "sparse_gp learned scale": Member(gp(scale=HALVED), VE, **law.times(0.5)),
    "sparse_gp random scale": Member(gp(scale=RANDOM), with_scale(VE), **sharing(WIDE)),
    "normal": Member(priors.normal(scale=SCALE), A, **IID),
    "normal learned": Member(priors.normal(scale=LEARNED), A, **IID),
    "normal random": Member(priors.normal(scale=RANDOM), with_scale(white(".z")), **sharing(WIDE)),
    "laplace": Member(priors.laplace(scale=SCALE), LAPLACE, lambda at: law.laplace(at).cdf),
    "laplace random": Member(
        priors.laplace(scale=RANDOM), with_scale(law.unit_laplace), **sharing(law.laplace_mixture(HALF))
    ),
    "spike_and_slab": Member(spiky(0.3), law.spiky(lambda at: 0.3), law.spiky_cdf(0.3)),
    "spike_and_slab learned": Member(
        spiky(unit(0.3)), law.spiky(lambda at: at[".inclusion"]), law.spiky_cdf(0.3)
    ),
    "spike_and_slab random": Member(
        spiky(ON_UNIT),
        extended(law.spiky(lambda at: at[".inclusion"]), inclusion=UNIFORM),
        **sharing(law.spiky_cdf(0.5)),
    ),
    "matrix_normal": Member(
        priors.matrix_normal(scale=SCALE, rows=learned(0.7), cols=0.9),
        law.entries(law.scaled(0.63)),
        **law.times(0.63),
    ),
    "matrix_normal random": Member(
        priors.matrix_normal(scale=SCALE, rows=HALF_NORMAL, cols=1.0),
        extended(white(".z"), row_scale=HALF),
        **sharing(WIDE),
    ),
    "ard": Member(priors.ard(gain=learned(0.7), scale=SCALE), A, **weighed(law.times(0.7)["marginal"])),
    "ard random": Member(
        priors.ard(gain=HALF_NORMAL, scale=SCALE), factors(a=A, b=extended(A, gain=HALF)), **weighed(WIDE)
    ),
    "horseshoe": Member(
        priors.horseshoe(scale=SCALE), factors(a=A, b=extended(A, **TAU)), **weighed(law.horseshoe())
    ),
    "regularized_horseshoe": Member(
        priors.regularized_horseshoe(slab=1.5, scale=SCALE),
        factors(a=A, b=extended(A, **TAU, slab=law.slab_law(1.5))),
        **weighed(law.horseshoe(slab=1.5)),
    ),
    "pooled_scales": Member(scales(0.3), POOL, **weighed(mixture(**law.log_normal(0.3)))),
    "pooled_scales learned": Member(scales(learned(0.3)), POOL, **weighed(mixture(**law.log_normal(0.3)))),
    "pooled_scales random": Member(
        scales(HALF_NORMAL),
        factors(a=A, b=extended(A, pool=NORM, **{"pool.spread": HALF})),
        **weighed(mixture(**law.log_normal_mixture(HALF))),
    ),
    "pooled_sparse_gp": Member(pooled(0.6), V0, **law.gp_law(rho=lambda at: 0.6)),
    "pooled_sparse_gp learned": Member(pooled(unit(0.6)), V0, **law.gp_law(rho=lambda at: 0.6)),
    "pooled_sparse_gp random": Member(pooled(ON_UNIT), extended(V0, rho=UNIFORM), PLAIN, None),
    "centered": Member(
        priors.centered(priors.normal(scale=SCALE), CENTRE), A, lambda at: lambda w: PLAIN(at)(w - 0.3)
    ),
    "subspace": Member(priors.subspace(scale=0.5), factors(a=white(), b=white(".core")), None, None),
    "subspace random": Member(
        priors.subspace(scale=HALF_NORMAL),
        factors(a=white(), b=extended(white(".core"), **{"core.scale": HALF})),
        None,
        None,
    ),
    "point": Member(priors.point(), white(), None, None),
    "per_factor": Member(
        priors.per_factor(a=gp(), b=priors.horseshoe(scale=SCALE)),
        factors(a=VE, b=extended(A, **TAU)),
        **weighed(law.horseshoe()),
    ),
    "by_family": Member(
        priors.by_family({"lm_head": priors.laplace(scale=SCALE), ".*_proj": gp()}),
        law.families(lm_head=LAPLACE, q_proj=VE),
        law.families(lm_head=lambda at: law.laplace(at).cdf, q_proj=PLAIN),
        sites=TWO,
    ),
}


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
    """In float64, compiled: a run of the prior, and the run that a guide starts from."""
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


def weights(adapters, at):
    return np.asarray(adapters[at.site.name][at.factor], np.float64).reshape(SIZE, -1)


every_member = pytest.mark.parametrize("name", MEMBERS)


@every_member
def test_the_log_density_of_every_site_is_the_oracles_and_no_site_is_without_one(name):
    """Sigma's condition number, below 20 here, and a hundred terms leave 1e-11 of float64."""
    member, (got, _) = MEMBERS[name], exact(name)
    expected = {
        prefix + suffix: np.sum(density)
        for prefix, at in each(member, got["values"])
        for suffix, density in member.density(at).items()
    }
    assert got["densities"].keys() == expected.keys()
    for site, density in expected.items():
        assert got["densities"][site] == pytest.approx(density, rel=1e-10, abs=1e-10), site


@every_member
def test_shapes_and_dtype_are_those_of_the_sites_in_float64(name):
    member, (got, _) = MEMBERS[name], exact(name)
    member.sites.check(got["adapters"])
    for leaf in jax.tree.leaves((got["values"], got["adapters"])):
        assert leaf.dtype == np.float64
        assert np.all(np.isfinite(leaf))


@every_member
def test_names_carry_family_and_factor(name):
    member, (got, _) = MEMBERS[name], exact(name)
    for site in got["values"]:
        family, factor, *_ = site.split(".")
        assert factor in member.sites[family].factors


@every_member
def test_guides_start_at_the_base_model_inside_every_support(name):
    """`b @ a` is zero, or that of the adapters which the prior is centred on."""
    _, start = exact(name)
    assert all(start["inside"].values()), start["inside"]
    assert all(np.isfinite(x) for x in start["densities"].values()), start["densities"]
    for family, pair in start["adapters"].items():
        centre = CENTRE[family] if "centered" in name else jax.tree.map(np.zeros_like, pair)
        np.testing.assert_array_equal(pair["b"] @ pair["a"], centre["b"] @ centre["a"])


@every_member
def test_a_classifier_is_traced_under_the_prior(name):
    member = MEMBERS[name]
    model = Classifier(TINY, member.sites, member.prior, label_ids=(3, 7, 9))
    rows = tiny_rows(jax.random.key(4), 2)

    def logits(key):
        trace = handlers.trace(handlers.seed(model, key)).get_trace(TINY.params, rows)
        return trace["y"]["fn"].logits

    assert jax.eval_shape(logits, jax.random.key(5)).shape == (2, 3)


@pytest.mark.slow
@every_member
def test_draws_have_the_stated_margins(name):
    member, (start, adapters) = MEMBERS[name], drawn(name)
    for prefix, at in each(member, start):
        if member.marginal is not None:
            u = member.marginal(at)(weights(adapters, at))
            p_values = [stats.kstest(column, "uniform").pvalue for column in u.T]
            assert min(p_values) * len(p_values) > LEVEL, prefix


@pytest.mark.slow
@every_member
def test_draws_have_the_stated_correlations(name):
    member, (start, adapters) = MEMBERS[name], drawn(name)
    for prefix, at in each(member, start):
        if member.joint is not None:
            w = weights(adapters, at)
            scores = member.score(w, member.marginal(at))
            pairs = np.triu_indices(w.shape[1], 1)
            got, expected = np.corrcoef(scores.T)[pairs], member.joint(at)[pairs]
            z = (np.arctanh(got) - np.arctanh(expected)) * (SIZE - 3) ** 0.5
            assert np.abs(z).max() < NORM.isf(LEVEL / 2 / len(z)), prefix


@pytest.mark.slow
@every_member
def test_one_run_without_jit_has_the_values_of_the_compiled_draws(name):
    """Float32 both; the tolerance is a few dozen roundings of the largest weight."""
    member, (start, adapters) = MEMBERS[name], drawn(name)
    got = handlers.seed(handlers.substitute(member.prior, data=start), KEYS[0])(member.sites)
    for one, many in zip(jax.tree.leaves(got), jax.tree.leaves(adapters), strict=True):
        assert one.dtype == many.dtype == jnp.float32
        assert np.all(np.isfinite(many))
        np.testing.assert_allclose(one, many[0], atol=64 * np.finfo(np.float32).eps * np.abs(one).max())
