r"""Explore a prior on the tangent model.

On the tangent model prior and posterior of the contrasts are Gaussians whose moments follow from sums of
matrices of the rows. `explore` computes these matrices once. A setting then costs some factorisations of one
matrix of the rows or of the coordinates, whichever are fewer, and no pass through the transformer.

Probabilities are integrals over the Gaussian of a row's contrasts, by a fixed rule with `POINTS` points. For
two classes the error of a probability is below 1e-4.

References: Rasmussen and Williams (2006), algorithms 3.1 and 3.2; Gabry et al. (2019), Visualization in
Bayesian workflow, arXiv 1709.01449.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy  # whose parts are imported when they are first used
from jaxtyping import Float
from rich.console import Console

from bnlora.assess.explore.explored import Explored
from bnlora.assess.explore.posterior import Moments, Programs, known
from bnlora.assess.explore.settings import (
    OFF,
    Law,
    Settings,
    check_settings,
    in_use,
    layers_of,
    rounded,
)
from bnlora.assess.prior_predictive import PriorPredictive
from bnlora.data.batch import Batch, check_rows
from bnlora.infer.core.scales import base_evidence, check_classes, linear_of, require_label_free
from bnlora.prediction.predict import Prediction
from bnlora.program.cache import cache_prefix
from bnlora.program.likelihoods import require_softmax
from bnlora.program.tangent.linear import Linear
from bnlora.program.tangent.model import Tangent

if TYPE_CHECKING:
    from bnlora.assess.explore.panel import Panel

POINTS = 256
"""Points of the quadrature rule of a row."""

MOST = 2 * 2**30
"""Largest size of the matrices of the rows, in bytes."""


def explore(
    tangent: Tangent,
    train: Batch,
    validation: Batch,
    *,
    scales: float | Mapping[str, float] = 1.0,
    texts: Sequence[str] | None = None,
    console: Console | None = None,
) -> "Explorer":
    """Explore the core prior of a tangent model: in Jupyter by controls, in a script by `Explorer.at`.

    In a notebook the returned object shows its controls: a scale for every family, the layers in use, how the
    scales come about, and how many training rows are in use. Prior predictive, evidence, posterior spread,
    reliability and the most uncertain rows follow every change, and so does code that reproduces them.

    Args:
        tangent: A tangent model. Its own prior is not used: neither scales nor what a carried prior knows.
        train: Training rows with labels, in random order, because settings use the first ones.
        validation: Other rows with labels, for predictions and scores. Not test rows: who moves a prior until
            the scores please chooses it by them.
        scales: Scales at the start in nats, for all families or by family, such as `scales.values` of
            `bnlora.choose_scales`; zero switches a family off.
        texts: Text of each validation row; if omitted, tokens are decoded where the base has a tokenizer.
        console: Where to draw the progress bar of the features.

    Returns:
        The explorer. `explorer.at(...)` is one setting, `explorer.panel()` the controls.

    Raises:
        ValueError: If rows have no labels or only one class, the classes have no softmax, a scale is
            negative or belongs to no family, there is not one text for each row, or the matrices of the rows
            are too large.

    Example:
        >>> explorer = bl.explore(tangent, rows[:6], rows[6:])
        >>> explorer.at(scales={"lm_head": 0.1}).spread.max() < explorer.at().spread.max()
        np.True_
    """
    require_softmax(tangent.likelihood, "bl.explore")
    check_rows("training", train, tangent)
    check_rows("validation", validation, tangent)
    check_classes(train)
    if texts is not None and len(texts) != len(validation):
        raise ValueError(
            f"texts must be one for each of the {len(validation)} validation rows; got {len(texts)}"
        )
    by_family = dict(scales) if isinstance(scales, Mapping) else dict.fromkeys(tangent.sites, scales)
    start = Settings(by_family, layers_of(tangent.sites), rows=len(train))
    check_settings(start, tangent.sites, len(train))
    start = replace(start, scales={name: float(by_family[name]) for name in tangent.sites})
    _require_memory(tangent, len(train), len(validation))
    train, new = (cache_prefix(tangent, batch, console=console) for batch in (train, validation))
    fitted, predicted = (linear_of(tangent, batch, by="layer")[0] for batch in (train, new))
    shown = tuple(texts) if texts is not None else _decoded(tangent, validation)
    return Explorer(tangent, train, new, start, shown, fitted, predicted)


@dataclass(frozen=True, repr=False, eq=False)
class Explorer:
    """A tangent model with what a change of its prior needs of the rows; `explore` makes it.

    Attributes:
        tangent: The tangent model.
        train: Training rows with their features.
        validation: Validation rows with their features.
        start: The settings at the start.
        texts: Texts of the validation rows; empty if unknown.
        train_model: The linear model of the training rows, with a group for each layer of a family.
        validation_model: That of the validation rows.

    Example:
        >>> bl.explore(tangent, rows[:6], rows[6:])
        Explorer(lm_head; 6 training rows, 2 validation rows)
    """

    tangent: Tangent
    train: Batch
    validation: Batch
    start: Settings
    texts: Sequence[str]
    train_model: Linear
    validation_model: Linear

    def at(
        self,
        *,
        scales: Mapping[str, float] | None = None,
        layers: Sequence[int] | None = None,
        law: Law = "fixed",
        width: float = 5.0,
        rows: int | None = None,
    ) -> Explored:
        """What follows from one prior.

        Args:
            scales: Prior standard deviation of a logit contrast in nats, by family; zero switches a family
                off. Families that are left out keep their scale at the start.
            layers: Numbers of the layers in use; all by default. Families of the head are not in a layer.
            law: `"fixed"`, or how scales are chosen by evidence: `"flat"`, `"half-normal"`, `"half-Cauchy"`
                or `"log-normal"`. The search starts at `scales`, from which they differ unless they are zero.
            width: Width of the density of the scales, in nats.
            rows: Number of training rows in use, the first ones; all by default.

        Raises:
            ValueError: If a scale is negative or belongs to no family, a layer or law does not exist, there
                are not so many rows or only one class among them, or the scales cannot be chosen: the
                frames were computed from labels, or the evidence has no maximum.
        """
        settings = Settings(
            {**self.start.scales, **(scales or {})},
            self.start.layers if layers is None else tuple(layers),
            law,
            width,
            len(self.train) if rows is None else rows,
        )
        check_settings(settings, self.tangent.sites, len(self.train))
        check_classes(self.train.plain[: settings.rows])
        on = in_use(settings, self.tangent.sites)
        by_group = self._scales(settings, on)
        moments = self._programs.moments(np.concatenate(list(by_group.values())), settings.rows)
        return self._explored(settings, {name: _stated(s) for name, s in by_group.items()}, moments)

    def panel(self) -> "Panel":
        """Controls for a notebook; its `result` is what they show.

        Raises:
            ModuleNotFoundError: If ipywidgets is not installed.
        """
        from bnlora.assess.explore.panel import Panel

        return Panel(self)

    def _ipython_display_(self) -> None:
        """Show the controls, or a sentence and the setting at the start where ipywidgets is missing."""
        from IPython.display import display

        try:
            display(self.panel().widget)
        except ModuleNotFoundError as error:
            print(error)
            display(self.at())

    def _scales(self, settings: Settings, on: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Scale of every layer of every family, `OFF` where it is not in use."""
        values = dict(settings.scales)
        if settings.law != "fixed":
            require_label_free(self.tangent)
            whole = np.concatenate(list(on.values()))
            start = np.array(list(values.values()))
            chosen = self._programs.chosen(start, whole, settings.rows, settings.law, settings.width)
            values = {name: rounded(scale) for name, scale in zip(values, chosen, strict=True)}
        return {name: np.where(used, values[name], OFF) for name, used in on.items()}

    @cached_property
    def _programs(self) -> Programs:
        depths = [site.depth for site in self.tangent.sites.values()]
        return Programs(known(self.train_model, self.validation_model), np.repeat(range(len(depths)), depths))

    def _explored(self, settings: Settings, scale: Mapping[str, Any], moments: Moments) -> Explored:
        offset, model = np.asarray(self.validation_model.offset), self.train_model
        kept = slice(settings.rows)
        used = model._replace(offset=model.offset[kept], labels=model.labels[kept])
        base = np.pad(offset, ((0, 0), (1, 0)))
        drawn = _logits(offset + moments.mean, moments.covariance, self._points)
        return Explored(
            settings=settings,
            scale=scale,
            log_evidence=float(moments.log_evidence),
            base_evidence=base_evidence(used),
            mean=offset + moments.mean,
            spread=_deviations(moments.covariance),
            prior_spread=_deviations(moments.prior),
            prior=PriorPredictive(_logits(offset, moments.prior, self._points), base),
            base=Prediction(scipy.special.log_softmax(base, axis=-1)[None]),
            prediction=Prediction(scipy.special.log_softmax(drawn, axis=-1)),
            labels=np.asarray(self.validation.labels),
            texts=self.texts,
        )

    @cached_property
    def _points(self) -> Float[np.ndarray, "s k"]:
        return normal_points(self.train_model.offset.shape[1], POINTS)

    def __repr__(self) -> str:
        families = ", ".join(self.tangent.sites)
        return (
            f"Explorer({families}; {len(self.train)} training rows, {len(self.validation)} validation rows)"
        )


