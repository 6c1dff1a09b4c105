r"""What a fit hands over: the fitted guide, and the record of how it came about.

    q(adapters) = law of prior(sites), sites ~ guide(params)

A `Fit` is the first of the posteriors that `predict` takes (`bnlora.predict.Posterior`); the others are in
`bnlora.inference`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax import Array

from bnlora.checks import broken_weights, check_key
from bnlora.copying import error_parts, state
from bnlora.data import Batch
from bnlora.display import Showable, Shown, Table, facts
from bnlora.elbo import TERMS
from bnlora.posterior import Draw, draw_adapters, draw_both
from bnlora.typing import Adapters, Parameters

LOOKED_AT = 8
"""Training rows at which the base is looked at where a fit diverges: few, for a step had memory for few."""


@dataclass(frozen=True)
class Fit(Shown):
    """A fitted guide, with the record of how it was fitted.

    Attributes:
        model: The classifier.
        guide: The guide.
        params: Fitted NumPyro parameters of prior and guide, constrained, by name.
        history: One array over steps for each term of the bound, in nats over the whole data set.
        validation: Steps and mean negative log-likelihood on the validation rows, where given.
        train: The rows that were fitted, with cached activations.
        last_params: Parameters after the last step; those of `params` unless validation rows picked others.
        best_step: Number of steps behind `params`.
        skipped_steps: Steps that were skipped because something was not finite.
        num_traces: How many times the step was traced; 1 unless something is wrong.
        step_seconds: Wall time of each step; the first contains compilation.
        draw_key: Random key of the draws that summaries of this fit use.
        stopped: Why it ended: "steps" (all done), "patience", "interrupted" or "diverged".

    Example:
        >>> fit.num_parameters, fit.skipped_steps
        (36, 0)
        >>> fit.draw_adapters(key, 5)["lm_head"]["b"].shape  # draws, layers, label rows, rank
        (5, 1, 2, 1)
    """

    model: Any
    guide: Callable
    params: dict[str, Array]
    last_params: dict[str, Array]
    history: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    train: Batch
    best_step: int
    skipped_steps: int
    num_traces: int
    step_seconds: np.ndarray
    draw_key: Array
    stopped: str

    def __getstate__(self) -> dict[str, Any]:
        return state(self, "guide")

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def draw_adapters(self, key: Array, num_samples: int) -> Adapters:
        """Posterior adapters with a leading draw axis; the same key gives the same draws."""
        key = check_key(key)
        return self._compiled_draw(key, self.params, num_samples)

    def draws(self, key: Array, num_samples: int) -> tuple[Draw, Adapters]:
        """Draws of the guide with both log-densities, and the adapters that the prior makes of them."""
        key = check_key(key)
        return jax.jit(partial(draw_both, model=self.model, guide=self.guide, num_samples=num_samples))(
            key, params=self.params
        )

    @cached_property
    def _compiled_draw(self) -> Callable[..., Adapters]:
        def draw(key: Array, params: Parameters, num_samples: int) -> Adapters:
            return draw_adapters(key, self.model, self.guide, params, num_samples)

        return jax.jit(draw, static_argnums=2)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """How it was fitted, and the terms of the bound at the end."""
        looks, loss = self.validation["step"], self.validation["nll"]
        lowest = f"{loss.min():.4f} at step {looks[loss.argmin()]}" if len(looks) else "no validation rows"
        seconds = self.step_seconds[1:] if len(self.step_seconds) > 1 else self.step_seconds
        about = {
            "training rows": f"{len(self.train):,}",
            "parameters": f"{self.num_parameters:,}",
            "steps": f"{len(self.step_seconds)}, {self.skipped_steps} skipped",
            "ended": "all steps done" if self.stopped == "steps" else self.stopped,
            "parameters are those of": f"step {self.best_step}",
            "lowest validation NLL": lowest,
            "median step": f"{np.median(seconds):.3g} s" if len(seconds) else "none",
        }
        rows = []
        for name in TERMS:
            tail = self.history[name][-50:]
            finite = tail[np.isfinite(tail)]
            numbers = (f"{finite.mean():,.1f}", f"{finite.std():,.1f}") if finite.size else ("none", "none")
            rows.append((name.replace("_kl", " KL").replace("_", " "), *numbers))
        lost = int((~np.isfinite([self.history[name][-50:] for name in TERMS])).any(0).sum())
        some = f", {lost} of them not finite" if lost else ""
        title = f"Bound in nats, last 50 steps{some}"
        return (facts("Fit", about), Table(title, ("term", "mean", "sd"), tuple(rows)))

    def __repr__(self) -> str:
        tail = np.stack([self.history[name][-50:] for name in TERMS])
        finite = tail[:, np.isfinite(tail).all(0)]
        means = ", ".join(f"{n} {x.mean():,.1f}" for n, x in zip(TERMS, finite, strict=True) if x.size)
        some = "" if finite.shape == tail.shape else f"{finite.shape[1]} finite of the "
        return (
            f"Fit({len(self.train)} rows, {self.num_parameters:,} parameters, "
            f"{len(self.step_seconds)} steps, {self.skipped_steps} skipped, best step {self.best_step})\n"
            f"  nats, mean of the {some}last 50 steps: {means or 'none'}"
        )


class FitDiverged(ValueError):
    """Too many steps were not finite. `fit` holds the last finite state and the whole record.

    Example:
        >>> issubclass(bl.FitDiverged, ValueError), bl.FitDiverged(fit, skip_budget=0).fit is fit
        (True, True)
    """

    def __init__(self, fit: Fit, skip_budget: int):
        super().__init__(
            f"{fit.skipped_steps} of {len(fit.step_seconds)} steps gave a bound or gradient that is not "
            f"finite, more than skip_budget={skip_budget}; {divergence_remedy(fit)} "
            "(the last finite state is in this error's `fit`)"
        )
        self.fit = fit

    def __reduce__(self) -> tuple[Any, ...]:
        return error_parts(self)


def divergence_remedy(fit: Fit) -> str:
    """What to do about steps that were not finite: no rate mends what is not finite before the first step.

    Args:
        fit: A fit some of whose steps were skipped.

    Returns:
        The cause that is found, and its remedy.
    """
    weights = broken_weights(fit.model.base.params)
    if weights:
        return weights
    bound = fit.history["elbo"]
    if len(bound) and np.isfinite(bound[0]) and fit.skipped_steps < len(bound):
        return "lower the learning rate or the prior's scale"
    return _start_remedy(fit)


def _start_remedy(fit: Fit) -> str:
    """The same for a fit whose very first step was not finite."""
    model, rows = fit.model, fit.train[:LOOKED_AT]
    untouched = {
        name: {factor: np.zeros((1, *shape), np.float32) for factor, shape in site.shapes.items()}
        for name, site in model.sites.items()
    }
    found = np.asarray(model.compiled_log_probs(model.base.params, untouched, rows, 1))[0]
    broken = int((~np.isfinite(found)).any(1).sum())
    if broken:
        return (
            f"the base's own logits are not finite in {broken} of the first {len(rows)} training rows, "
            "without any adapter, so no learning rate helps; look at the base, and at `activations`"
        )
    first = {name: fit.history[name][0] for name in ("inducing_kl", "conditional_kl", "data")}
    terms = [name for name, value in first.items() if not np.isfinite(value)]
    if not terms:
        return (
            "the bound is finite at the start and its gradient is not, so no learning rate helps; look for a "
            "root or a quotient at zero in the prior and the guide"
        )
    if terms == ["data"]:
        return (
            "the likelihood is not finite at the start although the base's own logits are, so no learning "
            "rate helps; lower the scales at which the prior and the guide start"
        )
    are = "is" if len(terms) == 1 else "are"
    return (
        f"{' and '.join(terms)} {are} not finite at the start, so no learning rate helps; look at the "
        "densities of prior and guide where they start"
    )
