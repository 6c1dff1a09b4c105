"""Tiny random models of every family, and what tests of all of them compare.

A network runs in one compiled program here: run eagerly, each operation of each shape would be compiled.
"""

import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import bnlora as bl
from bnlora.base import Base
from bnlora.models import families
from bnlora.models.loading import Checkpoint
from bnlora.program.tangent.gradients import features

REFERENCES = Path(__file__).parents[1] / "references"
reference = SimpleNamespace(**runpy.run_path(str(REFERENCES / "make_reference.py")))
KEY = jax.random.key(0)


@cache
def base_of(name: str) -> Base:
    """The tiny decoder or encoder of that name."""
    decoder = name in reference.FAMILIES
    config = (reference.FAMILIES if decoder else reference.ENCODERS)[name]
    tensors = (reference.family_tensors if decoder else reference.encoder_tensors)(config)
    module = families.build(Checkpoint(config, tensors, None))
    return Base.from_module(module, name=name, family=families.family_of(config) if decoder else name)


def rows_of(base: Base, count: int = 4) -> bl.Batch:
    """Rows with padding on both sides, longer than every window."""
    tokens = jax.random.randint(KEY, (count, 16), 0, base.config.vocab_size)
    columns = jnp.arange(16)[None, :]
    begin, end = jnp.arange(count)[:, None] % 3, 16 - jnp.arange(count)[:, None]
    return bl.Batch(tokens, (columns >= begin) & (columns < end), jnp.arange(count) % 3)


def adapters_of(base: Base, rank: int = 2) -> dict[str, dict[str, Array]]:
    """Adapters of every module of every layer that change the logits."""

    def normal(name: str, *shape: int) -> Array:
        generator = np.random.default_rng(sum(map(ord, name)) + len(shape))
        return jnp.asarray(0.3 * generator.standard_normal(shape), jnp.float32)

    shapes = {n: (base.num_layers if n != "lm_head" else 1, *shape) for n, shape in base.modules.items()}
    return {
        name: {"a": normal(name, count, rank, d_in), "b": normal(name, count, d_out, rank)}
        for name, (count, d_in, d_out) in shapes.items()
    }


def close(got: Any, expected: Any, relative: float = 1e-4) -> None:
    """Equal up to a part of the largest value."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, atol=relative * np.abs(expected).max())


def tangent_features_are_the_jacobian(
    model: bl.Classifier, rows: bl.Batch, read: Callable[[Array], Array], sides: tuple[int, int] = (2, 3)
) -> None:
    """Compare the features in random frames with derivatives of the whole model in its kernels.

    Args:
        model: A classifier with sites in the uppermost layers.
        rows: Some rows.
        read: The logits of the classes from those of the whole model.
        sides: Columns of the left and of the right frames.
    """
    frames = {}
    for i, (name, site) in enumerate(model.sites.items()):
        keys, widths = jax.random.split(jax.random.fold_in(KEY, i)), (site.d_out, site.d_in)
        frames[name] = tuple(
            jax.random.normal(key, (site.depth, d, side))
            for key, d, side in zip(keys, widths, sides, strict=True)
        )

    def contrasts(cores: dict[str, Array], weights: Any) -> Array:
        module = model.base.bind(weights)
        for name, core in cores.items():
            L, R = frames[name]
            change = jnp.einsum("lom,lmk,lik->lio", L, core, R)
            if name == "lm_head":
                module.lm_head[...] = module.lm_head[...] + change[0].T
            else:
                module.layers[name][...] = module.layers[name][...].at[-len(change) :].add(change)
        logits = read(module(*(x.reshape(-1, x.shape[-1]) for x in (rows.tokens, rows.mask))))
        return logits[:, 1:] - logits[:, :1]

    @jax.jit
    def both(cores: dict[str, Array], weights: Any) -> tuple:
        # Forward derivatives, whose program is half as large; the features are made backwards.
        slopes = jax.jacfwd(contrasts)(cores, weights)
        return features(model, weights, frames, rows), contrasts(cores, weights), slopes

    cores = {name: jnp.zeros((len(L), *sides)) for name, (L, _) in frames.items()}
    (offset, phi), exact, slopes = both(cores, model.base.weights)
    expected = np.concatenate([slopes[n].reshape(*exact.shape, -1) for n in model.sites], axis=-1)
    offset = np.asarray(offset)
    close(phi, expected)
    close(offset[:, 1:] - offset[:, :1], exact)
