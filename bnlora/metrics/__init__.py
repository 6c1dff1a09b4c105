"""Metrics of predicted classes, values and texts, with bootstrap intervals and paired differences.

| module        | content                                                             |
|---------------|---------------------------------------------------------------------|
| `scores`      | accuracy, negative log-likelihood, calibration errors, Brier score  |
| `summary`     | all scores with bootstrap intervals; reliability diagrams           |
| `values`      | scores of predicted values and texts                                |
| `ranks`       | ranks, their bands and tests of uniformity                          |
| `monte_carlo` | Monte Carlo standard errors, effective sample sizes, Pareto tails   |
| `khat`        | Pareto k-hat of importance weights                                  |
"""

from bnlora.metrics.scores import BINS as BINS
from bnlora.metrics.scores import Labels as Labels
from bnlora.metrics.scores import LogProbs as LogProbs
from bnlora.metrics.scores import accuracy as accuracy
from bnlora.metrics.scores import adaptive_ece as adaptive_ece
from bnlora.metrics.scores import aurc as aurc
from bnlora.metrics.scores import auroc as auroc
from bnlora.metrics.scores import brier as brier
from bnlora.metrics.scores import debiased_ece as debiased_ece
from bnlora.metrics.scores import ece as ece
from bnlora.metrics.scores import mce as mce
from bnlora.metrics.scores import nll as nll
from bnlora.metrics.scores import null_ece as null_ece
from bnlora.metrics.scores import selective_risks as selective_risks
from bnlora.metrics.summary import METRICS as METRICS
from bnlora.metrics.summary import Estimate as Estimate
from bnlora.metrics.summary import Reliability as Reliability
from bnlora.metrics.summary import Summary as Summary
from bnlora.metrics.summary import bootstrap as bootstrap
from bnlora.metrics.summary import paired_difference as paired_difference
from bnlora.metrics.summary import reliability as reliability
from bnlora.metrics.summary import summary as summary
from bnlora.metrics.summary import wilson as wilson
from bnlora.metrics.values import crps as crps
from bnlora.metrics.values import text_summary as text_summary
from bnlora.metrics.values import value_summary as value_summary
