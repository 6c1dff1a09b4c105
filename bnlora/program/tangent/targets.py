r"""Targets of a core prior: modules of the base, and two updates of the head that are no module.

| target    | what its core multiplies                                                      | size         |
|-----------|-------------------------------------------------------------------------------|--------------|
| a module  | directions of its own weight update                                           | as asked     |
| `"slope"` | the base's own logits: its inverse temperature as a random variable           | C-1 by C-1   |
| `"bias"`  | a direction in which all rows have nearly the same activation: a class bias   | C-1 by 1     |

Both are updates `dW = s L U R^T` of the head like any other, so that a network has them too. Their frames do
not depend on the source of the others. For the slope R spans the label rows of the head. For the bias it is
the ridge solution r of `h_i r = 1` over the rows, with h_i what enters the head.
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.console import Console

from bnlora.adapters.sites import HEAD, Site, Sites, select
from bnlora.base import Base
from bnlora.data.batch import Batch
from bnlora.priors import point
from bnlora.program.model import Classifier
from bnlora.program.tangent.gradients import differentiated, shared_features

SLOPE, BIAS = "slope", "bias"
"""Targets, and families, of the base's own logits and of a class bias."""

OWN = (SLOPE, BIAS)

RIDGE = 1e-3
"""Ridge of the bias direction, relative to the mean square of an activation."""

Sides = tuple[Float[np.ndarray, "1 c m_o"], Float[np.ndarray, "1 d m_i"]]


def target_sites(base: Base, targets: Sequence[str], layers: Any) -> Sites:
    """Sites of rank one of modules, as `bnlora.select` gives them, and last those of slope and bias.

    Args:
        base: The base.
        targets: Modules, `"slope"` and `"bias"`.
        layers: Layers, as in `bnlora.select`.
    """
    modules = [name for name in targets if name not in OWN]
    for name in modules:
        near = [] if name in base.modules else difflib.get_close_matches(name, OWN, cutoff=0.75)
        if near:
            raise ValueError(f"target {name!r} matches no module; nearest names: {near[0]}")
    if len(modules) == len(targets):
        return select(base, targets, rank=1, layers=layers)
    d_in, d_out = base.modules[HEAD]
    own = [Site(name, HEAD, (base.num_layers,), d_in, d_out, 1, 1.0) for name in OWN if name in targets]
    families = select(base, modules, rank=1, layers=layers).families if modules else ()
    return Sites((*families, *own), base.num_layers)


def own_sides(model: Classifier, data: Batch, console: Console | None) -> dict[str, Sides]:
    """Frames of slope and bias, where the model has these families."""
    sides = {}
    if SLOPE in model.sites:
        sides[SLOPE] = _slope(model)
    if BIAS in model.sites:
        sides[BIAS] = _bias(model, data, console)
    return sides


def label_rows(model: Classifier) -> Float[np.ndarray, "c d"]:
    """The label rows of the head less their mean: what all classes share moves no contrast."""
    module = model.base.bind(model.base.weights)
    table = module.embedding if module.lm_head is None else module.lm_head
    rows = np.asarray(table[...])[list(model.label_ids)].astype(np.float64)
    return rows - rows.mean(0)


def _slope(model: Classifier) -> Sides:
    """Frames of updates within the label rows of the head, for all classes together."""
    rows = label_rows(model)
    left, _, right = np.linalg.svd(rows, full_matrices=False)
    left, right = left[:, : len(rows) - 1], right[: len(rows) - 1].T
    return left[None].astype(np.float32), right[None].astype(np.float32)


def _bias(model: Classifier, data: Batch, console: Console | None) -> Sides:
    """All differences of classes, times the direction of a constant."""
    classes = len(model.label_ids)
    left = np.linalg.svd(np.eye(classes) - 1 / classes)[0][:, : classes - 1]
    width = model.sites[BIAS].d_in
    total, mean = np.zeros((width, width)), np.zeros(width)
    for inputs in _head_inputs(model, data, console):
        total, mean = total + inputs.T @ inputs / len(data), mean + inputs.sum(0) / len(data)
    ridge = RIDGE * np.trace(total) / width
    right = np.linalg.solve(total + ridge * np.eye(width), mean)
    right = right / np.linalg.norm(right)
    return left[None].astype(np.float32), right[None, :, None].astype(np.float32)


def _head_inputs(model: Classifier, data: Batch, console: Console | None) -> Iterator[np.ndarray]:
    """What enters the head, for some rows at a time: the derivative of a logit in its row of the head."""
    sites = model.sites.only(families=[BIAS])
    plain = Classifier(model.base, sites, point(), label_ids=model.label_ids)
    second = np.zeros((1, len(model.label_ids), 1), np.float32)
    second[0, 1] = 1.0  # the contrast of the second class against the first
    arrays = {BIAS: (jnp.asarray(second), jnp.eye(sites[BIAS].d_in)[None])}
    for part in differentiated(data, "bias direction", console):
        _, found = shared_features(plain, arrays, part.batch)
        yield np.asarray(found, np.float64)[: len(part.rows), 0]
