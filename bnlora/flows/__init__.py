r"""Normalizing flows y = f(x) for guides, with log|det f'| on the way: one family of maps a file.

    autoregressive   y_j = x_j exp(s_j(x_<j)) + t_j(x_<j)       inverse in d passes

Every module has a function `near_identity(key, *, batch, features, hidden, ...)` for the start of the
weights; the one of the row-shared flow is the package's own.
"""

from bnlora.flows.autoregressive import Conditioner, RowSharedAffine, conditioner_masks, near_identity
from bnlora.flows.base import Flow, flow_log_determinant

__all__ = [
    "Conditioner",
    "Flow",
    "RowSharedAffine",
    "conditioner_masks",
    "flow_log_determinant",
    "near_identity",
]
