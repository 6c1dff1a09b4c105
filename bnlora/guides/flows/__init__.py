r"""Normalizing flows y = f(x) for guides, with log|det f'|. Each file has one family of maps.

    autoregressive   y_j = x_j exp(s_j(x_<j)) + t_j(x_<j)       inverse in d passes
    spline           y_B = spline(x_B; net(x_A)), alternating    inverse in closed form
    block_neural     y_j = exp(c_j) x_j + g_j(x_j; x_<j)         inverse by bisection

Every module has a function `near_identity(key, *, batch, features, hidden, ...)` for the start of the
weights. The package exports the one of the row-shared flow.
"""

from bnlora.guides.flows.autoregressive import Conditioner, RowSharedAffine, conditioner_masks, near_identity
from bnlora.guides.flows.base import Flow, flow_log_determinant
from bnlora.guides.flows.block_neural import BlockNet, BlockNeural
from bnlora.guides.flows.spline import Coupling, SplineCoupling

__all__ = [
    "BlockNet",
    "BlockNeural",
    "Conditioner",
    "Coupling",
    "Flow",
    "RowSharedAffine",
    "SplineCoupling",
    "conditioner_masks",
    "flow_log_determinant",
    "near_identity",
]
