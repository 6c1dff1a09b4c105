"""How a frozen model runs: options that change time and memory, but not the function of weights and adapters.

    implementation  the implementation of y = x W + (x A^T) B^T
    activations     the residual stream, products and attention in float32, or rounded to bfloat16 (eps 2^-7)
    remat           what the backward pass recomputes instead of storing it

With bfloat16 the weights of a layer are rounded when the layer runs, never the whole stack. Statistics (means
of squares, softmax, rotary angles), the final norm and the logits stay in float32.
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
    """How the frozen model runs.

    Attributes:
        implementation: Implementation of the adapted product, one of `bnlora.kernels.api.IMPLEMENTATIONS`;
            with None, `lora_matmul` chooses.
        activations: Type of the residual stream, of the products and of attention. "bfloat16" rounds; the
            backward pass then stores half as much. With remat "none" it stores two thirds, because statistics
            stay in float32.
        remat: What the backward pass recomputes. "none": only the indexing of a layer's weights.
            "elementwise": norms, softmax, silu and similar operations, which are cheaper than new memory;
            products are stored. "attention": also attention; only the outputs of a layer's seven dense
            products are stored. "layers": every layer; only the inputs of the layers are stored.

    Raises:
        ValueError: If a choice is unknown; the message has the nearest one.
    """

    implementation: str | None = None
    activations: Activations = "float32"
    remat: Remat = "elementwise"

    def __post_init__(self) -> None:
        """Raise `ValueError` for unknown choices."""
        if self.implementation is not None:
            check_option("implementation", self.implementation, api.IMPLEMENTATIONS)
        check_option("activations", self.activations, get_args(Activations))
        check_option("remat", self.remat, get_args(Remat))

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the activations."""
        return jnp.dtype(self.activations)


DEFAULT = Execution()
"""The default options of a base."""


def keep_product(product: Array) -> Array:
    """Mark the output of a dense product, so that `remat="attention"` stores it."""
    return checkpoint_name(product, _PRODUCT)


def rerun(function: Callable[..., Array], remat: Remat) -> Callable[..., Array]:
    """Let the backward pass recompute a part of one layer.

    Args:
        function: One layer, including the indexing of its weights.
        remat: What to recompute, as in `Execution`.

    Returns:
        The same function, with the residuals that this choice stores.
    """
    # To save memory the recomputation must happen: outside of a loop over layers, the compiler would merge it
    # with the forward pass (CSE) and store the result. For cheap operations this does not matter.
    return jax.checkpoint(function, policy=_POLICIES[remat], prevent_cse=remat in ("attention", "layers"))


# Do not store a copy of a layer's weights, nor a converted copy: index and convert them again. The call is
# that of `kernels.quantised`; functions of activations with their own derivative are no calls here any more.
_CHEAP = frozenset("dynamic_slice squeeze convert_element_type bitcast_convert_type custom_jvp_call".split())


def _keep_all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in _CHEAP


def _keep_contractions(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == "dot_general"


# Dense products are stored by their mark, which works for every implementation.
_KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(_PRODUCT)
_POLICIES: Mapping[Remat, Callable[..., Any]] = MappingProxyType(
    {
        "none": _keep_all_but_slices,
        "elementwise": jax.checkpoint_policies.save_from_both_policies(_KEEP_PRODUCTS, _keep_contractions),
        "attention": _KEEP_PRODUCTS,
        "layers": jax.checkpoint_policies.nothing_saveable,
    }
)
