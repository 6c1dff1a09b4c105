"""Single priors: forms of the sparse GP, frames, composition, and errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from builders.programs import factorised
from builders.shapes import SHAPE, SITES
from numpyro import handlers
from scipy import stats

from bnlora import priors
from bnlora.priors.distributions import MatrixConditional
from bnlora.priors.sides import JITTER

FORMS = {"whitened": "frames", "weights": "frames", "unwhitened": "bases", "whitened bases": "bases"}


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
        # The Hessian of a Gaussian log-density is minus the inverse of its covariance, at every point.
        law = site["fn"]
        hessian = jax.hessian(lambda x, law=law: law.log_prob(x).sum())(site["value"])
        total = total - J @ jnp.linalg.solve(hessian.reshape(J.shape[1], -1), J.T)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("lam", [1.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_have_the_law_of_the_formula_for_any_sides(form, lam):
    """sigma^2 (lam^2 I + (1 - lam^2) P_r (x) P_c): iid N(0, sigma^2) at lam = 1 for all sides."""
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
    assert bool(found) == (FORMS[form] == "bases")  # frames need no LAPACK at all
    assert {ndim for _, ndim in found} <= {2}


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
    """A custom prior: a random scale, shared by layers, times the library's matrices."""

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


def test_gains_of_ones_own_weigh_the_ranks():
    prior = priors.rank_gains(lambda site: jnp.arange(1.0, 1 + site.depth * site.rank).reshape(-1, site.rank))
    with handlers.trace() as trace, handlers.seed(rng_seed=0):
        adapters = prior(SITES)
    for name, site in SITES.items():
        gains = np.arange(1.0, 1 + site.depth * site.rank).reshape(site.depth, 1, site.rank)
        np.testing.assert_allclose(adapters[name]["b"], gains * trace[f"{name}.b"]["value"], rtol=1e-6)
        np.testing.assert_array_equal(adapters[name]["a"], trace[f"{name}.a"]["value"])
