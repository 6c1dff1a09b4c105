"""Sites without a base, and the shape of a stack of matrices, for tests of priors."""

from types import SimpleNamespace

from bnlora.adapters.sites import select

SITES = select(
    SimpleNamespace(modules={"q_proj": (12, 6), "lm_head": (12, 3)}, num_layers=3),
    ["q_proj", "lm_head"],
    rank=2,
)

SHAPE = (2, 3, 4)
