"""The derivative of the adapted product, and its rule under `vmap`.

The derivative is explicit (`reference`). So no gradient of W is formed, and x A^T is recomputed instead of
stored. Requesting the gradient of W raises an error. The rule is for reverse mode only: forward mode
(`jax.jvp`, `jax.linearize`) needs the implementation "xla", which has JAX's own derivatives.

`vmap` adds its axis to the groups of the product. Different adapters over common inputs share x W, in every
order of several `vmap`s. Different inputs under one adapter become more rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from bnlora.kernels.quantised import Weights


class Implementation(NamedTuple):
    """The two computations of the forward and the backward pass.

    Attributes:
        product: A function like `reference.product`.
        factor_gradients: A function like `reference.factor_gradients`.
    """

    product: Callable[..., Array]
    factor_gradients: Callable[..., tuple[Array, Array]]


def operation(
    implementation: Implementation, scale: float
) -> Callable[[Array, Weights, Array, Array], Array]:
    """The adapted product of x (m, d_in), w, a (rank, d_in) and b (d_out, rank), with both rules."""
    forward = _grouped(implementation, scale, summed=0)
    backward = _grouped(implementation, scale, summed=1)

    @jax.custom_vjp
    def apply(x: Array, w: Weights, a: Array, b: Array) -> Array:
        return forward(x[None], w, a[None], b[None])[0]

    def keep(x: Any, w: Any, a: Any, b: Any) -> tuple[Array, Any]:
        if any(leaf.perturbed for leaf in jax.tree.leaves(w, is_leaf=_is_primal)):
            raise ValueError(
                "the kernel w is frozen and has no gradient here; differentiate with respect to x, a and b, "
                "or use implementation='xla'"
            )
        values = jax.tree.map(lambda primal: primal.value, (x, w, a, b), is_leaf=_is_primal)
        return apply(*values), values

    def pull(values: Any, cotangent: Array) -> tuple[Array, None, Array, Array]:
        x, w, a, b = values
        # dx = y' W^T + scale (y' B) A: the same product with W transposed and the factors swapped.
        gradient_x = backward(cotangent[None], w, b.T[None], a.T[None])[0]
        return gradient_x, None, *implementation.factor_gradients(x, cotangent, a, b, scale=scale)

    apply.defvjp(keep, pull, symbolic_zeros=True)
    return apply


def _is_primal(value: Any) -> bool:
    """Whether this is an argument of the forward rule: a value with a mark whether it needs a gradient."""
    return hasattr(value, "perturbed")


def _grouped(implementation: Implementation, scale: float, *, summed: int) -> Callable[..., Array]:
    """`Implementation.product` with a `vmap` rule that adds groups."""

    def plain(x: Array, w: Weights, a: Array, b: Array) -> Array:
        return implementation.product(x, w, a, b, scale=scale, summed=summed)

    product = custom_vmap(plain)

    @product.def_vmap
    def rule(size: int, mapped: tuple, x: Array, w: Weights, a: Array, b: Array) -> tuple[Array, bool]:
        x_mapped, w_mapped, a_mapped, b_mapped = mapped
        if any(jax.tree.leaves(w_mapped)):  # for example over layers: nothing is shared
            axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, mapped)
            return jax.vmap(plain, in_axes=axes)(x, w, a, b), True
        if not (a_mapped or b_mapped):
            return _as_rows(product, size, x, w, a, b), True
        return _as_groups(product, size, mapped, x, w, a, b), True

    return product


def _as_rows(
    product: Callable[..., Array],
    size: int,
    x: Float[Array, "size groups_or_1 m k"],
    w: Weights,
    a: Float[Array, "groups rank k"],
    b: Float[Array, "groups n rank"],
) -> Float[Array, "size groups m n"]:
    """The `vmap` rule if only the inputs are mapped: more rows for each group."""
    groups, (m, k) = x.shape[1], x.shape[2:]
    rows = jnp.moveaxis(x, 0, 1).reshape(groups, size * m, k)
    out = product(rows, w, a, b)
    return jnp.moveaxis(out.reshape(len(a), size, m, -1), 1, 0)


def _as_groups(
    product: Callable[..., Array], size: int, mapped: tuple, x: Array, w: Weights, a: Array, b: Array
) -> Float[Array, "size groups m n"]:
    """The `vmap` rule for mapped adapters: more groups; inputs are shared if neither mapped nor grouped."""
    x_mapped, _, a_mapped, b_mapped = mapped
    groups = a.shape[1 if a_mapped else 0]

    def spread(value: Array, *, is_mapped: bool) -> Array:
        """From (size, groups or 1, ...) or (groups or 1, ...) to (size * groups, ...)."""
        whole = value if is_mapped else value[None]
        return jnp.broadcast_to(whole, (size, groups, *whole.shape[2:])).reshape(-1, *whole.shape[2:])

    shared = not x_mapped and x.shape[0] == 1
    inputs = x if shared else spread(x, is_mapped=x_mapped)
    out = product(inputs, w, spread(a, is_mapped=a_mapped), spread(b, is_mapped=b_mapped))
    return out.reshape(size, groups, *out.shape[1:])
