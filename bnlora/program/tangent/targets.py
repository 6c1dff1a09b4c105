r"""Targets of a core prior: modules of the base, and two special updates of the head.

| target    | what its core multiplies                                                      | size         |
|-----------|-------------------------------------------------------------------------------|--------------|
| a module  | directions of its own weight update                                           | as requested |
| `"slope"` | the base's own logits: its inverse temperature as a random variable           | C-1 by C-1   |
| `"bias"`  | a direction in which all rows have nearly the same activation: a class bias   | C-1 by 1     |

Slope and bias are updates `dW = s L U R^T` of the head like any other, so a network can have them too. Their
frames do not depend on the source of the other frames. For the slope, R spans the label rows of the head. For
the bias, R is the ridge solution r of `h_i r = 1` over the rows, where h_i is the input of the head. The
slope of an encoder multiplies the part of its logits that depends on the text, not the bias of its head.
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
from bnlora.program.likelihoods import Labels, readout
from bnlora.program.model import Classifier
from bnlora.program.tangent.gradients import differentiated, shared_features

SLOPE, BIAS = "slope", "bias"
"""Names of the targets, and of the families, of the base's own logits and of a class bias."""

OWN = (SLOPE, BIAS)

RIDGE = 1e-3
"""Ridge of the bias direction, relative to the mean square of an activation."""

Sides = tuple[Float[np.ndarray, "1 c m_o"], Float[np.ndarray, "1 d m_i"]]


def target_sites(base: Base, targets: Sequence[str], layers: Any) -> Sites:
    """Sites of rank one for modules, as `bnlora.select` returns them, followed by slope and bias.

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


def check_targets(model: Classifier) -> None:
    """Raise `ValueError` for targets that cannot have frames.

    If the head has no row of its own for each class, it has one for every token of the vocabulary, and a
    frame of it would be too large. If a classification head is zero, no update below it changes a logit to
    first order.
    """
    in_head = [name for name, site in model.sites.items() if site.module == HEAD]
    below = [name for name in model.sites if name == SLOPE or name not in in_head]
    if below and isinstance(readout(model.likelihood), Labels) and not label_rows(model).any():
        raise ValueError(
            f"the targets {below} change no logit to first order, because the classification head of the "
            f"base is zero, as a new one is; use {HEAD!r} and {BIAS!r}, or adapt them in the network itself"
        )
    if in_head and not class_rows(model):
        raise ValueError(
            f"the targets {in_head} are in the head, whose {model.base.modules[HEAD][1]:,} rows are all read "
            "by completions; adapt modules of the layers, such as 'v_proj' and 'o_proj'"
        )


def own_sides(model: Classifier, data: Batch, console: Console | None) -> dict[str, Sides]:
    """Frames of slope and bias, if the model has these families."""
    sides = {}
    if SLOPE in model.sites:
        sides[SLOPE] = _slope(model)
    if BIAS in model.sites:
        sides[BIAS] = _bias(model, data, console)
    return sides


def class_rows(model: Classifier) -> tuple[int, ...]:
    """The row of the head of every class; empty if the classes have none."""
    likelihood = readout(model.likelihood)
    return tuple(range(likelihood.num_logits)) if isinstance(likelihood, Labels) else model.label_ids


def label_rows(model: Classifier) -> Float[np.ndarray, "c d"]:
    """The rows of the classes in the head minus their mean: what all classes share changes no contrast."""
    module = model.base.bind(model.base.weights)
    rows = np.asarray(module.head_rows(class_rows(model)), np.float64)
    return rows - rows.mean(0)


def _slope(model: Classifier) -> Sides:
    """Frames of the slope: both sides span the centred label rows of the head."""
    rows = label_rows(model)
    left, _, right = np.linalg.svd(rows, full_matrices=False)
    # The centred rows have rank C - 1 at most, so the last direction is dropped.
    left, right = left[:, : len(rows) - 1], right[: len(rows) - 1].T
    return left[None].astype(np.float32), right[None].astype(np.float32)


def _bias(model: Classifier, data: Batch, console: Console | None) -> Sides:
    """Frames of the bias: differences of classes on the left, the direction of a constant on the right."""
    classes = model.likelihood.num_logits
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
    """The inputs of the head, for some rows at a time: the derivative of a logit in its row of the head."""
    sites = model.sites.only(families=[BIAS])
    plain = Classifier(model.base, sites, point(), likelihood=model.likelihood)
    second = np.zeros((1, model.likelihood.num_logits, 1), np.float32)
    second[0, 1] = 1.0  # the contrast of the second class against the first
    arrays = {BIAS: (jnp.asarray(second), jnp.eye(sites[BIAS].d_in)[None])}
    for part in differentiated(data, "bias direction", console):
        _, slopes = shared_features(plain, arrays, part.batch)
        yield np.asarray(slopes, np.float64)[: len(part.rows), 0]
