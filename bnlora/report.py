"""Pictures of calibration and of an optimisation, and a page that holds them: one file, nothing to fetch.

Colours are those of Okabe and Ito (2008), which people with any common colour vision tell apart.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnlora import metrics
from bnlora.display import Table
from bnlora.fits import Fit
from bnlora.predict import Prediction

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"

RELIABILITY_CAPTION = (
    "Reliability: accuracy against mean confidence in 15 bins of equal width, with 95 % Wilson intervals; "
    "grey bars: share of the rows in each bin; dashed: perfect calibration. Points below the dashed line are "
    "too confident."
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
div.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; margin: 1rem 0 }
caption { text-align: left; padding-bottom: .4rem; color: #444 }
th, td { padding: .2rem .8rem; text-align: right; vertical-align: top }
th:first-child, td:first-child, td:nth-child(2):not(:last-child) { text-align: left }
thead th { border-bottom: 2px solid #1a1a1a } tr.group td { border-top: 1px solid #bbb }
figure { margin: 1rem 0 } img { max-width: 100% } figcaption { color: #444; font-size: .9rem }
"""


def reliability_figure(
    predictions: Mapping[str, Mapping[str, Prediction]], labels: Mapping[str, Int[np.ndarray, " n"]]
) -> Figure:
    """Reliability diagrams: a row of panels for each method, a column for each set of rows.

    Args:
        predictions: Prediction by method and set of rows.
        labels: True classes by set of rows.
    """
    height, width = len(predictions), len(labels)
    figure = Figure(figsize=(2.6 * width + 0.6, 2.7 * height + 0.5), layout="constrained")
    grid = figure.subplots(height, width, squeeze=False, sharex=True, sharey=True)
    for row, (method, by_rows) in enumerate(predictions.items()):
        for column, (name, truth) in enumerate(labels.items()):
            axes = grid[row, column]
            _reliability(axes, by_rows[name], truth)
            axes.set_title(f"{method}\n{name}", fontsize=9)
    figure.supxlabel("confidence")
    figure.supylabel("accuracy")
    return figure


def _reliability(axes: Axes, prediction: Prediction, labels: np.ndarray) -> None:
    curve = metrics.reliability(prediction, labels)
    lowest = 1 / prediction.log_probs.shape[1]
    axes.plot([lowest, 1], [lowest, 1], color=GREY, linewidth=1, linestyle="--")
    axes.bar(
        curve.confidence, curve.count / curve.count.sum(), width=0.02, color=GREY, alpha=0.35, align="center"
    )
    spread = np.abs(np.stack([curve.low, curve.high]) - curve.accuracy)
    axes.errorbar(
        curve.confidence, curve.accuracy, yerr=spread, fmt="o", markersize=3.5, linewidth=1, color=BLUE
    )
    axes.text(0.04, 0.93, f"ECE {metrics.ece(prediction.log_probs, labels):.3f}", transform=axes.transAxes)
    axes.set(xlim=(lowest - 0.02, 1.02), ylim=(0, 1.08))


def elbo_figure(fits: Mapping[str, Fit]) -> Figure:
    """The bound of each fit and its terms over the steps, in nats over all training rows.

    Args:
        fits: Fit by name. Where a fit has no random variable, its bound is the log-likelihood alone.
    """
    figure = Figure(figsize=(10.5, 2.9 * len(fits)), layout="constrained")
    rows = figure.subfigures(len(fits), 1, squeeze=False)[:, 0]
    for row, (name, made) in zip(rows, fits.items(), strict=True):
        row.suptitle(name, fontsize=10)
        _terms(row.subplots(1, 3), made)
    return figure


def _terms(panels: Sequence[Axes], made: Fit) -> None:
    bound, data, divergences = panels
    _trace(bound, made.history["elbo"], BLUE, "ELBO")
    _trace(data, made.history["data"], BLUE, "training rows")
    looks = made.validation["step"]
    if len(looks):
        scaled = -len(made.train) * made.validation["nll"]  # as if there were as many rows
        data.plot(looks, scaled, "o-", color=ORANGE, markersize=3, label="validation rows")
        data.legend(fontsize=8)
    for term, colour in (("inducing_kl", ORANGE), ("conditional_kl", GREEN)):
        if np.any(made.history[term]):
            _trace(divergences, made.history[term], colour, term.replace("_kl", " KL"))
            divergences.set_yscale("log")
    if divergences.lines:
        divergences.legend(fontsize=8)
    else:
        divergences.text(0.5, 0.5, "no random variable", ha="center", transform=divergences.transAxes)
    for axes, title in zip(panels, ("ELBO", "data term", "KL divergences"), strict=True):
        axes.set(xlabel="step", ylabel="nats", title=title)


def _trace(axes: Axes, values: np.ndarray, colour: str, label: str) -> None:
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    axes.plot(steps, _smooth(values), color=colour, label=label)


def _smooth(values: np.ndarray, window: int = 15) -> np.ndarray:
    """Mean over the last steps, fewer at the beginning."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def page(title: str, parts: Sequence[str | Table | tuple[Figure, str]]) -> str:
    """A page of HTML that stands alone.

    Args:
        title: Its heading.
        parts: Text (a line that begins with `# ` is a heading), tables, and figures with their captions.
    """
    body = "\n".join(map(_html, parts))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _html(part: str | Table | tuple[Figure, str]) -> str:
    if isinstance(part, Table):
        return f"<div class=wide>{part._repr_html_()}</div>"
    if isinstance(part, str):
        return f"<h2>{escape(part[2:])}</h2>" if part.startswith("# ") else f"<p>{escape(part)}</p>"
    figure, caption = part
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    source = b64encode(picture.getvalue()).decode("ascii")
    text = escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{source}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
