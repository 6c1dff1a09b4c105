"""The exit code of a command, and its result as one JSON object.

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | bad input, or a result that could not be written to the requested path; one sentence states which |
| 2 | usage: an unknown command or option, or an invalid value of an option |
| 3 | the fit diverged; its last finite state is saved |
| 4 | another process of the fit was lost; its checkpoints are there to go on from |
| 5 | a test of a monitored classifier has raised an alarm |
| 130 | interrupted (Ctrl-C); a fit is saved as far as it got |

Numbers that JSON cannot represent (not a number, infinities) are null.
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
    """Exit codes of all commands; the table of the module gives their meanings."""

    DONE = 0
    BAD_INPUT = 1
    USAGE = 2
    DIVERGED = 3
    LOST = 4
    ALARM = 5
    INTERRUPTED = 130


def following(fit: Fit, place: Path, text: str) -> str:
    """What to do after a fit: the next command."""
    if fit.stopped == "interrupted":
        return "interrupted: the same command with --resume goes on"
    return next_command(place, text)


def next_command(place: Path, text: str) -> str:
    """The command that predicts with a fit."""
    return f"next: bnlora predict {place} TABLE --text {text}"


def fit_result(fit: Fit, folder: Path) -> dict[str, Any]:
    """Sizes of a fit, why it stopped, and the mean terms of the bound over the last 50 steps, in nats."""
    return {
        "folder": str(folder),
        "rows": len(fit.train),
        "parameters": fit.num_parameters,
        "stopped": fit.stopped,
        "steps": len(fit.step_seconds),
        "skipped_steps": fit.skipped_steps,
        "best_step": fit.best_step,
        "seconds": float(fit.step_seconds.sum()),
        "terms": {name: float(np.mean(fit.history[name][-50:])) for name in TERMS},
    }


def summary_result(summary: metrics.Summary) -> dict[str, Any]:
    """All metrics with their intervals."""
    values = {name: {"value": e.value, "low": e.low, "high": e.high} for name, e in summary.items()}
    return {"rows": summary.num_rows, "level": summary.level, "metrics": values}


def comparison_result(comparison: "Comparison", report: Path) -> dict[str, Any]:
    """Metrics by set of rows and method, scales, evidence, bound, and seconds of each part."""
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
    """All findings, and whether none of them is a problem."""
    return {"passed": diagnosis.passed, "findings": [asdict(finding) for finding in diagnosis.findings]}


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
    """HTML page with the metrics and a reliability diagram; `predictions` are by method and table."""
    from bnlora import plots
    from bnlora.app.report import page

    truth = {table: labels for by_table in predictions.values() for table in by_table}
    figure = plots.reliability(predictions, truth)
    return page(title, [summary.table, (figure, plots.RELIABILITY_CAPTION)])


def require_free(columns: Sequence[str], names: Sequence[str], prefix: str) -> None:
    """Raise `ValueError` if a table has columns that a prediction would replace."""
    taken = [prefix + name for name in names if prefix + name in columns]
    if taken:
        raise ValueError(
            f"the table already has columns {taken}; use --prefix {f'new {prefix}'!r} to rename the new "
            "columns, or --overwrite to replace the old ones"
        )


def with_columns(rows: "pa.Table", columns: Mapping[str, list[Any]], *, prefix: str = "") -> "pa.Table":
    """The rows with more columns; columns with the same names are replaced."""
    import pyarrow as pa

    named = {prefix + name: values for name, values in columns.items()}
    rows = rows.drop_columns([name for name in named if name in rows.column_names])
    for name, values in named.items():
        rows = rows.append_column(name, pa.array(values))
    return rows
