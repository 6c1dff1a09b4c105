"""Row-shared flows: Jacobian, inverse, masks, start, and independence across rows and layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlora.flows import Conditioner, RowSharedAffine, conditioner_masks

LAYERS, ROWS, FEATURES, HIDDEN = 2, 3, 4, 6


def random_net(key, batch=(LAYERS,), features=FEATURES, size=0.5):
    keys = iter(jax.random.split(key, 12))

    def part(*shape):
        biases = (*shape[:-2], shape[-1])
        return tuple(size * jax.random.normal(next(keys), (*batch, *s)) for s in (shape, biases))

    hidden = part(2, 2, HIDDEN, HIDDEN)
    return Conditioner(part(features, HIDDEN), hidden, part(HIDDEN, 2 * features))


@pytest.mark.parametrize("features", [1, 2, 4, 9])
@pytest.mark.parametrize("event", [(ROWS,), ()], ids=["matrix event", "vector event"])
def test_log_determinant_is_that_of_the_jacobian(features, event):
    flow = RowSharedAffine(random_net(jax.random.key(0), (), features), len(event) + 1)
    x = jax.random.normal(jax.random.key(1), (*event, features))
    jacobian = jax.jacobian(lambda v: flow(v.reshape(x.shape)).reshape(-1))(x.reshape(-1))
    sign, expected = jnp.linalg.slogdet(jacobian)
    assert sign == 1
    np.testing.assert_allclose(flow.log_abs_det_jacobian(x, flow(x)), expected, atol=1e-5)


def test_an_entry_depends_on_the_entries_before_it_only():
    flow = RowSharedAffine(random_net(jax.random.key(2), ()), 1)
    jacobian = jax.jacobian(flow)(jax.random.normal(jax.random.key(3), (FEATURES,)))
    np.testing.assert_array_equal(jnp.triu(jacobian, 1), jnp.zeros((FEATURES, FEATURES)))
    assert jnp.all(jnp.abs(jacobian[jnp.tril_indices(FEATURES, -1)]) > 0), "no dependence at all"


def test_masks_compose_to_a_strictly_lower_triangle():
    first, hidden, last = conditioner_masks(9, 16)
    reach = first @ hidden @ hidden @ last
    for half in np.split(reach, 2, axis=1):
        assert np.all(half[np.tril_indices(9)] == 0), "an output sees its own or a later input"
        assert np.all(half[np.triu_indices(9, 1)] > 0), "an output misses an earlier input"


def test_inverse_recovers_the_base_point():
    flow = RowSharedAffine(random_net(jax.random.key(4)), 2)
    x = jax.random.normal(jax.random.key(5), (7, LAYERS, ROWS, FEATURES))
    np.testing.assert_allclose(flow.inv(flow(x)), x, atol=1e-4)


def test_rows_share_weights_and_layers_do_not():
    flow = RowSharedAffine(random_net(jax.random.key(6)), 2)
    row = jax.random.normal(jax.random.key(7), (FEATURES,))
    y = flow(jnp.broadcast_to(row, (LAYERS, ROWS, FEATURES)))
    np.testing.assert_allclose(y, jnp.broadcast_to(y[:, :1], y.shape), atol=1e-6)
    assert not np.allclose(y[0], y[1])


def test_intermediates_save_a_pass_and_change_nothing():
    flow = RowSharedAffine(random_net(jax.random.key(8)), 2)
    x = jax.random.normal(jax.random.key(9), (LAYERS, ROWS, FEATURES))
    y, kept = flow.call_with_intermediates(x)
    np.testing.assert_array_equal(flow.log_abs_det_jacobian(x, y, kept), flow.log_abs_det_jacobian(x, y))


def test_a_flow_is_a_pytree():
    flow = RowSharedAffine(random_net(jax.random.key(10)), 2)
    rebuilt = jax.tree.unflatten(jax.tree.structure(flow), jax.tree.leaves(flow))
    x = jax.random.normal(jax.random.key(11), (LAYERS, ROWS, FEATURES))
    np.testing.assert_array_equal(rebuilt(x), flow(x))
