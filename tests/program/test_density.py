"""The unconstrained density of a prior and of a model, against NumPyro's own and against quadrature."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density, potential_energy

import bnlora as bl
from bnlora.program.density import density
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=1)
ROWS = tiny_rows(jax.random.key(2), 10)


def hierarchical(sites):
    """A scale, a point on a simplex and a support that depends on the scale."""
    tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
    share = numpyro.sample("share", dist.Dirichlet(jnp.array([2.0, 3.0, 1.5])))
    cut = numpyro.sample("cut", dist.Uniform(0.0, 1.0 + tau))
    adapters = bl.priors.normal(scale=0.7)(sites)
    return {n: {"a": tau * x["a"], "b": cut * share[0] * x["b"]} for n, x in adapters.items()}


def classifier(prior):
    return bl.Classifier(BASE, bl.select(BASE, ["lm_head"], rank=1), prior, label_ids=(3, 5))


@pytest.fixture(scope="module")
def view():
    return density(classifier(hierarchical), {})


def points(view, count=3):
    return 0.7 * jax.random.normal(KEY, (count, view.size))


def free_values(view, vector):
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in view.shapes.values()])
    parts = zip(view.shapes.items(), np.split(np.asarray(vector), ends[:-1]), strict=True)
    return {name: jnp.asarray(part.reshape(shape)) for (name, shape), part in parts}


def test_layout_has_every_latent_site_without_constraints(view):
    assert list(view.shapes) == ["tau", "share", "cut", "lm_head.a", "lm_head.b"]
    assert view.shapes["share"] == (2,)
    assert view.size == 1 + 2 + 1 + 16 + 2


def test_densities_are_numpyros(view):
    args = (BASE.weights, ROWS[:4], 10)  # a minibatch: the likelihood is scaled by 10 / 4
    ours = jax.jit(lambda vector: (view.log_joint(vector, *args), view.log_prior(vector)))

    @jax.jit
    def numpyros(free):
        model, prior = (handlers.seed(program, KEY) for program in (view.model, view.model.prior))
        return -potential_energy(model, args, {}, free), -potential_energy(prior, (), {}, free)

    for vector in points(view):
        np.testing.assert_allclose(ours(vector), numpyros(free_values(view, vector)), rtol=2e-5)


def test_constrained_density_is_log_density_plus_the_jacobian(view):
    """The Jacobian itself by automatic differentiation of the map to the sites (the simplex's first two)."""
    vector = points(view, 1)[0]
    sites = view.sites(vector)
    plain, _ = log_density(handlers.seed(view.model.prior, KEY), (), {}, sites)

    def coordinates(u):
        found = view.sites(u)
        return jnp.concatenate(
            [jnp.ravel(x)[:-1] if n == "share" else jnp.ravel(x) for n, x in found.items()]
        )

    _, log_det = jnp.linalg.slogdet(jax.jacobian(coordinates)(vector))
    np.testing.assert_allclose(view.log_prior(vector), plain + log_det, rtol=1e-5)


def test_density_of_a_scalar_integrates_to_one():
    def prior():
        return numpyro.sample("tau", dist.HalfCauchy(1.0))

    view = density(SimpleNamespace(prior=prior), {})
    grid = jnp.linspace(-15, 15, 3001)[:, None]  # the tails beyond have mass below 1e-6
    mass = np.trapezoid(np.exp(jax.vmap(view.log_prior)(grid)), np.asarray(grid[:, 0]))
    np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_vector_and_sites_are_inverse_to_each_other(view):
    for vector in points(view):
        np.testing.assert_allclose(view.vector(view.sites(vector)), vector, atol=2e-5)


def test_adapters_are_those_of_the_prior_program(view):
    vector = points(view, 1)[0]
    sites = view.sites(vector)
    adapters = view.adapters(vector)["lm_head"]
    np.testing.assert_allclose(adapters["a"], sites["tau"] * sites["lm_head.a"], rtol=1e-6)
    np.testing.assert_allclose(
        adapters["b"], sites["cut"] * sites["share"][0] * sites["lm_head.b"], rtol=1e-6
    )


def test_start_is_the_base_model():
    view = density(classifier(bl.priors.normal()), {})
    sites = view.sites(view.start(KEY))
    np.testing.assert_array_equal(sites["lm_head.b"], 0)
    assert 0.1 < np.std(sites["lm_head.a"]) * 4 < 3  # a draw of N(0, 1/16)


def test_parameters_of_the_prior_are_held_at_given_values():
    model = classifier(bl.priors.sparse_gp(rows=1, cols=2))
    trace = handlers.trace(handlers.seed(model.prior, KEY)).get_trace()
    params = {n: s["value"] for n, s in trace.items() if s["type"] == "param"}
    view = density(model, {**params, "of.the.guide": jnp.zeros(3)})
    assert set(view.params) == set(params)
    free = free_values(view, points(view, 1)[0])
    expected = -potential_energy(handlers.substitute(handlers.seed(model.prior, KEY), params), (), {}, free)
    np.testing.assert_allclose(view.log_prior(points(view, 1)[0]), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"as `fit.params` has; 'lm_head.a.rows.frame' is missing"):
        density(model, {})


def test_bad_input(view):
    with pytest.raises(ValueError, match="a density needs a prior with latent sites, such as priors.normal"):
        density(classifier(bl.priors.point()), {n: 0 for n in ("lm_head.a", "lm_head.b")})
    discrete = SimpleNamespace(prior=lambda: numpyro.sample("k", dist.Bernoulli(0.5)))
    with pytest.raises(ValueError, match="must be continuous; 'k' is Bernoulli"):
        density(discrete, {})
    with pytest.raises(ValueError, match=r"the latent sites are \['cut', .*; got \['tau'\]"):
        view.vector({"tau": jnp.ones(())})
    sites = view.sites(points(view, 1)[0])
    with pytest.raises(ValueError, match="every site must lie inside its support"):
        view.vector({**sites, "tau": jnp.array(-1.0)})


def test_a_start_on_the_edge_of_a_support_is_refused_by_samplers():
    """Their starts are compiled, where nothing can be raised; the check comes after."""

    def prior(sites):
        tau = numpyro.sample("tau", dist.HalfNormal(1.0), infer={"init": "zero"})
        return {n: {"a": f["a"], "b": tau * f["b"]} for n, f in bl.priors.normal()(sites).items()}

    model = bl.Classifier(BASE, bl.select(BASE, ["lm_head"], rank=1), prior, label_ids=(3, 5))
    schedule = bl.approximate.Schedule(num_warmup=2, num_draws=4, thinning=1, batch_size=4)
    samplers = (
        lambda: bl.sample_nuts(KEY, model, ROWS, num_warmup=20, num_draws=4),
        lambda: bl.approximate.sgld(KEY, model, ROWS, schedule, step_size=1e-3),
    )
    for sample in samplers:
        with pytest.raises(ValueError, match="every site must lie inside its support"):
            sample()
