"""Weights in eight and four bits: rounding within half a level, and one operation in every program."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlora.kernels import quantised
from bnlora.kernels.quantised import QuantisedBlocks, QuantisedMatrix, QuantisedTable, dequantise, quantise
from bnlora.models import storage
from bnlora.models.gguf import gguf_blocks

EPS = float(np.finfo(np.float32).eps)


def rows(seed: int = 0, shape: tuple[int, int] = (24, 64)) -> np.ndarray:
    """Output channels of very different sizes, one of zeros, one constant."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(shape) * 10.0 ** generator.integers(-3, 3, (shape[0], 1))
    values[0], values[1] = 0.0, -0.3
    return values.astype(np.float32)


def kernel(storage_name: str, values: np.ndarray):
    """The rows as the kernel of one layer."""
    room = storage.kernel_room(storage_name, (1, values.shape[1], len(values)))
    for begin in range(0, len(values), 5):
        room.write(0, begin, values[begin : begin + 5])
    return jax.tree.map(lambda x: x[0], room.filled())


def test_eight_bits_are_those_of_the_kernels():
    stored, expected = kernel("int8", rows()), quantise(jnp.asarray(rows().T))
    assert isinstance(stored, QuantisedMatrix)
    assert stored.shape == (64, 24)
    np.testing.assert_array_equal(stored.scales, expected.scales)
    np.testing.assert_array_equal(stored.values, expected.values)


@pytest.mark.parametrize("inputs", [64, 48, 24])
def test_four_bits_are_within_half_a_level(inputs):
    """The levels enclose the block, so no weight is beyond the first or the last one."""
    values = rows(1, (24, inputs))
    stored = kernel("4bit", values)
    assert isinstance(stored, QuantisedBlocks)
    size = storage.block_size(inputs)
    assert stored.shape == (inputs, 24)
    assert stored.ndim == 2
    assert stored.codes.shape == (inputs // size, size // 2, 24)
    error = np.abs(np.asarray(dequantise(stored, jnp.float32)).T - values.astype(np.float64))
    level = np.repeat(np.asarray(stored.scales, np.float64), size, axis=0).T
    assert (error <= level / 2 + 4 * EPS * np.abs(values)).all()
    # Levels are as fine as the range of a block allows: rounding to float16 widens them by 2^-10 at most.
    blocks = values.reshape(24, -1, size)
    spread = blocks.max(2) - blocks.min(2)
    wider = 2.0**-10 * (np.abs(blocks).max(2) + spread) + 2.0**-24
    assert (np.asarray(stored.scales).T <= spread / 15 + wider).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_four_bits_of_gguf_keep_their_numbers(kind):
    kind = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(rows(2), kind)
    room = storage.kernel_room("4bit", (1, 64, 24))
    room.write_blocks(0, 0, gguf_blocks(packed, kind.name))
    stored = jax.tree.map(lambda x: x[0], room.filled())
    expected = gguf.quants.dequantize(packed, kind)
    got, level = np.asarray(dequantise(stored, jnp.float32)).T, np.abs(np.asarray(stored.scales, np.float32))
    # A product of four bits and a scale of eleven is exact, so only the sum is rounded, below 16 levels.
    bound = EPS * (16 * np.repeat(level, 32, axis=0).T + np.abs(expected))
    assert (np.abs(got - expected) <= bound).all()


def test_inputs_without_blocks_stay_in_eight_bits():
    assert storage.block_size(20) is None
    assert isinstance(kernel("4bit", rows(3, (4, 20))), QuantisedMatrix)


def test_weights_beyond_float16_have_no_blocks():
    values = rows()
    values[3, 5] = 1e6
    with pytest.raises(ValueError, match=r"hold weights up to 65,504; got 1e\+06; load the"):
        kernel("4bit", values)


def test_rows_of_a_table():
    values = rows(4)
    room = storage.table_room("4bit", values.shape)
    room.write(0, 0, values[:10])
    room.write(0, 10, values[10:])
    table = room.filled()
    assert isinstance(table, QuantisedTable)
    assert table.shape == values.shape
    picked = np.asarray(quantised.table_rows(table, jnp.array([[3, 1]]), jnp.float32))
    assert picked.shape == (1, 2, 64)
    assert (
        np.abs(picked[0] - values[[3, 1]]) <= np.asarray(table.scales)[[3, 1], None] * (0.5 + 64 * EPS)
    ).all()
    head = dequantise(quantised.table_kernel(table, np.array([3, 1])), jnp.float32)
    np.testing.assert_array_equal(head, picked[0].T)
    np.testing.assert_array_equal(dequantise(quantised.table_kernel(table), jnp.float32)[:, [3, 1]], head)


@pytest.mark.parametrize("name", ["int8", "4bit"])
def test_the_product_is_differentiated_both_ways(name):
    """Forwards and backwards in the input, and in the scales, whose derivative nobody needs."""
    w, x = kernel(name, rows(5)), jnp.linspace(-1.0, 1.0, 64)

    def product(x, w):
        return x @ dequantise(w, jnp.float32)

    matrix = dequantise(w, jnp.float32)
    np.testing.assert_allclose(jax.jacfwd(product)(x, w), matrix.T, rtol=1e-6)
    np.testing.assert_allclose(jax.jacrev(product)(x, w), matrix.T, rtol=1e-6)
    scales = w.scales.astype(jnp.float32)
    forward = jax.jacfwd(lambda s: product(x, w._replace(scales=s)))(scales)
    backward = jax.jacrev(lambda s: product(x, w._replace(scales=s)))(scales)
    # Sums of 64 products of a code, at most 127, and a number of at most one.
    np.testing.assert_allclose(forward, backward, rtol=0, atol=64 * 64 * 127 * EPS)


def test_dequantising_is_one_operation():
    w = kernel("4bit", rows())
    program = jax.make_jaxpr(lambda w: dequantise(w, jnp.float32))(w)
    assert [equation.primitive.name for equation in program.eqns] == ["custom_jvp_call"]
