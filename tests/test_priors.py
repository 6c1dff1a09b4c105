"""Priors one by one: forms of the sparse GP, frames, composition, and what is refused."""

import inspect
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from scipy import stats
from test_gp import factorised

from bnlora import priors
from bnlora.distributions import MatrixConditional
from bnlora.priors import learned
from bnlora.priors.sides import JITTER
from bnlora.sites import select

SITES = select(
    SimpleNamespace(modules={"q_proj": (12, 6), "lm_head": (12, 3)}, num_layers=3),
    ["q_proj", "lm_head"],
    rank=2,
)

SHAPE = (2, 3, 4)
FORMS = {"whitened": "frames", "weights": "frames", "unwhitened": "bases", "whitened bases": "bases"}


def keywords(function):
    """Names that a function takes as keywords alone: the options of a prior."""
    return inspect.getfullargspec(function).kwonlyargs if inspect.isfunction(function) else []


def program(form, lam):
    options = {"form": form.split()[0], "inducing": FORMS[form], "lam": lam, "rows": 2, "cols": 3}
    return partial(priors.sparse_gp_matrices, "w", SHAPE, sigma=0.8, plate="layer", **options)


def somewhere(prior, key):
    """Parameters of a prior far from their start."""
    trace = handlers.trace(handlers.seed(prior, key)).get_trace()
    found = {n: s for n, s in trace.items() if s["type"] == "param"}
    keys = dict(zip(found, jax.random.split(key, len(found)), strict=True))
    return {
        n: jax.random.uniform(keys[n], s["value"].shape, minval=0.1, maxval=0.95)
        if n.endswith(("D", "reliability"))
        else 2 * jax.random.normal(keys[n], s["value"].shape)
        for n, s in found.items()
    }


