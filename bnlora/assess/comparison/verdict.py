r"""Rules for the findings of a comparison, one for each aspect. A difference is a caution.

| aspect       | differs when                                                                       |
|--------------|------------------------------------------------------------------------------------|
| means        | a mean's z-score is rejected after Holm's correction over the functions            |
| spread       | the same for the log-ratio of the standard deviations                              |
| joint law    | twice the smaller p-value of MMD and classifier is at most the level               |
| predictions  | the permutation p-value of the mean total variation is at most the level           |
| epistemic    | the permutation p-value of the mutual information is at most the level             |

The level of a comparison is divided among its aspects by Bonferroni's rule, so that the probability of any
false alarm is at most the level. "No difference detected" does not mean that there is none: the finding also
states the size of the observed difference, and for means the shift that would be missed half of the time.
k-hat concerns the coordinates of the sites, not these functions; it decides nothing.
"""

import numpy as np

from bnlora._util.finding import Finding, Status
from bnlora.assess.comparison.classifier import ClassifierTest
from bnlora.assess.comparison.kernel import KernelTest
from bnlora.assess.comparison.moments import Moments
from bnlora.assess.comparison.predictive import PredictiveAgreement
from bnlora.metrics.khat import KHat


def means(names: tuple[str, ...], moments: Moments, level: float, other: str) -> Finding:
    """Finding about the means: whether they differ, by how much, and in which function most."""
    rejected = moments.shift_adjusted <= level
    sizes = np.abs(moments.shift)
    if rejected.any():
        k = int(np.where(rejected, sizes, -1.0).argmax())
        text = (
            f"means differ in {rejected.sum()} of {len(names)} functions, most in {names[k]} by "
            f"{moments.shift[k]:+.2f} sd of the {other} (adjusted p {p_text(moments.shift_adjusted[k])})"
        )
    else:
        k = int(sizes.argmax())
        missed = moments.detectable_shift(level).max()
        text = (
            f"means: {undetected(level)} (largest difference {moments.shift[k]:+.2f} sd of the {other}, in "
            f"{names[k]}; up to {missed:.2f} sd would be missed half of the time)"
        )
    return Finding("means", _status(rejected.any()), text, float(moments.shift_adjusted.min()), level)


def spread(names: tuple[str, ...], moments: Moments, level: float, other: str) -> Finding:
    """Finding about the standard deviations: median ratio, and the function furthest from one."""
    rejected = moments.ratio_adjusted <= level
    k = furthest(moments.ratio, rejected if rejected.any() else np.ones_like(rejected))
    middle = np.median(moments.ratio)
    if rejected.any():
        text = (
            f"spread is {middle:.2f} of the {other} by median and {moments.ratio[k]:.2f} at worst, in "
            f"{names[k]} ({rejected.sum()} of {len(names)} functions differ)"
        )
    else:
        text = (
            f"spread: {undetected(level)} ({middle:.2f} of the {other} by median, {moments.ratio[k]:.2f} at "
            f"worst, in {names[k]})"
        )
    return Finding("spread", _status(rejected.any()), text, float(moments.ratio_adjusted.min()), level)


def joint_law(kernel: KernelTest, classifier: ClassifierTest, level: float) -> Finding:
    """Finding about the joint law of the functions, by both two-sample tests."""
    p_value = 2 * min(kernel.p_value, classifier.p_value)  # Bonferroni's rule for the two tests
    differs = p_value <= level
    outcome = " differs" if differs else f": {undetected(level)}"
    text = (
        f"the joint law of the functions{outcome} (MMD p {p_text(kernel.p_value)}; "
        f"classifier right in {classifier.accuracy:.0%}, p {p_text(classifier.p_value)})"
    )
    return Finding("joint law", _status(differs), text, float(p_value), level)


def predictions(agreement: PredictiveAgreement, level: float, other: str) -> Finding:
    """Finding about the predictive distributions."""
    differs = agreement.total_variation_p <= level
    row = int(agreement.total_variation.argmax())
    numbers = (
        f"mean total variation {agreement.total_variation.mean():.3f}, "
        f"{agreement.total_variation_null.mean():.3f} between halves of the {other}, "
        f"p {p_text(agreement.total_variation_p)}"
    )
    if differs:
        text = f"predictions differ ({numbers}; most in row {row}, {agreement.total_variation[row]:.3f})"
    else:
        text = f"predictions: {undetected(level)} ({numbers})"
    return Finding("predictions", _status(differs), text, float(agreement.total_variation_p), level)


def epistemic(agreement: PredictiveAgreement, level: float, other: str) -> Finding:
    """Finding about the epistemic uncertainty of the rows."""
    differs = agreement.mutual_information_p <= level
    outcome = " differs" if differs else f": {undetected(level)}"
    text = (
        f"epistemic uncertainty{outcome} (mean difference "
        f"{agreement.mutual_information_gap.mean():.2g} nats a row, "
        f"{agreement.mutual_information_gap_null.mean():.2g} between halves of the {other}, "
        f"p {p_text(agreement.mutual_information_p)})"
    )
    return Finding("epistemic", _status(differs), text, float(agreement.mutual_information_p), level)


def _status(differs: object) -> Status:
    """Status of an aspect: a difference is a caution."""
    return "caution" if differs else "fine"


def undetected(level: float) -> str:
    """Sentence for an aspect whose test does not reject at its share of the level."""
    return f"no difference detected at level {level:.2g}, this aspect's share"


def weights(khat: KHat | None) -> str:
    """Sentence about Pareto k-hat of the approximation."""
    if khat is None:
        return "k-hat: none, no density"
    if khat.passed:
        return (
            f"k-hat {khat.value:.2f} is at most {khat.threshold:.2f}: draws can be reweighted to the "
            "posterior of the approximation's model"
        )
    return (
        f"k-hat {khat.value:.2f} exceeds {khat.threshold:.2f}: in the coordinates of the sites the "
        "approximation is too far from the posterior to be reweighted"
    )


def furthest(ratio: np.ndarray, among: np.ndarray) -> int:
    """Index of the ratio furthest from one on the log scale, among those marked; zero is the furthest."""
    # `tiny` is the smallest normal number: a finite logarithm for a ratio of zero.
    distance = np.abs(np.log(np.maximum(ratio, np.finfo(np.float64).tiny)))
    return int(np.where(among, distance, -1.0).argmax())


def p_text(value: float) -> str:
    """A p-value with two significant digits."""
    return "<1e-4" if value < 1e-4 else f"{value:.2g}"
