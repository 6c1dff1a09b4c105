"""The layers of a model: weights stacked along a leading axis, run in one `jax.lax.scan`.

The cost of tracing and compiling does not depend on depth. Adapters are an argument of the call, not part of
the module. If only some positions of the last layer are requested, the others compute only keys and values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bnlora._util.checks import check_indices
from bnlora.data.batch import check_tokens
from bnlora.kernels.quantised import dequantise
from bnlora.models import layers


class Stack(nnx.Module):
    """What every model does with its layers; a subclass says what one of them is."""

    config: Any
    execution: Any
    layers: Any

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
            The residual stream after layer stop - 1 at these positions; after the last layer, what the model
            makes of it (`mixes_positions`).

        Raises:
            ValueError: If the range is not within the model, a position does not exist, or an adapter does
                not fit.
        """
        if not 0 <= first_layer <= stop <= self.config.num_layers:
            raise ValueError(f"layers [{first_layer}, {stop}) are not within [0, {self.config.num_layers})")
        if at is not None:
            check_indices("positions", at, hidden.shape[1])
        adapters = {name: dict(pair) for name, pair in (adapters or {}).items()}
        layers.check_adapters(adapters, self.config.layer_modules, stop - first_layer)
        mixed = self.mixes_positions and stop == self.config.num_layers
        hidden = layers.run_layers(
            self._layer(mask), hidden, self._layer_weights(), adapters, first_layer=first_layer, stop=stop,
            at=None if mixed else at, execution=self.execution,
        )  # fmt: skip
        return layers.take_positions(self._ended(hidden, mask), at) if mixed else hidden

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
        weights = self._layer_weights()

        def step(hidden: Array, index: Array) -> tuple[Array, dict[str, Array]]:
            recorded: dict[str, Array] = {}
            hidden = layer(hidden, layers.weights_of(index, weights), {}, recorded=recorded)
            return hidden, {name: recorded[name] for name in inner}

        above = jnp.arange(first_layer, self.config.num_layers)
        hidden, inputs = jax.lax.scan(step, hidden.astype(self.execution.dtype), above)
        if "lm_head" in modules:
            inputs["lm_head"] = self._head_input(self._ended(hidden, mask))[None]
        return inputs

    def kernels(self, name: str, indices: Sequence[int]) -> Float[Array, "l d_in d_out"]:
        """The frozen kernels of a module in some layers, in float32."""
        stack = self.layers[name].get_value()
        return dequantise(jax.tree.map(lambda x: x[jnp.asarray(indices)], stack), jnp.float32)

    @property
    def mixes_positions(self) -> bool:
        """Whether the positions of a row are mixed after the last layer, so that all of them must run."""
        return False

    def embed(
        self, tokens: Int[Array, "b t"], mask: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """The input of the first layer."""
        raise NotImplementedError

    def head(
        self,
        hidden: Float[Array, "*batch d"],
        *,
        rows: Int[Array | np.ndarray, " c"] | None = None,
        adapter: Mapping[str, Array] | None = None,
    ) -> Float[Array, "*batch c"]:
        """The output layer, or some rows of it."""
        raise NotImplementedError

    def _read(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | None,
        adapters: Mapping[str, Mapping[str, Array]] | None,
        *,
        at: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "b n c"]:
        """Logits at some positions of each row, or at all: what a call of every model does."""
        mask = jnp.ones(tokens.shape, dtype=bool) if mask is None else mask
        check_tokens(tokens, mask, self.config.vocab_size)
        inner = dict(adapters or {})
        outer = inner.pop("lm_head", None)
        hidden = self.blocks(
            self.embed(tokens, mask), mask, first_layer=0, stop=self.config.num_layers, adapters=inner, at=at
        )
        if outer is None:
            return self.head(hidden)
        layers.check_adapters({"lm_head": outer}, self.config.modules, 1)
        return self.head(hidden, adapter={name: value[0] for name, value in outer.items()})

    def _layer_weights(self) -> dict[str, Any]:
        """What differs by layer, stacked."""
        return {name: weight.get_value() for name, weight in self.layers.items()}

    def _layer(self, mask: Bool[Array, "b t"]) -> Any:
        """The function of one layer for rows with this mask, a `layers.Layer` that can record inputs."""
        raise NotImplementedError

    def _ended(self, hidden: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        """What the last layer ends with, at all positions."""
        return hidden

    def _head_input(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """The input of the output layer, in float32."""
        raise NotImplementedError
