r"""Matrix normal with a scale for every row and every column: W ~ MN(0, diag(r)^2, diag(c)^2).

    W_ij ~ N(0, (sigma r_i c_j)^2),     sigma = scale / sqrt(d_i)

Rows of `a` and columns of `b` are ranks, so learned scales can switch ranks off. Columns of `a` are inputs
and rows of `b` outputs of the adapted layer. Only products r_i c_j are identified: multiplying `r` by a
number and dividing `c` by it changes nothing.

Reference: Louizos and Welling (2016), for matrix normal laws of weights; MacKay (1994), for learned scales.
"""

import numpyro.distributions as dist
from jax import Array

from bnlora.adapters.sites import Site
from bnlora.priors.base import Prior, Width, each_factor, require_width, sample_matrices, width_factor
from bnlora.priors.hyper import ByFactor, Hyper, by_factor, hyper_value, is_random, learned, require_positive


def matrix_normal(
    *,
    scale: ByFactor = 1.0,
    rows: Hyper = learned(1.0),  # noqa: B008 a frozen mark, the same for every call
    cols: Hyper = learned(1.0),  # noqa: B008
    width: Width = "scaled",
) -> Prior:
    """Normals whose standard deviation is a row scale times a column scale, separate for each layer.

    Args:
        scale: Common scale; as in `normal`, but a number or `learned`.
        rows: Scales of the rows, shape `(layer, d_o)`: a number, `learned(init_value)`, or the distribution
            of each.
        cols: Scales of the columns, shape `(layer, d_i)`.
        width: `"scaled"` to divide by `sqrt(d_i)`, `"unscaled"` for the standard deviation of a weight.

    Returns:
        A prior with sample sites `<family>.<factor>` (or `.z` if a scale is random), and
        `<family>.<factor>.row_scale` and `.column_scale`.

    Raises:
        ValueError: If a scale can be non-positive or `width` is unknown.
    """
    scales = by_factor("scale", scale)
    require_width(width)
    require_positive("rows", rows)
    require_positive("cols", cols)

    def law(site: Site, factor: str) -> Array:
        name, (_, d_o, d_i) = f"{site.name}.{factor}", site.shapes[factor]
        spread = hyper_value(f"{name}.scale", scales[factor]) * width_factor(site, factor, width)
        row, column = ("rank", "input") if factor == "a" else ("output", "rank")
        r = hyper_value(f"{name}.row_scale", rows, event=(d_o,), site=site, dims=(row,))
        c = hyper_value(f"{name}.column_scale", cols, event=(d_i,), site=site, dims=(column,))
        sigma = spread * r[..., :, None] * c[..., None, :]
        random = next((h for h in (scales[factor], rows, cols) if is_random(h)), None)
        return sample_matrices(site, factor, lambda s: dist.Normal(0.0, s), sigma, hyper=random)

    return each_factor(law)
