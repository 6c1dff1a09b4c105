"""Tensors of a checkpoint: names, shapes and types from the file headers; tensors are read one at a time.

The configuration is compared with the headers before anything of the stated size is allocated.
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
# Types of float tensors, in the names of safetensors and of NumPy.
FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        shape: Its shape, from the header of the file.
        kind: The type of its numbers, from the header.
        read: Function that reads it.
    """

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], np.ndarray]


class TensorFiles(Mapping[str, np.ndarray]):
    """Tensors by name; each lookup reads the tensor from its file as float32."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        """Store the headers."""
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> np.ndarray:
        """Read one tensor."""
        with np.errstate(over="ignore"):  # overflow in float32 becomes infinite, and `take` raises an error
            return self.stored[name].read().astype(np.float32, copy=False)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor with this name, without reading it."""
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.stored)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.stored)


def safetensors_headers(path: Path) -> dict[str, Stored]:
    """The headers of a safetensors file by tensor name. safetensors itself checks the header.

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
    """Compare the tensors of a checkpoint with its configuration, without reading them.

    Args:
        tensors: Tensors by name.
        num_layers: Number of layers that the configuration states.
        layer_shapes: Shape of `model.layers.<i>.<path>.weight` by path, in each layer.
        outer_shapes: Shape by name of the tensors outside of the layers.

    Raises:
        ValueError: If tensors are missing, unexpected, of another shape, or not floats of at least 16 bits;
            five of each are named and the others counted.
    """
    if num_layers > len(tensors):  # checked before the names of all these layers are generated
        present = {match[1] for name in tensors if (match := _LAYER.match(name))}
        raise ValueError(
            f"the configuration states {num_layers:,} layers, but the checkpoint has only {len(present):,} "
            f"({len(tensors):,} tensors in all)"
        )
    expected = {
        f"model.layers.{layer}.{path}.weight": shape
        for layer in range(num_layers)
        for path, shape in layer_shapes.items()
    } | dict(outer_shapes)
    # Old checkpoints store the rotary frequencies, which the configuration determines.
    unexpected = [n for n in tensors if n not in expected and not n.endswith("rotary_emb.inv_freq")]
    known = {name: _header(tensors, name) for name in expected if name in tensors}
    problems = {
        "missing": [name for name in expected if name not in known],
        "unexpected": unexpected,
        "of the wrong shape": [
            f"{n} {shape} instead of {expected[n]}" for n, (shape, _) in known.items() if shape != expected[n]
        ],
        "of an unsupported type": [f"{n} {kind}" for n, (_, kind) in known.items() if kind not in FLOATS],
    }
    message = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
    if message:
        raise ValueError(f"the tensors of the checkpoint do not fit its configuration; {message}")


def take(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Read a tensor and check its numbers.

    Raises:
        ValueError: If a number is NaN, or infinite in float32.
    """
    value = tensors[name]
    # Minimum and maximum are NaN if any number is NaN; unlike a mask they need no memory.
    if value.size and not np.isfinite([value.min(), value.max()]).all():
        bad = value.size - np.count_nonzero(np.isfinite(value))
        raise ValueError(
            f"the tensor {name!r} has {bad:,} of {value.size:,} numbers that are NaN or infinite in float32; "
            "copy or download its file again"
        )
    return value


def stack(tensors: Mapping[str, np.ndarray], count: int, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Stack `model.layers.<i>.<path>.weight` of all layers, each transposed, along a leading axis.

    Args:
        tensors: Tensors by name, checked by `check_tensors`.
        count: Number of layers.
        path: Path of the tensor in a layer.
        shape: Its shape before the transposition.

    Returns:
        All layers, in float32.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    # Fill in place: `np.stack` would need all layers in memory twice.
    stacked = np.empty((count, *shape[::-1]), np.float32)
    for layer in range(count):
        stacked[layer] = take(tensors, f"model.layers.{layer}.{path}.weight").T
    return stacked


def _header(tensors: Mapping[str, np.ndarray], name: str) -> tuple[tuple[int, ...], str]:
    """Shape of a tensor and the type of its numbers, without reading it."""
    if isinstance(tensors, TensorFiles):
        return tensors.stored[name].shape, tensors.stored[name].kind
    return tensors[name].shape, str(tensors[name].dtype)
