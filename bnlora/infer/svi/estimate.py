r"""What a fit takes in memory, before anything of it is allocated.

    step = weights + rows + 2 state + temporary,     state = parameters of guide and prior + optimiser

because a step returns a new state. What the backward pass keeps is exact: the step is traced over shapes, in
seconds, and the residuals are counted. The rest of the temporary memory is a rule, fitted to XLA's account on
a CPU:

    temporary = kept + one layer at work + 4 parameters,    at work = max(again, whole / 2) + 2 tokens width

where `whole` is what a layer would keep with remat "none", `again` what the backward pass computes anew, and
`width` the widest side of a kernel. Quantised layers that run again add their kernels (`footprint.work`).
`source="compiler"` compiles the step instead and returns XLA's account of it; that takes as long as the first
step of a fit (ten seconds to minutes), but no memory for weights either.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import optax

from bnlora._util.checks import check_at_least, check_option, check_parts
from bnlora._util.display import Showable, Shown, Table
from bnlora.adapters.sites import Sites
from bnlora.base import Base
from bnlora.guides import Family, Guide, mean_field
from bnlora.infer.svi.footprint import Work, abstract_rows, abstract_step, compiled_bytes, draw, works
from bnlora.infer.svi.options import Memory
from bnlora.infer.svi.step import State, running
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.decoder_storage import num_bytes, num_weights
from bnlora.models.execution import Remat
from bnlora.models.storage import Storage
from bnlora.priors import Prior
from bnlora.program.model import Classifier

Source = Literal["rule", "compiler"]
PARTS = (1, 4)
"""Numbers of parts in the table of steps."""

PREDICTED = 32
"""Rows of a prediction at a time, as in `bnlora.predict`."""

COPIES = 4
"""Arrays of the size of the parameters in a step: constrained ones, draw, gradient, update."""


@dataclass(frozen=True, repr=False)
class Estimate(Shown):
    """Memory of a fit and what follows, in bytes, and the numbers of parameters.

    Attributes:
        parameters: Number of weights of the base, of each family of adapters, and of guide and prior.
        weights: The frozen weights.
        rows: The training rows with the prefix cache.
        prefix_cache: The activations below the lowest adapted layer, part of `rows`.
        guide: The parameters of guide and prior.
        gradients: Their gradient, part of `temporary`.
        optimizer: The state of the optimiser.
        activations: What the backward pass keeps, part of `temporary`.
        temporary: What a step takes beside its arguments and results.
        steps: `temporary` for other settings of `Memory`, by remat and number of parts; by the rule.
        tangent_features: Features of all rows for a tangent model whose frames have the ranks of the sites.
        prediction: Draws, and one batch of a prediction.
        source: "rule" or "compiler".

    Example:
        >>> size = bl.estimate(base, sites, bl.priors.normal(), batch=(16, 32))
        >>> size.parameters
        {'frozen weights': 4560, 'adapters of lm_head': 18, 'guide and prior': 36}
    """

    parameters: Mapping[str, int]
    weights: int
    rows: int
    prefix_cache: int
    guide: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    steps: Mapping[tuple[Remat, int], int]
    tangent_features: int
    prediction: int
    source: Source

    @property
    def step(self) -> int:
        """All memory of a step: arguments, results and what it takes in between."""
        return self.weights + self.rows + 2 * (self.guide + self.optimizer) + self.temporary

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Parameters, memory, and a step by remat and parts."""
        counts = tuple((name, f"{count:,}") for name, count in self.parameters.items())
        names = {
            "frozen weights": self.weights,
            "rows with the prefix cache": self.rows,
            "  of which prefix cache": self.prefix_cache,
            "parameters of guide and prior": self.guide,
            "optimiser": self.optimizer,
            "temporary memory of a step": self.temporary,
            "  of which activations": self.activations,
            "  of which gradients": self.gradients,
            "a step": self.step,
            "tangent features": self.tangent_features,
            "prediction, beside the weights": self.prediction,
        }
        sizes = tuple((name, _mebibytes(size)) for name, size in names.items())
        parts = sorted({number for _, number in self.steps})
        steps = tuple(
            (remat, *(_mebibytes(self.steps[remat, n]) if (remat, n) in self.steps else "" for n in parts))
            for remat in get_args(Remat)
        )
        header = ("remat", *(f"accumulate={n}" for n in parts))
        return (
            Table("Parameters", ("group", "number"), counts),
            Table(f"Memory, by the {self.source}", ("part", "MiB"), sizes, groups=frozenset({8})),
            Table("Temporary memory of a step, MiB, by the rule", header, steps),
        )


