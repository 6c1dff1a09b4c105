"""The configuration of an adapter of the `peft` library: what is refused, rank and scale of each module."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnlora._util.checks import brief, is_integer, is_positive
from bnlora._util.files import read_json

CONFIG = "adapter_config.json"

# Each of these changes the update of the same tensors, or trains additional parameters.
_REFUSED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out",
    "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens",
    "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
_HEADS = {"classifier", "score"}
"""Modules that peft stores whole in an adapter of a classifier; a model has one of the two."""
# Every other initialisation of peft moves part of the base weights into the adapter, which changes the base.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of an adapter; anything but plain LoRA is refused by name.

    Raises:
        FileNotFoundError: If the folder has none.
        ValueError: If it is corrupt, or the kind of adapter is not supported.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not an adapter folder: it has no {CONFIG}")
    try:
        config = read_json(folder / CONFIG)
        kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{CONFIG} in {str(folder)!r} is corrupt: {error}") from error
    if kind != "LORA":
        raise ValueError(f"only LoRA adapters can be read; this one is {brief(kind)}")
    if not _is_rank(rank) or not is_positive(alpha):
        raise ValueError(
            f"{CONFIG} in {str(folder)!r} is corrupt: r={brief(rank)}, lora_alpha={brief(alpha)}; expected "
            "an integer of at least 1 and a positive number"
        )
    _check_patterns(config, folder)
    if not isinstance(config.get("use_rslora", False), bool | None):
        raise ValueError(f"use_rslora in {CONFIG} must be true or false; got {brief(config['use_rslora'])}")
    for name in _REFUSED:
        if config.get(name):
            raise ValueError(f"adapters with {name}={brief(config[name])} are not supported, only plain LoRA")
    whole = config.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(name in _HEADS for name in whole):
        raise ValueError(
            f"adapters with modules_to_save={brief(whole)} are not supported, only plain LoRA, and with the "
            "classification head of an encoder"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"adapters with bias={brief(config['bias'])} are not supported, only plain LoRA")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise ValueError(
            f"adapters with init_lora_weights={brief(start)} change the base weights; have peft convert it "
            "to plain LoRA (`path_initial_model_for_weight_conversion`)"
        )
    return config


def _is_rank(value: Any) -> bool:
    """Whether a value can be a rank: an integer of at least 1 that an array can have as a side."""
    return is_integer(value) and 1 <= value < 2**31


def _check_patterns(config: Mapping[str, Any], folder: Path) -> None:
    """Raise `ValueError` unless the patterns are expressions with valid ranks and alphas."""
    kinds = {"rank_pattern": _is_rank, "alpha_pattern": is_positive}
    for name, is_valid in kinds.items():
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(is_valid, patterns.values())):
            raise ValueError(f"{name} in {str(folder / CONFIG)!r} is corrupt: got {brief(patterns)}")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name} in {CONFIG} has the pattern {pattern!r}: {error}") from error


def rank_and_scale(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """Rank and scale of the update of a module, by its path in the model."""

    def value(plain: str, patterns: str) -> Any:
        by_pattern = config.get(patterns) or {}
        matching = (x for pattern, x in by_pattern.items() if re.match(rf"(.*\.)?({pattern})$", path))
        return next(matching, config[plain])

    rank, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)
