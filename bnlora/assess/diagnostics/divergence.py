r"""How many nats has each site and layer learned? KL(q || p) by site and layer.

    KL(q(x) || p(x)) = E_q[log q(x) - log p(x)]

If NumPyro has a closed form for the two laws of a site, such as two normals, it is used, given the parent
sites. Otherwise the term is the log-ratio at a draw. Both are averaged over draws of the guide, with the
standard error of the mean, which is zero for a constant. Sites with a plate over layers have one term for
each layer. Sites that a guide ties together (a vector over all layers, or over several sites) have one term
for all of them, and none by layer.

Each `numpyro.factor` and each `obs=` site of the prior that depends on latent sites has its own entry: minus
the mean of its log-density. The terms then sum to the KL of the bound, `inducing_kl + conditional_kl`, except
for observed sites that do not depend on latent ones, whose density is a constant.

Reference: NumPyro's `TraceMeanField_ELBO` uses the same terms.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from bnlora._util.compilation import kept
from bnlora._util.typing import FACTORS
from bnlora.adapters.sites import Sites
from bnlora.assess.diagnostics.sample import Sample, sample_of
from bnlora.infer.svi.result import Fit
from bnlora.priors.declared import unwrapped, weighed
from bnlora.program.draws import log_density_of, traces


@dataclass(frozen=True)
class SiteDivergence:
    """KL divergence of one latent site, or of several that the guide ties together.

    Attributes:
        sites: Names of the sites.
        family: Their common family, from the names; empty if there is none.
        factor: Their common factor, "a" or "b"; empty if there is none.
        by_layer: KL in nats of each layer; None if it does not split over the layers of the family.
        by_layer_error: Monte Carlo standard errors; zero for a closed form that does not vary.
        total: KL in nats; NaN for points, which have no density.
        error: Monte Carlo standard error of `total`.
    """

    sites: tuple[str, ...]
    family: str
    factor: str
    by_layer: Float[np.ndarray, " layer"] | None
    by_layer_error: Float[np.ndarray, " layer"] | None
    total: float
    error: float


def divergence(fit: Fit | Sample) -> tuple[SiteDivergence, ...]:
    """KL divergence of the posterior from the prior, by site and layer.

    Args:
        fit: A fit, or a `Sample` of it.

    Returns:
        One entry for each latent site, in the order of the prior; sites that the guide ties together share
        one. Then one for each `numpyro.factor` and observed site of the prior that depends on latent sites.
    """
    sample = sample_of(fit)
    fit = sample.fit
    if not sample.has_prior:
        return ()
    blocks = tied_sites(fit) + tuple(((name,), (name,)) for name in weighed(fit.model.prior))
    draws = fit.by_keys(_terms, sample.part(2), sample.num_draws)
    terms = {name: np.asarray(x, np.float64) for name, x in draws.items()}
    points = set(points_of(fit))
    return tuple(_site(fit.model.sites, names, parts, terms, points) for names, parts in blocks)


def tied_sites(fit: Fit) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Groups of latent sites that share auxiliary sites of the guide: (latent names, all names) of each.

    An auxiliary site `<site>.q.<name>` belongs to the family of the guide that contains the site. Auxiliary
    sites of other guides, such as NumPyro's autoguides, belong to all sites that the guide sets to a value.
    """
    guide_sites, latent = _guide_sites(fit)
    groups = [names for family, names in getattr(fit.guide, "groups", ()) if family.joint]
    set_by_others = tuple(name for name in latent if guide_sites[name] is dist.Delta)
    owners: dict[str, tuple[str, ...]] = {name: (name,) for name in latent}
    extra: dict[tuple[str, ...], list[str]] = {}
    for name in guide_sites:
        if name in latent:
            continue
        owner = name.split(".q.")[0]
        if owner in latent:
            block = next((tuple(g) for g in groups if owner in g), (owner,))
        else:
            block = set_by_others
        extra.setdefault(block, []).append(name)
        owners.update(dict.fromkeys(block, block))
    unique = dict.fromkeys(owners[name] for name in latent)
    return tuple((block, block + tuple(extra.get(block, ()))) for block in unique)


