r"""Guides: variational families for the latent sites of a prior, chosen by site name.

    guide = Guide(model.prior, {r"lm_head\..*": full(), ".*": row_shared()}, noise=noise(lam_max=1.0))

| family                                | law of the unconstrained values                                |
|---------------------------------------|----------------------------------------------------------------|
| `mean_field`, `blob`                  | independent Gaussians                                          |
| `matrix_normal`                       | a row and a column covariance                                  |
| `full`, `low_rank`                    | Gaussian covariance within a layer, a family, or everything    |
| `row_shared`                          | a flow over a Gaussian base, shared by all rows                |
| `iaf`, `spline`, `block_neural`       | flows over a layer, a family, or everything                    |
| `ensemble`                            | mixture of K mean-field Gaussians over all sites               |
| `delta`, `dropout`                    | points: no density and no bound                                |
| `noise`, `prior_noise`                | only for conditional noise                                     |

`SiteFlow` is the paper's guide. Every guide here is an ordinary NumPyro guide. Any other NumPyro guide of
`model.prior` also works, except for a few automatic ones (`bnlora.guides.automatic`). `per_site` turns a
function into a family. The `repr` of a guide counts its parameters.
"""

from bnlora.guides.around import around as around
from bnlora.guides.ensemble import ensemble as ensemble
from bnlora.guides.family import Family as Family
from bnlora.guides.family import per_site as per_site
from bnlora.guides.flow import block_neural as block_neural
from bnlora.guides.flow import iaf as iaf
from bnlora.guides.flow import row_shared as row_shared
from bnlora.guides.flow import spline as spline
from bnlora.guides.gaussian import full as full
from bnlora.guides.gaussian import low_rank as low_rank
from bnlora.guides.guide import Guide as Guide
from bnlora.guides.latent import Latent as Latent
from bnlora.guides.latent import init_to_base as init_to_base
from bnlora.guides.matrix_normal import matrix_normal as matrix_normal
from bnlora.guides.mean_field import blob as blob
from bnlora.guides.mean_field import mean_field as mean_field
from bnlora.guides.noise import noise as noise
from bnlora.guides.noise import prior_noise as prior_noise
from bnlora.guides.point import delta as delta
from bnlora.guides.point import dropout as dropout
from bnlora.guides.site_flow import SiteFlow as SiteFlow
