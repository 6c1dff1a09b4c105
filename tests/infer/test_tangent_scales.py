"""Scales by evidence against dense algebra, grids and finite differences, on features whose law is known."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy
from builders.dense_laplace import dense, problem

import bnlora as bl
from bnlora.adapters.sites import HEAD
from bnlora.data.batch import Batch, Features
from bnlora.infer.core.scales import HIGHEST, LOWEST, OFF, Scales
from bnlora.program.tangent.linear import Linear
from bnlora.testing import tiny_base, tiny_rows

BASE = tiny_base(jax.random.key(0), num_layers=2)
ROWS = tiny_rows(jax.random.key(1), 6)
STEP = 1e-3


@functools.cache
def tangent(
    targets: tuple = ("v_proj", HEAD), size: int = 1, classes: int = 2, label_free: bool = True
) -> bl.Tangent:
    """Families v_proj, of two layers with a coordinate each at size 1, and the head."""
    ids = (3, 5, 9)[:classes]
    frames = bl.frames(jax.random.key(2), BASE, targets, ROWS, label_ids=ids, size=size, source="random")
    frames = replace(frames, label_free=label_free)
    return bl.Tangent(bl.Classifier(BASE, frames.sites, bl.priors.core(frames), label_ids=ids))


def rows_of(model: bl.Tangent, linear: Linear) -> Batch:
    """Rows whose features are those of a linear model with a group for each family."""
    phi = [g * model.frames[name].unit for g, name in zip(linear.groups, model.sites, strict=True)]
    count = len(linear.labels)
    offset = np.pad(linear.offset, ((0, 0), (1, 0)))
    features = Features(jnp.asarray(offset, jnp.float32), jnp.asarray(np.concatenate(phi, 2), jnp.float32))
    tokens = jnp.ones((count, 2), jnp.int32)
    return Batch(tokens, tokens > 0, jnp.asarray(linear.labels), features=features, frames=model.checksum)


def evidence(linear: Linear, log_scales) -> float:
    with jax.enable_x64(True):
        return dense(linear, np.asarray(log_scales, float))[0]


def slope(value, at: np.ndarray) -> np.ndarray:
    return np.array([(value(at + d) - value(at - d)) / (2 * STEP) for d in STEP * np.eye(len(at))])


def log_scales(found: Scales) -> np.ndarray:
    return np.log(list(found.by_name.values()))


@functools.cache
def two(classes: int = 2, rows: int = 80, size: int = 1) -> tuple[bl.Tangent, Linear, Scales]:
    """Families of both of which labels depend, and the chosen scales."""
    model = tangent(size=size, classes=classes)
    counts = tuple(int(np.prod(frame.size)) for frame in model.frames.values())
    linear = problem(rows, classes, counts, seed=4)
    eta = linear.offset + sum(2.0 * g @ np.ones(g.shape[2]) for g in linear.groups)
    noise = np.random.default_rng(5).gumbel(size=(rows, classes))
    linear = linear._replace(labels=(np.pad(eta, ((0, 0), (1, 0))) + noise).argmax(1))
    return model, linear, bl.choose_scales(model, rows_of(model, linear))


# Two classes and three; coordinates fewer than rows, and more.
CASES = [(2, 80, 1), pytest.param((3, 60, 1), marks=pytest.mark.thorough), (2, 45, 5)]


@pytest.mark.parametrize("case", CASES)
def test_at_the_maximum_the_evidence_of_dense_algebra_has_no_slope(case):
    model, linear, found = two(*case)
    assert list(found.values) == ["v_proj", HEAD]
    assert linear.in_rows == (case[2] > 1)
    value, at = functools.partial(evidence, linear), log_scales(found)
    on = at > np.log(OFF)
    assert on.any()
    assert (at < np.log(50.0)).all()
    np.testing.assert_allclose(found.log_evidence, value(at), atol=1e-4)
    np.testing.assert_allclose(slope(value, at)[on], 0.0, atol=2e-3)
    assert (slope(value, at) < 2e-3).all()
    assert np.abs(slope(value, at + 0.1)[on]).max() > 2e-2  # a scale that is off by a tenth is noticed
    log_probs = scipy.special.log_softmax(np.pad(linear.offset, ((0, 0), (1, 0))), axis=1)
    np.testing.assert_allclose(
        found.base, log_probs[np.arange(len(log_probs)), linear.labels].sum(), rtol=1e-6
    )
    assert found.log_evidence > found.base + 1


@pytest.mark.parametrize("case", CASES)
def test_standard_errors_are_those_of_the_curvature_by_finite_differences(case):
    _, linear, found = two(*case)
    at, h = log_scales(found), 1e-2
    on = at > np.log(OFF)
    value, axes = functools.partial(evidence, linear), h * np.eye(2)[on]
    curvature = np.array([
        [
            (value(at + a + b) - value(at + a - b) - value(at - a + b) + value(at - a - b)) / (4 * h**2)
            for b in axes
        ]
        for a in axes
    ])  # fmt: skip
    expected = np.sqrt(np.diag(np.linalg.inv(-curvature)))
    np.testing.assert_allclose(np.array(list(found.stderr.values()))[on], expected, rtol=0.01)


def test_a_grid_in_two_dimensions_has_no_better_place():
    _, linear, found = two()
    axis = np.linspace(np.log(0.05), np.log(50.0), 15)
    values = np.array([[evidence(linear, (a, b)) for b in axis] for a in axis])
    best = axis[list(np.unravel_index(values.argmax(), values.shape))]
    assert values.max() < found.log_evidence + 1e-6
    assert np.abs(best - log_scales(found)).max() < axis[1] - axis[0]


@pytest.mark.parametrize("prior", [None, 0.5])
def test_a_grid_in_one_dimension_has_no_better_place(prior):
    model, linear = tangent((HEAD,)), Linear(two()[1].offset, two()[1].groups[1:], two()[1].labels)
    law = None if prior is None else dist.HalfNormal(prior)
    found = bl.choose_scales(model, rows_of(model, linear), prior=law)
    axis = np.linspace(np.log(0.02), np.log(90.0), 120)
    values = np.array([evidence(linear, [s]) for s in axis])
    if prior is not None:  # the density of log s is s times that of s
        values = values + scipy.stats.halfnorm(scale=prior).logpdf(np.exp(axis)) + axis
    at = log_scales(found)[0]
    assert abs(axis[values.argmax()] - at) < axis[1] - axis[0]
    assert LOWEST + 1 < at < HIGHEST - 1
    np.testing.assert_allclose(found.log_evidence, evidence(linear, [at]), atol=1e-4)  # without the prior
    np.testing.assert_allclose(found.without[HEAD], found.base)


def test_a_prior_moves_the_scale_towards_its_own():
    model, linear, found = two()
    rows = rows_of(model, linear)
    narrow = bl.choose_scales(model, rows, prior=dist.HalfNormal(0.1))
    assert (log_scales(narrow) < log_scales(found)).all()
    assert narrow.log_evidence < found.log_evidence


def test_scales_with_less_evidence_than_the_base_say_so():
    """With few rows a wide prior of the scales may weigh more than the rows do."""
    model, linear, found = two()
    assert found.log_evidence > found.base
    assert not found.caution
    assert len(found.overview) == 1
    noise = np.random.default_rng(6).gumbel(size=(len(linear.labels), 2))
    base = linear._replace(labels=(np.pad(linear.offset, ((0, 0), (1, 0))) + noise).argmax(1))
    wide = bl.choose_scales(model, rows_of(model, base), prior=dist.LogNormal(np.log(10.0), 0.05))
    below = wide.base - wide.log_evidence
    assert below > 0.05
    assert f"{below:.1f} nats below that of the untouched base" in wide.caution
    assert "below the base's" in repr(wide)
    assert wide.overview[-1] == wide.caution


@pytest.mark.parametrize("within", [0.5, 2.0])
def test_caution_lowers_all_scales_by_one_factor_until_the_evidence_has_lost_so_much(within):
    model, linear, found = two()
    lowered = bl.choose_scales(model, rows_of(model, linear), within=within)
    shift = log_scales(lowered) - log_scales(found)
    assert (shift < 0).all()
    np.testing.assert_allclose(shift, shift[0], atol=1e-4)
    assert evidence(linear, log_scales(lowered)) == pytest.approx(
        evidence(linear, log_scales(found)) - within, abs=0.01
    )
    assert lowered.log_evidence == pytest.approx(evidence(linear, log_scales(lowered)), abs=1e-3)
    assert lowered.stderr == found.stderr  # of the maximum
    for name in found.values:  # what a family gains is a question of the maximum, too
        gain = found.log_evidence - found.without[name]
        assert lowered.log_evidence - lowered.without[name] == pytest.approx(gain, abs=1e-3)


def test_caution_beyond_what_the_rows_say_leaves_the_base():
    model, linear, found = two()
    everything = found.log_evidence - found.base
    lowered = bl.choose_scales(model, rows_of(model, linear), within=everything + 1)
    assert max(lowered.values.values()) < OFF
    assert lowered.log_evidence == pytest.approx(found.base, abs=1e-3)


def test_a_family_of_noise_is_switched_off():
    """Each row comes with its mirror image: the noise cannot have moved its label."""
    model, half, _ = two()
    groups = [np.concatenate([half.groups[0], -half.groups[0]]), np.tile(half.groups[1], (2, 1, 1))]
    linear = Linear(np.tile(half.offset, (2, 1)), groups, np.tile(half.labels, 2))
    found = bl.choose_scales(model, rows_of(model, linear))
    assert found.values["v_proj"] <= OFF < found.values[HEAD]
    assert np.isinf(found.stderr["v_proj"])
    assert np.isfinite(found.stderr[HEAD])
    assert found.without["v_proj"] == found.log_evidence
    assert found.without[HEAD] < found.log_evidence - 1
    assert "v_proj off, lm_head" in repr(found)
    assert ("v_proj", "off", "", "+0.0") in found.overview[0].rows


def test_without_a_family_is_the_maximum_of_the_others():
    _, linear, found = two()
    for index, name in enumerate(found.values):
        kept = [g for i, g in enumerate(linear.groups) if i != index]
        rest = linear._replace(groups=kept)
        made = scipy.optimize.minimize_scalar(
            lambda s, rest=rest: -evidence(rest, [s]), bounds=(LOWEST, HIGHEST), method="bounded"
        )
        np.testing.assert_allclose(found.without[name], -made.fun, atol=1e-4)
        assert found.without[name] < found.log_evidence - 0.5


def test_scales_by_layer_are_arrays_that_the_core_prior_takes():
    model, linear, _ = two()
    found = bl.choose_scales(model, rows_of(model, linear), by="layer")
    first, second = np.split(linear.groups[0], 2, axis=2)
    layers = linear._replace(groups=[first, second, linear.groups[1]])
    assert list(found.without) == ["v_proj[0]", "v_proj[1]", "lm_head[0]"]
    assert found.values["v_proj"].shape == (2,)
    np.testing.assert_allclose(found.log_evidence, evidence(layers, log_scales(found)), atol=1e-4)
    on = log_scales(found) > np.log(OFF)
    at_maximum = slope(functools.partial(evidence, layers), log_scales(found))
    np.testing.assert_allclose(at_maximum[on], 0.0, atol=2e-3)
    assert on.sum() >= 2
    prior = bl.priors.core(model.frames, scale=found.values)
    scaled = bl.Tangent(bl.Classifier(BASE, model.sites, prior, label_ids=(3, 5)))
    ones = {f"{name}.U": jnp.ones(model.frames[name].size) for name in model.sites}
    adapters = numpyro.handlers.substitute(scaled.prior, data=ones)()
    logits = np.asarray(scaled.logits(BASE.weights, adapters, rows_of(model, linear)))
    by_group = zip(np.exp(log_scales(found)), layers.groups, strict=True)
    expected = linear.offset + sum(s * g.sum(2) for s, g in by_group)
    np.testing.assert_allclose(logits[:, 1:] - logits[:, :1], expected, rtol=1e-4, atol=1e-4)


def test_real_rows_give_the_same_scales_with_and_without_cached_features():
    frames = bl.frames(jax.random.key(2), BASE, [HEAD], ROWS, label_ids=(3, 5), size=3)
    model = bl.Tangent(bl.Classifier(BASE, frames.sites, bl.priors.core(frames), label_ids=(3, 5)))
    rows = tiny_rows(jax.random.key(7), 40)
    cached = bl.cache_prefix(model, rows)
    found = [bl.choose_scales(model, x, prior=dist.HalfNormal(1.0)) for x in (rows, cached)]
    assert found[0].values == found[1].values
    offset, phi = (np.asarray(x, np.float64) for x in cached.features)
    linear = Linear(offset[:, 1:] - offset[:, :1], [phi / frames[HEAD].unit], np.asarray(rows.labels))
    np.testing.assert_allclose(found[0].log_evidence, evidence(linear, log_scales(found[0])), atol=1e-5)


# -- refusals


def separable(prior: dist.Distribution | None) -> Scales:
    """The sign of one feature is the label, and some rows are near the border."""
    model, x = tangent((HEAD,)), np.linspace(-2.0, 2.0, 60)
    linear = Linear(np.zeros((60, 1)), [x[:, None, None]], (x > 0).astype(int))
    return bl.choose_scales(model, rows_of(model, linear), prior=prior)


def test_separable_rows_need_a_prior_of_the_scales():
    with pytest.raises(
        ValueError, match=r"no maximum: it still grows at a scale of 100 nats for lm_head.*HalfN"
    ):
        separable(None)
    scale = separable(dist.HalfNormal(1.0)).values[HEAD]
    assert 1.0 < scale < 5.0


def test_rows_of_one_class_or_without_labels_are_refused():
    model, linear, _ = two()
    rows = rows_of(model, linear)
    with pytest.raises(ValueError, match="at least two classes; all of them have one label"):
        bl.choose_scales(model, replace(rows, labels=jnp.ones_like(rows.labels)))
    with pytest.raises(ValueError, match="have no labels"):
        bl.choose_scales(model, replace(rows, labels=jnp.full_like(rows.labels, -1)))


def test_frames_that_read_labels_are_refused():
    model = tangent((HEAD,), label_free=False)
    with pytest.raises(
        ValueError, match="computed from labels, so the evidence would count the labels twice"
    ):
        bl.choose_scales(model, ROWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "module"}, "by must be one of .*got 'module'"),
        ({"within": -1.0}, "within must be a number of nats of at least zero; got -1.0"),
        ({"prior": 1.0}, "prior must be a distribution of positive values.*got 1.0"),
        ({"prior": dist.Normal(0.0, 1.0)}, "prior must be .*distribution of positive values"),
    ],
)
def test_bad_options_are_refused(options, message):
    model, linear, _ = two()
    with pytest.raises(ValueError, match=message):
        bl.choose_scales(model, rows_of(model, linear), **options)
