"""Reading pretrained checkpoints: configuration, float32 tensors and tokenizer, from three kinds of source.

The source is a `.gguf` file, a local Hugging Face folder (config.json with one or several safetensors files),
or the name of a repository on the Hugging Face hub. For every source, configuration keys and tensor names are
those of Hugging Face, and matrices are (out, in). Tensors are read from disk when they are accessed.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from safetensors import SafetensorError

from bnlora._util.checks import brief, listed
from bnlora._util.files import read_json
from bnlora.models.gguf import read_gguf
from bnlora.models.tensors import Stored, TensorFiles, safetensors_headers

_HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
_HUB_EXCLUDED = ("*/*", "consolidated*")
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SAFE = (
    "pickled weights can run code when they are read and are refused: save the model with transformers' "
    "save_pretrained, which writes safetensors, or take a revision of the repository that has them"
)
_TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja")
_LARGEST_TOKENIZER = 2**27  # bytes; a tokenizer of 260,000 tokens has some thirty million


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained model as stored on disk.

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
        source: Path of a file or folder, or the name of a hub repository ("owner/name"). For a split GGUF
            model, any part.
        accept: Called with the configuration before any weights are downloaded or read. It can raise an error
            to reject the model.

    Returns:
        Configuration, tensors and tokenizer.

    Raises:
        FileNotFoundError: If there is no such file, folder or repository, or a folder lacks a file.
        ValueError: If a file is corrupt, truncated or of an unsupported kind.
        OSError: If the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, accept)
    if path.is_file():
        if path.suffix != ".gguf":
            remedy = f"; {_SAFE}" if path.suffix in _PICKLED else ""
            raise ValueError(
                f"expected a .gguf file or a folder with a model; got the file {str(path)!r}{remedy}"
            )
        config, stored, tokenizer = read_gguf(path)
        accept(config)
        return Checkpoint(config, TensorFiles(stored), tokenizer)
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
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


def _read_folder(folder: Path, accept: Callable[[Mapping[str, Any]], object]) -> Checkpoint:
    config = _read_json(folder, "config.json")
    accept(config)
    return Checkpoint(config, _open_safetensors(folder), _folder_tokenizer(folder))


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())[:10]


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"the folder {str(folder)!r} lacks {name!r}; it has {_names_in(folder)}")
    return read_json(path)


def _open_safetensors(folder: Path) -> TensorFiles:
    names = _shards(folder) if (folder / INDEX).is_file() else ["model.safetensors"]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        pickled = any(path.suffix in _PICKLED for path in folder.iterdir())
        names = [repr(name) for name in absent]
        raise FileNotFoundError(
            f"the folder {str(folder)!r} lacks [{listed(names)}]; it has {_names_in(folder)}"
            + (f"; {_SAFE}" if pickled else "")
        )
    stored: dict[str, Stored] = {}
    for name in names:
        tensors = _safetensors(folder / name)
        twice = sorted(stored.keys() & tensors.keys())
        if twice:
            raise ValueError(f"several files of {str(folder)!r} have the same tensors: {listed(twice)}")
        stored |= tensors
    return TensorFiles(stored)


def _shards(folder: Path) -> list[str]:
    """The files that an index names; all must be in its folder."""
    index = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{INDEX} in {str(folder)!r} has no 'weight_map'")
    for tensor, name in index.items():
        # A symbolic link in the folder may lead elsewhere, as in the hub's cache; a name must not.
        if not isinstance(name, str) or "\0" in name or not _is_plain(name):
            raise ValueError(
                f"{INDEX} in {str(folder)!r} must name files inside its folder, without a path; got "
                f"{brief(name)} for the tensor {brief(tensor)}"
            )
    return sorted(set(index.values()))


def _is_plain(name: str) -> bool:
    """Whether a name is a plain file name, without a path, on every system."""
    return name not in ("", ".", "..") and name == PurePosixPath(name).name == PureWindowsPath(name).name


def _safetensors(path: Path) -> dict[str, Stored]:
    try:
        return safetensors_headers(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is corrupt or truncated, copy or download it again ({_first_line(error)})"
        ) from error


def _folder_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    for path in folder.iterdir():
        if path.suffix in _TOKENIZER_FILES and path.stat().st_size > _LARGEST_TOKENIZER:
            raise ValueError(
                f"{str(path)!r} has {path.stat().st_size:,} bytes; files of a tokenizer may have at most "
                f"{_LARGEST_TOKENIZER:,}"
            )
    # Use the rules of tokenizer.json: `AutoTokenizer` can rebuild them from the class in
    # tokenizer_config.json, and then loses, for instance, a rule that splits off single digits.
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exception for broken files
        raise ValueError(
            f"the folder {str(folder)!r} has no readable tokenizer ({_first_line(error)})"
        ) from error
