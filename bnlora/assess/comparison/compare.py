r"""`compare`: an approximate posterior of a classifier against draws of a certified run of MCMC.

    f_1, ..., f_k  under  q(adapters)   against   f_1, ..., f_k  under  p(adapters | y)

The factors of an adapter are not identifiable, so the functions are those of
`bnlora.prediction.functions.identifiable`: margins at some rows, norms of the updates, log-likelihood. A
comparison is only as good as its reference: a run that failed its checks, or has none, is refused. If the
reference fixes some sites, the approximation uses the same values, and the result has a note about it
(`bnlora.assess.comparison.problem`). The caller must ensure that both use the same prior and data: if a fit
learned parameters of its prior, sample the reference with these parameters.

Reference: Yao, Vehtari, Simpson and Gelman (2018), arXiv 1802.02538, for k-hat and its limits.
"""

from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from rich.console import Console

from bnlora._util.checks import check_at_least, check_key, check_level, check_option
from bnlora.assess.comparison.draws import Draws
from bnlora.assess.comparison.pairs import LEAST_SIZE, pairs, varying
from bnlora.assess.comparison.problem import common_problem
from bnlora.assess.comparison.report import Comparison, Other, compare_draws
from bnlora.assess.comparison.side import Reference, draws_of, side_of, thinned
from bnlora.assess.comparison.stored import StoredReference
from bnlora.data.batch import Batch
from bnlora.metrics.khat import LEAST_DRAWS, KHat, has_density, khat
from bnlora.prediction.functions import Functions
from bnlora.prediction.posterior import Posterior, SitePosterior
from bnlora.prediction.predict import log_likelihood_by_draw, predict_with_draws, require_classes
from bnlora.program.cache import cache_prefix


class UncertifiedReference(ValueError):
    """The reference failed its checks, or has no certificate."""


def compare(
    key: Array,
    posterior: Posterior,
    reference: Reference | StoredReference | Posterior,
    data: Batch,
    *,
    functions: Functions | None = None,
    num_draws: int = 400,
    batch_size: int = 32,
    level: float = 0.05,
    against: Literal["reference", "anything"] = "reference",
    console: Console | None = None,
) -> Comparison:
    """Compare an approximate posterior with a reference.

    Args:
        key: Random key of draws, slices, folds and permutations.
        posterior: A fit or any other posterior. Its draws are treated as independent: for a chain, the
            comparison is with the law of its stored draws.
        reference: A run of MCMC with a certificate that it passed, or one from `load_reference`.
        data: Rows with labels, for predictions and for the default functions.
        functions: Scalar functions; `identifiable(reference.model, data[:8])` by default. Functions of all
            rows, such as the log-likelihood, run all rows of one draw at a time. Functions that are constant
            under the reference are left out and listed.
        num_draws: Draws of the approximation, and largest number of draws on either side for predictions.
        batch_size: Rows to run at a time in predictions.
        level: Probability of a false alarm over all aspects together.
        against: "anything" compares two approximations, or with a run without a certificate; nothing is
            then called a reference.
        console: Where to draw progress bars; the terminal or notebook by default.

    Returns:
        Every measure with its null level; its repr is a table and a verdict.

    Raises:
        UncertifiedReference: If the reference has no certificate or failed its checks.
        ValueError: If the sides have different sites or label words, one is of the network and the other
            of its tangent model, or they fix a site at different values; if a function is not a finite
            scalar or none varies; or if there are too few draws.

    Example:
        >>> bl.compare(key, fit, chains, rows)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        bnlora.assess.comparison.compare.UncertifiedReference: ...
    """
    key = check_key(key)
    check_option("against", against, ("reference", "anything"))
    _check_sizes(level, num_draws, batch_size)
    other: Other = "reference" if against == "reference" else "other posterior"
    if against == "reference":
        _require_certificate(reference)
    require_classes(posterior.model, "bl.compare")
    posterior.model.check_outcomes("data", data)
    side = side_of(reference)
    side.check(posterior.model, data, functions)
    problem = common_problem(posterior, side, other)
    model = problem.model
    data = cache_prefix(model, data, batch_size=batch_size, console=console)
    predicted = partial(predict_with_draws, model, data=data, batch_size=batch_size, console=console)
    approx_key, other_key, weight_key, measure_key = jax.random.split(key, 4)
    adapters = problem.draw_adapters(approx_key, posterior, num_draws)
    functions = side.functions(model, data, functions)
    theirs = side.evaluate(other_key, model, functions, data, num_draws, predicted)
    mine = draws_of(model, functions, adapters, data).only(theirs.draws.names)
    size = _size(mine, theirs.draws, min(num_draws, theirs.most))
    return compare_draws(
        measure_key,
        mine,
        theirs.draws,
        predictions=(predicted(thinned(adapters, size)), theirs.predict(size)),
        khat=_khat(weight_key, posterior, num_draws, batch_size, console),
        level=level,
        other=other,
        notes=problem.notes,
    )


def _check_sizes(level: float, num_draws: int, batch_size: int) -> None:
    """Raise `ValueError` if the level or a size is out of range, before anything is computed."""
    check_level(level)
    check_at_least({"batch_size": batch_size}, 1)
    if num_draws < 2 * LEAST_SIZE:
        raise ValueError(
            f"expected at least {2 * LEAST_SIZE} draws on each side that are nearly independent; got "
            f"num_draws={num_draws}; draw more"
        )


def _require_certificate(reference: Any) -> None:
    """Raise `UncertifiedReference` unless the reference has a certificate and passed its checks."""
    way_out = "to compare without calling it a reference, pass against='anything'"
    try:
        certificate = getattr(reference, "certificate", None)
    except ValueError as error:  # too few chains or draws for the checks, or draws that are not finite
        raise UncertifiedReference(f"this run cannot be a reference: {error}. Or, {way_out}") from error
    if certificate is None:
        raise UncertifiedReference(
            f"a reference must be a run of MCMC that passed its checks; this {type(reference).__name__} has "
            f"no certificate: check the run first, or, {way_out}"
        )
    if not certificate.passed:
        reasons = "; ".join(certificate.failures) or "its certificate gives no reason"
        raise UncertifiedReference(f"this run cannot be a reference: {reasons}. Or, {way_out}")


def _size(mine: Draws, theirs: Draws, num_draws: int) -> int:
    """Number of draws for the predictions of each side; raises `ValueError` if there are too few."""
    mine, theirs = varying(mine, theirs)
    pairs(mine, theirs)
    return min(num_draws, mine.independent_size, theirs.independent_size)


def _khat(
    key: Array, posterior: Any, num_draws: int, batch_size: int, console: Console | None
) -> KHat | None:
    """k-hat of a fit over its training rows; None if its guide has no density."""
    if not isinstance(posterior, SitePosterior) or num_draws < LEAST_DRAWS:
        return None
    draws, adapters = posterior.draws(key, num_draws)
    if not has_density(posterior.guide, draws.sites):
        return None
    rows = posterior.train
    prediction = predict_with_draws(posterior.model, adapters, rows, batch_size=batch_size, console=console)
    # Sum over training rows: the weights are p(y, theta) / q(theta) in the coordinates of the sites.
    log_likelihood = log_likelihood_by_draw(posterior.model, prediction.draw_log_probs, rows).sum(1)
    return khat(np.asarray(draws.log_prior, np.float64) + log_likelihood, np.asarray(draws.log_q))
