"""The methods of the grid by name."""

from collections.abc import Callable, Mapping

from benchmarks.cells import lora, ours, published
from benchmarks.cells.setting import Fitted, Setting
from bnlora import guides

METHODS: Mapping[str, Callable[[Setting], Fitted]] = {
    "untouched base": lora.base,
    "LoRA, 3 epochs": lora.epochs(3),
    "LoRA, 20 epochs": lora.epochs(20),
    "LoRA, careful": lora.careful,
    "LoRA, label smoothing": lora.smoothed,
    "MAP": lora.mode,
    "Laplace-LoRA": lora.laplace_lora,
    "MC dropout": lora.randomised(guides.dropout()),
    "BLoB": lora.randomised(guides.blob()),
    "ScalaBL": lora.scalabl,
    "Bayesian-LoRA, published": published.bayesian_lora,
    "deep ensemble": lora.ensemble,
    "SWAG": lora.swag,
    "TFB": lora.training_free,
    "core MAP": ours.mode,
    "core Laplace": ours.laplace,
    "core Gaussian": ours.gaussian,
    "core SiteFlow": ours.site_flow,
    "core NUTS": ours.nuts,
    "core network": ours.network,
}
"""A function from a setting to a fitted method."""
