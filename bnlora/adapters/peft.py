r"""LoRA adapters in the format of the `peft` library: read into stacked adapters, and written.

peft's update of a module is s b a with s = alpha / r, or alpha / sqrt(r) if rank-stabilised. The update of a
site is `site.scale` b a. `b` is multiplied by the ratio of the two, so the update is the same for every alpha
of the sites. An option that would change the update and is not supported raises an error with its name.

Reference: Hu et al. (2021), LoRA; Kalajdzievski (2023), A rank stabilization scaling factor for fine-tuning
with LoRA, arXiv 2312.03732.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import save_file

from bnlora._util.checks import brief, is_integer, is_positive, listed
from bnlora._util.files import read_json
from bnlora._util.typing import Adapters
from bnlora.adapters.sites import HEAD, Adaptable, Site, Sites
from bnlora.models.tensors import FLOATS, TensorFiles, safetensors_headers, take

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
PARENTS = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
"""Submodule of a layer that has a projection, by the first letter of its name; the others are in `mlp`."""

_NAME = re.compile(
    r"base_model\.model\.(?:(?:model\.)?layers\.(\d{1,9})\.(?:\w+\.)?)?(\w+)\.lora_([AB])\.weight"
)
# With an adapter of the head, peft also saves the frozen weights below it, which the base has too. Without
# one, it saves them only if the vocabulary was resized; the weights of the base then differ.
_COPIES = re.compile(r"base_model\.model\.(model\.embed_tokens|lm_head)(\.base_layer)?\.weight")
# Each of these changes the update of the same tensors, or trains additional parameters.
_REFUSED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
# Every other initialisation of peft moves part of the base weights into the adapter, which changes the base.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

Tensors = Mapping[tuple[str, int | None, str], Array]


def load_peft(folder: str | Path, sites: Sites, *, head_rows: Sequence[int] | None = None) -> Adapters:
    """Read an adapter that `peft` saved.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        sites: The sites of the adapters; they must have the modules and layers of the adapter.
        head_rows: Token ids of the rows of the head's `b` to keep. Pass `label_ids` if the sites are those of
            a `Classifier`, which have only the rows of the label tokens.

    Returns:
        Adapters of the sites, in float32, for `priors.centered` and `sites.place`.

    Raises:
        FileNotFoundError: If the folder has no adapter.
        ValueError: If a file is corrupt, numbers in it are NaN, infinite or not floats, the kind of adapter
            is not supported, sites and adapter have different modules or layers, or a rank or shape differs.

    Example:
        >>> adapters = {"lm_head": {"a": jnp.ones((1, 1, 16)), "b": jnp.zeros((1, 40, 1))}}
        >>> bl.save_peft(adapters, folder / "peft", sites=sites, base=base)
        >>> centre = bl.load_peft(folder / "peft", model.sites, head_rows=(3, 5))  # of the label words
        >>> centre["lm_head"]["b"].shape
        (1, 2, 1)
    """
    path = Path(folder).expanduser()
    config = _config(path)
    tensors, copies = _tensors(path)
    _require_all_used(tensors, sites)
    _require_frozen(copies, tensors, sites, head_rows)
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    adapters = {}
    for name, site in sites.items():
        if site.rank != rank:
            raise ValueError(f"the adapter has rank {rank}; the sites of {name!r} have rank {site.rank}")
        pairs = [_pair(tensors, site, layer, head_rows) for layer in site.layers]
        a, b = (jnp.stack([pair[i] for pair in pairs]) for i in (0, 1))
        adapters[name] = {"a": a, "b": b * (scaling / site.scale)}
    return adapters


def save_peft(adapters: Adapters, folder: str | Path, *, sites: Sites, base: Adaptable) -> None:
    """Write adapters in the format of `peft`, which can then load them onto the same base model.

    Args:
        adapters: One pair of factors for each family, without a draw axis.
        folder: Folder to write to; it is created if necessary.
        sites: The sites of the adapters.
        base: The base model. Its head shows whether the sites have all rows.

    Raises:
        ValueError: If `adapters` is a posterior, adapters do not fit the sites, families differ in rank or
            alpha (the format has one of each), or the head's `b` has only the rows of label tokens.

    Example:
        >>> adapters = {"lm_head": {"a": jnp.ones((1, 1, 16)), "b": jnp.zeros((1, 40, 1))}}
        >>> bl.save_peft(adapters, folder / "peft", sites=sites, base=base)
        >>> bl.load_peft(folder / "peft", sites)["lm_head"]["b"].shape
        (1, 40, 1)
    """
    _require_adapters(adapters)
    sites.check(adapters)
    kinds = {(site.rank, site.alpha) for site in sites.values()}
    if len(kinds) != 1:
        raise ValueError(f"peft's format has one rank and one alpha; the sites have {sorted(kinds)}")
    tensors: dict[str, np.ndarray] = {}
    for name, site in sites.items():
        rows = base.modules[site.module][1]
        if site.d_out != rows:
            raise ValueError(
                f"{name!r} holds {site.d_out} of the {rows} rows of {site.module!r}, those of label tokens; "
                "an adapter for peft needs them all"
            )
        for index, layer in enumerate(site.layers):
            for factor, letter in (("a", "A"), ("b", "B")):
                full = f"{ROOT}{_path(site.module, layer)}.lora_{letter}.weight"
                # Copy: safetensors writes the memory behind a view, not the view.
                tensors[full] = np.array(adapters[name][factor][index], np.float32, order="C")
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / TENSORS, metadata={"format": "pt"})
    rank, alpha = kinds.pop()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(base, "name", None),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(_path(s.module, layer) for s in sites.values() for layer in s.layers),
    }
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _require_adapters(adapters: Any) -> None:
    """Raise `ValueError` for a posterior: only a draw of it, under a network, is a set of adapters."""
    if not hasattr(adapters, "draw_adapters"):
        return
    name = type(adapters).__name__
    if adapters.model.kind == "tangent":
        raise ValueError(
            f"a tangent posterior is not a set of adapters, so this {name} cannot be exported: its draws "
            "belong to the linear model, and the network is far too uncertain under them; fit the network "
            "itself"
        )
    raise ValueError(f"peft's format has one adapter; got a {name}: give one draw of its draw_adapters")


def _path(module: str, layer: int) -> str:
    """Name of a module in the model of transformers."""
    if module == HEAD:
        return HEAD
    return f"model.layers.{layer}.{PARENTS.get(module[0], 'mlp')}.{module}"


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not an adapter folder: it has no {CONFIG}")
    try:
        config = read_json(folder / CONFIG)
        kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{CONFIG} in {str(folder)!r} is corrupt: {error}") from error
    if kind != "LORA":
        raise ValueError(f"only LoRA adapters can be read; this one is {brief(kind)}")
    if not is_integer(rank) or rank < 1 or not is_positive(alpha):
        raise ValueError(
            f"{CONFIG} in {str(folder)!r} is corrupt: r={brief(rank)}, lora_alpha={brief(alpha)}; expected "
            "an integer of at least 1 and a positive number"
        )
    if not isinstance(config.get("use_rslora", False), bool | None):
        raise ValueError(f"use_rslora in {CONFIG} must be true or false; got {brief(config['use_rslora'])}")
    for name in _REFUSED:
        if config.get(name):
            raise ValueError(f"adapters with {name}={brief(config[name])} are not supported, only plain LoRA")
    if config.get("bias", "none") != "none":
        raise ValueError(f"adapters with bias={brief(config['bias'])} are not supported, only plain LoRA")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise ValueError(
            f"adapters with init_lora_weights={brief(start)} change the base weights; have peft convert it "
            "to plain LoRA (`path_initial_model_for_weight_conversion`)"
        )
    return config


def _tensors(folder: Path) -> tuple[Tensors, dict[str, int]]:
    """Factors by module, layer (None for the head) and letter; numbers of rows of copied base weights."""
    if not (folder / TENSORS).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {TENSORS}; pickled adapters (.bin) are not read, have peft save it anew"
        )
    try:
        tensors = TensorFiles(safetensors_headers(folder / TENSORS))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{TENSORS} in {str(folder)!r} is corrupt: {error}") from error
    found: dict[tuple[str, int | None, str], Array] = {}
    copies = {}
    for name, header in tensors.stored.items():
        if _COPIES.fullmatch(name):
            copies[name] = header.shape[0] if header.shape else 0
            continue
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{brief(name)} in {TENSORS} is no factor of plain LoRA in a layer or the head")
        if header.kind not in FLOATS:
            raise ValueError(f"{name!r} in {TENSORS} must have floats of 16 to 64 bits; got {header.kind}")
        layer, module, letter = match.groups()
        place = module, None if layer is None else int(layer), letter
        if place in found:
            raise ValueError(f"{TENSORS} has lora_{letter} of {_label(*place[:2])!r} under two names")
        found[place] = jnp.asarray(take(tensors, name))
    return found, copies


def _require_frozen(
    copies: Mapping[str, int], tensors: Tensors, sites: Sites, head_rows: Sequence[int] | None
) -> None:
    """Raise `ValueError` for weights that can differ from the base's, as after a resize of its vocabulary."""
    full = {s.d_out for s in sites.values() if s.module == HEAD and head_rows is None}
    for name, rows in copies.items():
        if (HEAD, None, "A") not in tensors:
            raise ValueError(
                f"{TENSORS} replaces {name!r} of the base without an adapter of {HEAD!r}, as after its "
                "vocabulary was resized; only adapters of the base as it is are supported"
            )
        if full and rows not in full:
            raise ValueError(f"{name!r} in {TENSORS} must have the {full.pop()} rows of the base; got {rows}")


