"""Tensors of a checkpoint: names, shapes and types from the file headers; tensors are read one at a time.

The configuration is compared with the headers before anything of the stated size is allocated.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from bnlora._util.checks import listed
from bnlora.models.storage import Blocks

# Types of float tensors, in the names of safetensors and of NumPy.
FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        shape: Its shape, from the header of the file.
        kind: The type of its numbers, from the header.
        read: Function that reads the rows [begin, end) in their own type; without a range all of them.
        grain: Number of rows that must be read together; ranges begin and end at multiples of it.
        blocks: Function that reads rows as blocks of four bits, where they are stored so.
    """

    shape: tuple[int, ...]
    kind: str
    read: Callable[..., np.ndarray]
    grain: int = 1
    blocks: Callable[[int, int], Blocks] | None = None


class TensorFiles(Mapping[str, np.ndarray]):
    """Tensors by name; each lookup reads the tensor from its file as float32."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        """Store the headers."""
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> np.ndarray:
        """Read one tensor."""
        return _single(self.stored[name].read())

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Read the rows [begin, end) of a tensor."""
        return _single(self.stored[name].read(begin, end))

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
    with safe_open(path, framework="np") as file:
        headers = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: Stored(tuple(header.get_shape()), header.get_dtype(), partial(_read, path, name))
            for name, header in headers.items()
        }


