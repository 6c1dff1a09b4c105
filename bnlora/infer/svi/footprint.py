"""The step of a fit over shapes: its state, what its backward pass keeps, and XLA's account of it.

Nothing of the size of a model is allocated. Weights, rows and state are `jax.ShapeDtypeStruct`s.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import optax

from bnlora._util.typing import Adapters
from bnlora.data.batch import Batch, CachedActivations
from bnlora.infer.svi.options import Optimisation
from bnlora.infer.svi.step import CHUNK, State, Step, prepared_step
from bnlora.models.decoder_storage import num_bytes
from bnlora.models.execution import Remat


def struct(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array without numbers."""
    return jax.ShapeDtypeStruct(shape, dtype)


class Work(NamedTuple):
    """Memory of the forward and the backward pass, in bytes.

    Attributes:
        kept: What the backward pass finds in memory.
        at_work: What one layer needs while it runs.
    """

    kept: int
    at_work: int


def abstract_rows(model: Any, num_rows: int, length: int, *, cached: bool) -> Batch:
    """Rows without numbers, with the activations below the adapters where there are any."""
    shape = (num_rows, length)
    rows = Batch(struct(shape, "int32"), struct(shape, "bool"), struct((num_rows,), "int32"))
    if not cached or model.first_layer == 0:
        return rows
    hidden = struct((*shape, model.base.config.d_model), "float32")
    return Batch(
        rows.tokens,
        rows.mask,
        rows.labels,
        CachedActivations(hidden, model.first_layer, model.trunk.checksum),
    )


def abstract_step(
    program: Any,
    guide: Callable,
    train: Batch,
    optimizer: optax.GradientTransformation,
    num_particles: int,
) -> tuple[Step, State]:
    """The step of a fit and the shapes of its state; arguments as in `prepared_step`."""
    made: list[Step] = []

    def begin(key: jax.Array, train: Batch) -> State:
        step, state = prepared_step(
            key, program, guide, train, optimizer, Optimisation(), num_particles=num_particles
        )
        made.append(step)
        return state

    state = jax.eval_shape(begin, jax.random.key(0), train)
    return replace(made[0], train=train), state


def draw(model: Any) -> Adapters:
    """Shapes of one draw of the adapters."""
    return jax.eval_shape(lambda key: numpyro.handlers.seed(model.prior, key)(), jax.random.key(0))


def works(model: Any, train: Batch, ways: Collection[tuple[Remat, int]]) -> dict[tuple[Remat, int], Work]:
    """Memory of both passes by what is computed anew and the number of rows.

    What is kept is counted in the trace. It is affine in the rows, so each way is traced for the fewest and
    the most rows only. A layer at work has what its backward pass computes anew, at least half of all that it
    computes, and two arrays of its widest product. Where a layer runs again from weights that are not
    float32, its kernels in float32 and half as much in copies are there too.
    """
    few, most = min(rows for _, rows in ways), max(rows for _, rows in ways)
    ends = {
        remat: [_kept(model, train, rows, remat) for rows in (few, most)]
        for remat in {"none", *(remat for remat, _ in ways)}
    }

    def kept(remat: Remat, rows: int) -> int:
        low, high = ends[remat]
        return low if few == most else low + (high - low) * (rows - few) // (most - few)

    return {way: _work(model, train, way, kept(*way), kept("none", way[1])) for way in ways}


def _work(model: Any, train: Batch, way: tuple[Remat, int], kept: int, whole: int) -> Work:
    layers, (remat, rows) = max(model.base.num_layers - model.first_layer, 1), way
    again = max(whole - kept, whole / 2) / layers
    if model.base.num_layers == model.first_layer:
        return Work(kept, 0)
    tokens = rows * train.tokens.shape[-1]
    kernels = model.base.config.layer_modules.values()
    again += 2 * tokens * max(map(max, kernels)) * 4
    if model.base.storage != "float32" and remat in ("attention", "layers"):
        again += 1.5 * sum(map(math.prod, kernels)) * 4
    return Work(kept, int(again))


def _kept(model: Any, train: Batch, rows: int, remat: Remat) -> int:
    """Bytes of the residuals of the log-likelihood, without the frozen weights themselves."""
    model = model.over(model.base.running(remat=remat))
    part = jax.tree.map(lambda x: struct((rows, *x.shape[1:]), x.dtype), train)

    def residuals(adapters: Adapters, weights: Any, batch: Batch) -> Any:
        return jax.vjp(lambda a: jax.nn.log_softmax(model.logits(weights, a, batch)), adapters)[1]

    found = jax.tree.leaves(jax.eval_shape(residuals, draw(model), model.base.weights, part))
    frozen = Counter((x.shape, x.dtype) for x in jax.tree.leaves(model.base.weights))
    kept = 0
    for leaf in found:
        if frozen[leaf.shape, leaf.dtype]:
            frozen[leaf.shape, leaf.dtype] -= 1
        else:
            kept += num_bytes(leaf)
    return kept


def compiled_bytes(step: Step, state: State, batch_size: int) -> int:
    """Temporary memory of the compiled step, by XLA's own account."""
    key, rows = jax.eval_shape(lambda: jax.random.key(0)), struct((CHUNK, batch_size), jnp.int32)
    count = struct((), jnp.int32)
    lowered = step.compiled(batch_size).lower(
        state, key, step.model.base.weights, step.train, count, count, rows
    )
    account: Any = lowered.compile().memory_analysis()
    return account.temp_size_in_bytes
