"""The contract of every flow, and the properties of each one. One line of `FLOWS` adds a member."""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from builders.thorough import sample_of
from jax.test_util import check_vjp
from numpyro.distributions.transforms import AffineTransform, ComposeTransform
from numpyro.nn import BlockNeuralAutoregressiveNN
from numpyro.nn.block_neural_arn import Tanh

from bnlora.guides import flows
from bnlora.guides.flows import autoregressive, block_neural, spline

LAYERS, DRAWS = 2, 3


class Member(NamedTuple):
    """A flow, its distance from the identity at the start, its event before the features, its structure."""

    make: Callable[..., flows.Flow]
    start: float
    rows: tuple[int, ...] = ()
    autoregressive: bool = True


def affine(*args: Any, hidden: int = 6, event_dim: int = 1, **sizes: Any) -> flows.Flow:
    net = autoregressive.near_identity(*args, hidden=hidden, blocks=2, **sizes)
    return flows.RowSharedAffine(net, event_dim)


def coupling(*args: Any, features: int, **sizes: Any) -> flows.Flow:
    nets = spline.near_identity(*args, features=features, hidden=5, bins=4, **sizes)
    return flows.SplineCoupling(nets, features)


def block(*args: Any, depth: int = 1, **sizes: Any) -> flows.Flow:
    return flows.BlockNeural(block_neural.near_identity(*args, hidden=3, depth=depth, **sizes))


FLOWS = {
    "row-shared affine": Member(partial(affine, event_dim=2), 0.15, rows=(2,)),
    "affine, few units": Member(partial(affine, hidden=3), 0.15),
    "spline": Member(coupling, 0.05, autoregressive=False),
    "block neural": Member(block, 0.1),
    "deep block neural": Member(partial(block, depth=2), 0.1),
}
ELSE = ("affine, few units", "deep block neural")
"""Other sizes of a member: only `make slow` tests these."""
every_member = pytest.mark.parametrize("name", sample_of(FLOWS, [name for name in FLOWS if name not in ELSE]))


def scattered(name: str, features: int, size: float = 0.7, batch: tuple[int, ...] = (LAYERS,)) -> flows.Flow:
    """A member far from the identity. NumPy draws the numbers, because each JAX draw would be compiled."""
    make = partial(FLOWS[name].make, batch=batch, features=features)
    rng = np.random.default_rng(features)
    return jax.tree.map(
        lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape)), jax.eval_shape(make, jax.random.key(0))
    )


def draws(name: str, features: int) -> jax.Array:
    """Points for every layer; for one feature a grid that covers the line."""
    shape = (DRAWS, LAYERS, *FLOWS[name].rows, features)
    if features == 1:
        return jnp.asarray(np.moveaxis(np.broadcast_to(np.linspace(-9, 9, 601), (*shape[1:], 601)), -1, 0))
    return jnp.asarray(np.random.default_rng(0).normal(scale=1.5, size=shape))


@jax.jit
def program(flow: flows.Flow, x: jax.Array) -> dict[str, jax.Array]:
    def alone(layer, event):
        """Jacobian and value of one layer at one draw."""

        def vector(v):
            y = layer(v.reshape(event.shape))
            return y.reshape(-1), y

        return jax.jacobian(vector, has_aux=True)(event.reshape(-1))

    each = jax.vmap(jax.vmap(alone, in_axes=(None, 0)), in_axes=(0, 1), out_axes=1)
    y, logdet = flow.call_with_intermediates(x)
    jacobian, apart = each(flow, x)
    return {"y": y, "logdet": logdet, "back": flow.inv(y), "jacobian": jacobian, "one by one": apart}


@cache
def facts(name: str, features: int) -> dict[str, np.ndarray]:
    """All results of one compiled program for a member, in double precision."""
    with jax.enable_x64(True):
        x = draws(name, features)
        found = program(scattered(name, features), x)
        return {"x": np.asarray(x)} | {key: np.asarray(value) for key, value in found.items()}


at_sizes = pytest.mark.parametrize("features", [1, 5])


@every_member
@at_sizes
def test_log_determinant_is_that_of_the_jacobian(name, features):
    found = facts(name, features)
    sign, expected = np.linalg.slogdet(found["jacobian"])
    assert np.all(sign == 1)
    assert np.abs(expected).max() > 0.1, "too near the identity to tell"
    np.testing.assert_allclose(found["logdet"], expected, atol=1e-9)


@every_member
@at_sizes
def test_inverse_recovers_the_base_point(name, features):
    found = facts(name, features)
    np.testing.assert_allclose(found["back"], found["x"], atol=1e-9)


@every_member
def test_layers_have_weights_of_their_own_and_mapping_over_layers_and_draws_changes_nothing(name):
    found = facts(name, 5)
    np.testing.assert_allclose(found["one by one"], found["y"], atol=1e-12)
    assert not np.allclose(found["jacobian"][:, 0], found["jacobian"][:, 1], atol=0.1)


