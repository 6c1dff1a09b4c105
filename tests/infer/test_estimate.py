"""The estimate of memory against XLA's own account, real arrays, and published sizes."""

import jax
import optax
import pytest

import bnlora as bl
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.decoder_storage import num_bytes
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
WITHIN = 0.15
SMALL = {"vocab_size": 2048, "d_model": 128, "d_ff": 384, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2}
LARGE = {
    "vocab_size": 8192,
    "d_model": 512,
    "d_ff": 1408,
    "num_layers": 12,
    "num_heads": 8,
    "num_kv_heads": 4,
}
SMALL |= {"head_dim": 32, "tied": True}
LARGE |= {"head_dim": 64, "tied": True}
LLAMA = {"vocab_size": 32_000, "head_dim": 128}
TWO = ("q_proj", "v_proj")


def estimated(sizes: dict, targets, batch, weights: str, source: str, **memory) -> bl.Estimate:
    base = bl.Base.abstract(DecoderConfig(**sizes), weights=weights)
    sites = bl.select(base, targets or list(base.modules), rank=8)
    options = {"num_rows": 2 * batch[0], "memory": bl.Memory(**memory), "source": source}
    return bl.estimate(base, sites, bl.priors.normal(), batch=batch, **options)


def assert_near(sizes, targets, batch, weights, **memory) -> None:
    """The rule is near the compiler, whose estimates have the numbers of the rule in `steps`."""
    exact = estimated(sizes, targets, batch, weights, "compiler", **memory)
    way = memory.get("remat", "elementwise"), memory.get("accumulate", 1)
    by_rule = exact.step - exact.temporary + exact.steps[way]
    assert exact.source == "compiler"
    assert exact.temporary != exact.steps[way]
    assert abs(by_rule / exact.step - 1) < WITHIN


PLAIN = pytest.param({}, marks=pytest.mark.thorough)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [PLAIN, {"remat": "layers", "accumulate": 4}], ids=str)
def test_a_small_step_is_near_the_compilers_account(memory):
    assert_near(SMALL, None, (16, 32), "float32", **memory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "weights", "memory"),
    [
        pytest.param(None, "float32", {}, marks=pytest.mark.thorough),
        pytest.param(TWO, "4bit", {"remat": "layers", "accumulate": 4}, marks=pytest.mark.thorough),
        pytest.param(TWO, "int8", {"remat": "attention"}, marks=pytest.mark.thorough),
        pytest.param(TWO, "bfloat16", {"remat": "none"}, marks=pytest.mark.thorough),
    ],
)
def test_a_large_step_is_near_the_compilers_account(targets, weights, memory):
    assert_near(LARGE, targets, (8, 128), weights, **memory)


