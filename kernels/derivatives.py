"""What makes a product of arrays an operation of JAX: its derivative and its rule under `vmap`.

The derivative is written out (`reference`) so that no gradient of W is ever formed and x A^T is computed
again instead of being kept; asking for the gradient of W raises. It is a reverse-mode rule, so that
forward mode (`jax.jvp`, `jax.linearize`) needs the implementation "xla", whose derivatives are JAX's own.

`vmap` joins what it maps over to the groups of the product: adapters that differ over inputs that do not have
x W in common, in whichever order they were mapped; inputs that differ under one adapter become more rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from bnlora.kernels.quantised import Weights


class Implementation(NamedTuple):
    """The two computations that forward and backward pass are made of.

    Attributes:
        product: As `reference.product`.
        factor_gradients: As `reference.factor_gradients`.
    """

    product: Callable[..., Array]
    factor_gradients: Callable[..., tuple[Array, Array]]


def operation(
    implementation: Implementation, scale: float
) -> Callable[[Array, Weights, Array, Array], Array]:
    """The adapted product of x (m, d_in), w, a (rank, d_in) and b (d_out, rank), with its rules."""
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

    def pull(kept: Any, cotangent: Array) -> tuple[Array, None, Array, Array]:
        x, w, a, b = kept
        gradient_x = backward(cotangent[None], w, b.T[None], a.T[None])[0]
        return gradient_x, None, *implementation.factor_gradients(x, cotangent, a, b, scale=scale)

    apply.defvjp(keep, pull, symbolic_zeros=True)
    return apply


def _is_primal(value: Any) -> bool:
    """Whether this is an argument of the forward rule: a value and whether its gradient is wanted."""
    return hasattr(value, "perturbed")


def _grouped(implementation: Implementation, scale: float, *, summed: int) -> Callable[..., Array]:
    """`Implementation.product` whose `vmap` makes more groups of it."""

    def plain(x: Array, w: Weights, a: Array, b: Array) -> Array:
        return implementation.product(x, w, a, b, scale=scale, summed=summed)

    product = custom_vmap(plain)

    @product.def_vmap
    def rule(size: int, mapped: tuple, x: Array, w: Weights, a: Array, b: Array) -> tuple[Array, bool]:
        x_mapped, w_mapped, a_mapped, b_mapped = mapped
        if any(jax.tree.leaves(w_mapped)):  # as over layers: nothing is shared
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
    """Mapped inputs under adapters that are not: more rows of each group."""
    groups, (m, k) = x.shape[1], x.shape[2:]
    rows = jnp.moveaxis(x, 0, 1).reshape(groups, size * m, k)
    out = product(rows, w, a, b)
    return jnp.moveaxis(out.reshape(len(a), size, m, -1), 1, 0)


def _as_groups(
    product: Callable[..., Array], size: int, mapped: tuple, x: Array, w: Weights, a: Array, b: Array
) -> Float[Array, "size groups m n"]:
    """Mapped adapters: more groups, over the same inputs where these are neither mapped nor grouped."""
    x_mapped, _, a_mapped, b_mapped = mapped
    groups = a.shape[1 if a_mapped else 0]

    def spread(value: Array, *, is_mapped: bool) -> Array:
        """(size * groups, ...) out of (size, groups or 1, ...) or (groups or 1, ...)."""
        whole = value if is_mapped else value[None]
        return jnp.broadcast_to(whole, (size, groups, *whole.shape[2:])).reshape(-1, *whole.shape[2:])

    shared = not x_mapped and x.shape[0] == 1
    inputs = x if shared else spread(x, is_mapped=x_mapped)
    out = product(inputs, w, spread(a, is_mapped=a_mapped), spread(b, is_mapped=b_mapped))
    return out.reshape(size, groups, *out.shape[1:])
