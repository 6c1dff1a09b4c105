r"""Frames of the core prior, computed from rows without their labels.

| source        | L and R are the leading eigenvectors of                                                  |
|---------------|------------------------------------------------------------------------------------------|
| "jacobian"    | `sum_i J_i J_i^T` and `sum_i J_i^T J_i`, J_i the derivative of the base's logit contrast |
| "activations" | `W X W^T` and `X = sum x x^T`, x the input of the module (`.activations`)                |
| "weights"     | `W W^T` and `W^T W`, W the frozen kernel                                                 |
| "random"      | no matrix: L and R are Haar-distributed                                                  |
| a mapping     | no matrix: the mapping has (L, R) by family                                              |

Frames depend only on the inputs and the base, so p(y | x) under the core prior is a proper conditional
evidence. The sums run over parts of the rows; no array of size rows x weights is stored.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from rich.console import Console

from bnlora._util.checks import check_key, check_option, is_integer, listed
from bnlora._util.compilation import program
from bnlora._util.fingerprint import fingerprint
from bnlora.adapters.frames import Frame, Frames, Source
from bnlora.adapters.sites import HEAD, Site, Sites
from bnlora.base import Base
from bnlora.data.batch import Batch, Part, check_form
from bnlora.priors import point
from bnlora.program.cache import cache_prefix
from bnlora.program.likelihoods import Likelihood
from bnlora.program.model import Classifier
from bnlora.program.tangent.activations import second_moments
from bnlora.program.tangent.gradients import counted, differentiated, moments, shared_features, summed
from bnlora.program.tangent.targets import OWN, check_targets, label_rows, own_sides, target_sites

Size = int | float | Mapping[str, int | float]
Sides = tuple[Float[np.ndarray, "l d_out d_out"], Float[np.ndarray, "l d_in d_in"]]
NULL = 1e-6
"""Eigenvalues below this share of the largest count as zero: frames exclude the null space."""

STILL = 1e-6
"""Units up to this size, in nats, are rounding errors of a float32 logit."""


def frames(
    key: Array,
    base: Base,
    targets: Sequence[str],
    data: Batch,
    *,
    label_ids: Int[Any, " c"] | None = None,
    likelihood: Likelihood | None = None,
    size: Size = 16,
    layers: slice | Iterable[int] | None = None,
    source: Source | Mapping[str, tuple[Any, Any]] = "jacobian",
    label_free: bool = True,
    console: Console | None = None,
) -> Frames:
    """Choose the directions of the core prior's updates.

    Args:
        key: Random key of sketches and of random frames.
        base: The frozen base.
        targets: A list of modules to adapt, as in `bnlora.select`, `"slope"` for a multiple of the base's own
            logits, and `"bias"` for a class bias (`bnlora.program.tangent.targets`).
        data: Rows; labels are not used. Cached activations below the adapted layers are used.
        label_ids: Token id of each class.
        likelihood: Other classes than words, in place of `label_ids`, as in `bnlora.Classifier`. With
            completions the head and its targets cannot be adapted: they would need a frame of the vocabulary.
        size: Number of directions of each side, for all families or by family: a whole number, or a share of
            the energy between 0 and 1 that every layer must reach. A side gets at most the directions that
            it has: directions of zero energy do not count, and the output side of the head has one less
            than the number of label tokens.
        layers: Layers to adapt, as in `bnlora.select`.
        source: The source of the frames (see the table above), or (L, R) by family; their columns are
            orthonormalised.
        label_free: Whether the frames in a mapping `source` were computed without labels.
        console: Where to draw the progress bar; the terminal or notebook if omitted.

    Returns:
        Frames with their sites, `frames.sites`, each of rank m_i.

    Raises:
        ValueError: If a size is not a positive number, exceeds a side, or is a share but the source has no
            energies; if rows or targets do not fit the base; if frames in a mapping are not finite or have
            dependent columns; or if no update in the frames of a family changes a contrast.

    Example:
        >>> chosen = bl.frames(key, base, ["lm_head"], rows, label_ids=(3, 5), size=4)
        >>> chosen
        Frames(4 coordinates from jacobian: lm_head 1x1x4)
    """
    key = check_key(key)
    check_form("given", data)
    if not len(data):
        raise ValueError("frames need at least one row; got none")
    if not isinstance(source, Mapping):
        check_option("source", source, tuple(s for s in get_args(Source) if s != "given"))
    sites = target_sites(base, targets, layers)
    model = Classifier(base, sites, point(), label_ids=label_ids, likelihood=likelihood)
    check_targets(model)
    inner = model.sites.only(families=[name for name in sites if name not in OWN])
    sizes = _sizes(inner, size, energies=source in ("jacobian", "activations", "weights"))
    data = cache_prefix(model, data, console=console)
    sides, energies = _chosen(key, model, inner, sizes, source, data, console)
    sides |= own_sides(model, data, console)
    units = _units(model, sides, data, console)
    families = {
        name: Frame(left, right, units[name], energies.get(name, ()))
        for name, (left, right) in ((name, sides[name]) for name in sites)
    }
    ranked = (
        replace(site, rank=families[name].right.shape[2], alpha=float(families[name].right.shape[2]))
        for name, site in sites.items()
    )
    return Frames(
        families,
        replace(sites, families=tuple(ranked)),
        model.likelihood,
        "given" if isinstance(source, Mapping) else source,
        label_free or not isinstance(source, Mapping),
        fingerprint(base.weights),
    )


def _chosen(
    key: Array,
    model: Classifier,
    sites: Sites,
    sizes: Mapping[str, int | float],
    source: Source | Mapping[str, tuple[Any, Any]],
    data: Batch,
    console: Console | None,
) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Frames of every module, and their energies if the source has any."""
    if not len(sites):
        return {}, {}
    if isinstance(source, Mapping):
        return _from_mapping(sites, source), {}
    if source == "random":
        return _random(key, sites, sizes), {}
    whole = Classifier(model.base, sites, point(), likelihood=model.likelihood)
    if source == "weights":
        return _leading(_weights(whole), sizes)
    if source == "activations":
        return _leading(_activations(whole, data, console), sizes)
    return _leading(_jacobian(key, whole, data, console), sizes)


