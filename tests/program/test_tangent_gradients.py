"""Features and moments of the derivatives against a network in float64 and against whole Jacobians."""

import functools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import exact_llama

import bnlora as bl
from bnlora._util.compilation import program
from bnlora.adapters.sites import HEAD, Site, Sites
from bnlora.data.batch import Batch
from bnlora.program.tangent import gradients
from bnlora.program.tangent.frames import contrast_energy
from bnlora.testing import tiny_base, tiny_rows

TIED = tiny_base(jax.random.key(0), num_layers=2)
BASE = bl.Base.random(jax.random.key(1), exact_llama.CONFIG)
ROWS = tiny_rows(jax.random.key(2), 5)
MODULES = list(BASE.modules)
# A float32 derivative passes the longest path twice: two layers of at most 24 products.
EPS = 2 * 2 * 24 * float(np.finfo(np.float32).eps)


@functools.cache
def classifier(
    base: bl.Base, targets: tuple, label_ids: tuple, first_layer: int = 0
) -> tuple[bl.Classifier, dict]:
    """A classifier with adapters from a layer upwards, and random orthonormal frames of 2 x 2."""
    modules = [name for name in targets if name != "slope"]
    families = bl.select(base, modules, rank=2, layers=slice(first_layer, None)).families
    if "slope" in targets:
        families = (*families, Site("slope", HEAD, (base.num_layers,), 16, 40, 2, 2.0))
    model = bl.Classifier(base, Sites(families, base.num_layers), bl.priors.normal(), label_ids=label_ids)
    generator = np.random.default_rng(3)
    frames = {
        name: tuple(
            np.linalg.qr(generator.normal(size=(site.depth, d, 2)))[0].astype(np.float32)
            for d in (site.d_out, site.d_in)
        )
        for name, site in model.sites.items()
    }
    return model, frames


def computed(model: bl.Classifier, frames: dict, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    found = program(model, gradients.features)(model.base.weights, frames, batch)
    return tuple(np.asarray(x, np.float64) for x in found)


def real(rows: Batch) -> list[np.ndarray]:
    """The tokens of each row without padding."""
    return [np.asarray(t)[np.asarray(m)] for t, m in zip(rows.tokens, rows.mask, strict=True)]


def contrasts(model: bl.Classifier, tokens: np.ndarray, updates: dict) -> np.ndarray:
    found = exact_llama.logits(model.base, model.label_ids, tokens, updates)
    return found[1:] - found[0]


def differences(model: bl.Classifier, frames: dict, tokens: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Central differences of the float64 network in every coordinate, (class - 1, coordinate)."""
    slopes = []
    for name, site in model.sites.items():
        left, right = (np.asarray(side, np.float64) for side in frames[name])
        for place, row, column in np.ndindex(len(left), left.shape[2], right.shape[2]):
            change = step * np.outer(left[place, :, row], right[place, :, column])
            where = (site.module, 0 if site.module == HEAD else site.layers[place])
            ahead, behind = (contrasts(model, tokens, {where: sign * change}) for sign in (1, -1))
            slopes.append((ahead - behind) / (2 * step))
    return np.stack(slopes, axis=1)


@pytest.mark.parametrize(("base", "label_ids"), [(TIED, (3, 5)), (BASE, (3, 5, 9))], ids=["tied", "untied"])
def test_features_are_finite_differences_of_a_float64_network(base, label_ids):
    model, frames = classifier(base, (*MODULES, "slope"), label_ids)
    assert list(model.sites) == [*MODULES, "slope"]
    offset, phi = computed(model, frames, ROWS)
    for index, tokens in enumerate(real(ROWS)):
        exact = exact_llama.logits(base, label_ids, tokens, {})
        np.testing.assert_allclose(offset[index], exact, atol=EPS * np.abs(exact).max())
        slopes = differences(model, frames, tokens)
        begin = 0
        for name, (left, right) in frames.items():  # each family by its own size: some move logits little
            count = left.shape[0] * left.shape[2] * right.shape[2]
            part = slice(begin, begin + count)
            bound = EPS * max(np.abs(slopes[:, part]).max(), 0.1)
            np.testing.assert_allclose(phi[index][:, part], slopes[:, part], atol=bound, err_msg=name)
            begin += count
        assert begin == phi.shape[2]


def test_features_do_not_depend_on_alpha():
    model, frames = classifier(BASE, ("v_proj", HEAD), (3, 5), first_layer=1)
    other = replace(
        model.sites, families=tuple(replace(s, alpha=3.0 * s.alpha) for s in model.sites.values())
    )
    scaled = bl.Classifier(BASE, other, model.prior.program, label_ids=(3, 5))
    np.testing.assert_allclose(
        computed(scaled, frames, ROWS)[1], computed(model, frames, ROWS)[1], rtol=EPS, atol=EPS
    )


@pytest.mark.parametrize("targets", [("q_proj", "down_proj", HEAD), (HEAD, "slope")])
def test_padding_and_cached_activations_change_nothing(targets):
    model, frames = classifier(BASE, targets, (3, 5, 9), first_layer=1)
    tokens, mask = np.asarray(ROWS.tokens), np.asarray(ROWS.mask)
    left = np.zeros((len(tokens), 11), tokens.dtype), np.zeros((len(tokens), 11), bool)
    for index, row in enumerate(mask):  # "mask" marks the tokens, so the filling may be any
        left[0][index, 11 - row.sum() :] = tokens[index, row]
        left[1][index, 11 - row.sum() :] = True
    right = computed(model, frames, ROWS)
    assert np.abs(right[1]).max() > 0.1
    for batch in (Batch(*left, ROWS.labels), bl.cache_prefix(model, ROWS)):
        for found, expected in zip(computed(model, frames, batch), right, strict=True):
            np.testing.assert_allclose(found, expected, atol=EPS * np.abs(expected).max())
    assert bl.cache_prefix(model, ROWS).cached is not None


def test_rows_together_are_rows_alone():
    model, frames = classifier(BASE, ("q_proj", "down_proj", HEAD), (3, 5, 9), first_layer=1)
    together, batch = computed(model, frames, ROWS), bl.cache_prefix(model, ROWS)
    for index in range(len(ROWS)):
        for found, expected in zip(computed(model, frames, batch[[index]]), together, strict=True):
            np.testing.assert_allclose(found[0], expected[index], atol=EPS * np.abs(expected).max())


def test_contrast_energy_is_the_mean_over_pairs():
    phi = np.random.default_rng(0).normal(size=(4, 3, 5))
    whole = np.concatenate([np.zeros((4, 1, 5)), phi], axis=1)
    pairs = [((whole[:, a] - whole[:, b]) ** 2).sum(1) for a in range(4) for b in range(a)]
    np.testing.assert_allclose(contrast_energy(phi), np.mean(pairs, axis=0))


# -- moments


WEIGHTS = jnp.array([1.0, 0.5, 2.0, 0.0, 1.0])


def summed(label_ids: tuple[int, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums over rows of J J^T and J^T J with whole Jacobians, Fisher-weighted for three classes."""
    weights = np.asarray(WEIGHTS, np.float64)
    sums = {}
    for name, slopes in exact_llama.jacobians(BASE, label_ids, ROWS).items():
        metric = np.broadcast_to([[1.0, -1.0], [-1.0, 1.0]], (len(ROWS), 2, 2))
        if len(label_ids) > 2:
            z = np.stack([exact_llama.logits(BASE, label_ids, tokens, {}) for tokens in real(ROWS)])
            p = np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))
            metric = np.einsum("nc,cd->ncd", p, np.eye(p.shape[1])) - p[:, :, None] * p[:, None, :]
        sums[name] = tuple(
            np.einsum(f"n,ncd,nclij,ndl{other}->l{out}", weights, metric, slopes, slopes)
            for other, out in (("kj", "ik"), ("ik", "jk"))
        )
    return sums


