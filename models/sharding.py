"""A model over several devices: which axis of a mesh splits which side of its weights and of its inputs.

| axis    | what it splits                                                                         |
|---------|----------------------------------------------------------------------------------------|
| "data"  | the rows of a batch; with `split="fully"` also one side of every weight                |
| "model" | outputs of the modules that read the stream, inputs of those that write it, and tokens |
| "draw"  | draws of a prediction, and chains                                                      |

JAX's compiler splits the programs after where their arrays are, so models, guides and samplers are the same
on one device and on many. A side that an axis does not divide stays whole on every device.

Reference: Shoeybi et al. (2019), Megatron-LM, arXiv 1909.08053, for the sides of the modules; Rajbhandari et
al. (2020), ZeRO, arXiv 1910.02054, for weights split over the data axis.
"""

import math
import re
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array

from bnlora._util.checks import check_at_least, check_option

Split = Literal["tensor", "fully"]
Axis = Literal["data", "model", "draw"]

RULES: tuple[tuple[str, Spec], ...] = (
    (r"\['(q|k|v|gate|up)_proj'\]", Spec(None, None, "model")),  # (layer, d_in, d_out): its outputs
    (r"\['(o|down)_proj'\]", Spec(None, "model", None)),  # its inputs, which are the outputs above
    (r"\['(embedding|lm_head)'\]", Spec("model", None)),  # (vocabulary, d): tokens
)
"""Sides that the axis "model" splits, by the path of a weight; the names are those of all model families.
What no rule names, such as gains and biases, is whole on every device."""


def mesh(*, data: int = 1, model: int = 1, draw: int = 1) -> Mesh:
    """Arrange devices in a mesh with the axes "data", "model" and "draw".

    Args:
        data: Devices between which the rows of a batch are split.
        model: Devices between which every layer is split.
        draw: Devices between which the draws of a prediction, or chains, are split.

    Returns:
        The mesh, for `bnlora.Base.on`.

    Raises:
        ValueError: If a number is below one, there are fewer devices than their product, or a process has
            none of them (see `bnlora.hosts`).

    Example:
        >>> bl.mesh(data=1).shape["data"]
        1
    """
    shape = {"data": data, "model": model, "draw": draw}
    check_at_least(shape, 1)
    count = math.prod(shape.values())
    if count > jax.device_count():
        raise ValueError(
            f"a mesh of {data} x {model} x {draw} devices needs {count}; JAX has {jax.device_count()} "
            f"({jax.devices()[0].platform})"
        )
    chosen = jax.devices()[:count]
    if len({device.process_index for device in chosen}) < jax.process_count():
        raise ValueError(
            f"a mesh over {jax.process_count()} processes must have devices of all; the first {count} of "
            f"{jax.device_count()} are too few"
        )
    devices = np.array(chosen).reshape(*shape.values())
    return Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def placed(weights: Any, over: Mesh, split: Split) -> Any:
    """The weights on the devices of a mesh, moved array by array.

    Args:
        weights: Frozen weights, a tree of arrays. Shapes without numbers (`jax.ShapeDtypeStruct`) receive
            only their place.
        over: Mesh.
        split: "tensor" splits weights over the axis "model" only, "fully" also over "data".
    """
    check_option("split", split, ("tensor", "fully"))

    def one(path: Any, leaf: Any) -> Any:
        spec = spec_of(jax.tree_util.keystr(path), leaf.shape, dict(over.shape), split)
        place = NamedSharding(over, spec)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        return put(leaf, place)

    return jax.tree_util.tree_map_with_path(one, weights)


def spec_of(path: str, shape: tuple[int, ...], sizes: dict[str, int], split: Split) -> Spec:
    """How an array is split: by the first rule for its path, as far as axes divide its sides."""
    rule = next((spec for pattern, spec in RULES if re.search(pattern, path)), Spec())
    if not rule or len(rule) != len(shape):
        return Spec()
    sides: list[str | None] = list(rule)
    if split == "fully":
        sides[1 if rule[-1] == "model" else -1] = "data"  # the other one of the last two sides
    return Spec(*(axis if axis and shape[i] % sizes[axis] == 0 else None for i, axis in enumerate(sides)))


def mesh_of(weights: Any) -> Mesh | None:
    """The mesh that weights are on, or None if they are on one device."""
    sharding = getattr(next(iter(jax.tree.leaves(weights)), None), "sharding", None)
    found = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return found if isinstance(found, Mesh) and found.size > 1 else None


def whole(over: Mesh | None, tree: Any) -> Any:
    """Arrays as a whole on every device of a mesh, inside a program or outside; unchanged without a mesh."""
    return tree if over is None else jax.tree.map(lambda x: put(x, NamedSharding(over, Spec())), tree)


def put(x: Any, place: NamedSharding) -> Array:
    """An array on the devices of a mesh, inside a program or outside; every process puts its own parts."""
    if isinstance(x, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(x, place)
    if place.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, place)
    # `jax.device_put` would send the whole array between all processes, to compare their values.
    values = np.asarray(x)
    return jax.make_array_from_callback(values.shape, place, lambda index: np.asarray(values[index]))


def along(over: Mesh | None, axis: Axis, tree: Any) -> Any:
    """Arrays whose first side is split over an axis, if that divides it; inside a program or outside.

    Args:
        over: Mesh; without one the arrays are unchanged.
        axis: Axis of the mesh.
        tree: Arrays with the same first side.
    """
    if over is None or axis not in over.shape or over.shape[axis] == 1:
        return tree

    def one(x: Array) -> Array:
        if not x.ndim or x.shape[0] % over.shape[axis]:
            return x
        place = NamedSharding(over, Spec(axis))
        return jax.lax.with_sharding_constraint(x, place) if isinstance(x, jax.core.Tracer) else put(x, place)

    return jax.tree.map(one, tree)
