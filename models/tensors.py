"""Tensors of a checkpoint: known by name, shape and type from the headers of its files, read one at a time.

What a configuration states is compared with the headers before anything of the stated size is made.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from bnlora._util.checks import listed

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Types of float tensors, in safetensors' names and in numpy's.
FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        shape: Its shape, from the header of the file.
        kind: The type of its numbers, from the header.
        read: Reads it.
    """

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], np.ndarray]


class TensorFiles(Mapping[str, np.ndarray]):
    """Tensors by name, each read from its file as float32 when it is looked up."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        """Keep where each tensor is."""
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> np.ndarray:
        """Read one tensor."""
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which `take` refuses
            return self.stored[name].read().astype(np.float32, copy=False)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name, without reading it."""
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.stored)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.stored)


def safetensors_headers(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, none of them read; safetensors checks its header itself.

    Raises:
        SafetensorError: If the file is corrupt or truncated.
        OSError: If it cannot be opened.
    """
    file = safe_open(path, framework="np")
    headers = {name: file.get_slice(name) for name in file.keys()}
    return {
        name: Stored(tuple(header.get_shape()), header.get_dtype(), partial(file.get_tensor, name))
        for name, header in headers.items()
    }


def check_tensors(
    tensors: Mapping[str, np.ndarray],
    num_layers: int,
    layer_shapes: Mapping[str, tuple[int, ...]],
    outer_shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Compare the tensors of a checkpoint with those that its configuration implies, without reading them.

    Args:
        tensors: Tensors by name.
        num_layers: Number of layers that the configuration states.
        layer_shapes: Shape of `model.layers.<i>.<path>.weight` by path, in each layer.
        outer_shapes: Shape by name of the tensors beside the layers.

    Raises:
        ValueError: If tensors are missing, unexpected, of another shape, or not of floats of 16 bits or more;
            five of each are named and the others counted.
    """
    if num_layers > len(tensors):  # before the names of so many layers are made
        found = {match[1] for name in tensors if (match := _LAYER.match(name))}
        raise ValueError(
            f"the configuration states {num_layers:,} layers, but the checkpoint has those of {len(found):,} "
            f"({len(tensors):,} tensors in all)"
        )
    expected = {
        f"model.layers.{layer}.{path}.weight": shape
        for layer in range(num_layers)
        for path, shape in layer_shapes.items()
    } | dict(outer_shapes)
    # Old checkpoints carry the rotary frequencies, which follow from the configuration.
    unexpected = [n for n in tensors if n not in expected and not n.endswith("rotary_emb.inv_freq")]
    known = {name: _header(tensors, name) for name in expected if name in tensors}
    problems = {
        "missing": [name for name in expected if name not in known],
        "unexpected": unexpected,
        "of the wrong shape": [
            f"{n} {shape} instead of {expected[n]}" for n, (shape, _) in known.items() if shape != expected[n]
        ],
        "of a type that is not read": [f"{n} {kind}" for n, (_, kind) in known.items() if kind not in FLOATS],
    }
    said = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
    if said:
        raise ValueError(f"the tensors of the checkpoint do not fit its configuration; {said}")


def take(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Read a tensor and check its numbers.

    Raises:
        ValueError: If a number is NaN, or infinite in float32.
    """
    value = tensors[name]
    # The extremes are NaN where any number is, and take no memory, unlike a mask.
    if value.size and not np.isfinite([value.min(), value.max()]).all():
        bad = value.size - np.count_nonzero(np.isfinite(value))
        raise ValueError(
            f"the tensor {name!r} has {bad:,} of {value.size:,} numbers that are NaN or infinite in float32; "
            "copy or download its file again"
        )
    return value


def stack(tensors: Mapping[str, np.ndarray], count: int, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return `model.layers.<i>.<path>.weight` of all layers, each transposed, on a leading axis.

    Args:
        tensors: Tensors by name, which `check_tensors` found to fit.
        count: Number of layers.
        path: Where a layer keeps the tensor.
        shape: Its shape before it is transposed.

    Returns:
        All layers, in float32.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    # Filled in place: the list that `np.stack` wants would hold every layer twice.
    stacked = np.empty((count, *shape[::-1]), np.float32)
    for layer in range(count):
        stacked[layer] = take(tensors, f"model.layers.{layer}.{path}.weight").T
    return stacked


def _header(tensors: Mapping[str, np.ndarray], name: str) -> tuple[tuple[int, ...], str]:
    """Shape of a tensor and the type of its numbers, without reading it."""
    if isinstance(tensors, TensorFiles):
        return tensors.stored[name].shape, tensors.stored[name].kind
    return tensors[name].shape, str(tensors[name].dtype)
