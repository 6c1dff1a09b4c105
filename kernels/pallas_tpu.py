"""The adapted matrix product as Pallas kernels for a TPU (Mosaic).

The grid runs over columns j, groups g, rows i and, innermost, the contraction t. VMEM keeps two float32 sums,

    base_ij += x_it W_tj,    low_i += x_it A_t^T,    and after the last t  y_ij = base_ij + scale low_i B_j^T,

so x A^T needs no additional memory traffic, and only y is written. If all groups have the same inputs,
base_ij is computed once, and G more steps add the low-rank term of each group: W is read once for all draws.

Values beyond the end of an axis are undefined. Along the contraction they are masked; beyond rows and columns
they only affect outputs that are discarded.

These kernels have not run on a device: see CONTRIBUTING.md.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from bnlora.kernels.limits import common_refusal
from bnlora.kernels.quantised import QuantisedMatrix, Weights
from bnlora.kernels.tiles import Tiles, gradient_rows, product_tiles


class _Product(NamedTuple):
    """Static sizes and options of a product."""

    k: int
    scale: float
    summed: int
    tiles: Tiles


def refusal(x: Array | jax.ShapeDtypeStruct, w: Weights, a: Array, b: Array) -> str | None:
    """The reason why these kernels do not support the arrays, forwards or backwards, or None if they do.

    Args:
        x: Inputs, (m, d_in); arrays or shapes with types.
        w: Frozen kernel, (d_in, d_out).
        a: Down projection, (rank, d_in).
        b: Up projection, (d_out, rank).
    """
    reason = common_refusal(x, w, a, b)
    if reason is not None:
        return reason
    (m, k), n, rank = x.shape, w.shape[1], a.shape[0]
    sizes = {"itemsize": x.dtype.itemsize, "weight_itemsize": _values(w).dtype.itemsize}
    if product_tiles(m, k, n, rank, **sizes) is None or product_tiles(m, n, k, rank, **sizes) is None:
        return f"no block of a product of {(m, k)} by {(k, n)} fits into VMEM"
    if gradient_rows(m, k, n, rank, itemsize=x.dtype.itemsize) is None:
        return f"the gradients of factors of {rank} by {k} and {n} do not fit into VMEM"
    return None


def product(
    x: Float[Array, "groups_or_1 m k"],
    w: Weights,
    a: Float[Array, "groups rank k"],
    b: Float[Array, "groups n rank"],
    *,
    scale: float,
    summed: int = 0,
    interpret: Any = False,
) -> Float[Array, "groups m n"]:
    """The same product as `reference.product`; `interpret` runs it step by step on any backend."""
    a, b = _two_ranks(a, b)
    m, k, n, rank = *x.shape[1:], b.shape[1], a.shape[1]
    sizes = {"itemsize": x.dtype.itemsize, "weight_itemsize": _values(w).dtype.itemsize}
    tiles = product_tiles(m, k, n, rank, **sizes)
    if tiles is None:
        raise NotImplementedError(f"no block of a product of {(m, k)} by {(k, n)} fits into VMEM")
    case = _Product(k, scale, summed, tiles)
    run = _shared if x.shape[0] < a.shape[0] else _own
    # A rank along the lanes (last axis) would be padded to 128, in memory too: keep it off the last axis.
    return run(x, w, a, jnp.swapaxes(b, 1, 2), case, interpret)


def _values(w: Weights) -> Array:
    return w.values if isinstance(w, QuantisedMatrix) else w


def _two_ranks(a: Array, b: Array) -> tuple[Array, Array]:
    """Pad rank 1 to rank 2 with zeros: Mosaic cannot multiply a matrix by one row of bfloat16."""
    if a.shape[-2] > 1:
        return a, b
    sides = [(0, 0)] * (a.ndim - 2)
    return jnp.pad(a, [*sides, (0, 1), (0, 0)]), jnp.pad(b, [*sides, (0, 0), (0, 1)])


def _own(x: Array, w: Weights, a: Array, b: Array, case: _Product, interpret: Any) -> Array:
    """The product if every group has its own inputs."""
    (groups, m, k), (rank, n), tiles = x.shape, b.shape[1:], case.tiles
    weights, weight_specs = _weight_blocks(w, case, lambda j, g, i, t: t)
    return pl.pallas_call(
        partial(_own_kernel, case=case),
        out_shape=jax.ShapeDtypeStruct((groups, m, n), x.dtype),
        grid=(pl.cdiv(n, tiles.columns), groups, pl.cdiv(m, tiles.rows), pl.cdiv(k, tiles.depth)),
        in_specs=[
            pl.BlockSpec((None, tiles.rows, tiles.depth), lambda j, g, i, t: (g, i, t)),
            pl.BlockSpec((None, rank, tiles.depth), lambda j, g, i, t: (g, 0, t)),
            pl.BlockSpec((None, rank, tiles.columns), lambda j, g, i, t: (g, 0, j)),
            *weight_specs,
        ],
        out_specs=pl.BlockSpec((None, tiles.rows, tiles.columns), lambda j, g, i, t: (g, i, j)),
        scratch_shapes=[
            pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32),
            pltpu.VMEM((tiles.rows, rank), jnp.float32),
        ],
        compiler_params=_parameters("parallel", "parallel", "parallel", "arbitrary"),
        cost_estimate=_cost(2 * groups * m * (k * n + rank * (k + n)), x, *weights, a, b, (groups, m, n)),
        interpret=interpret,
        name="lora_matmul",
    )(x, a, b, *weights)


def _own_kernel(x_ref, a_ref, b_ref, w_ref, *rest, case: _Product) -> None:
    *scales, y_ref, base_ref, low_ref = rest
    t = pl.program_id(3)

    @pl.when(t == 0)
    def start() -> None:
        base_ref[...] = jnp.zeros_like(base_ref)
        low_ref[...] = jnp.zeros_like(low_ref)

    x = _within(x_ref[...], 1, t, case)
    base_ref[...] += _base(x, w_ref, scales, t, case)
    low_ref[...] += _dot(x, _within(a_ref[...], 1, t, case), (1, 1))

    @pl.when(t == pl.num_programs(3) - 1)
    def finish() -> None:
        low = _dot(low_ref[...].astype(b_ref.dtype), b_ref[...], (1, 0))
        y_ref[...] = _sum(base_ref[...], low, scales, case).astype(y_ref.dtype)


def _shared(x: Array, w: Weights, a: Array, b: Array, case: _Product, interpret: Any) -> Array:
    """The product if all groups have the same inputs: steps over the contraction, then one for each group."""
    (_, m, k), (groups, rank, n), tiles = x.shape, b.shape, case.tiles
    steps = pl.cdiv(k, tiles.depth)
    # x A^T of all groups is one thin product, computed first; every block of columns reads it.
    low = jnp.einsum("mk,grk->grm", x[0], a, preferred_element_type=jnp.float32).astype(x.dtype)
    weights, weight_specs = _weight_blocks(w, case, lambda j, i, t: jnp.minimum(t, steps - 1))

    def group(t: Array) -> Array:
        return jnp.maximum(t - steps, 0)

    return pl.pallas_call(
        partial(_shared_kernel, case=case, steps=steps),
        out_shape=jax.ShapeDtypeStruct((groups, m, n), x.dtype),
        grid=(pl.cdiv(n, tiles.columns), pl.cdiv(m, tiles.rows), steps + groups),
        in_specs=[
            pl.BlockSpec((tiles.rows, tiles.depth), lambda j, i, t: (i, jnp.minimum(t, steps - 1))),
            pl.BlockSpec((None, rank, tiles.rows), lambda j, i, t: (group(t), 0, i)),
            pl.BlockSpec((None, rank, tiles.columns), lambda j, i, t: (group(t), 0, j)),
            *weight_specs,
        ],
        out_specs=pl.BlockSpec((None, tiles.rows, tiles.columns), lambda j, i, t: (group(t), i, j)),
        scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)],
        compiler_params=_parameters("parallel", "parallel", "arbitrary"),
        cost_estimate=_cost(2 * m * n * (k + groups * rank), x, *weights, low, b, (groups, m, n)),
        interpret=interpret,
        name="lora_matmul_draws",
    )(x[0], low, b, *weights)


def _shared_kernel(x_ref, low_ref, b_ref, w_ref, *rest, case: _Product, steps: int) -> None:
    *scales, y_ref, base_ref = rest
    t = pl.program_id(2)

    @pl.when(t == 0)
    def start() -> None:
        base_ref[...] = jnp.zeros_like(base_ref)

    @pl.when(t < steps)
    def accumulate() -> None:
        base_ref[...] += _base(_within(x_ref[...], 1, t, case), w_ref, scales, t, case)

    @pl.when(t >= steps)
    def finish() -> None:
        low = _dot(low_ref[...], b_ref[...], (0, 0))
        y_ref[...] = _sum(base_ref[...], low, scales, case).astype(y_ref.dtype)


def _weight_blocks(w: Weights, case: _Product, depth: Any) -> tuple[tuple[Array, ...], list[pl.BlockSpec]]:
    """The weights, with scales if quantised, and their block specs; `depth` is the block index along t."""
    tiles = case.tiles
    sides = (tiles.depth, tiles.columns) if case.summed == 0 else (tiles.columns, tiles.depth)

    def at(*index: Any) -> tuple[Any, Any]:
        return (depth(*index), index[0]) if case.summed == 0 else (index[0], depth(*index))

    blocks = [pl.BlockSpec(sides, at)]
    if not isinstance(w, QuantisedMatrix):
        return (w,), blocks
    # Scales belong to axis 1 of w: to the columns of x W, to the contraction of x W^T.
    return (w.values, w.scales[None, :]), [*blocks, pl.BlockSpec((1, sides[1]), lambda *i: (0, at(*i)[1]))]


def _base(x: Array, w_ref: Any, scales: list, t: Array, case: _Product) -> Array:
    """One block's part of the sum over the contraction."""
    w = w_ref[...].astype(x.dtype)
    # For x W^T the scales vary along the contraction, so they multiply x here instead of the sum later.
    if scales and case.summed == 1:
        x = _within(x * scales[0][...].astype(x.dtype), 1, t, case)
    return _dot(x, _within(w, case.summed, t, case), (1, case.summed))


