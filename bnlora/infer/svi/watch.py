"""What runs between the steps of a fit: the progress bar, the caller's hook, and the stopping rules.

Several steps run in one call (`step`), for about `LOOK` seconds. A rule that would have stopped the fit
within a call is obeyed to the step: the call runs again from the state before it, with fewer steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import numpy as np
from jax import Array
from jax.sharding import Mesh
from rich.console import Console

from bnlora._util.exhausted import naming_memory
from bnlora._util.progress import progress_bar
from bnlora._util.typing import Parameters
from bnlora.infer.svi.elbo import TERMS
from bnlora.infer.svi.plateau import Plateau
from bnlora.infer.svi.resume import Kept
from bnlora.infer.svi.step import CHUNK, State, Step
from bnlora.infer.svi.validation import Validation
from bnlora.models import hosts

LOOK = 0.2
"""Seconds between two looks at a fit, in which an interrupt waits and the bar stands still."""

TIMED = 2
"""Steps that run alone: one that is compiled and one that is timed."""

REASONS = (None, "diverged", "plateau")
"""Why the record of the steps may end a fit."""


class Watch(NamedTuple):
    """What runs after each step of a fit.

    Attributes:
        look: Evaluates validation rows.
        plateau: When to stop because the bound does not grow any more; never when None.
        skip_budget: Steps that may be skipped as not finite.
        on_step: Called with the number of steps done and the constrained parameters.
        show: Draws the progress.
        kept: Checkpoints of the fit.
        remedy: What takes less memory than the step, if there is not enough of it.
    """

    look: Validation
    plateau: Plateau | None
    skip_budget: int
    on_step: Callable[[int, Parameters], None] | None
    show: Callable[[Step], None]
    kept: Kept
    remedy: Callable[[], str]

    def ahead(self, loop: Step, num_steps: int) -> int:
        """How many steps to run before the next look."""
        done = len(loop.steps)
        if self.on_step is not None or done < TIMED:
            return 1
        in_time = int(LOOK / max(loop.steps.column("seconds", -1)[0], LOOK / CHUNK))
        periods = [every for every in (self.look.every, self.kept.every) if every is not None]
        until = min([num_steps, *((done // every + 1) * every for every in periods)])
        return max(1, min(in_time, until - done))

    def first_stop(self, loop: Step, begin: int) -> tuple[int, str | None]:
        """The first step after `begin` steps at which the record says that the fit should end, and why.

        The last step and None if it should not. Of several processes the first one decides.
        """
        step, why = next(self._stops(loop, begin), (len(loop.steps), None))
        last, reason = hosts.told(loop.model.base.mesh, step, REASONS.index(why))
        return int(last), REASONS[int(reason)]

    def _stops(self, loop: Step, begin: int) -> Iterator[tuple[int, str]]:
        bound = np.empty(0) if self.plateau is None else loop.bound
        for step, skipped in enumerate(loop.steps.column("skipped", begin), begin + 1):
            if skipped > self.skip_budget:
                yield step, "diverged"
            if self.plateau is not None and self.plateau.reached(bound[:step]):
                yield step, "plateau"

    def run(self, loop: Step, state: State, key: Array, rows: np.ndarray) -> State:
        """`Step.run`, with an error in one sentence if there is not enough memory."""
        with naming_memory(self.remedy):
            return loop.run(state, key, rows)

    def late_verdict(self, loop: Step, state: State) -> str | None:
        """The verdict on the last step of a checkpoint, if an interrupt came before it."""
        done = len(loop.steps)
        _, why = self.first_stop(loop, done - 1)
        return self.verdict(loop, state, why) if why or self.look.is_due(done) else None

    def verdict(self, loop: Step, state: State, stopped: str | None) -> str | None:
        """Show the last step; why the fit should end after it: `stopped`, or the validation rows."""
        step = len(loop.steps)
        self.show(loop)
        if self.on_step is not None:
            self.on_step(step, loop.constrained(state.params))
        if stopped != "diverged" and self.look.should_stop(step, state.params):
            return "patience"
        return stopped


class Ended(NamedTuple):
    """How the loop ended.

    Attributes:
        state: The state after the last step.
        stopped: As in `Fit`.
        exhausted: The error, if there was not enough memory.
    """

    state: State
    stopped: str
    exhausted: MemoryError | None


def iterate(
    key: Array, loop: Step, state: State, rows: Iterator[np.ndarray], watch: Watch, num_steps: int
) -> Ended:
    """Run the steps until all are done, an interrupt, a rule, or too little memory."""
    state, stopped = watch.kept.resumed(state, loop, watch.look)
    exhausted, done = None, len(loop.steps)
    if done > num_steps:
        raise ValueError(f"num_steps must be at least the {done} steps of the checkpoint; got {num_steps}")
    rows, over = islice(rows, done, None), loop.model.base.mesh
    try:
        with hosts.guarded(over), hosts.deferred(over) as interrupted:
            if stopped is None and done:
                stopped = watch.late_verdict(loop, state)
            while stopped is None and done < num_steps:
                count = agreed_count(over, watch.ahead(loop, num_steps), interrupted=interrupted())
                planned = np.stack([next(rows) for _ in range(count)])
                after = watch.run(loop, state, key, planned)
                last, why = watch.first_stop(loop, done)
                if last < len(loop.steps):
                    loop.steps.cut(done)
                    after = watch.run(loop, state, key, planned[: last - done])
                state, done = after, last
                stopped = watch.verdict(loop, state, why) or ("steps" if done == num_steps else None)
                watch.kept.save(state, loop, watch.look, stopped)
    except (KeyboardInterrupt, MemoryError, hosts.HostLost) as error:
        loop.steps.cut(done)  # of a call whose state was not kept
        exhausted = error if isinstance(error, MemoryError) else None
        stopped = "interrupted" if exhausted is None else "memory"
        watch.kept.save(state, loop, watch.look, stopped)
        if isinstance(error, hosts.HostLost):
            raise
    return Ended(state, stopped or "steps", exhausted)


def agreed_count(over: Mesh | None, count: int, *, interrupted: bool) -> int:
    """The number of steps that process 0 has planned.

    Raises:
        KeyboardInterrupt: In every process, if one of them was interrupted.
    """
    counts, interrupts = hosts.gathered(over, count, int(interrupted)).T
    if interrupts.any():
        raise KeyboardInterrupt
    return int(counts[0])


@contextmanager
def step_bar(console: Console | None, num_steps: int) -> Iterator[Callable[[Step], None]]:
    """A bar of the steps, with the terms of the last bound and the speed of the last 20 steps."""
    with progress_bar(console, "terms") as bar:
        task = bar.add_task("fit", total=num_steps, terms="compiling")

        def show(loop: Step) -> None:
            t = {name: loop.steps.column(name, -1)[0] for name in TERMS}
            recent = loop.steps.column("seconds", max(1, len(loop.steps) - 20))
            seconds = recent.mean() if len(recent) else 0.0  # not above 0 if the clock jumped
            speed = f"{1 / seconds:.2f} steps/s" if seconds > 0 else "compiled"
            text = (
                f"ELBO {t['elbo']:,.0f} = data {t['data']:,.0f} - inducing KL {t['inducing_kl']:,.0f} "
                f"- conditional KL {t['conditional_kl']:,.0f} | {speed}"
            )
            bar.update(task, completed=len(loop.steps), terms=text)

        yield show