def normal_points(size: int, count: int) -> Float[np.ndarray, "s k"]:
    """Points of equal weight for a standard normal vector, from cells of equal probability.

    In each coordinate there is one point in each of `count` cells, at the mean of the normal law in its cell.
    Sobol's sequence combines the cells of the coordinates; `count` is a power of two.
    """
    cells = (scipy.stats.qmc.Sobol(size, scramble=False).random(count) * count).astype(int)
    density = scipy.stats.norm.pdf(scipy.stats.norm.ppf(np.arange(count + 1) / count))
    return (count * (density[:-1] - density[1:]))[cells]


def _logits(
    mean: Float[np.ndarray, "i k"], covariance: Float[np.ndarray, "i k k"], points: Float[np.ndarray, "s k"]
) -> Float[np.ndarray, "s i c"]:
    """Logits at the points of every row's Gaussian, with zero for the first class."""
    values, vectors = np.linalg.eigh(covariance)  # a Cholesky factor may not exist where a family is off
    root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    contrasts = mean + np.einsum("ikl,sl->sik", root, points)
    return np.pad(contrasts, ((0, 0), (0, 0), (1, 0)))


def _deviations(covariance: Float[np.ndarray, "i k k"]) -> Float[np.ndarray, "i k"]:
    return np.sqrt(np.maximum(np.einsum("ikk->ik", covariance), 0.0))


