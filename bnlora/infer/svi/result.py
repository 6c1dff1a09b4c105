r"""The result of a fit: the fitted guide and the record of the fit.

    q(adapters) = distribution of prior(sites), sites ~ guide(params)

A `Fit` is one of the posteriors that `predict` takes (`bnlora.prediction.posterior.Posterior`). Others are in
`bnlora.infer.approximate`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlora._util.checks import broken_weights, check_at_least, check_key
from bnlora._util.compilation import by_pieces, first_entries, key_of, program, split_keys
from bnlora._util.copying import error_parts, state
from bnlora._util.display import Showable, Shown, Table, facts
from bnlora._util.typing import Adapters, Parameters
from bnlora.data.batch import Batch
from bnlora.infer.svi.elbo import TERMS
from bnlora.program.draws import Draw, draw_both, draw_from_guide, prior_at
from bnlora.program.protocol import Model

CHECKED_ROWS = 8
"""Training rows on which the base is checked after a divergence; few, because memory may be short."""


@dataclass(frozen=True)
class Fit(Shown):
    """A fitted guide, with the record of how it was fitted.

    Attributes:
        model: The classifier.
        guide: The guide.
        params: Fitted NumPyro parameters of prior and guide, constrained, by name.
        history: One array over steps for each term of the bound, in nats over the whole data set.
        validation: Steps and mean negative log-likelihood on the validation rows; empty without rows.
        train: The training rows, with cached activations.
        last_params: Parameters after the last step; equal to `params` unless validation rows chose others.
        best_step: Number of steps behind `params`.
        skipped_steps: Steps that were skipped because something was not finite.
        num_traces: How many times the step was traced; more than 1 is a defect.
        step_seconds: Wall time of each step; the first contains compilation.
        draw_key: Random key of the draws that summaries of this fit use.
        stopped: Why it ended: "steps" (all done), "patience", "plateau" (the bound does not grow any more),
            "interrupted", "diverged" or "memory" (there was not enough).

    Example:
        >>> fit.num_parameters, fit.skipped_steps
        (36, 0)
        >>> fit.draw_adapters(key, 5)["lm_head"]["b"].shape  # draws, layers, label rows, rank
        (5, 1, 2, 1)
    """

    model: Model
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

    def draw_adapters(self, key: Array, num_draws: int) -> Adapters:
        """Posterior adapters with a leading draw axis; the same key gives the same draws."""
        return self.draws(key, num_draws)[1]

    def draws(self, key: Array, num_draws: int) -> tuple[Draw, Adapters]:
        """Draws of the guide with both log-densities, and the adapters that the prior makes of them."""
        key = check_key(key)
        check_at_least({"num_draws": num_draws}, 1)
        if isinstance(key, jax.core.Tracer):  # inside another program, which compiles this function too
            return draw_both(key, self.model, self.guide, self.params, num_draws)
        sites, log_q, log_q_of = self.by_keys(_from_guide, key, num_draws)
        log_prior, log_prior_of, adapters = self.at(sites, num_draws)
        sites, log_q, log_q_of = jax.device_put((sites, log_q, log_q_of))
        return Draw(sites, log_prior, log_q, log_prior_of, log_q_of), adapters

    def at(self, sites: Mapping[str, Any], num_draws: int) -> tuple[Array, dict[str, Array], Adapters]:
        """Log prior at values of the latent sites, its parts, and the adapters that the prior makes of them.

        Args:
            sites: Value of every latent site by name, with a leading draw axis.
            num_draws: Length of that axis, needed if there are no sites.

        Returns:
            All three, with that axis.
        """
        numbers = self.model.sites.num_parameters
        run, stacks = program(self, _at_sites), (dict(sites), np.arange(num_draws))
        found = by_pieces(lambda piece, count: run(self.params, piece, count), stacks, numbers=numbers)
        return jax.device_put(found)

    def by_keys(self, one: Callable[[Any, Parameters, Array], Any], key: Array, num_draws: int) -> Any:
        """Results of a function for one key per draw, by a program that is compiled once.

        Args:
            one: `one(fit, params, key)`, a module-level function.
            key: Random key, split into the keys of the draws.
            num_draws: Number of draws.

        Returns:
            NumPy arrays with a leading draw axis.
        """
        keys, kind = split_keys(check_key(key), num_draws)
        numbers = self.model.sites.num_parameters
        run = program(self, _each_key, static=(0, 4))
        return by_pieces(lambda keys, count: run(one, self.params, keys, count, kind), keys, numbers=numbers)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """How the fit ran, and the terms of the bound at its end."""
        looks, loss = self.validation["step"], self.validation["nll"]
        lowest = f"{loss.min():.4f} at step {looks[loss.argmin()]}" if len(looks) else "no validation rows"
        seconds = self.step_seconds[1:] if len(self.step_seconds) > 1 else self.step_seconds
        about = {
            "model": self.model.kind,
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


def _each_key(fit: Fit, one: Callable, params: Parameters, keys: Array, count: Array, kind: Any) -> Any:
    return first_entries(lambda key, params: one(fit, params, key_of(key, kind)), keys, count, params)


def _from_guide(fit: Fit, params: Parameters, key: Array) -> tuple[dict[str, Array], Array, dict[str, Array]]:
    return draw_from_guide(key, fit.model, fit.guide, params)


def _at_sites(fit: Fit, params: Parameters, draws: tuple[dict[str, Array], Array], count: Array) -> Any:
    return first_entries(lambda one, params: prior_at(one[0], fit.model, params), draws, count, params)


class FitDiverged(ValueError):
    """Too many steps were not finite. `fit` has the last finite state and the whole record.

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


