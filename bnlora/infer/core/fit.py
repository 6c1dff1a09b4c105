r"""From labelled rows to a posterior under the core prior, in one call.

    trunk  ->  frames  ->  features  ->  scales by evidence  ->  Laplace's Gaussian  ->  SVI from there

Every step is also a public function. `fit_core` fixes the order and measures the seconds of each step.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpyro.distributions as dist
import optax
from jax import Array
from jaxtyping import Int
from rich.console import Console

from bnlora._util.checks import check_key
from bnlora._util.display import Showable, Shown, Table
from bnlora._util.progress import timed
from bnlora._util.typing import Adapters, Parameters
from bnlora.adapters.frames import Frames, Source
from bnlora.adapters.sites import HEAD, Sites
from bnlora.base import Base
from bnlora.data.batch import Batch
from bnlora.guides import Guide, around
from bnlora.infer.core.gaussian import Gaussian, laplace
from bnlora.infer.core.scales import Scales, choose_scales
from bnlora.infer.svi.fit import fit
from bnlora.infer.svi.options import Optimisation
from bnlora.infer.svi.result import Fit
from bnlora.priors import core, point
from bnlora.program.cache import cache_prefix
from bnlora.program.likelihoods import Likelihood, Words, readout, require_softmax
from bnlora.program.likelihoods.labels import Labels
from bnlora.program.model import Classifier, chosen_likelihood
from bnlora.program.tangent.frames import Size, frames, smaller_side
from bnlora.program.tangent.model import Tangent
from bnlora.program.tangent.targets import BIAS, OWN, SLOPE, target_sites

SIZES: Mapping[str, int] = {"q_proj": 8, "k_proj": 8, "v_proj": 32}
"""Default modules and sizes, used together with `SLOPE`; fixed on seeds 0 to 2 of `benchmarks seeds`."""

OTHERS = 16
"""Size of modules that are not in `SIZES`."""

SCALE_PRIOR = dist.HalfNormal(5.0)
"""Keeps scales finite on separable rows, and hardly changes them if the rows are informative."""

STEPS, RATE, PARTICLES = 100, 1e-2, 64
"""Adam from Laplace's Gaussian: a hundred full-batch steps, with a cosine decay of the rate to zero.

The start is near the optimum, so gradient noise limits the fit; therefore each step uses many draws."""


@dataclass(frozen=True, repr=False, eq=False)
class CoreFit(Shown):
    """A posterior under the core prior for `predict`, with the results of all steps.

    Attributes:
        frames: The frames.
        scales: The scales, chosen by evidence.
        gaussian: Laplace's Gaussian at these scales.
        fit: The variational fit, which starts at the Gaussian.
        seconds: Wall time of each step.

    Example:
        >>> core_fit.draw_adapters(key, 5)["lm_head"]["b"].shape  # draws, layers, label rows, rank
        (5, 1, 2, 2)
    """

    frames: Frames
    scales: Scales
    gaussian: Gaussian
    fit: Fit
    seconds: Mapping[str, float]

    @property
    def model(self) -> Tangent:
        """The tangent model."""
        return self.gaussian.model

    def draw_adapters(self, key: Array, num_draws: int) -> Adapters:
        """Draw adapters from the variational posterior, with a leading draw axis."""
        key = check_key(key)
        return self.fit.draw_adapters(key, num_draws)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Frames, scales, the fit and the seconds of each step."""
        rows = tuple((name, f"{seconds:.1f}") for name, seconds in self.seconds.items())
        total = f"{sum(self.seconds.values()):.0f}"
        table = Table(f"{total} s in all, compiling included", ("part", "seconds"), rows)
        return (*self.frames.overview, *self.scales.overview, *self.fit.overview, table)

    def __repr__(self) -> str:
        return f"CoreFit(tangent, {self.frames!r}\n  {self.scales!r}\n  {self.fit!r})"


