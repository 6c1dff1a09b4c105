"""The adapted matrix product against its definition, in float64 numpy and through the public entry point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlora.kernels import api, reference

EPS = float(np.finfo(np.float32).eps)


def operands(*batch: int, d_in: int = 12, d_out: int = 7, rank: int = 3):
    generator = np.random.default_rng(0)
    shapes = ((*batch, d_in), (d_in, d_out), (rank, d_in), (d_out, rank))
    return tuple(jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3, 4)])
@pytest.mark.parametrize("function", [reference.lora_matmul, api.lora_matmul])
def test_equals_the_product_with_the_merged_kernel(function, batch):
    x, w, a, b = operands(*batch)
    x64, w64, a64, b64 = (np.asarray(value, np.float64) for value in (x, w, a, b))
    expected = x64 @ (w64 + 0.5 * (b64 @ a64).T)
    # An entry sums at most d_in + rank products; its rounding error is bounded by the sum of magnitudes.
    magnitude = np.abs(x64) @ (np.abs(w64) + 0.5 * (np.abs(b64) @ np.abs(a64)).T)
    error = np.abs(np.asarray(function(x, w, a, b, scale=0.5)) - expected)
    assert (error <= (12 + 3 + 2) * EPS * magnitude).all()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_zero_b_is_the_base_bit_for_bit(wrap):
    x, w, a, b = operands(33, d_in=64, d_out=48)
    adapted, plain = wrap(api.lora_matmul)(x, w, a, jnp.zeros_like(b)), wrap(jnp.matmul)(x, w)
    assert np.array_equal(np.asarray(adapted), np.asarray(plain))


def test_the_update_is_never_formed():
    x, w, a, b = operands(4, d_in=50, d_out=40, rank=2)
    jaxpr = jax.make_jaxpr(api.lora_matmul)(x, w, a, b)
    shapes = [variable.aval.shape for equation in jaxpr.eqns for variable in equation.outvars]
    assert (40, 50) not in shapes
    assert (50, 40) not in shapes


def test_named_implementation_is_the_default():
    args = operands(4)
    assert np.array_equal(api.lora_matmul(*args), api.lora_matmul(*args, implementation="xla"))


def test_unknown_implementation_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown implementation 'xlaa'.*nearest: 'xla'"):
        api.lora_matmul(*operands(4), implementation="xlaa")


def test_wrong_shapes_are_all_shown():
    x, w, a, b = operands(4)
    with pytest.raises(ValueError, match=r"x \(4, 12\), w \(12, 7\), a \(3, 12\), b \(3, 7\)"):
        api.lora_matmul(x, w, a, b.T)
