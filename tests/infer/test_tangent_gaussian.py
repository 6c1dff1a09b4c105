"""Laplace's Gaussian against dense optimisation, Hessians, grids of the scales, and SciPy."""

import copy
import pickle
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy
from builders.compilations import counting
from builders.linearised import BASE, FEW, KEY, ROWS, Exact, exact, frames, tangent_of

import bnlora as bl
from bnlora.data.batch import Features
from bnlora.infer.core.gaussian import MOST
from bnlora.priors import learned
from bnlora.program.density import density

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
        negative = jax.jit(lambda u, batch: -view.log_joint(u, BASE.weights, batch))
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
    assert gaussian.log_evidence == pytest.approx(
        exact(tangent, ROWS, chosen.values).log_evidence(), abs=1e-6
    )


def test_another_prior_of_the_same_frames_needs_no_new_program_of_the_mode():
    """What compiles anew reads the scales and the law of the prior; for scales by evidence not even that."""
    first, second = (tangent_of(TWO, scale=scale) for scale in (0.4, 0.9))
    bl.laplace(first, ROWS)
    bl.choose_scales(first, ROWS, prior=dist.HalfNormal(1.0))
    with counting() as compiled:
        bl.laplace(second, ROWS)
    assert "_moments" not in compiled
    assert compiled.total() <= 2, compiled
    with counting() as compiled:
        bl.choose_scales(second, ROWS, prior=dist.HalfNormal(2.0))
    assert not compiled


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
                [
                    (function(t + a + b) - function(t + a - b) - function(t - a + b) + function(t - a - b))
                    for b in e
                ]
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
        some = np.concatenate(
            [draws[:20].astype(float), np.random.default_rng(0).normal(size=(5, len(gaussian.loc)))]
        )
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
        (
            lambda: bl.laplace(bl.Tangent(model), ROWS),
            "needs the sites of priors.core.*this prior has v_proj.other",
        )
    )
    other = bl.Classifier(BASE, frames("v_proj").sites, heavy, label_ids=(3, 5))
    mistakes.append((lambda: bl.laplace(bl.Tangent(other), ROWS), "standard normal"))
    for make, sentence in mistakes:
        with pytest.raises(ValueError, match=sentence) as error:
            make()
        assert "\n" not in str(error.value)
    assert MOST > 4
    monkeypatch.setattr("bnlora.infer.core.gaussian.MOST", 3)
    with pytest.raises(
        ValueError, match="matrices of the smaller of 24 rows times contrasts and 4 coordinates"
    ):
        bl.laplace(tangent, ROWS)
