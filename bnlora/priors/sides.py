"""The sides of an inducing matrix as a prior declares them: learned, random or fixed frames, or Z and D."""

import zlib
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpyro
from jax import Array
from numpyro.distributions import constraints

from bnlora.priors import gp
from bnlora.priors.hyper import require_count

Inducing = Literal["frames", "bases"]
Oversize = Literal["clip", "keep"]
Frames: TypeAlias = Literal["learned"] | Array | Mapping[str, tuple[Array, Array]]
"""`"learned"`; a random key that fixes random frames; or `{"<family>.<factor>": (rows, columns)}`."""

JITTER = 1e-6  # added to D^2, and so part of every use of K; relative to Z Z^T, which starts near identity


def frames_side(
    name: str, which: str, depth: int, d: int, size: int, *, frames: Frames, reliability: float
) -> gp.Side:
    """A side of orthonormal frames.

    Args:
        name: `<family>.<factor>`.
        which: `"rows"` or `"cols"`.
        depth: Number of layers.
        d: Length of the side.
        size: Inducing size, clipped to `d`.
        frames: The source of the frames. Only learned frames have parameters, `<name>.<which>.frame` and
            `.reliability`; otherwise the eigenvalues stay at `reliability`.
        reliability: Eigenvalue of `P`: the start value for learned frames, otherwise fixed.

    Raises:
        ValueError: If `frames` is a mapping that lacks this factor or has another shape.
    """
    k, prefix = min(size, d), f"{name}.{which}"
    p = jnp.full((depth, k), reliability)
    if isinstance(frames, str):
        # Only the span matters. Entries of order one suit the same learning rates as V.
        free = numpyro.param(f"{prefix}.frame", lambda key: jax.random.normal(key, (depth, d, k)))
        p = numpyro.param(f"{prefix}.reliability", p, constraint=constraints.unit_interval)
        return gp.frame_side(free, p)
    if isinstance(frames, Mapping):
        return gp.frame_side(_fixed_frame(frames, name, which, (depth, d, k)), p)
    key = jax.random.fold_in(frames, zlib.crc32(prefix.encode()))
    return gp.frame_side(jax.random.normal(key, (depth, d, k)), p)


def _fixed_frame(
    frames: Mapping[str, tuple[Array, Array]], name: str, which: str, shape: tuple[int, ...]
) -> Array:
    if name not in frames:
        raise ValueError(f"frames has no entry for {name!r}; it has {', '.join(map(repr, frames))}")
    free = jnp.asarray(frames[name][which == "cols"])
    if free.shape != shape:
        raise ValueError(f"the {which} frame of {name!r} must have shape {shape}; got {free.shape}")
    return free


def require_sizes(rows: int, cols: int) -> None:
    """Raise `ValueError` unless both inducing sizes are whole numbers of at least one."""
    require_count("the inducing size rows", rows)
    require_count("the inducing size cols", cols)


def require_frames(frames: Any) -> None:
    """Raise `ValueError` unless `frames` is "learned", a random key or a mapping."""
    is_key = isinstance(frames, Array) and (
        jnp.issubdtype(frames.dtype, jax.dtypes.prng_key)
        or (frames.dtype == jnp.uint32 and frames.shape == (2,))
    )
    if frames != "learned" if isinstance(frames, str) else not (is_key or isinstance(frames, Mapping)):
        got = repr(frames) if isinstance(frames, str) else type(frames).__name__
        raise ValueError(
            f"frames must be 'learned', a random key, or {{'<family>.<factor>': (rows, columns)}}; got {got}"
        )


def bases(
    prefix: str, depth: int, d: int, size: int, *, oversize: Oversize, reliability: float
) -> tuple[Array, Array]:
    """The paper's inducing bases `Z`, (layer, m, d), and inducing noise, (layer, m), as parameters.

    The returned noise includes the jitter, so that mean, conditional and whitening use the same `K`.
    """
    m = min(size, d) if oversize == "clip" else size
    Z = numpyro.param(f"{prefix}.Z", lambda key: jax.random.normal(key, (depth, m, d)) * d**-0.5)
    noise = (1 / reliability - 1) ** 0.5  # Z Z^T starts near the identity, where p = 1 / (1 + D^2)
    D = numpyro.param(f"{prefix}.D", jnp.full((depth, m), noise), constraint=constraints.softplus_positive)
    return Z, jnp.sqrt(D**2 + JITTER)
