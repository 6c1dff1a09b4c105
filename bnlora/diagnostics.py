r"""From a fit to ArviZ: one DataTree of draws, densities and the record of the optimisation.

The factors of an adapter are not identifiable: (A, B) and (R A, B R^-1) are one update. The posterior
group therefore holds functions of the update `alpha / rank * B A` alone, its Frobenius norm and its
singular values, and the prior's own hyper-parameters.

Draws of a guide are independent by construction, so R-hat and effective sample sizes of this tree
say nothing about how good the fit is; `log_p` and `log_q` are there for the diagnostics that do
(`arviz_stats.loo_approximate_posterior`, Pareto k).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from bnlora.data import Batch
from bnlora.predict import predict_with_draws
from bnlora.sites import HEAD, Sites

CHAINS = 4  # ArviZ splits draws over chains; four equal parts of independent draws are as good as any


def singular_values(a: Float[Any, "... r d_in"], b: Float[Any, "... d_out r"]) -> Float[np.ndarray, "... r"]:
    """Singular values of `b @ a`, largest first, from the triangles of two thin QR factorisations.

    Where `d_out` or `d_in` is below the rank the values beyond it are exactly zero.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    inner = np.linalg.qr(b).R @ np.swapaxes(np.linalg.qr(np.swapaxes(a, -1, -2)).R, -1, -2)
    values = np.linalg.svd(inner, compute_uv=False)
    missing = a.shape[-2] - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def to_arviz(
    fit: Any, data: Batch, *, num_samples: int = 200, batch_size: int = 32, key: Array | None = None
) -> Any:
    """Draws of a fit and their predictions for some rows, as an ArviZ DataTree.

    Args:
        fit: A fit.
        data: Rows for the groups over rows.
        num_samples: Number of draws, a multiple of 4.
        batch_size: Rows to run at a time.
        key: Random key of the draws; the fit's own when omitted, so that two calls agree.

    Returns:
        A DataTree with the groups
        `posterior`: `update_norm` (module, layer) and `singular_value` (module, layer, rank), the same
        with the ending `_lm_head` for an adapted head, and the prior's hyper-parameters;
        `sample_stats`: `log_p` (log prior plus log-likelihood of the training rows), `log_q`, and
        over optimisation steps `elbo` and its terms;
        `log_likelihood`, `posterior_predictive`, `observed_data`: `y` over the rows of `data`.

    Raises:
        ValueError: When `num_samples` is not a positive multiple of 4.
    """
    if num_samples < CHAINS or num_samples % CHAINS:
        raise ValueError(f"num_samples must be a positive multiple of {CHAINS}; got {num_samples}")
    draws, adapters = fit.draws(fit.draw_key if key is None else key, num_samples)
    predicted = partial(predict_with_draws, fit.model, adapters, batch_size=batch_size)
    in_training = predicted(fit.train).log_probs_of(fit.train.labels)
    prediction = predicted(data)
    stats = {"log_p": np.asarray(draws.log_prior, np.float64) + in_training.sum(1), "log_q": draws.log_q}
    summaries = _summaries(fit.model.sites, adapters)
    groups = {
        "posterior": summaries.values | _hyper_parameters(fit.model.sites, draws.sites),
        "sample_stats": stats,
        "log_likelihood": {"y": prediction.log_probs_of(data.labels)},
        "posterior_predictive": {"y": _sample_classes(prediction.draw_log_probs)},
    }
    return _tree(jax.tree.map(_by_chain, groups), summaries, fit, data)


def _sample_classes(log_probs: np.ndarray) -> np.ndarray:
    """One class for each draw and row, by inverting the distribution function at a fixed uniform stream."""
    uniform = np.random.default_rng(0).random(log_probs.shape[:2])[..., None]
    return (np.exp(log_probs).cumsum(-1)[..., :-1] < uniform).sum(-1)


class Summaries(NamedTuple):
    """Draws of identifiable functions of the updates, with the names of their dimensions."""

    values: dict[str, np.ndarray]
    dims: dict[str, list[str]]
    coords: dict[str, list]


def _summaries(sites: Sites, adapters: Any) -> Summaries:
    """Norms and singular values, on one grid of module, layer and rank where the families allow it.

    Families of other layers or another rank get variables and dimensions of their own, named after them; so
    does the head, which has no layer.
    """
    grids: dict[tuple, list[str]] = {}
    for name, site in sites.items():
        grids.setdefault((site.module == HEAD, site.layers, site.rank), []).append(name)
    several = sum(not head for head, *_ in grids) > 1
    found = Summaries({}, {}, {})
    for (head, layers, rank), names in grids.items():
        pairs = [adapters[name] for name in names]
        scales = [abs(sites[name].scale) for name in names]
        grid = np.stack([c * singular_values(x["a"], x["b"]) for c, x in zip(scales, pairs, strict=True)], 1)
        own = f"_{'_'.join(names)}" if head or several else ""
        dims = [] if head else [f"module{own}", f"layer{own}"]
        grid = grid[:, 0, 0] if head else grid
        found.values.update({f"update_norm{own}": np.sqrt((grid**2).sum(-1)), f"singular_value{own}": grid})
        found.dims.update({f"update_norm{own}": dims, f"singular_value{own}": [*dims, f"rank{own}"]})
        found.coords.update(dict(zip(dims, (names, list(layers)), strict=False)))
        found.coords[f"rank{own}"] = list(range(1, rank + 1))
    return found


def _hyper_parameters(sites: Sites, draws: dict[str, Array]) -> dict[str, np.ndarray]:
    """The latent sites that belong to no family, such as a global scale."""
    return {n: np.asarray(x) for n, x in draws.items() if n.split(".")[0] not in sites}


def _by_chain(x: Any) -> np.ndarray:
    array = np.asarray(x)
    return array.reshape(CHAINS, -1, *array.shape[1:])


def _tree(groups: dict[str, dict[str, np.ndarray]], summaries: Summaries, fit: Any, data: Batch) -> Any:
    import arviz_base
    import xarray

    groups = {**groups, "observed_data": {"y": np.asarray(data.labels)}}
    dims = summaries.dims | {"y": ["row"]}
    # ArviZ's convention that a chain is longer than the number of chains is about MCMC; these draws are few.
    tree = arviz_base.from_dict(groups, dims=dims, coords=summaries.coords, check_conventions=False)
    trace = {name: ("step", values) for name, values in fit.history.items()}
    steps = {"step": np.arange(1, len(fit.step_seconds) + 1)}
    stats = tree["sample_stats"].to_dataset().assign(trace).assign_coords(steps)
    tree["sample_stats"] = xarray.DataTree(stats)
    return tree
