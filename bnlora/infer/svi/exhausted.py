"""What takes less memory than a step that did not fit, with the figures of `bnlora.estimate`."""

from collections.abc import Callable
from typing import Any

import optax

from bnlora.data.batch import Batch
from bnlora.infer.svi.estimate import Estimate, estimate
from bnlora.infer.svi.options import Memory


def smaller_step(
    model: Any,
    guide: Callable,
    train: Batch,
    optimizer: optax.GradientTransformation,
    memory: Memory,
    sizes: tuple[int, int],
) -> str:
    """The size of a step and of those with other settings of `Memory`, as the end of a sentence.

    Args:
        model: The classifier.
        guide: Its guide.
        train: Training rows.
        optimizer: Optimiser of the locations.
        memory: Settings of the step that did not fit.
        sizes: Rows of a step, and guide draws averaged in it.
    """
    (rows, num_particles), length = sizes, train.tokens.shape[-1]
    step = f"a step of batch_size={rows} rows of {length} tokens"
    try:
        size = estimate(
            model.base, model.sites, model.prior, guide=lambda prior: guide, batch=(rows, length),
            num_rows=len(train), num_classes=max(model.num_classes, 2), memory=memory,
            optimizer=optimizer, num_particles=num_particles,
        )  # fmt: skip
    except Exception:  # noqa: BLE001 (the rule is for decoders; the first error must not be hidden by another)
        return f"{step} needs more than there is; lower batch_size, or pass memory=bl.Memory(accumulate=...)"
    needed = f"{step} needs {size.temporary / 2**20:,.1f} MiB beside its arguments by bl.estimate"
    smaller = _smaller(size, memory, memory.remat or model.base.execution.remat)
    others = ", ".join(f"memory=bl.Memory({way}) {bytes_ / 2**20:,.1f} MiB" for way, bytes_ in smaller)
    return f"{needed}; {others or 'no setting of bl.Memory needs less'}; a lower batch_size needs less"


def _smaller(size: Estimate, memory: Memory, remat: Any) -> list[tuple[str, int]]:
    """Settings that take less, each with its bytes: more parts, layers anew, and both."""
    parts = max(number for _, number in size.steps)
    now = size.steps.get((remat, memory.accumulate), size.temporary)
    ways = {
        f"accumulate={parts}": (remat, parts),
        'remat="layers"': ("layers", memory.accumulate),
        f'accumulate={parts}, remat="layers"': ("layers", parts),
    }
    found = {name: size.steps[way] for name, way in ways.items() if way in size.steps}
    return [(name, bytes_) for name, bytes_ in found.items() if bytes_ < now]
