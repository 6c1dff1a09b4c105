r"""Priors over adapters: any function that maps sites to adapters and calls `numpyro.sample`.

| prior                                | law of a factor W (d_o x d_i), sigma = scale / sqrt(d_i)          |
|--------------------------------------|-------------------------------------------------------------------|
| `core`                               | `b a`, not a factor, is a normal matrix between fixed frames      |
| `carried`                            | `core` after earlier rows, whose posterior is the new prior       |
| `sparse_gp`                          | iid N(0, sigma^2), with inducing variables inside the weights     |
| `normal`                             | iid N(0, sigma^2)                                                 |
| `laplace`                            | iid Laplace with standard deviation sigma                         |
| `spike_and_slab`                     | iid mixture of a narrow and a wide normal                         |
| `matrix_normal`                      | N(0, (sigma r_i c_j)^2)                                           |
| `ard`                                | columns of `b` scaled by one gain for each rank                   |
| `horseshoe`, `regularized_horseshoe` | half-Cauchy gains, with one global scale for each family          |
| `pooled_scales`, `pooled_sparse_gp`  | layers share scales, or inducing matrices, in part                |
| `centered`                           | any of these, centred on existing adapters                        |
| `subspace`                           | one random gain for each rank, between learned projections        |
| `point`                              | none: plain LoRA, fitted by maximum likelihood                    |

Hyper-parameters are constants, `learned(init_value)` (type II), or NumPyro distributions (`hyper`).
`per_factor` and `by_family` compose priors (`compose`). To write your own prior: `each_factor` runs a law of
one factor, `rank_gains` multiplies ranks by gains that you sample, `layers` is the plate over the layers of a
family, and `sparse_gp_matrices` is the sparse GP of one stack of matrices.
"""

from bnlora.priors.ard import ard as ard
from bnlora.priors.base import Prior as Prior
from bnlora.priors.base import each_factor as each_factor
from bnlora.priors.base import layers as layers
from bnlora.priors.base import sample_matrices as sample_matrices
from bnlora.priors.base import width_factor as width_factor
from bnlora.priors.carried import Earlier as Earlier
from bnlora.priors.carried import carried as carried
from bnlora.priors.centered import centered as centered
from bnlora.priors.compose import by_family as by_family
from bnlora.priors.compose import per_factor as per_factor
from bnlora.priors.core import core as core
from bnlora.priors.hierarchy import pooled_scales as pooled_scales
from bnlora.priors.hierarchy import pooled_sparse_gp as pooled_sparse_gp
from bnlora.priors.horseshoe import horseshoe as horseshoe
from bnlora.priors.horseshoe import regularized_horseshoe as regularized_horseshoe
from bnlora.priors.hyper import Hyper as Hyper
from bnlora.priors.hyper import hyper_value as hyper_value
from bnlora.priors.hyper import learned as learned
from bnlora.priors.laplace import laplace as laplace
from bnlora.priors.matrix_normal import matrix_normal as matrix_normal
from bnlora.priors.mixture import spike_and_slab as spike_and_slab
from bnlora.priors.normal import normal as normal
from bnlora.priors.point import point as point
from bnlora.priors.rank_gains import rank_gains as rank_gains
from bnlora.priors.sparse_gp import sparse_gp as sparse_gp
from bnlora.priors.sparse_gp import sparse_gp_matrices as sparse_gp_matrices
from bnlora.priors.subspace import subspace as subspace
