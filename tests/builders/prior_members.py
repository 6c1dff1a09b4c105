"""The priors that `test_prior_contract.py` holds to its contract; one line adds one."""

import jax
import numpy as np
import numpyro.distributions as dist
from builders import prior_laws as law
from builders.prior_laws import (
    IID,
    ONE,
    SCALE,
    TWO,
    Member,
    extended,
    factors,
    mixture,
    quantiles,
    signs,
    white,
)
from numpyro.distributions import constraints
from scipy import stats

from bnlora import priors
from bnlora.priors import learned

NORM, HALF, UNIFORM = stats.norm, stats.halfnorm, stats.uniform
HALF_NORMAL, ON_UNIT = dist.HalfNormal(1.0), dist.Uniform(0.0, 1.0)
RANDOM = {f: dist.HalfNormal(s) for f, s in SCALE.items()}
SIZED = {"rows": 3, "cols": 3, "scale": SCALE}
HALVED = {f: learned(s / 2) for f, s in SCALE.items()}
LEARNED = {f: learned(s) for f, s in SCALE.items()}
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


def core(scale, symbols=("U",), **options):
    """A core prior: one matrix makes both factors, `a` is fixed, and `b` has less rank than entries."""
    laws = {"U": NORM, "scale": HALF}
    return {
        "prior": priors.core(law.CORE, scale=scale, **options),
        "density": lambda at: {"": laws[at.factor].logpdf(at[""])},
        "joint": None,
        "sites": TWO,
        "symbols": symbols,
    }


BY_LAYER = {"q_proj": np.array([0.5, 2.0]), "lm_head": 3.0}

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
    "normal": Member(priors.normal(scale=SCALE), A, **IID, weights=law.direct),
    "normal learned": Member(priors.normal(scale=LEARNED), A, **IID, weights=law.direct),
    "normal random": Member(
        priors.normal(scale=RANDOM), with_scale(white(".z")), **sharing(WIDE), weights=law.noncentred
    ),
    "laplace": Member(
        priors.laplace(scale=SCALE), LAPLACE, lambda at: law.laplace(at).cdf, weights=law.direct
    ),
    "laplace random": Member(
        priors.laplace(scale=RANDOM),
        with_scale(law.unit_laplace),
        **sharing(law.laplace_mixture(HALF)),
        weights=law.noncentred,
    ),
    "spike_and_slab": Member(spiky(0.3), law.spiky(lambda at: 0.3), law.spiky_cdf(0.3), weights=law.direct),
    "spike_and_slab learned": Member(
        spiky(unit(0.3)), law.spiky(lambda at: at[".inclusion"]), law.spiky_cdf(0.3), weights=law.direct
    ),
    "spike_and_slab random": Member(
        spiky(ON_UNIT),
        extended(law.spiky(lambda at: at[".inclusion"]), inclusion=UNIFORM),
        **sharing(law.spiky_cdf(0.5)),
        weights=law.direct,
    ),
    "matrix_normal": Member(
        priors.matrix_normal(scale=SCALE, rows=learned(0.7), cols=0.9),
        law.entries(law.scaled(0.63)),
        **law.times(0.63),
        weights=law.direct,
    ),
    "matrix_normal random": Member(
        priors.matrix_normal(scale=SCALE, rows=HALF_NORMAL, cols=1.0),
        extended(white(".z"), row_scale=HALF),
        **sharing(WIDE),
    ),
    "ard": Member(
        priors.ard(gain=learned(0.7), scale=SCALE),
        A,
        **weighed(law.times(0.7)["marginal"]),
        weights=law.gained(lambda at: at[".gain"]),
    ),
    "ard random": Member(
        priors.ard(gain=HALF_NORMAL, scale=SCALE),
        factors(a=A, b=extended(A, gain=HALF)),
        **weighed(WIDE),
        weights=law.gained(lambda at: at[".gain"]),
    ),
    "horseshoe": Member(
        priors.horseshoe(scale=SCALE),
        factors(a=A, b=extended(A, **TAU)),
        **weighed(law.horseshoe()),
        weights=law.gained(lambda at: at[".tau"] * at[".local"]),
    ),
    "regularized_horseshoe": Member(
        priors.regularized_horseshoe(slab=1.5, scale=SCALE),
        factors(a=A, b=extended(A, **TAU, slab=law.slab_law(1.5))),
        **weighed(law.horseshoe(slab=1.5)),
        weights=law.gained(law.regularised),
    ),
    "pooled_scales": Member(
        scales(0.3), POOL, **weighed(mixture(**law.log_normal(0.3))), weights=law.pooled(lambda at: 0.3)
    ),
    "pooled_scales learned": Member(
        scales(learned(0.3)),
        POOL,
        **weighed(mixture(**law.log_normal(0.3))),
        weights=law.pooled(lambda at: at[".pool.spread"]),
    ),
    "pooled_scales random": Member(
        scales(HALF_NORMAL),
        factors(a=A, b=extended(A, pool=NORM, **{"pool.spread": HALF})),
        **weighed(mixture(**law.log_normal_mixture(HALF))),
        weights=law.pooled(lambda at: at[".pool.spread"]),
    ),
    "pooled_sparse_gp": Member(
        pooled(0.6), V0, **law.gp_law(rho=lambda at: 0.6), weights=law.pooled_gp(lambda at: 0.6)
    ),
    "pooled_sparse_gp learned": Member(
        pooled(unit(0.6)), V0, **law.gp_law(rho=lambda at: 0.6), weights=law.pooled_gp(lambda at: at[".rho"])
    ),
    "pooled_sparse_gp random": Member(
        pooled(ON_UNIT), extended(V0, rho=UNIFORM), PLAIN, None, weights=law.pooled_gp(lambda at: at[".rho"])
    ),
    "centered": Member(
        priors.centered(priors.normal(scale=SCALE), CENTRE),
        A,
        lambda at: lambda w: PLAIN(at)(w - 0.3),
        weights=lambda at: at[""] + 0.3,
    ),
    "subspace": Member(priors.subspace(scale=0.5), factors(a=white(), b=white(".core")), None, None),
    "subspace random": Member(
        priors.subspace(scale=HALF_NORMAL),
        factors(a=white(), b=extended(white(".core"), **{"core.scale": HALF})),
        None,
        None,
    ),
    "core": Member(**core(0.7), weights=law.cored(lambda at: 0.7)),
    "core by layer": Member(**core(BY_LAYER), weights=law.cored(lambda at: BY_LAYER[at.site.name])),
    "core learned": Member(
        **core({"q_proj": learned(0.7), "lm_head": learned(2.0)}), weights=law.cored(law.of_family("scale"))
    ),
    "core random": Member(**core(HALF_NORMAL, ("U", "scale")), weights=law.cored(law.of_family("scale"))),
    "core random by layer": Member(
        **core(HALF_NORMAL, ("U", "scale"), by_layer=True), weights=law.cored(law.of_family("scale"))
    ),
    "point": Member(priors.point(), white(), None, None, weights=law.direct),
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
