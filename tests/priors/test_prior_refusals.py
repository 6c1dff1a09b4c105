"""Errors of priors, each in one sentence: for options at construction, for sites at the run."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from builders.shapes import SHAPE, SITES
from numpyro import handlers
from numpyro.distributions import constraints

from bnlora import priors
from bnlora.priors import learned


def keywords(function):
    """Names of the keyword-only arguments of a function: the options of a prior."""
    return inspect.getfullargspec(function).kwonlyargs if inspect.isfunction(function) else []


def whole(sites):
    """A prior that returns every family and factor, whichever its sites request."""
    return {n: {f: jnp.zeros(s.shapes[f]) for f in "ab"} for n, s in SITES.items()}


ZEROS = {n: {f: np.zeros(s) for f, s in site.shapes.items()} for n, site in SITES.items()}
COMPOSED = {
    "too many factors": (
        priors.per_factor(a=lambda s: whole(SITES), b=priors.point()),
        "prior of factor 'a'",
    ),
    "too many families": (
        priors.by_family({"q.*": lambda s: whole(SITES), "lm.*": priors.point()}),
        "families of 'q.\\*'",
    ),
    "a family without prior": (
        priors.by_family({"q_proj": priors.point()}),
        r"matches the families \['lm_head'",
    ),
    "a pattern without family": (
        priors.by_family({".*": priors.point(), "v_proj": priors.point()}),
        "'v_proj' matches no family; nearest is 'q",
    ),
    "no frames for a factor": (
        priors.sparse_gp(frames={"q_proj.a": (jnp.ones((3, 2, 2)), jnp.ones((3, 12, 9)))}),
        "no entry for 'q_proj.b'",
    ),
    "frames of another shape": (
        priors.sparse_gp(frames={"q_proj.a": (jnp.ones((3, 2, 1)), jnp.ones((3, 12, 9)))}),
        r"rows frame of 'q_proj.a' must have shape \(3, 2, 2\); got \(3, 2, 1\)",
    ),
    "a centre of another shape": (
        priors.centered(priors.normal(), ZEROS | {"q_proj": {"a": np.zeros((1, 2, 12)), "b": np.zeros(3)}}),
        "centred prior do not fit .* factor 'a' of 'q_proj'",
    ),
    "a centre without a family": (
        priors.centered(priors.normal(), {"q_proj": ZEROS["q_proj"]}),
        "centred prior do not fit .*'lm_head'",
    ),
    "a scale of another shape": (
        priors.normal(scale=jnp.ones(3)),
        r"q_proj.a.scale needs a shape that broadcasts to \(\); got \(3,\)",
    ),
    "a pool of another factor": (
        priors.per_factor(a=priors.pooled_scales(priors.normal()), b=priors.normal()),
        r"pooled_scales\(factor='b'\) needs sites that request it; these request \['a'\]",
    ),
    "the law of a vector": (
        priors.ard(gain=dist.LogNormal(jnp.zeros(2), 1).to_event(1)),
        "of a single number",
    ),
}


@pytest.mark.parametrize(("prior", "message"), COMPOSED.values(), ids=COMPOSED)
def test_what_does_not_fit_the_sites_gets_one_clear_sentence(prior, message):
    with pytest.raises(ValueError, match=message):
        handlers.seed(prior, jax.random.key(7))(SITES)


REAL = learned(0.5, constraints.real)
WITH_WIDTH = [prior for prior in vars(priors).values() if "width" in keywords(prior)]
NEEDED = {priors.rank_gains: {"gain": lambda site: jnp.ones((site.depth, site.rank))}}
REFUSED = {
    "inducing": (priors.sparse_gp, {"inducing": "frame"}, "inducing must be one of .* nearest is 'frames'"),
    "form": (priors.sparse_gp, {"form": "weight"}, "form must be one of .* nearest is 'weights'"),
    "frames": (priors.sparse_gp, {"frames": "random"}, "frames must be 'learned', a random key"),
    "frames array": (
        priors.sparse_gp,
        {"frames": jnp.ones((3, 2))},
        "frames must be 'learned', a random key",
    ),
    "oversize": (priors.sparse_gp, {"oversize": "keep"}, "needs inducing='bases'"),
    "form and bases": (priors.sparse_gp, {"form": "weights", "inducing": "bases"}, "needs inducing='frames'"),
    "form and frames": (priors.sparse_gp, {"form": "unwhitened"}, "needs inducing='bases'"),
    "no weights": (priors.sparse_gp, {"form": "weights", "lam": jnp.array(0.0)}, "needs lam > 0"),
    "rows": (priors.sparse_gp, {"rows": 0}, "size rows must be a whole number of at least 1; got 0"),
    "half a row": (priors.sparse_gp, {"rows": 2.5}, "size rows must be a whole number .*; got 2.5"),
    "rows in words": (priors.sparse_gp, {"rows": "3"}, "size rows must be a whole number .*; got '3'"),
    "pooled cols": (priors.pooled_sparse_gp, {"cols": 0}, "size cols must be a whole number .*; got 0"),
    "reliability": (priors.sparse_gp, {"reliability": 1.0}, "number strictly between 0 and 1; got 1.0"),
    "lam": (priors.sparse_gp, {"lam": 1.5}, "lam must be a number between 0 and 1; got 1.5"),
    "lam in words": (priors.sparse_gp, {"lam": "one"}, "lam must be a number between 0 and 1; got 'one'"),
    "wide lam": (
        priors.sparse_gp,
        {"lam": dist.HalfNormal(1.0)},
        "strictly between 0 and 1.*; got HalfNormal",
    ),
    "free lam": (priors.sparse_gp, {"lam": learned(0.5)}, "strictly between 0 and 1.*; got learned"),
    "lam at its end": (
        priors.sparse_gp,
        {"lam": learned(0.0, constraints.unit_interval)},
        "strictly between 0 and 1",
    ),
    "scale": (priors.sparse_gp, {"scale": -1.0}, "scale must be a positive number.*; got -1.0"),
    "not a number": (priors.normal, {"scale": "wide"}, "scale must be a positive number.*; got 'wide'"),
    "nan": (priors.normal, {"scale": float("nan")}, "scale must be a positive number"),
    "one factor": (priors.normal, {"scale": {"a": 1.0}}, r"one each for 'a' and 'b'; got \['a'\]"),
    "scale of b": (priors.normal, {"scale": {"a": 1.0, "b": 0.0}}, "scale of 'b' must be a positive"),
    "signed scale": (priors.laplace, {"scale": dist.Normal(0, 1)}, "positive values; got Normal"),
    "learned sign": (priors.normal, {"scale": REAL}, "positive number.*; got learned"),
    "rows' scale": (priors.matrix_normal, {"rows": dist.Normal(0, 1)}, "rows must be a positive"),
    "gain": (priors.ard, {"gain": 0.0}, "gain must be a positive"),
    "tau": (
        priors.horseshoe,
        {"global_scale": learned(0.5)},
        "global_scale must be a positive number; got learned",
    ),
    "slab": (priors.regularized_horseshoe, {"slab": -2.0}, "slab must be a positive number; got -2.0"),
    "inclusion": (priors.spike_and_slab, {"inclusion": 1.0}, "inclusion must lie strictly between 0 and 1"),
    "wide inclusion": (priors.spike_and_slab, {"inclusion": dist.HalfNormal(1.0)}, "got HalfNormal"),
    "free inclusion": (priors.spike_and_slab, {"inclusion": REAL}, "inclusion must lie strictly"),
    "spike": (priors.spike_and_slab, {"spike": 2.0}, "spike must be a number strictly between 0 and 1"),
    "rho": (priors.pooled_sparse_gp, {"rho": 1.0}, "rho must lie strictly between 0 and 1"),
    "spread": (partial(priors.pooled_scales, priors.normal()), {"spread": -0.1}, "spread must be a positive"),
    "factor": (partial(priors.pooled_scales, priors.normal()), {"factor": "B"}, "got 'B', nearest is"),
    "core": (priors.subspace, {"scale": REAL}, "scale must be a positive"),
    "start": (
        partial(priors.sparse_gp_matrices, "w", SHAPE, sigma=1.0, plate="layer"),
        {"init_strategy": "zeros"},
        "init_strategy must be one of .*; got 'zeros', nearest is 'zero'",
    ),
    **{
        f"width of {prior.__name__}": (
            prior,
            {"width": "scale", **NEEDED.get(prior, {})},
            r"width must be one of \('scaled', 'unscaled'\); got 'scale', nearest is 'scaled'",
        )
        for prior in WITH_WIDTH
    },
    "pattern": (priors.by_family, {"priors": {"(": priors.point()}}, "'\\(' is not a valid pattern"),
}


@pytest.mark.parametrize(("prior", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_options_get_one_clear_sentence(prior, options, message):
    with pytest.raises(ValueError, match=message):
        prior(**options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_centre_is_of_finite_numbers(value):
    wrong = np.array(ZEROS["lm_head"]["a"])
    wrong.flat[3] = value
    with pytest.raises(ValueError, match="numbers that are NaN or infinite in 'a' of 'lm_head'"):
        priors.centered(priors.normal(), ZEROS | {"lm_head": ZEROS["lm_head"] | {"a": wrong}})


@pytest.mark.parametrize(
    "prior", [priors.sparse_gp, partial(priors.sparse_gp_matrices, "w", SHAPE, sigma=1.0, plate="layer")]
)
def test_an_argument_that_does_not_exist_is_named(prior):
    with pytest.raises(TypeError, match="'row'"):
        prior(row=3)
