"""Every implementation of the adapted product, forwards and backwards, against float64 with derived bounds.

Value and gradients are sums of products of the arrays with positive coefficients, so the same formulas
applied to absolute values bound every rounding: an error is at most the number of roundings on the longest
path, times the unit roundoff, times that bound. In bfloat16 the sums are float32 and at most four values on a
path are rounded to eight bits: x W, x A^T, their sum, and the gradient's y' B.
"""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.thorough import EVERY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnlora.kernels import pallas_gpu, pallas_tpu, reference, tiles
from bnlora.kernels.derivatives import Implementation, operation
from bnlora.kernels.quantised import QuantisedMatrix, dequantise, quantise

EPS = float(np.finfo(np.float32).eps)
BF16 = 2.0**-8
SCALE = 0.5
IMPLEMENTATIONS = {
    "xla": Implementation(reference.product, reference.factor_gradients),
    "tpu": Implementation(
        partial(pallas_tpu.product, interpret=True), partial(pallas_tpu.factor_gradients, interpret=True)
    ),
    "gpu": Implementation(partial(pallas_gpu.product, interpret=True), reference.factor_gradients),
}
# With the second budget the blocks are so small that every axis beyond 128 is split, mostly unevenly.
BUDGETS = (tiles.BUDGET, 2**20)
SIDES = st.sampled_from([1, 2, 7, 8, 100, 127, 128, 129, 200, 257, 300])
RANKS = st.sampled_from([1, 2, 3, 8, 9, 16, 33, 64])


def drawn(seed: int, *shapes: tuple[int, ...], dtype=jnp.float32) -> list[jax.Array]:
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes]


def exact(x, w, a, b, cotangent) -> list[np.ndarray]:
    """Value and gradients of x, a and b in float64, with groups as the first axis."""
    x, w, a, b, y = (np.asarray(value, np.float64) for value in (x, w, a, b, cotangent))
    up = y @ b
    return [
        x @ w + SCALE * (x @ a.swapaxes(-1, -2)) @ b.swapaxes(-1, -2),
        y @ w.T + SCALE * up @ a,
        SCALE * up.swapaxes(-1, -2) @ x,
        SCALE * y.swapaxes(-1, -2) @ (x @ a.swapaxes(-1, -2)),
    ]


def assert_exact(got, x, w, a, b, cotangent, roundings: int) -> None:
    """Every entry within its own rounding bound of the exact one."""
    bounds = exact(*(np.abs(np.asarray(value, np.float64)) for value in (x, w, a, b, cotangent)))
    unit = roundings * EPS + (4 * BF16 if x.dtype == jnp.bfloat16 else 0.0)
    for found, expected, bound in zip(got, exact(x, w, a, b, cotangent), bounds, strict=True):
        found = np.asarray(found, np.float64)
        assert found.shape == expected.shape
        assert (np.abs(found - expected) <= unit * (1 + unit) * bound).all()


def pulled(function, x, w, a, b, cotangent) -> list[jax.Array]:
    """Value and gradients of x, a and b through JAX."""
    value, pull = jax.vjp(lambda x, a, b: function(x, w, a, b), x, a, b)
    return [value, *pull(cotangent)]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(IMPLEMENTATIONS))
@settings(
    max_examples=25 if EVERY else 12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    sides=st.tuples(SIDES, SIDES, SIDES, RANKS),
    groups=st.integers(0, 4),
    own_inputs=st.booleans(),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    budget=st.sampled_from(BUDGETS),
    seed=st.integers(0, 2**16),
)
def test_value_and_gradients_are_those_of_float64(name, sides, groups, own_inputs, dtype, budget, seed):
    (m, k, n, rank), front = sides, (groups,) if groups else ()
    x_front = front if own_inputs else ()
    x, w, a, b, y = drawn(
        seed, (*x_front, m, k), (k, n), (*front, rank, k), (*front, n, rank), (*front, m, n), dtype=dtype
    )
    function = partial(pulled, operation(IMPLEMENTATIONS[name], SCALE))
    if groups:
        function = jax.vmap(function, in_axes=(0 if own_inputs else None, None, 0, 0, 0))
    with mock.patch.object(tiles, "BUDGET", budget):
        got = jax.jit(function)(x, w, a, b, y)
    assert_exact(got, x, w, a, b, y, roundings=m + k + n + 2 * rank + 4)


