"""Simulate, infer and rank, all simulations in one compiled program; shared by the calibrations of `sbc`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlora._util.checks import broken_weights, check_key
from bnlora._util.typing import Adapters
from bnlora.assess.sbc.calibration import Calibration
from bnlora.data.batch import Batch
from bnlora.metrics.ranks import rank
from bnlora.prediction.functions import Functions, identifiable, scalars
from bnlora.program.model import Classifier

Make = Callable[..., tuple[Adapters, Batch]]
"""`make(key, own, frozen, rows, shared)`: true adapters of one simulation, and rows with labels drawn from
them. `own` contains the arrays of this simulation, `shared` those of all simulations."""


class _Result(NamedTuple):
    """Result of one simulation; mappings by name of the function."""

    ranks: dict[str, Array]
    draws_finite: dict[str, Array]
    truth_finite: dict[str, Array]
    num_draws: Array


def ranked(
    key: Array,
    model: Classifier,
    inference: Callable[[Array, Any, Batch], Adapters],
    functions: Functions | None,
    make: Make,
    own: Any,
    rows: Batch,
    shared: Any,
    *,
    num_simulations: int,
    level: float,
    origin: str,
    remedy: str,
) -> Calibration:
    """Ranks of true adapters among the draws of an inference.

    Args:
        key: Random key.
        model: A `Classifier`.
        inference: The inference to test.
        functions: Functions to rank; `identifiable(model, rows[:3])` if None.
        make: Function that draws the truth and the labels of one simulation.
        own: Arrays with a leading simulation axis; `make` gets one slice. None if there are none.
        rows: Rows.
        shared: Further argument of `make`, the same in all simulations.
        num_simulations: Number of simulations.
        level: Level of the tests.
        origin: Origin of the truths, for messages.
        remedy: Advice if functions of the truths are not finite, for messages.

    Raises:
        ValueError: If a function is not a scalar or not finite at a truth, draws have other shapes than the
            adapters, or every simulation failed.
    """
    key = check_key(key)
    functions = identifiable(model, rows[:3]) if functions is None else functions
    one = _simulation(model, inference, functions, make)
    # `lax.map` runs one simulation at a time: memory does not grow with their number.
    program = jax.jit(lambda each, *together: jax.lax.map(lambda e: one(*e, *together), each))
    keys = jax.random.split(key, num_simulations)
    results = jax.tree.map(np.asarray, program((keys, own), model.base.weights, model.prepare(rows), shared))
    broken = [name for name, ok in results.truth_finite.items() if not ok.all()]
    if broken:
        remedy = broken_weights(model.base.weights) or remedy
        raise ValueError(f"the functions must be finite at {origin}; not so: {', '.join(broken)}; {remedy}")
    finite = np.all(list(results.draws_finite.values()), axis=0)
    if not finite.any():
        raise ValueError(
            f"all {num_simulations} simulations gave draws that are not finite, so there are no ranks; "
            "run the inference on rows of `simulate` to find the cause, or lower its learning rate or step"
        )
    ranks = np.stack(list(results.ranks.values()), axis=1)[finite]
    return Calibration(tuple(results.ranks), ranks, int(results.num_draws[0]), ~finite, level)


def _simulation(
    model: Classifier, inference: Callable, functions: Functions, make: Make
) -> Callable[..., _Result]:
    """A pure function that runs one simulation."""

    def one(key: Array, own: Any, weights: Any, rows: Batch, shared: Any) -> _Result:
        truth_key, fit_key, rank_key = jax.random.split(key, 3)
        adapters, batch = make(truth_key, own, weights, rows, shared)
        draws = inference(fit_key, weights, batch)
        model.sites.check(jax.tree.map(lambda x: x[0], draws))
        truth = scalars(functions(weights, adapters, batch))
        values = jax.lax.map(lambda adapter: dict(functions(weights, adapter, batch)), draws)
        names = sorted(truth)
        # Values at the draws, shape (draw, function), and at the truth, shape (function,).
        inner, outer = jnp.stack([values[n] for n in names], 1), jnp.stack([truth[n] for n in names])

        def by_name(x: Array) -> dict[str, Array]:
            return dict(zip(names, x, strict=True))

        return _Result(
            by_name(rank(rank_key, inner, outer)),
            by_name(jnp.isfinite(inner).all(0)),
            by_name(jnp.isfinite(outer)),
            jnp.asarray(len(inner)),
        )

    return one
