"""The shapes and names that the floors above agree on.

An *adapter* of a family of layers is a pair of stacked factors, `a` of shape
`(layer, rank, d_in)` and `b` of shape `(layer, d_out, rank)`; the update of layer `l` is
`alpha / rank * b[l] @ a[l]`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import Array

AnyArray = Array | np.ndarray
"""An array of JAX or of NumPy, which keeps double precision."""

FACTORS = ("a", "b")
"""The two factors of an adapter, in the order in which the input passes through them."""

NOISE = "conditional_noise"
"""Mark in the `infer` of a site that only completes a conditional W | U: a standard normal given one."""

WEIGHT = "weight"
"""Mark in the `infer` of a site that is a factor's own: weights, an inducing matrix, or their noise."""

Adapters = Mapping[str, Mapping[str, Array]]
"""`{family: {"a": (layer, rank, d_in), "b": (layer, d_out, rank)}}`."""

Parameters = Mapping[str, Any]
"""NumPyro parameters by name, in their constrained space."""