def _sizes(sites: Sites, size: Size, *, energies: bool) -> dict[str, int | float]:
    """The requested size of every family, checked."""
    by_family = dict(size) if isinstance(size, Mapping) else dict.fromkeys(sites, size)
    if set(by_family) != set(sites):
        raise ValueError(
            f"size must be one value, or one for each family {listed(tuple(sites))}; "
            f"got {listed(tuple(by_family))}"
        )
    for name, value in by_family.items():
        side = smaller_side(sites[name])
        if is_integer(value) and 1 <= value <= side:
            continue
        if isinstance(value, float) and 0 < value < 1 and energies:
            continue
        share = ", or a share of the energy between 0 and 1" if energies else ""
        raise ValueError(
            f"the size of {name!r} must be a whole number from 1 to {side}, its smaller side{share}; "
            f"got {value!r}"
        )
    return by_family


def smaller_side(site: Site) -> int:
    """The largest possible size. For the head, whose classes are few, only the input side limits it."""
    return site.d_in if site.module == HEAD else min(site.d_in, site.d_out)


def _jacobian(key: Array, model: Classifier, data: Batch, console: Console | None) -> dict[str, Sides]:
    """Sums over all rows of J J^T and J^T J, in float64."""
    keys = jax.random.split(key, len(data))

    def of_part(part: Part) -> Any:
        padded = np.concatenate([part.rows, np.zeros(len(part.batch) - len(part.rows), int)])
        return program(model, moments, level=1)(model.base.weights, part.batch, keys[padded], counted(part))

    return summed(differentiated(data, "frames", console), of_part)


def _activations(model: Classifier, data: Batch, console: Console | None) -> dict[str, Sides]:
    """Sums over rows and tokens of y y^T and x x^T, with x the input and y = W x the output of a module."""

    def of_part(part: Part) -> Any:
        return program(model, second_moments, level=1)(model.base.weights, part.batch, counted(part))

    inputs = summed(differentiated(data, "frames", console), of_part)
    return {
        name: (W @ inputs[name] @ np.swapaxes(W, 1, 2), inputs[name]) for name, W in _kernels(model).items()
    }


def _weights(model: Classifier) -> dict[str, Sides]:
    """W W^T and W^T W of the frozen kernels."""
    return {name: (W @ np.swapaxes(W, 1, 2), np.swapaxes(W, 1, 2) @ W) for name, W in _kernels(model).items()}


def _kernels(model: Classifier) -> dict[str, Float[np.ndarray, "l d_out d_in"]]:
    """The frozen kernels of every family; for the head, the label rows minus their mean."""
    module, kernels = model.base.bind(model.base.weights), {}
    for name, site in model.sites.items():
        if site.module == HEAD:
            kernels[name] = label_rows(model)[None]
        else:
            stack = np.asarray(module.kernels(site.module, site.layers), np.float64)
            kernels[name] = np.swapaxes(stack, 1, 2)
    return kernels


def _leading(
    grams: Mapping[str, Sides], sizes: Mapping[str, int | float]
) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Leading eigenvectors of both sides by family, and all eigenvalues."""
    sides, energies = {}, {}
    for name, pair in grams.items():
        parts_of = [_eigen(stack) for stack in pair]
        energies[name] = tuple(values for values, _ in parts_of)
        sides[name] = tuple(vectors[:, :, : _width(values, sizes[name])] for values, vectors in parts_of)
    return sides, energies


def _eigen(stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (layer, d), decreasing, and eigenvectors (layer, d, d) whose largest entry is positive."""
    values, vectors = np.linalg.eigh(stack)
    values, vectors = np.maximum(values[:, ::-1], 0.0), vectors[:, :, ::-1]
    # Fix the sign of each eigenvector, which LAPACK leaves open, so that frames are reproducible.
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], axis=1)
    return values, (vectors * np.where(largest < 0, -1.0, 1.0)).astype(np.float32)


