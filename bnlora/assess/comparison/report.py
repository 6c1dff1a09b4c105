"""A comparison of two posteriors: every measure with its null level, and a verdict by rules.

The rules are in `bnlora.assess.comparison.verdict`; each measure is defined in its module.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jax import Array

from bnlora._util.checks import check_level, numpy_generator
from bnlora._util.display import Showable, Shown, Table
from bnlora._util.finding import Finding, Findings, Judged, count_words
from bnlora.assess.comparison import verdict as rules
from bnlora.assess.comparison.classifier import ClassifierTest, classifier_test
from bnlora.assess.comparison.coverage import Coverage, coverage
from bnlora.assess.comparison.draws import Draws
from bnlora.assess.comparison.kernel import KernelTest, kernel_test
from bnlora.assess.comparison.moments import Moments, moments, moments_null
from bnlora.assess.comparison.pairs import pairs, varying
from bnlora.assess.comparison.predictive import PredictiveAgreement, predictive_agreement
from bnlora.assess.comparison.transport import Transport, transport
from bnlora.metrics.khat import KHat
from bnlora.prediction.predict import Prediction

Other = Literal["reference", "other posterior"]


@dataclass(frozen=True)
class Measure:
    """One number of a comparison.

    Attributes:
        name: Name of the measure.
        value: Between approximation and reference.
        null: Between halves of the reference; NaN if there is no null level.
        p_value: P-value of no difference, adjusted if several functions are tested; NaN without a test.
        note: Function or row of the value, its standard error, or its threshold.
    """

    name: str
    value: float
    null: float = np.nan
    p_value: float = np.nan
    note: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Shown, Judged):
    """Comparison of an approximate posterior with a second one.

    Attributes:
        posterior: Draws of the functions under the approximation.
        reference: Draws of the same functions under the reference.
        moments: Means and standard deviations.
        moments_null: The same between halves of the reference.
        transport: Wasserstein distances.
        kernel: Maximum mean discrepancy.
        classifier: Classifier two-sample test.
        coverage: Coverage of credible intervals.
        predictive: Agreement of predictions; None if none were compared.
        khat: Pareto k-hat of the approximation; None if it has no density.
        size: Draws in each half of each side, for the two-sample measures.
        level: Probability of a false alarm over all aspects together.
        other: Name of the second posterior: "reference" only if it is certified.
        constant: Functions left out because they are constant under the second posterior.
        notes: Further sentences about the two sides, such as which sites are fixed.

    Example:
        >>> comparison = bl.compare(key, fit, chains, rows, num_draws=100, against="anything")
        >>> comparison.other
        'other posterior'
    """

    posterior: Draws
    reference: Draws
    moments: Moments
    moments_null: Moments
    transport: Transport
    kernel: KernelTest
    classifier: ClassifierTest
    coverage: Coverage
    predictive: PredictiveAgreement | None
    khat: KHat | None
    size: int
    level: float
    other: Other
    constant: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the functions."""
        return self.posterior.names

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One finding for each aspect, at its share of the level."""
        level = self.level / num_aspects(self.predictive)
        results = [
            rules.means(self.names, self.moments, level, self.other),
            rules.spread(self.names, self.moments, level, self.other),
            rules.joint_law(self.kernel, self.classifier, level),
        ]
        if self.predictive is not None:
            results.append(rules.predictions(self.predictive, level, self.other))
            results.append(rules.epistemic(self.predictive, level, self.other))
        return tuple(results)

    @property
    def differences(self) -> tuple[str, ...]:
        """The aspects in which a difference was detected."""
        return tuple(finding.name for finding in self.cautions)

    @property
    def sentences(self) -> tuple[str, ...]:
        """The sentences of the findings, of k-hat and of the notes."""
        return (*(finding.sentence for finding in self.findings), *self._notes)

    @property
    def _notes(self) -> tuple[str, ...]:
        """Sentences about k-hat, the scope of an agreement, functions left out and fixed sites."""
        texts = [rules.weights(self.khat)]
        if not self.differences:
            texts.append(
                f"no difference detected at level {self.level:g} for these functions, rows and number of "
                "draws"
            )
        if self.constant:
            texts.append(f"left out, constant under the {self.other}: {', '.join(self.constant)}")
        return (*texts, *self.notes)

    @property
    def verdict(self) -> str:
        """All sentences, joined; the rules are in `bnlora.assess.comparison.verdict`."""
        return "; ".join(self.sentences)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Every measure as one number; those by function or row are summarised."""
        moments, null = self.moments, self.moments_null
        k = int(np.abs(moments.shift).argmax())
        j = rules.furthest(moments.ratio, np.ones(len(self.names), bool))
        far = int(self.transport.marginal.argmax())
        null_ratio = null.ratio[rules.furthest(null.ratio, np.ones(len(self.names), bool))]
        error = f"± {moments.shift_mcse[k]:.2g}, {self.names[k]}"
        ratio_error = f"± {moments.ratio[j] * moments.ratio_mcse[j]:.2g}, {self.names[j]}"
        tested = self.classifier
        rows = [
            Measure("largest |difference of means| / sd", abs(moments.shift[k]), np.abs(null.shift).max(),
                    moments.shift_adjusted[k], error),
            Measure("ratio of sd, median", np.median(moments.ratio), np.median(null.ratio)),
            Measure("ratio of sd, worst", moments.ratio[j], null_ratio, moments.ratio_adjusted[j],
                    ratio_error),
            Measure("Wasserstein-1 / sd, mean", self.transport.marginal.mean(),
                    self.transport.marginal_null.mean(), note=f"largest in {self.names[far]}"),
            Measure("sliced Wasserstein-2 / sd", self.transport.sliced, self.transport.sliced_null),
            Measure("squared MMD", self.kernel.squared, self.kernel.null, self.kernel.p_value),
            Measure("classifier accuracy", tested.accuracy, tested.null, tested.p_value,
                    f"± {tested.standard_error:.2g}, area {tested.area:.3f}"),
        ]  # fmt: skip
        coverages = zip(self.coverage.levels, self.coverage.share, self.coverage.null, strict=True)
        rows += [Measure(f"in {c:.0%} intervals, mean", x.mean(), y.mean()) for c, x, y in coverages]
        if self.khat is not None:
            rows.append(Measure("Pareto k-hat", self.khat.value, note=f"at most {self.khat.threshold:.2f}"))
        return (*rows, *_of_predictions(self.predictive))

    @property
    def table(self) -> Table:
        """One row for each measure, with its null level."""
        rows = tuple(
            (m.name, _number(m.value), _number(m.null), _p_value(m.p_value), m.note) for m in self.measures
        )
        title = (
            f"Comparison with the {self.other} in {len(self.names)} functions\n"
            f"approximation: {self.posterior.describe}\n{self.other}: {self.reference.describe}\n"
            f"null: between halves of the {self.other}; two-sample measures: {self.size} against "
            f"{self.size} draws"
        )
        return Table(title, ("measure", "value", "null", "p", "note"), rows, texts=frozenset({4}))

    @property
    def functions_table(self) -> Table:
        """One row for each function."""
        moments, share = self.moments, self.coverage
        ninety = int(np.abs(np.array(share.levels) - 0.9).argmin())
        rows = tuple(
            (
                name,
                f"{moments.shift[k]:+.2f} ± {moments.shift_mcse[k]:.2f}",
                rules.p_text(moments.shift_adjusted[k]),
                f"{moments.ratio[k]:.2f} ± {moments.ratio[k] * moments.ratio_mcse[k]:.2f}",
                rules.p_text(moments.ratio_adjusted[k]),
                f"{self.transport.marginal[k]:.2f}",
                f"{self.transport.marginal_null[k]:.2f}",
                f"{share.share[ninety, k]:.2f} ± {share.mcse[ninety, k]:.2f}",
            )
            for k, name in enumerate(self.names)
        )
        inside = f"in {share.levels[ninety]:.0%}"
        header = ("function", "mean", "p", "sd ratio", "p", "W1", "null", inside)
        title = f"Functions: differences in sd of the {self.other}, p-values adjusted (Holm)"
        return Table(title, header, rows)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """The findings, the notes and both tables."""
        title = f"Comparison with the {self.other}: {count_words(self.findings)}"
        return (Findings(title, self.findings), self._notes, self.table, self.functions_table)

    def to_dataframe(self, of: Literal["functions", "measures"] = "functions") -> Any:
        """All numbers by function, or those of `table` by measure, as a pandas DataFrame.

        Raises:
            ValueError: If `of` is neither "functions" nor "measures".
        """
        import pandas

        if of == "functions":
            return pandas.DataFrame(self._by_function(), index=pandas.Index(self.names, name="function"))
        if of == "measures":
            return pandas.DataFrame([vars(m) for m in self.measures]).set_index("name")
        raise ValueError(f"`of` must be 'functions' or 'measures'; got {of!r}")

    def __repr__(self) -> str:
        return "\n".join([repr(self.table), *self.sentences])

    def _by_function(self) -> dict[str, np.ndarray]:
        moments, share = self.moments, self.coverage
        inside = {f"in_{c:.0%}": x for c, x in zip(share.levels, share.share, strict=True)}
        return {
            "mean": self.posterior.mean,
            "other_mean": self.reference.mean,
            "sd": self.posterior.sd,
            "other_sd": self.reference.sd,
            "difference": moments.shift,
            "difference_mcse": moments.shift_mcse,
            "difference_p": moments.shift_adjusted,
            "sd_ratio": moments.ratio,
            "sd_ratio_mcse": moments.ratio * moments.ratio_mcse,
            "sd_ratio_p": moments.ratio_adjusted,
            "W1": self.transport.marginal,
            "W1_null": self.transport.marginal_null,
            **inside,
        }


