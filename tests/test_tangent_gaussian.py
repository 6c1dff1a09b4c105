"""Laplace's Gaussian and the guides that start at it, against dense optimisation, Hessians, grids and SciPy."""

import copy
import pickle
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy
from linearised import BASE, FEW, KEY, ROWS, Exact, exact, frames, tangent_of
from numpyro import handlers

import bnlora as bl
from bnlora.affine import Affine
from bnlora.data import Features
from bnlora.density import density
from bnlora.guides.around import Informed
from bnlora.priors import learned
from bnlora.tangent.gaussian import MOST

TWO = frames("o_proj", "lm_head")
THREE = frames("v_proj", "lm_head", label_ids=(3, 5, 9))
SCALES = {"o_proj": 0.8, "lm_head": 2.0}
RANDOM = {"o_proj": dist.HalfNormal(1.0), "lm_head": dist.LogNormal(0.0, 0.5)}
LABELS = replace(ROWS, labels=jnp.asarray(np.random.default_rng(0).integers(0, 3, len(ROWS))))
CASES = {
    "coordinates fewer than rows": (TWO, SCALES, ROWS),
    "rows fewer than coordinates": (TWO, SCALES, FEW),
    "three classes": (THREE, {"v_proj": 1.5, "lm_head": 1.0}, LABELS),
}


@pytest.mark.parametrize(("made", "scales", "rows"), CASES.values(), ids=CASES)
def test_mean_and_covariance_are_those_of_a_dense_optimiser_and_of_the_hessian(made, scales, rows):
    tangent = tangent_of(made, scale=scales)
    gaussian, batch = bl.laplace(tangent, rows), tangent.prepare(rows)
    with jax.enable_x64(True):
        view = density(tangent, {})
        negative = jax.jit(lambda u, batch: -view.log_joint(u, BASE.params, batch))
        slope, hessian = jax.jit(jax.grad(negative)), jax.jit(jax.hessian(negative))
        found = scipy.optimize.minimize(
            lambda u: float(negative(u, batch)),
            np.zeros(view.size),
            jac=lambda u: np.asarray(slope(u, batch)),
            hess=lambda u: np.asarray(hessian(u, batch)),
            method="trust-exact",
            options={"gtol": 1e-10},
        )
        H, value = np.asarray(hessian(found.x, batch)), -float(negative(found.x, batch))
    np.testing.assert_allclose(gaussian.loc, found.x, atol=1e-6)
    np.testing.assert_allclose(gaussian.covariance(), np.linalg.inv(H), atol=1e-6)
    size = len(found.x)
    evidence = value + 0.5 * size * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(H)[1]
    assert gaussian.log_evidence == pytest.approx(evidence, abs=1e-5)
    assert len(gaussian.affine.gains) <= min(size, len(rows) * (len(made.label_ids) - 1))


def test_the_evidence_is_that_by_which_scales_are_chosen():
    tangent = tangent_of(TWO)
    chosen = bl.choose_scales(tangent, ROWS, prior=dist.HalfNormal(1.0))
    gaussian = bl.laplace(tangent_of(TWO, scale=chosen.values), ROWS)
    assert gaussian.log_evidence == pytest.approx(chosen.log_evidence, abs=1e-6)
    assert gaussian.log_evidence == pytest.approx(exact(tangent, ROWS, chosen.values).log_evidence(), abs=1e-6)


def test_scales_that_a_fit_learned_are_taken_from_its_parameters():
    tangent = tangent_of(TWO, scale={"o_proj": learned(0.1), "lm_head": 2.0})
    fixed = bl.laplace(tangent_of(TWO, scale=SCALES), ROWS)
    gaussian = bl.laplace(tangent, ROWS, params={"o_proj.scale": jnp.asarray(0.8), "beside": jnp.zeros(3)})
    np.testing.assert_allclose(gaussian.loc, fixed.loc, atol=1e-6)
    assert gaussian.log_evidence == pytest.approx(fixed.log_evidence, abs=1e-5)
    with pytest.raises(ValueError, match="must have a value for every parameter.*'o_proj.scale'"):
        bl.laplace(tangent, ROWS)


