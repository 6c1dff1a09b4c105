"""The kernels in the TPU compiler, on a host with its package but without a TPU (`make tpu`)."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from builders.programs import product_shapes

from bnlora.kernels import ahead, api

pytest.importorskip("libtpu", reason="the TPU compiler is not installed: make tpu")

apply = partial(api.lora_matmul, scale=0.5, implementation="pallas")
SIDES = [(5, 12, 7, 3), (1, 64, 2, 1), (37, 96, 200, 9), (600, 576, 1536, 8), (64, 576, 49_152, 8),
         (512, 4096, 4096, 16), (100, 5000, 130, 64), (2048, 8192, 8192, 16)]  # fmt: skip


def value_and_gradients(x, w, a, b):
    return jax.value_and_grad(lambda x, a, b: jnp.sin(apply(x, w, a, b)).sum(), argnums=(0, 1, 2))(x, a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_forward_and_backward_compile(dtype, eight_bits, sides):
    compiled = ahead.compile_for_tpu(
        value_and_gradients, *product_shapes(sides, dtype, eight_bits=eight_bits)
    )
    assert compiled.as_text().count("tpu_custom_call") >= 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("draws", [1, 8, 32])
def test_draws_compile_and_move_less_than_the_program_of_xla(dtype, draws):
    arguments = product_shapes((512, 2048, 2048, 8), dtype, draws=draws)
    axes = (None, None, 0, 0)
    fused = ahead.cost(ahead.compile_for_tpu(jax.vmap(apply, in_axes=axes), *arguments))
    plain = partial(api.lora_matmul, scale=0.5, implementation="xla")
    unfused = ahead.cost(ahead.compile_for_tpu(jax.vmap(plain, in_axes=axes), *arguments))
    assert fused.bytes_accessed < unfused.bytes_accessed
    # Every array once, plus new layouts of the thin factors; reading W twice would exceed the bound.
    moved = sum(value.size * value.dtype.itemsize for value in arguments)
    moved += draws * 512 * 2048 * arguments[0].dtype.itemsize
    assert fused.bytes_accessed >= moved
    if draws == 1:
        assert fused.bytes_accessed < moved + arguments[1].size * arguments[1].dtype.itemsize