class FitOutOfMemory(MemoryError):
    """The device had not enough memory. `fit` has the state before that and the whole record.

    The message has the memory of the step and of other settings, as `bnlora.estimate` computes them.

    Example:
        >>> error = bl.FitOutOfMemory(fit, "the memory is exhausted")
        >>> isinstance(error, MemoryError), error.fit is fit
        (True, True)
    """

    def __init__(self, fit: Fit, reason: str):
        super().__init__(f"{reason} (the state after {len(fit.step_seconds)} steps is in this error's `fit`)")
        self.fit = fit

    def __reduce__(self) -> tuple[Any, ...]:
        return error_parts(self)


def divergence_remedy(fit: Fit) -> str:
    """The remedy for steps that were not finite; a lower rate does not help if the first step failed.

    Args:
        fit: A fit with skipped steps.

    Returns:
        The cause, if it is known, and its remedy.
    """
    weights = broken_weights(fit.model.base.weights)
    if weights:
        return weights
    bound = fit.history["elbo"]
    if len(bound) and np.isfinite(bound[0]) and fit.skipped_steps < len(bound):
        return "lower the learning rate or the prior's scale"
    return _start_remedy(fit)


def _start_remedy(fit: Fit) -> str:
    """The same for a fit whose first step was not finite."""
    model, rows = fit.model, fit.train[:CHECKED_ROWS]
    untouched = {
        name: {factor: jnp.zeros(shape, jnp.float32) for factor, shape in site.shapes.items()}
        for name, site in model.sites.items()
    }
    logits = np.asarray(jax.jit(model.logits)(model.base.weights, untouched, rows))
    broken = int((~np.isfinite(logits)).any(1).sum())
    if broken:
        return (
            f"the base's own logits are not finite in {broken} of the first {len(rows)} training rows, "
            "without any adapter, so no learning rate helps; check the base, and `activations`"
        )
    first = {name: fit.history[name][0] for name in ("inducing_kl", "conditional_kl", "data")}
    terms = [name for name, value in first.items() if not np.isfinite(value)]
    if not terms:
        return (
            "the bound is finite at the start and its gradient is not, so no learning rate helps; check the "
            "prior and the guide for a root or a quotient at zero"
        )
    if terms == ["data"]:
        return (
            "the likelihood is not finite at the start although the base's own logits are, so no learning "
            "rate helps; lower the scales at which the prior and the guide start"
        )
    are = "is" if len(terms) == 1 else "are"
    return (
        f"{' and '.join(terms)} {are} not finite at the start, so no learning rate helps; check the "
        "densities of prior and guide at their start values"
    )
