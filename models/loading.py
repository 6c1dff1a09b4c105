"""Reading pretrained checkpoints: configuration, float32 tensors and tokenizer, from three kinds of source.

A `.gguf` file, a local Hugging Face folder (config.json with one or several safetensors files), or the name
of a repository on the Hugging Face hub. Whatever the source, configuration keys and tensor names are those
of Hugging Face and matrices are (out, in). Tensors are read from disk when they are asked for.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from bnlora.models.gguf import read_gguf

_HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
_HUB_EXCLUDED = ("*/*", "consolidated*")


class TensorFiles(Mapping[str, np.ndarray]):
    """Tensors by name, each read from its file as float32 when it is looked up."""

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]) -> None:
        """Keep one function per tensor name."""
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> np.ndarray:
        """Read one tensor."""
        return self._readers[name]().astype(np.float32, copy=False)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name, without reading it."""
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._readers)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._readers)


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained model as it is stored.

    Attributes:
        config: The keys of a Hugging Face config.json.
        tensors: float32 arrays under their Hugging Face names, matrices (out, in).
        tokenizer: A transformers tokenizer, with its chat template if there is one.
    """

    config: dict[str, Any]
    tensors: Mapping[str, np.ndarray] = field(repr=False)
    tokenizer: Any = field(repr=False)


def read_checkpoint(
    source: str | Path, *, accept: Callable[[Mapping[str, Any]], object] = lambda config: None
) -> Checkpoint:
    """Read a checkpoint from a `.gguf` file, a Hugging Face folder, or the hub.

    Args:
        source: Path of a file or folder, or the name of a hub repository ("owner/name").
        accept: Called with the configuration before any weights are downloaded or read; it raises to refuse.

    Returns:
        Configuration, tensors and tokenizer.

    Raises:
        FileNotFoundError: If there is no such file, folder or repository, or a folder lacks a file.
        ValueError: If a file is corrupt, truncated, or of an unsupported kind.
        OSError: If the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, accept)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"expected a .gguf file or a folder that holds a model; got the file {str(path)!r}"
            )
        config, readers, tokenizer = read_gguf(path)
        accept(config)
        return Checkpoint(config, TensorFiles(readers), tokenizer)
    if isinstance(source, Path) or path.suffix == ".gguf" or not re.fullmatch(_HUB_NAME, source):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; the nearest is {str(path.parent / near[0])!r}" if near else ""
        raise FileNotFoundError(
            f"there is no file or folder {str(path)!r}{hint}, and hub names are 'owner/name'"
        )
    accept(_read_json(_download(source, ["config.json"]), "config.json"))
    return _read_folder(_download(source, _HUB_FILES), accept)


def _download(name: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(name, allow_patterns=[*files], ignore_patterns=[*_HUB_EXCLUDED])
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a local path nor a hub name: {_first_line(error)}") from error
    except (HfHubHTTPError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, (HfHubHTTPError, FileNotFoundError)) else OSError
        raise kind(
            f"there is no local folder {name!r}, and downloading it from the Hugging Face hub failed "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error
    return Path(folder)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class TensorReader:
    """Takes tensors one by one and remembers everything that does not fit, to report it in one go."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Start with nothing taken."""
        self.tensors = tensors
        self.taken: set[str] = set()
        self.missing: list[str] = []
        self.misshaped: list[str] = []

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the tensor, or zeros of the right shape after noting what is wrong."""
        self.taken.add(name)
        if name not in self.tensors:
            self.missing.append(name)
        elif (value := self.tensors[name]).shape != shape:
            self.misshaped.append(f"{name} {value.shape} instead of {shape}")
        else:
            return value
        return np.broadcast_to(np.float32(0), shape)

    def stack(self, count: int, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return `model.layers.<i>.<path>.weight` of all layers, each transposed, on a leading axis."""
        # Filled in place: the list that `np.stack` wants would hold every layer twice.
        stacked = np.empty((count, *shape[::-1]), np.float32)
        for layer in range(count):
            stacked[layer] = self.take(f"model.layers.{layer}.{path}.weight", shape).T
        return stacked

    def finish(self) -> None:
        """Raise one ValueError that names every tensor that is missing, unexpected or misshaped."""
        # Old checkpoints carry the rotary frequencies, which follow from the configuration.
        rest = [name for name in self.tensors if name not in self.taken]
        unexpected = [name for name in rest if not name.endswith("rotary_emb.inv_freq")]
        problems = {"missing": self.missing, "unexpected": unexpected, "of the wrong shape": self.misshaped}
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        if found:
            raise ValueError(f"the tensors of the checkpoint do not fit its configuration; {found}")


def _read_folder(folder: Path, accept: Callable[[Mapping[str, Any]], object]) -> Checkpoint:
    config = _read_json(folder, "config.json")
    accept(config)
    return Checkpoint(config, _open_safetensors(folder), _folder_tokenizer(folder))


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())[:10]


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"the folder {str(folder)!r} lacks {name!r}; it holds {_names_in(folder)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object; got {type(content).__name__}")
    return content


def _open_safetensors(folder: Path) -> TensorFiles:
    if (folder / "model.safetensors.index.json").is_file():
        index = _read_json(folder, "model.safetensors.index.json").get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"model.safetensors.index.json in {str(folder)!r} has no 'weight_map'")
        names = sorted(set(index.values()))
    else:
        names = ["model.safetensors"]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"the folder {str(folder)!r} lacks {absent}; it holds {_names_in(folder)}")
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for name in names:
        readers |= _safetensors_readers(folder / name)
    return TensorFiles(readers)


def _safetensors_readers(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    try:
        file = safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is corrupt or truncated, copy or download it again ({_first_line(error)})"
        ) from error
    return {name: partial(file.get_tensor, name) for name in file.keys()}


def _folder_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # The rules inside tokenizer.json are the truth: `AutoTokenizer` may rebuild them from the class that
    # tokenizer_config.json names, and then loses, for instance, a rule that cuts digits off one by one.
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exception for broken files
        raise ValueError(
            f"the folder {str(folder)!r} has no readable tokenizer ({_first_line(error)})"
        ) from error
