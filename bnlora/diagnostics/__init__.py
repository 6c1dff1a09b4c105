"""Can this fit be trusted? One file for each kind of diagnostic, each opening with its mathematics.

| module       | question                                                                        |
|--------------|---------------------------------------------------------------------------------|
| `divergence` | how many nats has each site and layer learned?                                  |
| `shrinkage`  | where is the posterior narrower than the prior?                                 |
| `tree`       | `to_arviz`: draws, densities and the record of the fit for ArviZ                |
| `updates`    | norms and singular values of the updates                                        |

Every function takes a fit, or a `sample` of it, which shares draws between them.
"""

from bnlora.diagnostics.divergence import SiteDivergence as SiteDivergence
from bnlora.diagnostics.divergence import divergence as divergence
from bnlora.diagnostics.sample import Sample as Sample
from bnlora.diagnostics.sample import sample as sample
from bnlora.diagnostics.shrinkage import Shrinkage as Shrinkage
from bnlora.diagnostics.shrinkage import shrinkage as shrinkage
from bnlora.diagnostics.tree import to_arviz as to_arviz
from bnlora.diagnostics.updates import singular_values as singular_values
