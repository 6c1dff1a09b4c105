"""A base in eight or four bits: rounded within half a level, and the change of everything that follows.

The log-joint f and its gradient g in the adapters are smooth in the frozen weights W. Along W(t) = W + t D,
with D the rounding errors, |D_ij| <= s_ij / 2,

    f(W + D) - f(W) = int_0^1 <grad f(W(t)), D> dt,    |..| <= max_t sum_ij |grad f(W(t))_ij| s_ij / 2,

and the same holds for every component of g. The first is an identity, which Gauss-Legendre's rule checks: the
quantised model differs by its roundings and by nothing else. The second is the bound.
"""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.checkpoint_files import write_folder, write_gguf
from builders.thorough import sample_of
from numpyro import handlers
from numpyro.infer.util import log_density

import bnlora as bl
from bnlora.kernels.quantised import (
    QuantisedBlocks,
    QuantisedMatrix,
    QuantisedTable,
    dequantise,
    is_quantised,
)
from bnlora.models import decoder_checkpoint
from bnlora.models.decoder_storage import num_bytes, num_weights
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(KEY, num_layers=2)
ROWS = tiny_rows(jax.random.key(1), 12)
STORAGE = ("int8", "4bit")
EPS = float(np.finfo(np.float32).eps)
quantised_base = functools.cache(BASE.stored)


def levels(weight):
    """The size of a level at every weight, in the shape of the weights; zero where nothing is rounded."""
    if isinstance(weight, QuantisedMatrix):
        return np.broadcast_to(weight.scales[..., None, :], weight.shape)
    if isinstance(weight, QuantisedTable):
        return np.broadcast_to(weight.scales[:, None], weight.shape)
    if isinstance(weight, QuantisedBlocks):
        size = 2 * weight.codes.shape[-2]
        return np.repeat(np.abs(np.asarray(weight.scales, np.float32)), size, axis=-2)
    return np.zeros(weight.shape, np.float32)


def floats(weight):
    if isinstance(weight, QuantisedTable):
        return weight.values * weight.scales[:, None]
    return dequantise(weight, jnp.float32)


def named(module) -> dict:
    weights = {name: weight.get_value() for name, weight in module.layers.items()}
    outer = {name: getattr(module, name) for name in ("embedding", "lm_head", "final_norm")}
    return weights | {name: weight.get_value() for name, weight in outer.items() if weight is not None}


@pytest.mark.parametrize("weights", STORAGE)
@pytest.mark.parametrize("write", [write_folder, write_gguf], ids=["folder", "gguf"])
def test_loaded_weights_are_within_half_a_level(tmp_path, weights, write):
    path = write(tmp_path / ("tiny" if write is write_folder else "tiny.gguf"))
    stored, exact = named(bl.load(path, weights=weights).module), named(bl.load(path).module)
    for name, weight in stored.items():
        error = np.abs(np.asarray(floats(weight)) - np.asarray(exact[name]))
        assert (error <= levels(weight) / 2 + 4 * EPS * np.abs(exact[name])).all(), name
        assert levels(weight).any() != name.endswith("norm"), name
    kinds = {name: type(weight) for name, weight in stored.items()}
    assert (
        kinds["down_proj"] is kinds["q_proj"] is (QuantisedMatrix if weights == "int8" else QuantisedBlocks)
    )
    assert kinds["embedding"] is kinds["lm_head"] is QuantisedTable


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_four_bits_of_a_gguf_file_are_kept_as_they_are(tmp_path, kind, monkeypatch):
    """Queries and keys in the order of the file as well; parts of a few rows join to the whole."""
    path = write_gguf(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType[kind])
    exact = named(bl.load(path).module)
    for numbers in (2**20, 300):
        monkeypatch.setattr(decoder_checkpoint, "PART", numbers)
        stored = named(bl.load(path, weights="4bit").module)
        for name in ("q_proj", "k_proj", "o_proj", "gate_proj"):
            error = np.abs(np.asarray(floats(stored[name])) - np.asarray(exact[name]))
            assert (error <= EPS * (16 * levels(stored[name]) + np.abs(exact[name]))).all(), name


