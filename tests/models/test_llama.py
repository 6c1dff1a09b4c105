"""Behaviour of the Llama module: padding, adapters, layer ranges, cost of depth, bad input."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.programs import walk

from bnlora.base import Base, random_base
from bnlora.models import attention, layers, llama, rotary
from bnlora.models.decoder_config import DecoderConfig

EPS = float(np.finfo(np.float32).eps)
CONFIG = DecoderConfig(
    vocab_size=53, d_model=24, d_ff=40, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=8, max_length=64
)
INNER = [name for name in CONFIG.modules if name != "lm_head"]


@pytest.fixture(scope="module")
def base() -> Base:
    return random_base(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (3, 10), 0, CONFIG.vocab_size)


def adapters(names, count: int, rank: int = 3, seed: int = 2, b_scale: float = 0.3):
    generator, shapes = np.random.default_rng(seed), CONFIG.modules

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(generator.standard_normal(shape), jnp.float32)

    return {
        name: {"a": normal(count, rank, shapes[name][0]), "b": b_scale * normal(count, shapes[name][1], rank)}
        for name in names
    }


def assert_close(got, expected, *, operations: float = CONFIG.num_layers * CONFIG.d_ff) -> None:
    """Equal up to one float32 rounding per product on the longest path, relative to the largest value."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert np.abs(got - expected).max() <= operations * EPS * np.abs(expected).max()


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_and_output_layer(tied, tokens):
    base = random_base(jax.random.key(0), replace(CONFIG, tied=tied))
    assert base.module(tokens).shape == (3, 10, 53)
    assert base.modules["lm_head"] == (24, 53)
    assert base.modules["k_proj"] == (24, 16)
    assert base.num_layers == 4
    assert (base.module.lm_head is None) == tied
    assert "num_layers=4" in repr(base)
    assert len(repr(base)) < 200


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_no_real_logit(base, tokens, side):
    left, right = {"left": (3, 0), "right": (0, 3), "both": (2, 4)}[side]
    widths = ((0, 0), (left, right))
    padded = jnp.pad(tokens, widths, constant_values=7)
    mask = jnp.pad(jnp.ones(tokens.shape, bool), widths)
    logits = base.module(padded, mask)
    assert jnp.isfinite(logits).all()
    assert_close(logits[:, left : left + 10], base.module(tokens))


def test_a_row_of_padding_alone_is_finite_with_finite_gradient(base, tokens):
    mask = jnp.ones(tokens.shape, bool).at[1].set(False)

    def total(hidden):
        return jnp.sum(base.module.blocks(hidden, mask, first_layer=0, stop=4) ** 2)

    value, gradient = jax.value_and_grad(total)(base.module.embed(tokens))
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


def test_later_tokens_do_not_reach_earlier_logits(base, tokens):
    changed = tokens.at[:, 6:].set(0)
    assert np.array_equal(base.module(tokens)[:, :6], base.module(changed)[:, :6])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("tied", [True, False])
def test_zero_b_is_the_base_bit_for_bit(tokens, wrap, tied):
    base = random_base(jax.random.key(0), replace(CONFIG, tied=tied))
    zero = adapters(INNER, 4, b_scale=0.0) | {"lm_head": adapters(["lm_head"], 1, b_scale=0.0)["lm_head"]}

    def run(params, adapters):
        return base.bind(params)(tokens, adapters=adapters)

    assert np.array_equal(wrap(run)(base.weights, zero), wrap(run)(base.weights, None))


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, False) for name in [*INNER, "lm_head"]), ("lm_head", True)]
)
def test_an_adapter_equals_the_merged_kernel_of_its_module(tokens, name, tied):
    base, count = random_base(jax.random.key(0), replace(CONFIG, tied=tied)), 1 if name == "lm_head" else 4
    adapter = adapters([name], count)
    module = base.module
    with jax.default_matmul_precision("highest"):
        delta = jnp.einsum("lor,lri->lio", adapter[name]["b"], adapter[name]["a"])
        adapted = module(tokens, adapters=adapter)
        if name == "lm_head":
            table = (module.embedding if module.lm_head is None else module.lm_head)[...]
            # Only the output layer changes: with tied weights the embedding of the inputs is unchanged.
            normal = layers.rms_norm(
                module.blocks(module.embed(tokens), jnp.ones(tokens.shape, bool), first_layer=0, stop=4),
                module.final_norm[...],
                CONFIG.norm_eps,
            )
            merged = normal @ (table.T + delta[0])
        else:
            module.layers[name][...] = module.layers[name][...] + delta
            merged = module(tokens)
    assert_close(adapted, merged)
    assert np.abs(np.asarray(adapted - base.module(tokens))).max() > 1e-2


