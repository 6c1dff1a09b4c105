r"""Priors over adapters: any function from sites to adapters that calls `numpyro.sample` on the way.

| prior       | law of a factor W (d_o x d_i)                             | random variables            |
|-------------|-----------------------------------------------------------|-----------------------------|
| `sparse_gp` | iid N(0, sigma^2), inducing variables inside the weights  | `<family>.<factor>.V`, `.E` |
| `normal`    | iid N(0, sigma^2)                                         | `<family>.<factor>`         |
| `point`     | none: plain LoRA, fitted by maximum likelihood            | none                        |

`sigma = scale / sqrt(d_i)`: a unit-variance input then gives an output of standard deviation
`scale`, whatever the width. As the first two are the same law of W, their evidences may be compared.

Sites may carry two marks in `infer`, which guides of this library read: `start` ("zero" or
"draw") is where optimisation starts, and `conditional_noise` marks a standard normal that only
completes the conditional W | U, for which one learned scale `lam` per matrix suffices.

Reference: Lin et al. (2026), Bayesian-LoRA, arXiv 2601.21003; Hu et al. (2021), LoRA, for `point`.
"""

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float
from numpyro.distributions import constraints

from bnlora import gp
from bnlora.sites import Site, Sites
from bnlora.typing import FACTORS, NOISE, Adapters

Inducing = Literal["frames", "bases"]
Oversize = Literal["clip", "keep"]
Start = Literal["draw", "zero"]

# LoRA's start: A informative, B zero, so that step 0 is the base model.
_START: dict[str, Start] = {"a": "draw", "b": "zero"}
_JITTER = 1e-6  # on D^2, relative to Z Z^T which starts near the identity; part of K wherever K is used


class Prior(Protocol):
    """A NumPyro program over the adapters of the selected sites."""

    def __call__(self, sites: Sites) -> Adapters:
        """Sample (or declare) every adapter of `sites` and return them."""
        ...


def sparse_gp(
    *,
    rows: int = 9,
    cols: int = 9,
    scale: float | Mapping[str, float] = 1.0,
    inducing: Inducing = "frames",
    oversize: Oversize = "clip",
    reliability: float = 0.95,
) -> Prior:
    """Sparse-GP prior with a whitened inducing matrix for every factor of every adapter.

    `W = sigma (F_r V F_c^T + Sigma^{1/2} E)` with standard normal `V` (k_r x k_c) and `E`
    (d_o x d_i). The sides `F_r`, `F_c` are NumPyro parameters that prior and guide share; they
    leave the law of `W` alone (`bnlora.gp`), so the bound for any of them bounds one evidence.

    Args:
        rows: Inducing rows `m_r`.
        cols: Inducing columns `m_c`.
        scale: Standard deviation of a factor's output for a unit-variance input, one for both
            factors or one for each as `{"a": ..., "b": ...}`.
        inducing: `"frames"`: orthonormal frames and eigenvalues, free of Cholesky factors.
            `"bases"`: the paper's `Z` and `D` with `K = Z Z^T + D^2`.
        oversize: Where an inducing size exceeds its side: `"clip"` it to the side, or `"keep"` it
            as the published code does (only with `"bases"`; a frame cannot be larger than its side).
        reliability: Eigenvalue of `P` at the start, in (0, 1).

    Returns:
        A prior with sample sites `<family>.<factor>.V`, shape (layer, k_r, k_c), and
        `<family>.<factor>.E`, shape (layer, d_o, d_i).

    Raises:
        ValueError: On an unknown option, a size below one, a scale that is not positive, or a
            reliability outside (0, 1).

    Reference: Lin et al. (2026), arXiv 2601.21003, section 3; the E-site form makes
        `KL(q(W|U) || p(W|U))` the closed-form KL of two normals.
    """
    scales = _scales(scale)
    _check_sparse_gp(rows, cols, inducing, oversize, reliability)
    matrices = partial(
        sparse_gp_matrices,
        rows=rows,
        cols=cols,
        inducing=inducing,
        oversize=oversize,
        reliability=reliability,
    )

    def factor(site: Site, name: str) -> Array:
        shape = site.shapes[name]
        prefix, sigma = f"{site.name}.{name}", scales[name] / shape[-1] ** 0.5
        return matrices(prefix, shape, sigma=sigma, plate=f"{site.name}.layer", start=_START[name])

    return _each_factor(factor)


def sparse_gp_matrices(
    name: str,
    shape: tuple[int, int, int],
    *,
    sigma: float | Array,
    plate: str,
    start: Start = "draw",
    rows: int = 9,
    cols: int = 9,
    inducing: Inducing = "frames",
    oversize: Oversize = "clip",
    reliability: float = 0.95,
) -> Float[Array, "layer d_o d_i"]:
    """Sample a stack of matrices under the sparse GP: the building block for priors of your own.

    Args:
        name: Prefix of the sites `<name>.V` and `<name>.E` and of the parameters.
        shape: `(layer, d_o, d_i)`.
        sigma: Prior standard deviation of an entry; a number, or a random variable of your prior
            that broadcasts against `shape`.
        plate: Name of the plate over layers.
        start: Where guides of this library start `V`: at a draw of the prior or at zero.
        rows: As in `sparse_gp`, like the arguments after it.
        cols: Inducing columns.
        inducing: Form of the sides.
        oversize: What to do with an inducing size above its side.
        reliability: Start of the eigenvalues of `P`.

    Returns:
        `W = sigma (F_r V F_c^T + Sigma^{1/2} E)`.
    """
    depth, d_o, d_i = shape
    make_side = partial(_side, inducing=inducing, oversize=oversize, reliability=reliability)
    row_side = make_side(f"{name}.rows", depth, d_o, rows)
    col_side = make_side(f"{name}.cols", depth, d_i, cols)
    k_r, k_c = row_side.factor.shape[-1], col_side.factor.shape[-1]
    with numpyro.plate(plate, depth):
        V = _standard_normal(f"{name}.V", (depth, k_r, k_c), start=start)
        E = _standard_normal(f"{name}.E", (depth, d_o, d_i), start="zero", **{NOISE: True})
    inside = gp.conditional_mean(V, row_side, col_side) + gp.conditional_noise(E, row_side, col_side)
    return sigma * inside


