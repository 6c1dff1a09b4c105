"""Building blocks of decoder-only language models, as pure functions on arrays.

    RMSNorm      n(x) = g * x / sqrt(mean(x^2) + eps)
    rotary       pairs (x_i, x_{i + d/2}) are rotated by the angle position * theta^(-2 i / d)
    dense        y = x W (+ (x A^T) B^T if the layer is adapted)
    attention    softmax(q k^T / sqrt(d) + mask) v, with several query heads sharing one key/value head

Statistics (means of squares, softmax) are computed in float32 for every type of input. Weights and adapters
are rounded to the type of the activations.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bnlora._util.checks import brief, check_positive
from bnlora.kernels import api
from bnlora.models.execution import Execution, keep_product, rerun


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequency-dependent stretching of rotary angles (Llama 3.1 and later).

    Wavelengths above `original_length / low_frequency_factor` are stretched by `factor`. Wavelengths below
    `original_length / high_frequency_factor` are unchanged. Those in between are interpolated.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __post_init__(self) -> None:
        """Raise `ValueError` for numbers that do not give finite angles."""
        check_positive(vars(self))
        if not self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                "the low frequency factor of the rotary scaling must be below the high one; got "
                f"{self.low_frequency_factor} and {self.high_frequency_factor}"
            )


def rotary_settings(config: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Read the rotary base and scaling from a Hugging Face configuration with old or new keys.

    Args:
        config: Parsed config.json with `rope_theta` and `rope_scaling` (old) or with `rope_parameters` (new).

    Returns:
        The base theta, and the Llama 3 scaling or None.

    Raises:
        ValueError: If the kind of scaling is not supported, or its keys are missing.
    """
    parts = {key: config.get(key) for key in ("rope_scaling", "rope_parameters")}
    settings: dict[str, Any] = {}
    for key, part in parts.items():
        if not isinstance(part, Mapping | None):
            raise ValueError(f"{key} in the model configuration must be an object; got {brief(part)}")
        settings |= {name: value for name, value in (part or {}).items() if value is not None}
    theta = settings.get("rope_theta", config.get("rope_theta", 10000.0))
    check_positive({"rope_theta in the model configuration": theta})
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(
            f"rotary scaling {brief(kind)} is not supported; supported are 'default' and 'llama3'"
        )
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if key not in settings]
    if missing:
        raise ValueError(f"the 'llama3' rotary scaling in the model configuration lacks the keys {missing}")
    check_positive({f"{key} of the 'llama3' rotary scaling": settings[key] for key in keys})
    return float(theta), Llama3Scaling(*(settings[key] for key in keys))


def rms_norm(x: Float[Array, "*batch d"], gain: Float[Array, " d"], eps: float) -> Float[Array, "*batch d"]:
    """Divide by the root mean square over the last axis and multiply by a gain."""
    x32 = x.astype(jnp.float32)  # bfloat16 would lose precision in the mean of squares
    normal = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (gain.reshape((1,) * (x.ndim - 1) + (-1,)) * normal).astype(x.dtype)


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Llama3Scaling | None = None
) -> Float[np.ndarray, " half"]:
    """Angular frequency of each of the head_dim / 2 rotated pairs, in radians per position."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    if scaling is None:
        return frequencies
    # Turns of a pair within the original context: few turns are stretched (keep 0), many are kept (keep 1).
    turns = scaling.original_length * frequencies / (2 * np.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    keep = np.clip((turns - scaling.low_frequency_factor) / span, 0.0, 1.0)
    return ((1 - keep) * frequencies / scaling.factor + keep * frequencies).astype(np.float32)


def rotary_tables(
    positions: Int[Array, "b t"], frequencies: Float[np.ndarray, " half"]
) -> tuple[Float[Array, "b t 1 half"], Float[Array, "b t 1 half"]]:
    """Cosines and sines of the rotation angles, with an axis of length 1 for the heads."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b t heads dim"], cosine: Float[Array, "b t 1 half"], sine: Float[Array, "b t 1 half"]
) -> Float[Array, "b t heads dim"]:
    """Apply rotary position embedding; pair i has the components i and i + dim / 2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


def dense(
    x: Float[Array, "*batch d_in"],
    kernel: Float[Array, "d_in d_out"],
    adapter: Mapping[str, Array] | None,
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch d_out"]:
    """Multiply by a frozen kernel, and add the low-rank update if there is an adapter.

    Args:
        x: Inputs, (..., d_in).
        kernel: Frozen weights, (d_in, d_out); rounded to the type of `x`.
        adapter: None, or {"a": (rank, d_in), "b": (d_out, rank)} including all scales; rounded to the type of
            `x`.
        implementation: Implementation of the adapted product; None for the default.

    Returns:
        Outputs, (..., d_out), of the type of `x`.
    """
    kernel = kernel.astype(x.dtype)
    if adapter is None:
        return keep_product(x @ kernel)
    a, b = (adapter[factor].astype(x.dtype) for factor in ("a", "b"))
    return keep_product(api.lora_matmul(x, kernel, a, b, implementation=implementation))


def causal_mask(mask: Bool[Array, "b t"]) -> Bool[Array, "b t t"]:
    """Whether each query may attend to each key (last axis): real tokens up to its own position."""
    length = mask.shape[1]
    return jnp.tril(jnp.ones((length, length), dtype=bool))[None, :, :] & mask[:, None, :]


def take_positions(x: Array, at: Int[Array, "b n"] | None) -> Array:
    """Each row of x, (b, t, ...), at its own positions, (b, n, ...); None returns x unchanged."""
    return x if at is None else jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def grouped_query_attention(
    query: Float[Array, "b t heads dim"],
    key: Float[Array, "b s kv_heads dim"],
    value: Float[Array, "b s kv_heads dim"],
    allowed: Bool[Array, "b t s"],
) -> Float[Array, "b t heads dim"]:
    """Attention in which heads / kv_heads query heads share each key/value head.

    Args:
        query: Rotated queries.
        key: Rotated keys.
        value: Values.
        allowed: Whether each query may attend to each key, as returned by `causal_mask`.

    Returns:
        Attended values. A query without any allowed key (padding on the left) gets zeros, not NaN.
    """
    batch, length, heads, dim = query.shape
    groups = query.reshape(batch, length, key.shape[2], heads // key.shape[2], dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", groups, key, preferred_element_type=jnp.float32) * dim**-0.5
    allowed = allowed[:, None, None, :, :]
    # A finite floor instead of -inf: a query without keys gets finite weights, then zeros.
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min), axis=-1)
    weights = jnp.where(allowed, weights, 0.0).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(batch, length, heads, dim)


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


def weights_of(index: Int[Array, ""], weights: Mapping[str, Array]) -> dict[str, Array]:
    """The weights of one layer, for a scan. Indexing avoids the copy that slicing the stack would make."""
    return {name: jax.lax.dynamic_index_in_dim(w, index, keepdims=False) for name, w in weights.items()}


def run_layers(
    layer: Layer,
    hidden: Float[Array, "b t d"],
    weights: Mapping[str, Array],
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
