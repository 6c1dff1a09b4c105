"""GGUF files: every declared size is compared with the length of the file, and parts are joined.

The `gguf` library trusts the sizes that a file declares. This module rejects sizes that exceed the file, so a
broken file raises an error before it costs memory or time.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader, GGUFValueType

from bnlora._util.checks import brief, check_size, listed

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# Longest list in the metadata, which is read value by value. Large vocabularies have some 300,000 tokens.
_LONGEST_LIST = 2**22


class CheckedReader(GGUFReader):
    """The reader of the `gguf` library, with errors for sizes beyond the end of the file.

    It reads a plain view of the mapped file: a slice of a `np.memmap` costs ten times that of an array, and a
    tokenizer needs a million of them.
    """

    @property
    def data(self) -> Any:
        """The bytes of the file."""
        return self._bytes

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._bytes = np.asarray(mapped)

    def _get(self, offset: int, dtype: Any, count: Any = 1, *args: Any, **kwargs: Any) -> Any:
        """Read numbers; all must lie within the file."""
        self._require(int(offset), int(count), np.dtype(dtype).itemsize)
        return super()._get(offset, dtype, count, *args, **kwargs)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Read a value of the metadata; the whole of a list must lie within the file."""
        if raw_type == GGUFValueType.ARRAY:
            kind = GGUFValueType(self._get(orig_offs, np.uint32)[0])
            length = int(self._get(orig_offs + 4, np.uint64)[0])
            if kind == GGUFValueType.ARRAY or length > _LONGEST_LIST:
                what = "lists" if kind == GGUFValueType.ARRAY else f"{length:,} values"
                raise ValueError(f"a list of {what} in the metadata")
            # A string has at least eight bytes, for its length.
            number = self.gguf_scalar_to_np.get(kind)
            self._require(orig_offs + 12, length, 8 if number is None else np.dtype(number).itemsize)
            return self._list(orig_offs, length, kind, number)
        return super()._get_field_parts(orig_offs, raw_type)

    def _list(self, begin: int, length: int, kind: GGUFValueType, number: Any) -> Any:
        """The parts of a list, in the form of the library, which reads one value at a time."""
        parts = [self._bytes[begin : begin + 12]]
        if number is not None:
            parts.append(self._get(begin + 12, number, length))
            return sum(part.nbytes for part in parts), parts, [1], [GGUFValueType.ARRAY, kind]
        swapped = self.byte_order == "S"
        order: Any = sys.byteorder if not swapped else {"little": "big", "big": "little"}[sys.byteorder]
        whole, offset = self._bytes.data, begin + 12
        for _ in range(length):
            self._require(offset, 1, 8)
            first, size = offset + 8, int.from_bytes(whole[offset : offset + 8], order)
            self._require(first, size, 1)
            parts += (self._bytes[offset:first], self._bytes[first : first + size])
            offset = first + size
        return offset - begin, parts, range(2, 2 * length + 1, 2), [GGUFValueType.ARRAY, kind]

    def _require(self, offset: int, count: int, size: int) -> None:
        if offset + count * size > len(self.data):
            raise ValueError(
                f"{count:,} values of {size} bytes at byte {offset:,} of a file of {len(self.data):,} bytes"
            )


class GgufTensor(NamedTuple):
    """A tensor in a GGUF file.

    Attributes:
        path: The file.
        header: Its entry in the `gguf` library.
    """

    path: Path
    header: Any

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.header.name

    @property
    def kind(self) -> str:
        """The name of its type, such as Q4_1."""
        return self.header.tensor_type.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, rows first."""
        return tuple(map(int, self.header.shape[::-1]))

    def read(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        """The rows [begin, end) as they are stored.

        They are read and not mapped: pages of a map stay in memory as long as the map.
        """
        mapped = self.header.data
        rows, row = len(mapped), mapped.shape[1:]
        end = rows if end is None else min(end, rows)
        width = int(np.prod(row, dtype=np.int64))
        offset = int(self.header.data_offset) + begin * width * mapped.dtype.itemsize
        values = np.fromfile(self.path, mapped.dtype, (end - begin) * width, offset=offset)
        return values.reshape(end - begin, *row)


def read_parts(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Read the metadata and the headers of all tensors of a model, in one file or in several.

    Args:
        path: The file, or any part of a model that was split with `llama-gguf-split`.

    Returns:
        The metadata (from the first part, which has all of it), and the tensors of all parts.

    Raises:
        FileNotFoundError: If a part is missing.
        ValueError: If a file is corrupt or truncated, or the parts do not belong together.
    """
    reader, metadata = _open(path)
    count = metadata.get("split.count", 1)
    check_size({f"split.count in {str(path)!r}": count}, least=0)
    if count < 2:
        return metadata, _tensors(path, reader)
    tensors: list[GgufTensor] = []
    for number, part in enumerate(_parts(path, metadata)):
        reader, own = _open(part)
        metadata = own if number == 0 else metadata
        if (own.get("split.no"), own.get("split.count")) != (number, count):
            raise ValueError(
                f"{str(part)!r} must be part {number + 1} of {count} by its name; its metadata "
                f"has {_place(own)}"
            )
        tensors += _tensors(part, reader)
    names = {tensor.name for tensor in tensors}
    stated = metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors) or len(names) < len(tensors):
        raise ValueError(
            f"the {count} parts of {str(path)!r} must have {brief(stated)} tensors with different names; got "
            f"{len(tensors):,} tensors with {len(names):,} names"
        )
    return metadata, tensors


def _tensors(path: Path, reader: CheckedReader) -> list[GgufTensor]:
    scalars = [header.name for header in reader.tensors if not header.data.ndim]
    if scalars:
        raise ValueError(
            f"{str(path)!r} is corrupt, copy or download it again (tensor {brief(scalars[0])} has no "
            "dimensions)"
        )
    return [GgufTensor(path, header) for header in reader.tensors]


def _open(path: Path) -> tuple[CheckedReader, dict[str, Any]]:
    try:
        reader = CheckedReader(path)
        return reader, {name: entry.contents() for name, entry in reader.fields.items()}
    except Exception as error:  # unreadable bytes can raise any exception in the reader
        raise ValueError(
            f"{str(path)!r} is corrupt or truncated, copy or download it again "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _parts(path: Path, metadata: dict[str, Any]) -> Sequence[Path]:
    """The files of all parts, in order."""
    count, place = metadata["split.count"], _place(metadata)
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise ValueError(
            f"{str(path)!r} is {place} of a model; its parts must keep their names, "
            f"NAME-00001-of-{count:05}.gguf and so on; got another name"
        )
    parts = [path.with_name(f"{named[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    absent = [part.name for part in parts if not part.is_file()]
    if absent:
        raise FileNotFoundError(f"{str(path)!r} is {place} of a model, and its folder lacks {listed(absent)}")
    return parts


def _place(metadata: dict[str, Any]) -> str:
    """Number of the part, and number of parts, according to the metadata of a file."""
    number = metadata.get("split.no")
    which = f"part {number + 1}" if isinstance(number, int) else "a part"
    return f"{which} of {brief(metadata.get('split.count'))}"
