"""The adapted matrix product as Pallas kernels for a GPU (Triton).

Each program of the grid computes one block of outputs, with its sums in registers:

    base = sum_t x_t W_t,    low = sum_t x_t A_t^T,    y = base + scale low B^T.

If all groups have the same inputs, a program computes base once and writes the block of every group. Sides of
Triton blocks are powers of two, so every load is masked; zeros beyond an axis do not change the sums.

These kernels have not run on a device: see CONTRIBUTING.md.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from bnlora.kernels.limits import LARGEST_RANK
from bnlora.kernels.quantised import QuantisedMatrix, Weights

SMALLEST = 16
"""Smallest side of a block that tensor cores multiply."""


class _Product(NamedTuple):
    """Static sizes of a product and of its blocks."""

    m: int
    k: int
    n: int
    rank: int
    rows: int
    columns: int
    depth: int
    ranks: int
    groups: int
    scale: float
    summed: int


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
    case = _case(x, w, a, b, scale, summed)
    weights = (w.values, w.scales) if isinstance(w, QuantisedMatrix) else (w,)
    tiles = (pl.cdiv(case.m, case.rows), pl.cdiv(case.n, case.columns))
    shared = x.shape[0] < a.shape[0]
    # x A^T of all groups is one thin product, computed first; each program reads its rows of it.
    inputs = (x[0], jnp.einsum("mk,grk->gmr", x[0], a)) if shared else (x, a)
    return pl.pallas_call(
        partial(_shared_kernel if shared else _own_kernel, case=case),
        out_shape=jax.ShapeDtypeStruct((case.groups, case.m, case.n), x.dtype),
        grid=tiles if shared else (*tiles, case.groups),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="lora_matmul_draws" if shared else "lora_matmul",
    )(*inputs, b, *weights)


def _case(x: Array, w: Weights, a: Array, b: Array, scale: float, summed: int) -> _Product:
    m, k, n, rank = *x.shape[1:], b.shape[1], a.shape[1]
    return _Product(
        m,
        k,
        n,
        rank,
        rows=_side(m, 64),
        columns=_side(n, 64),
        depth=_side(k, 32),
        ranks=_side(rank, LARGEST_RANK),
        groups=a.shape[0],
        scale=scale,
        summed=summed,
    )


def _side(size: int, largest: int) -> int:
    """The side of a block: a power of two from `SMALLEST` to `largest`."""
    return min(max(pl.next_power_of_2(size), SMALLEST), largest)


def _own_kernel(x_ref, a_ref, b_ref, w_ref, *rest, case: _Product) -> None:
    *scales, y_ref = rest
    rows, columns, group = _positions(case), _positions(case, axis=1), pl.program_id(2)
    ranks = (jnp.arange(case.ranks), case.rank)

    def step(t: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        inner = (t * case.depth + jnp.arange(case.depth), case.k)
        x = _load(x_ref, group, rows, inner)
        low = sums[1] + _dot(x, _load(a_ref, group, ranks, inner).T)
        return sums[0] + _base(x, w_ref, scales, inner, columns, case), low

    base, low = jax.lax.fori_loop(
        0,
        pl.cdiv(case.k, case.depth),
        step,
        (jnp.zeros((case.rows, case.columns), jnp.float32), jnp.zeros((case.rows, case.ranks), jnp.float32)),
    )
    b = _load(b_ref, group, columns, ranks)
    out = _sum(base, low.astype(b.dtype), b, scales, columns, case)
    _store(y_ref, group, rows, columns, out)


def _shared_kernel(x_ref, low_ref, b_ref, w_ref, *rest, case: _Product) -> None:
    *scales, y_ref = rest
    rows, columns, ranks = _positions(case), _positions(case, axis=1), (jnp.arange(case.ranks), case.rank)

    def step(t: Array, base: Array) -> Array:
        inner = (t * case.depth + jnp.arange(case.depth), case.k)
        return base + _base(_load(x_ref, None, rows, inner), w_ref, scales, inner, columns, case)

    zeros = jnp.zeros((case.rows, case.columns), jnp.float32)
    base = jax.lax.fori_loop(0, pl.cdiv(case.k, case.depth), step, zeros)

    def write(group: Array, nothing: None) -> None:
        low, b = _load(low_ref, group, rows, ranks), _load(b_ref, group, columns, ranks)
        _store(y_ref, group, rows, columns, _sum(base, low, b, scales, columns, case))
        return nothing

    jax.lax.fori_loop(0, case.groups, write, None)


def _positions(case: _Product, *, axis: int = 0) -> tuple[Array, int]:
    """Positions of this program's block along an axis of the output, and the length of the axis."""
    side, end = ((case.rows, case.m), (case.columns, case.n))[axis]
    return pl.program_id(axis) * side + jnp.arange(side), end


def _base(
    x: Array, w_ref: Any, scales: list, inner: tuple[Array, int], columns: tuple[Array, int], case: _Product
) -> Array:
    """One block's part of the sum over the contraction."""
    w = _load(w_ref, None, inner, columns) if case.summed == 0 else _load(w_ref, None, columns, inner).T
    # For x W^T the scales vary along the contraction, so they multiply x here instead of the sum later.
    if scales and case.summed == 1:
        x = x * _load_vector(scales[0], inner)[None, :].astype(x.dtype)
    return _dot(x, w.astype(x.dtype))


def _sum(
    base: Array, low: Array, b: Array, scales: list, columns: tuple[Array, int], case: _Product
) -> Array:
    """The output block from both sums, in float32."""
    if scales and case.summed == 0:
        base = base * _load_vector(scales[0], columns)[None, :].astype(jnp.float32)
    return base + case.scale * _dot(low, b.T)


def _load(ref: Any, group: Any, rows: tuple[Array, int], columns: tuple[Array, int]) -> Array:
    """A block with zeros beyond the ends of its axes; `group` is the leading index, or None without one."""
    inside = (rows[0] < rows[1])[:, None] & (columns[0] < columns[1])[None, :]
    index = (rows[0][:, None], columns[0][None, :])
    at = ref.at[index] if group is None else ref.at[(group, *index)]
    return plgpu.load(at, mask=inside, other=0)


def _load_vector(ref: Any, positions: tuple[Array, int]) -> Array:
    return plgpu.load(ref.at[positions[0]], mask=positions[0] < positions[1], other=0)


def _store(ref: Any, group: Any, rows: tuple[Array, int], columns: tuple[Array, int], block: Array) -> None:
    inside = (rows[0] < rows[1])[:, None] & (columns[0] < columns[1])[None, :]
    plgpu.store(ref.at[group, rows[0][:, None], columns[0][None, :]], block.astype(ref.dtype), mask=inside)


def _dot(left: Array, right: Array) -> Array:
    return jnp.dot(left, right, preferred_element_type=jnp.float32)
