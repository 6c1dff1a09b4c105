r"""The loop that all samplers share: warm up, then draw in pieces that can be stored on disk.

Transition t of chain c has the key `fold_in(key_c, t)`, and a piece starts from the whole state of the kernel
at the end of the one before. So the draws do not depend on interruptions: a run that was killed and started
again with the same arguments gives the same draws as an uninterrupted run.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float
from rich.console import Console

from bnlora._util.checks import broken_weights, check_at_least, divisors
from bnlora._util.progress import progress_bar
from bnlora.infer.mcmc.certificate import Bias
from bnlora.infer.mcmc.chains import Chains
from bnlora.infer.mcmc.pieces import Pieces
from bnlora.infer.mcmc.samplers import LogDensity, Report, Sampler, Tuning
from bnlora.infer.mcmc.target import Target
from bnlora.models.hosts import is_shared
from bnlora.models.sharding import along, mesh_of

Tune = Callable[[Array, LogDensity, Array], Tuning]
"""From a key, a log-density and a start to the tuned numbers of a kernel."""

Build = Callable[[Tuning, Target, Any], Sampler]
"""From tuned numbers, the target and its inputs to a kernel."""


@dataclass(frozen=True)
class Plan:
    """Number and length of the chains.

    Attributes:
        num_chains: Number of chains, run together.
        num_draws: Kept draws of each chain.
        thinning: Transitions from one kept draw to the next.
        piece: Kept draws between two writes and updates of the progress bar; must divide `num_draws`. The
            largest divisor up to 100 when omitted.
        folder: Where pieces are stored; nowhere when omitted.
    """

    num_chains: int
    num_draws: int
    thinning: int = 1
    piece: int | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        check_at_least({n: getattr(self, n) for n in ("num_chains", "num_draws", "thinning")}, 1)
        piece = self.size
        if piece < 1 or self.num_draws % piece:
            near = min(divisors(self.num_draws), key=lambda n: abs(n - piece))
            raise ValueError(
                f"`piece` must divide num_draws={self.num_draws}; got {piece} (nearest valid: {near})"
            )

    @property
    def size(self) -> int:
        """Kept draws of a piece."""
        if self.piece is not None:
            return self.piece
        return max(n for n in divisors(self.num_draws) if n <= 100)

    @property
    def num_pieces(self) -> int:
        """Number of pieces."""
        return self.num_draws // self.size


@dataclass(frozen=True)
class Method:
    """A sampler: its name, and the functions that tune and build it.

    Attributes:
        name: Name in displays and records.
        options: Options for the record; pieces made with other options are refused.
        tune: Warms up one chain.
        build: Makes the kernel of one chain.
        bias: "step" if the draws do not converge to the target.
    """

    name: str
    options: dict[str, Any]
    tune: Tune
    build: Build
    bias: Bias = "none"


class _Piece(NamedTuple):
    position: Array
    report: Report


def run(
    key: Array,
    target: Target,
    method: Method,
    plan: Plan,
    starts: Float[Array, "c p"],
    console: Console | None,
) -> Chains:
    """Warm up and draw; an interrupt after the first piece returns the draws so far.

    Raises:
        ValueError: If the log-density is not finite where a chain starts, the folder has the pieces of
            another run, or the base is on devices of several processes.
    """
    began, starts = time.perf_counter(), target.positions(starts)
    density = _check_starts(target, starts)
    warm_key, draw_key = jax.random.split(key)
    over = partial(along, _own_mesh(target), "draw")
    starts, keys = over((starts, jax.random.split(draw_key, plan.num_chains)))
    sizes = {n: getattr(plan, n) for n in ("num_chains", "num_draws", "thinning", "size")}
    about = record(key, method.name, method.bias, method.options, sizes)
    pieces = Pieces.open(plan.folder, about | {"log_density": density}, target, starts)
    with progress_bar(console) as bar:
        task = bar.add_task(f"{method.name}: warm-up of {plan.num_chains} chains", total=plan.num_pieces)
        tuning, state = pieces.warm(lambda: _warm(warm_key, target, method, plan, starts))
        bar.update(task, description=f"{method.name}: {plan.num_draws} draws of {plan.num_chains} chains")
        program = partial(_program(target, method, plan), tuning)
        done: list[_Piece] = []
        try:
            for index in range(plan.num_pieces):
                first = jnp.asarray(index * plan.size * plan.thinning)
                state, piece = pieces.draws(index, partial(program, state, keys, first, target.inputs))
                done.append(_Piece(*jax.tree.map(np.asarray, tuple(piece))))
                bar.advance(task)
        except KeyboardInterrupt:
            if not done:
                raise
    joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *done)
    stopped = "done" if len(done) == plan.num_pieces else "interrupted"
    about |= {"seconds": time.perf_counter() - began, "stopped": stopped}
    tuned = jax.tree.map(np.asarray, tuning)
    vectors = target.vectors(joined.position)
    return Chains(target, vectors, joined.report._asdict(), tuned, about, plan.thinning)


def _own_mesh(target: Target) -> Mesh | None:
    """The mesh of the base, which must be one of this process."""
    over = mesh_of(target.inputs)
    if is_shared(over):
        raise ValueError(
            f"chains need a base on devices of one process; got devices of {jax.process_count()} processes, "
            "over which bl.fit and bl.predict run"
        )
    return over


def _check_starts(target: Target, starts: Array) -> list[float]:
    """The log-density at the start of each chain, which must be finite."""
    values = jax.jit(lambda u, inputs: jax.lax.map(lambda x: target.log_density(x, inputs), u))(
        starts, target.inputs
    )
    bad = np.flatnonzero(~np.isfinite(np.asarray(values)))
    if len(bad):
        remedy = "start from a fit (`given`, init_strategy='fit'), or from init_strategy='zero'"
        raise ValueError(
            f"the log-density is not finite where chain {bad[0]} starts ({float(values[bad[0]])}); "
            f"{broken_weights(target.view.model.base.weights) or remedy}"
        )
    return np.asarray(values, np.float64).tolist()


def _warm(key: Array, target: Target, method: Method, plan: Plan, starts: Array) -> tuple[Tuning, Any]:
    """Tuned numbers and the first state of every chain."""
    tune_key, init_key = jax.random.split(key)

    def one(tune_key: Array, init_key: Array, start: Array, inputs: Any) -> tuple[Tuning, Any]:
        tuned = method.tune(tune_key, lambda u: target.log_density(u, inputs), start)
        return tuned, method.build(tuned, target, inputs).init(init_key, tuned.position)

    program = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None)))
    keys = [jax.random.split(k, plan.num_chains) for k in (tune_key, init_key)]
    return program(*keys, starts, target.inputs)


def _program(target: Target, method: Method, plan: Plan) -> Callable[..., tuple[Any, _Piece]]:
    """The program of one piece of every chain, compiled once for all pieces."""

    def chain(tuning: Tuning, state: Any, key: Array, first: Array, inputs: Any) -> tuple[Any, _Piece]:
        sampler = method.build(tuning, target, inputs)

        def move(state: Any, t: Array) -> tuple[Any, Report]:
            return sampler.step(jax.random.fold_in(key, t), state)

        def draw(state: Any, t: Array) -> tuple[Any, _Piece]:
            state, reports = jax.lax.scan(move, state, t + jnp.arange(plan.thinning))
            return state, _Piece(state.position, reports)

        state, piece = jax.lax.scan(draw, state, first + plan.thinning * jnp.arange(plan.size))
        # Reports have the axes (draw, transition since the draw before); join them into one.
        flat = jax.tree.map(lambda x: x.reshape(plan.size * plan.thinning, *x.shape[2:]), piece.report)
        return state, _Piece(piece.position, flat)

    return jax.jit(jax.vmap(chain, in_axes=(0, 0, 0, None, None)))


def record(
    key: Array, sampler: str, bias: Bias, options: dict[str, Any], plan: dict[str, Any]
) -> dict[str, Any]:
    """How draws were made: sampler, options, seed, sizes, command and versions."""
    return {
        "sampler": sampler,
        "bias": bias,
        "options": options,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "plan": plan,
        "command": " ".join(sys.argv),
        "versions": {n: version(n) for n in ("bnlora", "jax", "numpyro", "blackjax")},
    }
