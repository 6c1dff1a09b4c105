"""Simulate, infer and rank, all simulations in one compiled program: what the calibrations of `sbc` share."""

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
"""`make(key, own, frozen, rows, shared)`: one simulation's true adapters, and rows with labels made by them.

`own` is what the simulation alone has, `shared` what all of them have."""


class _Found(NamedTuple):
    """What one simulation gives; mappings by name of the function."""

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
        inference: What is to be judged.
        functions: What is ranked; `identifiable(model, rows[:3])` when None.
        make: Makes the truth and the rows of one simulation.
        own: Arrays with a leading simulation axis, the third argument of `make` by slices; None for none.
        rows: Rows.
        shared: What else `make` reads.
        num_simulations: Number of simulations.
        level: Level of the verdicts.
        origin: Where the truths come from, for messages.
        remedy: What to do where functions of them are not finite.

    Raises:
        ValueError: When a function is no scalar or not finite at a truth, draws have other shapes than the
            adapters, or every simulation failed.
    """
    key = check_key(key)
    functions = identifiable(model, rows[:3]) if functions is None else functions
    one = _simulation(model, inference, functions, make)
    program = jax.jit(lambda each, *together: jax.lax.map(lambda e: one(*e, *together), each))
    keys = jax.random.split(key, num_simulations)
    found = jax.tree.map(np.asarray, program((keys, own), model.base.weights, model.prepare(rows), shared))
    broken = [name for name, ok in found.truth_finite.items() if not ok.all()]
    if broken:
        remedy = broken_weights(model.base.weights) or remedy
        raise ValueError(f"the functions must be finite at {origin}; not so: {', '.join(broken)}; {remedy}")
    finite = np.all(list(found.draws_finite.values()), axis=0)
    if not finite.any():
        raise ValueError(
            f"all {num_simulations} simulations gave draws that are not finite, so nothing can be ranked; "
            "run the inference by itself on rows of `simulate`, and lower its learning rate or its step"
        )
    ranks = np.stack(list(found.ranks.values()), axis=1)[finite]
    return Calibration(tuple(found.ranks), ranks, int(found.num_draws[0]), ~finite, level)


def _simulation(
    model: Classifier, inference: Callable, functions: Functions, make: Make
) -> Callable[..., _Found]:
    def one(key: Array, own: Any, weights: Any, rows: Batch, shared: Any) -> _Found:
        truth_key, fit_key, rank_key = jax.random.split(key, 3)
        adapters, batch = make(truth_key, own, weights, rows, shared)
        draws = inference(fit_key, weights, batch)
        model.sites.check(jax.tree.map(lambda x: x[0], draws))
        truth = scalars(functions(weights, adapters, batch))
        values = jax.lax.map(lambda drawn: dict(functions(weights, drawn, batch)), draws)
        names = sorted(truth)
        inner, outer = jnp.stack([values[n] for n in names], 1), jnp.stack([truth[n] for n in names])

        def by_name(x: Array) -> dict[str, Array]:
            return dict(zip(names, x, strict=True))

        return _Found(
            by_name(rank(rank_key, inner, outer)),
            by_name(jnp.isfinite(inner).all(0)),
            by_name(jnp.isfinite(outer)),
            jnp.asarray(len(inner)),
        )

    return one
