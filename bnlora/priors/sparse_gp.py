r"""Sparse Gaussian process: an inducing matrix inside every factor; W stays iid N(0, sigma^2).

    W = sigma (F_r V F_c^T + lam Sigma^{1/2} E),     Sigma = I - P_r (x) P_c,     V, E standard normal

with lam = 1. Three forms have the same law of W but different sites, for different guides:

| form         | sites                  | guide of the paper                                             |
|--------------|------------------------|----------------------------------------------------------------|
| "whitened"   | `<name>.V`, `<name>.E` | any q(V); E ~ N(0, lam_q^2)                                    |
| "unwhitened" | `<name>.U`, `<name>.E` | any q(U), U = L_r V L_c^T ~ MN(0, K_r, K_c); E ~ N(0, lam_q^2) |
| "weights"    | `<name>.V`, `<name>.W` | any q(V); W ~ N(sigma F_r V F_c^T, (lam_q lam sigma)^2 Sigma)  |

In every form the guide's lam_q is relative to the prior's lam: at lam_q = 1 the noise is that of the prior.

A prior `lam` below one is another model, in which the weights deviate less from their conditional mean. At
zero only the inducing matrix is left. A learned `lam` makes frames and `lam` model parameters (type II), as
in the paper's text. The evidences of two such fits are then not comparable.

Reference: Lin et al. (2026), Bayesian-LoRA, arXiv 2601.21003; Ritter et al. (2021) for inducing weights.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import check_option
from bnlora._util.typing import NOISE, WEIGHT
from bnlora.adapters.sites import Site
from bnlora.priors import gp
from bnlora.priors.base import START, Prior, Start, Width, each_factor, require_width, width_factor
from bnlora.priors.distributions import MatrixAffine, MatrixConditional
from bnlora.priors.hyper import (
    ByFactor,
    Hyper,
    Learned,
    by_factor,
    hyper_value,
    require_number,
    require_unit,
)
from bnlora.priors.sides import (
    Frames,
    Inducing,
    Oversize,
    bases,
    frames_side,
    require_frames,
    require_sizes,
)

Form = Literal["whitened", "unwhitened", "weights"]


@dataclass(frozen=True)
class Options:
    """How the inducing structure of a matrix is built: the arguments of `sparse_gp`, checked.

    Raises:
        ValueError: If an option is unknown, a size is below one, or a number is outside its range.
    """

    rows: int = 9
    cols: int = 9
    inducing: Inducing = "frames"
    frames: Frames = "learned"
    form: Form = "whitened"
    lam: Hyper = 1.0
    oversize: Oversize = "clip"
    reliability: float = 0.95

    def __post_init__(self):
        for name, known in {"inducing": Inducing, "oversize": Oversize, "form": Form}.items():
            check_option(name, getattr(self, name), get_args(known))
        require_frames(self.frames)
        require_sizes(self.rows, self.cols)
        require_number("reliability", self.reliability, upper=1.0)
        _require_lam(self.lam)
        if self.inducing == "frames" and self.oversize == "keep":
            raise ValueError("oversize='keep' needs inducing='bases'; a frame cannot exceed its side")
        if self.inducing == "bases" and not isinstance(self.frames, str):
            raise ValueError("custom frames need inducing='frames'; with 'bases' Z and D are learned")
        if self.form != "whitened" and (self.inducing == "bases") != (self.form == "unwhitened"):
            needed = "bases" if self.form == "unwhitened" else "frames"
            raise ValueError(f"form={self.form!r} needs inducing={needed!r}; got {self.inducing!r}")
        if self.form == "weights" and _is_zero(self.lam):
            raise ValueError("form='weights' needs lam > 0: at 0 the weights have no density")


def sparse_gp(
    *,
    scale: ByFactor = 1.0,
    width: Width = "scaled",
    rows: int = 9,
    cols: int = 9,
    inducing: Inducing = "frames",
    frames: Frames = "learned",
    form: Form = "whitened",
    lam: Hyper = 1.0,
    oversize: Oversize = "clip",
    reliability: float = 0.95,
) -> Prior:
    """Sparse-GP prior with one inducing matrix for every factor of every adapter.

    Args:
        scale: Standard deviation of a factor's output for a unit-variance input, one for both factors or one
            for each as `{"a": ..., "b": ...}`: a number, `learned(init_value)`, or a distribution.
        width: `"scaled"` to divide by `sqrt(d_i)`, `"unscaled"` for the standard deviation of a weight.
        rows: Inducing rows `m_r`.
        cols: Inducing columns `m_c`.
        inducing: `"frames"`: orthonormal frames and eigenvalues, without Cholesky factors. `"bases"`: the
            paper's `Z` and `D` with `K = Z Z^T + D^2`.
        frames: With `"frames"`: `"learned"`, a random key that fixes random frames, or
            `{"<family>.<factor>": (rows, columns)}` with matrices of shape (layer, d, k).
        form: Which sites represent the law; see the top of this file.
        lam: Prior scale of the conditional noise in [0, 1]; a number, `learned`, or a distribution. 1 is the
            sparse GP; at 0 only its mean is left. Below 1 the rows of a factor are dependent through frames
            of the length of its sides. The law of an adapted head is then defined on its label rows; it is
            not the marginal of a law over the whole vocabulary.
        oversize: What to do if an inducing size exceeds its side: `"clip"` it to the side, or `"keep"` it as
            the published code does (only with `"bases"`; a frame cannot be larger than its side).
        reliability: Eigenvalue of `P` at the start, in (0, 1).

    Returns:
        A prior with sample sites `<family>.<factor>.V`, shape (layer, k_r, k_c), and `<family>.<factor>.E`,
        shape (layer, d_o, d_i), in the default form.

    Raises:
        ValueError: If an option or `width` is unknown, a size is below one, a scale is not positive, or
            `reliability` is outside (0, 1).

    Reference: Lin et al. (2026), arXiv 2601.21003, section 3; the E-site form makes
        `KL(q(W|U) || p(W|U))` the closed-form KL of two normals.
    """
    scales = by_factor("scale", scale)
    require_width(width)
    structure = Options(rows, cols, inducing, frames, form, lam, oversize, reliability)

    def law(site: Site, factor: str) -> Array:
        name = f"{site.name}.{factor}"
        sigma = hyper_value(f"{name}.scale", scales[factor]) * width_factor(site, factor, width)
        plate = f"{site.name}.layer"
        return _matrices(name, site.shapes[factor], sigma, plate, START[factor], structure)

    return each_factor(law)


def sparse_gp_matrices(
    name: str,
    shape: tuple[int, int, int],
    *,
    sigma: float | Array,
    plate: str,
    init_strategy: Start = "draw",
    rows: int = 9,
    cols: int = 9,
    inducing: Inducing = "frames",
    frames: Frames = "learned",
    form: Form = "whitened",
    lam: Hyper = 1.0,
    oversize: Oversize = "clip",
    reliability: float = 0.95,
) -> Float[Array, "layer d_o d_i"]:
    """Sample a stack of matrices under the sparse GP. Use it to write your own priors.

    Args:
        name: Prefix of the sites `<name>.V` and `<name>.E` and of the parameters.
        shape: `(layer, d_o, d_i)`.
        sigma: Prior standard deviation of an entry; a number, or a random variable of your prior. It must
            broadcast against `shape`.
        plate: Name of the plate over layers.
        init_strategy: Start of `V` in guides of this library: a draw of the prior, or zero.
        rows: Inducing rows `m_r`. This argument and those below are the arguments of `sparse_gp`.
        cols: Inducing columns `m_c`.
        inducing: Orthonormal frames, or the paper's bases.
        frames: Source of the frames.
        form: Which sites represent the law.
        lam: Prior scale of the conditional noise.
        oversize: What to do if an inducing size exceeds its side.
        reliability: Eigenvalue of `P` at the start.

    Returns:
        `W = sigma (F_r V F_c^T + lam Sigma^{1/2} E)`.

    Raises:
        ValueError: If `init_strategy` is unknown, or `Options` raises it.
    """
    check_option("init_strategy", init_strategy, get_args(Start))
    structure = Options(rows, cols, inducing, frames, form, lam, oversize, reliability)
    return _matrices(name, shape, jnp.asarray(sigma), plate, init_strategy, structure)


def _matrices(
    name: str, shape: tuple[int, int, int], sigma: Array, plate: str, init_strategy: Start, options: Options
) -> Array:
    depth, d_o, d_i = shape
    lam = hyper_value(f"{name}.lam", options.lam)
    if options.form == "unwhitened":
        return _from_unwhitened(name, shape, sigma, plate, init_strategy, options, lam)
    rows, cols = (
        _side(name, which, depth, d, size, options)
        for which, d, size in (("rows", d_o, options.rows), ("cols", d_i, options.cols))
    )
    with numpyro.plate(plate, depth):
        V = standard_normal(
            f"{name}.V", (depth, rows.factor.shape[-1], cols.factor.shape[-1]), init=init_strategy
        )
        if options.form == "weights":
            law = MatrixConditional(V, rows, cols, sigma, jnp.broadcast_to(lam, (depth,)))
            return numpyro.sample(f"{name}.W", law, infer={"init": init_strategy, NOISE: True, WEIGHT: True})
    return sigma * _conditional(name, shape, plate, V, rows, cols, options, lam)


def _from_unwhitened(
    name: str,
    shape: tuple[int, int, int],
    sigma: Array,
    plate: str,
    init_strategy: Start,
    options: Options,
    lam: Array,
) -> Array:
    depth, d_o, d_i = shape
    (Z_r, D_r), (Z_c, D_c) = (
        bases(f"{name}.{which}", depth, d, size, oversize=options.oversize, reliability=options.reliability)
        for which, d, size in (("rows", d_o, options.rows), ("cols", d_i, options.cols))
    )
    L_r, L_c = gp.inducing_root(Z_r, D_r), gp.inducing_root(Z_c, D_c)
    rows, cols = gp.inducing_side(Z_r, D_r), gp.inducing_side(Z_c, D_c)
    with numpyro.plate(plate, depth):
        zero = jnp.zeros((depth, L_r.shape[-1], L_c.shape[-1]))
        # NumPyro's MatrixNormal solves all layers in one LAPACK call, which can hang: see `gp.one_by_one`.
        law = dist.TransformedDistribution(dist.Normal(zero, 1.0).to_event(2), MatrixAffine(zero, L_r, L_c))
        U = numpyro.sample(f"{name}.U", law, infer={"init": init_strategy, WEIGHT: True})
    V = gp.whiten(U, L_r, L_c)
    return sigma * _conditional(name, shape, plate, V, rows, cols, options, lam)


def _conditional(
    name: str,
    shape: tuple[int, int, int],
    plate: str,
    V: Array,
    rows: gp.Side,
    cols: gp.Side,
    options: Options,
    lam: Array,
) -> Array:
    """`W / sigma` given the whitened inducing matrix, with a site for the noise unless `lam` is zero."""
    if _is_zero(options.lam):
        return gp.conditional_mean(V, rows, cols)
    with numpyro.plate(plate, shape[0]):
        E = standard_normal(f"{name}.E", shape, init="zero", **{NOISE: True})
    return gp.conditional_weights(V, E, rows, cols, lam)


def standard_normal(name: str, shape: tuple[int, ...], **infer) -> Array:
    """Sample a stack of standard normal matrices, layer axis first, and mark it as part of a factor."""
    law = dist.Normal(jnp.zeros(shape), 1.0).to_event(2)
    return numpyro.sample(name, law, infer={**infer, WEIGHT: True})


def _side(name: str, which: str, depth: int, d: int, size: int, options: Options) -> gp.Side:
    reliability = options.reliability
    if options.inducing == "frames":
        return frames_side(name, which, depth, d, size, frames=options.frames, reliability=reliability)
    return gp.inducing_side(
        *bases(f"{name}.{which}", depth, d, size, oversize=options.oversize, reliability=reliability)
    )


def _require_lam(lam: Hyper) -> None:
    constant = not isinstance(lam, Learned | dist.Distribution | jax.core.Tracer)
    if not constant:
        return require_unit("lam", lam)
    values = np.asarray(lam)
    if values.dtype.kind not in "fiu" or not np.all((values >= 0) & (values <= 1)):
        raise ValueError(f"lam must be a number between 0 and 1; got {lam!r}")
    return None


def _is_zero(lam: Hyper) -> bool:
    return not isinstance(lam, Learned | dist.Distribution | jax.core.Tracer) and bool(
        np.any(np.asarray(lam) == 0)
    )