def _stated(scales: Float[np.ndarray, " l"]) -> float | tuple[float, ...]:
    """One number where all layers agree, as `priors.core` accepts scales."""
    first, *others = map(float, scales)
    return (first, *others) if any(x != first for x in others) else first


def _decoded(tangent: Tangent, rows: Batch) -> tuple[str, ...]:
    """The texts of the rows, if the base has a tokenizer and a row is one text."""
    tokenizer = getattr(tangent.base, "tokenizer", None)
    if tokenizer is None or rows.choices is not None:
        return ()
    tokens, mask = np.asarray(rows.tokens), np.asarray(rows.mask)
    rows_of_tokens = (row[real] for row, real in zip(tokens, mask, strict=True))
    return tuple(tokenizer.decode(row, skip_special_tokens=True) for row in rows_of_tokens)


def _require_memory(tangent: Tangent, train: int, validation: int) -> None:
    """Raise `ValueError` if the matrices of the rows are too large."""
    contrasts = tangent.num_classes - 1
    groups = sum(site.depth for site in tangent.sites.values())
    if train * contrasts >= tangent.frames.num_coordinates:
        return
    size = 8 * groups * contrasts**2 * train * (train + validation)
    if size > MOST:
        share = (MOST / size) ** 0.5
        raise ValueError(
            f"bl.explore keeps a matrix of the rows for each of {groups} layers and families, "
            f"{size / 2**30:.1f} GiB, more than {MOST / 2**30:.0f} GiB; use at most {int(share * train)} "
            f"training and {int(share * validation)} validation rows, or frames of fewer layers"
        )