def compare_draws(
    key: Array,
    posterior: Draws,
    reference: Draws,
    *,
    predictions: tuple[Prediction, Prediction] | None = None,
    khat: KHat | None = None,
    level: float = 0.05,
    other: Other = "reference",
    notes: tuple[str, ...] = (),
) -> Comparison:
    """Compute every measure between draws of two posteriors; `bnlora.compare` draws them for you.

    Args:
        key: Random key of slices, folds and permutations.
        posterior: Draws of the approximation.
        reference: Draws of the reference.
        predictions: Predictions of both for the same rows, as in `predictive_agreement`.
        khat: Pareto k-hat of the approximation.
        level: Probability of a false alarm over all aspects together.
        other: Name of the second posterior in tables and sentences.
        notes: Further sentences about the two sides.

    Returns:
        Every measure with its null level; without `predictions`, those of predictions are missing.
        Functions that are constant under `reference` are left out and listed in `constant`.

    Raises:
        ValueError: If the level is not in (0, 1), or a measure rejects its arguments.
    """
    random = numpy_generator(key)
    check_level(level)
    constant = reference.constant
    posterior, reference = varying(posterior, reference)
    samples = pairs(posterior, reference)
    # Enough that the smallest possible p-value, 1 / (count + 1), is well below the share of an aspect.
    count = max(999, int(np.ceil(40 / level)))
    agreement = None
    if predictions is not None:
        agreement = predictive_agreement(random, *predictions, num_permutations=count)
    return Comparison(
        posterior=posterior,
        reference=reference,
        moments=moments(posterior, reference),
        moments_null=moments_null(reference),
        transport=transport(random, samples),
        kernel=kernel_test(random, samples, num_permutations=count),
        classifier=classifier_test(random, samples),
        coverage=coverage(posterior, reference),
        predictive=agreement,
        khat=khat,
        size=samples.size,
        level=level,
        other=other,
        constant=constant,
        notes=notes,
    )


def num_aspects(predictive: PredictiveAgreement | None) -> int:
    """Number of aspects that share the level."""
    return 3 if predictive is None else 5


def _of_predictions(agreement: PredictiveAgreement | None) -> list[Measure]:
    if agreement is None:
        return []
    variation, divergence, gap = (
        (value.mean(), null.mean())
        for value, null in (
            (agreement.total_variation, agreement.total_variation_null),
            (agreement.divergence, agreement.divergence_null),
            (agreement.mutual_information_gap, agreement.mutual_information_gap_null),
        )
    )
    row = int(agreement.total_variation.argmax())
    largest = f"largest {agreement.total_variation[row]:.3g}, row {row}"
    return [
        Measure("total variation, mean of rows", *variation, agreement.total_variation_p, largest),
        Measure("KL divergence, mean of rows", *divergence),
        Measure("|difference| of mutual information", *gap, agreement.mutual_information_p),
        Measure("correlation of mutual information", agreement.correlation, agreement.correlation_null),
    ]


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3g}"


def _p_value(value: float) -> str:
    return "" if np.isnan(value) else rules.p_text(value)
