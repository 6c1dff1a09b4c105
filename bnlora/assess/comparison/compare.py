r"""`compare`: hold an approximate posterior of a classifier against draws of a certified run of MCMC.

    f_1, ..., f_k  under  q(adapters)   against   f_1, ..., f_k  under  p(adapters | y)

The factors of an adapter are not identifiable, so the functions are those of
`bnlora.prediction.functions.identifiable`: margins at some rows, norms of the updates, log-likelihood. A
comparison is worth what its reference is: a run whose own checks failed, or that has none, is refused. Where
the reference holds some sites at given values, the approximation is held there too, and the result says so
(`bnlora.assess.comparison.problem`). Both posteriors must be those of the same prior and rows, which cannot
be checked here: where a fit learned parameters of its prior, sample the reference under them.

Reference: Yao, Vehtari, Simpson and Gelman (2018), arXiv 1802.02538, for k-hat and what it leaves unseen.
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
from bnlora.data.batch import Batch, check_labels
from bnlora.metrics.khat import LEAST_DRAWS, KHat, has_density, khat
from bnlora.prediction.functions import Functions
from bnlora.prediction.posterior import Posterior, SitePosterior
from bnlora.prediction.predict import predict_with_draws
from bnlora.program.cache import cache_prefix


class UncertifiedReference(ValueError):
    """A run that failed its checks, or has none, was given as a reference."""


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
        posterior: A fit or any other posterior. Its draws are taken for independent of each other: where it
            is itself a chain, what is compared is the law of its stored draws.
        reference: A run of MCMC with a certificate that it passed, or one from `load_reference`.
        data: Rows with labels, for predictions and for the default functions.
        functions: Scalar functions; `identifiable(reference.model, data[:8])` when omitted. Those that read
            all rows, as the log-likelihood does, run all rows of one draw at a time. Those that are constant
            under the reference are left out, and named.
        num_draws: Draws of the approximation, and most draws on either side for predictions.
        batch_size: Rows to run at a time in predictions.
        level: Chance of a false alarm, over all aspects together.
        against: "anything" compares two approximations, or with a run without certificate; nothing is
            called a reference then.
        console: Where to draw progress bars; the terminal or notebook when omitted.

    Returns:
        Every measure beside its null level; its repr is a table and a verdict.

    Raises:
        UncertifiedReference: When the reference has no certificate or did not pass.
        ValueError: When both sides have different sites or label words, one is of the network and the other
            of its tangent model, or they hold a site at different values; when a function is no finite
            scalar, none varies, or there are too few draws.

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
    check_labels("data", data, len(posterior.model.label_ids))
    side = side_of(reference)
    side.check(posterior.model, data, functions)
    problem = common_problem(posterior, side, other)
    model = problem.model
    data = cache_prefix(model, data, batch_size=batch_size, console=console)
    predicted = partial(predict_with_draws, model, data=data, batch_size=batch_size, console=console)
    approx_key, other_key, weight_key, measure_key = jax.random.split(key, 4)
    own = problem.draw_adapters(approx_key, posterior, num_draws)
    functions = side.functions(model, data, functions)
    theirs = side.evaluate(other_key, model, functions, data, num_draws, predicted)
    mine = draws_of(model, functions, own, data).only(theirs.draws.names)
    size = _size(mine, theirs.draws, min(num_draws, theirs.most))
    return compare_draws(
        measure_key,
        mine,
        theirs.draws,
        predictions=(predicted(thinned(own, size)), theirs.predict(size)),
        khat=_khat(weight_key, posterior, num_draws, batch_size, console),
        level=level,
        other=other,
        notes=problem.notes,
    )


def _check_sizes(level: float, num_draws: int, batch_size: int) -> None:
    """Refuse what can be refused before anything is computed."""
    check_level(level)
    check_at_least({"batch_size": batch_size}, 1)
    if num_draws < 2 * LEAST_SIZE:
        raise ValueError(
            f"expected at least {2 * LEAST_SIZE} draws on each side that may be taken for independent; got "
            f"num_draws={num_draws}; draw more"
        )


def _require_certificate(reference: Any) -> None:
    way_out = "to compare without calling it a reference, pass against='anything'"
    try:
        certificate = getattr(reference, "certificate", None)
    except ValueError as error:  # too few chains or draws to judge, or draws that nothing can judge
        raise UncertifiedReference(
            f"this run may not serve as a reference: {error}. Or, {way_out}"
        ) from error
    if certificate is None:
        raise UncertifiedReference(
            f"a reference must be a run of MCMC that passed its checks; this {type(reference).__name__} has "
            f"no certificate: check the run first, or, {way_out}"
        )
    if not certificate.passed:
        said = "; ".join(certificate.failures) or "its certificate does not say why"
        raise UncertifiedReference(f"this run may not serve as a reference: {said}. Or, {way_out}")


def _size(mine: Draws, theirs: Draws, num_draws: int) -> int:
    """Draws of a prediction on either side; what is too little is refused before predictions are made."""
    mine, theirs = varying(mine, theirs)
    pairs(mine, theirs)
    return min(num_draws, mine.independent_size, theirs.independent_size)


def _khat(
    key: Array, posterior: Any, num_draws: int, batch_size: int, console: Console | None
) -> KHat | None:
    """k-hat of a fit whose guide has a density, over the rows that it was fitted to."""
    if not isinstance(posterior, SitePosterior) or num_draws < LEAST_DRAWS:
        return None
    drawn, adapters = posterior.draws(key, num_draws)
    if not has_density(posterior.guide, drawn.sites):
        return None
    rows = posterior.train
    predicted = predict_with_draws(posterior.model, adapters, rows, batch_size=batch_size, console=console)
    log_likelihood = predicted.log_probs_of(rows.labels).sum(1)
    return khat(np.asarray(drawn.log_prior, np.float64) + log_likelihood, np.asarray(drawn.log_q))