def estimate(
    base: Base | DecoderConfig,
    sites: Sites,
    prior: Prior,
    *,
    guide: Family | Mapping[str, Family] | Callable[[Any], Callable] | None = None,
    batch: tuple[int, int],
    num_rows: int = 1000,
    num_draws: int = 32,
    num_classes: int = 2,
    memory: Memory = Memory(),  # noqa: B008 (frozen)
    optimizer: optax.GradientTransformation | None = None,
    num_particles: int = 1,
    prefix_cache: Literal["memory", "off"] = "memory",
    weights: Storage = "float32",
    source: Source = "rule",
) -> Estimate:
    """Estimate the memory of a fit, without allocating any of it.

    Args:
        base: A base, or a configuration alone. `bnlora.Base.abstract` makes one for `bnlora.select`.
        sites: Where the adapters are.
        prior: The prior.
        guide: A family or families by site, as in `bnlora.guides.Guide`, or a function that makes a guide of
            a prior, such as `bnlora.guides.SiteFlow`; mean field when omitted.
        batch: Rows of a step, and tokens of a row.
        num_rows: Training rows, for prefix cache and tangent features.
        num_draws: Draws of a prediction.
        num_classes: Classes, which are label words.
        memory: Settings of the step, as in `bnlora.fit`.
        optimizer: Optimiser of the locations; Adam when omitted.
        num_particles: Guide draws averaged in a step.
        prefix_cache: Whether activations below the adapters are cached, as in `bnlora.fit`.
        weights: Type of the frozen weights, where only a configuration is given.
        source: "rule", or "compiler" for XLA's own account of the compiled step.

    Returns:
        The numbers, in bytes. Those of the rule are within 15 % of XLA's for the whole step on a CPU with
        mean-field guides (tested at two sizes).

    Raises:
        ValueError: If a number is below one, parts do not divide the rows, or an option is unknown.

    Example:
        >>> config = base.config
        >>> bl.estimate(config, sites, bl.priors.normal(), batch=(16, 32)).weights
        18240
    """
    _check(batch, num_rows, num_draws, num_particles, num_classes)
    check_parts("accumulate", memory.accumulate, batch[0])
    check_option("prefix_cache", prefix_cache, ("memory", "off"))
    check_option("source", source, get_args(Source))
    base = Base.abstract(base, weights=weights) if isinstance(base, DecoderConfig) else base
    model = Classifier(base, sites, prior, label_ids=tuple(range(num_classes)))
    train = abstract_rows(model, max(num_rows, batch[0]), batch[1], cached=prefix_cache == "memory")
    rule, adam = _guide(model, guide), optimizer or optax.adam(1e-2)
    step, state = abstract_step(running(model, memory), rule, train, adam, num_particles)
    params, remat = num_bytes(state.params), memory.remat or base.execution.remat
    ways = [(way, parts) for way in get_args(Remat) for parts in PARTS if batch[0] % parts == 0]
    own = running(model, replace(memory, remat=None, accumulate=1))
    rows = {way: (way[0], batch[0] // way[1]) for way in {*ways, (remat, memory.accumulate)}}
    found = works(own, train, set(rows.values()))
    at_work = {way: found[at] for way, at in rows.items()}
    loop = params + num_bytes(state.optimizer)  # the loop of the steps has a state of its own
    beside = COPIES * params + loop
    temporary = {way: num_particles * w.kept + w.at_work + beside for way, w in at_work.items()}
    chosen = at_work[remat, memory.accumulate]
    compiled = compiled_bytes(step, state, batch[0]) if source == "compiler" else None
    return Estimate(
        parameters=_counts(model, state),
        weights=num_bytes(base.weights),
        rows=num_bytes(train),
        prefix_cache=0 if train.cached is None else num_bytes(train.cached.hidden),
        guide=params,
        gradients=params,
        optimizer=num_bytes(state.optimizer),
        activations=num_particles * chosen.kept,
        temporary=temporary[remat, memory.accumulate] if compiled is None else compiled,
        steps={way: temporary[way] for way in ways},
        tangent_features=4 * num_rows * _features(model),
        prediction=_prediction(model, chosen, batch[0] // memory.accumulate, num_draws),
        source=source,
    )


def _check(batch: tuple[int, int], *numbers: int) -> None:
    """Raise `ValueError` unless all numbers are positive, and there are two classes at least."""
    names = ("num_rows", "num_draws", "num_particles")
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise ValueError(f"batch must be a pair, the rows of a step and the tokens of a row; got {batch!r}")
    check_at_least({"rows of batch": batch[0], "tokens of batch": batch[1]}, 1)
    check_at_least(dict(zip(names, numbers[:3], strict=True)), 1)
    check_at_least({"num_classes": numbers[3]}, 2)


def _guide(model: Classifier, given: Any) -> Callable:
    """The guide of the model's prior."""
    if given is None or isinstance(given, Family | Mapping):
        return Guide(model.prior, mean_field() if given is None else given)
    return given(model.prior)


def _counts(model: Classifier, state: State) -> dict[str, int]:
    """Numbers of frozen weights, of adapters by family, and of parameters of guide and prior."""
    adapters = {f"adapters of {name}": site.num_parameters for name, site in model.sites.items()}
    guide = num_weights(state.params)
    return {"frozen weights": num_weights(model.base.weights), **adapters, "guide and prior": guide}


def _features(model: Classifier) -> int:
    """Numbers that a tangent model keeps for a row, if its frames have the ranks of the sites."""
    coordinates = sum(site.depth * site.rank**2 for site in model.sites.values())
    return model.num_classes + (model.num_classes - 1) * coordinates


def _prediction(model: Classifier, chosen: Work, rows: int, num_draws: int) -> int:
    """Draws on the device, in pieces of 32, and one layer at work on the rows of a prediction."""
    pieces = -(-num_draws // PREDICTED) * PREDICTED
    return pieces * num_bytes(draw(model)) + chosen.at_work * PREDICTED // rows


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"
