r"""LoRA adapters in the format of the `peft` library: read into stacked adapters, and written.

peft's update of a module is s b a with s = alpha / r, or alpha / sqrt(r) if rank-stabilised; patterns of
names may give modules another rank r or alpha. The update of a site is `site.scale` b a. `b` is multiplied by
the ratio of the two, so the update is the same for every alpha of the sites. An option that would change the
update and is not supported raises an error with its name.

peft trains the classification head of an encoder as a whole, and stores it beside the factors. It then is
the head of the base (`bnlora.load_peft_posterior`). Adapters of an encoder's head are added to it when they
are saved.

Reference: Hu et al. (2021), LoRA; Kalajdzievski (2023), A rank stabilization scaling factor for fine-tuning
with LoRA, arXiv 2312.03732.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError

from bnlora._util.checks import brief, listed
from bnlora._util.typing import Adapters
from bnlora.adapters.peft_config import rank_and_scale, read_config
from bnlora.adapters.peft_files import ROOT, TENSORS, merged, write_peft
from bnlora.adapters.peft_names import Place, place_of
from bnlora.adapters.sites import HEAD, Adaptable, Site, Sites, select
from bnlora.models.encoder_names import CLASSIFIER
from bnlora.models.tensors import FLOATS, TensorFiles, safetensors_headers, take

if TYPE_CHECKING:
    from bnlora.models.encoder import Encoder

FUSED = ("gpt2", "phi3")
"""Families in which transformers has one module for queries, keys and values."""

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# With an adapter of the head, peft also saves the frozen weights below it, which the base has too. Without
# one, it saves them only if the vocabulary was resized; the weights of the base then differ.
_COPIES = re.compile(r"base_model\.model\.(model\.embed_tokens|lm_head)(\.base_layer)?\.weight")
Tensors = Mapping[tuple[str, int | None, str], Array]


class Stored(NamedTuple):
    """What the files of an adapter have.

    Attributes:
        folder: Their folder.
        config: Its configuration.
        factors: Factors by module, layer (None for the head) and letter.
        paths: Name in transformers of each module.
        copies: Numbers of rows of the copied weights of the base.
        head: Tensors of a classification head, by their names in transformers.
    """

    folder: Path
    config: Mapping[str, Any]
    factors: Tensors
    paths: Mapping[Place, str]
    copies: Mapping[str, int]
    head: Mapping[str, np.ndarray]


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
    stored = read_adapter(folder)
    if stored.head:
        raise ValueError(
            "the adapter has a classification head of its own, which factors alone do not contain: use "
            "bl.load_peft_posterior, whose base has that head"
        )
    return factors(stored, sites, head_rows=head_rows)


def factors(stored: Stored, sites: Sites, *, head_rows: Sequence[int] | None = None) -> Adapters:
    """The adapters of `load_peft`; a classification head is left out."""
    _require_all_used(stored.factors, sites)
    _require_frozen(stored, sites, head_rows)
    adapters = {}
    for name, site in sites.items():
        paths = [stored.paths.get(_place(site, layer), site.module) for layer in site.layers]
        own = [rank_and_scale(stored.config, path) for path in paths]
        for rank, _ in own:
            if site.rank != rank:
                raise ValueError(f"the adapter has rank {rank}; the sites of {name!r} have rank {site.rank}")
        pairs = [_pair(stored.factors, site, layer, head_rows) for layer in site.layers]
        ratios = jnp.array([scale / site.scale for _, scale in own])[:, None, None]
        adapters[name] = {
            "a": jnp.stack([a for a, _ in pairs]),
            "b": jnp.stack([b for _, b in pairs]) * ratios,
        }
    return adapters


def peft_sites(folder: str | Path, base: Adaptable) -> Sites:
    """The sites of an adapter that `peft` saved, so that nobody has to list its modules, layers and ranks.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: The base model of the adapter.

    Returns:
        One family for each module and rank. The alpha of each is its rank: `load_peft` scales the factors.

    Raises:
        FileNotFoundError: If the folder has no adapter.
        ValueError: If a file is corrupt, the kind of adapter is not supported, or the base has no such module
            or layer.

    Example:
        >>> adapters = {"lm_head": {"a": jnp.ones((1, 1, 16)), "b": jnp.zeros((1, 40, 1))}}
        >>> bl.save_peft(adapters, folder / "peft", sites=sites, base=base)
        >>> bl.peft_sites(folder / "peft", base)
        Sites(56 adapter weights)
          lm_head: 16 -> 1 -> 40, alpha 1, head
    """
    return sites_of(read_adapter(folder), base)


def sites_of(stored: Stored, base: Adaptable) -> Sites:
    """The sites of `peft_sites`."""
    paths, targets = stored.paths, {}
    for module, layer in sorted(paths, key=str):
        if module not in base.modules or (layer is not None and layer >= base.num_layers):
            near = difflib.get_close_matches(module, base.modules, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"the adapter is one of another model: it has {_label(module, layer)!r}, and the base has "
                f"{base.num_layers} layers with the modules {list(base.modules)}, nearest: {near!r}"
            )
        pattern = module if layer is None else rf"layers\.{layer}\.{module}"
        targets[pattern] = rank_and_scale(stored.config, paths[module, layer])[0]
    if not targets:
        raise ValueError(f"the adapter in {str(stored.folder)!r} has no factors")
    return select(base, targets)


def save_peft(adapters: Adapters, folder: str | Path, *, sites: Sites, base: Adaptable) -> None:
    """Write adapters in the format of `peft`, which can then load them onto the same base model.

    Args:
        adapters: One pair of factors for each family, without a draw axis.
        folder: Folder to write to; it is created if necessary.
        sites: The sites of the adapters.
        base: The base model. Its head shows whether the sites have all rows.

    Raises:
        ValueError: If `adapters` is a posterior, adapters do not fit the sites, the head's `b` has only the
            rows of label tokens, the base stores several modules fused, or it is an encoder whose head does
            not read the pooling layer.

    Example:
        >>> adapters = {"lm_head": {"a": jnp.ones((1, 1, 16)), "b": jnp.zeros((1, 40, 1))}}
        >>> bl.save_peft(adapters, folder / "peft", sites=sites, base=base)
        >>> bl.load_peft(folder / "peft", sites)["lm_head"]["b"].shape
        (1, 40, 1)
    """
    _require_adapters(adapters)
    require_named(base)
    sites.check(adapters)
    for name, site in sites.items():
        rows = base.modules[site.module][1]
        if site.d_out != rows:
            raise ValueError(
                f"{name!r} holds {site.d_out} of the {rows} rows of {site.module!r}, those of label tokens; "
                "an adapter for peft needs them all: bl.export_peft writes zeros for the others"
            )
    write(folder, adapters, sites, base)


def write(folder: str | Path, adapters: Adapters, sites: Sites, base: Any) -> None:
    """Write adapters with all rows of the head; that of an encoder is written whole, with its update."""
    name = getattr(base, "name", None)
    if not getattr(base, "is_encoder", False):
        write_peft(folder, merged(adapters, sites), name=name)
        return
    from bnlora.models.encoder_head import head_tensors  # late: models take long to import
    from bnlora.models.families import ENCODERS

    inner = replace(sites, families=tuple(s for s in sites.families if s.module != HEAD))
    if not inner:
        raise ValueError(
            f"an adapter for peft needs a module of a layer, such as 'q_proj'; the sites are {list(sites)}"
        )
    family = ENCODERS[base.family]
    head = head_tensors(_with_update(base.module, adapters, sites), family)
    write_peft(folder, merged(adapters, inner, family.PREFIX), name=name, head=head)


def _with_update(encoder: "Encoder", adapters: Adapters, sites: Sites) -> "Encoder":
    """The encoder with the adapters of its head added to the head."""
    for name, site in sites.items():
        if site.module == HEAD:
            a, b = adapters[name]["a"][0], adapters[name]["b"][0]
            encoder.lm_head[...] += site.scale * b @ a
    return encoder


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
    raise ValueError(
        f"peft's format has one adapter; got a {name}: give one draw of its draw_adapters, or use "
        "bl.export_peft"
    )


def require_named(base: Any) -> None:
    """Raise `ValueError` if transformers has other modules: those that it stores fused are one to peft."""
    family = getattr(base, "family", "")
    if family in FUSED:
        raise ValueError(
            f"adapters of {family!r} models cannot be written for peft: transformers has one module for "
            "several of this library's, and an adapter of it would have another rank"
        )


def read_adapter(where: str | Path) -> Stored:
    """Read the files of an adapter."""
    folder = Path(where).expanduser()
    config = read_config(folder)
    if not (folder / TENSORS).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {TENSORS}; pickled adapters (.bin) are not read, have peft save it anew"
        )
    try:
        tensors = TensorFiles(safetensors_headers(folder / TENSORS))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{TENSORS} in {str(folder)!r} is corrupt: {error}") from error
    found: dict[tuple[str, int | None, str], Array] = {}
    paths: dict[Place, str] = {}
    copies: dict[str, int] = {}
    head: dict[str, np.ndarray] = {}
    for name, header in tensors.stored.items():
        if _COPIES.fullmatch(name):
            copies[name] = header.shape[0] if header.shape else 0
            continue
        factor = _FACTOR.fullmatch(name)
        place = place_of(factor[1]) if factor else None
        in_head = factor is None and name.startswith(f"{ROOT}{CLASSIFIER}.")
        if place is None and not in_head:
            raise ValueError(f"{brief(name)} in {TENSORS} is no factor of plain LoRA in a layer or the head")
        if header.kind not in FLOATS:
            raise ValueError(f"{name!r} in {TENSORS} must have floats of 16 to 64 bits; got {header.kind}")
        if in_head:
            head[name.removeprefix(ROOT)] = take(tensors, name)
            continue
        path, letter = cast(re.Match, factor).groups()
        place = cast(Place, place)
        if (*place, letter) in found:
            raise ValueError(f"{TENSORS} has lora_{letter} of {_label(*place)!r} under two names")
        found[*place, letter], paths[place] = jnp.asarray(take(tensors, name)), path
    return Stored(folder, config, found, paths, copies, head)


def _require_frozen(stored: Stored, sites: Sites, head_rows: Sequence[int] | None) -> None:
    """Raise `ValueError` for weights that can differ from the base's, as after a resize of its vocabulary."""
    full = {s.d_out for s in sites.values() if s.module == HEAD and head_rows is None}
    for name, rows in stored.copies.items():
        if (HEAD, None, "A") not in stored.factors:
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


def _place(site: Site, layer: int) -> Place:
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