def test_a_base_is_converted_as_it_is_loaded(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    single = bl.load(folder)
    for weights in ("float32", "bfloat16", "int8", "4bit"):
        loaded, converted = bl.load(folder, weights=weights), single.stored(weights)
        assert loaded.storage == converted.storage == weights
        assert jax.tree.structure(loaded.weights) == jax.tree.structure(converted.weights)
        for x, y in zip(*(jax.tree.leaves(base.weights) for base in (loaded, converted)), strict=True):
            assert x.dtype == y.dtype
            assert np.array_equal(x, y)
    assert single.running(remat="layers").stored("int8").execution.remat == "layers"


def test_bytes_are_reported():
    base = quantised_base("4bit")
    count, size = num_weights(base.weights), num_bytes(base.weights)
    assert count == num_weights(BASE.weights) == sum(leaf.size for leaf in jax.tree.leaves(BASE.weights))
    assert f"parameters={count:,}, weights='4bit')" in repr(base)
    about = dict(base.overview[0].rows)
    assert about["weights"] == f"4bit, {size / count:.3f} bytes per weight"
    assert dict(BASE.overview[0].rows)["weights"] == "float32, 4.000 bytes per weight"
    assert "weights=" not in repr(BASE)


def test_rounded_weights_are_not_rounded_again():
    with pytest.raises(
        ValueError, match="weights in int8 cannot be converted to 4bit, .* load the model with"
    ):
        quantised_base("int8").stored("4bit")
    assert quantised_base("int8").stored("int8").storage == "int8"
    with pytest.raises(ValueError, match="weights must be one of .* got '8bit', nearest is '4bit'"):
        BASE.stored("8bit")


# The log-joint and its gradient --------------------------------------------------------------------


MODEL = bl.Classifier(
    BASE, bl.select(BASE, ["v_proj", "lm_head"], rank=1), bl.priors.normal(), label_ids=(3, 5)
)


def draw() -> dict[str, jax.Array]:
    sites = handlers.trace(handlers.seed(MODEL.prior, KEY)).get_trace()
    return {name: 0.5 * site["value"] for name, site in sites.items() if site["type"] == "sample"}


def log_joint(model, values, weights):
    return log_density(model, (weights, ROWS), {}, values)[0]


@jax.jit
def derivative(t, values, errors, sizes):
    """How the outputs change along the line, and the most that they could with these levels."""
    of_weights = functools.partial(outputs, MODEL, values)
    there = jax.tree.map(lambda w, d: w + t * d, BASE.weights, errors)
    slope = jax.jvp(of_weights, (there,), (errors,))[1]
    jacobian = jax.jacrev(of_weights)(there)
    most = [
        jnp.sum(jnp.abs(j) * s / 2, axis=range(1, j.ndim))
        for j, s in zip(jax.tree.leaves(jacobian), jax.tree.leaves(sizes), strict=True)
    ]
    return slope, sum(most)


def along(weights: str):
    """The roundings and the sizes of the levels, as trees like the weights of the float32 base."""
    trees = (quantised_base(weights).weights, BASE.weights)
    flat = [jax.tree.leaves(tree, is_leaf=is_quantised) for tree in trees]
    structure = jax.tree.structure(BASE.weights)
    errors = jax.tree.unflatten(structure, [floats(w) - e for w, e in zip(*flat, strict=True)])
    return errors, jax.tree.unflatten(structure, [jnp.asarray(levels(w)) for w in flat[0]])


def outputs(model, values, weights):
    """The log-joint and its gradient in the adapters, as one vector."""
    value, gradient = jax.value_and_grad(functools.partial(log_joint, model))(values, weights)
    return jnp.concatenate([jnp.ravel(leaf) for leaf in [value, *jax.tree.leaves(gradient)]])


@pytest.mark.slow
@pytest.mark.parametrize("weights", sample_of(STORAGE, ["4bit"]))
def test_the_log_joint_and_its_gradient_change_by_the_roundings(weights):
    values, (errors, sizes) = draw(), along(weights)
    quantised = MODEL.over(quantised_base(weights))
    of_weights = functools.partial(outputs, MODEL, values)
    change = jax.jit(functools.partial(outputs, quantised, values))(quantised.base.weights)
    change = np.asarray(change - jax.jit(of_weights)(BASE.weights), np.float64)

    nodes, quadrature = np.polynomial.legendre.leggauss(8)
    looked = [derivative(t, values, errors, sizes) for t in (nodes + 1) / 2]
    slopes, most = (np.asarray(x, np.float64) for x in zip(*looked, strict=True))
    scale = np.abs(slopes).max()
    assert np.abs(change - quadrature @ slopes / 2).max() <= 1e-3 * scale
    # The bound is smooth in t: between eight nodes it stays within a tenth of the greatest.
    assert (np.abs(change) <= 1.1 * most.max(axis=0)).all()
    assert np.abs(change).max() > 10 * EPS * scale  # something was rounded