def _read(path: Path, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
    """Rows of a tensor. The file is mapped for this read only, because pages of a map stay in memory."""
    with safe_open(path, framework="np") as file:
        header = file.get_slice(name)
        # A scalar has no rows, and an empty range of rows keeps no shape.
        return header[begin:end] if header.get_shape() else file.get_tensor(name)


def _single(values: np.ndarray) -> np.ndarray:
    """Numbers in float32."""
    with np.errstate(over="ignore"):  # overflow in float32 becomes infinite, and a check raises an error
        return values.astype(np.float32, copy=False)


def plain(value: np.ndarray) -> np.ndarray:
    """The tensor as it is."""
    return value


@dataclass(frozen=True)
class Part:
    """One weight of a model, as a part of a stored tensor.

    Attributes:
        name: Name of the tensor; of one in a layer, what follows the prefix of the layer.
        shape: Shape of the tensor.
        read: From the tensor to the weight; the transposition of a matrix (out, in), for example.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], np.ndarray] = np.transpose


@dataclass(frozen=True)
class KeyMap:
    """Where the weights of a model are in its checkpoint.

    Attributes:
        num_layers: Number of layers that the configuration states.
        layers: The weights of a layer, by our names.
        outer: The weights outside of the layers, by our names.
        prefix: Prefix of the tensors of a layer; {} is its number.
        ignored: Pattern of tensors that the configuration determines.
        omitted: Start of the names that some files leave out.
    """

    num_layers: int
    layers: Mapping[str, Part]
    outer: Mapping[str, Part]
    prefix: str = "model.layers.{}."
    ignored: str = r".*rotary_emb\.inv_freq"
    omitted: str = ""

    def named(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The tensors under the names of this map, where the file leaves out the start of all names."""
        if not self.omitted or any(name.startswith(self.omitted) for name in tensors):
            return tensors
        return renamed(tensors, lambda name: self.omitted + name)

    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Compare the tensors of a checkpoint with the map, without reading them.

        Raises:
            ValueError: If tensors are missing, unexpected, of another shape, or not floats of at least 16
                bits; five of each are named and the others counted.
        """
        if self.num_layers > len(tensors):  # checked before the names of all these layers are generated
            layer = re.compile(re.escape(self.prefix).replace(r"\{\}", r"(\d+)"))
            present = {match[1] for name in tensors if (match := layer.match(name))}
            raise ValueError(
                f"the configuration states {self.num_layers:,} layers, but the checkpoint has only "
                f"{len(present):,} ({len(tensors):,} tensors in all)"
            )
        expected = {
            self.prefix.format(layer) + part.name: part.shape
            for layer in range(self.num_layers)
            for part in self.layers.values()
        } | {part.name: part.shape for part in self.outer.values()}
        known = {name: _header(tensors, name) for name in expected if name in tensors}
        problems = {
            "missing": [name for name in expected if name not in known],
            "unexpected": [n for n in tensors if n not in expected and not re.fullmatch(self.ignored, n)],
            "of the wrong shape": [
                f"{n} {shape} instead of {expected[n]}"
                for n, (shape, _) in known.items()
                if shape != expected[n]
            ],
            "of an unsupported type": [f"{n} {kind}" for n, (_, kind) in known.items() if kind not in FLOATS],
        }
        message = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
        if message:
            raise ValueError(f"the tensors of the checkpoint do not fit its configuration; {message}")

    def stack(self, tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        """One weight of all layers, stacked along a leading axis, in float32.

        Raises:
            ValueError: If a number is NaN or infinite.
        """
        part, stacked = self.layers[name], np.empty(0)
        for layer in range(self.num_layers):
            weight = part.read(take(tensors, self.prefix.format(layer) + part.name))
            if not layer:  # filled in place: `np.stack` would need all layers in memory twice
                stacked = np.empty((self.num_layers, *weight.shape), np.float32)
            stacked[layer] = weight
        return stacked


def renamed(tensors: Mapping[str, np.ndarray], rename: Callable[[str], str]) -> Mapping[str, np.ndarray]:
    """The same tensors under other names, without reading them.

    Raises:
        ValueError: If two tensors would have the same name.
    """
    names: dict[str, str] = {}
    for name in tensors:
        same = names.setdefault(rename(name), name)
        if same != name:
            raise ValueError(f"the checkpoint has the same tensor under two names: {same!r} and {name!r}")
    if isinstance(tensors, TensorFiles):
        return TensorFiles({new: tensors.stored[name] for new, name in names.items()})
    return {new: tensors[name] for new, name in names.items()}


def take(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Read a tensor and check its numbers.

    Raises:
        ValueError: If a number is NaN, or infinite in float32.
    """
    value = tensors[name]
    if not _is_finite(value):
        bad = value.size - np.count_nonzero(np.isfinite(value))
        raise ValueError(
            f"the tensor {name!r} has {bad:,} of {value.size:,} numbers that are NaN or infinite in float32; "
            "copy or download its file again"
        )
    return value


def take_rows(tensors: Mapping[str, np.ndarray], name: str, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Read a matrix in ranges of rows, and check its numbers.

    Args:
        tensors: The tensors of a checkpoint.
        name: Name of the tensor.
        size: Largest number of entries to read at a time; at least one row is read.

    Yields:
        The first row of each range, and the rows in float32.

    Raises:
        ValueError: If a number is NaN, or infinite in float32.
    """
    files = tensors if isinstance(tensors, TensorFiles) else None
    for begin, end in _ranges(tensors, name, size):
        rows = tensors[name][begin:end] if files is None else files.rows(name, begin, end)
        if not _is_finite(rows):
            take(tensors, name)  # raises the error, which counts the numbers of the whole tensor
        yield begin, rows


def take_blocks(tensors: Mapping[str, np.ndarray], name: str, size: int) -> Iterator[tuple[int, Blocks]]:
    """`take_rows` of a matrix that is stored in blocks of four bits (`has_blocks`), as they are."""
    assert isinstance(tensors, TensorFiles)
    read = tensors.stored[name].blocks
    assert read is not None
    for begin, end in _ranges(tensors, name, size):
        blocks = read(begin, end)
        if not (_is_finite(blocks.scales) and _is_finite(blocks.offsets)):
            take(tensors, name)  # raises the error, unless only the offsets -8 s of Q4_0 are infinite
            raise ValueError(
                f"the tensor {name!r} has blocks beyond the range of float16, which four bits need; load the "
                'model with weights="bfloat16"'
            )
        yield begin, blocks


def has_blocks(tensors: Mapping[str, np.ndarray], name: str) -> bool:
    """Whether a matrix is stored in blocks of four bits."""
    return isinstance(tensors, TensorFiles) and tensors.stored[name].blocks is not None


def _ranges(tensors: Mapping[str, np.ndarray], name: str, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows with at most `size` numbers, or of one grain."""
    (total, width), _ = _header(tensors, name)
    grain = tensors.stored[name].grain if isinstance(tensors, TensorFiles) else 1
    step = grain * max(size // (width * grain), 1)
    for begin in range(0, total, step):
        yield begin, min(begin + step, total)


def _is_finite(value: np.ndarray) -> bool:
    # Minimum and maximum are NaN if any number is NaN; unlike a mask they need no memory.
    return not value.size or bool(np.isfinite([value.min(), value.max()]).all())


def _header(tensors: Mapping[str, np.ndarray], name: str) -> tuple[tuple[int, ...], str]:
    """Shape of a tensor and the type of its numbers, without reading it."""
    if isinstance(tensors, TensorFiles):
        return tensors.stored[name].shape, tensors.stored[name].kind
    return tensors[name].shape, str(tensors[name].dtype)
