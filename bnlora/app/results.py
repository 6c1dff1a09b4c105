"""Tables of a comparison of methods, and the sentence that says who won where."""

from collections.abc import Mapping

import numpy as np

from bnlora import metrics
from bnlora._util.compilation import kept
from bnlora._util.display import Table
from bnlora.app.experiment import BASE, BAYES, CAREFUL, LORA, Comparison

SHOWN = {"ACC": "accuracy", "NLL": "nll", "ECE": "ece", "Brier": "brier"}
"""Metrics of the tables: short name, and name in `bnlora.metrics.METRICS`."""

RIVALS = (BASE, LORA, CAREFUL)


def scores(comparison: Comparison) -> Table:
    """Accuracy and calibration by set of rows and method, with 95 % bootstrap intervals; computed once."""
    return kept(comparison, _scores)


def _scores(comparison: Comparison) -> Table:
    rows, chosen = [], {name: metrics.METRICS[metric] for name, metric in SHOWN.items()}
    methods = list(comparison.predictions)
    for domain, labels in comparison.labels.items():
        for method in methods:
            summary = metrics.summary(
                comparison.key, comparison.predictions[method][domain], labels, metrics=chosen
            )
            cells = (f"{e.value:.3f}\n{e.low:.3f}-{e.high:.3f}" for e in summary.values())
            null = metrics.null_ece(comparison.predictions[method][domain].log_probs)
            rows.append((domain if method == methods[0] else "", method, *cells, f"{null:.3f}"))
    groups = frozenset(range(len(methods), len(rows), len(methods)))
    sizes = ", ".join(f"{len(labels)} {domain}" for domain, labels in comparison.labels.items())
    title = (
        f"Test rows: {sizes}. Below each value its 95 % bootstrap interval. Null: ECE of a right prediction."
    )
    return Table(title, ("rows", "method", *SHOWN, "null"), tuple(rows), groups)


def differences(comparison: Comparison) -> Table:
    """Bayesian-LoRA minus each rival, on the same rows, with paired intervals; computed once."""
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
    title = "Bayesian-LoRA minus each rival: below zero is better, except for ACC."
    return Table(title, ("rows", "minus", *SHOWN), tuple(rows), groups)


def headline(comparison: Comparison) -> str:
    """Who has the lower negative log-likelihood where, and where an interval says so."""
    parts = []
    for rival in RIVALS:
        found = {}
        for domain, labels in comparison.labels.items():
            ours, theirs = (comparison.predictions[m][domain] for m in (BAYES, rival))
            found[domain] = metrics.paired_difference(comparison.key, metrics.nll, ours, theirs, labels)
        won = [domain for domain, d in found.items() if d.high < 0]
        lost = [domain for domain, d in found.items() if d.low > 0]
        open_ = [domain for domain in found if domain not in (*won, *lost)]
        said = {"lower than": won, "higher than": lost, "not told apart from": open_}
        pieces = [f"{what} that of {rival} on {' and '.join(names)}" for what, names in said.items() if names]
        parts.append("; ".join(pieces))
    return f"NLL of Bayesian-LoRA (95 % intervals over test rows): {'. It is '.join(parts)}."


def uncertainty(comparison: Comparison) -> Table:
    """Mean entropy of Bayesian-LoRA's predictions, and the part of it that more labels could remove."""
    rows = []
    for domain in comparison.labels:
        prediction = comparison.predictions[BAYES][domain]
        total, epistemic = prediction.entropy.mean(), prediction.mutual_information.mean()
        rows.append((domain, f"{total:.3f}", f"{epistemic:.3f}", f"{epistemic / total:.0%}"))
    header = ("rows", "entropy (nats)", "mutual information", "epistemic share")
    return Table("Where Bayesian-LoRA is uncertain, mean over test rows", header, tuple(rows))


def agreements(comparison: Comparison) -> Table:
    """How far each approximation of the posterior is from NUTS."""
    rows = []
    for name, found in comparison.agreements.items():
        if isinstance(found, ValueError):
            rows.append((name, "", "", "", "", f"not compared: {found}"))
            continue
        measures = {m.name: m for m in found.measures}
        shift, ratio = measures["largest |difference of means| / sd"], measures["ratio of sd, worst"]
        khat = f"{found.khat.value:.2f}" if found.khat else ""
        differs = ", ".join(found.differences) or "nothing"
        rows.append((name, f"{shift.value:.2f}", f"{shift.null:.2f}", f"{ratio.value:.2f}", khat, differs))
    header = ("posterior", "largest shift / sd", "of halves of NUTS", "worst sd ratio", "k-hat", "differs in")
    title = "Approximations against NUTS, on the tangent posterior, in margins, norms and log-likelihood"
    return Table(title, header, tuple(rows), texts=frozenset({5}))


def costs(comparison: Comparison) -> Table:
    """Seconds of every part."""
    total, lora = sum(comparison.seconds.values()), comparison.seconds[LORA]
    rows = [(part, f"{seconds:.1f}", f"{seconds / lora:.2f}") for part, seconds in comparison.seconds.items()]
    inner: Mapping[str, float] = comparison.core.seconds
    at = 1 + list(comparison.seconds).index(BAYES)
    rows[at:at] = [
        (f"  of it {part}", f"{seconds:.1f}", f"{seconds / lora:.2f}") for part, seconds in inner.items()
    ]
    title = f"{total:.0f} s in all, compiling included; the trunk runs once for all methods"
    return Table(title, ("part", "seconds", "over LoRA's fit"), tuple(rows))


def posterior_summary(comparison: Comparison) -> str:
    """Evidence, bound and certificate in words."""
    core, chains = comparison.core, comparison.chains
    bound = core.fit.history["elbo"][-20:]
    verdict = "is certified" if chains.certificate.passed else "is not certified"
    divergences = int(np.sum(chains.stats["divergent"]))
    return (
        f"Log evidence by Laplace {core.gaussian.log_evidence:,.1f} nats, bound of the variational fit "
        f"{bound.mean():,.1f} (standard error {bound.std() / len(bound) ** 0.5:.1f}), untouched base "
        f"{core.scales.base:,.1f}. The NUTS run of {chains.num_chains} chains of {chains.num_draws} draws "
        f"{verdict} ({divergences} divergences). It certifies the posterior of the tangent model, not that "
        "of the network."
    )
