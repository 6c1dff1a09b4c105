"""Names of modules in transformers, by which peft names factors, and where they are in this library.

| module | decoder | encoder |
|---|---|---|
| q_proj of layer i | model.layers.<i>.self_attn.q_proj | bert.encoder.layer.<i>.attention.self.query |
| lm_head | lm_head | classifier, or classifier.out_proj |
"""

import re

from bnlora.adapters.sites import HEAD
from bnlora.models.encoder_names import CLASSIFIER, PATHS

Place = tuple[str, int | None]
"""Module of this library, and its layer; None for the head."""

_PARENTS = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
"""Submodule of a decoder's layer that has a projection, by its first letter; the others are in `mlp`."""
_DECODER = re.compile(r"(?:(?:model\.)?layers\.(\d{1,9})\.(?:\w+\.)?)?(\w+)")
_ENCODER = re.compile(r"(?:\w+\.)?encoder\.layer\.(\d{1,9})\.([\w.]+)")
_HEADS = (CLASSIFIER, f"{CLASSIFIER}.out_proj")
_MODULES = {path: module for module, path in PATHS.items()}


def module_path(module: str, layer: int, prefix: str | None) -> str:
    """Name of a module in the model of transformers.

    Args:
        module: Module of this library; the head only of a decoder, because that of an encoder is not adapted
            in peft's format but stored whole.
        layer: Number of the layer, which the head ignores.
        prefix: What precedes the names of an encoder's body, such as "bert."; None for a decoder.
    """
    if module == HEAD:
        return HEAD
    if prefix is not None:
        return f"{prefix}encoder.layer.{layer}.{PATHS[module]}"
    return f"model.layers.{layer}.{_PARENTS.get(module[0], 'mlp')}.{module}"


def place_of(path: str) -> Place | None:
    """The module and layer of a name in transformers; None if it is not that of a module."""
    if path in _HEADS:
        return HEAD, None
    if match := _ENCODER.fullmatch(path):
        module = _MODULES.get(match[2])
        return None if module is None else (module, int(match[1]))
    if match := _DECODER.fullmatch(path):
        return match[2], None if match[1] is None else int(match[1])
    return None
