"""Priors: their law, their start, their options and what they refuse."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from scipy import stats

from bnlora import priors
from bnlora.sites import select

SITES = select(
    SimpleNamespace(modules={"q_proj": (12, 6), "lm_head": (12, 3)}, num_layers=3),
    ["q_proj", "lm_head"],
    rank=2,
)

PRIORS = {
    "sparse_gp": priors.sparse_gp(rows=3, cols=4, scale={"a": 0.5, "b": 2.0}),
    "sparse_gp bases": priors.sparse_gp(rows=3, cols=4, scale={"a": 0.5, "b": 2.0}, inducing="bases"),
    "sparse_gp bases kept": priors.sparse_gp(
        rows=9, cols=9, scale={"a": 0.5, "b": 2.0}, inducing="bases", oversize="keep"
    ),
    "normal": priors.normal(scale={"a": 0.5, "b": 2.0}),
}


@cache
def draws(prior):
    """4,000 draws with the parameters fixed at one start, as in a fit."""

    @jax.jit
    def start(key):
        trace = handlers.trace(handlers.seed(prior, key)).get_trace(SITES)
        return {n: s["value"] for n, s in trace.items() if s["type"] == "param"}

    fixed = handlers.substitute(prior, data=start(jax.random.key(99)))
    return jax.jit(jax.vmap(lambda k: handlers.seed(fixed, k)(SITES)))(
        jax.random.split(jax.random.key(0), 4000)
    )


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_weights_are_independent_normals_of_the_stated_scale(prior):
    """Marginal by Kolmogorov-Smirnov; correlation of all pairs of weights by their null spread."""
    adapters, size = draws(prior), 4000
    for name, site in SITES.items():
        for factor, scale in {"a": 0.5, "b": 2.0}.items():
            w = np.asarray(adapters[name][factor]).reshape(size, -1) / (scale / site.shapes[factor][2] ** 0.5)
            p_values = [stats.kstest(column, "norm").pvalue for column in w.T]
            assert min(p_values) * len(p_values) > 1e-3, "a weight is not standard normal after scaling"
            correlation = np.corrcoef(w.T)[np.triu_indices(w.shape[1], 1)]
            # Each null correlation is N(0, 1/size); 5.5 sd is beyond the largest of all the pairs.
            assert np.abs(correlation).max() < 5.5 / size**0.5


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_shapes_and_support_under_jit(prior):
    adapters = draws(prior)
    SITES.check(jax.tree.map(lambda x: x[0], adapters))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(adapters))


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
    import numpyro
    import numpyro.distributions as dist

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

    trace = handlers.trace(handlers.seed(prior, jax.random.key(1))).get_trace(SITES)
    assert "tau" in trace
    SITES.check(handlers.seed(prior, jax.random.key(1))(SITES))


def test_point_prior_has_no_random_variable_and_starts_like_lora():
    trace = handlers.trace(handlers.seed(priors.point(), jax.random.key(2))).get_trace(SITES)
    assert {s["type"] for s in trace.values()} == {"param"}
    assert np.all(trace["q_proj.b"]["value"] == 0)
    a = np.asarray(trace["q_proj.a"]["value"])
    assert np.abs(a).max() <= 12**-0.5
    assert stats.kstest(a.reshape(-1) * 12**0.5, "uniform", args=(-1, 2)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inducing": "frame"}, "inducing must be one of .* got 'frame', nearest is 'frames'"),
        ({"oversize": "keep"}, "needs inducing='bases'"),
        ({"rows": 0}, "at least 1; got rows=0"),
        ({"reliability": 1.0}, "number strictly between 0 and 1; got 1.0"),
        ({"scale": -1.0}, "positive number"),
        ({"scale": {"a": 1.0}}, "one each for 'a' and 'b'"),
    ],
)
def test_bad_options_get_one_clear_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        priors.sparse_gp(**options)
