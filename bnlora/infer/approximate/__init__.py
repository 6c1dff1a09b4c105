"""Approximate inference other than SVI: the same likelihood, the same order of rows, the same metrics.

Every member gives a `Posterior`, so `bl.predict` and `bl.metrics` work as for a fit by SVI.

| member         | what it does                                                      | starts from        |
|----------------|-------------------------------------------------------------------|--------------------|
| `laplace`      | a Gaussian from the curvature at a mode, with a log-evidence      | a fit of a point   |
| `swag`         | a Gaussian from iterates of descent at a constant rate            | a fit of a point   |
| `training_free`| the most noise on the update that a criterion allows              | a fit of a point   |
| `fit_ensemble` | an equal mixture of fits                                          | a model            |
| `sgld`, `sghmc`| Markov chains over the latent sites, by minibatches               | a model            |

`fit_temperature` and `tempered` change predictions, not the posterior.
"""

from bnlora.infer.approximate.ensemble import Ensemble as Ensemble
from bnlora.infer.approximate.ensemble import EnsembleDiverged as EnsembleDiverged
from bnlora.infer.approximate.ensemble import NoMemberFinished as NoMemberFinished
from bnlora.infer.approximate.ensemble import fit_ensemble as fit_ensemble
from bnlora.infer.approximate.laplace import Laplace as Laplace
from bnlora.infer.approximate.laplace import laplace as laplace
from bnlora.infer.approximate.laplace import linearised as linearised
from bnlora.infer.approximate.sgmcmc import ChainDiverged as ChainDiverged
from bnlora.infer.approximate.sgmcmc import Schedule as Schedule
from bnlora.infer.approximate.sgmcmc import sghmc as sghmc
from bnlora.infer.approximate.sgmcmc import sgld as sgld
from bnlora.infer.approximate.swag import Swag as Swag
from bnlora.infer.approximate.swag import swag as swag
from bnlora.infer.approximate.temperature import fit_temperature as fit_temperature
from bnlora.infer.approximate.temperature import tempered as tempered
from bnlora.infer.approximate.training_free import TrainingFree as TrainingFree
from bnlora.infer.approximate.training_free import training_free as training_free
