"""Keys and values that are kept: one token at a time gives the logits of the whole row.

Tolerance: float32 sums in another order, as in `test_parity`; ten times torch's own rounding error.
"""

import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.families import REFERENCES, reference

from bnlora.base import Base
from bnlora.models import families
from bnlora.models.decoder_cache import Cache, empty_cache
from bnlora.models.decoder_layer import positions_of
from bnlora.models.loading import Checkpoint

PADDED, PREFILLED = 5, 9  # columns of padding in the first row; columns before the first single token
every_model = pytest.mark.parametrize("name", sorted(reference.ALL))


@cache
def tiny(name: str) -> Base:
    config = reference.ALL[name]
    make = reference.tiny_tensors if name in reference.CONFIGS else reference.family_tensors
    return Base.from_module(families.build(Checkpoint(config, make(config), None)), name=name)


def rows(base: Base) -> tuple[np.ndarray, np.ndarray]:
    """Two rows, the first one padded on the left; longer than every window."""
    tokens = np.random.RandomState(8).randint(0, base.config.vocab_size, (2, 24))
    mask = np.ones(tokens.shape, bool)
    mask[0, :PADDED] = False
    return tokens, mask


def adapters_of(base: Base, first_layer: int, *, seed: int = 0) -> dict:
    generator, count = np.random.default_rng(seed), base.num_layers - first_layer
    return {
        module: {
            "a": 0.3 * generator.normal(size=(count, 2, d_in)).astype(np.float32),
            "b": 0.3 * generator.normal(size=(count, d_out, 2)).astype(np.float32),
        }
        for module, (d_in, d_out) in base.config.layer_modules.items()
    }


def stepwise(base: Base, weights, tokens, mask, adapters, first_layer: int, slots: int):
    """Logits of every column: the first ones at once, the others token by token."""
    module, total = base.bind(weights), base.num_layers
    full = jnp.zeros((2, slots), bool).at[:, : tokens.shape[1]].set(mask)

    def forward(caches, tokens, columns):
        filled = full & (jnp.arange(slots) <= columns[-1])
        hidden = module.embed_at(tokens, positions_of(filled)[:, columns])
        below, above = caches
        hidden, below = module.extend(hidden, filled, below, columns[0], first_layer=0)
        hidden, above = module.extend(
            hidden, filled, above, columns[0], first_layer=first_layer, adapters=adapters
        )
        return (below, above), module.head(hidden)

    kept = tuple(
        empty_cache(base.config, n, 2, slots, jnp.float32) for n in (first_layer, total - first_layer)
    )
    kept, first = forward(kept, tokens[:, :PREFILLED], jnp.arange(PREFILLED))
    later = jnp.arange(PREFILLED, tokens.shape[1])
    step = lambda caches, x: forward(caches, x[0][:, None], x[1][None])  # noqa: E731
    _, rest = jax.lax.scan(step, kept, (tokens[:, PREFILLED:].T, later))
    return jnp.concatenate([first, jnp.moveaxis(rest[:, :, 0], 0, 1)], axis=1)


@pytest.mark.slow
@every_model
def test_steps_give_the_logits_of_the_whole_row(name):
    """With adapters above the lowest layer."""
    base = tiny(name)
    rounding = json.loads((REFERENCES / f"{name}.json").read_text(encoding="utf-8"))["rounding"]
    error = largest_error(base, adapters_of(base, 1), first_layer=1)
    assert error <= 10 * rounding


@pytest.mark.parametrize("first_layer", [0, 3])
def test_steps_without_adapters_and_without_layers_above_or_below(first_layer):
    assert largest_error(tiny("grouped"), {}, first_layer=first_layer) <= 1e-4


def largest_error(base: Base, adapters: dict, *, first_layer: int) -> float:
    """Of the logits in steps against those of the whole row."""
    tokens, mask = rows(base)

    def whole(weights, adapters):
        module = base.bind(weights)
        hidden = module.blocks(module.embed(tokens, mask), mask, first_layer=0, stop=first_layer)
        hidden = module.blocks(hidden, mask, first_layer=first_layer, stop=base.num_layers, adapters=adapters)
        return module.head(hidden)

    in_steps = partial(stepwise, base, first_layer=first_layer, slots=30)
    steps = jax.jit(lambda weights, adapters: in_steps(weights, jnp.asarray(tokens), mask, adapters))
    expected, got = (np.asarray(f(base.weights, adapters))[mask] for f in (jax.jit(whole), steps))
    return float(np.abs(got - expected).max())


def test_draws_with_caches_of_their_own_are_the_same_one_by_one():
    base = tiny("gemma3")
    tokens, mask = rows(base)
    draws = [adapters_of(base, 0, seed=seed) for seed in (1, 2)]
    run = lambda adapters: stepwise(  # noqa: E731
        base, base.weights, jnp.asarray(tokens), mask, adapters, 0, slots=24
    )
    together = jax.jit(jax.vmap(run))(jax.tree.map(lambda *x: jnp.stack(x), *draws))
    one_by_one = [jax.jit(run)(draw) for draw in draws]
    np.testing.assert_allclose(together, np.stack(one_by_one), atol=1e-4)


def test_a_cache_of_too_many_layers_is_refused():
    base = tiny("grouped")
    hidden, mask = jnp.zeros((1, 1, base.config.d_model)), jnp.ones((1, 4), bool)
    with pytest.raises(ValueError, match=r"layers \[1, 4\) are not within \[0, 3\)"):
        base.module.extend(hidden, mask, empty_cache(base.config, 3, 1, 4, jnp.float32), 0, first_layer=1)


def test_no_layer_changes_nothing():
    base = tiny("grouped")
    hidden, none = jnp.ones((1, 1, base.config.d_model)), empty_cache(base.config, 0, 1, 4, jnp.float32)
    got, kept = base.module.extend(hidden, jnp.ones((1, 4), bool), none, 0, first_layer=1)
    assert isinstance(kept, Cache)
    np.testing.assert_array_equal(got, hidden)
