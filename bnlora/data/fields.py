"""What rows of tokens may carry beside tokens, mask and labels."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
from jax import Array
from jaxtyping import Bool, Float


class Features(NamedTuple):
    """What a tangent model reads of each row (`bnlora.program.tangent`): logits `offset + [0, phi u]`.

    Attributes:
        offset: Logits of the untouched base, shape (row, class).
        phi: Derivative of each logit contrast, class c against class 0, in the coordinates u of the update,
            shape (row, class - 1, coordinate).
    """

    offset: Float[Array, "n c"]
    phi: Float[Array, "n k d"]


@partial(jax.tree_util.register_dataclass, data_fields=["hidden"], meta_fields=["depth", "trunk"])
@dataclass(frozen=True)
class CachedActivations:
    """Activations of each row after the layers that no draw changes (`bnlora.cache_prefix`); a pytree.

    Attributes:
        hidden: The activations, shape (row, position, width).
        depth: Number of layers that `hidden` has passed.
        trunk: Identifies these layers: "" for the base's own, a checksum if they contain adapters at fixed
            values (`bnlora.condition`).
    """

    hidden: Float[Array, "n *c t d"]
    depth: int
    trunk: str = ""


@partial(jax.tree_util.register_dataclass, data_fields=["scored", "size"], meta_fields=["span"])
@dataclass(frozen=True)
class Choices:
    """The completions of rows with several choices (`bnlora.multiple_choice`); a pytree.

    Attributes:
        scored: True at the tokens of a completion, shape (row, choice, position). All completions end at the
            last position. A choice without any is absent.
        size: Number by which the log-likelihood of a completion is divided, shape (row, choice).
        span: Tokens of the longest completion.
    """

    scored: Bool[Array, "n c t"]
    size: Float[Array, "n c"]
    span: int