def _width(values: np.ndarray, size: int | float) -> int:
    """Number of directions of a side: as requested, but none with zero energy in every layer."""
    nonzero = int((values > NULL * np.maximum(values[:, :1], 1e-30)).sum(1).max())
    if is_integer(size):
        return max(min(int(size), nonzero), 1)
    # The smallest number of directions whose share of the energy reaches `size` in every layer.
    shares = np.cumsum(values, 1) / np.maximum(values.sum(1, keepdims=True), 1e-30)
    return max(min(int((shares < size).sum(1).max()) + 1, nonzero), 1)


def _random(key: Array, sites: Sites, sizes: Mapping[str, int | float]) -> dict[str, tuple]:
    """Haar-distributed frames."""
    sides = {}
    for (name, site), k in zip(sites.items(), jax.random.split(key, len(sites)), strict=True):
        is_head, size = site.module == HEAD, int(sizes[name])
        widths = min(size, site.d_out - is_head), size
        left, right = (
            np.asarray(jax.random.normal(one, (site.depth, d, m)), np.float64)
            for one, d, m in zip(jax.random.split(k), (site.d_out, site.d_in), widths, strict=True)
        )
        if is_head:  # a part that all classes share changes no contrast
            left = left - left.mean(1, keepdims=True)
        sides[name] = _orthonormal(left), _orthonormal(right)
    return sides


def _from_mapping(sites: Sites, source: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple]:
    """The caller's frames, checked and orthonormalised."""
    if set(source) != set(sites):
        raise ValueError(f"source must have frames for {listed(tuple(sites))}; got {listed(tuple(source))}")
    sides = {}
    for name, site in sites.items():
        pair = tuple(np.asarray(x, np.float32) for x in source[name])
        for side, x, d in zip(("L", "R"), pair, (site.d_out, site.d_in), strict=True):
            if x.ndim != 3 or x.shape[:2] != (site.depth, d) or not 1 <= x.shape[2] <= d:
                raise ValueError(
                    f"{side} of {name!r} must have the shape ({site.depth}, {d}, m) with m from 1 to {d}; "
                    f"got {x.shape}"
                )
            if not np.isfinite(x).all() or (np.linalg.matrix_rank(x) < x.shape[2]).any():
                raise ValueError(f"{side} of {name!r} must be finite, with linearly independent columns")
        sides[name] = tuple(map(_orthonormal, pair))
    return sides


def _orthonormal(stack: np.ndarray) -> np.ndarray:
    q, r = np.linalg.qr(stack.astype(np.float64))
    # A positive diagonal of R makes the decomposition unique; for normal entries, Q is then Haar-distributed.
    signs = np.sign(np.diagonal(r, axis1=1, axis2=2))
    return (q * np.where(signs == 0, 1.0, signs)[:, None, :]).astype(np.float32)


def _units(
    model: Classifier, sides: Mapping[str, tuple], data: Batch, console: Console | None
) -> dict[str, float]:
    """Root mean square of a contrast between two classes, over rows, under a standard normal core."""
    arrays = {name: (jnp.asarray(sides[name][0]), jnp.asarray(sides[name][1])) for name in model.sites}
    sums = dict.fromkeys(model.sites, 0.0)
    for part in differentiated(data, "units", console):
        _, slopes = shared_features(model, arrays, part.batch)
        phi = np.asarray(slopes, np.float64)[
            : len(part.rows)
        ]  # (row, class - 1, coordinate), without padding
        ends = np.cumsum([L.shape[0] * L.shape[2] * R.shape[2] for L, R in arrays.values()])
        for name, block in zip(model.sites, np.split(phi, ends[:-1], axis=2), strict=True):
            sums[name] += contrast_energy(block).sum()
    units = {name: float(np.sqrt(total / len(data))) for name, total in sums.items()}
    still = [name for name, unit in units.items() if not unit > STILL]
    if still:
        raise ValueError(
            f"no update of {listed(still)} in these frames changes a logit contrast of these rows (q_proj "
            "and k_proj have no effect if every row is a single token); leave it out, or use other rows or "
            "frames"
        )
    return units


def contrast_energy(phi: Float[np.ndarray, "n k d"]) -> Float[np.ndarray, " n"]:
    """For each row, the mean over pairs of classes of the squared norm of their contrast's derivative.

    Args:
        phi: Derivative of the contrast of each class, except the first, against the first class.
    """
    whole = np.concatenate([np.zeros_like(phi[:, :1]), phi], axis=1)
    centred = whole - whole.mean(1, keepdims=True)
    # The mean over all pairs of |phi_c - phi_d|^2 is 2 / (C - 1) times the sum of squares about the mean.
    return 2 / (whole.shape[1] - 1) * (centred**2).sum((1, 2))