def test_the_same_range_in_parts_equals_the_full_run(base, tokens):
    every = adapters(["q_proj", "down_proj"], 4)
    module, mask = base.module, jnp.ones(tokens.shape, bool)
    hidden = module.blocks(
        module.embed(tokens), mask, first_layer=0, stop=1, adapters=jax.tree.map(lambda x: x[:1], every)
    )
    hidden = module.blocks(hidden, mask, first_layer=1, stop=1)
    hidden = module.blocks(hidden, mask, first_layer=1, stop=4, adapters=jax.tree.map(lambda x: x[1:], every))
    assert_close(module.head(hidden), module(tokens, adapters=every))


def test_upper_adapters_equal_a_full_stack_that_is_zero_below(base, tokens):
    upper = adapters(["v_proj", "up_proj"], 2)
    full = jax.tree.map(lambda x: jnp.concatenate([jnp.zeros_like(x), x]), upper)
    module, mask = base.module, jnp.ones(tokens.shape, bool)
    hidden = module.blocks(module.embed(tokens), mask, first_layer=0, stop=2)
    hidden = module.blocks(hidden, mask, first_layer=2, stop=4, adapters=upper)
    assert_close(module.head(hidden), module(tokens, adapters=full))


def test_gradient_of_every_adapter_is_finite_and_moves(base, tokens):
    mask = jnp.ones(tokens.shape, bool).at[0, :4].set(False)
    every = adapters(INNER, 4, b_scale=0.1) | adapters(["lm_head"], 1, b_scale=0.1)

    def loss(adapters, params):
        return -jax.nn.log_softmax(base.bind(params)(tokens, mask, adapters=adapters))[:, -1, 5].mean()

    gradient = jax.jit(jax.grad(loss))(every, base.weights)
    for leaf in jax.tree.leaves(gradient):
        assert jnp.isfinite(leaf).all()
        assert jnp.abs(leaf).max() > 0
    # Along the normalised gradient the slope is its norm. A central difference with step h is off by the
    # curvature times h^2 and by rounding, eps * loss / h; both are far below 1 % here.
    norm, step = float(jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))), 1e-3
    up, down = (
        jax.jit(loss)(jax.tree.map(lambda x, g, h=h: x + h * g / norm, every, gradient), base.weights)
        for h in (step, -step)
    )
    assert (up - down) / (2 * step) == pytest.approx(norm, rel=0.01)


def test_rows_of_the_head_are_taken_before_the_product(base, tokens):
    rows = jnp.array([11, 3, 50])
    adapter = {name: value[0] for name, value in adapters(["lm_head"], 1)["lm_head"].items()}
    sliced = {"a": adapter["a"], "b": adapter["b"][rows]}
    hidden = base.module.embed(tokens)
    assert_close(
        base.module.head(hidden, rows=rows, adapter=sliced),
        base.module.head(hidden, adapter=adapter)[..., rows],
    )
    jaxpr = jax.make_jaxpr(lambda p, h: base.bind(p).head(h, rows=rows))(base.weights, hidden)
    assert all(53 not in variable.aval.shape for equation in jaxpr.eqns for variable in equation.outvars)


def test_the_trace_does_not_grow_with_depth():
    def equations(num_layers: int) -> int:
        base = random_base(jax.random.key(0), replace(CONFIG, num_layers=num_layers))
        tokens = jnp.zeros((2, 5), int)
        every = adapters(INNER, num_layers)
        loss = jax.grad(lambda adapters, params: base.bind(params)(tokens, adapters=adapters).sum())
        return sum(1 for _ in walk(jax.make_jaxpr(loss)(every, base.weights).jaxpr))

    assert equations(2) == equations(9) > 0


