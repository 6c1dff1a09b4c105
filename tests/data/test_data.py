"""The order of rows: every one once an epoch, minibatches of one shape, and estimates without bias."""

from dataclasses import replace
from functools import partial
from itertools import islice
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnlora import guides, priors
from bnlora.adapters.sites import select
from bnlora.data.batch import CachedActivations, _columns, check_labels, minibatches, parts
from bnlora.infer.svi.elbo import elbo_terms, initial_parameters
from bnlora.infer.svi.fit import fit
from bnlora.prediction.predict import predict
from bnlora.program.model import Classifier
from bnlora.testing import tiny_base, tiny_rows


def test_rows_that_do_not_exist_are_refused():
    """JAX would return the last one."""
    rows = tiny_rows(jax.random.key(0), 6)
    np.testing.assert_array_equal(rows[[0, -4]].tokens, rows.tokens[jnp.array([0, 2])])
    np.testing.assert_array_equal(rows[np.arange(6) == 2].tokens, rows.tokens[2:3])
    assert len(rows[[]]) == 0
    for wrong in ([0, 6], np.array([-7]), jnp.array([6])):
        with pytest.raises(ValueError, match="rows must be from -6 to 5; got (6|-7)"):
            rows[wrong]
    for wrong in (3, np.ones(5, bool)):
        with pytest.raises(
            ValueError, match="must be a slice, a list of indices, or a mask of the 6 rows; got"
        ):
            rows[wrong]
    with pytest.raises(ValueError, match="rows must be integers; got"):
        rows[[1.0]]


def test_cached_activations_go_with_their_rows_and_only_their_arrays_are_traced():
    plain, hidden = tiny_rows(jax.random.key(0), 6), jax.random.normal(jax.random.key(1), (6, 8, 3))
    rows = replace(plain, cached=CachedActivations(hidden, depth=2, trunk="fixed"))
    part = rows[[4, 1]].cut(slice(2, 5))
    np.testing.assert_array_equal(part.cached.hidden, hidden[jnp.array([4, 1]), 2:5])
    np.testing.assert_array_equal(part.tokens, plain.tokens[jnp.array([4, 1]), 2:5])
    assert part.caches(2, "fixed")
    assert not part.caches(2, "")
    assert not part.caches(1, "fixed")
    assert not rows.plain.caches(2, "fixed")
    assert repr(rows) == "Batch(6 rows of 8 positions, activations of depth 2 cached)"
    assert repr(rows.plain) == "Batch(6 rows of 8 positions)"
    forms = [(), (2, "fixed"), (2, "fixed"), (1, "fixed"), (2, "")]
    batches = [replace(plain, cached=CachedActivations(hidden, *form) if form else None) for form in forms]
    traced = []
    trace = jax.jit(lambda batch: traced.append(batch.cached))
    for batch in batches:
        trace(batch)
    assert [x and (x.depth, x.trunk) for x in traced] == [None, (2, "fixed"), (1, "fixed"), (2, "")]
    assert [len(jax.tree.leaves(batch)) for batch in batches] == [3, 4, 4, 4, 4]


@pytest.mark.parametrize(("rows", "size"), [(7, 3), (6, 3), (2, 5), (1, 1)])
def test_every_row_comes_once_an_epoch(rows, size):
    stream = minibatches(jax.random.key(0), rows, size)
    joined = np.concatenate(list(islice(stream, rows)))  # `size` epochs
    for epoch in joined.reshape(size, rows):
        assert sorted(epoch) == list(range(rows))