def _require_all_used(tensors: Tensors, sites: Sites) -> None:
    """Raise `ValueError` if the adapter has more modules than the sites: without them it is another model."""
    wanted = {_place(site, layer) for site in sites.values() for layer in site.layers}
    extra = sorted({_label(module, layer) for module, layer, _ in tensors if (module, layer) not in wanted})
    if extra:
        raise ValueError(f"the adapter also has {listed(extra)}, which the sites do not; select them too")


def _place(site: Site, layer: int) -> tuple[str, int | None]:
    return site.module, None if site.module == HEAD else layer


def _label(module: str, layer: int | None) -> str:
    return module if layer is None else f"layers.{layer}.{module}"


def _pair(tensors: Tensors, site: Site, layer: int, head_rows: Sequence[int] | None) -> tuple[Array, Array]:
    place = _place(site, layer)
    for letter in "AB":
        if (*place, letter) not in tensors:
            names = sorted({_label(m, i) for m, i, _ in tensors})
            near = ", ".join(difflib.get_close_matches(_label(*place), names, n=3, cutoff=0.0)) or "none"
            raise ValueError(f"the adapter has no lora_{letter} for {_label(*place)!r}; nearest: {near}")
    a, b = tensors[*place, "A"], tensors[*place, "B"]
    if site.module == HEAD and head_rows is not None and b.ndim == 2:
        rows = np.asarray(head_rows)
        whole = not rows.size or np.issubdtype(rows.dtype, np.integer)
        if not whole or np.any((rows < 0) | (rows >= len(b))):
            raise ValueError(f"head_rows must be token ids below {len(b)}; got {brief(rows.tolist())}")
        b = b[rows.astype(int)]
    expected = (site.rank, site.d_in), (site.d_out, site.rank)
    if (a.shape, b.shape) != expected:
        hint = "; give the label tokens as head_rows" if site.module == HEAD and head_rows is None else ""
        raise ValueError(
            f"the factors of {_label(*place)!r} need shapes {expected}; got {(a.shape, b.shape)}{hint}"
        )
    return a, b
