"""How far is an approximate posterior from a reference, read against what the reference's own draws allow?

| module       | measure                                                                           |
|--------------|-----------------------------------------------------------------------------------|
| `moments`    | differences of means, ratios of standard deviations, with Monte Carlo errors      |
| `transport`  | Wasserstein-1 by function, sliced Wasserstein-2 of all                            |
| `kernel`     | maximum mean discrepancy with a permutation test                                  |
| `classifier` | classifier two-sample test                                                        |
| `coverage`   | share of the reference inside credible intervals                                  |
| `khat`       | Pareto k-hat of the importance weights                                            |
| `predictive` | total variation, KL divergence and epistemic uncertainty, row by row              |

`compare` takes posteriors of a classifier, `compare_draws` arrays of draws from anywhere.
`store_reference`, `save_reference` and `load_reference` keep what a comparison reads of a run.
"""

from bnlora.comparison.compare import Reference as Reference
from bnlora.comparison.compare import UncertifiedReference as UncertifiedReference
from bnlora.comparison.compare import compare as compare
from bnlora.comparison.draws import Draws as Draws
from bnlora.comparison.khat import KHat as KHat
from bnlora.comparison.khat import khat as khat
from bnlora.comparison.predictive import predictive_agreement as predictive_agreement
from bnlora.comparison.report import Comparison as Comparison
from bnlora.comparison.report import compare_draws as compare_draws
from bnlora.comparison.stored import StoredReference as StoredReference
from bnlora.comparison.stored import load_reference as load_reference
from bnlora.comparison.stored import save_reference as save_reference
from bnlora.comparison.stored import store_reference as store_reference
