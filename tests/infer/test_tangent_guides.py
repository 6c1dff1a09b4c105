"""Guides of a tangent model: those that start at Laplace's Gaussian, and where their fits end and stop."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from builders.linearised import FEW, KEY, ROWS, exact, frames, tangent_of
from builders.thorough import sample_of
from numpyro import handlers
from scipy import optimize, stats

import bnlora as bl
from bnlora.guides.around import Informed
from bnlora.infer.core.restricted import kronecker, low_rank

TWO = frames("o_proj", "lm_head")
SCALES = {"o_proj": 0.8, "lm_head": 2.0}
RANDOM = {"o_proj": dist.HalfNormal(1.0), "lm_head": dist.LogNormal(0.0, 0.5)}


@pytest.fixture(scope="module")
def gaussians():
    """With and without random scales; the second has directions that the data do not inform."""
    random, fixed = tangent_of(TWO, scale=RANDOM), tangent_of(TWO, scale=SCALES)
    return {"random": bl.laplace(random, ROWS), "fixed": bl.laplace(fixed, FEW)}


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(["random", "fixed"], ["random"]))
def test_around_starts_as_the_gaussian(gaussians, name):
    gaussian = gaussians[name]
    guide = bl.guides.Guide(gaussian.model.prior, bl.guides.around(gaussian))
    trace = handlers.trace(handlers.seed(guide, KEY)).get_trace()
    params = [site for site in trace.values() if site["type"] == "param"]
    informed = len(gaussian.affine.gains) + len(gaussian.affine.at)
    assert sorted(float(p["value"].mean()) for p in params) == [0.0, 1.0]
    assert {p["value"].shape for p in params} == {(informed,)}
    first = next(iter(gaussian.view.shapes))
    law = trace[f"{first}.q.vector"]["fn"]
    some = gaussian.draw_vectors(jax.random.key(5), 30)
    np.testing.assert_allclose(law.log_prob(some), gaussian.log_density(some), rtol=1e-4, atol=1e-3)
    move = law.transforms[0]
    root = np.asarray(jax.jacobian(move)(jnp.zeros(len(gaussian.loc))), np.float64)
    np.testing.assert_allclose(root @ root.T, gaussian.covariance(), atol=1e-4)
    np.testing.assert_allclose(move(jnp.zeros(len(gaussian.loc))), gaussian.loc, atol=1e-5)


@pytest.mark.parametrize("name", sample_of(["random", "fixed"], ["random"]))
def test_the_map_of_around_has_the_stated_inverse_and_determinant(gaussians, name):
    gaussian, stream = gaussians[name], np.random.default_rng(0)
    size, count = len(gaussian.loc), len(gaussian.affine.gains) + len(gaussian.affine.at)
    with jax.enable_x64(True):
        loc, scale = jnp.asarray(stream.normal(size=count)), jnp.asarray(stream.uniform(0.3, 3.0, count))
        move = Informed(gaussian.affine.cast(float), loc, scale, gaussian.affine.log_determinant)
        x = jnp.asarray(stream.normal(size=(4, size)))
        y = move(x)
        np.testing.assert_allclose(move._inverse(y), x, atol=1e-9)
        np.testing.assert_allclose(jax.vmap(move)(x), y, atol=1e-12)
        for one, value in zip(x, move.log_abs_det_jacobian(x, y), strict=True):
            assert float(value) == pytest.approx(np.linalg.slogdet(jax.jacobian(move)(one))[1], abs=1e-9)
        # Along the directions the standard normal has the given mean and spread.
        inner = gaussian.affine.invert(np.asarray(y))
        along = np.concatenate([inner @ gaussian.affine.vectors, inner[:, gaussian.affine.at]], 1)
        before = np.concatenate([x @ gaussian.affine.vectors, x[:, gaussian.affine.at]], 1)
        np.testing.assert_allclose(along, loc + scale * before, atol=1e-9)
        leaves, tree = jax.tree.flatten(move)
        np.testing.assert_array_equal(jax.tree.unflatten(tree, leaves)(x), y)


def test_around_refuses_another_size(gaussians):
    gaussian = gaussians["fixed"]
    with pytest.raises(ValueError, match="the Gaussian has 6 coordinates, the sites of the guide 4"):
        bl.guides.Guide(tangent_of(frames("v_proj")).prior, bl.guides.around(gaussian))
    by_site = {r"o_proj\.U": bl.guides.around(gaussian), ".*": bl.guides.mean_field()}
    with pytest.raises(
        ValueError, match="coordinates, the sites of the guide 4; .* assign all sites to this family"
    ):
        bl.guides.Guide(gaussian.model.prior, by_site)


def moments(guide, params, view, count=4000):
    """Mean and standard deviation of the unconstrained vector under a guide, by draws."""

    def one(key):
        return handlers.seed(handlers.substitute(guide, data=params), key)()

    drawn = jax.jit(jax.vmap(one))(jax.random.split(KEY, count))
    # Scales are positive: their unconstrained value is the logarithm.
    free = [np.log(drawn[name]) if name.endswith(".scale") else drawn[name] for name in view.shapes]
    draws = np.concatenate([np.reshape(x, (count, -1)) for x in free], 1).astype(float)
    return draws.mean(0), draws.std(0)


@pytest.mark.parametrize("name", sample_of(["random", "fixed"], ["random"]))
def test_a_full_guide_starts_with_mean_and_covariance(gaussians, name):
    gaussian = gaussians[name]
    guide = bl.guides.Guide(gaussian.model.prior, bl.guides.full(over="all"))
    start = bl.start_at(KEY, guide, gaussian)
    first = next(iter(gaussian.view.shapes))
    tril = np.asarray(start[f"{first}.q.scale_tril"], np.float64)
    np.testing.assert_allclose(start[f"{first}.q.loc"], gaussian.loc, atol=1e-6)
    np.testing.assert_allclose(tril @ tril.T, gaussian.covariance(), atol=1e-5)
    vector = handlers.trace(handlers.seed(handlers.substitute(guide, data=start), KEY)).get_trace()[
        f"{first}.q.vector"
    ]
    some = gaussian.draw_vectors(jax.random.key(5), 10)
    np.testing.assert_allclose(vector["fn"].log_prob(some), gaussian.log_density(some), rtol=1e-4, atol=1e-3)


def test_a_guide_of_each_layer_starts_at_the_covariance_given_the_rest(gaussians):
    gaussian = gaussians["fixed"]
    P = np.linalg.inv(gaussian.covariance())[:4, :4]
    start = bl.start_at(KEY, bl.guides.Guide(gaussian.model.prior, bl.guides.full()), gaussian)
    tril = np.asarray(start["o_proj.U.q.scale_tril"], np.float64)[0]
    np.testing.assert_allclose(tril @ tril.T, np.linalg.inv(P), atol=1e-5)
    start = bl.start_at(KEY, bl.guides.Guide(gaussian.model.prior, bl.guides.matrix_normal()), gaussian)
    roots = (np.asarray(start[f"o_proj.U.q.{side}_tril"], np.float64)[0] for side in ("row", "column"))
    A, B = kronecker(P, 2, 2)
    np.testing.assert_allclose(np.kron(*(L @ L.T for L in roots)), np.kron(A, B), atol=1e-5)


@pytest.mark.parametrize("over", ["layer", "family", "all"])
def test_a_low_rank_guide_starts_with_its_own_covariance(gaussians, over):
    gaussian = gaussians["fixed"]
    guide = bl.guides.Guide(gaussian.model.prior, bl.guides.low_rank(rank=2, over=over))
    start = bl.start_at(KEY, guide, gaussian)
    mean, deviation = moments(guide, start, gaussian.view)
    P = np.linalg.inv(gaussian.covariance())
    groups = [np.arange(len(P))] if over == "all" else list(gaussian.view.places.values())
    expected = np.zeros(len(P))
    for at in groups:
        s, F = low_rank(P[np.ix_(at, at)], 2)
        expected[at] = s * np.sqrt(1 + (F**2).sum(1))
    assert (np.abs(mean - gaussian.loc) < 4 / 4000**0.5 * expected).all()
    assert (np.abs(deviation / expected - 1) < 4 / 8000**0.5).all()


def test_independent_laws_start_at_the_mean_and_conditional_deviations(gaussians):
    gaussian = gaussians["random"]
    conditional = np.diag(np.linalg.inv(gaussian.covariance())) ** -0.5
    guides = {
        "mean field": bl.guides.Guide(gaussian.model.prior, bl.guides.mean_field()),
        "flow": bl.guides.SiteFlow(gaussian.model.prior),
    }
    for name, guide in guides.items():
        start, begin = bl.start_at(KEY, guide, gaussian), 0
        for site, shape in gaussian.view.shapes.items():
            part = slice(begin, begin + int(np.prod(shape)))
            np.testing.assert_allclose(np.ravel(start[f"{site}.q.loc"]), gaussian.loc[part], atol=1e-6)
            np.testing.assert_allclose(np.ravel(start[f"{site}.q.scale"]), conditional[part], rtol=1e-5)
            begin = part.stop
        # The flow is near the identity at the start: within a twentieth of a deviation.
        near = 0.05 if name == "flow" else 0.0
        mean, deviation = moments(guide, start, gaussian.view)
        assert (np.abs(mean - gaussian.loc) < (4 / 4000**0.5 + near) * conditional).all(), name
        assert (np.abs(deviation / conditional - 1) < 4 / 8000**0.5 + near).all(), name


def test_other_parameters_are_left_where_the_guide_starts_them(gaussians):
    gaussian = gaussians["fixed"]
    around = bl.guides.Guide(gaussian.model.prior, bl.guides.around(gaussian))
    assert sorted(float(x.mean()) for x in bl.start_at(KEY, around, gaussian).values()) == [0.0, 1.0]
    tangent = tangent_of(frames("lm_head"), scale=1.0)
    whole = bl.laplace(tangent, ROWS)  # as many informed directions as coordinates
    assert len(whole.affine.gains) == len(whole.loc)
    guide = bl.guides.Guide(tangent.prior, bl.guides.around(whole))
    assert sorted(float(x.mean()) for x in bl.start_at(KEY, guide, whole).values()) == [0.0, 1.0]


def test_start_at_refuses_another_guide(gaussians, monkeypatch):
    gaussian = gaussians["fixed"]
    other = bl.guides.Guide(tangent_of(frames("v_proj")).prior, bl.guides.mean_field())
    with pytest.raises(
        ValueError, match=r"the sites of the Gaussian, o_proj.U of 4, lm_head.U of 2; it has v_proj.U of 4"
    ):
        bl.start_at(KEY, other, gaussian)
    same_names = bl.guides.Guide(
        tangent_of(frames("o_proj", "lm_head", size=3)).prior, bl.guides.mean_field()
    )
    with pytest.raises(ValueError, match="it has o_proj.U of 9, lm_head.U of 3"):
        bl.start_at(KEY, same_names, gaussian)
    monkeypatch.setattr("bnlora.infer.core.start.MOST", 5)
    with pytest.raises(ValueError, match="the covariance of 6 coordinates is too large; at most 5"):
        bl.start_at(KEY, bl.guides.Guide(gaussian.model.prior, bl.guides.mean_field()), gaussian)


# ---- where fits end --------------------------------------------------------------------------------------

ONE = frames("lm_head", size=1)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)


def bound(linear, mean: float, sd: float) -> float:
    """The bound of N(mean, sd^2) on the evidence of one coordinate, by Gauss and Hermite."""
    u = (mean + sd * NODES)[:, None]
    kl = 0.5 * (sd**2 + mean**2 - 1) - np.log(sd)
    return float(WEIGHTS @ linear.log_likelihood(u) / WEIGHTS.sum() - kl)


def adam(rate, steps):
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def test_a_fit_around_the_gaussian_ends_between_its_bound_and_the_evidence():
    tangent = tangent_of(ONE, scale=6.0)
    linear, gaussian = exact(tangent, FEW, {"lm_head": 6.0}), bl.laplace(tangent, FEW)
    guide = bl.guides.Guide(tangent.prior, bl.guides.around(gaussian))
    options = {"num_steps": 300, "batch_size": 2, "num_particles": 16}
    fit = bl.fit(
        KEY,
        tangent,
        guide,
        FEW,
        adam(0.05, 300),
        optimisation=bl.Optimisation(scale_optimizer=adam(0.05, 300)),
        **options,
    )
    loc, scale = (float(fit.params[f"lm_head.U.q.along_{n}"][0]) for n in ("loc", "scale"))
    V, (centre,), (gain,) = float(gaussian.affine.vectors[0, 0]), gaussian.loc, gaussian.affine.gains
    began, ended = bound(linear, centre, gain), bound(linear, centre + gain * V * loc, gain * scale)
    grid = np.linspace(-12, 12, 20_001)
    log = linear.log_likelihood(grid[:, None]) + stats.norm.logpdf(grid)
    evidence = np.logaddexp.reduce(log) + np.log(grid[1] - grid[0])
    best = optimize.minimize(lambda x: -bound(linear, x[0], np.exp(x[1])), [centre, np.log(gain)]).fun
    assert began < ended - 1e-3
    assert ended <= -best + 1e-9 < evidence
    assert ended == pytest.approx(-best, abs=5e-3)
    assert fit.history["elbo"][-50:].mean() == pytest.approx(
        ended, abs=4 * fit.history["elbo"][-50:].std() / 50**0.5
    )


def test_a_fit_stops_on_a_plateau_and_remembers_it(tmp_path):
    tangent = tangent_of(frames("lm_head"), scale=2.0)
    gaussian = bl.laplace(tangent, ROWS)
    guide = bl.guides.Guide(tangent.prior, bl.guides.around(gaussian))
    rule = bl.Plateau(window=10, tolerance=0.5)
    options = {"num_steps": 400, "batch_size": len(ROWS), "num_particles": 4}
    fit = bl.fit(KEY, tangent, guide, ROWS, optax.adam(1e-3), plateau=rule, **options)
    steps = len(fit.history["elbo"])
    assert fit.stopped == "plateau"
    assert 20 <= steps < 400
    assert rule.reached(fit.history["elbo"])
    assert not rule.reached(fit.history["elbo"][:-1])
    assert "plateau" in str(fit.overview[0])
    assert "tangent" in str(fit.overview[0])
    bl.save_fit(fit, tmp_path)
    again = bl.load_fit(tmp_path, tangent, guide)
    assert again.stopped == "plateau"
    assert len(again.history["elbo"]) == steps
    # One that still grows does not stop.
    climbing = bl.guides.Guide(tangent.prior, bl.guides.mean_field(init_scale=1e-3))
    fast = {"optimisation": bl.Optimisation(scale_optimizer=optax.adam(0.2)), "num_steps": 30}
    fit = bl.fit(KEY, tangent, climbing, ROWS, optax.adam(0.05), plateau=rule, **options | fast)
    assert fit.stopped == "steps"