def test_order_depends_on_the_key_alone():
    first, same, other = (next(minibatches(jax.random.key(k), 50, 20)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_scaled_minibatches_average_to_the_full_data_term():
    """7 rows in batches of 3: over three whole epochs the mean of N/B-scaled terms is the full term."""
    base, data = tiny_base(jax.random.key(0)), tiny_rows(jax.random.key(1), 7)
    sites = select(base, ["q_proj", "lm_head"], rank=2, layers=[3])
    model = Classifier(base, sites, priors.point(), label_ids=(3, 5))
    guide = guides.SiteFlow(model.prior)
    params, constrain = initial_parameters(jax.random.key(2), model, guide)
    params = jax.tree.map(lambda x: x + 0.5, params)
    term = jax.jit(partial(_data_term, model=model, guide=guide, constrain=constrain), static_argnums=3)
    whole = term(params, base.weights, data, 7)
    parts = [term(params, base.weights, data[i], 7) for i in islice(minibatches(jax.random.key(3), 7, 3), 7)]
    np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-5)
    assert np.std(parts) > 0.01 * abs(whole)


def _data_term(params, weights, batch, n_total, *, model, guide, constrain):
    return elbo_terms(jax.random.key(4), constrain(params), model, guide, weights, batch, n_total)["data"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_parts_hold_every_row_once_and_every_real_token(side):
    data = tiny_rows(jax.random.key(5), 23, length=60)
    if side == "left":
        data = replace(data, tokens=data.tokens[:, ::-1], mask=data.mask[:, ::-1])
    found = list(parts(data, 4))
    assert sorted(np.concatenate([part.rows for part in found])) == list(range(23))
    assert {len(part.batch) for part in found} == {4}
    for part in found:
        valid = part.batch[: len(part.rows)]
        np.testing.assert_array_equal(valid.mask, data.mask[part.rows, part.columns])
        np.testing.assert_array_equal(valid.tokens, data.tokens[part.rows, part.columns])
        assert valid.mask.sum() == data.mask[part.rows].sum()
    assert {part.batch.tokens.shape[1] for part in found} <= {8, 16, 24, 32, 48, 60}
    assert found[0].batch.tokens.shape[1] < found[-1].batch.tokens.shape[1]


@pytest.mark.parametrize(
    ("widths", "known"),
    [
        ("many", (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)),
        ("few", (8, 16, 32, 64, 128, 256, 512)),
    ],
)
@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300))
def test_widths_are_few_and_hold_what_is_needed(widths, known, needed, before, after):
    columns = _columns(before, before + needed, before + needed + after, widths)
    assert columns.start <= before < before + needed <= columns.stop <= before + needed + after
    width = columns.stop - columns.start
    assert width in (*known, before + needed + after)
    assert width < max(2 * needed, 9)


@pytest.mark.parametrize("labels", [np.zeros(3, int), np.zeros((4, 1), int)])
def test_labels_of_another_shape_than_the_rows_are_refused(labels):
    rows = replace(tiny_rows(jax.random.key(0), 4), labels=labels)
    with pytest.raises(ValueError, match=r"need one label each, shape \(4,\); got shape \("):
        check_labels("training", rows, 2)


ROWS = tiny_rows(jax.random.key(0), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0.0, 1.0, 0.0, 1.0])}, "integers; got 0.0 of type float64.*labels.astype"),
        ({"labels": np.array([True, False, True, False])}, "integers; got truth values: labels.astype"),
        ({"labels": np.array(["0", "1", "0", "1"])}, "integers; got '0' of type <U1.*words.index"),
        ({"labels": [0, 1, 0, 1]}, "the labels of the training rows must be an array; got a list"),
        ({"tokens": ROWS.tokens.astype(float)}, r"integers of shape \(row, position\); got float32"),
        ({"tokens": ROWS.tokens[0]}, r"integers of shape \(row, position\); got int32 of shape \(8,\)"),
        ({"mask": ROWS.mask[:, :4]}, r"of shape \(4, 8\), that of the tokens; got bool of shape \(4, 4\)"),
        ({"mask": ROWS.mask.astype(float)}, "truth values .* got float32"),
        ({"mask": ROWS.mask.at[2].set(False)}, "marks no token in row 2"),
    ],
)
def test_rows_that_are_not_what_a_batch_holds_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_labels("training", replace(ROWS, **changes), 2)


def test_prediction_and_fit_refuse_such_rows():
    base = tiny_base(jax.random.key(0))
    model = Classifier(base, select(base, ["lm_head"], rank=1), priors.point(), label_ids=(3, 5))
    with pytest.raises(ValueError, match="mask of the given rows must be truth values"):
        predict(jax.random.key(1), SimpleNamespace(model=model), replace(ROWS, mask=ROWS.mask[:, :4]))
    with pytest.raises(ValueError, match="labels of the training rows must be class numbers"):
        fit(
            jax.random.key(1),
            model,
            None,
            replace(ROWS, labels=np.zeros(4)),
            optax.sgd(0.1),
            num_steps=1,
            batch_size=2,
        )
