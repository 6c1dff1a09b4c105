"""What a command hands to the shell: its exit code, and its result as one JSON object for machines.

| exit code | means |
|---|---|
| 0 | done |
| 1 | bad input, or a result that could not be written where it was asked for: one sentence says which |
| 2 | usage: an unknown command or option, or a value that no option takes |
| 3 | the fit diverged; what it had reached is kept |
| 130 | interrupted (Ctrl-C); a fit is kept as far as it came |

Numbers that JSON has no word for (not a number, infinities) are null.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnlora import metrics
from bnlora.assess.diagnostics.page import Diagnosis
from bnlora.infer.svi.elbo import TERMS
from bnlora.infer.svi.result import Fit
from bnlora.prediction.predict import Prediction

if TYPE_CHECKING:
    import pyarrow as pa

    from bnlora.app.experiment import Comparison


class ExitCode(IntEnum):
    """Exit codes of every command; the module's table says what each means."""

    DONE = 0
    BAD_INPUT = 1
    USAGE = 2
    DIVERGED = 3
    INTERRUPTED = 130


def fit_result(made: Fit, folder: Path) -> dict[str, Any]:
    """Sizes of a fit, how it ended, and the means of the bound's terms over the last 50 steps, in nats."""
    return {
        "folder": str(folder),
        "rows": len(made.train),
        "parameters": made.num_parameters,
        "stopped": made.stopped,
        "steps": len(made.step_seconds),
        "skipped_steps": made.skipped_steps,
        "best_step": made.best_step,
        "seconds": float(made.step_seconds.sum()),
        "terms": {name: float(np.mean(made.history[name][-50:])) for name in TERMS},
    }


def prediction_result(prediction: Prediction, words: tuple[str, ...], table: Path) -> dict[str, Any]:
    """How often each class is the most probable one, and the mean doubt of a row, in nats."""
    counts = np.bincount(prediction.log_probs.argmax(1), minlength=len(words))
    return {
        "table": str(table),
        "rows": int(counts.sum()),
        "draws": len(prediction.draw_log_probs),
        "predicted": {word.strip(): int(count) for word, count in zip(words, counts, strict=True)},
        "mean_entropy": float(np.mean(prediction.entropy)),
        "mean_mutual_information": float(np.mean(prediction.mutual_information)),
    }


def summary_result(summary: metrics.Summary) -> dict[str, Any]:
    """Every metric with its interval."""
    values = {name: {"value": e.value, "low": e.low, "high": e.high} for name, e in summary.items()}
    return {"rows": summary.num_rows, "level": summary.level, "metrics": values}


def comparison_result(comparison: "Comparison", report: Path) -> dict[str, Any]:
    """Metrics by set of rows and method, scales, evidence, and seconds of every part."""
    scores = {
        domain: {
            method: summary_result(metrics.summary(comparison.key, predictions[domain], labels))
            for method, predictions in comparison.predictions.items()
        }
        for domain, labels in comparison.labels.items()
    }
    core = comparison.core
    return {
        "report": str(report),
        "scores": scores,
        "scales": core.scales.by_name,
        "log_evidence": core.gaussian.log_evidence,
        "bound": float(core.fit.history["elbo"][-20:].mean()),
        "certified": comparison.chains.certificate.passed,
        "seconds": dict(comparison.seconds),
    }


def diagnosis_result(diagnosis: Diagnosis) -> dict[str, Any]:
    """What each diagnostic says, and whether none of them found a problem."""
    return {"passed": diagnosis.passed, "findings": [asdict(found) for found in diagnosis.findings]}


def as_json(result: Mapping[str, Any]) -> str:
    """One line of JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(result), allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluation_page(
    title: str,
    summary: metrics.Summary,
    predictions: Mapping[str, Mapping[str, Prediction]],
    labels: np.ndarray,
) -> str:
    """The metrics and a reliability diagram of predictions, given by method and table."""
    from bnlora import plots
    from bnlora.app.report import page

    truth = {table: labels for made in predictions.values() for table in made}
    figure = plots.reliability(predictions, truth)
    return page(title, [summary.table, (figure, plots.RELIABILITY_CAPTION)])


def prediction_names(words: Sequence[str], prefix: str = "") -> list[str]:
    """Names of the columns that a prediction adds to a table."""
    probabilities = [f"probability {word.strip()}" for word in words]
    return [prefix + name for name in (*probabilities, "entropy", "mutual information", "prediction")]


def require_free(columns: Sequence[str], words: Sequence[str], prefix: str) -> None:
    """Raise `ValueError` where a table has columns that a prediction would replace."""
    taken = [name for name in prediction_names(words, prefix) if name in columns]
    if taken:
        raise ValueError(
            f"the table has columns {taken}, which the predictions would replace; give the new ones other "
            f"names with --prefix {f'new {prefix}'!r}, or replace the old ones with --overwrite"
        )


def with_prediction(
    rows: "pa.Table", prediction: Prediction, words: Sequence[str], *, prefix: str = ""
) -> "pa.Table":
    """The rows with columns of what was predicted for them; columns of the same names are replaced."""
    import pyarrow as pa

    names = prediction_names(words, prefix)
    predicted = np.array([word.strip() for word in words])[prediction.log_probs.argmax(1)]
    columns = [*prediction.probs.T, prediction.entropy, prediction.mutual_information, predicted]
    rows = rows.drop_columns([name for name in names if name in rows.column_names])
    for name, values in zip(names, columns, strict=True):
        rows = rows.append_column(name, pa.array(values.tolist()))
    return rows
