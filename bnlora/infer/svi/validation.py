"""Evaluation of validation rows during a fit, to keep the best parameters and to stop early."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax import Array

from bnlora._util.checks import check_at_least
from bnlora._util.compilation import options
from bnlora.data.batch import Batch
from bnlora.models.hosts import told
from bnlora.prediction.predict import log_likelihood_by_draw, log_mixture, outputs_with_draws
from bnlora.program.draws import draw_adapters
from bnlora.program.protocol import Model


@dataclass(frozen=True)
class EarlyStopping:
    """When to evaluate validation rows and when to stop; `fit` then returns the best parameters.

    Attributes:
        every: Steps between evaluations; the last step is always evaluated.
        patience: Evaluations without a better negative log-likelihood before the fit stops.
        num_draws: Posterior draws of each evaluation; their random key is always the same.
        batch_size: Rows to run at a time.

    Example:
        >>> rule = bl.EarlyStopping(every=2, patience=1, num_draws=1)
        >>> checks = {"validation": rows, "early_stopping": rule}
        >>> best = bl.fit(key, model, guide, rows, optax.adam(0.01), num_steps=4, batch_size=4, **checks)
        >>> bool(best.best_step in best.validation["step"])
        True
    """

    every: int = 50
    patience: int = 5
    num_draws: int = 8
    batch_size: int = 32

    def __post_init__(self):
        check_at_least({f"{name} of early stopping": value for name, value in vars(self).items()}, 1)


@dataclass
class Validation:
    """Evaluates the validation rows of a fit of `num_steps` steps and keeps the best parameters."""

    model: Model
    guide: Callable
    constrain: Callable[[dict], dict]
    rows: Batch | None
    rule: EarlyStopping
    key: Array
    num_steps: int
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best_params: dict[str, Array] | None = None
    best_step: int = 0

    def __post_init__(self):
        self._draw = jax.jit(self._traced_draw, compiler_options=options())

    @property
    def every(self) -> int | None:
        """Steps between evaluations; None without rows."""
        return None if self.rows is None else self.rule.every

    def is_due(self, step: int) -> bool:
        """Whether the rows should be evaluated after `step` steps, and have not been."""
        if self.rows is None or (step % self.rule.every and step != self.num_steps):
            return False
        return step not in self.steps[-1:]

    def should_stop(self, step: int, params: dict[str, Array]) -> bool:
        """Evaluate the rows after `step` steps if it is time; whether the patience is exhausted."""
        if not self.is_due(step):
            return False
        assert self.rows is not None  # otherwise it is never time
        draws = self._draw(params)
        outputs = outputs_with_draws(self.model, draws, self.rows, batch_size=self.rule.batch_size)
        # Predictions that are not finite count as worse than any others, so that the fit continues.
        if np.isnan(outputs).any():
            loss = np.inf
        else:
            by_draw = log_likelihood_by_draw(self.model, outputs, self.rows)
            loss = -float(log_mixture(by_draw).mean())
        loss = told(self.model.base.mesh, loss)[0]  # processors differ in last digits, processes must not
        if not self.losses or loss < min(self.losses):
            self.best_params, self.best_step = params, step
        self.steps.append(step)
        self.losses.append(loss)
        return (step - self.best_step) // self.rule.every >= self.rule.patience

    def _traced_draw(self, params: dict[str, Array]) -> Any:
        return draw_adapters(self.key, self.model, self.guide, self.constrain(params), self.rule.num_draws)
