"""What watches a fit: after each step the progress bar, the caller's hook, and the rules that end it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax import Array
from rich.console import Console

from bnlora._util.progress import progress_bar
from bnlora._util.typing import Parameters
from bnlora.infer.svi.plateau import Plateau
from bnlora.infer.svi.validation import Validation


@runtime_checkable
class Loop(Protocol):
    """The step of a fit and its record, as `bnlora.infer.svi.fit` keeps it."""

    steps: list[dict[str, float]]
    constrained: Callable[[dict], dict]

    @property
    def bound(self) -> np.ndarray:
        """The bound of every step so far."""
        ...

    def run(self, state: Any, key: Array, rows: np.ndarray) -> Any:
        """One step, recorded."""
        ...


class Watch(NamedTuple):
    """What looks at a fit after each step.

    Attributes:
        look: Looks at validation rows.
        plateau: When to stop because the bound does not grow any more; never when None.
        skip_budget: Steps that may be skipped as not finite.
        on_step: Called with the number of steps done and the constrained parameters.
        show: Draws the progress.
    """

    look: Validation
    plateau: Plateau | None
    skip_budget: int
    on_step: Callable[[int, Parameters], None] | None
    show: Callable[[Loop], None]

    def verdict(self, loop: Loop, state: Any) -> str | None:
        """Why the fit should end after this step, if it should."""
        step = len(loop.steps)
        self.show(loop)
        if self.on_step is not None:
            self.on_step(step, loop.constrained(state.params))
        if int(state.skipped) > self.skip_budget:
            return "diverged"
        if self.look.should_stop(step, state.params):
            return "patience"
        if self.plateau is not None and self.plateau.reached(loop.bound):
            return "plateau"
        return None


def iterate(
    key: Array, loop: Loop, state: Any, rows: Iterator[np.ndarray], watch: Watch, num_steps: int
) -> tuple[Any, str]:
    """The state after all steps, or where an interrupt or a rule stopped, and which of them did."""
    try:
        for step in range(num_steps):
            state = loop.run(state, jax.random.fold_in(key, step), next(rows))
            stopped = watch.verdict(loop, state)
            if stopped is not None:
                return state, stopped
    except KeyboardInterrupt:
        return state, "interrupted"
    return state, "steps"


@contextmanager
def step_bar(console: Console | None, num_steps: int) -> Iterator[Callable[[Loop], None]]:
    """A bar of the steps, with the terms of the last bound and the speed of the last 20 steps."""
    with progress_bar(console, "terms") as bar:
        task = bar.add_task("fit", total=num_steps, terms="compiling")

        def show(loop: Loop) -> None:
            t, recent = loop.steps[-1], [step["seconds"] for step in loop.steps[1:][-20:]]
            speed = f"{1 / np.mean(recent):.2f} steps/s" if recent else "compiled"
            text = (
                f"ELBO {t['elbo']:,.0f} = data {t['data']:,.0f} - inducing KL {t['inducing_kl']:,.0f} "
                f"- conditional KL {t['conditional_kl']:,.0f} | {speed}"
            )
            bar.update(task, advance=1, terms=text)

        yield show
