r"""How many nats each site and layer has learned: KL(q || p), the price of the fit by place.

    KL(q(x) || p(x)) = E_q[log q(x) - log p(x)]

For a site whose two laws are a pair that NumPyro knows, such as two normals, the integral over the site is
taken in closed form, given the sites above it; else one log-ratio stands for it. Both are averaged over
draws of the guide, and the standard error is that of the mean: zero where nothing of it is random. Sites
whose plate runs over layers have a term for each layer. Sites that a guide ties together (a vector over all
layers, or over several sites) have one for all of them, and none by layer.

What the prior itself weighs, by `numpyro.factor` or `obs=`, has an entry of its own, minus the mean of its
log-density. The terms then add up to the KL of the bound, `inducing_kl + conditional_kl`, but for what is
observed and weighs nothing: its density is a constant.

Reference: NumPyro's `TraceMeanField_ELBO`, which takes the same terms.
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
        family: The family that all of them are named after; empty where there is none or they differ.
        factor: The factor, "a" or "b", likewise.
        by_layer: KL in nats of each layer; None where it does not split over the layers of the family.
        by_layer_error: Monte Carlo standard errors, zero in closed form.
        total: KL in nats; NaN for points, which have no density.
        error: Monte Carlo standard error of it.
    """

    sites: tuple[str, ...]
    family: str
    factor: str
    by_layer: Float[np.ndarray, " layer"] | None
    by_layer_error: Float[np.ndarray, " layer"] | None
    total: float
    error: float


def divergence(fit: Fit | Sample) -> tuple[SiteDivergence, ...]:
    """KL divergence of posterior from prior, site by site and layer by layer.

    Args:
        fit: A fit, or a `Sample` of it.

    Returns:
        One entry for each latent site, in the order of the prior; sites that the guide ties together share
        one. Then one for each factor and observed site of the prior that weighs latent ones.
    """
    drawn = sample_of(fit)
    made = drawn.fit
    if not drawn.has_prior:
        return ()
    blocks = tied_sites(made) + tuple(((name,), (name,)) for name in weighed(made.model.prior))
    terms = made.by_keys(_terms, drawn.part(2), drawn.num_draws)
    found = {name: np.asarray(x, np.float64) for name, x in terms.items()}
    points = set(points_of(made))
    return tuple(_site(made.model.sites, names, parts, found, points) for names, parts in blocks)


def tied_sites(fit: Fit) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Groups of latent sites that share auxiliary sites of the guide: (latent names, all names) of each.

    An auxiliary site `<site>.q.<name>` belongs to the family of the guide that has this site. Those of other
    guides, such as NumPyro's own, belong to all sites that these set to a value.
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
    """Latent sites without a density: of a family that says so, or a lone Delta."""
    guide_sites, latent = _guide_sites(fit)
    tied = {name for names, parts in tied_sites(fit) if len(parts) > len(names) for name in names}
    said = {n for family, names in getattr(fit.guide, "groups", ()) if not family.has_density for n in names}
    return tuple(n for n in latent if n in said or (guide_sites[n] is dist.Delta and n not in tied))


def _guide_sites(fit: Fit) -> tuple[dict[str, type], tuple[str, ...]]:
    """Kind of law of every site of the guide, and the latent sites of the prior in its order."""
    return kept(fit, _looked_at)


def _looked_at(fit: Fit) -> tuple[dict[str, type], tuple[str, ...]]:
    kinds: dict[str, type] = {}
    latent: list[str] = []

    def run(key: Array, params: Any) -> None:
        guide_trace, prior_trace = traces(key, fit.model, fit.guide, params)
        kinds.update({n: type(unwrapped(s["fn"])) for n, s in guide_trace.items() if s["type"] == "sample"})
        latent.extend(n for n, s in prior_trace.items() if s["type"] == "sample" and not s["is_observed"])

    jax.eval_shape(run, jax.random.key(0), fit.params)  # names and kinds alone: nothing is computed
    return kinds, tuple(latent)


def _terms(fit: Fit, params: Any, key: Array) -> dict[str, Array]:
    """One term of the KL for each site of the guide, over the axes of its plates."""
    guide_trace, prior_trace = traces(key, fit.model, fit.guide, params)
    found = {}
    for name, site in guide_trace.items():
        if site["type"] != "sample":
            continue
        log_q = log_density_of(site)
        if name not in prior_trace:
            found[name] = jnp.sum(log_q)
            continue
        prior_site = prior_trace[name]
        try:
            found[name] = dist.kl_divergence(site["fn"], prior_site["fn"])
        except NotImplementedError:
            found[name] = log_q - log_density_of(prior_site)
    seen = {n: s for n, s in prior_trace.items() if s["type"] == "sample" and s["is_observed"]}
    return found | {name: -log_density_of(site) for name, site in seen.items()}


def _site(
    sites: Sites,
    names: tuple[str, ...],
    parts: tuple[str, ...],
    found: dict[str, np.ndarray],
    points: set[str],
) -> SiteDivergence:
    families, factors = zip(*(place(sites, name) for name in names), strict=True)
    family = families[0] if len(set(families)) == 1 else ""
    factor = factors[0] if family and len(set(factors)) == 1 else ""
    if points & set(names):
        return SiteDivergence(names, family, factor, None, None, np.nan, np.nan)
    total, error = _mean(sum(found[name].reshape(len(found[name]), -1).sum(1) for name in parts))
    layered = family and len(parts) == 1 and found[names[0]].shape[1:] == (sites[family].depth,)
    by_layer, by_layer_error = _mean(found[names[0]]) if layered else (None, None)
    return SiteDivergence(names, family, factor, by_layer, by_layer_error, float(total), float(error))


def place(sites: Sites, name: str) -> tuple[str, str]:
    """Family and factor of a site by its name `<family>.<factor>.<symbol>`, within any scope, or empty."""
    parts = name.rpartition("/")[2].split(".")
    family = parts[0] if parts[0] in sites else ""
    return family, parts[1] if family and len(parts) > 1 and parts[1] in FACTORS else ""


def _mean(values: Any) -> tuple[Any, Any]:
    """Mean over draws and its standard error; rounding of a constant is no error."""
    error = values.std(0, ddof=1) / len(values) ** 0.5
    return values.mean(0), np.where(np.ptp(values, axis=0) <= 1e-6 * np.abs(values).max(0), 0.0, error)