def _sum(base: Array, low: Array, scales: list, case: _Product) -> Array:
    """The output block from both terms, in float32."""
    if scales and case.summed == 0:
        base = base * scales[0][...].astype(jnp.float32)
    return base + case.scale * low


def _within(block: Array, axis: int, t: Array, case: _Product) -> Array:
    """The block with zeros beyond the end of the contraction, where values are undefined."""
    if case.k % case.tiles.depth == 0:
        return block
    position = t * case.tiles.depth + jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(position < case.k, block, jnp.zeros_like(block))


def factor_gradients(
    x: Float[Array, "m k"],
    cotangent: Float[Array, "m n"],
    a: Float[Array, "rank k"],
    b: Float[Array, "n rank"],
    *,
    scale: float,
    interpret: Any = False,
) -> tuple[Float[Array, "rank k"], Float[Array, "n rank"]]:
    """The same as `reference.factor_gradients`; it reads x and the cotangent once."""
    kept = a.shape[0]
    a, b = _two_ranks(a, b)
    (m, k), (n, rank) = x.shape, b.shape
    rows = gradient_rows(m, k, n, rank, itemsize=x.dtype.itemsize)
    if rows is None:
        raise NotImplementedError(f"the gradients of factors of {rank} by {k} and {n} do not fit into VMEM")

    def whole(side: int) -> pl.BlockSpec:
        return pl.BlockSpec((rank, side), lambda i: (0, 0))

    gradient_a, gradient_b = pl.pallas_call(
        partial(_gradient_kernel, m=m, rows=rows, scale=scale),
        out_shape=[jax.ShapeDtypeStruct((rank, side), jnp.float32) for side in (k, n)],
        grid=(pl.cdiv(m, rows),),
        in_specs=[
            pl.BlockSpec((rows, k), lambda i: (i, 0)),
            pl.BlockSpec((rows, n), lambda i: (i, 0)),
            whole(k),
            whole(n),
        ],
        out_specs=[whole(k), whole(n)],
        compiler_params=_parameters("arbitrary"),
        cost_estimate=_cost(4 * m * rank * (k + n), x, cotangent, a, b, (2 * rank, k + n)),
        interpret=interpret,
        name="lora_factor_gradients",
    )(x, cotangent, a, b.T)
    return gradient_a[:kept].astype(a.dtype), gradient_b[:kept].T.astype(b.dtype)