class Marginal:
    """The posterior of two log scales by a dense Laplace approximation at each of their values."""

    def __init__(self, tangent: bl.Tangent):
        self.unit = exact(tangent, ROWS, {"o_proj": 1.0, "lm_head": 1.0})
        sizes = [int(np.prod(f.size)) for f in tangent.frames.values()]
        self.of = np.repeat(np.arange(2), sizes)

    def at(self, t: np.ndarray) -> Exact:
        return replace(self.unit, design=self.unit.design * np.exp(t)[self.of])

    def value(self, t: np.ndarray) -> float:
        """Log evidence plus log prior of the log scales."""
        half, log = scipy.stats.halfnorm.logpdf(np.exp(t[0])) + t[0], scipy.stats.norm.logpdf(t[1], 0, 0.5)
        return self.at(t).log_evidence() + half + log


@pytest.fixture(scope="module")
def random_scales():
    tangent = tangent_of(TWO, scale=RANDOM)
    return tangent, bl.laplace(tangent, ROWS), Marginal(tangent)


def placed(gaussian) -> tuple[np.ndarray, np.ndarray]:
    """Where the vector has log scales, and where cores, in the order of the frames."""
    begin, at = 0, {}
    for name, shape in gaussian.view.shapes.items():
        at[name] = np.arange(begin, begin + int(np.prod(shape)))
        begin += len(at[name])
    return tuple(np.concatenate([at[f"{f}.{s}"] for f in ("o_proj", "lm_head")]) for s in ("scale", "U"))


def test_random_scales_are_at_the_mode_of_their_marginal_posterior(random_scales):
    _, gaussian, marginal = random_scales
    scales, _ = placed(gaussian)
    t = gaussian.loc[scales]
    # A grid around the mode and one that is coarse and wide: nothing on either is higher.
    for step, count in ((0.02, 3), (0.5, 4)):
        offsets = step * np.arange(-count, count + 1)
        values = np.array([[marginal.value(t + [a, b]) for b in offsets] for a in offsets])
        assert np.unravel_index(values.argmax(), values.shape) == (count, count)
    curvature = -hessian(marginal.value, t)
    np.testing.assert_allclose(
        gaussian.covariance()[np.ix_(scales, scales)], np.linalg.inv(curvature), rtol=1e-3, atol=1e-4
    )
    laplace = marginal.value(t) + np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(curvature)[1]
    assert gaussian.log_evidence == pytest.approx(laplace, abs=1e-3)


def hessian(function, t, step=1e-2):
    """Second differences, with an error of the fourth order in the step."""

    def plain(h):
        e = h * np.eye(len(t))
        return np.array(
            [
                [(function(t + a + b) - function(t + a - b) - function(t - a + b) + function(t - a - b)) for b in e]
                for a in e
            ]
        ) / (4 * h**2)

    return (4 * plain(step) - plain(2 * step)) / 3


def test_the_mode_moves_with_the_scales_and_the_covariance_has_both_parts(random_scales):
    _, gaussian, marginal = random_scales
    scales, cores = placed(gaussian)
    t, covariance = gaussian.loc[scales], gaussian.covariance()
    mode, H = marginal.at(t).mode()
    np.testing.assert_allclose(gaussian.loc[cores], mode, atol=1e-6)
    spread = covariance[np.ix_(scales, scales)]
    slopes = np.linalg.solve(spread, covariance[np.ix_(scales, cores)]).T
    e = 1e-4 * np.eye(2)
    expected = np.stack([(marginal.at(t + d).mode()[0] - marginal.at(t - d).mode()[0]) / 2e-4 for d in e], 1)
    np.testing.assert_allclose(slopes, expected, atol=1e-4)
    np.testing.assert_allclose(
        covariance[np.ix_(cores, cores)], np.linalg.inv(H) + expected @ spread @ expected.T, atol=1e-4
    )


