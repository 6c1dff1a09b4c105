"""The guide of the paper: one flow for every latent site, and a scale `lam` of the conditional noise.

Reference: Lin et al. (2026), arXiv 2601.21003 (row-shared flow on the inducing matrix).
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

from bnlora._util.checks import check_option
from bnlora.guides.family import Family
from bnlora.guides.flow import block_neural, iaf, row_shared, spline
from bnlora.guides.guide import Guide
from bnlora.guides.latent import init_to_base
from bnlora.guides.noise import noise

FlowName = Literal["row-shared", "iaf", "spline", "block-neural"]


def SiteFlow(
    prior: Callable[..., Any],
    *,
    flow: FlowName = "row-shared",
    hidden: int | None = None,
    blocks: int | None = None,
    init_scale: float = 0.01,
    lam_init: float = 0.01,
    lam_max: float = 1.0,
    init_loc_fn: Callable[..., Any] = init_to_base,
) -> Guide:
    """Guide with one Gaussian base and one flow for every latent site of a prior.

    Args:
        prior: The prior program, `model.prior`. It is traced once for shapes; the language model is not.
        flow: `"row-shared"`, as in the published code, or a flow over all numbers of a layer: `"iaf"`,
            `"spline"` or `"block-neural"`.
        hidden: Width of the flow's hidden layers (16 in the published code). If omitted, the default of its
            family.
        blocks: Residual blocks in the network of an autoregressive flow (2 in the published code). `"spline"`
            and `"block-neural"` have none.
        init_scale: Standard deviation of the base at the start, in unconstrained space.
        lam_init: Start of every `lam`. A small value lets the optimisation find the signal before the noise.
        lam_max: Upper bound of `lam`. 1 gives the full family; a smaller value restricts it.
        init_loc_fn: NumPyro start strategy for the location, e.g.
            `numpyro.infer.init_to_value(values={...})`. The default uses the start that the prior marks.

    Returns:
        The guide.

    Raises:
        ValueError: If a latent site is discrete, the flow is unknown, or not
            `0 < lam_init < lam_max <= 1`.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def prior(*_):
        ...     return numpyro.sample("w", dist.Normal(0, 1).expand([3, 9]).to_event(2))
        >>> SiteFlow(prior)
        SiteFlow(1,608 parameters)
          w (3, 9): Gaussian with row-shared flow, scales within e^3 of the base's, beyond 17 numbers blind to
          some predecessors, 1,608
    """
    variants: dict[str, Callable[..., Family]] = {
        "row-shared": row_shared,
        "iaf": iaf,
        "spline": spline,
        "block-neural": block_neural,
    }
    check_option("flow", flow, get_args(FlowName))
    options = {
        name: value for name, value in {"hidden": hidden, "blocks": blocks}.items() if value is not None
    }
    if "blocks" in options and flow in ("spline", "block-neural"):
        raise ValueError(f"flow={flow!r} has no residual blocks; leave `blocks` out")
    return Guide(
        prior,
        variants[flow](**options, init_scale=init_scale),
        noise=noise(lam_init=lam_init, lam_max=lam_max),
        init_loc_fn=init_loc_fn,
        name="SiteFlow",
    )
