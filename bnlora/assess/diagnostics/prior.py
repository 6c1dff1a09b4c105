"""Is the prior neither too narrow nor too wide? The prior predictive of the given rows.

The rules are in `bnlora.assess.prior_predictive`.
"""

from bnlora.assess.diagnostics.examination import Diagnostic, Examination
from bnlora.assess.prior_predictive import PriorPredictive


def _measure(exam: Examination) -> PriorPredictive:
    base, *_ = log_probs = exam.prior_prediction.draw_log_probs
    return PriorPredictive(log_probs[1:], base)


PREDICTIVE = Diagnostic(
    name="prior predictive",
    measurement="prior_predictive",
    measure=_measure,
    judge=lambda measured, _: measured.findings[0],
    needs=("prior", "draws of the prior"),
)
