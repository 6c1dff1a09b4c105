"""The families of guides, for the contracts that each of them must keep; one line of `MEMBERS` adds one."""

from collections.abc import Callable
from typing import NamedTuple

from bnlora import guides
from bnlora.guides import Family


class Member(NamedTuple):
    """A family and what its best bound on the exact problem is.

    Attributes:
        make: Makes the family, given the scale at the start.
        best: "evidence" where the family holds the posterior, "independent" where it is an independent
            Gaussian, "between" where it holds the independent Gaussians and more.
    """

    make: Callable[[float], Family]
    best: str


MEMBERS = {
    "mean_field": Member(lambda s: guides.mean_field(init_scale=s), "independent"),
    "blob": Member(lambda s: guides.blob(epsilon=s**0.5), "independent"),
    "matrix_normal": Member(lambda s: guides.matrix_normal(init_scale=s), "evidence"),
    "full": Member(lambda s: guides.full(init_scale=s), "evidence"),
    "full, family": Member(lambda s: guides.full(init_scale=s, over="family"), "evidence"),
    "low_rank": Member(lambda s: guides.low_rank(rank=2, init_scale=s), "between"),
    "low_rank, all": Member(lambda s: guides.low_rank(rank=2, init_scale=s, over="all"), "between"),
    "row_shared": Member(lambda s: guides.row_shared(hidden=8, init_scale=s), "between"),
    "iaf": Member(lambda s: guides.iaf(init_scale=s), "between"),
    "iaf, all": Member(lambda s: guides.iaf(init_scale=s, over="all"), "between"),
    "spline": Member(lambda s: guides.spline(hidden=4, bins=4, init_scale=s), "between"),
    "block_neural": Member(lambda s: guides.block_neural(hidden=2, init_scale=s), "between"),
    "ensemble": Member(lambda s: guides.ensemble(size=2, init_scale=s), "between"),
}
