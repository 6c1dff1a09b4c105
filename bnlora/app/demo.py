"""The demonstration: base, plain LoRA and Bayesian-LoRA on SmolLM2-135M and sentences of four domains."""

from typing import TYPE_CHECKING

import jax
from rich.console import Console

from bnlora.app.recipe import Recipe
from bnlora.data.assets import LABELS, vader_splits

if TYPE_CHECKING:
    from bnlora._util.display import Table
    from bnlora.app.experiment import Comparison

RECIPE = Recipe(words=tuple(f" {label}" for label in LABELS))
"""Words and template of the demonstration. `bnlora.app.experiment` defines its adapters."""

SIZES = {"train": 320, "validation": 160, "test": 120, "epochs": 10, "num_draws": 64}
"""Default sizes of the demonstration: arguments of `run_demo`."""


def run_demo(
    *,
    train: int,
    validation: int,
    test: int,
    epochs: int,
    num_draws: int,
    seed: int,
    console: Console | None = None,
) -> "Comparison":
    """Fit all methods on labelled movie sentences and predict test sentences of all four domains.

    Args:
        train: Number of movie sentences that plain LoRA fits.
        validation: Number of further labelled movie sentences. Plain LoRA uses them to choose step and
            temperature; Bayesian-LoRA fits them too.
        test: Number of test sentences per domain.
        epochs: Epochs of plain LoRA.
        num_draws: Posterior draws per prediction.
        seed: Seed of the fits and of the choice of sentences.
        console: Where to report progress.
    """
    from bnlora.app.experiment import compare  # a slow import, which `bnlora --help` does not need

    base = RECIPE.load_base()
    splits = vader_splits(seed=seed, train=train + validation, validation=1, test=test)
    del splits["validation"]
    data = RECIPE.read(splits, base, text="text", label="label")
    tests = {name: rows for name, rows in data.splits.items() if name != "train"}
    return compare(
        jax.random.key(seed),
        base,
        data.train,
        tests,
        label_ids=tuple(data.label_ids.tolist()),
        held_out=validation,
        epochs=epochs,
        num_draws=num_draws,
        console=console,
    )


def demo_tables(comparison: "Comparison") -> tuple["str | Table", ...]:
    """Output of the command: comparison of NLL, scores, differences, scales, posterior and cost."""
    from bnlora.app import results

    return (
        results.headline(comparison),
        results.scores(comparison),
        results.differences(comparison),
        *comparison.core.scales.overview,
        results.posterior_summary(comparison),
        results.costs(comparison),
    )


def demo_page(comparison: "Comparison", command: str) -> str:
    """The HTML report: comparison of NLL, tables, reliability diagrams, the posterior and the cost."""
    from bnlora import plots
    from bnlora.app import results
    from bnlora.app.experiment import BAYES, CAREFUL, LORA
    from bnlora.app.report import page

    core, rows = comparison.core, len(comparison.core.fit.train)
    shown = {m: comparison.predictions[m] for m in (LORA, CAREFUL, BAYES)}
    return page(
        "Plain LoRA and Bayesian-LoRA on SmolLM2-135M",
        [
            results.headline(comparison),
            f"Command: {command}",
            f"All methods use the same {rows} labelled movie sentences. Plain LoRA fits the first "
            f"{len(comparison.lora.train)} with a published recipe. Careful LoRA uses the others to choose "
            "its step and a temperature. Bayesian-LoRA fits all of them.",
            "# Accuracy and calibration",
            results.scores(comparison),
            results.differences(comparison),
            (plots.reliability(shown, comparison.labels), plots.RELIABILITY_CAPTION),
            results.uncertainty(comparison),
            "# The posterior",
            results.posterior_summary(comparison),
            *core.scales.overview,
            *core.frames.overview,
            (plots.frame_energies(core.frames), plots.FRAME_CAPTION),
            (plots.elbo({BAYES: core.fit}), plots.ELBO_CAPTION),
            str(comparison.chains.certificate),
            results.agreements(comparison),
            "# Cost",
            results.costs(comparison),
        ],
    )
