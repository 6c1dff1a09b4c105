"""The adapted product as an operation of JAX: transformations, the choice of implementation, and errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.programs import kernel_calls, walk
from jax.extend.core import jaxpr_as_fun

from bnlora.kernels import api, pallas_tpu, trial
from bnlora.kernels.quantised import quantise

EPS = float(np.finfo(np.float32).eps)
M, K, N, RANK, DRAWS = 5, 12, 7, 3, 4


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes]


def both(make) -> None:
    """`make(implementation)` gives the same numbers with the reference and with the interpreted kernels."""
    expected, got = make("xla"), make("interpret")
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape
        # Some forty roundings of sums of at most a few hundred terms of the size of the largest entry.
        assert np.abs(x - y).max() <= 40 * EPS * np.abs(x).max()


def value_and_gradients(implementation, w, x, a, b):
    def total(x, a, b):
        return jnp.sin(api.lora_matmul(x, w, a, b, scale=0.5, implementation=implementation)).sum()

    return jax.value_and_grad(total, argnums=(0, 1, 2))(x, a, b)


@pytest.mark.parametrize("mapped", [(0, 0, 0), (None, 0, 0), (0, None, None), (None, 0, None), (0, None, 0)])
@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap"])
def test_mapped_over_draws(mapped, order):
    w = drawn(0, (K, N))[0]
    shapes = ((2, M, K), (RANK, K), (N, RANK))
    arrays = drawn(1, *((DRAWS, *s) if axis == 0 else s for s, axis in zip(shapes, mapped, strict=True)))

    def make(implementation):
        if order == "vmap of grad":
            run = jax.vmap(partial(value_and_gradients, implementation, w), in_axes=mapped)
            return jax.jit(run)(*arrays)

        def total(x, a, b):
            product = partial(api.lora_matmul, scale=0.5, implementation=implementation)
            out = jax.vmap(lambda x, a, b: product(x, w, a, b), in_axes=mapped)(x, a, b)
            return jnp.sin(out).sum()

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*arrays)

    both(make)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ((None, 0, 0), (None, 0, 0)),
        ((0, 0, 0), (None, 0, 0)),
        ((0, None, None), (None, 0, 0)),
        ((None, 0, 0), (0, None, None)),
        ((0, 0, 0), (0, 0, None)),
        ((None, 0, None), (0, None, 0)),
    ],
)
def test_mapped_twice(outer, inner):
    w = drawn(0, (K, N))[0]
    shapes = []
    for shape, *axes in zip(((M, K), (RANK, K), (N, RANK)), outer, inner, strict=True):
        front = (size for size, axis in zip((2, DRAWS), axes, strict=True) if axis == 0)
        shapes.append((*front, *shape))
    arrays = drawn(1, *shapes)

    def make(implementation):
        one = partial(value_and_gradients, implementation, w)
        return jax.jit(jax.vmap(jax.vmap(one, in_axes=inner), in_axes=outer))(*arrays)

    both(make)


def test_mapped_over_layers_with_their_own_weights():
    x, w, a, b = drawn(0, (M, K), (3, K, N), (3, RANK, K), (3, N, RANK))
    both(lambda name: jax.vmap(partial(value_and_gradients, name), in_axes=(0, None, 0, 0))(w, x, a, b))


@pytest.mark.parametrize("draws", [0, DRAWS])
def test_in_a_scan_of_checkpointed_layers(draws):
    front = (draws,) if draws else ()
    x, w, a, b = drawn(0, (M, K), (K, K), (*front, 6, RANK, K), (*front, 6, K, RANK))

    def make(implementation):
        @jax.checkpoint
        def layer(hidden, pair):
            return jnp.tanh(api.lora_matmul(hidden, 0.3 * w, *pair, implementation=implementation)), None

        def total(x, a, b):
            return jax.lax.scan(layer, x, (a, 0.1 * b))[0].sum()

        run = jax.value_and_grad(total, argnums=(0, 1, 2))
        return jax.jit(jax.vmap(run, in_axes=(None, 0, 0)) if draws else run)(x, a, b)

    both(make)


def test_draws_over_the_same_inputs_share_one_product():
    x, w, a, b = drawn(0, (M, K), (K, N), (DRAWS, RANK, K), (DRAWS, N, RANK))
    apply = partial(api.lora_matmul, implementation="interpret")
    calls = pallas_calls(jax.vmap(lambda a, b: apply(x, w, a, b)), a, b)
    assert [name for name, _ in calls] == ["lora_matmul_draws"]
    assert calls[0][1] == (1, 1, 1 + DRAWS)  # one step sums x W, one more for each draw
    own = pallas_calls(jax.vmap(lambda x, a, b: apply(x, w, a, b)), jnp.stack([x] * DRAWS), a, b)
    assert own == [("lora_matmul", (1, DRAWS, 1, 1))]


def test_inputs_that_differ_under_one_adapter_are_more_rows():
    x, w, a, b = drawn(0, (DRAWS, M, K), (K, N), (RANK, K), (N, RANK))
    apply = partial(api.lora_matmul, implementation="interpret")
    assert pallas_calls(jax.vmap(lambda x: apply(x, w, a, b)), x) == [("lora_matmul", (1, 1, 1, 1))]


def test_the_gradient_reads_inputs_and_cotangent_once_and_never_forms_that_of_w():
    x, w, a, b = drawn(0, (M, K), (K, N), (RANK, K), (N, RANK))

    def total(x, a, b):
        return api.lora_matmul(x, w, a, b, implementation="interpret").sum()

    gradient = jax.grad(total, argnums=(0, 1, 2))
    calls = [name for name, _ in pallas_calls(gradient, x, a, b)]
    assert sorted(calls) == ["lora_factor_gradients", "lora_matmul", "lora_matmul"]
    program = jax.make_jaxpr(gradient)(x, a, b).jaxpr
    shapes = [
        variable.aval.shape for equation in walk(program, into_kernels=False) for variable in equation.outvars
    ]
    assert (K, N) not in shapes
    assert (N, K) not in shapes


def pallas_calls(function, *args) -> list[tuple[str, tuple[int, ...]]]:
    """Name and grid of every kernel in a program."""
    return [(call["name"], tuple(call["grid_mapping"].grid)) for call in kernel_calls(function, *args)]


def test_the_gradient_of_the_frozen_kernel_is_refused():
    x, w, a, b = drawn(0, (M, K), (K, N), (RANK, K), (N, RANK))
    with pytest.raises(ValueError, match=r"w is frozen and has no gradient here.*'xla'"):
        jax.grad(lambda w: api.lora_matmul(x, w, a, b, implementation="interpret").sum())(w)


def test_none_is_the_reference_on_a_cpu():
    x, w, a, b = drawn(0, (M, K), (K, N), (RANK, K), (N, RANK))
    assert api.choose(x, w, a, b) == "xla"
    assert pallas_calls(api.lora_matmul, x, w, a, b) == []


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_none_is_the_kernel_on_an_accelerator_unless_it_refuses(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv(trial.SWITCH, "pallas")  # without a trial, which a CPU cannot pass
    x, w, a, b = drawn(0, (2, M, K), (K, N), (RANK, K), (N, RANK))
    assert api.choose(x, w, a, b) == "pallas"
    assert [name for name, _ in pallas_calls(api.lora_matmul, x, w, a, b)] == ["lora_matmul"]
    assert api.choose(x.astype(jnp.bfloat16), w, a, b) == "xla"
    assert api.choose(x, w, jnp.zeros((65, K)), jnp.zeros((N, 65))) == "xla"
    assert api.choose(x[:0], w, a, b) == "xla"


@pytest.mark.parametrize("name", ["pallas", "interpret"])
def test_forcing_what_cannot_says_why(name):
    x, w, a, b = drawn(0, (M, K), (K, N), (RANK, K), (N, RANK))
    with pytest.raises(ValueError, match=r"not support these arrays: .*float32, or all must be bfloat16"):
        api.lora_matmul(x.astype(jnp.bfloat16), w, a, b, implementation=name)
    with pytest.raises(ValueError, match="rank must be from 1 to 64"):
        api.lora_matmul(x, w, jnp.zeros((65, K)), jnp.zeros((N, 65)), implementation=name)


def test_a_compiled_kernel_does_not_run_on_a_cpu():
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        api.lora_matmul(*drawn(0, (M, K), (K, N), (RANK, K), (N, RANK)), implementation="pallas")


def test_too_wide_a_layer_is_refused_by_the_tpu_kernel():
    shapes = [(8, 64), (64, 2_000_000), (8, 64), (2_000_000, 8)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert "do not fit into VMEM" in pallas_tpu.refusal(*arrays)


@pytest.mark.parametrize("implementation", api.IMPLEMENTATIONS[::2])
def test_eight_bit_weights_under_every_transformation(implementation):
    x, w, a, b = drawn(0, (M, K), (K, N), (DRAWS, RANK, K), (DRAWS, N, RANK))
    small = quantise(w)
    whole = small.values * small.scales
    run = jax.vmap(value_and_gradients, in_axes=(None, None, None, 0, 0))
    expected = run("xla", whole, x, a, b)
    got = jax.jit(run, static_argnums=0)(implementation, small, x, a, b)
    for want, have in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        assert np.abs(np.asarray(want) - np.asarray(have)).max() <= 40 * EPS * np.abs(np.asarray(want)).max()


def fetches(call, position: int) -> int:
    """How often the pipeline of a kernel copies a block of an argument: whenever its index changes."""
    mapping, grid = call["grid_mapping"].block_mappings[position], call["grid_mapping"].grid
    steps = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), axis=1)
    index = jaxpr_as_fun(mapping.index_map_jaxpr)
    blocks = np.stack([np.stack(index(*map(jnp.int32, step))) for step in steps])
    return 1 + int((np.diff(blocks, axis=0) != 0).any(1).sum())


@pytest.mark.parametrize("own_inputs", [False, True])
def test_every_block_of_the_weights_is_fetched_once_for_all_draws(own_inputs):
    m, k, n, rank = 600, 576, 1536, 8  # two blocks of rows, three of columns, the contraction whole
    front = (DRAWS,) if own_inputs else ()
    shapes = ((*front, m, k), (DRAWS, rank, k), (DRAWS, n, rank))
    x, a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    w = jax.ShapeDtypeStruct((k, n), jnp.float32)
    apply = partial(api.lora_matmul, implementation="interpret")
    mapped = jax.vmap(apply, in_axes=(0 if own_inputs else None, None, 0, 0))
    (call,) = kernel_calls(mapped, x, w, a, b)
    assert call["grid_mapping"].grid[0] == 3
    assert fetches(call, 3) == 3
