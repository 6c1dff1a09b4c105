"""Coordinates that follow random scales, compared with Jacobians, quadrature and plain chains."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from builders.linearised import FEW, KEY, ROWS, exact, frames, network_of, tangent_of
from scipy import stats

import bnlora as bl
from bnlora.infer.mcmc.target import target
from bnlora.infer.mcmc.whitened import WithScales, whitened
from bnlora.metrics.monte_carlo import chain_mcse
from bnlora.program.tangent.where import Where

UNIT = 2.0
SEVERAL = {"o_proj": dist.HalfNormal(1.0), "lm_head": dist.LogNormal(0.0, 0.5)}


def target_of(tangent, rows, gaussian) -> WithScales:
    plain = target(KEY, tangent, rows, sites=None, given=None, fix_at="mean")
    return whitened(plain, gaussian)


@pytest.fixture(scope="module")
def many():
    """Twenty-four rows inform all six cores of two families with a scale each."""
    tangent = tangent_of(frames("o_proj", "lm_head"), scale=SEVERAL)
    return target_of(tangent, ROWS, bl.laplace(tangent, ROWS))


@pytest.fixture(scope="module")
def few():
    """Two rows inform two directions of five cores with one scale."""
    tangent = tangent_of(frames("lm_head", size=5), scale=dist.HalfNormal(UNIT))
    gaussian = bl.laplace(tangent, FEW)
    return tangent, gaussian, target_of(tangent, FEW, gaussian)


def somewhere(made: WithScales, count: int) -> np.ndarray:
    size = len(made.spread) + made.moving.pull.size
    return np.random.default_rng(1).normal(size=(count, size)).astype(np.float32)


def test_the_density_is_that_of_the_vector_and_the_jacobian(many, monkeypatch):
    """If the rows inform every core, a position is only a vector in other coordinates."""
    assert many.moving.pull.size == len(many.where.cores)
    # Ignore the tiny change of the prior by the nugget.
    monkeypatch.setattr("bnlora.program.tangent.moving.NUGGET", 1e-8)

    def vector(position):
        return many._vector(many.inputs, position, jnp.zeros(len(many.where.cores)))

    @jax.jit
    def both(position):
        log_det = jnp.linalg.slogdet(jax.jacobian(vector)(position))[1]
        expected = many.view.log_joint(vector(position), *many.inputs[:2]) + log_det
        return many.log_density(position, many.inputs), expected

    for position in jnp.asarray(somewhere(many, 6)):
        found, expected = both(position)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_gradients_are_those_of_differences(many):
    step, at = 1e-2, jnp.asarray(somewhere(many, 1)[0])
    value = jax.jit(lambda z: many.log_density(z, many.inputs))
    shifts = step * jnp.eye(len(at))
    differences = jnp.stack([(value(at + d) - value(at - d)) / (2 * step) for d in shifts])
    np.testing.assert_allclose(jax.grad(value)(at), differences, atol=0.02)
    together = jax.vmap(jax.value_and_grad(value))(jnp.asarray(somewhere(many, 3)))
    alone = [jax.value_and_grad(value)(jnp.asarray(z)) for z in somewhere(many, 3)]
    np.testing.assert_allclose(together[0], [v for v, _ in alone], rtol=1e-5)
    np.testing.assert_allclose(together[1], [g for _, g in alone], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["many", "few"])
def test_vectors_and_positions_are_inverse(name, many, few):
    made = many if name == "many" else few[2]
    positions = somewhere(made, 50)
    vectors = made.vectors(positions)
    again = made.positions(jnp.asarray(vectors))
    np.testing.assert_allclose(again, positions, atol=0.02)  # of a standard deviation, in single precision
    np.testing.assert_array_equal(made.vectors(positions), vectors)


def test_what_the_rows_leave_open_is_drawn_from_the_prior(few):
    """At standard normal c the vector is standard normal, whatever the scale: Matheron's rule."""
    _, _, made = few
    count, t = 20_000, made.where.log_scales(jnp.asarray([0.3]))
    random = np.random.default_rng(2)
    R, L, m = made.moving.roots(t)
    x = random.normal(size=(count, len(m)))  # c = R x has its prior
    e = (x - np.asarray(m)) @ np.asarray(L)
    normals = random.normal(size=(count, 5))
    u = np.asarray(jax.vmap(lambda e, n: made.moving.cores(t, e, n))(jnp.asarray(e), jnp.asarray(normals)))
    bound = stats.norm.isf(1e-3 / 2 / 20)
    assert (np.abs(u.mean(0)) * count**0.5 < bound).all()
    stderr = np.sqrt((1 + np.eye(5)) / count)
    assert (np.abs(np.cov(u.T) - np.eye(5)) / stderr < bound).all()


