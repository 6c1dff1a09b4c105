"""What follows from one prior: prior predictive, evidence, predictions, and code that reproduces them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from bnlora import metrics
from bnlora._util.display import Showable, Shown, Table, as_html
from bnlora.assess.explore import drawing
from bnlora.assess.explore.settings import OFF, Settings
from bnlora.assess.prior_predictive import PriorPredictive
from bnlora.prediction.predict import Prediction

SCORES = {
    "accuracy": metrics.accuracy,
    "NLL (nats)": metrics.nll,
    "Brier score": metrics.brier,
    "ECE": metrics.ece,
}
"""Scores of the validation rows."""

SHOWN = 8
"""Number of the most uncertain rows in the table."""

TITLE = "Most uncertain validation rows; entropy and its part from the weights in nats"
"""Title of the most uncertain rows."""

STYLE = (
    "<style>.explored { line-height: 1.35 } .explored td:not(:first-child) { white-space: nowrap }</style>"
)
"""Lines of text are as close as elsewhere on the page, and numbers do not break where it is narrow."""

LONGEST = 140
"""Largest number of letters of a text in the table."""


@dataclass(frozen=True, repr=False, eq=False)
class Explored(Shown):
    """A prior on the tangent model, and what follows from it on validation rows.

    The draws of `prior` and `prediction` are the points of one quadrature rule in every row. They integrate
    over the Gaussian of the row's contrasts, but are no joint draws of several rows.

    Attributes:
        settings: The settings.
        scale: Scale by family in nats, as `priors.core` accepts it: a number, or one for each layer.
        log_evidence: Laplace's approximation of log p(y) of the training rows in use, in nats.
        base_evidence: Log-likelihood of the untouched base on the same rows.
        mean: Posterior mean of the contrasts, each class against the first.
        spread: Posterior standard deviation of the contrasts, in nats.
        prior_spread: Their standard deviation under the prior.
        prior: Prior predictive distribution.
        base: Prediction of the untouched base.
        prediction: Posterior predictive distribution.
        labels: Classes of the validation rows.
        texts: Texts of the validation rows; empty if unknown.

    Example:
        >>> explored = bl.explore(tangent, rows[:6], rows[6:]).at(scales={"lm_head": 2.0})
        >>> explored.prediction.probs.shape, explored.scale
        ((2, 2), {'lm_head': 2.0})
    """

    settings: Settings
    scale: Mapping[str, float | tuple[float, ...]]
    log_evidence: float
    base_evidence: float
    mean: Float[np.ndarray, "n k"]
    spread: Float[np.ndarray, "n k"]
    prior_spread: Float[np.ndarray, "n k"]
    prior: PriorPredictive
    base: Prediction
    prediction: Prediction
    labels: Int[np.ndarray, " n"]
    texts: Sequence[str] = ()

    @cached_property
    def scores(self) -> dict[str, float]:
        """Scores of the posterior predictive distribution on the validation rows."""
        return {name: score(self.prediction, self.labels) for name, score in SCORES.items()}

    @cached_property
    def base_scores(self) -> dict[str, float]:
        """Scores of the untouched base on the same rows."""
        return {name: score(self.base, self.labels) for name, score in SCORES.items()}

    @cached_property
    def most_uncertain(self) -> Int[np.ndarray, " n"]:
        """Validation rows in the order of their entropy, the most uncertain first."""
        return np.argsort(-self.prediction.entropy, kind="stable")

    @property
    def code(self) -> str:
        """Python code that reproduces the posterior with `tangent`, `train` and `validation`."""
        rows = f"[:{self.settings.rows}]"
        lines = [
            "# `tangent`, `train` and `validation` are the arguments of bl.explore.",
            "import bnlora as bl",
            "import jax",
            "import numpy as np",
            "",
            f"scale = {{  # nats{self._how}",
            *(f"    {name!r}: {_written(value)}," for name, value in self.scale.items()),
            "}",
            "model = tangent.with_prior(bl.priors.core(tangent.frames, scale=scale))",
            f"gaussian = bl.laplace(model, train{rows})",
            "prediction = bl.predict(jax.random.key(0), gaussian, validation, num_draws=256)",
            "print(gaussian.log_evidence)",
            "print(bl.metrics.summary(jax.random.key(1), prediction, validation))",
        ]
        return "\n".join(lines) + "\n"

    @property
    def _how(self) -> str:
        """How the scales came about, as the end of a comment."""
        off = f"; {OFF:g} is off" if any(np.min(value) == OFF for value in self.scale.values()) else ""
        law = self.settings.law
        if law == "fixed":
            return off
        under = "" if law == "flat" else f" under a {law} law of width {self.settings.width:g}"
        return f", chosen by evidence{under}{off}"

    @property
    def table(self) -> Table:
        """Evidence and scores, beside those of the untouched base."""
        return numbers(self)

    @property
    def uncertain(self) -> Table:
        """The most uncertain validation rows."""
        rows, prediction = self.most_uncertain[:SHOWN], self.prediction
        entropy, information = prediction.entropy, prediction.mutual_information
        texts = [_shortened(self.texts[i]) for i in rows] if len(self.texts) else [""] * len(rows)
        cells = tuple(
            (str(i), str(self.labels[i]), f"{prediction.probs[i, self.labels[i]]:.2f}",
             f"{entropy[i]:.2f}", f"{information[i]:.3f}", text)
            for i, text in zip(rows, texts, strict=True)
        )  # fmt: skip
        header = ("row", "label", "p(label)", "entropy", "from the weights", "text")
        if not len(self.texts):
            return Table(TITLE, header[:-1], tuple(row[:-1] for row in cells))
        return Table(TITLE, header, cells, texts=frozenset({5}))

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Evidence and scores, scales, the verdict on the prior, and the most uncertain rows."""
        return (self.table, self.prior.verdict, self.uncertain)

    def html(self, before: "Explored | None" = None) -> str:
        """Tables and pictures for a notebook; numbers of a setting before stand beside the present ones."""
        lowest = 1 / self.prediction.draw_log_probs.shape[2]
        confidences = {
            "base": self.base.probs.max(1),
            "prior": self.prior.probs.max(-1).ravel(),
            "posterior": self.prediction.probs.max(1),
        }
        figures = (
            drawing.figure(
                drawing.confidences(confidences, lowest),
                "Confidence of the base, of draws of the prior, and of the posterior.",
            ),
            drawing.figure(
                drawing.spreads(self.prior_spread, self.spread),
                "Spread of each contrast; a dot on the dashed line has learned nothing.",
            ),
            drawing.figure(
                drawing.reliability(self.prediction, self.labels),
                "Reliability with 95 % intervals; grey: share of the rows.",
            ),
        )
        top = as_html((numbers(self, before), f"Prior: {self.prior.verdict}"))
        rows = as_html((TITLE, self._sentences))
        return f"<div class=explored>{STYLE}{top}{drawing.side_by_side(figures)}{rows}</div>"

    @property
    def _sentences(self) -> tuple[str, ...]:
        """The table of the most uncertain rows as sentences, which fit a narrow page."""
        return tuple(
            f"Row {row}, label {label}: p(label) {p}, entropy {entropy}, from the weights {part}. "
            + "".join(text)
            for row, label, p, entropy, part, *text in self.uncertain.rows
        )

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        scales = ", ".join(f"{name} {_brief(value)}" for name, value in self.scale.items())
        return (
            f"Explored({scales}; log evidence {self.log_evidence:,.1f} nats, base {self.base_evidence:,.1f}; "
            f"NLL {self.scores['NLL (nats)']:.3f})"
        )


