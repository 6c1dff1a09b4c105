r"""A fit as an ArviZ DataTree: draws, densities and the history of the optimisation.

The factors of an adapter are not identifiable: (A, B) and (R A, B R^-1) are one update. The posterior group
therefore contains the Frobenius norm and the singular values of the update `alpha / rank * B A` instead of
its sites, and every other site of the prior by name (`bnlora.assess.diagnostics.hyper`).

Draws of a guide are independent by construction, so R-hat and effective sample sizes of this tree do not
measure the quality of the fit. Use `log_p` and `log_q` instead (`arviz_stats.loo_approximate_posterior`,
Pareto k).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from bnlora._util.checks import check_key
from bnlora.assess.diagnostics.hyper import Named, log_prior_groups, named_draws
from bnlora.assess.diagnostics.updates import Summaries, summaries
from bnlora.data.batch import Batch
from bnlora.prediction.outcomes import ValuePrediction
from bnlora.prediction.predict import log_likelihood_by_draw, outputs_with_draws
from bnlora.program.likelihoods import Likelihood, Regression

CHAINS = 4  # ArviZ expects chains; independent draws can be split into any number of equal parts


def to_arviz(key: Array, fit: Any, data: Batch, *, num_draws: int = 200, batch_size: int = 32) -> Any:
    """Draws of a fit and their predictions for the given rows, as an ArviZ DataTree.

    Args:
        key: Random key of the draws.
        fit: A fit.
        data: Rows with labels for the groups over rows.
        num_draws: Number of draws, a multiple of 4.
        batch_size: Rows to run at a time.

    Returns:
        A DataTree with the groups
        `posterior`: `update_norm` (module, layer) and `singular_value` (module, layer, rank), the same
        with the suffix `_lm_head` for an adapted head, and the prior's hyper-parameters: every site that is
        not a weight of a factor, with the dimensions named by its plates. In names, "/" becomes a dot, and
        a name in use gets a number; the attribute `site` is the name in the prior;
        `sample_stats`: `log_p` (log prior plus log-likelihood of the training rows), `log_q`, and
        over optimisation steps `elbo` and its terms;
        `log_prior`: one variable for the weights of each family, for each hyper-parameter, and for each
        observed site or factor of the prior, for `arviz_stats.psense`, which needs the training rows as
        `data`; absent if the prior has no latent sites;
        `log_likelihood`, `posterior_predictive`, `observed_data`: `y` over the rows of `data`; texts have
        only the first, and the observed class of a row with votes is the one with most.

    Raises:
        ValueError: If `num_draws` is not a positive multiple of 4, or the rows have no labels.

    Example:
        >>> tree = bl.to_arviz(key, fit, rows, num_draws=4)
        >>> "posterior" in tree.children, "log_likelihood" in tree.children
        (True, True)
    """
    key = check_key(key)
    if num_draws < CHAINS or num_draws % CHAINS:
        raise ValueError(f"num_draws must be a positive multiple of {CHAINS}; got {num_draws}")
    model = fit.model
    model.check_outcomes("data", data)
    draws, adapters = fit.draws(key, num_draws)
    outputs = partial(outputs_with_draws, model, adapters, batch_size=batch_size)
    in_training = log_likelihood_by_draw(model, outputs(fit.train), fit.train)
    predicted = outputs(data)
    stats = {"log_p": np.asarray(draws.log_prior, np.float64) + in_training.sum(1), "log_q": draws.log_q}
    updates = summaries(fit.model.sites, adapters)
    groups = {
        "posterior": updates.values,
        "sample_stats": stats,
        "log_prior": log_prior_groups(model, draws.log_prior_of),
        "log_likelihood": {"y": log_likelihood_by_draw(model, predicted, data)},
        "posterior_predictive": _sample_outcomes(model.likelihood, predicted),
    }
    groups = {name: group for name, group in groups.items() if group}
    hyper = named_draws(fit.model, draws.sites)
    return _tree(jax.tree.map(_by_chain, groups), updates, hyper, fit, data)


def tree_of_draws(groups: Mapping[str, Mapping[str, np.ndarray]], **options: Any) -> Any:
    """A DataTree with one chain, from arrays with a leading draw axis.

    Args:
        groups: Arrays by group and name.
        **options: `dims` and `coords`, as `arviz_base.from_dict` takes them.
    """
    import arviz_base

    chains = {g: {n: np.asarray(x)[None] for n, x in group.items()} for g, group in groups.items()}
    return arviz_base.from_dict(chains, check_conventions=False, **options)


def _sample_outcomes(likelihood: Likelihood, outputs: np.ndarray) -> dict[str, np.ndarray]:
    """One outcome for each draw and row, by inverting the distribution function at fixed uniform numbers.

    Nothing for texts, which their log-likelihoods do not give.
    """
    uniform = np.random.default_rng(0).random(outputs.shape[:2])
    if likelihood.num_classes:
        below = np.exp(outputs).cumsum(-1)[..., :-1] < uniform[..., None]
        return {"y": below.sum(-1)}
    if isinstance(likelihood, Regression):
        location, scale = np.moveaxis(outputs, -1, 0)
        return {"y": ValuePrediction(location, scale, likelihood.noise, likelihood.df).at(uniform)}
    return {}


def _observed(likelihood: Likelihood, data: Batch) -> np.ndarray:
    """The observed values, or the classes: those with most votes where there are votes."""
    return np.asarray(data.outcomes if likelihood.outcome == "value" else data.labels)


def _by_chain(x: Any) -> np.ndarray:
    """The leading draw axis, split into chains: (draw, ...) to (chain, draw, ...)."""
    array = np.asarray(x)
    return array.reshape(CHAINS, -1, *array.shape[1:])


def _tree(
    groups: dict[str, dict[str, np.ndarray]], updates: Summaries, hyper: Named, fit: Any, data: Batch
) -> Any:
    import arviz_base
    import xarray

    groups = {**groups, "observed_data": {"y": _observed(fit.model.likelihood, data)}}
    dims = updates.dims | {"y": ["row"]}
    # ArviZ expects chains to be longer than their number, as in MCMC; skip this check for few draws.
    tree = arviz_base.from_dict(groups, dims=dims, coords=updates.coords, check_conventions=False)
    trace = {name: ("step", values) for name, values in fit.history.items()}
    steps = {"step": np.arange(1, len(fit.step_seconds) + 1)}
    stats = tree["sample_stats"].to_dataset().assign(trace).assign_coords(steps)
    tree["sample_stats"] = xarray.DataTree(stats)
    # Added separately: `log_prior` has variables of the same names with other dimensions.
    variables = {
        name: (("chain", "draw", *hyper.dims[name]), _by_chain(values), {"site": hyper.sites[name]})
        for name, values in hyper.values.items()
    }
    posterior = tree["posterior"].to_dataset().assign(variables).assign_coords(hyper.coords)
    tree["posterior"] = xarray.DataTree(posterior)
    return tree
