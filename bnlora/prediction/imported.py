"""Somebody's existing LoRA as a posterior of one point: predict with it, measure it, compare it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Int

from bnlora.adapters.peft import factors, read_adapter, sites_of
from bnlora.prediction.posterior import PointPosterior
from bnlora.priors import point
from bnlora.program.likelihoods import Likelihood
from bnlora.program.model import Classifier
from bnlora.program.protocol import LanguageModel


def load_peft_posterior(
    folder: str | Path,
    base: LanguageModel,
    *,
    label_ids: Int[Any, " c"] | None = None,
    likelihood: Likelihood | None = None,
) -> PointPosterior:
    """Read an adapter that `peft` saved, as a posterior of one point.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: The base model of the adapter.
        label_ids: Token id of each class's word, as in `bnlora.Classifier`.
        likelihood: Other classes than words, in place of `label_ids`.

    Returns:
        The posterior, with a classifier whose sites are those of the adapter. If a classification head was
        trained with the adapter, as peft does for encoders, the base of that classifier has it.

    Raises:
        FileNotFoundError: If the folder has no adapter.
        ValueError: If a file is corrupt, the kind of adapter is not supported, or it belongs to another base.

    Example:
        >>> adapters = {"lm_head": {"a": jnp.ones((1, 1, 16)), "b": jnp.zeros((1, 40, 1))}}
        >>> bl.save_peft(adapters, folder / "peft", sites=sites, base=base)
        >>> imported = bl.load_peft_posterior(folder / "peft", base, label_ids=(3, 5))
        >>> bl.predict(key, imported, rows, num_draws=1).probs.shape
        (8, 2)
    """
    stored = read_adapter(folder)
    base = _with_head(base, stored.head)
    model = Classifier(base, sites_of(stored, base), point(), label_ids=label_ids, likelihood=likelihood)
    rows = model.label_ids or None
    return PointPosterior(model, factors(stored, model.sites, head_rows=rows))


def _with_head(base: Any, head: Mapping[str, Any]) -> Any:
    """The base with the classification head that was trained with the adapter, if there is one."""
    if not head:
        return base
    from bnlora.base import Base  # late: models take long to import
    from bnlora.models.encoder_head import with_head
    from bnlora.models.families import ENCODERS

    if not getattr(base, "is_encoder", False):
        raise ValueError(
            f"the adapter has a classification head ({', '.join(sorted(head))}), and the base is no encoder "
            "that could have it"
        )
    encoder = with_head(base.module, ENCODERS[base.family], head)
    return Base.from_module(encoder, name=base.name, family=base.family, tokenizer=base.tokenizer)
