"""All VADER sentences with their activations below the adapted layers, computed once and kept on disk (3 GB).

Every seed of `seeds.py` draws its rows from here, so that no seed runs the trunk of the model again.
"""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console

import bnlora as bl
from bnlora.assets import DOMAINS, cache_folder, vader_domains
from bnlora.base import Base
from bnlora.recipe import Recipe


def pool(base: Base, recipe: Recipe, *, console: Console | None = None) -> dict[str, bl.Batch]:
    """Every domain's sentences as one batch with cached activations, in the order of the data set."""
    data = recipe.read(vader_domains(), base, text="text", label="label")
    sites = bl.select(base, ["v_proj"], rank=1, layers=slice(-(recipe.top_layers or 0), None))
    model = bl.Classifier(base, sites, bl.priors.point(), label_ids=data.label_ids)
    folder = cache_folder() / "pool"
    folder.mkdir(parents=True, exist_ok=True)
    return {
        name: _cached(model, data[name], folder / f"{name}-{model.start}.npy", console) for name in DOMAINS
    }


def _cached(model: bl.Classifier, batch: bl.Batch, file: Path, console: Console | None) -> bl.Batch:
    if not file.is_file():
        made = bl.cache_prefix(model, batch, console=console)
        np.save(file, np.asarray(made.hidden))
    return replace(batch, hidden=np.load(file, mmap_mode="r"), depth=model.start)


def rows_of(batch: bl.Batch, rows: np.ndarray) -> bl.Batch:
    """Some rows, read from the disk and cut to the columns that they use."""
    used = np.flatnonzero(np.asarray(batch.mask)[rows].any(0))
    columns = slice(int(used[0]), int(used[-1]) + 1)
    taken = {n: jnp.asarray(np.asarray(getattr(batch, n))[rows][:, columns]) for n in ("tokens", "mask")}
    labels = jnp.asarray(np.asarray(batch.labels)[rows])
    in_order = np.sort(rows)  # the disk is read in order
    hidden = batch.hidden[in_order][np.argsort(np.argsort(rows))][:, columns]
    return replace(batch, **taken, labels=labels, hidden=jnp.asarray(hidden))


if __name__ == "__main__":
    from bnlora.demo import RECIPE

    for name, batch in pool(RECIPE.load_base(), RECIPE, console=Console()).items():
        print(name, batch)
