r"""What each aspect of a comparison concludes, by rules. A difference is a caution.

| aspect       | differs when                                                                       |
|--------------|------------------------------------------------------------------------------------|
| means        | a mean's z-score is rejected after Holm's correction over the functions            |
| spread       | the same for the log-ratio of the standard deviations                              |
| joint law    | twice the smaller p-value of MMD and classifier is at most the level               |
| predictions  | the permutation p-value of the mean total variation is at most the level           |
| epistemic    | the permutation p-value of the mutual information is at most the level             |

The level of a comparison is shared among its aspects by Bonferroni's rule, so that all of them together raise
a false alarm with at most that probability. "No difference detected" does not mean that there is none: beside
it stands the size that was found, and for means how large a shift would have been missed half of the time.
k-hat is about the coordinates of the sites, not about these functions, and decides nothing.
"""

import numpy as np

from bnlora._util.finding import Finding, Status
from bnlora.assess.comparison.classifier import ClassifierTest
from bnlora.assess.comparison.kernel import KernelTest
from bnlora.assess.comparison.moments import Moments
from bnlora.assess.comparison.predictive import PredictiveAgreement
from bnlora.metrics.khat import KHat


def means(names: tuple[str, ...], found: Moments, level: float, other: str) -> Finding:
    """Whether the means agree, by how much they may differ, and where they differ most."""
    rejected = found.shift_adjusted <= level
    sizes = np.abs(found.shift)
    if rejected.any():
        k = int(np.where(rejected, sizes, -1.0).argmax())
        text = (
            f"means differ in {rejected.sum()} of {len(names)} functions, most in {names[k]} by "
            f"{found.shift[k]:+.2f} sd of the {other} (adjusted p {p_text(found.shift_adjusted[k])})"
        )
    else:
        k = int(sizes.argmax())
        missed = found.detectable_shift(level).max()
        text = (
            f"means: {undetected(level)} (largest difference {found.shift[k]:+.2f} sd of the {other}, in "
            f"{names[k]}; up to {missed:.2f} sd would be missed half of the time)"
        )
    return Finding("means", _status(rejected.any()), text, float(found.shift_adjusted.min()), level)


def spread(names: tuple[str, ...], found: Moments, level: float, other: str) -> Finding:
    """Whether the standard deviations agree, by median ratio and the function furthest off."""
    rejected = found.ratio_adjusted <= level
    k = furthest(found.ratio, rejected if rejected.any() else np.ones_like(rejected))
    middle = np.median(found.ratio)
    if rejected.any():
        text = (
            f"spread is {middle:.2f} of the {other} by median and {found.ratio[k]:.2f} at worst, in "
            f"{names[k]} ({rejected.sum()} of {len(names)} functions differ)"
        )
    else:
        text = (
            f"spread: {undetected(level)} ({middle:.2f} of the {other} by median, {found.ratio[k]:.2f} at "
            f"worst, in {names[k]})"
        )
    return Finding("spread", _status(rejected.any()), text, float(found.ratio_adjusted.min()), level)


def joint_law(kernel: KernelTest, classifier: ClassifierTest, level: float) -> Finding:
    """Whether the functions taken together have one law, by both two-sample tests."""
    p_value = 2 * min(kernel.p_value, classifier.p_value)  # Bonferroni's rule for the two tests
    differs = p_value <= level
    said = " differs" if differs else f": {undetected(level)}"
    text = (
        f"the joint law of the functions{said} (MMD p {p_text(kernel.p_value)}; "
        f"classifier right in {classifier.accuracy:.0%}, p {p_text(classifier.p_value)})"
    )
    return Finding("joint law", _status(differs), text, float(p_value), level)


def predictions(found: PredictiveAgreement, level: float, other: str) -> Finding:
    """Whether the predictive distributions agree."""
    differs = found.total_variation_p <= level
    row = int(found.total_variation.argmax())
    numbers = (
        f"mean total variation {found.total_variation.mean():.3f}, "
        f"{found.total_variation_null.mean():.3f} between halves of the {other}, "
        f"p {p_text(found.total_variation_p)}"
    )
    if differs:
        text = f"predictions differ ({numbers}; most in row {row}, {found.total_variation[row]:.3f})"
    else:
        text = f"predictions: {undetected(level)} ({numbers})"
    return Finding("predictions", _status(differs), text, float(found.total_variation_p), level)


def epistemic(found: PredictiveAgreement, level: float, other: str) -> Finding:
    """Whether the epistemic uncertainty of the rows agrees."""
    differs = found.mutual_information_p <= level
    said = " differs" if differs else f": {undetected(level)}"
    text = (
        f"epistemic uncertainty{said} (mean difference {found.mutual_information_gap.mean():.2g} nats a "
        f"row, {found.mutual_information_gap_null.mean():.2g} between halves of the {other}, "
        f"p {p_text(found.mutual_information_p)})"
    )
    return Finding("epistemic", _status(differs), text, float(found.mutual_information_p), level)


def _status(differs: object) -> Status:
    """A difference is known before numbers are reported; without one nothing has to be done."""
    return "caution" if differs else "fine"


def undetected(level: float) -> str:
    """What an aspect says whose test did not reject at its share of the level."""
    return f"no difference detected at level {level:.2g}, this aspect's share"


def weights(found: KHat | None) -> str:
    """What k-hat says."""
    if found is None:
        return "k-hat: none, no density"
    if found.passed:
        return (
            f"k-hat {found.value:.2f} is at most {found.threshold:.2f}: draws can be reweighted to the "
            "posterior of their own model"
        )
    return (
        f"k-hat {found.value:.2f} exceeds {found.threshold:.2f}: in the coordinates of the sites the "
        "approximation is too far from the posterior to be reweighted"
    )


def furthest(ratio: np.ndarray, among: np.ndarray) -> int:
    """Index of the ratio furthest from one on the log scale; zero is the furthest."""
    distance = np.abs(np.log(np.maximum(ratio, np.finfo(np.float64).tiny)))
    return int(np.where(among, distance, -1.0).argmax())


def p_text(value: float) -> str:
    """A p-value in few digits."""
    return "<1e-4" if value < 1e-4 else f"{value:.2g}"