def fit_core(
    key: Array,
    base: Base,
    train: Batch,
    *,
    label_ids: Int[Any, " c"] | None = None,
    likelihood: Likelihood | None = None,
    size: Size | None = None,
    targets: Sequence[str] | None = None,
    layers: slice | Iterable[int] | None = slice(-2, None),
    source: Source = "jacobian",
    scale_prior: dist.Distribution | None = SCALE_PRIOR,
    within: float = 0.0,
    num_steps: int = STEPS,
    console: Console | None = None,
) -> CoreFit:
    """Fit the core prior on the tangent model, with frames and scales chosen from the rows.

    Args:
        key: Random key of sketches, guide draws and start values.
        base: The frozen base.
        train: Rows with labels.
        label_ids: Token id of each class.
        likelihood: Other classes than words, in place of `label_ids`, as in `bnlora.Classifier`.
        size: Directions of each side, as in `bnlora.frames`. A mapping also selects the modules. If omitted,
            `SIZES`, and 16 for other modules, limited by the smaller side.
        targets: Modules, `"slope"` and `"bias"`. If omitted, `"slope"` and the modules of `size` if that is a
            mapping, else `"slope"` and the modules of `SIZES`; with completions without those of the head.
            With a new classification head, which is zero, the head and `"bias"`.
        layers: Layers to adapt; the two uppermost by default.
        source: What the frames are computed from, as in `bnlora.frames`.
        scale_prior: Distribution of every scale, for the choice of scales by evidence.
        within: Nats of evidence to trade for smaller scales, as in `bnlora.choose_scales`.
        num_steps: Steps of the variational fit.
        console: Where to draw progress bars.

    Returns:
        The posterior with the results of all steps.

    Raises:
        ValueError: If `bnlora.frames`, `bnlora.choose_scales` or `bnlora.fit` raises it.

    Example:
        >>> core_fit = bl.fit_core(key, base, rows, label_ids=(3, 5), size={"v_proj": 2}, num_steps=4)
        >>> core_fit.model.kind, sorted(core_fit.scales.values)
        ('tangent', ['slope', 'v_proj'])
    """
    frame_key, fit_key = jax.random.split(check_key(key))
    seconds: dict[str, float] = {}
    classes = chosen_likelihood(label_ids, likelihood)
    require_softmax(classes, "bl.fit_core")
    chosen = targets if targets is not None else _targets(size, classes, base)
    sites = target_sites(base, chosen, layers)
    size = _sizes(sites) if size is None else size
    with timed(seconds, "trunk"):  # frames and features share the activations below the adapters
        trunk = Classifier(base, sites, point(), likelihood=classes)
        train = cache_prefix(trunk, train, console=console)
    with timed(seconds, "frames"):
        options: dict[str, Any] = {"likelihood": classes, "size": size, "layers": layers, "source": source}
        directions = frames(frame_key, base, chosen, train, **options, console=console)
    with timed(seconds, "features"):
        tangent = Tangent(Classifier(base, directions.sites, core(directions), likelihood=classes))
        rows = cache_prefix(tangent, train, console=console)
    with timed(seconds, "scales by evidence"):
        scales = choose_scales(tangent, rows, prior=scale_prior, within=within, console=console)
    with timed(seconds, "Laplace"):
        tangent = tangent.with_prior(core(directions, scale=scales.values))
        gaussian = laplace(tangent, rows, console=console)
    with timed(seconds, "variational fit"):
        guide = Guide(tangent.prior, around(gaussian))
        fitted = fit_near(fit_key, tangent, guide, rows, num_steps=num_steps, console=console)
    return CoreFit(directions, scales, gaussian, fitted, seconds)


def _targets(size: Size | None, likelihood: Likelihood, base: Base) -> list[str]:
    """Default targets: modules, and the slope of the logits if each class has a row of the head."""
    modules = [*(size if isinstance(size, Mapping) else SIZES)]
    if getattr(base.config, "new_head", False):  # zero, so only its own update and a bias move the logits
        return [*(size if isinstance(size, Mapping) else [HEAD]), BIAS]
    if isinstance(readout(likelihood), Words | Labels):
        return [*modules, SLOPE]
    return modules if isinstance(size, Mapping) else [name for name in modules if name != HEAD]


def _sizes(sites: Sites) -> dict[str, int]:
    """Default size of every module."""
    modules = {name: site for name, site in sites.items() if name not in OWN}
    return {name: min(SIZES.get(name, OTHERS), smaller_side(site)) for name, site in modules.items()}


def fit_near(
    key: Array,
    tangent: Tangent,
    guide: Guide,
    data: Batch,
    *,
    num_steps: int = STEPS,
    init_params: Parameters | None = None,
    console: Console | None = None,
) -> Fit:
    """Fit a guide that starts near the posterior, by Adam on all rows with a rate that decays to zero.

    Args:
        key: Random key.
        tangent: A tangent model.
        guide: A guide of its prior.
        data: Rows with labels.
        num_steps: Number of steps.
        init_params: Start values of the parameters, as in `bnlora.fit`.
        console: Where to draw the progress bar.
    """
    rate = optax.adam(optax.cosine_decay_schedule(RATE, num_steps))
    return fit(
        key,
        tangent,
        guide,
        data,
        rate,
        optimisation=Optimisation(scale_optimizer=rate),
        num_steps=num_steps,
        batch_size=len(data),
        num_particles=PARTICLES,
        init_params=init_params,
        console=console,
    )
