"""Chains of a tangent model against quadrature and each other, and the whole way through the library."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray
from builders.linearised import BASE, FEW, KEY, NEW, ROWS, exact, frames, tangent_of
from builders.thorough import sample_of
from builders.unfitted import unfitted
from scipy import optimize, stats

import bnlora as bl
from bnlora.infer.mcmc.whitened import InRows
from bnlora.metrics.monte_carlo import chain_mcse
from bnlora.prediction.functions import identifiable
from bnlora.priors import learned
from bnlora.testing import tiny_base, tiny_rows

HEAD = frames("lm_head", size=5)
"""Two rows inform two of its five coordinates."""
SCALE = 4.0
SMALL = {"num_warmup": 100, "target_acceptance": 0.8}


def within(found, expected, stderr, errors: float = 4.0) -> None:
    assert (np.abs(found - expected) < errors * stderr).all(), (found, expected, stderr)


# ---- chains ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few():
    tangent = tangent_of(HEAD, scale=SCALE)
    gaussian = bl.laplace(tangent, FEW)
    chains = bl.sample_nuts(KEY, tangent, FEW, mass=gaussian, num_draws=1500, **SMALL)
    return tangent, gaussian, chains


def quadrature(tangent, V) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of c = V^T u given the rows, on a fine grid."""
    linear = exact(tangent, FEW, {"lm_head": SCALE})
    axis = np.linspace(-8, 8, 401)
    c = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    rounding = 1e-5 * np.abs(linear.design).max()  # features are in single precision, and computed twice
    np.testing.assert_allclose(linear.design @ V @ V.T, linear.design, rtol=0, atol=rounding)  # V spans rows
    log = linear.log_likelihood(c @ V.T) + stats.norm.logpdf(c).sum(1)
    weights = np.exp(log - np.logaddexp.reduce(log))
    mean = weights @ c
    return mean, np.sqrt(weights @ (c - mean) ** 2)


def test_the_informed_coordinates_are_those_of_quadrature(few):
    tangent, gaussian, chains = few
    assert isinstance(chains.target, InRows)
    V = np.asarray(gaussian.affine.vectors)
    assert V.shape == (5, 2)
    mean, sd = quadrature(tangent, V)
    c = chains.vectors.astype(float) @ V
    for_mean, for_sd = chain_mcse(c)
    within(c.mean((0, 1)), mean, for_mean)
    within(c.reshape(-1, 2).std(0), sd, for_sd)
    # The posterior is skewed, so that Laplace's Gaussian is told from it.
    assert (np.abs(V.T @ gaussian.loc - mean) > 8 * for_mean).any()


def test_the_other_coordinates_are_draws_of_the_prior(few):
    _, gaussian, chains = few
    V = np.asarray(gaussian.affine.vectors)
    rest = np.linalg.svd(V.T)[2][2:].T
    draws = chains.vectors.reshape(-1, 5).astype(float)
    e, c = draws @ rest, draws @ V
    count, limit = len(draws), stats.norm.isf(1e-3 / 2 / 15)
    assert np.abs(e.mean(0)).max() < limit / count**0.5
    covariance = np.cov(e.T) - np.eye(3)
    assert np.abs(covariance).max() < limit * (2 / count) ** 0.5
    assert stats.kstest(e.ravel(), "norm").pvalue > 1e-3
    # Independent of c, of its square, and of themselves one draw later.
    for other in (c, c**2, np.roll(e, 1, axis=0)):
        assert np.abs(np.corrcoef(e.T, other.T)[:3, 3:]).max() < limit / count**0.5


def test_adapters_and_predictions_of_chains_are_of_whole_vectors(few):
    tangent, _, chains = few
    linear = exact(tangent, NEW, {"lm_head": SCALE})
    eta = linear.offset[:, 0] + chains.vectors.reshape(-1, 5).astype(float) @ linear.design[:, 0].T
    expected = np.stack([-np.logaddexp(0, eta), -np.logaddexp(0, -eta)], -1)
    names, values = chains.values(identifiable(tangent, NEW[:2]))
    margins = [names.index(f"margin[{i}]") for i in range(2)]
    np.testing.assert_allclose(values.reshape(-1, len(names))[:, margins], eta[:, :2], atol=1e-3)
    prediction = bl.predict(KEY, chains, NEW, num_draws=len(expected))
    np.testing.assert_allclose(prediction.probs, np.exp(expected).mean(0), atol=1e-4)


