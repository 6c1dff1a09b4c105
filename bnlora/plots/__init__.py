"""All figures of the library; the only package that imports matplotlib.

Each function takes results, draws on the axes `ax` or on a new figure, and returns the figure. A new figure
has a self-contained caption. Exceptions are `reliability`, `elbo` and `frame_energies`: their captions are
constants of this package, to print below the figure.
"""

from matplotlib.figure import Figure as Figure

from bnlora.plots.base import BLUE as BLUE
from bnlora.plots.base import GREEN as GREEN
from bnlora.plots.base import GREY as GREY
from bnlora.plots.base import ORANGE as ORANGE
from bnlora.plots.bound import ELBO_CAPTION as ELBO_CAPTION
from bnlora.plots.bound import elbo as elbo
from bnlora.plots.calibration import sbc as sbc
from bnlora.plots.calibration import vsbc as vsbc
from bnlora.plots.comparison import forest as forest
from bnlora.plots.comparison import predictive_scatter as predictive_scatter
from bnlora.plots.comparison import rank_difference as rank_difference
from bnlora.plots.comparison import worst_pairs as worst_pairs
from bnlora.plots.frames import FRAME_CAPTION as FRAME_CAPTION
from bnlora.plots.frames import frame_energies as frame_energies
from bnlora.plots.monitoring import monitoring as monitoring
from bnlora.plots.prior import prior_predictive as prior_predictive
from bnlora.plots.reliability import RELIABILITY_CAPTION as RELIABILITY_CAPTION
from bnlora.plots.reliability import reliability as reliability
from bnlora.plots.spread import posterior_spread as posterior_spread
from bnlora.plots.uncertainty import domains as domains
from bnlora.plots.uncertainty import risk_coverage as risk_coverage
