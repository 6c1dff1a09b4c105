"""Files of an adapter in the format of the `peft` library: names of modules, tensors, configuration.

The update of a module is alpha / r b a. Families of the same module are one adapter to peft: their factors
stand side by side, [b_1, b_2] [a_1; a_2], with the scales in b and alpha = r.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from bnlora._util.typing import Adapters
from bnlora.adapters.peft_config import CONFIG
from bnlora.adapters.peft_names import module_path
from bnlora.adapters.sites import Sites
from bnlora.models.encoder_names import CLASSIFIER

TENSORS = "adapter_model.safetensors"
ROOT = "base_model.model."


class Pair(NamedTuple):
    """The adapter of one module.

    Attributes:
        a: Factor A, (r, d_in).
        b: Factor B, (d_out, r).
        alpha: The update is alpha / r b a.
    """

    a: Float[np.ndarray, "r d_in"]
    b: Float[np.ndarray, "d_out r"]
    alpha: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return len(self.a)


def merged(adapters: Adapters, sites: Sites, prefix: str | None = None) -> dict[str, Pair]:
    """The adapter of every module by its path, families of the same module side by side.

    Args:
        adapters: One pair of factors for each family.
        sites: The sites.
        prefix: As in `module_path`.
    """
    pairs: dict[str, Pair] = {}
    for name, site in sites.items():
        for index, layer in enumerate(site.layers):
            a, b = (np.asarray(adapters[name][factor][index], np.float32) for factor in ("a", "b"))
            path, new = module_path(site.module, layer, prefix), Pair(a, b, site.alpha)
            pairs[path] = _beside(pairs[path], new) if path in pairs else new
    return pairs


def _beside(first: Pair, second: Pair) -> Pair:
    a = np.concatenate([first.a, second.a])
    b = np.concatenate([pair.b * (pair.alpha / pair.rank) for pair in (first, second)], axis=1)
    return Pair(a, b, float(len(a)))


def write_peft(
    folder: str | Path,
    pairs: Mapping[str, Pair],
    *,
    name: str | None,
    head: Mapping[str, Float[np.ndarray, "..."]] | None = None,
) -> None:
    """Write an adapter.

    Args:
        folder: Folder to write to; it is created if necessary.
        pairs: The adapter of every module, by its path; at least one.
        name: Name of the base model.
        head: Tensors of an encoder's classification head by their names, stored whole.
    """
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    # Copy: safetensors writes the memory behind a view, not the view.
    tensors = {
        f"{ROOT}{module}.lora_{letter}.weight": np.array(factor, np.float32, order="C")
        for module, pair in pairs.items()
        for letter, factor in (("A", pair.a), ("B", pair.b))
    }
    tensors |= {f"{ROOT}{path}": np.array(x, np.float32, order="C") for path, x in (head or {}).items()}
    save_file(tensors, path / TENSORS, metadata={"format": "pt"})
    ((rank, alpha), _), *_ = Counter((pair.rank, pair.alpha) for pair in pairs.values()).most_common(1)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "base_model_name_or_path": name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(pairs),
        **({"modules_to_save": [CLASSIFIER]} if head else {}),
    }
    ranks = {module: pair.rank for module, pair in pairs.items() if pair.rank != rank}
    alphas = {module: pair.alpha for module, pair in pairs.items() if pair.alpha != alpha}
    # peft reads a pattern as a regular expression.
    config |= {
        key: {module.replace(".", r"\."): x for module, x in values.items()}
        for key, values in (("rank_pattern", ranks), ("alpha_pattern", alphas))
        if values
    }
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
