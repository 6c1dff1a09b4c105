r"""Derivatives of logit contrasts in the update of every adapted module, at the untouched base.

    J_c = d (z_c - z_0) / d dW      (d_out, d_in), for each row, module and layer

J itself is large. One backward pass through adapters whose update is zero gives two products of it: with
`a = [Omega^T; A]`, `b = [B, Theta]` and A = B = 0,

    d/dB = J Omega,      d/dA = Theta^T J.

Projections to frames (Theta = L, Omega = R) are the features of a tangent model. Products with random signs
estimate J J^T and J^T J without bias. If one side is narrow, an identity matrix gives J exactly.

References: Immer et al. (2021), arXiv 2008.08400, for the linear model; Halko, Martinsson and Tropp (2011),
Finding structure with randomness, for sketches.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.compilation import program
from bnlora.adapters.sites import Site, Sites
from bnlora.base import Base
from bnlora.data.batch import Batch, Part
from bnlora.priors import point
from bnlora.program.cache import tracked_parts
from bnlora.program.likelihoods import Likelihood
from bnlora.program.model import Classifier

ROWS = 16
"""Number of rows that are differentiated at a time."""

SKETCH = 64
"""Columns of a random sketch of J. A side with at most this many dimensions is not sketched."""

Moments = Mapping[str, tuple[Array, Array]]
"""Sums of J J^T, (layer, d_out, d_out), and of J^T J, (layer, d_in, d_in), by family."""


def differentiated(data: Batch, label: str, console: Console | None) -> Iterator[Part]:
    """Parts of the rows to differentiate, with a progress bar. Widths are few, as each compiles slowly."""
    return tracked_parts(data, min(ROWS, len(data)), label, console, widths="few")


def counted(part: Part) -> Float[Array, " n"]:
    """Weight of each row of a part: 1, or 0 for padding rows."""
    return jnp.asarray(np.arange(len(part.batch)) < len(part.rows), jnp.float32)


def summed(pieces: Iterable[Part], of_part: Callable[[Part], Any]) -> Any:
    """Sum over parts, in float64, of the trees of arrays that `of_part` returns."""
    total: Any = None
    for part in pieces:
        tree = jax.tree.map(lambda x: np.asarray(x, np.float64), of_part(part))
        total = tree if total is None else jax.tree.map(np.add, total, tree)
    return total


def features(
    model: Classifier, weights: Any, frames: Mapping[str, tuple[Array, Array]], batch: Batch
) -> tuple[Float[Array, "n c"], Float[Array, "n k d"]]:
    """Logits of the base, and the derivative of every contrast in the cores U of `dW = L U R^T`.

    Args:
        model: The classifier.
        weights: The frozen base weights.
        frames: L (layer, d_out, m_o) and R (layer, d_in, m_i) of each family, in the order of the sites.
        batch: Rows, with cached activations below the adapters if there are any.

    Returns:
        Logits and derivatives. The coordinates run over families, layers, rows and columns of U, in this
        order.
    """
    right = {name: jnp.swapaxes(R, 1, 2) for name, (_, R) in frames.items()}
    zero = {n: jnp.zeros((L.shape[0], L.shape[2], R.shape[2])) for n, (L, R) in frames.items()}

    def contrasts(cores: Mapping[str, Array], row: Batch) -> tuple[Array, Array]:
        adapters = {
            name: {"a": right[name], "b": frames[name][0] @ core / model.sites[name].scale}
            for name, core in cores.items()
        }
        logits = model.logits(weights, adapters, row)[0]
        return logits[1:] - logits[0], logits

    def of_row(row: Batch) -> tuple[Array, Array]:
        slopes, logits = jax.jacrev(contrasts, has_aux=True)(zero, row)
        flat = [slopes[name].reshape(len(logits) - 1, -1) for name in model.sites]
        return logits, jnp.concatenate(flat, axis=1)

    return _each_row(of_row, model.prepared(weights, batch))


def _each_row(function: Callable[..., Any], batch: Batch, *others: Array) -> Any:
    """Apply `function` to each row, as a batch of one, and each entry of other arrays; stack the results."""
    leaves, form = jax.tree.flatten(batch)

    def of_one(row: list[Array], *entries: Array) -> Any:
        return function(jax.tree.unflatten(form, [x[None] for x in row]), *entries)

    return jax.vmap(of_one)(leaves, *others)


def shared_features(
    model: Classifier, frames: Mapping[str, tuple[Array, Array]], batch: Batch
) -> tuple[Float[Array, "n c"], Float[Array, "n k d"]]:
    """Like `features`, by one compiled program for all models with the same base, sites and label tokens.

    Args:
        model: The classifier; its prior and the rank of its sites are not used.
        frames: As in `features`.
        batch: Rows.

    Returns:
        Logits and derivatives.
    """
    # Rank and alpha cancel in the features; fix them so that models share one compiled program.
    families = tuple(replace(site, rank=1, alpha=1.0) for site in model.sites.values())
    run = program(model.base, _features_of, level=1, static=(3, 4))
    plain = replace(batch, features=None, frames="")
    return run(
        model.base.weights, dict(frames), plain, replace(model.sites, families=families), model.likelihood
    )


def _features_of(
    base: Base, weights: Any, frames: Mapping, batch: Batch, sites: Sites, likelihood: Likelihood
) -> tuple[Array, Array]:
    return features(Classifier(base, sites, point(), likelihood=likelihood), weights, frames, batch)


def moments(
    model: Classifier, weights: Any, batch: Batch, keys: Array, row_weights: Float[Array, " n"]
) -> Moments:
    """Weighted sums over rows of J J^T and J^T J: exact if a side is narrow, otherwise unbiased estimates.

    For two classes, J is the derivative of the contrast. For more classes, J is the gradient of log p(c) at a
    class c drawn from the base's prediction. The sums then estimate J J^T and J^T J weighted by the Fisher
    information of the logits.

    Args:
        model: The classifier.
        weights: The frozen base weights.
        batch: Rows; labels are not used.
        keys: A random key for each row.
        row_weights: Weight of each row, 0 for padding rows.
    """

    def of_row(row: Batch, key: Array) -> dict[str, tuple[Array, Array]]:
        class_key, *rest = jax.random.split(key, 1 + len(model.sites))
        probes = {name: _probes(site, k) for (name, site), k in zip(model.sites.items(), rest, strict=True)}

        def objective(free: Mapping[str, Mapping[str, Array]]) -> Array:
            adapters = {name: _joined(probes[name], free[name], model.sites[name]) for name in probes}
            logits = model.logits(weights, adapters, row)[0]
            if len(logits) == 2:
                return logits[1] - logits[0]
            # E_c[g_c g_c^T] with c ~ p is the Fisher information, so one sampled class is unbiased.
            label = jax.random.categorical(class_key, jax.lax.stop_gradient(logits))
            return jax.nn.log_softmax(logits)[label]

        free = {name: _zeros(site, probes[name]) for name, site in model.sites.items()}
        slopes = jax.grad(objective)(free)
        return {name: _sides(slopes[name]) for name in slopes}

    def total(roots: tuple[Array, Array]) -> tuple[Array, Array]:
        left, right = roots
        weighted = row_weights[:, None, None, None]
        return (
            jnp.einsum("nlok,nlpk->lop", weighted * left, left),
            jnp.einsum("nlki,nlkj->lij", weighted * right, right),
        )

    rows = _each_row(of_row, model.prepared(weights, batch), keys)
    return {name: total(roots) for name, roots in rows.items()}


def _probes(site: Site, key: Array) -> dict[str, Array]:
    """Theta (layer, d_out, k) and Omega (layer, d_in, k): identity on a narrow side, else random signs."""
    narrow = min(site.d_in, site.d_out)
    if narrow <= SKETCH:  # the product with the identity is J itself, so the other side needs no columns
        whole = {"Theta" if site.d_out == narrow else "Omega": jnp.eye(narrow)}
        empty = {"Theta": jnp.zeros((site.d_out, 0)), "Omega": jnp.zeros((site.d_in, 0))}
        return {n: jnp.broadcast_to(x, (site.depth, *x.shape)) for n, x in (empty | whole).items()}
    keys = jax.random.split(key)
    sizes = {"Theta": site.d_out, "Omega": site.d_in}
    # E[Omega Omega^T] = I because of the factor 1 / sqrt(SKETCH), so Y Y^T estimates J J^T without bias.
    return {
        name: jax.random.rademacher(k, (site.depth, size, SKETCH), jnp.float32) / SKETCH**0.5
        for (name, size), k in zip(sizes.items(), keys, strict=True)
    }


def _zeros(site: Site, probes: Mapping[str, Array]) -> dict[str, Array]:
    """A and B at zero; the objective is differentiated with respect to them."""
    return {
        "A": jnp.zeros((site.depth, probes["Theta"].shape[2], site.d_in)),
        "B": jnp.zeros((site.depth, site.d_out, probes["Omega"].shape[2])),
    }


def _joined(probes: Mapping[str, Array], free: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The adapter `a = [Omega^T; A]`, `b = [B, Theta]`."""
    a = jnp.concatenate([jnp.swapaxes(probes["Omega"], 1, 2), free["A"]], axis=1)
    b = jnp.concatenate([free["B"], probes["Theta"]], axis=2)
    return {"a": a, "b": b / site.scale}


def _sides(slopes: Mapping[str, Array]) -> tuple[Array, Array]:
    """Y (layer, d_out, k), Z (layer, k, d_in): Y Y^T ~ J J^T and Z^T Z ~ J^T J; both are J if it is exact."""
    if slopes["B"].shape[2] == 0:
        return slopes["A"], slopes["A"]
    if slopes["A"].shape[1] == 0:
        return slopes["B"], slopes["B"]
    return slopes["B"], slopes["A"]
