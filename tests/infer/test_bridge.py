"""Bridge sampling against quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.integrate import quad

import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows


def tangent_of(scale):
    base, rows = tiny_base(jax.random.key(0), num_layers=2), tiny_rows(jax.random.key(1), 12)
    frames = bl.frames(jax.random.key(2), base, ["slope"], rows, label_ids=(3, 5))
    model = bl.Classifier(base, frames.sites, bl.priors.core(frames, scale=scale), label_ids=(3, 5))
    return bl.Tangent(model), bl.cache_prefix(bl.Tangent(model), rows)


def by_quadrature(tangent, rows):
    """Log p(y) with the one coordinate integrated out, in double precision."""
    features = rows.features
    weight = np.asarray(features.phi[:, 0, 0], float) / tangent.frames["slope"].unit
    z = np.asarray(features.offset[:, 1] - features.offset[:, 0], float)
    sign = 2 * np.asarray(rows.labels) - 1

    def joint(u, scale):
        log_likelihood = -np.logaddexp(0, -sign * (z + scale * weight * u)).sum()
        return np.exp(log_likelihood - 0.5 * u**2) / np.sqrt(2 * np.pi)

    return lambda scale: quad(joint, -12, 12, args=(scale,), epsabs=1e-14, limit=400)[0]


@pytest.mark.slow
def test_bridge_sampling_finds_the_evidence_of_fixed_scales():
    tangent, rows = tangent_of(4.0)
    gaussian = bl.laplace(tangent, rows)
    chains = bl.sample_nuts(
        jax.random.key(3), tangent, rows, mass=gaussian, num_warmup=200, num_draws=1000, target_acceptance=0.8
    )
    found = bl.log_evidence(jax.random.key(4), chains)
    exact = np.log(by_quadrature(tangent, rows)(4.0))
    assert abs(found.value - exact) < 4 * found.stderr + 1e-3
    assert 0 < found.stderr < 0.05


@pytest.mark.slow
def test_bridge_sampling_finds_the_evidence_of_random_scales():
    tangent, rows = tangent_of(dist.HalfNormal(2.0))
    gaussian = bl.laplace(tangent, rows)
    chains = bl.sample_nuts(
        jax.random.key(3), tangent, rows, mass=gaussian, num_warmup=300, num_draws=1000, target_acceptance=0.9
    )
    found = bl.log_evidence(jax.random.key(4), chains)
    at = by_quadrature(tangent, rows)
    law = dist.HalfNormal(2.0)
    exact = np.log(quad(lambda s: at(s) * float(jnp.exp(law.log_prob(s))), 0, 12, limit=200)[0])
    assert abs(found.value - exact) < 4 * found.stderr + 1e-3


def test_bridge_sampling_needs_the_coordinates_of_a_gaussian():
    tangent, rows = tangent_of(1.0)
    chains = bl.sample_nuts(jax.random.key(0), tangent, rows, num_warmup=20, num_draws=8, num_chains=2)
    with pytest.raises(ValueError, match="needs chains that moved in the coordinates of a Gaussian"):
        bl.log_evidence(jax.random.key(0), chains)
