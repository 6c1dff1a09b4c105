"""Attention in blocks of queries, windows and caps against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlora.models import attention as module
from bnlora.models.attention import attention, causal_mask, local_mask


def plain(query, key, value, allowed, *, scale, cap=None):
    """In float64, one head after the other."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    groups = query.shape[2] // key.shape[2]
    found = np.zeros_like(query)
    for b, i, h in np.ndindex(*query.shape[:3]):
        scores = scale * key[b, :, h // groups] @ query[b, i, h]
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.where(allowed[b, i], np.exp(scores - scores.max()), 0.0)
        if weights.any():
            found[b, i, h] = weights / weights.sum() @ value[b, :, h // groups]
    return found


def heads(length: int):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (2, length, n, 8)) for k, n in zip(keys, (4, 2, 2), strict=True)]


MASK = jnp.ones((2, 13), bool).at[0, :4].set(False).at[1, 10:].set(False)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 40])
def test_attention_is_the_formula(window, cap):
    allowed = causal_mask(MASK) if window is None else local_mask(MASK, window)
    inputs = heads(13)
    got = attention(*inputs, allowed, scale=0.7, cap=cap)
    np.testing.assert_allclose(got, plain(*inputs, np.asarray(allowed), scale=0.7, cap=cap), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [8, 11, 13])
def test_blocks_of_queries_have_the_same_values_and_gradients(monkeypatch, length):
    inputs, allowed = heads(length), local_mask(MASK[:, :length], 5)

    def total(inputs, allowed):
        return jnp.sum(jnp.sin(attention(*inputs, allowed, cap=2.0)))

    whole = jax.value_and_grad(total)(inputs, allowed)
    monkeypatch.setattr(module, "WHOLE", 4)
    monkeypatch.setattr(module, "BLOCK", 4)
    parts = jax.value_and_grad(total)(inputs, allowed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), parts, whole)


def test_a_window_has_its_length():
    allowed = np.asarray(local_mask(jnp.ones((1, 6), bool), 3))[0]
    np.testing.assert_array_equal(allowed.sum(1), [1, 2, 3, 3, 3, 3])
    assert allowed[5].tolist() == [False, False, False, True, True, True]


def test_memory_of_a_long_row_grows_with_its_length():
    """Twice the tokens need twice the memory, forward and backward, and not four times as much."""

    def memory(length: int) -> int:
        query, key = (jax.ShapeDtypeStruct((1, length, count, 16), jnp.float32) for count in (8, 2))

        def total(query, key, value):
            return jnp.sum(attention(query, key, value, causal_mask(jnp.ones((1, length), bool))))

        lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(query, key, key)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert memory(4096) < 2.5 * memory(2048)
