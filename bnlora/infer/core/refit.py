r"""New rows for a fit under the core prior: the old posterior is the new prior.

| the old rows         | prior of the new fit                      | rows of the new fit | result            |
|----------------------|-------------------------------------------|---------------------|-------------------|
| kept (`kept=rows`)   | that of the old fit                       | old and new         | exact             |
| not kept             | a Gaussian, `bnlora.priors.carried`       | new                 | an approximation  |

p(u | y_old, y_new) is proportional to p(y_new | u) p(u | y_old), so with p(u | y_old) itself as the prior
both lines are the same. The second line has the Gaussian of the old fit in its place. Frames and scales stay
those of the old fit. `python -m benchmarks refit` measures how far the predictions of the two are apart.

The Gaussian of a fit whose own prior was carried is written in the coordinates of the core prior again, so
`keep` always forgets towards the core prior, and the size of the summary does not grow beyond the number of
coordinates.
"""

import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.checks import check_key
from bnlora._util.progress import timed
from bnlora.data.batch import Batch, check_rows
from bnlora.data.joined import join
from bnlora.guides import Guide, around
from bnlora.guides.affine import Affine
from bnlora.infer.core.fit import STEPS, CoreFit, fit_near
from bnlora.infer.core.gaussian import laplace
from bnlora.priors import Earlier, carried
from bnlora.priors.carried import carried_of
from bnlora.program.cache import cache_prefix
from bnlora.program.model import Classifier
from bnlora.program.tangent.model import Tangent

LEAST = 1e-9
"""Directions to which the earlier rows added less precision than this are left out."""


def refit(
    key: Array,
    old: CoreFit,
    new: Batch,
    *,
    kept: Batch | None = None,
    keep: float = 1.0,
    num_steps: int = STEPS,
    console: Console | None = None,
) -> CoreFit:
    """Fit new rows, with the posterior of an earlier fit as the prior.

    Args:
        key: Random key of guide draws.
        old: The earlier fit, from `bnlora.fit_core`, `bnlora.load_core` or this function.
        new: New rows with labels.
        kept: The rows of the earlier fit, or some of them, such as `old.fit.train`. The new fit then starts
            from the prior of the earlier fit, on these and the new rows together. To forget, keep fewer.
        keep: Without `kept`, how much of what the earlier rows taught is kept: 1 all, 0 nothing.
        num_steps: Steps of the variational fit.
        console: Where to draw progress bars.

    Returns:
        The posterior after all rows. Frames and scales are those of the earlier fit; the evidence of
        `gaussian` is that of the new rows given the earlier ones, or with `kept` that of all rows.

    Raises:
        ValueError: If rows have no labels, `keep` is outside 0 to 1 or given together with `kept`, or the
            rows cannot be joined.

    Example:
        >>> after = bl.refit(key, core_fit, rows[:3], num_steps=4)  # its own rows are not needed any more
        >>> exact = bl.refit(key, core_fit, rows[:3], kept=core_fit.fit.train, num_steps=4)
        >>> len(after.fit.train), len(exact.fit.train) - len(core_fit.fit.train)
        (3, 3)
    """
    key = check_key(key)
    check_rows("new", new, old.model)
    if kept is not None and keep != 1.0:
        raise ValueError(
            f"keep={keep!r} is for a summary of the earlier rows; with kept rows, forget by keeping fewer of "
            "them, such as kept=rows[-500:]"
        )
    seconds: dict[str, float] = {}
    tangent = old.model
    if kept is None:
        prior = carried(old.frames, scale=old.scales.values, earlier=earlier_of(old).forgotten(keep))
        tangent = Tangent(Classifier(tangent.base, tangent.sites, prior, likelihood=tangent.likelihood))
    with timed(seconds, "features"):
        rows = cache_prefix(tangent, new, console=console)
        if kept is not None:
            rows = join(cache_prefix(tangent, kept, console=console), rows)
    with timed(seconds, "Laplace"):
        gaussian = laplace(tangent, rows, console=console)
    with timed(seconds, "variational fit"):
        guide = Guide(tangent.prior, around(gaussian))
        fitted = fit_near(key, tangent, guide, rows, num_steps=num_steps, console=console)
    return CoreFit(old.frames, old.scales, gaussian, fitted, seconds)


def earlier_of(fit: CoreFit) -> Earlier:
    """The variational posterior of a fit, as a Gaussian over the cores in the coordinates of the core prior.

    Args:
        fit: A fit under `priors.core` with fixed scales, as `bnlora.fit_core` makes it.

    Raises:
        ValueError: If scales are random.

    Example:
        >>> earlier_of(core_fit).mean.shape == (core_fit.frames.num_coordinates,)
        True
    """
    affine = _variational(fit)
    if len(affine.at):
        raise ValueError(
            "the scales of this fit are random; a summary needs fixed scales, as bl.fit_core has"
        )
    mean, vectors = (np.asarray(x, np.float64) for x in (affine.centre, affine.vectors))
    excess = np.asarray(affine.gains, np.float64) ** -2 - 1
    before = carried_of(fit.model.prior)
    if before is None:
        return Earlier(mean, vectors, excess)
    # u = m + S w, with the precision I + V diag(e) V^T of w: S^-1 (...) S^-1 is the precision of u.
    earlier = before.earlier
    inverse = vectors + earlier.vectors @ ((1 / earlier.sd - 1)[:, None] * (earlier.vectors.T @ vectors))
    columns = np.concatenate([earlier.vectors, inverse], axis=1)
    weights = np.concatenate([np.asarray(earlier.excess), excess])
    return Earlier(np.asarray(earlier.cores(mean)), *_orthonormal(columns, weights))


def _variational(fit: CoreFit) -> Affine:
    """The affine map of the guide of a fit: that of Laplace's Gaussian, moved along its directions."""
    known = fit.gaussian.affine
    values = {name.rsplit(".", 1)[-1]: np.asarray(x, np.float64) for name, x in fit.fit.params.items()}
    rank = known.vectors.shape[1]
    loc, scale = values["along_loc"][:rank], values["along_scale"][:rank]
    moved = np.asarray(known.centre) + np.asarray(known.vectors) @ (np.asarray(known.gains) * loc)
    return known._replace(centre=moved, gains=np.asarray(known.gains) * scale)


def _orthonormal(
    columns: Float[np.ndarray, "d k"], weights: Float[np.ndarray, " k"]
) -> tuple[Float[np.ndarray, "d r"], Float[np.ndarray, " r"]]:
    """Orthonormal V and e with V diag(e) V^T = C diag(w) C^T, for any columns C."""
    basis, triangle = np.linalg.qr(columns)
    values, vectors = np.linalg.eigh((triangle * weights) @ triangle.T)
    some = np.abs(values) > LEAST
    return basis @ vectors[:, some], values[some]
