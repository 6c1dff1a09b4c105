r"""Approximate leave-one-out: how well would each training row have been predicted without it?

    elpd = sum_i log p(y_i | y_-i),    p(y_i | y_-i) = sum_s w_is p(y_i | theta_s) / sum_s w_is,
    w_is = p(theta_s, y) / (q(theta_s) p(y_i | theta_s)),    theta_s ~ q

The weights correct two differences: from the guide to the posterior, and from the posterior to the one
without the row. They are smoothed by Pareto laws; the k-hat of each row shows whether this is reliable. If
the k-hat of the fit (`khat`) is too large, so is that of every row. `p` is the effective number of
parameters: the log predictive density of the rows by the whole fit, minus elpd.

With many rows, a random subset is left out, and the sum over the others is estimated from the differences to
their log-likelihood (Magnusson et al. 2019), which adds `subsampling_error`. This saves the smoothing, not
the forward passes: the joint density in the weights is over all rows.

| finding       | problem                                | caution                     |
|---------------|----------------------------------------|-----------------------------|
| leave-one-out | k-hat above 0.7 in a tenth of the rows | k-hat above 0.7 in some row |

References: Vehtari, Gelman and Gabry (2017), arXiv 1507.04544; Magnusson, Andersen, Jonasson and Vehtari
(2019), arXiv 1904.10679, for approximate posteriors and subsampling; Yao et al. (2018), arXiv 1704.02030,
for stacking.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from bnlora._util.checks import check_at_least
from bnlora._util.display import Shown, Table
from bnlora._util.finding import Finding
from bnlora.assess.diagnostics.examination import Diagnostic, Examination
from bnlora.assess.diagnostics.sample import Sample, sample_of
from bnlora.assess.diagnostics.tree import tree_of_draws
from bnlora.infer.svi.result import Fit
from bnlora.metrics.monte_carlo import approximate_loo, compare_elpd, smoothed_weights

MOST_ROWS = 500
"""Number of training rows above which a diagnosis leaves out a random subset by default."""

MANY = 0.1
"""Share of rows with a k-hat above `HOPELESS` above which the status is a problem."""

HOPELESS = 0.7
"""k-hat above which no feasible number of draws is enough; below it, more draws help."""


@dataclass(frozen=True, repr=False)
class LeaveOneOut(Shown):
    """Leave-one-out predictive density of the training rows.

    Attributes:
        elpd: Sum over the training rows of log p(y_i | y_-i), in nats.
        error: Standard error of `elpd` over rows.
        p: Effective number of parameters.
        rows: Indices of the training rows that were left out.
        elpd_of: Log p(y_i | y_-i) of these rows, in nats.
        pareto_k: k-hat of these rows.
        threshold: Largest k-hat for which the number of draws is sufficient.
        num_rows: Number of training rows.
        subsampling_error: Standard error from leaving out only a subset; zero if all rows were left out.
        record: ArviZ's record, for `arviz_stats.compare` and plots.
    """

    elpd: float
    error: float
    p: float
    rows: Int[np.ndarray, " m"]
    elpd_of: Float[np.ndarray, " m"]
    pareto_k: Float[np.ndarray, " m"]
    threshold: float
    num_rows: int
    subsampling_error: float
    record: Any = field(compare=False)

    @property
    def unreliable(self) -> Int[np.ndarray, " b"]:
        """Rows whose k-hat is above the threshold, worst first."""
        order = np.argsort(-self.pareto_k)
        return self.rows[order][~(self.pareto_k[order] <= self.threshold)]

    @property
    def overview(self) -> tuple[Table]:
        """The table."""
        left = f"{len(self.rows)} of {self.num_rows} rows"
        some = f", subsampling ± {self.subsampling_error:.1f}" if self.subsampling_error else ""
        rows = (
            ("elpd, nats", f"{self.elpd:.1f} ± {self.error:.1f}{some}"),
            ("effective number of parameters", f"{self.p:.1f}"),
            (f"rows with k-hat above {self.threshold:.2f}", f"{len(self.unreliable)} of {len(self.rows)}"),
            ("largest k-hat", f"{self.pareto_k.max():.2f}"),
        )
        return (Table(f"Leave-one-out over {left}", ("", "value"), rows),)


def loo(fit: Fit | Sample, *, observations: int | None = None) -> LeaveOneOut:
    """Approximate leave-one-out cross-validation over the training rows.

    Args:
        fit: A fit, or a `Sample` of it.
        observations: Number of training rows to leave out, chosen at random by the key of the sample; all by
            default.

    Raises:
        ValueError: If the guide has no density, or `observations` is not between 2 and the number of rows.
    """
    sample = sample_of(fit)
    return _leave_out(sample, observations, _seed(sample))


def _seed(sample: Sample) -> int:
    return int(sample.random(3).integers(2**31))


def _leave_out(sample: Sample, observations: int | None, seed: int) -> LeaveOneOut:
    _require_density(sample)
    total = len(sample.fit.train)
    if observations is not None:
        check_at_least({"observations": observations}, 2)
        if observations > total:
            raise ValueError(
                f"observations must be at most the number of training rows, {total}; got {observations} "
                "(None leaves out all)"
            )
    tree = tree_of_draws({"log_likelihood": {"y": sample.log_likelihood}}, dims={"y": ["row"]})
    some = None if observations == total else observations
    densities = (x[None] for x in (sample.log_joint, sample.log_q))
    record = approximate_loo(tree, *densities, observations=some, seed=seed)
    pointwise = np.asarray(record.pareto_k, np.float64).reshape(-1)
    # ArviZ marks the rows that were not left out by NaN.
    rows = np.flatnonzero(~np.isnan(pointwise)) if some else np.arange(total)
    return LeaveOneOut(
        elpd=float(record.elpd),
        error=float(record.se),
        p=float(record.p),
        rows=rows,
        elpd_of=np.asarray(record.elpd_i, np.float64).reshape(-1)[rows],
        pareto_k=pointwise[rows],
        threshold=float(record.good_k),
        num_rows=total,
        subsampling_error=float(record.subsampling_se) if some else 0.0,
        record=record,
    )


def loo_probs(fit: Fit | Sample) -> Float[np.ndarray, "n c"]:
    """Leave-one-out probabilities of the classes of every training row: p(y_i = c | y_-i).

    Args:
        fit: A fit, or a `Sample` of it.

    Raises:
        ValueError: If the guide has no density.
    """
    sample = sample_of(fit)
    _require_density(sample)
    # log w_is, shape (draw, row): the row's likelihood is divided out of the weight of the whole fit.
    log_weights = (sample.log_joint - sample.log_q)[:, None] - sample.log_likelihood
    weights = smoothed_weights(log_weights)
    return np.einsum("sn,snc->nc", weights, np.exp(sample.train_prediction.draw_log_probs))


def compare_fits(fits: Mapping[str, Fit | Sample], *, observations: int | None = None) -> Any:
    """Compare fits of the same training rows by leave-one-out.

    Args:
        fits: Fits, or samples of them, by name.
        observations: As in `loo`.

    Returns:
        ArviZ's table, best first, with differences, their standard errors and weights by stacking: a pandas
        DataFrame.

    Raises:
        ValueError: If there are fewer than two fits, or their training rows differ from those of the first.
    """
    check_at_least({"the number of fits": len(fits)}, 2)
    samples = {name: sample_of(one) for name, one in fits.items()}
    first = next(iter(samples.values())).fit.train
    for name, one in samples.items():
        rows = one.fit.train
        same = rows.tokens.shape == first.tokens.shape and bool((rows.tokens == first.tokens).all())
        if not (same and bool((rows.labels == first.labels).all())):
            raise ValueError(f"all fits must have the training rows of the first; {name!r} has others")
    seed = _seed(next(iter(samples.values())))  # one seed, so that all leave out the same rows
    return compare_elpd({n: _leave_out(one, observations, seed).record for n, one in samples.items()})


def _require_density(sample: Sample) -> None:
    if not sample.has_density:
        raise ValueError(
            "leave-one-out by importance weights needs a guide with a density over every latent site; this "
            "guide sets some sites to a point: hold rows out instead"
        )


def left_out(left: LeaveOneOut, *, whole_failed: bool) -> Finding:
    """Finding about the reliability of leave-one-out."""
    bad, size = int((~(left.pareto_k <= HOPELESS)).sum()), len(left.rows)  # negated so that NaN is bad
    sentence = (
        f"elpd {left.elpd:.1f} ± {left.error:.1f} nats, {left.p:.1f} effective parameters; k-hat above "
        f"{HOPELESS:g} in {bad} of {size} rows, above {left.threshold:.2f} in {len(left.unreliable)}"
    )
    numbers = (bad / size, MANY)
    if not (bad or whole_failed):
        return Finding("leave-one-out", "fine", sentence, *numbers)
    if whole_failed:
        remedy = (
            "The weights of the whole fit fail (k-hat), so these fail too: improve k-hat first, or hold "
            "rows out."
        )
        return Finding("leave-one-out", "not asked", sentence, *numbers, remedy)
    shown = ", ".join(map(str, left.unreliable[:5]))
    remedy = f"Check the training rows {shown}, and hold them out in separate fits."
    return Finding("leave-one-out", "problem" if bad / size > MANY else "caution", sentence, *numbers, remedy)


def _measure(exam: Examination) -> LeaveOneOut:
    some = len(exam.fit.train) > MOST_ROWS and exam.request.leave_out is None
    return loo(exam.drawn, observations=MOST_ROWS if some else exam.request.leave_out)


LEAVE_OUT = Diagnostic(
    name="leave-one-out",
    measurement="loo",
    measure=_measure,
    judge=lambda left, exam: left_out(left, whole_failed=exam.weights_failed),
    needs=("density",),
)
