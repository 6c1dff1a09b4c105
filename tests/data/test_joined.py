"""Rows of several batches in one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.linearised import NEW, ROWS, frames, tangent_of

import bnlora as bl
from bnlora.data.fields import Choices


def test_rows_keep_their_order_and_shorter_ones_are_padded_on_the_left():
    short = NEW.cut(slice(-3, None))
    joined = bl.join(ROWS, short)
    assert (len(joined), joined.tokens.shape[1]) == (len(ROWS) + len(NEW), ROWS.tokens.shape[1])
    np.testing.assert_array_equal(joined.labels, np.concatenate([ROWS.labels, NEW.labels]))
    np.testing.assert_array_equal(joined.tokens[len(ROWS) :, -3:], short.tokens)
    assert not np.asarray(joined.mask)[len(ROWS) :, :-3].any()
    assert jax.tree.all(jax.tree.map(np.array_equal, joined[: len(ROWS)], ROWS))


def test_features_stay_if_they_are_of_one_model():
    first, second = tangent_of(frames("v_proj")), tangent_of(frames("lm_head"))
    joined = bl.join(first.prepare(ROWS), first.prepare(NEW))
    assert first.is_prepared(joined)
    np.testing.assert_array_equal(joined.features.phi[len(ROWS) :], first.prepare(NEW).features.phi)
    assert bl.join(first.prepare(ROWS), second.prepare(NEW)).features is None
    assert bl.join(first.prepare(ROWS), NEW).features is None


def with_choices(count: int, length: int) -> bl.Batch:
    tokens = jnp.ones((2, count, length), int)
    scored = jnp.zeros(tokens.shape, bool).at[..., -1].set(True)  # noqa: FBT003
    choices = Choices(scored, jnp.ones((2, count)), 1)
    return bl.Batch(tokens, jnp.ones(tokens.shape, bool), jnp.zeros(2, int), choices=choices)


def test_completions_still_end_at_the_last_position():
    joined = bl.join(with_choices(3, 4), with_choices(3, 6))
    assert joined.tokens.shape == (4, 3, 6)
    assert np.asarray(joined.choices.scored)[..., -1].all()
    assert joined.choices.scored.shape == joined.tokens.shape


def test_rows_of_different_kinds_are_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        bl.join()
    with pytest.raises(ValueError, match="batch 0 has 3 choices.*batch 1 has 4 choices"):
        bl.join(with_choices(3, 4), with_choices(4, 4))
    with pytest.raises(ValueError, match="batch 0 has one text.*batch 1 has 3 choices"):
        bl.join(ROWS, with_choices(3, 4))
    with pytest.raises(ValueError, match="batch 1 has one text and outcomes of 1 axes"):
        bl.join(ROWS, replace(NEW, outcomes=jnp.ones(len(NEW))))
