"""The shapes and protocols that the floors above agree on.

An *adapter* of a family of layers is a pair of stacked factors, `a` of shape
`(layer, rank, d_in)` and `b` of shape `(layer, d_out, rank)`; the update of layer `l` is
`alpha / rank * b[l] @ a[l]`. A *prior* is any function that takes the sites and returns adapters,
calling `numpyro.sample` on the way.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from jax import Array

if TYPE_CHECKING:
    from bnlora.sites import Sites

FACTORS = ("a", "b")
"""The two factors of an adapter, in the order in which the input passes through them."""

NOISE = "conditional_noise"
"""Mark in the `infer` of a site that only completes a conditional W | U: a standard normal given one."""

Adapters = Mapping[str, Mapping[str, Array]]
"""`{family: {"a": (layer, rank, d_in), "b": (layer, d_out, rank)}}`."""

Parameters = Mapping[str, Any]
"""NumPyro parameters by name, in their constrained space."""


class Prior(Protocol):
    """A NumPyro program over the adapters of the selected sites."""

    def __call__(self, sites: "Sites") -> Adapters:
        """Sample (or declare) every adapter of `sites` and return them."""
        ...
