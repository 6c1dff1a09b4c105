"""Did the optimiser run to its end, with finite steps?

| finding | problem     | caution                              |
|---------|-------------|--------------------------------------|
| steps   | it diverged | it was interrupted, or steps skipped |
"""

from bnlora._util.checks import broken_weights
from bnlora._util.finding import Finding
from bnlora.assess.diagnostics.examination import Diagnostic
from bnlora.infer.svi.result import Fit, divergence_remedy


def steps(fit: Fit) -> Finding:
    """Finding about the end of the optimisation and skipped steps."""
    done, skipped = len(fit.step_seconds), fit.skipped_steps
    sentence = f"{done} steps, {skipped} skipped as not finite, ended by: {fit.stopped}"
    if fit.stopped == "diverged":
        remedy = f"Fit again: {divergence_remedy(fit)}."
        return Finding("steps", "problem", sentence, skipped, 0, remedy)
    if fit.stopped in ("interrupted", "memory"):
        remedy = "Continue from here with fit(init_params=fit.params)."
        return Finding("steps", "caution", sentence, skipped, 0, remedy)
    if skipped:
        remedy = broken_weights(fit.model.base.weights) or "lower the learning rate, or clip_norm"
        remedy = f"Some bounds or gradients were not finite: {remedy}."
        return Finding("steps", "caution", sentence, skipped, 0, remedy)
    return Finding("steps", "fine", sentence, skipped, 0)


STEPS = Diagnostic(
    name="steps",
    measurement="num_steps",
    measure=lambda exam: len(exam.fit.step_seconds),
    judge=lambda _, exam: steps(exam.fit),
)
