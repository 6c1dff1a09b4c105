"""Decoder-only language models as a Flax NNX module: a stack of layers between embedding and output layer."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bnlora._util.checks import check_indices
from bnlora.kernels.quantised import Table, table_kernel, table_rows
from bnlora.models import layers
from bnlora.models.decoder_cache import Cache, run_with_cache
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.decoder_layer import decoder_layer, local_marks, normal, positions_of, views
from bnlora.models.execution import DEFAULT, Execution
from bnlora.models.stack import Stack


class Decoder(Stack):
    """A decoder-only model with existing weights; it does not initialise random ones."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        embedding: Table,
        layer_weights: Mapping[str, Any],
        final_norm: Float[Array, " d"],
        lm_head: Table | None,
        final_norm_bias: Float[Array, " d"] | None = None,
        positions: Float[Array, "length d"] | None = None,
        execution: Execution = DEFAULT,
    ) -> None:
        """Wrap existing weights (arrays or `jax.ShapeDtypeStruct`s, in floating point or quantised).

        Args:
            config: Sizes and constants.
            embedding: One row per token, (vocab, d).
            layer_weights: Weights stacked over layers: dense kernels (layer, d_in, d_out) under the names of
                `config.layer_modules`, and vectors (layer, d) under those of `config.vectors`.
            final_norm: Gain before the output layer, (d,).
            lm_head: Output layer, one row per token, (vocab, d); None if it is tied to the embedding.
            final_norm_bias: Bias before the output layer, (d,), where the norms have biases.
            positions: Embedding of every position, (length, d), where positions are learned.
            execution: How the model runs.

        Raises:
            ValueError: If a tied model has an `lm_head`, or an untied one has none.
        """
        if config.tied != (lm_head is None):
            raise ValueError("lm_head must be None for a tied model, and an array for an untied one")
        self.config, self.execution = config, execution
        self.embedding = nnx.Param(embedding)
        self.layers = nnx.Dict({name: nnx.Param(value) for name, value in layer_weights.items()})
        self.final_norm = nnx.Param(final_norm)
        self.final_norm_bias = None if final_norm_bias is None else nnx.Param(final_norm_bias)
        self.positions = None if positions is None else nnx.Param(positions)
        self.lm_head = None if lm_head is None else nnx.Param(lm_head)

    def embed(
        self, tokens: Int[Array, "b t"], mask: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """The embedding of the tokens, and of their positions where these are learned.

        Args:
            tokens: Token ids, (b, t).
            mask: True at real tokens; None means that all tokens are real.

        Returns:
            The input of the first layer, in the type of the activations.

        Raises:
            ValueError: If a row is longer than the table of learned positions.
        """
        if self.positions is not None and tokens.shape[1] > self.config.max_length:
            raise ValueError(  # JAX would clamp the positions
                f"rows must have at most {self.config.max_length} tokens, for the model has no more "
                f"positions; got {tokens.shape[1]}"
            )
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        return self.embed_at(tokens, positions_of(mask))

    def embed_at(self, tokens: Int[Array, "b t"], positions: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """`embed` of tokens at given positions, which must exist where positions are learned."""
        hidden = table_rows(cast(Table, self.embedding.get_value()), tokens, self.execution.dtype)
        if self.config.embed_scale != 1:
            hidden = hidden * jnp.asarray(self.config.embed_scale, hidden.dtype)
        if self.positions is None:
            return hidden
        return hidden + self.positions[...][positions].astype(hidden.dtype)

    def extend(
        self,
        hidden: Float[Array, "b t d"],
        mask: Bool[Array, "b s"],
        cache: Cache,
        start: int | Int[Array, ""],
        *,
        first_layer: int,
        adapters: Mapping[str, Mapping[str, Array]] | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """`blocks` for further tokens of rows whose earlier ones are in a cache.

        Args:
            hidden: Residual stream of the new tokens where it enters the first layer.
            mask: True at the slots of real tokens, the new ones included.
            cache: Keys and values of the earlier tokens, in as many layers as run; `empty_cache` for the
                first tokens.
            start: Slot of the first new token; the others follow it.
            first_layer: The lowest layer that runs.
            adapters: As for `blocks`, stacked over the layers that run.

        Returns:
            The residual stream after these layers at the new tokens, and the cache with the new keys and
            values.

        Raises:
            ValueError: If the model has not so many layers, or an adapter does not fit.
        """
        count = cache.keys.shape[0]
        if not 0 <= first_layer <= first_layer + count <= self.config.num_layers:
            raise ValueError(
                f"layers [{first_layer}, {first_layer + count}) are not within [0, {self.config.num_layers})"
            )
        adapters = {name: dict(pair) for name, pair in (adapters or {}).items()}
        layers.check_adapters(adapters, self.config.layer_modules, count)
        hidden = hidden.astype(self.execution.dtype)
        if not count:
            return hidden, cache
        columns = start + jnp.arange(hidden.shape[1])
        return run_with_cache(
            self._layer(mask, columns), hidden, self._layer_weights(), adapters, cache, start,
            first_layer=first_layer,
        )  # fmt: skip

    @property
    def table(self) -> Table:
        """The output layer, one row per token; the embedding if it is tied."""
        return cast(Table, (self.embedding if self.lm_head is None else self.lm_head).get_value())

    def head_rows(self, rows: Sequence[int]) -> Float[Array, "c d"]:
        """Some rows of the output layer, in float32."""
        return table_rows(self.table, np.asarray(rows), jnp.float32)

    def _layer_weights(self) -> dict[str, Any]:
        """The weights, and whether the layer is local if only some are."""
        return super()._layer_weights() | local_marks(self.config)

    def _layer(self, mask: Bool[Array, "b t"], columns: Int[Array, " n"] | None = None) -> partial:
        """The function of one layer for rows with this mask, at some of its columns or at all."""
        seen = views(self.config, mask, columns)
        return partial(decoder_layer, self.config, self.execution.implementation, seen)

    def _head_input(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """The final norm, in float32."""
        weights = {"final_norm": self.final_norm[...]}
        if self.final_norm_bias is not None:
            weights["final_norm_bias"] = self.final_norm_bias[...]
        return normal(self.config, "final_norm", weights, hidden.astype(jnp.float32))

    def head(
        self,
        hidden: Float[Array, "*batch d"],
        *,
        rows: Int[Array | np.ndarray, " c"] | None = None,
        adapter: Mapping[str, Array] | None = None,
    ) -> Float[Array, "*batch c"]:
        """Apply the final norm and the output layer, or some rows of it, in float32.

        Args:
            hidden: Residual stream after the last layer, (..., d).
            rows: Token ids to score, (c,), selected before the product; None scores the whole vocabulary.
            adapter: {"a": (rank, d), "b": (c, rank)}; the rows of b correspond to `rows` (to the vocabulary
                if `rows` is None).

        Returns:
            Logits, (..., c), in float32 for every type of activations: bfloat16 would round a logit near 20
            to a multiple of one eighth.

        Raises:
            ValueError: If the adapter does not fit, or a row does not exist.
        """
        if rows is not None:
            check_indices("rows of the head", rows, self.table.shape[0])
        kernel = table_kernel(self.table, rows)
        if adapter is not None:
            stacked = {"lm_head": {name: value[None] for name, value in adapter.items()}}
            layers.check_adapters(stacked, {"lm_head": (kernel.shape[0], kernel.shape[1])}, 1)
        logits = layers.dense(
            self._head_input(hidden), kernel, adapter, implementation=self.execution.implementation
        )
        return layers.soft_cap(logits, self.config.logit_cap)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | None = None,
        *,
        adapters: Mapping[str, Mapping[str, Array]] | None = None,
    ) -> Float[Array, "b t vocab"]:
        """Return the logits of the next token at every position.

        Args:
            tokens: Token ids, (b, t).
            mask: True at real tokens; None means that all tokens are real.
            adapters: {module: {"a": ..., "b": ...}} stacked over all layers; "lm_head" has a leading axis
                of 1.

        Returns:
            Logits, (b, t, vocab). Logits at padding are finite but meaningless.

        Raises:
            ValueError: If an adapter does not fit, or the embedding has no row for a token.
        """
        return self._read(tokens, mask, adapters)
