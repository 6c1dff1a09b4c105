"""The demonstration: plain LoRA and Bayesian-LoRA on SmolLM2-135M and sentences of four domains."""

from rich.console import Console

from bnlora.assets import LABELS, vader_splits
from bnlora.experiment import BAYES, LORA, Comparison, compare
from bnlora.recipe import Recipe, Schedule

RECIPE = Recipe(words=tuple(f" {label}" for label in LABELS))
"""Adapters and prior of the demonstration, chosen on validation sentences (`benchmarks/README.md`)."""


LEARNING_RATES = {LORA: 1e-3, BAYES: 3e-2}
"""Adam's rates, chosen there too."""

SIZES = {"train": 320, "validation": 240, "test": 320, "num_steps": 400, "num_samples": 16}
"""Sizes of the demonstration, as `run_demo` takes them."""


def run_demo(
    *,
    train: int,
    validation: int,
    test: int,
    num_steps: int,
    num_samples: int,
    seed: int,
    console: Console | None = None,
) -> Comparison:
    """Fit both methods on movie sentences and predict test sentences of all four domains.

    Args:
        train: Movie sentences to fit.
        validation: Movie sentences for the early stopping of plain LoRA.
        test: Test sentences of each domain.
        num_steps: Steps of each fit.
        num_samples: Posterior draws of a prediction.
        seed: Seed of the fits and of the choice of sentences.
        console: Where to report progress.
    """
    base = RECIPE.load_base()
    splits = vader_splits(seed=seed, train=train, validation=validation, test=test)
    data = RECIPE.read(splits, base, text="text", label="label")
    schedules = {
        method: Schedule(num_steps=num_steps, learning_rate=rate, seed=seed)
        for method, rate in LEARNING_RATES.items()
    }
    return compare(base, data, RECIPE, schedules, num_samples=num_samples, console=console)


def demo_page(comparison: Comparison, command: str) -> str:
    """The report: tables, reliability diagrams, the bound over the steps, and what they mean."""
    from bnlora import plots  # here, so that `bnlora --help` does not wait for matplotlib
    from bnlora.report import page

    made, plain = comparison.fits[BAYES], comparison.fits[LORA]
    gap = made.history["conditional_kl"][-1]
    return page(
        "Plain LoRA and Bayesian-LoRA on SmolLM2-135M",
        [
            f"Made by: {command}",
            f"Both methods fitted {len(made.train)} movie sentences with {made.model.sites.num_parameters:,} "
            f"adapter weights, the same sentences in the same order for {len(made.step_seconds)} steps.",
            "# Accuracy and calibration",
            comparison.scores,
            comparison.differences,
            (
                plots.reliability({m: comparison.predictions[m] for m in (LORA, BAYES)}, comparison.labels),
                plots.RELIABILITY_CAPTION,
            ),
            "# The objective",
            f"For plain LoRA it is the log-likelihood, for Bayesian-LoRA a lower bound on the log-evidence. "
            f"lam is capped at {RECIPE.lam_max:g}, which restricts the variational family: the bound stays a "
            f"bound, but {gap:,.0f} nats of conditional KL make it loose, and it says nothing about which "
            "model is better.",
            (
                plots.elbo({LORA: plain, BAYES: made}),
                plots.ELBO_CAPTION,
            ),
            "# Cost",
            comparison.costs,
        ],
    )