@pytest.mark.thorough  # the coordinates have tests against quadrature, and sbc_core has the whole
def test_random_scales_in_the_coordinates_of_the_gaussian_are_those_of_plain_coordinates():
    tangent = tangent_of(frames("lm_head"), scale=dist.HalfNormal(2.0))
    gaussian = bl.laplace(tangent, ROWS)
    found = []
    for mass, key in ((gaussian, KEY), ("diagonal", jax.random.key(1))):
        chains = bl.sample_nuts(key, tangent, ROWS, mass=mass, num_draws=800, num_warmup=200)
        sites = chains.sites()
        u = sites["lm_head.U"].reshape(*sites["lm_head.scale"].shape[:2], -1)
        log = np.log(sites["lm_head.scale"])[..., None]
        values = np.concatenate([log, u, np.exp(log) * u], -1).astype(float)
        assert chains.stats["divergent"].sum() < 20
        found.append((values.mean((0, 1)), values.reshape(-1, values.shape[-1]).std(0), *chain_mcse(values)))
    (mean, sd, for_mean, for_sd), (other_mean, other_sd, other_for_mean, other_for_sd) = found
    within(mean, other_mean, np.hypot(for_mean, other_for_mean))
    within(sd, other_sd, np.hypot(for_sd, other_for_sd))


@pytest.mark.thorough
def test_hmc_takes_a_gaussian_and_starts_may_be_others(few):
    tangent, gaussian, _ = few
    for start in ("prior", "pathfinder"):
        chains = bl.sample_hmc(
            KEY,
            tangent,
            FEW,
            mass=gaussian,
            num_integration_steps=4,
            num_draws=20,
            num_warmup=20,
            init_strategy=start,
        )
        assert np.isfinite(chains.vectors).all()


def short(model, rows, gaussian, **options):
    return bl.sample_nuts(KEY, model, rows, mass=gaussian, **SMALL | {"num_draws": 8} | options)


ALIEN = "another model or of other rows"
OTHERS = {
    "another size": (frames("lm_head"), SCALE, FEW, "one over the 2 sampled coordinates; it has 5"),
    "another scale": (HEAD, 3.0, FEW, ALIEN),
    "other labels": (HEAD, SCALE, replace(FEW, labels=1 - FEW.labels), ALIEN),
    "other rows": (HEAD, SCALE, ROWS[2:4], ALIEN),
    "more rows": (HEAD, SCALE, ROWS, ALIEN),
}


@pytest.mark.parametrize(("made", "scale", "rows", "sentence"), OTHERS.values(), ids=OTHERS)
def test_the_gaussian_of_another_problem_is_refused(few, made, scale, rows, sentence):
    tangent = tangent_of(made, scale=scale)
    with pytest.raises(ValueError, match=sentence) as error:
        short(tangent, rows, few[1])
    assert "\n" not in str(error.value)


def test_a_prior_of_another_law_is_refused(few):
    def laplace(sites):
        law = dist.Laplace(jnp.zeros(HEAD["lm_head"].size), 1.0).to_event(3)
        frame, U = HEAD["lm_head"], numpyro.sample("lm_head.U", law)
        b = SCALE / frame.unit * jnp.asarray(frame.left) @ U
        return {"lm_head": {"a": jnp.swapaxes(jnp.asarray(frame.right), 1, 2), "b": b}}

    laplace.frames = HEAD
    tangent = bl.Tangent(bl.Classifier(BASE, HEAD.sites, laplace, label_ids=(3, 5)))
    with pytest.raises(ValueError, match=ALIEN):
        short(tangent, FEW, few[1])


def test_the_network_of_a_head_may_be_sampled_in_the_same_coordinates(few):
    """It is linear itself, so that the Gaussian is of this model too."""
    tangent, gaussian, _ = few
    one, two = (short(model, FEW, gaussian) for model in (tangent, tangent.network))
    np.testing.assert_allclose(one.vectors, two.vectors, atol=1e-3)