@pytest.mark.parametrize("name", [name for name, member in FLOWS.items() if member.autoregressive])
def test_an_entry_depends_on_itself_and_the_entries_before_it_only(name):
    jacobian = facts(name, 5)["jacobian"]
    rows = int(np.prod(FLOWS[name].rows))
    assert np.all(np.triu(jacobian, 1) == 0)
    assert np.all(np.diagonal(jacobian, axis1=-2, axis2=-1) > 0)
    blocks = jacobian.reshape(*jacobian.shape[:-2], rows, 5, rows, 5)
    within = np.moveaxis(np.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
    assert np.all((within != 0)[..., -1, :]), "the last entry misses an earlier one"
    assert np.count_nonzero(jacobian) == np.count_nonzero(within), "rows of an event meet"


@every_member
def test_start_is_near_the_identity_and_not_at_it(name):
    make = partial(FLOWS[name].make, batch=(LAYERS,), features=7)
    x = np.random.default_rng(1).uniform(-3, 3, size=(500, LAYERS, *FLOWS[name].rows, 7))
    y = jax.jit(lambda key, x: make(key)(x))(jax.random.key(3), x)
    assert 1e-4 < np.abs(y - x).max() < FLOWS[name].start


@pytest.mark.parametrize(
    ("features", "hidden", "blocks"), [(9, 4, 2), (9, 64, 2), (300, 16, 2), (256, 256, 1)]
)
def test_an_affine_flow_starts_near_the_identity_however_wide_it_is(features, hidden, blocks):
    x = np.random.default_rng(1).uniform(-3, 3, size=(200, features))

    @jax.jit
    def started(key, x):
        sizes = {"features": features, "hidden": hidden, "blocks": blocks}
        return flows.RowSharedAffine(autoregressive.near_identity(key, batch=(), **sizes), 1)(x)

    assert 1e-4 < np.abs(started(jax.random.key(3), x) - x).max() < 0.15


@every_member
def test_one_entry_is_mapped_increasingly(name):
    assert np.all(np.diff(facts(name, 1)["y"], axis=0) > 0)


@every_member
@pytest.mark.parametrize("features", [1, 2])
def test_density_integrates_to_one(name, features):
    flow, rows = scattered(name, features, 0.3, batch=()), (1,) * len(FLOWS[name].rows)
    axis = np.linspace(-10, 10, 2001 if features == 1 else 141)
    grid = np.stack(np.meshgrid(*[axis] * features), -1).reshape(-1, *rows, features)

    @jax.jit
    def density(flow, points):
        base = dist.Normal(jnp.zeros((*rows, features)), 0.8).to_event(flow.event_dim)
        return jnp.exp(dist.TransformedDistribution(base, [flow]).log_prob(points))

    total = density(flow, grid).sum() * (axis[1] - axis[0]) ** features
    np.testing.assert_allclose(total, 1, atol=2e-3)


@pytest.mark.slow
@every_member
def test_gradients_of_map_determinant_and_inverse_in_double_precision(name):
    with jax.enable_x64(True):
        leaves, tree = jax.tree.flatten((scattered(name, 3, 0.5), draws(name, 3)))
        ends = np.cumsum([leaf.size for leaf in leaves])

        def value(vector):  # one vector, because the check treats every leaf on its own
            parts = zip(jnp.split(vector, ends[:-1]), leaves, strict=True)
            flow, x = jax.tree.unflatten(tree, [part.reshape(leaf.shape) for part, leaf in parts])
            y, logdet = flow.call_with_intermediates(x)
            return jnp.sum(jnp.sin(y)) + jnp.sum(logdet) + jnp.sum(jnp.cos(flow.inv(x)))

        compiled = jax.jit(jax.value_and_grad(value))

        def vjp(vector):
            result, slope = compiled(vector)
            return result, lambda cotangent: (cotangent * slope,)

        vector = np.concatenate([np.ravel(leaf) for leaf in leaves])
        check_vjp(lambda v: compiled(v)[0], vjp, (vector,), atol=1e-5, rtol=1e-5, eps=1e-6)


@every_member
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_type_of_the_weights_is_kept_in_double_precision_mode_too(name, dtype):
    def outputs(flow, x):
        y, logdet = flow.call_with_intermediates(x)
        return y, logdet, flow.inv(y)

    with jax.enable_x64(True):
        flow, x = jax.tree.map(lambda v: v.astype(dtype), (scattered(name, 3), draws(name, 3)))
        assert {str(out.dtype) for out in jax.eval_shape(outputs, flow, x)} == {dtype}


@every_member
def test_a_vector_of_another_length_and_sizes_below_one_are_refused(name):
    flow = scattered(name, 3)
    for call in (flow, flow.inv):
        with pytest.raises(ValueError, match=r"acts on 3 entries along the last axis; got shape \(2, 2, 4\)"):
            call(jnp.zeros((2, 2, 4)))
    with pytest.raises(ValueError, match="features of at least 1; got features=0"):
        FLOWS[name].make(jax.random.key(0), batch=(), features=0)


def test_flows_inside_a_composition_count_in_the_log_determinant_and_other_maps_do_not():
    stretch = AffineTransform(0.0, 3.0)

    @jax.jit
    def counted_and_expected(flow, x):
        both = ComposeTransform([flow, stretch, ComposeTransform([flow])])
        y, kept = both.call_with_intermediates(x)
        middle = flow(x)
        parts = flow.log_abs_det_jacobian(x, middle) - flow.inv.log_abs_det_jacobian(y, 3 * middle)
        return flows.flow_log_determinant(both, kept), parts.sum()

    counted, expected = counted_and_expected(scattered("spline", 2), draws("spline", 2))
    np.testing.assert_allclose(counted, expected, rtol=1e-5)
    assert flows.flow_log_determinant(stretch, None) == 0


def test_compiled_and_uncompiled_runs_agree():
    name = "affine, few units"
    with jax.enable_x64(True), jax.disable_jit():
        y = scattered(name, 5)(draws(name, 5))
    np.testing.assert_allclose(y, facts(name, 5)["y"], atol=1e-12)


@pytest.mark.parametrize(("features", "hidden"), [(9, 16), (9, 8), (9, 3), (72, 16), (2, 1), (1, 4)])
def test_masks_reach_earlier_entries_and_nothing_else(features, hidden):
    first, middle, last = autoregressive.conditioner_masks(features, hidden)
    missed = -(-(features - 2) // (hidden - 1)) - 1 if hidden < features - 1 else 0
    for half in np.split(first @ middle @ middle @ last, 2, axis=1):
        assert np.all(half[np.tril_indices(features)] == 0), "an output sees its own or a later input"
        assert np.all(half[np.triu_indices(features, 1 + missed)] > 0), "an output misses an earlier input"
        assert np.all(half[:-1, -1] > 0), "an entry is lost to all"


def test_rows_share_weights():
    flow = scattered("row-shared affine", 4)
    row = jax.random.normal(jax.random.key(7), (4,))
    y = jax.jit(lambda x: flow(x))(jnp.broadcast_to(row, (LAYERS, 3, 4)))
    np.testing.assert_allclose(y, jnp.broadcast_to(y[:, :1], y.shape), atol=1e-6)


def test_a_coupling_leaves_one_half_and_bends_the_other_entry_by_entry():
    flow = flows.SplineCoupling(scattered("spline", 5, batch=()).nets[:1], 5)
    jacobian = jax.jit(jax.jacobian(flow))(jnp.array([0.3, -1.0, 2.0, 0.1, -0.7]))
    np.testing.assert_array_equal(jacobian[:2], np.eye(5)[:2])
    np.testing.assert_array_equal(jacobian[2:, 2:], np.diag(np.diagonal(jacobian)[2:]))
    assert jnp.all(jacobian[2:, :2] != 0)


def test_a_spline_tells_one_entry_from_two():
    for features, got in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match=f"acts on {features} entries along the last axis"):
            scattered("spline", features, batch=())(jnp.zeros(got))


def test_block_network_agrees_with_that_of_numpyro():
    """NumPyro normalises columns and scales them back, so its scales are set to the norms."""
    features, widths = 4, [1, 3, 3, 1]
    own, later = np.eye(features), np.triu(np.ones((features, features)), 1)
    _, apply = BlockNeuralAutoregressiveNN(features, [3, 3], activation=Tanh())

    @jax.jit
    def theirs(net, x):
        params = []
        for pair, layer in zip(pairwise(widths), net.layers, strict=True):
            place = np.arange(features)
            matrix = features * np.array(pair)
            weight = layer.across.at[place, :, place].set(layer.own).reshape(matrix)
            free, positive = (np.kron(mask, np.ones(pair)) for mask in (later, own))
            norm = jnp.linalg.norm(jnp.exp(weight) * positive + weight * free, axis=0)
            params += [(weight, jnp.log(norm), layer.bias.reshape(-1)), ()]
        return apply(params[:-1], x)

    with jax.enable_x64(True):
        net = scattered("deep block neural", features, batch=()).net
        net = net._replace(log_slope=jnp.full(features, -80.0))  # no linear term in theirs
        x = np.random.default_rng(2).normal(size=(6, features))
        y, log_derivative = jax.jit(block_neural.block_network)(x, net)
        expected, expected_derivative = theirs(net, x)
        np.testing.assert_allclose(y, expected, atol=1e-12)
        np.testing.assert_allclose(log_derivative, expected_derivative, atol=1e-9)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (
            partial(autoregressive.near_identity, features=5, hidden=7, blocks=2),
            6 * 7 + 4 * 7 * 8 + 2 * 8 * 5,
        ),
        (
            partial(spline.near_identity, features=5, hidden=7, bins=4),
            3 * 7 + 8 * 3 * 11 + 4 * 7 + 8 * 2 * 11,
        ),
        (partial(spline.near_identity, features=1, hidden=7, bins=4), 2 * (2 * 7 + 8 * 11)),
        (partial(block_neural.near_identity, features=5, hidden=7), 5 + 6 * 5 * 14 + 5 * 8),
        (partial(block_neural.near_identity, features=5, hidden=7, depth=2), 5 + 30 * (14 + 49) + 5 * 15),
    ],
)
def test_parameter_counts(net, expected):
    shapes = jax.eval_shape(lambda key: net(key, batch=(3,)), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 3 * expected