def test_draws_and_density_are_those_of_one_gaussian(random_scales):
    count, level = 20_000, 1e-3
    for gaussian in (random_scales[1], bl.laplace(tangent_of(TWO, scale=SCALES), FEW)):
        covariance, draws = gaussian.covariance(), gaussian.draw_vectors(KEY, count)
        law = scipy.stats.multivariate_normal(gaussian.loc, covariance)
        some = np.concatenate([draws[:20].astype(float), np.random.default_rng(0).normal(size=(5, len(gaussian.loc)))])
        np.testing.assert_allclose(gaussian.log_density(some), law.logpdf(some), rtol=1e-5, atol=1e-4)
        variance = np.diag(covariance)
        z = (draws.mean(0) - gaussian.loc) / np.sqrt(variance / count)
        assert np.abs(z).max() < scipy.stats.norm.isf(level / 2 / len(z))
        stderr = np.sqrt((np.outer(variance, variance) + covariance**2) / count)
        z = ((np.cov(draws.T) - covariance) / stderr)[np.triu_indices(len(variance))]
        assert np.abs(z).max() < scipy.stats.norm.isf(level / 2 / len(z))
        adapters = gaussian.draw_adapters(KEY, 3)
        expected = jax.vmap(gaussian.view.adapters)(gaussian.draw_vectors(KEY, 3))
        np.testing.assert_allclose(adapters["o_proj"]["b"], expected["o_proj"]["b"], atol=1e-6)


def test_copies_and_pickles_give_the_same_draws(random_scales):
    gaussian = random_scales[1]
    for twin in (copy.deepcopy(gaussian), pickle.loads(pickle.dumps(gaussian))):  # noqa: S301
        np.testing.assert_array_equal(twin.draw_vectors(KEY, 2), gaussian.draw_vectors(KEY, 2))
        again = twin.draw_adapters(KEY, 2)["lm_head"]["b"]
        np.testing.assert_array_equal(again, gaussian.draw_adapters(KEY, 2)["lm_head"]["b"])
        assert twin.model.kind == "tangent"


def test_a_sure_base_has_directions_without_curvature_that_the_data_inform():
    """At log-odds of 20 the curvature is 1e-9; under a scale of 10 nats the other class is still possible."""
    tangent = tangent_of(frames("lm_head"), scale=10.0)
    rows = tangent.prepare(FEW)
    sign = np.where(np.asarray(FEW.labels) == 1, 20.0, -20.0)
    sure = np.stack([np.zeros(2), sign], 1).astype(np.float32)
    gaussian = bl.laplace(tangent, replace(rows, features=Features(jnp.asarray(sure), rows.features.phi)))
    np.testing.assert_allclose(gaussian.affine.gains, 1, atol=1e-4)
    assert gaussian.affine.vectors.shape[1] == 2
    np.testing.assert_allclose(gaussian.informed[1][:, 0], sign, atol=1e-2)


def test_it_says_what_it_is_of(random_scales):
    gaussian = random_scales[1]
    assert repr(gaussian).startswith("Gaussian(8 coordinates, tangent, log evidence ")
    assert "tangent" in str(gaussian.overview[0])


def spike(sites):
    """A prior in the frames whose sites are not those of a core."""
    U = numpyro.sample("v_proj.other", dist.Normal(0.0, 1.0).expand([1, 2, 2]).to_event(3))
    made = frames("v_proj")["v_proj"]
    return {"v_proj": {"a": jnp.swapaxes(jnp.asarray(made.right), 1, 2), "b": jnp.asarray(made.left) @ U}}


def heavy(sites):
    """A prior whose sites have the right names, and cores of another law."""
    U = numpyro.sample("v_proj.U", dist.Laplace(0.0, 1.0).expand([1, 2, 2]).to_event(3))
    made = frames("v_proj")["v_proj"]
    return {"v_proj": {"a": jnp.swapaxes(jnp.asarray(made.right), 1, 2), "b": jnp.asarray(made.left) @ U}}


spike.frames = heavy.frames = frames("v_proj")