KINDS = {"fixed": SCALE, "random": dist.HalfNormal(2.0)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sample_of(KINDS, ["fixed"]))
def test_chains_go_on_from_a_folder(kind, tmp_path):
    tangent = tangent_of(HEAD, scale=KINDS[kind])
    options = {"num_draws": 40, "piece": 20, "num_chains": 2, "num_warmup": 20, "target_acceptance": 0.8}

    def run(**more):  # as in another process: everything is made anew
        return bl.sample_nuts(KEY, tangent, FEW, mass=bl.laplace(tangent, FEW), **options | more)

    whole = run(folder=tmp_path)
    (tmp_path / "draws-00001.npz").unlink()
    np.testing.assert_array_equal(run(folder=tmp_path).vectors, whole.vectors)
    with pytest.raises(ValueError, match="holds the pieces of another run"):
        bl.sample_nuts(KEY, tangent, FEW, folder=tmp_path, **options)


@pytest.mark.slow
def test_chains_on_a_family_hold_the_rest_of_a_fit():
    tangent = tangent_of(frames("v_proj", "lm_head"), scale=2.0)
    guide = bl.guides.Guide(tangent.prior, bl.guides.full(over="all"))
    gaussian = bl.laplace(tangent, ROWS)
    fit = unfitted(tangent, guide, ROWS, bl.start_at(KEY, guide, gaussian))
    options = {"sites": ["lm_head"], "given": fit, "num_warmup": 20, "num_integration_steps": 4}
    chains = bl.sample_hmc(KEY, tangent, ROWS, num_draws=100, **options)
    assert set(chains.model.fixed) == {"v_proj.U"}
    assert chains.model.kind == "tangent"
    found = bl.compare(KEY, fit, chains, NEW, num_draws=100, against="anything")
    assert "both sides hold v_proj.U at the values of the other posterior" in repr(found)
    assert found.names == ("log_likelihood", *(f"margin[{i}]" for i in range(8)), "norm[lm_head]")
    with pytest.raises(ValueError, match="one over the 2 sampled coordinates; it has 6"):
        bl.sample_hmc(KEY, tangent, ROWS, mass=gaussian, **options)


# ---- compositions ---------------------------------------------------------------------------------------


def test_two_core_priors_by_family_are_one_with_two_scales():
    made = frames("v_proj", "lm_head")
    whole = tangent_of(made, scale={"v_proj": 0.7, "lm_head": 2.0})
    parts = {"lm_head": bl.priors.core(made, scale=2.0), "v.*": bl.priors.core(made, scale=0.7)}
    apart = {
        "v_proj": bl.priors.core(frames("v_proj"), scale=0.7),
        "lm_head": bl.priors.core(frames("lm_head"), scale=2.0),
    }
    expected = bl.laplace(whole, ROWS)
    for priors in (parts, apart):
        model = bl.Classifier(BASE, made.sites, bl.priors.by_family(priors), label_ids=(3, 5))
        gaussian = bl.laplace(bl.Tangent(model), ROWS)
        assert gaussian.log_evidence == pytest.approx(expected.log_evidence, abs=1e-4)
        first, second = (of_sites(one) for one in (gaussian, expected))
        assert first.keys() == second.keys()
        for name in first:  # their order may be another
            np.testing.assert_allclose(first[name], second[name], atol=1e-4)


def of_sites(gaussian) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in gaussian.view.split(jnp.asarray(gaussian.loc)).items()}


def test_one_scale_may_be_learned_beside_one_that_is_not():
    """At the end of the fit the scale maximises the bound of its Gaussian, whose KL it does not enter."""
    made = frames("o_proj", "lm_head")
    tangent = tangent_of(made, scale={"o_proj": learned(5.0), "lm_head": 2.0})
    linear = exact(tangent, ROWS, {"o_proj": 1.0, "lm_head": 2.0})
    u = np.array([4.0, -4.0, 4.0, -4.0, 0.0, 0.0])
    # Labels that a large scale explains, but for every sixth row.
    likely = (linear.offset[:, 0] + linear.design[:, 0] @ u > 0) ^ (np.arange(len(ROWS)) % 6 == 0)
    rows = replace(ROWS, labels=jnp.asarray(likely, int))
    guide = bl.guides.Guide(tangent.prior, bl.guides.full(over="all", init_scale=0.5))
    adam = optax.adam(optax.cosine_decay_schedule(0.05, 400))
    options = {
        "num_steps": 400,
        "batch_size": len(rows),
        "num_particles": 8,
        "optimisation": bl.Optimisation(scale_optimizer=adam),
    }
    fit = bl.fit(KEY, tangent, guide, rows, adam, **options)
    mean, root = (np.asarray(fit.params[f"o_proj.U.q.{name}"], float) for name in ("loc", "scale_tril"))
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)

    def data(scale):
        design = linear.design[:, 0] * np.where(np.arange(6) < 4, scale, 1.0)
        spread = np.linalg.norm(design @ root, axis=1)
        eta = (linear.offset[:, 0] + design @ mean)[:, None] + spread[:, None] * nodes
        return -(np.logaddexp(0, np.where(likely[:, None], -eta, eta)) @ weights).sum() / weights.sum()

    best = optimize.minimize_scalar(lambda log: -data(np.exp(log)), bounds=(-5, 5), method="bounded").x
    found = float(fit.params["o_proj.scale"])
    assert data(np.exp(best)) - data(found) < 0.05
    assert data(np.exp(best)) - data(5.0) > 0.5  # where it started
    # The Gaussian at the learned scale is that of the prior which has it.
    gaussian = bl.laplace(tangent, rows, params=fit.params)
    there = bl.laplace(tangent_of(made, scale={"o_proj": found, "lm_head": 2.0}), rows)
    assert gaussian.log_evidence == pytest.approx(there.log_evidence, abs=1e-5)