def numbers(explored: Explored, before: Explored | None = None) -> Table:
    """Evidence, spreads and scores of the untouched base, of a setting before, and of this one."""
    columns = {"base": _base_column(explored)}
    if before is not None:
        columns["before"] = _column(before)
    columns["now"] = _column(explored)
    (first, *_) = columns.values()
    rows = tuple((name, *(column[name] for column in columns.values())) for name in first)
    settings = explored.settings
    title = f"{settings.rows:,} training rows in use, {len(explored.labels):,} validation rows"
    return Table(title, ("", *columns), rows, groups=frozenset({4}))


def _column(explored: Explored) -> dict[str, str]:
    prior = explored.prior
    return {
        "log evidence (nats)": f"{explored.log_evidence:,.1f}",
        "prior spread (nats)": f"{_mean_square(explored.prior_spread):.2f}",
        "posterior spread (nats)": f"{_mean_square(explored.spread):.2f}",
        "prior surer than 99 %": f"{prior.decided:.0%}",
    } | {name: f"{value:.3f}" for name, value in explored.scores.items()}


def _base_column(explored: Explored) -> dict[str, str]:
    sure = (explored.prior.base_probs.max(-1) > 0.99).mean()
    return {
        "log evidence (nats)": f"{explored.base_evidence:,.1f}",
        "prior spread (nats)": "",
        "posterior spread (nats)": "",
        "prior surer than 99 %": f"{sure:.0%}",
    } | {name: f"{value:.3f}" for name, value in explored.base_scores.items()}


def _mean_square(spread: np.ndarray) -> float:
    return float(np.sqrt(np.mean(spread**2)))


def _written(value: float | tuple[float, ...]) -> str:
    return f"np.array({list(value)})" if isinstance(value, tuple) else repr(value)


def _brief(value: float | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        return "/".join(_brief(x) for x in value)
    return "off" if value == OFF else f"{value:.3g}"


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
