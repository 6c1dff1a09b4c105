"""Parameters as a few long vectors, so that a step has a few operations instead of a few for each array.

The parameters of prior and guide are named arrays, eighty in a model of six factors. A step does the same
with all of them: constraints, clipping, the optimiser, and keeping the old state. It does this on vectors,
one for each optimiser and constraint. The programs of prior and guide get the named arrays.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from numpyro.distributions.transforms import Transform

from bnlora.infer.svi.elbo import Constrain
from bnlora.infer.svi.entrywise import is_entrywise


@dataclass(frozen=True, eq=False)
class Loose:
    """The parameters by name, for an optimiser that needs the separate arrays.

    Attributes:
        constrain: From unconstrained to constrained parameters, by name.
        labels: The optimiser of every array, a tree like the parameters.
    """

    constrain: Constrain
    labels: Mapping[str, Any]

    def pack(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values unchanged."""
        return values


@dataclass(frozen=True)
class Vector:
    """The arrays of one vector, one after the other.

    Attributes:
        group: Its optimiser.
        transform: Its map to constrained values; None if some arrays have other maps.
        leaves: Positions of the arrays among the leaves of the parameters.
    """

    group: str
    transform: Transform | None
    leaves: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Packed:
    """The parameters as vectors.

    Attributes:
        structure: The tree of the parameters.
        shapes: Shape of each of its arrays.
        vectors: The vectors by name.
        others: By parameter, the maps to constrained values that do not act on each number separately.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    vectors: Mapping[str, Vector]
    others: Mapping[str, Transform]

    @property
    def labels(self) -> dict[str, str]:
        """The optimiser of every vector."""
        return {name: vector.group for name, vector in self.vectors.items()}

    def pack(self, values: Any) -> dict[str, Array]:
        """The vectors of a tree like the parameters."""
        leaves = jax.tree.leaves(values)
        return {
            name: jnp.concatenate([leaves[i].reshape(-1) for i in vector.leaves])
            for name, vector in self.vectors.items()
        }

    def unpack(self, vectors: Mapping[str, Array]) -> dict[str, Any]:
        """The tree of the vectors: the inverse of `pack`."""
        leaves: dict[int, Array] = {}
        for name, vector in self.vectors.items():
            sizes = [math.prod(self.shapes[i]) for i in vector.leaves]
            parts = jax.lax.split(vectors[name], sizes)
            leaves |= {i: x.reshape(self.shapes[i]) for i, x in zip(vector.leaves, parts, strict=True)}
        return jax.tree.unflatten(self.structure, [leaves[i] for i in range(len(self.shapes))])

    def constrain(self, vectors: Mapping[str, Array]) -> dict[str, Any]:
        """The constrained parameters by name."""
        moved: dict[str, Array] = {}
        for name, x in vectors.items():
            transform = self.vectors[name].transform
            moved[name] = x if transform is None else transform(x)
        tree = self._unpack(moved)
        return {n: jax.tree.map(self.others[n], x) if n in self.others else x for n, x in tree.items()}

    @property
    def _unpack(self) -> Callable[[dict[str, Array]], dict[str, Any]]:
        """`unpack` with its own derivative, which joins the arrays of the gradient.

        JAX's derivative of a split would pad every array with zeros to the whole vector and add all of them.
        """
        unpack = jax.custom_vjp(self.unpack)
        unpack.defvjp(lambda x: (self.unpack(x), None), lambda _, gradient: (self.pack(gradient),))
        return unpack


def packing(
    values: dict[str, Any],
    constrain: Constrain,
    group: Callable[[str], str],
    rules: Mapping[str, optax.GradientTransformation],
) -> Packed | Loose:
    """The form of the parameters in a step: vectors if all optimisers are entrywise, else the named arrays.

    Args:
        values: Unconstrained parameters by name.
        constrain: The map to constrained ones.
        group: The optimiser of a parameter by its name.
        rules: The optimisers.
    """
    by_group = {g: {n: x for n, x in values.items() if group(n) == g} for g in rules}
    if not all(is_entrywise(rules[g], part) for g, part in by_group.items() if part):
        return Loose(constrain, {n: jax.tree.map(lambda _, n=n: group(n), x) for n, x in values.items()})
    vectors: list[Vector] = []
    position = 0
    for name, tree in values.items():
        transform = constrain.transforms[name]
        shared = transform if _is_shared(transform) else None
        for _ in jax.tree.leaves(tree):
            # The vector with this optimiser and map, or a new one at the end.
            at = next((i for i, v in enumerate(vectors) if _same(v, group(name), shared)), len(vectors))
            before = vectors[at].leaves if at < len(vectors) else ()
            vectors[at : at + 1] = [Vector(group(name), shared, (*before, position))]
            position += 1
    others = {n: t for n, t in constrain.transforms.items() if not _is_shared(t)}
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(values))
    named = {f"{vector.group} {i}": vector for i, vector in enumerate(vectors)}
    return Packed(jax.tree.structure(values), shapes, named, others)


def _same(vector: Vector, group: str, transform: Transform | None) -> bool:
    return vector.group == group and bool(vector.transform == transform)


def _is_shared(transform: Transform) -> bool:
    """Whether a map acts on each number separately, and in the same way on all."""
    simple = transform.domain.event_dim == 0 and transform.codomain.event_dim == 0
    return simple and all(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves(transform))