# ---- the whole way --------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_from_frames_to_a_comparison(tmp_path):
    """Every step of a user with random scales, each of which takes what the one before gave.

    With fixed scales, notebook 04 and `tests/app/test_experiment.py` take most of them.
    """
    base, data = tiny_base(jax.random.key(7), num_layers=2), tiny_rows(jax.random.key(8), 30)
    train, test = data[:20], data[20:]
    made = bl.frames(KEY, base, ["v_proj", "slope"], train, label_ids=(3, 5), size=2, layers=[1])
    prior = bl.priors.core(made, scale=dist.HalfNormal(1.0))
    tangent = bl.Tangent(bl.Classifier(base, made.sites, prior, label_ids=(3, 5)))
    assert "HalfNormal" not in repr(tangent)
    chosen = bl.choose_scales(tangent, train, prior=dist.HalfNormal(1.0))
    assert set(chosen.values) == {"v_proj", "slope"}
    gaussian = bl.laplace(tangent, train)
    guide = bl.guides.Guide(tangent.prior, bl.guides.around(gaussian))

    fit = bl.fit(KEY, tangent, guide, train, optax.adam(1e-2), num_steps=20, batch_size=10, validation=test)
    assert fit.skipped_steps == 0
    prediction = bl.predict(KEY, fit, test, num_draws=20)
    summary = bl.metrics.summary(jax.random.key(0), prediction, test.labels)
    assert 0 < summary["nll"].value < 5
    assert "convergence" in repr(bl.diagnose(fit.draw_key, fit, test, num_draws=40))
    tree = bl.to_arviz(fit.draw_key, fit, test, num_draws=8)
    assert {"v_proj.scale", "slope.scale"} <= set(tree["posterior"].data_vars)
    tree.to_netcdf(tmp_path / "fit.nc", engine="h5netcdf")
    assert set(xarray.open_datatree(tmp_path / "fit.nc", engine="h5netcdf").children) == set(tree.children)

    bl.save_fit(fit, tmp_path / "fit")
    anew = bl.Tangent(bl.Classifier(base, made.sites, prior, label_ids=(3, 5)))
    again = bl.load_fit(tmp_path / "fit", anew, bl.guides.Guide(anew.prior, bl.guides.around(gaussian)))
    np.testing.assert_array_equal(bl.predict(KEY, again, test, num_draws=20).probs, prediction.probs)

    chains = bl.sample_nuts(KEY, tangent, train, mass=gaussian, num_draws=100, **SMALL)
    assert "tangent" in repr(chains)
    assert "tangent" in str(chains.overview[0])
    assert chains.certificate.names
    assert "tangent" not in repr(short_network(base, made, prior, train))
    for posterior in (fit, gaussian):
        found = bl.compare(KEY, posterior, chains, test, num_draws=60, against="anything")
        assert "norm[v_proj]" in found.names
    stored = bl.store_reference(chains, test, num_draws=20)
    bl.save_reference(stored, tmp_path / "reference")
    kept = bl.load_reference(tmp_path / "reference")
    assert bl.compare(KEY, fit, kept, test, num_draws=60, against="anything").names == found.names


def short_network(base, made, prior, train):
    model = bl.Classifier(base, made.sites, prior, label_ids=(3, 5))
    return bl.sample_hmc(KEY, model, train, num_integration_steps=1, num_draws=4, num_warmup=20, num_chains=2)
