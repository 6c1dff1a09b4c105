"""Options of a fit: how steps move the parameters, and what a step keeps in memory."""

from dataclasses import dataclass

import optax

from bnlora._util.checks import check_at_least
from bnlora.models.execution import Activations, Remat


@dataclass(frozen=True)
class Optimisation:
    """How the steps of a fit move the parameters.

    Attributes:
        scale_optimizer: Optimiser of every `lam` and every scale; Adam with rate 0.01 when omitted.
        clip_norm: The gradient of each group (locations, scales, `lam`) is clipped to this norm, separately.
        skip_budget: Number of steps that may be skipped as not finite before the fit stops.

    Raises:
        ValueError: If `skip_budget` is negative.

    Example:
        >>> slow = bl.Optimisation(scale_optimizer=optax.adam(1e-3))
        >>> few = {"num_steps": 2, "batch_size": 4}
        >>> bl.fit(key, model, guide, rows, optax.adam(0.01), **few, optimisation=slow).stopped
        'steps'
    """

    scale_optimizer: optax.GradientTransformation | None = None
    clip_norm: float = 10.0
    skip_budget: int = 10

    def __post_init__(self):
        check_at_least({"skip_budget": self.skip_budget}, 0)


@dataclass(frozen=True)
class Memory:
    """What a training step keeps in memory. Caching, validation and prediction use the base's settings.

    Attributes:
        accumulate: Number of equal parts in which a step runs its minibatch, one after the other, so that it
            keeps the activations of one part only. The bound is the same: all parts share one draw of the
            guide, and its KL terms are counted once. It must divide `batch_size`.
        activations: Type of the activations, "float32" or "bfloat16"; as in the base when omitted.
            Parameters, likelihood and bound stay in float32.
        remat: What the backward pass computes again instead of keeping it: "none", "elementwise",
            "attention" or "layers" (`bnlora.models.execution.Execution`); as in the base when omitted.

    Example:
        >>> little = bl.Memory(accumulate=2, remat="layers")
        >>> few = {"num_steps": 2, "batch_size": 4}
        >>> bl.fit(key, model, guide, rows, optax.adam(0.01), **few, memory=little).stopped
        'steps'
    """

    accumulate: int = 1
    activations: Activations | None = None
    remat: Remat | None = None
