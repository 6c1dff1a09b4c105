"""Programs for absent devices: lowered for TPU and CUDA, and the kernel really is in them.

Lowering runs Pallas' own checks of blocks, types and loads; it compiles nothing and computes nothing.
"""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from builders.programs import product_shapes
from jax import export
from jax.sharding import AbstractMesh

from bnlora.kernels import api

# Newer versions of JAX announce the removal of this route to a GPU; see CONTRIBUTING.md.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

CALLS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}
SIDES = [(5, 12, 7, 3), (37, 96, 200, 9), (1, 64, 2, 1), (600, 576, 1536, 8), (100, 5000, 130, 64)]


def on_a_gpu() -> contextlib.AbstractContextManager:
    """Where newer versions of JAX ask which GPU a program is for."""
    try:
        from jax.sharding import AbstractDevice
    except ImportError:
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def exported(platform: str, function, *arguments) -> str:
    """The program for a platform as text."""
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in CALLS.values()]
    with on_a_gpu() if platform == "cuda" else contextlib.nullcontext():
        made = export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)(*arguments)
    return made.mlir_module()


apply = partial(api.lora_matmul, scale=0.5, implementation="pallas")


@pytest.mark.parametrize("platform", list(CALLS))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_the_product_lowers_to_the_kernel(platform, dtype, eight_bits, sides):
    text = exported(platform, apply, *product_shapes(sides, dtype, eight_bits=eight_bits))
    assert text.count(CALLS[platform]) == 1


@pytest.mark.parametrize("platform", list(CALLS))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_the_gradient_lowers_to_the_kernels(platform, dtype, sides):
    x, w, a, b = product_shapes(sides, dtype)

    def gradient(x, w, a, b):
        return jax.grad(lambda x, a, b: jnp.sin(apply(x, w, a, b)).sum(), argnums=(0, 1, 2))(x, a, b)

    # Forward pass and dx; on a TPU the factors' gradients are a kernel too, on a GPU XLA computes them.
    assert exported(platform, gradient, x, w, a, b).count(CALLS[platform]) == {"tpu": 3, "cuda": 2}[platform]


@pytest.mark.parametrize("platform", list(CALLS))
@pytest.mark.parametrize("own_inputs", [False, True])
def test_draws_lower_to_one_kernel(platform, own_inputs):
    x, w, a, b = product_shapes((40, 96, 200, 4), jnp.float32, draws=8)
    x = jax.ShapeDtypeStruct((8, *x.shape), x.dtype) if own_inputs else x
    mapped = jax.vmap(apply, in_axes=(0 if own_inputs else None, None, 0, 0))
    text = exported(platform, mapped, x, w, a, b)
    assert text.count(CALLS[platform]) == 1
    # Over the same inputs, x A^T of all draws is one product outside the kernel.
    assert text.count("stablehlo.dot_general") == (0 if own_inputs else 1)


@pytest.mark.parametrize("platform", list(CALLS))
def test_the_reference_has_no_kernel(platform):
    text = exported(
        platform, partial(api.lora_matmul, implementation="xla"), *product_shapes(SIDES[0], jnp.float32)
    )
    assert not any(call in text for call in CALLS.values())