@pytest.mark.parametrize("name", list(IMPLEMENTATIONS))
@pytest.mark.parametrize("summed", [0, 1])
@pytest.mark.parametrize("groups", [1, 3])
def test_eight_bit_weights_stay_within_half_a_level(name, summed, groups):
    m, k, n, rank = 9, 150, 140, 4
    w = drawn(1, (k, n))[0]
    small = quantise(w)
    sides = (k, n) if summed == 0 else (n, k)
    x, a, b = drawn(2, (1, m, sides[0]), (groups, rank, sides[0]), (groups, sides[1], rank))
    with mock.patch.object(tiles, "BUDGET", BUDGETS[1]):
        got = IMPLEMENTATIONS[name].product(x, small, a, b, scale=SCALE, summed=summed)
    size = np.abs(np.asarray(x, np.float64))
    half = np.broadcast_to(np.asarray(small.scales, np.float64) / 2, (k, n))
    whole = np.asarray(w, np.float64)
    matrix, level = (whole, half) if summed == 0 else (whole.T, half.T)
    low = [np.asarray(value, np.float64) for value in (a, b)]
    expected = np.asarray(x, np.float64) @ matrix + SCALE * np.einsum("xmk,grk,gnr->gmn", np.asarray(x), *low)
    rounding = (k + n + rank + 6) * EPS
    magnitude = size @ np.abs(matrix) + SCALE * np.einsum("xmk,grk,gnr->gmn", size, *map(np.abs, low))
    error = np.abs(np.asarray(got, np.float64) - expected)
    assert (error <= size @ level + rounding * (magnitude + size @ level)).all()
    # The bound is not loose: a tenth of it is exceeded, so the weights really are in eight bits.
    assert (error > 0.1 * (size @ level)).any()


def test_quantising_rounds_each_channel_to_its_own_levels():
    w = drawn(3, (40, 5))[0] * jnp.array([1e-3, 1.0, 10.0, 0.0, 1.0])
    small = quantise(w)
    assert isinstance(small, QuantisedMatrix)
    assert small.values.dtype == jnp.int8
    assert np.array_equal(np.abs(np.asarray(small.values)).max(0), [127, 127, 127, 0, 127])
    error = np.abs(np.asarray(dequantise(small, jnp.float32)) - np.asarray(w))
    assert (error <= np.asarray(small.scales) * (0.5 + 127 * EPS)).all()


@pytest.mark.parametrize("budget", BUDGETS)
def test_blocks_fit_their_memory_and_their_lanes(budget):
    with mock.patch.object(tiles, "BUDGET", budget):
        for m, k, n in [(1, 1, 1), (600, 576, 1536), (2048, 8192, 8192), (64, 576, 49_152)]:
            found = tiles.product_tiles(m, k, n, 8, itemsize=4, weight_itemsize=4)
            if found is None:
                assert budget == BUDGETS[1]
                continue
            for side, whole, unit in zip(found, (m, n, k), (8, 128, 128), strict=True):
                assert side == whole or side % unit == 0
            rows, columns, depth = found
            assert 4 * (2 * (rows * depth + depth * columns + rows * columns) + rows * columns) <= budget


def test_weights_are_read_once_wherever_their_column_fits():
    for m, k, n in [(512, 576, 1536), (2048, 2048, 8192), (512, 4096, 4096)]:
        found = tiles.product_tiles(m, k, n, 16, itemsize=2, weight_itemsize=2)
        assert found is not None
        assert found.depth == k
