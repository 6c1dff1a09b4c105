r"""Second moments of the inputs of the adapted modules, in the untouched base.

    X_(f, l) = sum over rows and tokens of x x^T        (d_in, d_in)

For a module of a layer every real token counts; for the head only the token that it reads. An update
changes the output of a module by dW x. So directions outside the leading eigenvectors of X change almost
nothing, for any classes.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from bnlora.adapters.sites import HEAD
from bnlora.data.batch import Batch
from bnlora.program.model import Classifier


def second_moments(
    model: Classifier, weights: Any, batch: Batch, row_weights: Float[Array, " n"]
) -> dict[str, Float[Array, "l d_in d_in"]]:
    """Weighted sums over the rows of a batch, by family.

    Args:
        model: The classifier.
        weights: The frozen base weights.
        batch: Rows; labels are not used.
        row_weights: Weight of each row, 0 for padding rows.
    """
    hidden, modules = model.hidden(weights, batch), [site.module for site in model.sites.values()]
    inputs = model.base.bind(weights).inputs(hidden, batch.mask, modules, first_layer=model.first_layer)
    real = row_weights[:, None] * batch.mask
    position = model.likelihood.position(batch)
    sums = {}
    for name, site in model.sites.items():
        own = [0] if site.module == HEAD else [layer - model.first_layer for layer in site.layers]
        x = inputs[site.module][jnp.asarray(own)].astype(jnp.float32)  # (layer, row, token, d_in)
        counted = real
        if site.module == HEAD and position is not None:
            counted = row_weights[:, None] * (jnp.arange(batch.tokens.shape[1]) == position[:, None])
        sums[name] = jnp.einsum("lbti,lbtj,bt->lij", x, x, counted)
    return sums