def moments(model: bl.Classifier, keys: jax.Array) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Moments by each of some keys, (key, layer, d, d)."""

    def by(key: jax.Array) -> gradients.Moments:
        return gradients.moments(model, BASE.weights, ROWS, jax.random.split(key, len(ROWS)), WEIGHTS)

    found = jax.jit(partial(jax.lax.map, by, batch_size=64))(keys)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def whole(label_ids: tuple[int, ...], modules: list[str] = MODULES) -> bl.Classifier:
    return bl.Classifier(BASE, bl.select(BASE, modules, rank=1), bl.priors.normal(), label_ids=label_ids)


def test_moments_of_narrow_sides_are_exact():
    found = moments(whole((3, 5)), jax.random.split(jax.random.key(4), 2))
    exact = summed((3, 5))
    assert set(found) == set(exact) == set(MODULES)
    for name, pair in found.items():
        for side, expected in zip(pair, exact[name], strict=True):
            for by_key in side:
                np.testing.assert_allclose(
                    by_key, expected, atol=2 * EPS * np.abs(expected).max(), err_msg=name
                )


def assert_unbiased(found: np.ndarray, expected: np.ndarray, bias: float) -> None:
    """The mean over keys is the expected matrix within five standard errors, and these are small."""
    mean = found.mean(0)
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert np.abs(mean - expected).max() < bias * np.abs(expected).max()
    assert (np.abs(mean - expected) <= 5 * error + 2 * EPS * np.abs(expected).max()).all()
    assert 5 * error.max() < bias * np.abs(expected).max()


def test_sketched_moments_are_unbiased(monkeypatch):
    monkeypatch.setattr(gradients, "SKETCH", 4)
    found = moments(whole((3, 5), ["q_proj", "down_proj"]), jax.random.split(jax.random.key(5), 2048))
    exact = summed((3, 5))
    for name, pair in found.items():
        for side, expected in zip(pair, exact[name], strict=True):
            assert side.std(0).max() > 0.01 * np.abs(expected).max(), "no sketch was drawn"
            assert_unbiased(side, expected, bias=0.2)


def test_moments_of_three_classes_are_weighted_by_the_fisher_information():
    found = moments(whole((3, 5, 9), ["v_proj", HEAD]), jax.random.split(jax.random.key(6), 2048))
    exact = summed((3, 5, 9))
    for name, pair in found.items():
        for side, expected in zip(pair, exact[name], strict=True):
            assert_unbiased(side, expected, bias=0.2)
