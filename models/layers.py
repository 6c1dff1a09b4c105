"""Building blocks of language models, as pure functions on arrays, and the loop over their layers.

    RMSNorm      n(x) = g * x / sqrt(mean(x^2) + eps)
    LayerNorm    n(x) = g * (x - mean(x)) / sqrt(var(x) + eps) + s
    dense        y = x W + c (+ (x A^T) B^T if the layer is adapted)

Statistics (means of squares) are computed in float32 for every type of input. Weights and adapters are
rounded to the type of the activations.
"""

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bnlora.kernels import api
from bnlora.kernels.quantised import Kernel, QuantisedMatrix, Weights, dequantise, picked
from bnlora.models.execution import Execution, keep_product, rerun


def rms_norm(x: Float[Array, "*batch d"], gain: Float[Array, " d"], eps: float) -> Float[Array, "*batch d"]:
    """Divide by the root mean square over the last axis and multiply by a gain."""
    x32 = x.astype(jnp.float32)  # bfloat16 would lose precision in the mean of squares
    normal = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (gain.reshape((1,) * (x.ndim - 1) + (-1,)) * normal).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*batch d"], gain: Float[Array, " d"], shift: Float[Array, " d"], eps: float
) -> Float[Array, "*batch d"]:
    """Subtract the mean over the last axis, divide by the standard deviation, apply gain and shift."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    axes = (1,) * (x.ndim - 1) + (-1,)
    return (gain.reshape(axes) * normal + shift.reshape(axes)).astype(x.dtype)


def soft_cap(x: Float[Array, "*batch"], cap: float | None) -> Float[Array, "*batch"]:
    """`cap * tanh(x / cap)`; None leaves the numbers as they are."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def dense(
    x: Float[Array, "*batch d_in"],
    kernel: Kernel,
    adapter: Mapping[str, Array] | None,
    *,
    bias: Float[Array, " d_out"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch d_out"]:
    """Multiply by a frozen kernel, and add the low-rank update if there is an adapter.

    Args:
        x: Inputs, (..., d_in).
        kernel: Frozen weights, (d_in, d_out), in floating point or quantised; rounded to the type of `x`.
        adapter: None, or {"a": (rank, d_in), "b": (d_out, rank)} including all scales; rounded to the type of
            `x`.
        bias: Added to the product; rounded to the type of `x`.
        implementation: Implementation of the adapted product; None for the default.

    Returns:
        Outputs, (..., d_out), of the type of `x`.
    """
    if adapter is None:
        product = x @ dequantise(kernel, x.dtype)
    else:
        a, b = (adapter[factor].astype(x.dtype) for factor in ("a", "b"))
        product = api.lora_matmul(x, _readable(kernel, x.dtype), a, b, implementation=implementation)
    return keep_product(product if bias is None else product + bias.astype(x.dtype))


def _readable(kernel: Kernel, dtype: jnp.dtype) -> Weights:
    """The kernel as the adapted product reads it: eight bits as they are, with scales of this type."""
    if isinstance(kernel, QuantisedMatrix):
        return QuantisedMatrix(kernel.values, kernel.scales.astype(dtype))
    return dequantise(kernel, dtype)


def take_positions(x: Array, at: Int[Array, "b n"] | None) -> Array:
    """Each row of x, (b, t, ...), at its own positions, (b, n, ...); None returns x unchanged."""
    return x if at is None else jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


@runtime_checkable
class Layer(Protocol):
    """One layer of a stack: keys and values at all positions; queries and later steps only at `at`."""

    def __call__(
        self,
        hidden: Array,
        weights: Mapping[str, Array],
        adapters: Mapping[str, Mapping[str, Array]],
        *,
        at: Int[Array, "b n"] | None = None,
    ) -> Array:
        """Map the layer's input, (b, t, d), to its output: (b, n, d), or (b, t, d) if `at` is None."""
        ...


def weights_of(index: Int[Array, ""], weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of one layer, for a scan. Indexing avoids the copy that slicing the stack would make."""

    def pick(w: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(w, index, keepdims=False)

    return jax.tree.map(lambda w: picked(w, pick), dict(weights))


def run_layers(
    layer: Layer,
    hidden: Float[Array, "b t d"],
    weights: Mapping[str, Any],
    adapters: Mapping[str, Mapping[str, Array]],
    *,
    first_layer: int,
    stop: int,
    at: Int[Array, "b n"] | None = None,
    execution: Execution,
) -> Float[Array, "b n d"]:
    """Run the layers [first_layer, stop) of a stack in one `jax.lax.scan`; with `at`, the last one apart.

    Args:
        layer: Maps (hidden, weights of one layer, adapters of one layer) to hidden.
        hidden: Input of the first layer; rounded to the type of the activations.
        weights: Weights stacked over all layers of the model.
        adapters: Adapters stacked over the layers that run.
        first_layer: The lowest layer that runs.
        stop: One past the last layer.
        at: Requested positions of each row; None means all.
        execution: Type of the activations, and what the backward pass recomputes.

    Returns:
        Output of layer stop - 1 at these positions.
    """
    hidden = hidden.astype(execution.dtype)
    if first_layer == stop:
        return take_positions(hidden, at)

    # The backward pass indexes a layer's weights again instead of storing a copy for every layer.
    @partial(rerun, remat=execution.remat)
    def apply(hidden: Array, index: Array, adapter: Mapping[str, Any], at: Array | None = None) -> Array:
        return layer(hidden, weights_of(index, weights), adapter, at=at)

    def step(hidden: Array, inputs: tuple[Array, Mapping[str, Mapping[str, Array]]]) -> tuple[Array, None]:
        return apply(hidden, *inputs), None

    steps = (jnp.arange(first_layer, stop), adapters)
    if at is None:
        return jax.lax.scan(step, hidden, steps)[0]
    # With `at`, only the last layer can skip positions: the layers below need all of them as keys.
    below, top = jax.tree.map(lambda x: x[:-1], steps), jax.tree.map(lambda x: x[-1], steps)
    hidden = jax.lax.scan(step, hidden, below)[0] if stop - first_layer > 1 else hidden
    return apply(hidden, *top, at)


def check_adapters(
    adapters: Mapping[str, Mapping[str, Array]], shapes: Mapping[str, tuple[int, int]], count: int
) -> None:
    """Check that stacked adapters fit their modules.

    Args:
        adapters: {module: {"a": (count, rank, d_in), "b": (count, d_out, rank)}}.
        shapes: (d_in, d_out) of each adaptable module.
        count: Number of stacked layers.

    Raises:
        ValueError: If a module is unknown (the message has the nearest name) or a shape does not fit.
    """
    for name, pair in adapters.items():
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes, n=1, cutoff=0.0)[0]
            raise ValueError(f"no module {name!r} to adapt here; modules: {list(shapes)}, nearest: {near!r}")
        if set(pair) != {"a", "b"}:
            raise ValueError(f"the adapter of {name!r} must have the keys 'a' and 'b'; got {sorted(pair)}")
        d_in, d_out = shapes[name]
        a, b = pair["a"].shape, pair["b"].shape
        rank = a[1] if len(a) == 3 else "rank"
        if a != (count, rank, d_in) or b != (count, d_out, rank):
            raise ValueError(
                f"the adapter of {name!r} must have a ({count}, {rank}, {d_in}) and "
                f"b ({count}, {d_out}, {rank}); got {a} and {b}"
            )