@pytest.mark.parametrize("first_layer", [0, 2])
def test_neither_pass_copies_the_stack_of_weights(first_layer):
    base = random_base(jax.random.key(0), replace(CONFIG, num_layers=8))
    hidden, mask = jnp.ones((1, 4, 24)), jnp.ones((1, 4), bool)

    def loss(adapters, params):
        module = base.bind(params)
        return module.blocks(hidden, mask, first_layer=first_layer, stop=8, adapters=adapters).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapters(["q_proj"], 8 - first_layer), base.weights).jaxpr
    # The stack is an input; neither a slice of several layers nor a residual of all of them may be computed.
    computed = {variable.aval.shape for equation in walk(jaxpr) for variable in equation.outvars}
    assert (8 - first_layer, 24, 40) not in computed
    assert (24, 40) in computed


def test_grouped_heads_equal_repeated_keys():
    keys = jax.random.split(jax.random.key(3), 3)
    query = jax.random.normal(keys[0], (2, 5, 6, 4))
    key, value = (jax.random.normal(k, (2, 5, 2, 4)) for k in keys[1:])
    allowed = attention.causal_mask(jnp.ones((2, 5), bool))
    repeated = attention.attention(query, *(jnp.repeat(x, 3, axis=2) for x in (key, value)), allowed)
    assert_close(attention.attention(query, key, value, allowed), repeated)


def test_rotation_depends_on_distance_alone():
    vectors = jax.random.normal(jax.random.key(4), (2, 1, 1, 1, 8))
    frequencies = rotary.rotary_frequencies(8, 100.0)

    def score(first: int, second: int) -> float:
        x, y = (
            rotary.rotate(v, *rotary.rotary_tables(jnp.full((1, 1), p), frequencies))
            for v, p in zip(vectors, (first, second), strict=True)
        )
        return float(jnp.vdot(x, y))

    assert score(3, 1) == pytest.approx(score(13, 11), abs=64 * EPS * float(jnp.square(vectors).sum()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rotary scaling 'yarn' is not supported.*'llama3'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, r"lacks the keys \['low_freq_factor'"),
        ({"attention_bias": True}, r"Llama models with 'attention_bias' are not supported"),
        ({"attention_bias": True, "mlp_bias": True}, r"\['attention_bias', 'mlp_bias'\]"),
        ({"hidden_act": "gelu"}, r"activation 'gelu' is not supported"),
        ({"hidden_size": None, "vocab_size": None}, r"lacks the keys \['vocab_size', 'hidden_size'\]"),
        ({"num_key_value_heads": 3}, r"multiple of num_kv_heads; got 4 and 3"),
        ({"head_dim": 7}, r"head_dim must be even .* got 7"),
    ],
)
def test_unsupported_configurations(change, message):
    config = {
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    assert llama.read_config(config).num_kv_heads == 4
    with pytest.raises(ValueError, match=message):
        llama.read_config(config | change)


def test_old_and_new_spelling_of_rotary_settings_agree():
    scaling = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "factor": 8.0,
    }
    old = {"rope_theta": 50.0, "rope_scaling": {"type": "llama3", **scaling}}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 50.0, **scaling}}
    assert rotary.rotary_settings(old) == rotary.rotary_settings(new)
    assert rotary.rotary_settings(new)[1] == rotary.Llama3Scaling(8.0, 1.0, 4.0, 32)


def test_adapters_that_do_not_fit(base, tokens):
    module, mask, hidden = base.module, jnp.ones(tokens.shape, bool), base.module.embed(tokens)
    with pytest.raises(ValueError, match=r"no module 'qproj'.*nearest: 'q_proj'"):
        module(tokens, adapters={"qproj": adapters(["q_proj"], 4)["q_proj"]})
    with pytest.raises(
        ValueError, match=r"'q_proj' must have a \(2, 3, 24\) and b \(2, 48, 3\); got \(4, 3, 24\)"
    ):
        module.blocks(hidden, mask, first_layer=0, stop=2, adapters=adapters(["q_proj"], 4))
    with pytest.raises(ValueError, match=r"keys 'a' and 'b'; got \['a'\]"):
        module(tokens, adapters={"q_proj": {"a": adapters(["q_proj"], 4)["q_proj"]["a"]}})
    with pytest.raises(ValueError, match=r"layers \[2, 5\) are not within \[0, 4\)"):
        module.blocks(hidden, mask, first_layer=2, stop=5)
    adapter = {name: value[0] for name, value in adapters(["lm_head"], 1)["lm_head"].items()}
    with pytest.raises(ValueError, match=r"'lm_head' must have .* b \(1, 2, 3\); got .* \(1, 53, 3\)"):
        module.head(hidden, rows=jnp.array([1, 2]), adapter=adapter)
