"""Shapes and names that all packages share.

An *adapter* of a family of layers is a pair of stacked factors, `a` of shape
`(layer, rank, d_in)` and `b` of shape `(layer, d_out, rank)`; the update of layer `l` is
`alpha / rank * b[l] @ a[l]`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import Array

AnyArray = Array | np.ndarray
"""A JAX array, or a NumPy array if double precision must be kept."""

FACTORS = ("a", "b")
"""The two factors of an adapter, in the order in which they act on the input."""

NOISE = "conditional_noise"
"""Mark in the `infer` of a site that only completes the conditional W | U: standard normal noise."""

WEIGHT = "weight"
"""Mark in the `infer` of a site that belongs to a factor: weights, an inducing matrix, or their noise."""

Adapters = Mapping[str, Mapping[str, Array]]
"""`{family: {"a": (layer, rank, d_in), "b": (layer, d_out, rank)}}`."""

Parameters = Mapping[str, Any]
"""NumPyro parameters by name, in their constrained space."""
