r"""Scales of the core prior by evidence: automatic relevance determination over families or layers.

    s* = argmax log p(y | s)  +  log p(s),      log p(y | s) by Laplace (`bnlora.program.tangent.linear`)

A family whose scale goes to zero is switched off. The scales are those of `priors.core`, in nats of a logit
contrast. Without p(s) this is type-II maximum likelihood: it overfits with few rows, and differences below
about one nat for each additional scale are not meaningful. With p(s) it is the mode of log s, which is finite
on separable rows too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import scipy
from jax import Array
from rich.console import Console

from bnlora._util.checks import check_option
from bnlora._util.display import Shown, Table
from bnlora.data.batch import Batch, check_rows
from bnlora.priors.hyper import require_positive
from bnlora.program.cache import cache_prefix
from bnlora.program.likelihoods import require_softmax
from bnlora.program.tangent.linear import Linear, Mode, in_float64, laplace_mode
from bnlora.program.tangent.model import Tangent

By = Literal["family", "layer"]
LOWEST, HIGHEST = np.log(1e-3), np.log(1e2)
"""Bounds of the log scales. A maximum at the upper bound means that the evidence has no maximum."""

STARTS = (0.5, 3.0)
"""Start values of all scales, in nats; the better of two climbs is used."""

ABSENT = -60.0
"""Log scale of a group that is left out: exp(-60) is zero in practice."""

OFF = 0.01
"""A family with a scale up to this size, in nats, counts as switched off."""


@dataclass(frozen=True)
class Scales(Shown):
    """Chosen scales, with the evidence for each.

    Attributes:
        values: Scale by family, as `priors.core(frames, scale=...)` accepts them: a number, or one for each
            layer.
        log_evidence: Laplace's approximation of log p(y | scales), in nats.
        without: The log evidence without a family (or layer), by name, with the other scales chosen again.
            The evidence given up by `within` is subtracted here too, so `log_evidence` minus this value is
            the gain at the maximum.
        base: Log-likelihood of the untouched base, which is the evidence with all scales zero.
        stderr: Standard deviation of each log scale by name, from the curvature at the maximum; infinite if
            the scale is off.

    Example:
        >>> chosen = bl.choose_scales(tangent, rows, prior=dist.HalfNormal(1.0))
        >>> sorted(chosen.values)
        ['lm_head']
    """

    values: Mapping[str, float | np.ndarray]
    log_evidence: float
    without: Mapping[str, float]
    base: float
    stderr: Mapping[str, float]

    @property
    def by_name(self) -> dict[str, float]:
        """Scale by family, or by family and layer."""
        scales: dict[str, float] = {}
        for name, value in self.values.items():
            if np.ndim(value):
                scales |= {f"{name}[{i}]": float(x) for i, x in enumerate(np.asarray(value))}
            else:
                scales[name] = float(value)
        return scales

    @property
    def caution(self) -> str:
        """A warning if the evidence is below that of the untouched base; otherwise empty."""
        if self.log_evidence >= self.base:
            return ""
        return (
            f"The evidence is {self.base - self.log_evidence:.1f} nats below that of the untouched base: "
            "the prior of the scales dominates the rows. Use a narrower prior, such as "
            "dist.HalfNormal(1.0), more rows, or the base without adapters."
        )

    @property
    def overview(self) -> tuple[Table | str, ...]:
        """Scale and evidence of every family."""
        rows = []
        for name, value in self.by_name.items():
            low, high = (value * np.exp(sign * 1.96 * self.stderr[name]) for sign in (-1, 1))
            shown = ("off", "") if value <= OFF else (f"{value:.2f}", f"{low:.2f} to {high:.2f}")
            rows.append((name, *shown, f"{self.log_evidence - self.without[name]:+.1f}"))
        title = f"Log evidence {self.log_evidence:,.1f} nats; untouched base {self.base:,.1f}"
        table = Table(title, ("scale of", "nats", "95 %", "gain in evidence"), tuple(rows))
        return (table, self.caution) if self.caution else (table,)

    def __repr__(self) -> str:
        shown = ", ".join(f"{n} {v:.2f}" if v > OFF else f"{n} off" for n, v in self.by_name.items())
        below = ", below the base's: see `caution`" if self.caution else ""
        return f"Scales({shown}; log evidence {self.log_evidence:,.1f} nats, base {self.base:,.1f}{below})"


def choose_scales(
    tangent: Tangent,
    train: Batch,
    *,
    by: By = "family",
    prior: dist.Distribution | None = None,
    within: float = 0.0,
    console: Console | None = None,
) -> Scales:
    """Choose the scales of the core prior by Laplace's evidence.

    Args:
        tangent: A tangent model. Its own prior is not used: neither scales nor what a carried prior knows.
        train: Rows with labels.
        by: One scale for each family, or one for each layer of a family.
        prior: Distribution of each scale, independently; no prior if omitted.
        within: Nats of evidence to trade for smaller scales: all scales are multiplied by the one factor at
            which the evidence is this far below its maximum. The rows hardly distinguish the two choices,
            and smaller scales keep predictions closer to the base on rows that differ from the training rows.
        console: Where to draw progress bars.

    Returns:
        The scales. Use them as `priors.core(frames, scale=scales.values)`.

    Raises:
        ValueError: If the frames were computed from labels, rows have no labels or only one class, `prior` is
            not a distribution of positive values, `within` is negative, or the evidence has no maximum, as
            on separable rows.

    Example:
        >>> chosen = bl.choose_scales(tangent, rows, prior=dist.HalfNormal(1.0))
        >>> prior = bl.priors.core(frames, scale=chosen.values)
        >>> at_them = bl.laplace(tangent.with_prior(prior), rows).log_evidence
        >>> bool(np.isclose(at_them, chosen.log_evidence))
        True
    """
    check_option("by", by, get_args(By))
    _check_prior(prior)
    if not 0 <= within < np.inf:
        raise ValueError(f"within must be a number of nats of at least zero; got {within!r}")
    require_label_free(tangent)
    require_softmax(tangent.likelihood, "the choice of scales by evidence")
    check_rows("training", train, tangent)
    model, names = linear_of(tangent, cache_prefix(tangent, train, console=console), by=by)
    check_classes(train)
    value, all_on = _objective(model, prior), np.ones(len(names), bool)
    optimum = maximise(value, all_on, [np.full(len(names), np.log(s)) for s in STARTS])
    if prior is None and (optimum > HIGHEST - 0.01).any():
        where = names[int(optimum.argmax())]
        raise ValueError(
            f"the evidence has no maximum: it still grows at a scale of {np.exp(HIGHEST):.0f} nats for "
            f"{where}, as on separable rows; give the scales a prior, such as prior=dist.HalfNormal(1.0)"
        )
    stderr = dict(zip(names, _stderr(value, optimum), strict=True))
    highest = value(optimum, all_on)[2]
    lowered = optimum + _lowered(lambda shift: value(optimum + shift, all_on)[2], highest, within)
    evidence = highest if not within else value(lowered, all_on)[2]
    without = {}
    for index, name in enumerate(names):
        on = np.arange(len(names)) != index
        off = np.exp(optimum[index]) <= OFF
        best = highest if off else value(maximise(value, on, [optimum]), on)[2]
        without[name] = best - (highest - evidence)  # subtract the same loss as for the chosen scales
    scales = np.exp(lowered)
    return Scales(_by_family(tangent, names, scales, by), evidence, without, base_evidence(model), stderr)


def _check_prior(prior: object) -> None:
    """Raise `ValueError` unless `prior` is None or a distribution of positive values."""
    if prior is not None and not isinstance(prior, dist.Distribution):
        raise ValueError(
            f"prior must be a distribution of positive values, such as dist.HalfNormal(1.0); got {prior!r}"
        )
    if prior is not None:
        require_positive("prior", prior)


def require_label_free(tangent: Tangent) -> None:
    """Raise `ValueError` if the frames were computed from labels: p(y | frames) is then not an evidence."""
    if not tangent.frames.label_free:
        raise ValueError(
            "these frames were computed from labels, so the evidence would count the labels twice; use "
            "frames without labels, such as bl.frames(...), or choose scales on other rows"
        )


def check_classes(train: Batch) -> None:
    """Raise `ValueError` if all rows have the same label."""
    if len(np.unique(np.asarray(train.labels))) < 2:
        raise ValueError("the training rows must have at least two classes; all of them have one label")


def linear_of(tangent: Tangent, batch: Batch, *, by: By) -> tuple[Linear, tuple[str, ...]]:
    """The linear model of prepared rows, with one group at scale one for each family or layer, and names."""
    offset, phi = (np.asarray(x, np.float64) for x in tangent.features(tangent.base.weights, batch))
    groups, begin = [], 0
    names: list[str] = []
    for name in tangent.sites:
        frame = tangent.frames[name]
        labels = [name] if by == "family" else [f"{name}[{index}]" for index in range(frame.size[0])]
        end = begin + int(np.prod(frame.size))
        groups += np.split(phi[:, :, begin:end] / frame.unit, len(labels), axis=2)
        names, begin = names + labels, end
    model = Linear(offset[:, 1:] - offset[:, :1], groups, np.asarray(batch.labels))
    return in_float64(model), tuple(names)


def base_evidence(model: Linear) -> float:
    """Log-likelihood of the untouched base, in nats."""
    logits = np.pad(model.offset, ((0, 0), (1, 0)))
    log_probs = scipy.special.log_softmax(logits, axis=1)
    return float(np.take_along_axis(log_probs, np.asarray(model.labels)[:, None], axis=1).sum())


class Evidence(NamedTuple):
    """Laplace's log evidence as a JAX function of the log scales.

    Attributes:
        model: The linear model. If `in_rows`, its groups are replaced by Gram matrices, shape (g, m, m).
        in_rows: Whether to compute in rows.
    """

    model: Linear
    in_rows: bool

    @classmethod
    def of(cls, model: Linear) -> "Evidence":
        """The evidence of a linear model."""
        if not model.in_rows:
            return cls(model, in_rows=False)
        flat = [np.asarray(group).reshape(model.offset.size, -1) for group in model.groups]
        return cls(model._replace(groups=np.stack([x @ x.T for x in flat])), in_rows=True)

    def mode(self, log_scales: Array) -> Mode:
        """The mode at some log scales; call it in double precision."""
        if self.in_rows:
            kernel = jnp.tensordot(jnp.exp(2 * log_scales), jnp.asarray(self.model.groups), 1)
        else:
            kernel = self.model.design(log_scales)
        return laplace_mode(self.model, kernel, in_rows=self.in_rows)


Objective = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray, float]]
"""Maps log scales, and a mask of active groups, to the objective, its gradient and the evidence."""


def _objective(model: Linear, prior: dist.Distribution | None) -> Objective:
    """The evidence plus the log-density of the log scales, by one compiled program for all sets of groups."""
    evidence = Evidence.of(model)

    def value(log_scales: np.ndarray, on: np.ndarray) -> tuple[float, np.ndarray, float]:
        with jax.enable_x64(new_val=True):
            at = jnp.asarray(log_scales, jnp.float64)
            (objective, log_p), slope = _total(at, on, evidence.model, prior, in_rows=evidence.in_rows)
            return float(objective), np.asarray(slope), float(log_p)

    return value


@partial(jax.jit, static_argnames="in_rows")  # one program for all rows and priors of these shapes
@partial(jax.value_and_grad, has_aux=True)
def _total(
    log_scales: Array, on: Array, data: Linear, prior: dist.Distribution | None, *, in_rows: bool
) -> tuple[Array, Array]:
    """Objective, evidence, and the derivative of the objective."""
    log_p = Evidence(data, in_rows).mode(jnp.where(on, log_scales, ABSENT)).log_evidence
    if prior is None:
        return log_p, log_p
    # Density of log s: p(s) times the Jacobian s.
    return log_p + jnp.where(on, prior.log_prob(jnp.exp(log_scales)) + log_scales, 0.0).sum(), log_p


def maximise(
    value: Objective, on: np.ndarray, starts: Sequence[np.ndarray], *, slope: float = 1e-5
) -> np.ndarray:
    """The best log scales of all climbs, each up to a `slope` in nats; inactive groups keep their start."""
    best: tuple[np.ndarray, float] = starts[0], np.inf
    if not on.any():
        return best[0]
    for first in starts:

        def negative(x: np.ndarray, first: np.ndarray = first) -> tuple[float, np.ndarray]:
            objective, gradient, _ = value(np.where(on, _spread(x, on), first), on)
            return -objective, -gradient[on]

        options = {"bounds": [(LOWEST, HIGHEST)] * int(on.sum()), "options": {"gtol": slope}}
        optimum = scipy.optimize.minimize(negative, first[on], jac=True, method="L-BFGS-B", **options)
        if optimum.fun < best[1] - 1e-6:
            best = np.where(on, _spread(optimum.x, on), first), optimum.fun
    return best[0]


def _lowered(evidence: Callable[[float], float], highest: float, within: float) -> float:
    """The shift of all log scales that costs `within` nats of evidence; `highest` is the evidence at zero."""
    if not within:
        return 0.0
    lowest, wanted = float(LOWEST - HIGHEST), highest - within
    if evidence(lowest) > wanted:  # even the base itself loses less than `within`
        return lowest
    return float(scipy.optimize.brentq(lambda shift: evidence(shift) - wanted, lowest, 0.0, xtol=1e-4))


def _spread(x: np.ndarray, on: np.ndarray) -> np.ndarray:
    """The values of the active groups in a vector over all groups, with zeros elsewhere."""
    whole = np.zeros(len(on))
    whole[on] = x
    return whole


def _stderr(value: Objective, optimum: np.ndarray, step: float = 1e-3) -> np.ndarray:
    """Standard deviations of log scales from the curvature; infinite for scales that are off."""
    on, every = np.exp(optimum) > OFF, np.ones(len(optimum), bool)
    stderr = np.full(len(optimum), np.inf)
    if not on.any():
        return stderr
    # Hessian by central differences of the gradient, over the active scales only.
    shifts = step * np.eye(len(optimum))[on]
    changes = np.stack([value(optimum + d, every)[1] - value(optimum - d, every)[1] for d in shifts])
    slopes = changes[:, on] / (2 * step)
    values, vectors = np.linalg.eigh(-(slopes + slopes.T) / 2)
    variance = (vectors**2 / np.maximum(values, 1e-6)).sum(1)  # diagonal of the inverse, with a floor
    stderr[on] = np.sqrt(variance)
    return stderr


def _by_family(
    tangent: Tangent, names: tuple[str, ...], scales: np.ndarray, by: By
) -> dict[str, float | np.ndarray]:
    if by == "family":
        return dict(zip(names, map(float, scales), strict=True))
    by_family: dict[str, float | np.ndarray] = {}
    begin = 0
    for name in tangent.sites:
        depth = tangent.frames[name].size[0]
        by_family[name] = scales[begin : begin + depth]
        begin += depth
    return by_family
