"""How far is an approximate posterior from a reference?

Every measure is reported with its null level: the same measure between halves of the reference's draws.

| module       | measure                                                                           |
|--------------|-----------------------------------------------------------------------------------|
| `moments`    | differences of means, ratios of standard deviations, with Monte Carlo errors      |
| `transport`  | Wasserstein-1 by function, sliced Wasserstein-2 of all                            |
| `kernel`     | maximum mean discrepancy with a permutation test                                  |
| `classifier` | classifier two-sample test                                                        |
| `coverage`   | share of the reference inside credible intervals                                  |
| `khat`       | Pareto k-hat of the importance weights                                            |
| `predictive` | total variation, KL divergence and epistemic uncertainty, row by row              |

`compare` takes posteriors of a classifier. `compare_draws` takes arrays of draws from any source.
`store_reference`, `save_reference` and `load_reference` store the part of a run that a comparison needs.
"""

from bnlora.assess.comparison.compare import UncertifiedReference as UncertifiedReference
from bnlora.assess.comparison.compare import compare as compare
from bnlora.assess.comparison.draws import Draws as Draws
from bnlora.assess.comparison.predictive import predictive_agreement as predictive_agreement
from bnlora.assess.comparison.report import Comparison as Comparison
from bnlora.assess.comparison.report import compare_draws as compare_draws
from bnlora.assess.comparison.side import Reference as Reference
from bnlora.assess.comparison.stored import StoredReference as StoredReference
from bnlora.assess.comparison.stored import load_reference as load_reference
from bnlora.assess.comparison.stored import save_reference as save_reference
from bnlora.assess.comparison.stored import store_reference as store_reference
from bnlora.metrics.khat import KHat as KHat
from bnlora.metrics.khat import khat as khat
