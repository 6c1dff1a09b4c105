"""Options that all samplers of chains share, and the function that runs chains with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, get_args

import jax
from jax import Array
from rich.console import Console

from bnlora._util.checks import check_option
from bnlora.data.batch import Batch
from bnlora.infer.mcmc.chains import Chains
from bnlora.infer.mcmc.run import Method, Plan, run
from bnlora.infer.mcmc.target import FixAt, Start, starts, target
from bnlora.infer.mcmc.whitened import Geometry, whitened
from bnlora.infer.svi.result import Fit
from bnlora.program.model import Classifier


class Options(TypedDict, total=False):
    """How many chains and draws, where they start, and where they are kept.

    Attributes:
        num_chains: Number of chains, run together; 4 when omitted.
        num_draws: Kept draws of each chain; 1,000 when omitted.
        thinning: Transitions from one kept draw to the next; 1 when omitted.
        init_strategy: `"fit"` (the default with `given`) starts at draws of `given`. `"prior"` starts at
            draws of the prior. `"pathfinder"` starts at draws of a normal approximation along an ascent of
            the log-density. `"zero"` (the default without `given`) starts where fits start, with small
            noise, or at draws of the Gaussian if `mass` is one.
        fix_at: Value of the sites that are not sampled: the `"mean"` (the default) of draws of `given`, or
            one `"draw"`.
        folder: Where draws are stored during the run; a killed run resumes from there.
        piece: Kept draws between two writes; must divide `num_draws`. At most 100 when omitted.
        console: Where to draw progress bars; the terminal or notebook when omitted.
    """

    num_chains: int
    num_draws: int
    thinning: int
    init_strategy: Start
    fix_at: FixAt
    folder: str | Path | None
    piece: int | None
    console: Console | None


def sampled(
    key: Array,
    model: Classifier,
    train: Batch,
    method: Method,
    sites: Sequence[str] | None,
    given: Fit | None,
    options: Options,
    geometry: Geometry | None = None,
) -> Chains:
    """Fix the sites that are not sampled, compute the starts, and run the chains."""
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        check_option("an option", unknown[0], tuple(Options.__annotations__))
    fix_at: FixAt = options.get("fix_at", "mean")
    init_strategy: Start = options.get("init_strategy", "zero" if given is None else "fit")
    check_option("init_strategy", init_strategy, get_args(Start))
    folder, console = options.get("folder"), options.get("console")
    plan = Plan(
        options.get("num_chains", 4),
        options.get("num_draws", 1000),
        options.get("thinning", 1),
        options.get("piece"),
        None if folder is None else Path(folder),
    )
    fix_key, start_key, run_key = jax.random.split(key, 3)
    density = target(fix_key, model, train, sites=sites, given=given, fix_at=fix_at, console=console)
    if geometry is not None:
        density = whitened(density, geometry)
    first = starts(start_key, density, given, init_strategy, plan.num_chains)
    return run(run_key, density, method, plan, first, console)