def normal(*, scale: float | Mapping[str, float] = 1.0) -> Prior:
    """Independent N(0, scale^2 / d_i) on every weight of every factor.

    Args:
        scale: Standard deviation of a factor's output for a unit-variance input, one for both
            factors or one for each as `{"a": ..., "b": ...}`.

    Returns:
        A prior with sample sites `<family>.<factor>` of the factor's shape.

    Raises:
        ValueError: When a scale is not positive.
    """
    scales = _scales(scale)

    def factor(site: Site, name: str) -> Array:
        depth, d_o, d_i = site.shapes[name]
        spread = jnp.full((depth, d_o, d_i), scales[name] / d_i**0.5)
        with numpyro.plate(f"{site.name}.layer", depth):
            law = dist.Normal(jnp.zeros_like(spread), spread).to_event(2)
            return numpyro.sample(f"{site.name}.{name}", law, infer={"start": _START[name]})

    return _each_factor(factor)


def point() -> Prior:
    """Plain LoRA: adapters are NumPyro parameters, and the objective is the log-likelihood.

    `a` starts uniform on +-1/sqrt(d_in) and `b` at zero, as in Hu et al. (2021). There is no sample
    site, so the guide is empty and a fit is a maximum-likelihood fit by the same loop.
    """

    def factor(site: Site, name: str) -> Array:
        shape, bound = site.shapes[name], site.d_in**-0.5

        def init(key: Array) -> Array:
            if name == "b":
                return jnp.zeros(shape)
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        return numpyro.param(f"{site.name}.{name}", init)

    return _each_factor(factor)


def _each_factor(factor) -> Prior:
    def prior(sites: Sites) -> Adapters:
        return {name: {f: factor(site, f) for f in FACTORS} for name, site in sites.items()}

    return prior


def _standard_normal(name: str, shape: tuple[int, ...], **infer) -> Array:
    return numpyro.sample(name, dist.Normal(jnp.zeros(shape), 1.0).to_event(2), infer=infer)


def _side(
    prefix: str, depth: int, d: int, size: int, *, inducing: Inducing, oversize: Oversize, reliability: float
) -> gp.Side:
    """Declare the parameters of one side of all layers of a family and build the side."""
    k = min(size, d) if oversize == "clip" else size

    if inducing == "frames":
        # Only directions matter. Entries of order one suit the learning rates that suit V.
        free = numpyro.param(f"{prefix}.frame", lambda key: jax.random.normal(key, (depth, d, k)))
        p = numpyro.param(
            f"{prefix}.reliability", jnp.full((depth, k), reliability), constraint=constraints.unit_interval
        )
        return gp.frame_side(free, p)
    Z = numpyro.param(f"{prefix}.Z", lambda key: jax.random.normal(key, (depth, k, d)) * d**-0.5)
    noise = (1 / reliability - 1) ** 0.5  # Z Z^T starts near the identity, where p = 1 / (1 + D^2)
    D = numpyro.param(f"{prefix}.D", jnp.full((depth, k), noise), constraint=constraints.softplus_positive)
    return gp.inducing_side(Z, jnp.sqrt(D**2 + _JITTER))


def _check_sparse_gp(rows: int, cols: int, inducing: str, oversize: str, reliability: float) -> None:
    _require_option("inducing", inducing, get_args(Inducing))
    _require_option("oversize", oversize, get_args(Oversize))
    if min(rows, cols) < 1:
        raise ValueError(f"inducing sizes must be at least 1; got rows={rows}, cols={cols}")
    if not 0 < reliability < 1:
        raise ValueError(f"reliability must lie strictly between 0 and 1; got {reliability}")
    if inducing == "frames" and oversize == "keep":
        raise ValueError("oversize='keep' needs inducing='bases'; a frame cannot exceed its side")


def _scales(scale: float | Mapping[str, float]) -> dict[str, float]:
    scales = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(FACTORS, scale)
    if set(scales) != set(FACTORS) or not all(value > 0 for value in scales.values()):
        raise ValueError(f"scale must be a positive number, or one each for 'a' and 'b'; got {scale}")
    return scales


def _require_option(name: str, got: str, options: tuple[str, ...]) -> None:
    if got not in options:
        near = difflib.get_close_matches(str(got), options, n=1, cutoff=0.0)
        raise ValueError(f"{name} must be one of {options}; got {got!r}, nearest is {near[0]!r}")