def grid(tangent, made: WithScales) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log scale, c = V^T u of two informed directions, and log of prior times likelihood, on a grid."""
    unit = exact(tangent, FEW, {"lm_head": 1.0})
    V = np.linalg.svd(unit.design[:, 0], full_matrices=False)[2].T
    axis = np.linspace(-6, 6, 97)
    c = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    t = np.linspace(-6, 3, 145)
    log_cell = np.log((axis[1] - axis[0]) ** 2 * (t[1] - t[0]))
    found = []
    for log_scale in t:
        at = replace(unit, design=unit.design * np.exp(log_scale))
        prior = stats.halfnorm.logpdf(np.exp(log_scale), scale=UNIT) + log_scale
        found.append(at.log_likelihood(c @ V.T) + stats.norm.logpdf(c).sum(1) + prior + log_cell)
    return t, c, np.stack(found)


@pytest.mark.slow
def test_chains_and_evidence_are_those_of_quadrature(few):
    tangent, gaussian, made = few
    options = {"num_warmup": 200, "num_draws": 1500, "target_acceptance": 0.8}
    chains = bl.sample_nuts(KEY, tangent, FEW, mass=gaussian, **options)
    assert isinstance(chains.target, WithScales)
    assert chains.stats["divergent"].sum() < 20
    t, c, log_joint = grid(tangent, made)
    log_evidence = np.logaddexp.reduce(log_joint, axis=None)
    weights = np.exp(log_joint - log_evidence)
    exact_evidence = bl.log_evidence(KEY, chains)
    assert abs(exact_evidence.value - log_evidence) < 4 * exact_evidence.stderr + 1e-3
    V = np.linalg.svd(exact(tangent, FEW, {"lm_head": 1.0}).design[:, 0], full_matrices=False)[2].T
    vectors = chains.vectors.astype(float)
    scale, cores = np.exp(vectors[..., made.where.scales]), vectors[..., made.where.cores] @ V
    values = np.concatenate([np.log(scale), scale, cores, scale * cores], -1)
    s = np.exp(t)[:, None]
    moments = [np.log(s) + 0 * weights, s + 0 * weights, *(c.T[:, None] + 0 * weights)]
    moments += [s * c[:, i] for i in range(2)]
    expected = np.array([(weights * x).sum() for x in moments])
    stderr, _ = chain_mcse(values)
    assert (np.abs(values.mean((0, 1)) - expected) < 4 * stderr).all(), (values.mean((0, 1)), expected)


def test_the_gaussian_of_another_posterior_is_refused(few):
    tangent, gaussian, _ = few
    other = bl.laplace(tangent_of(frames("lm_head", size=5), scale=dist.LogNormal(0.0, 1.0)), FEW)
    for rows, mass in ((replace(FEW, labels=1 - FEW.labels), gaussian), (ROWS[2:4], gaussian)):
        with pytest.raises(ValueError, match="another model or of other rows; compute it with bl.laplace"):
            bl.sample_nuts(KEY, tangent, rows, mass=mass, num_warmup=20, num_draws=4)
    # Another law of the scale is another density in coordinates that serve as well.
    made = target_of(tangent, FEW, other)
    positions = jnp.asarray(somewhere(made, 4))
    assert np.isfinite(jax.jit(jax.vmap(made.log_density, (0, None)))(positions, made.inputs)).all()


def test_the_network_moves_in_the_coordinates_of_the_gaussian_itself(few):
    _, gaussian, _ = few
    network = network_of(frames("lm_head", size=5), scale=dist.HalfNormal(UNIT))
    chains = bl.sample_nuts(KEY, network, FEW, mass=gaussian, num_warmup=20, num_draws=4)
    assert not isinstance(chains.target, WithScales)
    assert np.isfinite(chains.vectors).all()


def test_scales_and_cores_are_found_by_their_names(many):
    where = Where.of(many.view)
    assert (len(where.scales), len(where.cores)) == (2, 6)
    vector = where.vector(jnp.asarray([0.0, np.log(3.0)]), 0.0)
    scales = many.view.sites(vector)
    expected = [np.log(scales["o_proj.scale"]), np.log(scales["lm_head.scale"])]
    np.testing.assert_allclose(where.log_scales(vector[where.scales]), expected, atol=1e-5)
