"""Somebody's existing LoRA as a posterior of one point: predict with it, measure it, compare it."""

from pathlib import Path
from typing import Any

from jaxtyping import Int

from bnlora.adapters.peft import load_peft, peft_sites
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
        The posterior, with a classifier whose sites are those of the adapter.

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
    sites = peft_sites(folder, base)
    model = Classifier(base, sites, point(), label_ids=label_ids, likelihood=likelihood)
    rows = model.label_ids or None
    return PointPosterior(model, load_peft(folder, model.sites, head_rows=rows))
