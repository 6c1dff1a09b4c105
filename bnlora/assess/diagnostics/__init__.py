"""Can this fit be trusted? One module for each kind of diagnostic, with its formulas and rules at the top.

| module        | question                                                                          |
|---------------|-----------------------------------------------------------------------------------|
| `page`        | `diagnose`: all diagnostics of a fit, with findings and remedies                  |
| `examination` | what is a diagnostic, and which results do all diagnostics share?                 |
| `steps`       | did the optimiser run to its end?                                                 |
| `bound`       | has the bound converged?                                                          |
| `restarts`    | do fits from other keys find the same posterior?                                  |
| `weights`     | `khat`: can draws of the guide be reweighted to the posterior?                    |
| `divergence`  | how many nats has each site and layer learned?                                    |
| `shrinkage`   | where is the posterior narrower than the prior?                                   |
| `spectrum`    | how many directions does each update use?                                         |
| `overlap`     | how similar are prior and posterior of each function?                             |
| `prior`       | is the prior neither too narrow nor too wide?                                     |
| `sensitivity` | would another strength of the prior change the answer?                            |
| `loo`         | how well would each training row have been predicted without it?                  |
| `pit`         | are the leave-one-out predictions calibrated?                                      |
| `classes`     | is each class as frequent as predicted?                                           |
| `linearisation` | how far is the network from a tangent posterior?                                |
| `tree`        | `to_arviz`: draws, densities and the history of the fit for ArviZ                 |

Every function that takes a fit also takes a `sample` of it, so that several functions share the draws.
"""

from bnlora._util.finding import Finding as Finding
from bnlora.assess.diagnostics.bound import Bound as Bound
from bnlora.assess.diagnostics.bound import bound as bound
from bnlora.assess.diagnostics.classes import ClassCounts as ClassCounts
from bnlora.assess.diagnostics.classes import class_counts as class_counts
from bnlora.assess.diagnostics.divergence import SiteDivergence as SiteDivergence
from bnlora.assess.diagnostics.divergence import divergence as divergence
from bnlora.assess.diagnostics.loo import LeaveOneOut as LeaveOneOut
from bnlora.assess.diagnostics.loo import compare_fits as compare_fits
from bnlora.assess.diagnostics.loo import loo as loo
from bnlora.assess.diagnostics.loo import loo_probs as loo_probs
from bnlora.assess.diagnostics.overlap import Overlap as Overlap
from bnlora.assess.diagnostics.overlap import overlap as overlap
from bnlora.assess.diagnostics.page import Diagnosis as Diagnosis
from bnlora.assess.diagnostics.page import diagnose as diagnose
from bnlora.assess.diagnostics.pit import Pit as Pit
from bnlora.assess.diagnostics.pit import loo_pit as loo_pit
from bnlora.assess.diagnostics.pit import randomised_pit as randomised_pit
from bnlora.assess.diagnostics.restarts import Restarts as Restarts
from bnlora.assess.diagnostics.restarts import restarts as restarts
from bnlora.assess.diagnostics.sample import Sample as Sample
from bnlora.assess.diagnostics.sample import sample as sample
from bnlora.assess.diagnostics.sensitivity import Sensitivity as Sensitivity
from bnlora.assess.diagnostics.sensitivity import sensitivity as sensitivity
from bnlora.assess.diagnostics.shrinkage import Shrinkage as Shrinkage
from bnlora.assess.diagnostics.shrinkage import shrinkage as shrinkage
from bnlora.assess.diagnostics.spectrum import Spectrum as Spectrum
from bnlora.assess.diagnostics.spectrum import spectrum as spectrum
from bnlora.assess.diagnostics.tree import to_arviz as to_arviz
from bnlora.assess.diagnostics.updates import effective_rank as effective_rank
from bnlora.assess.diagnostics.updates import singular_values as singular_values
from bnlora.assess.diagnostics.weights import KHats as KHats
from bnlora.assess.diagnostics.weights import khat as khat
