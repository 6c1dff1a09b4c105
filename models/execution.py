"""How a frozen model runs: the same function of weights and adapters, at another cost in time and memory.

    implementation  y = x W + (x A^T) B^T by one of several implementations
    activations     the residual stream, products and attention in float32, or rounded to bfloat16 (eps 2^-7)
    remat           what the backward pass computes once more rather than finding it in memory

With bfloat16 the weights of a layer are rounded when it runs, never the whole stack, and statistics (means of
squares, softmax, rotary angles), the final norm and the logits stay in float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from bnlora._util.checks import check_option
from bnlora.kernels import api

Activations = Literal["float32", "bfloat16"]
Remat = Literal["none", "elementwise", "attention", "layers"]

_PRODUCT = "product"


@dataclass(frozen=True)
class Execution:
    """How the frozen model runs, which is no part of what it computes.

    Attributes:
        implementation: Implementation of the adapted product, one of `bnlora.kernels.api.IMPLEMENTATIONS`;
            None leaves the choice to `lora_matmul`.
        activations: Type of the residual stream, of the products and of attention. "bfloat16" rounds, and the
            backward pass keeps half as much, or, as statistics keep their type, two thirds with remat "none".
        remat: What the backward pass runs again. "none": nothing but taking a layer's weights out of the
            stack. "elementwise": norms, softmax, silu and the like, which cost less than fresh memory does;
            products are kept. "attention": also attention; the outputs of a layer's seven dense products
            are kept. "layers": every layer; only what enters each of them is kept.

    Raises:
        ValueError: If a choice is unknown; the nearest is named.
    """

    implementation: str | None = None
    activations: Activations = "float32"
    remat: Remat = "elementwise"

    def __post_init__(self) -> None:
        """Refuse unknown choices."""
        if self.implementation is not None:
            check_option("implementation", self.implementation, api.IMPLEMENTATIONS)
        check_option("activations", self.activations, get_args(Activations))
        check_option("remat", self.remat, get_args(Remat))

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the activations."""
        return jnp.dtype(self.activations)


DEFAULT = Execution()
"""How a base runs that was not told otherwise."""


def keep_product(product: Array) -> Array:
    """Mark the output of a dense product as what `remat="attention"` keeps."""
    return checkpoint_name(product, _PRODUCT)


def rerun(function: Callable[..., Array], remat: Remat) -> Callable[..., Array]:
    """Let the backward pass run a part of one layer again.

    Args:
        function: One layer, taking its weights out of the stack.
        remat: What to run again, as in `Execution`.

    Returns:
        The same function, with the residuals that this choice keeps.
    """
    # Where memory is short the second run must be one: outside a loop of several layers, the compiler would
    # see that it equals the first and keep that instead. Sharing what is cheap costs nothing.
    return jax.checkpoint(function, policy=_POLICIES[remat], prevent_cse=remat in ("attention", "layers"))


# Weights of a layer are neither kept as a copy nor as one in another type: what was converted is found again.
_CHEAP = frozenset({"dynamic_slice", "squeeze", "convert_element_type"})


def _keep_all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in _CHEAP


def _keep_contractions(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == "dot_general"


# A dense product is kept by its mark, whatever implementation made it.
_KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(_PRODUCT)
_POLICIES: Mapping[Remat, Callable[..., Any]] = MappingProxyType(
    {
        "none": _keep_all_but_slices,
        "elementwise": jax.checkpoint_policies.save_from_both_policies(_KEEP_PRODUCTS, _keep_contractions),
        "attention": _KEEP_PRODUCTS,
        "layers": jax.checkpoint_policies.nothing_saveable,
    }
)
