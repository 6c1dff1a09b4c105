"""Encoders with a classification head as a Flax NNX module.

    logits = W tanh(P h + p) + w,      h: the first real token's activation after the last layer

The table of segments is added as its first row: every row is one text. The pooling layer (P, p) is frozen.
Without it the head reads h, or the mean of the real tokens' activations (`EncoderConfig.pooling`). W is the
module "lm_head", the name that the head of every base has.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bnlora._util.checks import check_indices
from bnlora.models import layers
from bnlora.models.attention import both_ways
from bnlora.models.decoder_layer import positions_of
from bnlora.models.encoder_config import EncoderConfig
from bnlora.models.encoder_layer import encoder_layer
from bnlora.models.execution import DEFAULT, Execution
from bnlora.models.stack import Stack


class Encoder(Stack):
    """An encoder with existing weights; it does not initialise random ones."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        layer_weights: Mapping[str, Array],
        outer: Mapping[str, Array],
        execution: Execution = DEFAULT,
    ) -> None:
        """Wrap existing weights (arrays or `jax.ShapeDtypeStruct`s).

        Args:
            config: Sizes and constants.
            layer_weights: Weights stacked over layers: dense kernels (layer, d_in, d_out) under the names of
                `config.layer_modules`, and vectors (layer, d) under those of `config.vectors`.
            outer: The weights outside of the layers: embedding (vocab, d), positions (length, d), segment
                (d,), embedding_norm and embedding_norm_bias (d,), lm_head (labels, d), lm_head_bias
                (labels,); if `config.pooled`, also pooler (d, d), stored (in, out), and pooler_bias (d,).
            execution: How the model runs.
        """
        self.config, self.execution = config, execution
        self.layers = nnx.Dict({name: nnx.Param(value) for name, value in layer_weights.items()})
        self.embedding = nnx.Param(outer["embedding"])
        self.positions = nnx.Param(outer["positions"])
        self.segment = nnx.Param(outer["segment"])
        self.embedding_norm = nnx.Param(outer["embedding_norm"])
        self.embedding_norm_bias = nnx.Param(outer["embedding_norm_bias"])
        self.pooler = nnx.Param(outer["pooler"]) if config.pooled else None
        self.pooler_bias = nnx.Param(outer["pooler_bias"]) if config.pooled else None
        self.lm_head = nnx.Param(outer["lm_head"])
        self.lm_head_bias = nnx.Param(outer["lm_head_bias"])

    def embed(
        self, tokens: Int[Array, "b t"], mask: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """The normalised sum of the embeddings of tokens, positions and the first segment.

        Args:
            tokens: Token ids, (b, t).
            mask: True at real tokens; None means that all tokens are real.

        Returns:
            The input of the first layer, in the type of the activations.

        Raises:
            ValueError: If a row is longer than the table of learned positions.
        """
        if tokens.shape[1] > self.config.max_length:  # JAX would clamp the positions
            raise ValueError(
                f"rows must have at most {self.config.max_length} tokens, for the model has no more "
                f"positions; got {tokens.shape[1]}"
            )
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        places = self.positions[...][positions_of(mask)] + self.segment[...][None, None]
        total = (self.embedding[...][tokens] + places).astype(self.execution.dtype)
        gain, shift = self.embedding_norm[...], self.embedding_norm_bias[...]
        return layers.layer_norm(total, gain, shift, self.config.norm_eps)

    def _layer(self, mask: Bool[Array, "b t"]) -> partial:
        return partial(encoder_layer, self.config, self.execution.implementation, both_ways(mask))

    @property
    def mixes_positions(self) -> bool:
        """Whether the output layer reads the mean over the real tokens of a row.

        The mean of such activations is the same again, so cached ones, also of a single position, are read in
        the same way.
        """
        return self.config.pooling == "mean"

    def _ended(self, hidden: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        if not self.mixes_positions:
            return hidden
        total = jnp.sum(jnp.where(mask[..., None], hidden, 0).astype(jnp.float32), axis=1, keepdims=True)
        count = jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None, None]
        return jnp.broadcast_to((total / count).astype(hidden.dtype), hidden.shape)

    def _head_input(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        hidden = hidden.astype(jnp.float32)
        if self.pooler is None or self.pooler_bias is None:
            return hidden
        return jnp.tanh(layers.dense(hidden, self.pooler[...], None, bias=self.pooler_bias[...]))

    def head_rows(self, rows: Sequence[int]) -> Float[Array, "c d"]:
        """Some rows of the output layer."""
        return self.lm_head[...][np.asarray(rows)]

    def head(
        self,
        hidden: Float[Array, "*batch d"],
        *,
        rows: Int[Array | np.ndarray, " c"] | None = None,
        adapter: Mapping[str, Array] | None = None,
    ) -> Float[Array, "*batch c"]:
        """Apply the pooling layer and the output layer, or some rows of it, in float32.

        Args:
            hidden: Activations after the last layer, (..., d).
            rows: Classes to score, (c,); None scores all.
            adapter: {"a": (rank, d), "b": (c, rank)}; the rows of b correspond to `rows` (to all classes if
                `rows` is None).

        Returns:
            Logits, (..., c), in float32 for every type of activations.

        Raises:
            ValueError: If the adapter does not fit, or a row does not exist.
        """
        table, bias = self.lm_head[...], self.lm_head_bias[...]
        if rows is not None:
            check_indices("rows of the head", rows, len(table))
            table, bias = table[rows], bias[rows]
        if adapter is not None:
            stacked = {"lm_head": {name: value[None] for name, value in adapter.items()}}
            layers.check_adapters(stacked, {"lm_head": (table.shape[1], table.shape[0])}, 1)
        return layers.dense(
            self._head_input(hidden), table.T, adapter, bias=bias,
            implementation=self.execution.implementation,
        )  # fmt: skip

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | None = None,
        *,
        adapters: Mapping[str, Mapping[str, Array]] | None = None,
    ) -> Float[Array, "b labels"]:
        """Return the logits of the classes of every row.

        Args:
            tokens: Token ids, (b, t).
            mask: True at real tokens; None means that all tokens are real.
            adapters: {module: {"a": ..., "b": ...}} stacked over all layers; "lm_head" has a leading axis
                of 1.

        Returns:
            Logits, (b, labels), read at the first real token.

        Raises:
            ValueError: If an adapter does not fit, the embedding has no row for a token, or a row is longer
                than the model has positions.
        """
        mask = jnp.ones(tokens.shape, dtype=bool) if mask is None else mask
        return self._read(tokens, mask, adapters, at=jnp.argmax(mask, axis=1)[:, None])[:, 0]