def test_what_has_no_gaussian_is_refused(monkeypatch):
    tangent = tangent_of(frames("v_proj"))
    one_class = replace(ROWS, labels=jnp.zeros(len(ROWS), int))
    mistakes = [
        (lambda: bl.laplace(tangent, one_class), "at least two classes; all of them have one label"),
        (lambda: bl.laplace(tangent, replace(ROWS, labels=ROWS.labels - 1)), "have no labels"),
    ]
    model = bl.Classifier(BASE, frames("v_proj").sites, spike, label_ids=(3, 5))
    mistakes.append(
        (lambda: bl.laplace(bl.Tangent(model), ROWS), "needs the sites of priors.core.*the prior has v_proj.other")
    )
    other = bl.Classifier(BASE, frames("v_proj").sites, heavy, label_ids=(3, 5))
    mistakes.append((lambda: bl.laplace(bl.Tangent(other), ROWS), "standard normal"))
    for make, sentence in mistakes:
        with pytest.raises(ValueError, match=sentence) as error:
            make()
        assert "\n" not in str(error.value)
    assert MOST > 4
    monkeypatch.setattr("bnlora.tangent.gaussian.MOST", 3)
    with pytest.raises(ValueError, match="matrices of the lesser of 24 rows times contrasts and 4 coordinates"):
        bl.laplace(tangent, ROWS)


# ---- guides that start there ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gaussians(random_scales):
    """With and without random scales; the second has directions that the data do not inform."""
    return {"random": random_scales[1], "fixed": bl.laplace(tangent_of(TWO, scale=SCALES), FEW)}


@pytest.mark.parametrize("name", ["random", "fixed"])
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


@pytest.mark.parametrize("name", ["random", "fixed"])
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
    with pytest.raises(ValueError, match="coordinates, the sites of the guide 4; .* give all sites to this family"):
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


@pytest.mark.parametrize("name", ["random", "fixed"])
def test_a_full_guide_starts_with_mean_and_covariance(gaussians, name):
    gaussian = gaussians[name]
    guide = bl.guides.Guide(gaussian.model.prior, bl.guides.full(over="all"))
    start = bl.start_at(KEY, guide, gaussian)
    first = next(iter(gaussian.view.shapes))
    tril = np.asarray(start[f"{first}.q.scale_tril"], np.float64)
    np.testing.assert_allclose(start[f"{first}.q.loc"], gaussian.loc, atol=1e-6)
    np.testing.assert_allclose(tril @ tril.T, gaussian.covariance(), atol=1e-5)
    vector = handlers.trace(handlers.seed(handlers.substitute(guide, data=start), KEY)).get_trace()[f"{first}.q.vector"]
    some = gaussian.draw_vectors(jax.random.key(5), 10)
    np.testing.assert_allclose(vector["fn"].log_prob(some), gaussian.log_density(some), rtol=1e-4, atol=1e-3)


def test_a_full_guide_of_each_layer_starts_with_the_covariance_of_the_layer(gaussians):
    gaussian = gaussians["fixed"]
    start = bl.start_at(KEY, bl.guides.Guide(gaussian.model.prior, bl.guides.full()), gaussian)
    tril = np.asarray(start["o_proj.U.q.scale_tril"], np.float64)[0]
    np.testing.assert_allclose(tril @ tril.T, gaussian.covariance()[:4, :4], atol=1e-5)


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
    with pytest.raises(ValueError, match=r"the sites of the Gaussian, o_proj.U of 4, lm_head.U of 2; it has v_proj.U of 4"):
        bl.start_at(KEY, other, gaussian)
    same_names = bl.guides.Guide(
        tangent_of(frames("o_proj", "lm_head", size=3)).prior, bl.guides.mean_field()
    )
    with pytest.raises(ValueError, match="it has o_proj.U of 9, lm_head.U of 3"):
        bl.start_at(KEY, same_names, gaussian)
    monkeypatch.setattr("bnlora.tangent.start.MOST", 5)
    with pytest.raises(ValueError, match="the covariance of 6 coordinates is too large; at most 5"):
        bl.start_at(KEY, bl.guides.Guide(gaussian.model.prior, bl.guides.mean_field()), gaussian)
