"""The splines of the coupling flow, without the flow."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlora.guides import flows
from bnlora.guides.flows import spline


def test_a_spline_interpolates_its_knots_and_their_derivatives_and_ends_as_the_identity():
    with jax.enable_x64(True):
        table = spline.knots(2 * jax.random.normal(jax.random.key(5), (14,)), bound=4.0)
        one = jax.jit(jax.vmap(partial(spline.spline, table=table)))
        y, log_derivative = one(table.x)
        np.testing.assert_allclose(y, table.y, atol=1e-12)
        np.testing.assert_allclose(jnp.exp(log_derivative), table.derivative, rtol=1e-9)
        inside, outside = jnp.linspace(-3.999, 3.999, 999), jnp.array([-1e9, -4.001, 4.001, 7.0])
        differences = (one(inside + 1e-6)[0] - one(inside - 1e-6)[0]) / 2e-6
        np.testing.assert_allclose(jnp.exp(one(inside)[1]), differences, rtol=1e-4)
        np.testing.assert_array_equal(one(outside)[0], outside)
        np.testing.assert_array_equal(one(outside)[1], 0)


def test_extreme_splines_stay_finite_in_single_precision():
    raw = 300 * jax.random.normal(jax.random.key(6), (400, 23))
    y = jnp.linspace(-5.5, 5.5, 400)

    @jax.jit
    def there_and_back(raw, y):
        table = spline.knots(raw, bound=5.0)
        x = spline.spline_inverse(y, table)
        return x, *spline.spline(x, table)

    x, again, log_derivative = there_and_back(raw, y)
    slopes = jax.jit(jax.grad(lambda *args: sum(out.sum() for out in there_and_back(*args)), (0, 1)))(raw, y)
    for part in (x, log_derivative, *slopes):
        assert jnp.all(jnp.isfinite(part))
    # A rounding of x changes y by the slope of the steepest bin, up to 1 / MIN_SHARE times a knot's ratio.
    error = jnp.abs(again - y) / (1 + jnp.exp(log_derivative))
    assert error.max() < 1e-5


def test_too_many_bins_and_an_empty_interval_are_refused():
    with pytest.raises(ValueError, match="bins must be below 1000"):
        spline.near_identity(jax.random.key(0), batch=(), features=2, hidden=2, bins=1000)
    with pytest.raises(ValueError, match="bound must be positive; got 0"):
        flows.SplineCoupling((), 2, bound=0)
