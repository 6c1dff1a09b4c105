"""Tables of a comparison of methods, and a sentence that summarises which method has the lower NLL."""

from collections.abc import Mapping

import numpy as np

from bnlora import metrics
from bnlora._util.compilation import kept
from bnlora._util.display import Table
from bnlora.app.experiment import BASE, BAYES, CAREFUL, LORA, Comparison

SHOWN = {"ACC": "accuracy", "NLL": "nll", "ECE": "ece", "Brier": "brier"}
"""Metrics in the tables: short name, and name in `bnlora.metrics.METRICS`."""

RIVALS = (BASE, LORA, CAREFUL)


def scores(comparison: Comparison) -> Table:
    """Accuracy and calibration by set of rows and method, with 95 % bootstrap intervals; computed once."""
    return kept(comparison, _scores)


def _scores(comparison: Comparison) -> Table:
    rows, shown = [], {name: metrics.METRICS[metric] for name, metric in SHOWN.items()}
    methods = list(comparison.predictions)
    for domain, labels in comparison.labels.items():
        for method in methods:
            summary = metrics.summary(
                comparison.key, comparison.predictions[method][domain], labels, metrics=shown
            )
            cells = (f"{e.value:.3f}\n{e.low:.3f}-{e.high:.3f}" for e in summary.values())
            null = metrics.null_ece(comparison.predictions[method][domain].log_probs)
            rows.append((domain if method == methods[0] else "", method, *cells, f"{null:.3f}"))
    groups = frozenset(range(len(methods), len(rows), len(methods)))
    sizes = ", ".join(f"{len(labels)} {domain}" for domain, labels in comparison.labels.items())
    title = (
        f"Test rows: {sizes}. Below each value: 95 % bootstrap interval. Null: expected ECE if the predicted "
        "probabilities are correct."
    )
    return Table(title, ("rows", "method", *SHOWN, "null"), tuple(rows), groups)


def differences(comparison: Comparison) -> Table:
    """Bayesian-LoRA minus each other method, on the same rows, with paired intervals; computed once."""
    return kept(comparison, _differences)


def _differences(comparison: Comparison) -> Table:
    rows = []
    for domain, labels in comparison.labels.items():
        for method in RIVALS:
            ours, theirs = (comparison.predictions[m][domain] for m in (BAYES, method))
            pairs = (
                metrics.paired_difference(comparison.key, metrics.METRICS[metric], ours, theirs, labels)
                for metric in SHOWN.values()
            )
            cells = (f"{d.value:+.3f}\n{d.low:+.3f} to {d.high:+.3f}" for d in pairs)
            rows.append((domain if method == RIVALS[0] else "", method, *cells))
    groups = frozenset(range(len(RIVALS), len(rows), len(RIVALS)))
    title = "Bayesian-LoRA minus each other method: below zero is better, except for ACC."
    return Table(title, ("rows", "minus", *SHOWN), tuple(rows), groups)


def headline(comparison: Comparison) -> str:
    """Sets of rows on which the NLL of Bayesian-LoRA is lower, higher or not distinguishable, by method."""
    parts = []
    for rival in RIVALS:
        differences = {}
        for domain, labels in comparison.labels.items():
            ours, theirs = (comparison.predictions[m][domain] for m in (BAYES, rival))
            differences[domain] = metrics.paired_difference(comparison.key, metrics.nll, ours, theirs, labels)
        lower = [domain for domain, d in differences.items() if d.high < 0]
        higher = [domain for domain, d in differences.items() if d.low > 0]
        undecided = [domain for domain in differences if domain not in (*lower, *higher)]
        verdicts = {"lower than": lower, "higher than": higher, "not distinguishable from": undecided}
        pieces = [
            f"{verdict} that of {rival} on {' and '.join(on)}" for verdict, on in verdicts.items() if on
        ]
        parts.append("; ".join(pieces))
    return f"NLL of Bayesian-LoRA (95 % intervals over test rows): {'. It is '.join(parts)}."


def uncertainty(comparison: Comparison) -> Table:
    """Mean entropy of Bayesian-LoRA's predictions, and its epistemic part, which more labels could reduce."""
    rows = []
    for domain in comparison.labels:
        prediction = comparison.predictions[BAYES][domain]
        total, epistemic = prediction.entropy.mean(), prediction.mutual_information.mean()
        rows.append((domain, f"{total:.3f}", f"{epistemic:.3f}", f"{epistemic / total:.0%}"))
    header = ("rows", "entropy (nats)", "mutual information", "epistemic share")
    return Table("Uncertainty of Bayesian-LoRA, mean over test rows", header, tuple(rows))


def agreements(comparison: Comparison) -> Table:
    """Distance of each approximation of the posterior from NUTS."""
    rows = []
    for name, agreement in comparison.agreements.items():
        if isinstance(agreement, ValueError):
            rows.append((name, "", "", "", "", f"not compared: {agreement}"))
            continue
        measures = {m.name: m for m in agreement.measures}
        shift, ratio = measures["largest |difference of means| / sd"], measures["ratio of sd, worst"]
        khat = f"{agreement.khat.value:.2f}" if agreement.khat else ""
        differs = ", ".join(agreement.differences) or "nothing"
        rows.append((name, f"{shift.value:.2f}", f"{shift.null:.2f}", f"{ratio.value:.2f}", khat, differs))
    header = ("posterior", "largest shift / sd", "halves of NUTS", "worst sd ratio", "k-hat", "differs in")
    title = "Approximations compared with NUTS: margins, norms and log-likelihood, tangent posterior"
    return Table(title, header, tuple(rows), texts=frozenset({5}))


def costs(comparison: Comparison) -> Table:
    """Seconds of each part."""
    total, lora = sum(comparison.seconds.values()), comparison.seconds[LORA]
    rows = [(part, f"{seconds:.1f}", f"{seconds / lora:.2f}") for part, seconds in comparison.seconds.items()]
    inner: Mapping[str, float] = comparison.core.seconds
    at = 1 + list(comparison.seconds).index(BAYES)
    rows[at:at] = [
        (f"  of which {part}", f"{seconds:.1f}", f"{seconds / lora:.2f}") for part, seconds in inner.items()
    ]
    title = f"{total:.0f} s in total, including compilation; the trunk runs once for all methods"
    return Table(title, ("part", "seconds", "relative to LoRA's fit"), tuple(rows))


def posterior_summary(comparison: Comparison) -> str:
    """Evidence, bound and certificate in a short text."""
    core, chains = comparison.core, comparison.chains
    bound = core.fit.history["elbo"][-20:]
    verdict = "is certified" if chains.certificate.passed else "is not certified"
    divergences = int(np.sum(chains.stats["divergent"]))
    return (
        f"Log evidence by Laplace {core.gaussian.log_evidence:,.1f} nats; bound of the variational fit "
        f"{bound.mean():,.1f} (standard error {bound.std() / len(bound) ** 0.5:.1f}); log-likelihood of the "
        f"untouched base {core.scales.base:,.1f}. The NUTS run with {chains.num_chains} chains of "
        f"{chains.num_draws} draws {verdict} ({divergences} divergences). The certificate is for the "
        "posterior of the tangent model, not that of the network."
    )