@pytest.mark.slow
def test_parts_are_those_of_real_arrays():
    base, train = tiny_base(KEY, num_layers=3), tiny_rows(KEY, 24)
    sites = bl.select(base, ["q_proj", "lm_head"], rank=2, layers=[2])
    about = bl.estimate(base, sites, bl.priors.normal(), batch=(8, 8), num_rows=24)
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    assert about.weights == num_bytes(base.weights)
    assert about.prefix_cache == model.cache_bytes(train)
    cached = bl.cache_prefix(model, train)
    assert about.rows == num_bytes(cached)
    step, state = bl.svi_step(KEY, model, guide, cached, optax.adam(0.01), batch_size=8)
    assert (about.guide, about.optimizer) == (num_bytes(state.params), num_bytes(state.optimizer))
    assert about.parameters["guide and prior"] == sum(guide.counts.values())
    assert about.parameters["adapters of q_proj"] == sites["q_proj"].num_parameters
    frames = bl.frames(KEY, base, ["q_proj"], train, label_ids=(3, 5), size=2, layers=[2])
    network = bl.Classifier(base, frames.sites, bl.priors.core(frames), label_ids=(3, 5))
    tangent = bl.Tangent(network)
    only = bl.select(base, ["q_proj"], rank=2, layers=[2])
    features = bl.estimate(base, only, bl.priors.normal(), batch=(8, 8), num_rows=24).tangent_features
    assert features == num_bytes(tangent.prepare(train).features)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "4bit"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_abstract_base_has_the_shapes_of_a_real_one(weights, tied):
    config = DecoderConfig(**SMALL | {"num_layers": 2, "vocab_size": 64, "tied": tied, "d_ff": 36})
    real = bl.Base.random(KEY, config).stored(weights)
    empty = bl.Base.abstract(config, weights=weights)
    assert jax.tree.structure(empty.weights) == jax.tree.structure(real.weights)
    for x, y in zip(jax.tree.leaves(empty.weights), jax.tree.leaves(real.weights), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert empty.storage == weights
    assert repr(empty).replace("abstract", "random") == repr(real)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "inner", "depth", "published"),
    [
        (4096, 11_008, 32, 6_738_415_616),
        pytest.param(5120, 13_824, 40, 13_015_864_320, marks=pytest.mark.thorough),
        (6656, 17_920, 60, 32_528_943_616),
    ],
)
def test_llamas_are_estimated_from_the_configuration_alone(width, inner, depth, published):
    """Numbers of parameters as published; nothing of the size of the model is allocated."""
    heads = width // 128
    sizes = {"d_model": width, "d_ff": inner, "num_layers": depth, "num_heads": heads, "num_kv_heads": heads}
    config = DecoderConfig(**LLAMA, **sizes)
    sites = bl.select(bl.Base.abstract(config), TWO, rank=8)
    before = sum(array.nbytes for array in jax.live_arrays())
    options = {"batch": (4, 128), "memory": bl.Memory(remat="layers")}
    about = bl.estimate(config, sites, bl.priors.normal(), weights="4bit", **options)
    assert about.parameters["frozen weights"] == published
    assert 0.62 * published < about.weights < 0.66 * published
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 50e6
    ways = {remat: about.steps[remat, 1] for remat in ("layers", "attention", "elementwise", "none")}
    assert ways["layers"] < min(ways["attention"], ways["elementwise"])
    assert max(ways["attention"], ways["elementwise"]) < ways["none"]
    assert all(about.steps[remat, 4] < about.steps[remat, 1] for remat in ("layers", "none"))
    assert "a step" in str(about)


def test_guides_are_named_as_elsewhere():
    base = tiny_base(KEY, num_layers=1)
    sites = bl.select(base, ["lm_head"], rank=2)
    full, flow = (
        bl.estimate(base, sites, bl.priors.normal(), guide=guide, batch=(4, 8)).guide
        for guide in (bl.guides.full(), bl.guides.SiteFlow)
    )
    mean = bl.estimate(base, sites, bl.priors.normal(), batch=(4, 8)).guide
    assert len({full, flow, mean}) == 3
    assert full > mean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 8}, "batch must be a pair, the rows of a step and the tokens of a row; got 8"),
        ({"batch": (0, 8)}, "rows of batch must be at least 1; got 0"),
        ({"num_draws": 0}, "num_draws must be at least 1; got 0"),
        ({"num_classes": 1}, "num_classes must be at least 2; got 1"),
        ({"memory": bl.Memory(accumulate=3)}, "accumulate must divide batch_size=8; got 3, nearest is 4"),
        ({"source": "xla"}, "source must be one of .* got 'xla'"),
        ({"prefix_cache": "on"}, "prefix_cache must be one of .* got 'on'"),
    ],
)
def test_wrong_numbers_are_refused(change, message):
    base = tiny_base(KEY, num_layers=1)
    sites = bl.select(base, ["lm_head"], rank=2)
    with pytest.raises(ValueError, match=message):
        bl.estimate(base, sites, bl.priors.normal(), **{"batch": (8, 8)} | change)


def test_numbers_are_whole_bytes():
    about = estimated(SMALL, TWO, (4, 8), "int8", "rule")
    assert all(isinstance(value, int) for value in [*about.steps.values(), about.step, about.prediction])
    parts = about.weights + about.rows + 2 * (about.guide + about.optimizer)
    assert about.step == parts + about.temporary
