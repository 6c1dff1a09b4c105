"""VADER's sentences with activations below the adapted layers, computed once and cached on disk (4.3 GB).

Every benchmark of the core prior takes its rows from here, so the trunk of the model runs only once.
`python -m benchmarks pool` computes all activations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.console import Console

import bnlora as bl
from bnlora._util.caching import cache_folder
from bnlora.app.demo import RECIPE
from bnlora.base import Base
from bnlora.data.assets import DOMAINS, vader_domains
from bnlora.data.batch import CachedActivations

LABELLED = 560
"""Labelled movie sentences of a seed."""


class Pool(NamedTuple):
    """The base of the demonstration, and sentences with activations.

    Attributes:
        base: The base.
        rows: Sentences of each domain with cached activations, in the order of the data set; on disk.
        label_ids: Token id of each class.
    """

    base: Base
    rows: dict[str, bl.Batch]
    label_ids: tuple[int, ...]


def pool(domains: Sequence[str] = DOMAINS, *, console: Console | None = None) -> Pool:
    """The sentences of some domains. Activations that are not on disk are computed, which takes minutes."""
    base, data = sentences()
    sites = bl.select(base, ["v_proj"], rank=1, layers=slice(-(RECIPE.top_layers or 0), None))
    model = bl.Classifier(base, sites, bl.priors.point(), label_ids=data.label_ids)
    folder = cache_folder() / "pool"
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        name: _cached(model, data[name], folder / f"{name}-{model.first_layer}.npy", console)
        for name in domains
    }
    return Pool(base, rows, tuple(data.label_ids.tolist()))


def sentences() -> tuple[Base, bl.TextData]:
    """The base of the demonstration and all sentences by domain, without activations."""
    base = RECIPE.load_base()
    return base, RECIPE.read(vader_domains(), base, text="text", label="label")


def _cached(model: bl.Classifier, batch: bl.Batch, file, console: Console | None) -> bl.Batch:
    if not file.is_file():
        np.save(file, np.asarray(bl.cache_prefix(model, batch, console=console).cached.hidden))
    return replace(batch, cached=CachedActivations(np.load(file, mmap_mode="r"), model.first_layer))


def drawn(
    pooled: Pool, seed: int, *, labelled: int = LABELLED, test: int = 0
) -> tuple[bl.Batch, dict[str, bl.Batch]]:
    """Labelled movie sentences of a seed, and other sentences of each domain for tests."""
    sizes = {name: len(batch) for name, batch in pooled.rows.items()}
    train, tests = places(sizes, seed, labelled=labelled, test=test)
    return rows_of(pooled.rows["movies"], train), {n: rows_of(pooled.rows[n], at) for n, at in tests.items()}


def places(
    sizes: Mapping[str, int], seed: int, *, labelled: int = LABELLED, test: int = 0
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Numbers of the labelled movie sentences of a seed, and of the test sentences of each domain.

    With up to `LABELLED` labelled rows, the test rows of a seed do not depend on how many there are.
    """
    random = np.random.default_rng(seed)
    order = {name: random.permutation(size) for name, size in sizes.items()}
    skip = {name: max(LABELLED, labelled) if name == "movies" else 0 for name in order}
    tests = {n: order[n][skip[n] : skip[n] + test] for n in order} if test else {}
    return order["movies"][:labelled], tests


def rows_of(batch: bl.Batch, rows: np.ndarray) -> bl.Batch:
    """Some rows, read from disk, without columns of padding only."""
    used = np.flatnonzero(np.asarray(batch.mask)[rows].any(0))
    columns = slice(int(used[0]), int(used[-1]) + 1)
    taken = {n: jnp.asarray(np.asarray(getattr(batch, n))[rows][:, columns]) for n in ("tokens", "mask")}
    labels = jnp.asarray(np.asarray(batch.labels)[rows])
    in_order = np.sort(rows)  # read the file in order; the second `argsort` restores the order of `rows`
    hidden = batch.cached.hidden[in_order][np.argsort(np.argsort(rows))][:, columns]
    return replace(batch, **taken, labels=labels, cached=replace(batch.cached, hidden=jnp.asarray(hidden)))
