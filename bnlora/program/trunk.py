"""The trunk of a classifier: what no draw of its adapters changes.

It is the base's layers below the lowest adapted one, and where sites are held at values (`bnlora.condition`),
also the adapted layers up to the lowest one that a free site changes. Activations after it are cached.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from bnlora._util.typing import Adapters
from bnlora.adapters.sites import HEAD, Sites
from bnlora.data.batch import Batch


@dataclass(frozen=True, eq=False)  # arrays have no one truth value, so equality is identity
class Trunk:
    """The layers below the lowest one that a draw changes, and the adapters at fixed values.

    Attributes:
        sites: Where the adapters are.
        stop: The lowest layer that a draw changes.
        fixed: Value of every fixed site by name.
        below: Adapters at the fixed values, of which those that the free sites do not change are read.
        moves: Which layers of each factor the free sites change, by family; all where it is empty.
    """

    sites: Sites
    stop: int
    fixed: Mapping[str, Array] = field(default_factory=dict)
    below: Adapters = field(default_factory=dict)
    moves: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)

    @property
    def moving(self) -> tuple[str, ...]:
        """Families whose adapters differ from draw to draw."""
        if not self.moves:
            return tuple(self.sites)
        return tuple(name for name, factors in self.moves.items() if any(map(np.any, factors.values())))

    @cached_property
    def checksum(self) -> str:
        """Checksum of the adapters in the trunk, as in `CachedActivations.trunk`; "" where there are none."""
        digest = hashlib.sha256()
        inner = {n: sum(layer < self.stop for layer in site.layers) for n, site in self.sites.items()}
        for name in (name for name, count in inner.items() if count):
            digest.update(repr(self.sites[name]).encode())
            for values in self.below[name].values():
                digest.update(np.asarray(values[: inner[name]]).tobytes())
        return digest.hexdigest() if any(inner.values()) else ""

    def held(self, adapters: Adapters) -> Adapters:
        """Adapters with a leading draw axis, those that the free sites do not change at their fixed value."""
        if not self.moves:
            return adapters

        def one(moves: np.ndarray, fixed: Array, drawn: Array) -> Array:
            return jnp.where(moves[:, None, None], drawn, fixed)

        return {
            name: {f: one(self.moves[name][f], self.below[name][f], drawn) for f, drawn in pair.items()}
            for name, pair in adapters.items()
            if name in self.moves
        } | {name: params for name, params in adapters.items() if name not in self.moves}

    def activations(self, module: Any, batch: Batch) -> Float[Array, "n *c t d"]:
        """Activations after the trunk, from the tokens.

        Args:
            module: The base with its weights.
            batch: Rows.
        """
        tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask))
        hidden = self._run(module, tokens, mask)
        return hidden.reshape(*batch.tokens.shape, hidden.shape[-1])

    def _run(self, module: Any, tokens: Array, mask: Array) -> Float[Array, "b t d"]:
        first = min(self.sites.first_layer, self.stop)
        hidden = module.blocks(module.embed(tokens, mask), mask, first_layer=0, stop=first)
        if self.stop == first:
            return hidden
        placed = self.sites.place(self.below)
        placed.pop(HEAD, None)
        inner = {m: {f: x[: self.stop - first] for f, x in pair.items()} for m, pair in placed.items()}
        return module.blocks(hidden, mask, first_layer=first, stop=self.stop, adapters=inner)

    def __repr__(self) -> str:
        return f"{len(self.fixed)} sites fixed: {', '.join(self.fixed)}" if self.fixed else "nothing fixed"