def points_of(fit: Fit) -> tuple[str, ...]:
    """Latent sites without a density: of a family without density, or a Delta without auxiliary sites."""
    guide_sites, latent = _guide_sites(fit)
    tied = {name for names, parts in tied_sites(fit) if len(parts) > len(names) for name in names}
    groups = getattr(fit.guide, "groups", ())
    pointlike = {n for family, names in groups if not family.has_density for n in names}
    return tuple(n for n in latent if n in pointlike or (guide_sites[n] is dist.Delta and n not in tied))


def _guide_sites(fit: Fit) -> tuple[dict[str, type], tuple[str, ...]]:
    """Class of the distribution of every guide site, and latent sites of the prior in order; cached."""
    return kept(fit, _looked_at)


def _looked_at(fit: Fit) -> tuple[dict[str, type], tuple[str, ...]]:
    kinds: dict[str, type] = {}
    latent: list[str] = []

    def run(key: Array, params: Any) -> None:
        guide_trace, prior_trace = traces(key, fit.model, fit.guide, params)
        kinds.update({n: type(unwrapped(s["fn"])) for n, s in guide_trace.items() if s["type"] == "sample"})
        latent.extend(n for n, s in prior_trace.items() if s["type"] == "sample" and not s["is_observed"])

    jax.eval_shape(run, jax.random.key(0), fit.params)  # abstract: reads names and classes, computes nothing
    return kinds, tuple(latent)


def _terms(fit: Fit, params: Any, key: Array) -> dict[str, Array]:
    """Term of the KL for each site of the guide, with the axes of its plates, at one draw, in nats."""
    guide_trace, prior_trace = traces(key, fit.model, fit.guide, params)
    terms = {}
    for name, site in guide_trace.items():
        if site["type"] != "sample":
            continue
        log_q = log_density_of(site)
        if name not in prior_trace:
            terms[name] = jnp.sum(log_q)
            continue
        prior_site = prior_trace[name]
        try:
            terms[name] = dist.kl_divergence(site["fn"], prior_site["fn"])
        except NotImplementedError:
            terms[name] = log_q - log_density_of(prior_site)
    seen = {n: s for n, s in prior_trace.items() if s["type"] == "sample" and s["is_observed"]}
    return terms | {name: -log_density_of(site) for name, site in seen.items()}


def _site(
    sites: Sites,
    names: tuple[str, ...],
    parts: tuple[str, ...],
    terms: dict[str, np.ndarray],
    points: set[str],
) -> SiteDivergence:
    """Mean over draws of the terms of one group of sites."""
    families, factors = zip(*(place(sites, name) for name in names), strict=True)
    family = families[0] if len(set(families)) == 1 else ""
    factor = factors[0] if family and len(set(factors)) == 1 else ""
    if points & set(names):
        return SiteDivergence(names, family, factor, None, None, np.nan, np.nan)
    total, error = _mean(sum(terms[name].reshape(len(terms[name]), -1).sum(1) for name in parts))
    layered = family and len(parts) == 1 and terms[names[0]].shape[1:] == (sites[family].depth,)
    by_layer, by_layer_error = _mean(terms[names[0]]) if layered else (None, None)
    return SiteDivergence(names, family, factor, by_layer, by_layer_error, float(total), float(error))


def place(sites: Sites, name: str) -> tuple[str, str]:
    """Family and factor of a site by its name `<family>.<factor>.<symbol>`, within any scope, or empty."""
    parts = name.rpartition("/")[2].split(".")
    family = parts[0] if parts[0] in sites else ""
    return family, parts[1] if family and len(parts) > 1 and parts[1] in FACTORS else ""


def _mean(values: Any) -> tuple[Any, Any]:
    """Mean over draws and its standard error; zero if the values differ only by rounding."""
    error = values.std(0, ddof=1) / len(values) ** 0.5
    return values.mean(0), np.where(np.ptp(values, axis=0) <= 1e-6 * np.abs(values).max(0), 0.0, error)