def _gradient_kernel(x_ref, y_ref, a_ref, b_ref, da_ref, db_ref, *, m: int, rows: int, scale: float) -> None:
    """Add one block of rows to both gradients; b and its gradient are transposed, with the rank first."""
    i = pl.program_id(0)

    @pl.when(i == 0)
    def start() -> None:
        da_ref[...] = jnp.zeros_like(da_ref)
        db_ref[...] = jnp.zeros_like(db_ref)

    def kept(block: Array) -> Array:
        position = i * rows + jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
        return jnp.where(position < m, block, jnp.zeros_like(block)) if m % rows else block

    x, cotangent = kept(x_ref[...]), kept(y_ref[...])
    up = _dot(cotangent, b_ref[...], (1, 1)).astype(x.dtype)
    low = _dot(x, a_ref[...], (1, 1)).astype(x.dtype)
    da_ref[...] += scale * _dot(up, x, (0, 0))
    db_ref[...] += scale * _dot(low, cotangent, (0, 0))


def _dot(left: Array, right: Array, axes: tuple[int, int]) -> Array:
    """Sum over one axis of each, in float32."""
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(left, right, numbers, preferred_element_type=jnp.float32)


def _parameters(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics)


def _cost(flops: int, *arrays: Any) -> pl.CostEstimate:
    """Cost estimate for the compiler's scheduler: every array moves once; the last argument is y's shape."""
    *read, written = arrays
    size = sum(value.size * value.dtype.itemsize for value in read)
    count = 1
    for side in written:
        count *= side
    return pl.CostEstimate(
        flops=flops, bytes_accessed=size + count * read[0].dtype.itemsize, transcendentals=0
    )
