"""The Llama family as a Flax NNX module: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

One layer maps h to
    h <- h + o_proj(attention(rotate(q_proj n), rotate(k_proj n), v_proj n)),   n = rms_norm(h)
    h <- h + down_proj(silu(gate_proj n) * up_proj n),                          n = rms_norm(h)
The weights of all layers are stacked along a leading axis and the layers run in one `jax.lax.scan`, so the
cost of tracing and compiling does not depend on depth. Adapters are an argument of the call, not part of the
module. If only some positions of the last layer are requested, the others compute only keys and values.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bnlora._util.checks import check_indices
from bnlora.data.batch import check_tokens
from bnlora.models import layers
from bnlora.models.execution import DEFAULT, Execution
from bnlora.models.llama_config import LlamaConfig as LlamaConfig
from bnlora.models.loading import Checkpoint
from bnlora.models.tensors import check_tensors, stack, take

ARCHITECTURE = "LlamaForCausalLM"
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_DENSE = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def modules(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Return (d_in, d_out) of every adaptable module: the per-layer dense ones, then "lm_head"."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q_proj": (config.d_model, query),
        "k_proj": (config.d_model, key),
        "v_proj": (config.d_model, key),
        "o_proj": (query, config.d_model),
        "gate_proj": (config.d_model, config.d_ff),
        "up_proj": (config.d_model, config.d_ff),
        "down_proj": (config.d_ff, config.d_model),
        "lm_head": (config.d_model, config.vocab_size),
    }


def _layer_modules(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in modules(config).items() if name != "lm_head"}


class Llama(nnx.Module):
    """A Llama model with existing weights; it does not initialise random ones."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        embedding: Float[Array, "vocab d"],
        layer_weights: Mapping[str, Array],
        final_norm: Float[Array, " d"],
        lm_head: Float[Array, "vocab d"] | None,
        execution: Execution = DEFAULT,
    ) -> None:
        """Wrap existing weights (arrays or `jax.ShapeDtypeStruct`s).

        Args:
            config: Sizes and constants.
            embedding: One row per token, (vocab, d).
            layer_weights: Weights stacked over layers: dense kernels (layer, d_in, d_out) under the names of
                `modules`, and gains "attention_norm" and "mlp_norm" (layer, d).
            final_norm: Gain before the output layer, (d,).
            lm_head: Output layer, one row per token, (vocab, d); None if it is tied to the embedding.
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
        self.lm_head = None if lm_head is None else nnx.Param(lm_head)

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The embedding of the tokens, in the type of the activations."""
        return self.embedding[...][tokens].astype(self.execution.dtype)

    def blocks(
        self,
        hidden: Float[Array, "b t d"],
        mask: Bool[Array, "b t"],
        *,
        first_layer: int,
        stop: int,
        adapters: Mapping[str, Mapping[str, Array]] | None = None,
        at: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Run the layers [first_layer, stop); the last one only as far as the requested positions need it.

        Args:
            hidden: Residual stream that enters the first layer; rounded to the type of the activations.
            mask: True at real tokens. Positions count only real tokens, so padding does not affect results.
            first_layer: The lowest layer that runs.
            stop: One past the last layer.
            adapters: {module: {"a": (n, rank, d_in), "b": (n, d_out, rank)}}, stacked over the
                n = stop - first_layer layers; b includes the factor alpha / rank.
            at: Requested positions of each row, as columns of `hidden`; None means all.

        Returns:
            The residual stream after layer stop - 1 at these positions.

        Raises:
            ValueError: If the range is not within the model, a position does not exist, or an adapter does
                not fit.
        """
        if not 0 <= first_layer <= stop <= self.config.num_layers:
            raise ValueError(f"layers [{first_layer}, {stop}) are not within [0, {self.config.num_layers})")
        if at is not None:
            check_indices("positions", at, hidden.shape[1])
        adapters = {name: dict(pair) for name, pair in (adapters or {}).items()}
        layers.check_adapters(adapters, _layer_modules(self.config), stop - first_layer)
        weights = {name: weight[...] for name, weight in self.layers.items()}
        return layers.run_layers(
            self._layer(mask), hidden, weights, adapters, first_layer=first_layer, stop=stop, at=at,
            execution=self.execution,
        )  # fmt: skip

    def inputs(
        self,
        hidden: Float[Array, "b t d"],
        mask: Bool[Array, "b t"],
        modules: Sequence[str],
        *,
        first_layer: int,
    ) -> dict[str, Float[Array, "l b t d_in"]]:
        """Inputs of some modules, in the layers from `first_layer` on and in the head, without adapters.

        Args:
            hidden: Residual stream that enters the first layer.
            mask: True at real tokens; inputs at the other positions are meaningless.
            modules: Names of modules; "lm_head" has one layer.
            first_layer: The lowest layer that runs.

        Returns:
            Inputs by module, stacked over layers.
        """
        layer, inner = self._layer(mask), [name for name in modules if name != "lm_head"]
        weights = {name: weight[...] for name, weight in self.layers.items()}

        def step(hidden: Array, index: Array) -> tuple[Array, dict[str, Array]]:
            recorded: dict[str, Array] = {}
            hidden = layer(hidden, layers.weights_of(index, weights), {}, recorded=recorded)
            return hidden, {name: recorded[name] for name in inner}

        above = jnp.arange(first_layer, self.config.num_layers)
        hidden, inputs = jax.lax.scan(step, hidden.astype(self.execution.dtype), above)
        if "lm_head" in modules:
            inputs["lm_head"] = self._normal(hidden)[None]
        return inputs

    def _layer(self, mask: Bool[Array, "b t"]) -> partial:
        """The function of one layer for rows with this mask."""
        # The number of real tokens before each one, so that padding on the left shifts nothing.
        positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
        config = self.config
        frequencies = layers.rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        tables = layers.rotary_tables(positions, frequencies)
        return partial(
            _layer, config, self.execution.implementation, allowed=layers.causal_mask(mask), tables=tables
        )

    def _normal(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """The final norm, in float32."""
        return layers.rms_norm(hidden.astype(jnp.float32), self.final_norm[...], self.config.rms_eps)

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
        table = (self.embedding if self.lm_head is None else self.lm_head)[...]
        if rows is not None:
            check_indices("rows of the head", rows, len(table))
            table = table[rows]
        if adapter is not None:
            stacked = {"lm_head": {name: value[None] for name, value in adapter.items()}}
            layers.check_adapters(stacked, {"lm_head": (table.shape[1], table.shape[0])}, 1)
        return layers.dense(
            self._normal(hidden), table.T, adapter, implementation=self.execution.implementation
        )

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
        mask = jnp.ones(tokens.shape, dtype=bool) if mask is None else mask
        check_tokens(tokens, mask, self.config.vocab_size)
        inner = dict(adapters or {})
        outer = inner.pop("lm_head", None)
        hidden = self.blocks(
            self.embed(tokens), mask, first_layer=0, stop=self.config.num_layers, adapters=inner
        )
        if outer is None:
            return self.head(hidden)
        layers.check_adapters({"lm_head": outer}, modules(self.config), 1)
        return self.head(hidden, adapter={name: value[0] for name, value in outer.items()})


def build(checkpoint: Checkpoint) -> Llama:
    """Build a Llama from a checkpoint.

    Args:
        checkpoint: Configuration and tensors under their Hugging Face names.

    Returns:
        The model, with float32 weights.

    Raises:
        ValueError: If the configuration is not supported; if tensors are missing, unexpected, not floats or
            of another shape than the configuration implies (a few of each are named, before any is read); or
            if numbers are NaN or infinite.
    """
    config, tensors = LlamaConfig.from_huggingface(checkpoint.config), checkpoint.tensors
    vocab = (config.vocab_size, config.d_model)
    shapes = {path: vocab[1:] for path in _NORMS.values()} | {
        path: shape[::-1]
        for shape, path in zip(_layer_modules(config).values(), _DENSE.values(), strict=True)
    }
    outer = {"model.embed_tokens.weight": vocab, "model.norm.weight": vocab[1:]}
    # Some files store the tied output layer again. Read it, to detect one that differs from the embedding.
    stored = "lm_head.weight" in tensors or not config.tied
    check_tensors(tensors, config.num_layers, shapes, outer | ({"lm_head.weight": vocab} if stored else {}))
    paths = _DENSE | _NORMS
    weights = {name: stack(tensors, config.num_layers, path, shapes[path]) for name, path in paths.items()}
    embedding, norm = (take(tensors, name) for name in outer)
    lm_head = take(tensors, "lm_head.weight") if stored else None
    if config.tied and lm_head is not None and not np.array_equal(lm_head, embedding):
        raise ValueError(
            "the configuration ties the output layer to the embedding, but lm_head.weight differs"
        )
    return Llama(
        config,
        embedding=jnp.asarray(embedding),
        layer_weights={name: jnp.asarray(weight) for name, weight in weights.items()},
        final_norm=jnp.asarray(norm),
        lm_head=None if config.tied else jnp.asarray(lm_head),
    )


def _layer(
    config: LlamaConfig,
    implementation: str | None,
    hidden: Array,
    weights: Mapping[str, Array],
    adapters: Mapping[str, Mapping[str, Array]],
    *,
    allowed: Array,
    tables: tuple[Array, Array],
    at: Array | None = None,
    recorded: dict[str, Array] | None = None,
) -> Array:
    """One layer; `recorded`, if any, receives the input of every dense module."""

    def dense(name: str, x: Array) -> Array:
        if recorded is not None:
            recorded[name] = x
        return layers.dense(x, weights[name], adapters.get(name), implementation=implementation)

    def heads(name: str, x: Array) -> Array:
        return dense(name, x).reshape(*x.shape[:2], -1, config.head_dim)

    normal = layers.rms_norm(hidden, weights["attention_norm"], config.rms_eps)
    key, value = layers.rotate(heads("k_proj", normal), *tables), heads("v_proj", normal)
    # Keys and values are needed at all positions. All later steps are needed only at the queries' positions.
    hidden, normal, allowed, *turns = (
        layers.take_positions(x, at) for x in (hidden, normal, allowed, *tables)
    )
    query = layers.rotate(heads("q_proj", normal), *turns)
    attended = layers.grouped_query_attention(query, key, value, allowed)
    hidden = hidden + dense("o_proj", attended.reshape(*hidden.shape[:2], -1))
    normal = layers.rms_norm(hidden, weights["mlp_norm"], config.rms_eps)
    return hidden + dense("down_proj", jax.nn.silu(dense("gate_proj", normal)) * dense("up_proj", normal))