def covariance(prior, params):
    """Exact covariance of `W`, a linear map of the Gaussian sites: J C J^T summed over them."""
    fixed = handlers.substitute(prior, data=params)
    trace = handlers.trace(handlers.seed(fixed, jax.random.key(0))).get_trace()
    sites = {n: s for n, s in trace.items() if s["type"] == "sample"}

    def weights(values):
        return handlers.seed(handlers.substitute(fixed, data=values), jax.random.key(0))().ravel()

    total = 0.0
    jacobian = jax.jacobian(weights)({n: s["value"] for n, s in sites.items()})
    if "w.W" in sites:
        law = sites["w.W"]["fn"]
        through = jax.jacobian(lambda V: MatrixConditional(V, law.rows, law.cols, law.sigma).mean.ravel())(
            law.V
        )
        jacobian = {"w.V": through, "w.W": jacobian["w.W"]}
    for name, site in sites.items():
        J = jacobian[name].reshape(np.prod(SHAPE), -1)
        # The Hessian of a Gaussian log-density is minus the inverse of its covariance, wherever it is taken.
        law = site["fn"]
        hessian = jax.hessian(lambda x, law=law: law.log_prob(x).sum())(site["value"])
        total = total - J @ jnp.linalg.solve(hessian.reshape(J.shape[1], -1), J.T)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("lam", [1.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_have_the_law_of_the_formula_for_any_sides(form, lam):
    """sigma^2 (lam^2 I + (1 - lam^2) P_r (x) P_c): iid N(0, sigma^2) at lam = 1, wherever the sides are."""
    prior = program(form, lam)
    with jax.enable_x64(True):
        params = jax.jit(partial(somewhere, prior))(jax.random.key(7))
        got = np.asarray(jax.jit(partial(covariance, prior))(params))
    expected = np.zeros((2, 12, 2, 12))
    for layer in range(2):
        P_r, P_c = (projection(params, side, layer) for side in ("rows", "cols"))
        expected[layer, :, layer] = 0.64 * (lam**2 * np.eye(12) + (1 - lam**2) * np.kron(P_r, P_c))
    np.testing.assert_allclose(got, expected.reshape(24, 24), atol=1e-11)


def projection(params, side, layer):
    """P by its definition: Q diag(p) Q^T, or Z^T (Z Z^T + D^2)^-1 Z, jitter included."""
    mine = {n.rsplit(".", 1)[1]: np.asarray(v)[layer] for n, v in params.items() if f".{side}." in n}
    if "Z" in mine:
        Z = mine["Z"]
        return Z.T @ np.linalg.inv(Z @ Z.T + np.diag(mine["D"] ** 2 + JITTER)) @ Z
    Q = np.linalg.qr(mine["frame"])[0]
    return Q @ np.diag(mine["reliability"]) @ Q.T


@pytest.mark.parametrize("form", FORMS)
def test_no_form_factorises_two_matrices_in_one_call(form):
    """Batched LAPACK calls can hang a machine with two cores: see `gp.one_by_one`."""

    def density(key):
        trace = handlers.trace(handlers.seed(program(form, 0.5), key)).get_trace()
        return sum(s["fn"].log_prob(s["value"]).sum() for s in trace.values() if s["type"] == "sample")

    found = list(factorised(jax.make_jaxpr(density)(jax.random.key(0)).jaxpr))
    assert found
    assert {ndim for _, ndim in found} == {2}


def test_inducing_sizes_are_clipped_to_each_side_or_kept():
    def shapes(prior):
        def inducing(key):
            trace = handlers.trace(handlers.seed(prior, key)).get_trace(SITES)
            return {n: s["value"] for n, s in trace.items() if n.endswith(".V")}

        return {n: v.shape for n, v in jax.eval_shape(inducing, jax.random.key(0)).items()}

    assert shapes(priors.sparse_gp(rows=9, cols=9)) == {
        "q_proj.a.V": (3, 2, 9),
        "q_proj.b.V": (3, 6, 2),
        "lm_head.a.V": (1, 2, 9),
        "lm_head.b.V": (1, 3, 2),
    }
    kept = shapes(priors.sparse_gp(rows=9, cols=9, inducing="bases", oversize="keep"))
    assert set(kept.values()) == {(3, 9, 9), (1, 9, 9)}


def test_random_scales_enter_sparse_gp_matrices():
    """A prior of one's own: a scale shared over layers, drawn, around the library's matrices."""

    def prior(sites):
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        return {
            name: {
                f: priors.sparse_gp_matrices(
                    f"{name}.{f}", site.shapes[f], sigma=tau if f == "b" else 1.0, plate=f"{name}.layer"
                )
                for f in "ab"
            }
            for name, site in sites.items()
        }

    def run(key):
        traced = handlers.trace(handlers.seed(prior, key))
        adapters = traced(SITES)
        return adapters, {n: s["value"] for n, s in traced.trace.items() if s["type"] == "sample"}

    adapters, values = jax.eval_shape(run, jax.random.key(1))
    assert {"tau", "q_proj.b.V", "lm_head.a.E"} <= set(values)
    SITES.check(adapters)


def test_point_prior_has_no_random_variable_and_starts_like_lora():
    trace = handlers.trace(handlers.seed(priors.point(), jax.random.key(2))).get_trace(SITES)
    assert {s["type"] for s in trace.values()} == {"param"}
    assert np.all(trace["q_proj.b"]["value"] == 0)
    a = np.asarray(trace["q_proj.a"]["value"])
    assert np.abs(a).max() <= 12**-0.5
    assert stats.kstest(a.reshape(-1) * 12**0.5, "uniform", args=(-1, 2)).pvalue > 1e-3


def test_the_core_of_a_subspace_multiplies_the_columns_of_b_around_one():
    B, core = jnp.ones(SITES["q_proj"].shapes["b"]), jnp.arange(6.0).reshape(3, 2)
    given = {"q_proj.b": B, "q_proj.b.core": core}
    prior = handlers.substitute(priors.subspace(scale=0.5), data=given)
    b = handlers.seed(prior, jax.random.key(3))(SITES)["q_proj"]["b"]
    np.testing.assert_allclose(b, jnp.broadcast_to(1 + 0.5 * core[:, None, :], B.shape), rtol=1e-6)


def test_frames_of_a_key_are_the_same_in_every_run_and_differ_between_matrices():
    @partial(jax.jit, static_argnums=1)
    def mean_of(key, prior):
        trace = handlers.trace(handlers.seed(prior, jax.random.key(4))).get_trace(SITES)
        assert {s["type"] for s in trace.values()} == {"sample", "plate"}
        ones = {n: jnp.ones_like(s["value"]) for n, s in trace.items() if s["type"] == "sample"}
        return handlers.seed(handlers.substitute(prior, data=ones), key)(SITES)

    first, second = (priors.sparse_gp(rows=2, cols=2, lam=0, frames=jax.random.key(k)) for k in (1, 2))
    one, again, other = (mean_of(jax.random.key(k), p) for k, p in ((5, first), (6, first), (5, second)))
    np.testing.assert_array_equal(one["q_proj"]["a"], again["q_proj"]["a"])
    assert not np.allclose(one["q_proj"]["a"], other["q_proj"]["a"])
    assert not np.allclose(one["q_proj"]["a"][0], one["q_proj"]["a"][1])


def test_no_gain_of_the_regularised_horseshoe_exceeds_its_slab_or_overflows():
    given = {"q_proj.b.local": jnp.full((3, 2), 1e30), "q_proj.b.tau": 1.0, "q_proj.b.slab": 4.0}
    prior = priors.per_factor(a=priors.point(), b=priors.regularized_horseshoe())
    run = handlers.trace(handlers.seed(handlers.substitute(prior, data=given), jax.random.key(5)))
    b = run(SITES)["q_proj"]["b"]
    np.testing.assert_allclose(b, 2.0 * run.trace["q_proj.b"]["value"], rtol=1e-5)


def names(prior):
    trace = handlers.trace(handlers.seed(prior, jax.random.key(6))).get_trace(SITES)
    return {n for n, s in trace.items() if s["type"] in ("sample", "param")}


def test_composed_priors_have_the_names_of_their_parts():
    pooled = priors.per_factor(
        a=priors.pooled_scales(priors.normal(), factor="a"), b=priors.pooled_scales(priors.normal())
    )
    assert {"q_proj.a.pool", "q_proj.b.pool", "q_proj.a.pool.spread"} <= names(pooled)
    nested = priors.by_family(
        {
            "lm_head": priors.per_factor(a=priors.point(), b=priors.horseshoe()),
            ".*": priors.per_factor(a=priors.ard(), b=priors.ard()),
        }
    )
    ranks = {"q_proj.a", "q_proj.b", "q_proj.b.gain"}
    assert names(nested) == ranks | {f"lm_head.{s}" for s in ("a", "b", "b.tau", "b.local")}


def test_hyper_parameters_of_each_layer_differ_and_families_share_nothing():
    assert names(priors.normal(scale=dist.HalfNormal(1.0))) == {
        f"{family}.{factor}.{symbol}" for family in SITES for factor in "ab" for symbol in ("scale", "z")
    }
    trace = handlers.trace(handlers.seed(priors.matrix_normal(), jax.random.key(6))).get_trace(SITES)
    assert trace["q_proj.b.row_scale"]["value"].shape == (3, 6)
    assert trace["q_proj.b.column_scale"]["value"].shape == (3, 2)


def whole(sites):
    """A prior that returns every family and factor, whatever it is asked for."""
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
        "'v_proj' takes no family; nearest is 'q",
    ),
    "no frames for a factor": (
        priors.sparse_gp(frames={"q_proj.a": (jnp.ones((3, 2, 2)), jnp.ones((3, 12, 9)))}),
        "none for 'q_proj.b'",
    ),
    "frames of another shape": (
        priors.sparse_gp(frames={"q_proj.a": (jnp.ones((3, 2, 1)), jnp.ones((3, 12, 9)))}),
        r"rows frame of 'q_proj.a' needs shape \(3, 2, 2\); got \(3, 2, 1\)",
    ),
    "a centre of another shape": (
        priors.centered(priors.normal(), ZEROS | {"q_proj": {"a": np.zeros((1, 2, 12)), "b": np.zeros(3)}}),
        "centred on do not fit .* factor 'a' of 'q_proj'",
    ),
    "a centre without a family": (
        priors.centered(priors.normal(), {"q_proj": ZEROS["q_proj"]}),
        "centred on do not fit .*'lm_head'",
    ),
    "a scale of another shape": (
        priors.normal(scale=jnp.ones(3)),
        r"q_proj.a.scale needs a shape that broadcasts to \(\); got \(3,\)",
    ),
    "a pool of another factor": (
        priors.per_factor(a=priors.pooled_scales(priors.normal()), b=priors.normal()),
        r"pooled_scales\(factor='b'\) needs sites that ask for it; these ask for \['a'\]",
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
REFUSED = {
    "inducing": (priors.sparse_gp, {"inducing": "frame"}, "inducing must be one of .* nearest is 'frames'"),
    "option": (priors.sparse_gp, {"row": 3}, "option of the sparse GP must be one of .* nearest is 'rows'"),
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
        {"start": "zeros"},
        "start must be one of .*; got 'zeros', nearest is 'zero'",
    ),
    **{
        f"width of {prior.__name__}": (
            prior,
            {"width": "scale"},
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
