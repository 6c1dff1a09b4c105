"""Frames compared with full Jacobians, singular vectors and Monte Carlo, and their errors."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from builders import exact_llama

import bnlora as bl
from bnlora.adapters.frames import Frames, joined
from bnlora.adapters.sites import HEAD
from bnlora.data.batch import Batch
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = bl.Base.random(jax.random.key(1), exact_llama.CONFIG)
ROWS = tiny_rows(jax.random.key(2), 20)  # more than are differentiated at a time
TARGETS = ("o_proj", "down_proj", HEAD)
TWO, THREE = (3, 5), (3, 5, 9)
PAIR = {HEAD: (np.array([[[1.0], [-1.0]]]), np.eye(16)[None, :, :3])}
# Eigenvalues are squares of float32 derivatives, whose path has twice two layers of 24 products.
EPS = 2 * 2 * 2 * 24 * float(np.finfo(np.float32).eps)


@functools.cache
def by_jacobian(label_ids: tuple = TWO, size: int | float = 4, targets: tuple = TARGETS) -> Frames:
    return bl.frames(KEY, BASE, targets, ROWS, label_ids=label_ids, size=size)


def made(targets=(HEAD,), rows=ROWS, label_ids=TWO, size=2, **options) -> Frames:
    return bl.frames(KEY, BASE, targets, rows, label_ids=label_ids, size=size, **{"layers": [1]} | options)


def arrays(frames: Frames) -> list[np.ndarray]:
    return [x for f in frames.values() for x in (f.left, f.right, np.asarray(f.unit), *f.energies)]


@functools.cache
def exact() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """J J^T and J^T J of the contrast of two classes, summed over rows."""
    slopes = exact_llama.jacobians(BASE, TWO, ROWS)
    J = {name: slopes[name][:, 1] - slopes[name][:, 0] for name in TARGETS}
    return {n: (np.einsum("nlik,nljk->lij", x, x), np.einsum("nlki,nlkj->lij", x, x)) for n, x in J.items()}


def sines(frame: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Sine of the largest angle between two subspaces, for each layer."""
    rest = frame - other @ (other.swapaxes(1, 2) @ frame)
    return np.linalg.norm(rest, 2, axis=(1, 2))


# -- sources


def test_labels_are_not_read():
    generator, targets = np.random.default_rng(3), ("v_proj", HEAD, "slope")
    whole = made(targets, label_ids=THREE, size=4)
    for labels in (generator.permutation(ROWS.labels), np.arange(len(ROWS)) % 3 - 1):
        again = made(targets, replace(ROWS, labels=jnp.asarray(labels)), THREE, size=4)
        for one, two in zip(arrays(again), arrays(whole), strict=True):
            np.testing.assert_array_equal(one, two)
        assert again.checksum == whole.checksum
    assert whole.label_free


def test_frames_are_orthonormal_eigenvectors_of_the_exact_sums():
    bounds = []
    for name, frame in by_jacobian().items():
        for side, energies, sums in zip(
            (frame.left, frame.right), frame.energies, exact()[name], strict=True
        ):
            m = side.shape[2]
            np.testing.assert_allclose(
                side.swapaxes(1, 2) @ side, np.broadcast_to(np.eye(m), (len(side), m, m)), atol=1e-6
            )
            values, vectors = (x[..., ::-1] for x in np.linalg.eigh(sums))
            np.testing.assert_allclose(energies, values, atol=EPS * values.max())
            inside = np.einsum("lik,lij,ljk->l", side, sums, side)
            np.testing.assert_allclose(inside, values[:, :m].sum(1), rtol=EPS)
            # Davis and Kahan: an angle is at most the error of the sums over the gap between eigenvalues.
            gap = values[:, m - 1] - values[:, m] if m < sums.shape[1] else values[:, -1]
            bounds.append(EPS * values[:, 0] / gap)
            assert (sines(side, vectors[:, :, :m]) <= bounds[-1]).all(), name
    assert np.quantile(np.concatenate(bounds), 0.7) < 0.1  # most gaps are wide enough to tell


def test_sizes_are_of_all_families_or_of_each():
    assert {n: f.size for n, f in by_jacobian().items()} == {
        "o_proj": (2, 4, 4), "down_proj": (2, 4, 4), HEAD: (1, 1, 4)
    }  # fmt: skip
    each = made(TARGETS, size={"o_proj": 1, "down_proj": 3, HEAD: 16}, layers=None)
    assert [f.size for f in each.values()] == [(2, 1, 1), (2, 3, 3), (1, 1, 16)]
    assert [site.rank for site in each.sites.values()] == [1, 3, 16]
    assert each.num_coordinates == 2 + 18 + 16
    larger = by_jacobian()
    np.testing.assert_allclose(each["down_proj"].left, larger["down_proj"].left[:, :, :3], atol=1e-5)


def test_a_share_of_the_energy_is_reached_by_every_layer_and_no_smaller_size_reaches_it():
    share, narrower = 0.7, []
    for name, frame in by_jacobian(size=share).items():
        for side, sums in zip((frame.left, frame.right), exact()[name], strict=True):
            values = np.linalg.eigvalsh(sums)[:, ::-1]
            reached, m = np.cumsum(values, 1) / values.sum(1, keepdims=True), side.shape[2]
            assert (reached[:, m - 1] >= share).all()
            assert m == 1 or (reached[:, m - 2] < share).any()
            narrower.append(m < sums.shape[1])
        for captured, sums, m in zip(frame.captured, exact()[name], frame.size[1:], strict=True):
            values = np.linalg.eigvalsh(sums)[:, ::-1]
            np.testing.assert_allclose(captured, values[:, :m].sum() / values.sum(), rtol=EPS)
    assert sum(narrower) >= 4


@pytest.mark.parametrize("source", ["jacobian", "activations", "weights", "random"])
def test_the_head_has_a_direction_less_than_classes(source):
    left = made(label_ids=THREE, size=7, source=source)[HEAD].left
    assert left.shape == (1, 3, 2)
    np.testing.assert_allclose(left.sum(1), 0.0, atol=1e-5)  # what all classes share moves no contrast


def test_frames_of_activations_are_eigenvectors_of_what_enters_and_leaves():
    """Second moments of a second implementation in float64, row by row without padding."""
    found = made(TARGETS, label_ids=THREE, source="activations", size=4, layers=[0, 1])
    sums: dict[tuple[str, int], np.ndarray] = {}
    for tokens, mask in zip(np.asarray(ROWS.tokens), np.asarray(ROWS.mask), strict=True):
        met: dict[tuple[str, int], np.ndarray] = {}
        exact_llama.logits(BASE, THREE, tokens[mask], {}, met)
        for place, x in met.items():
            sums[place] = sums.get(place, 0.0) + x.T @ x
    for name, frame in found.items():
        for layer in range(len(frame.left)):
            if name == HEAD:
                W = np.asarray(BASE.module.lm_head[...], np.float64)[list(THREE)]
                W = W - W.mean(0)
            else:
                W = np.asarray(BASE.module.layers[name][...], np.float64)[layer].T
            X = sums[name, layer]
            for side, energies, wanted in zip(
                (frame.left, frame.right), frame.energies, (W @ X @ W.T, X), strict=True
            ):
                values, vectors = (x[..., ::-1] for x in np.linalg.eigh(wanted))
                np.testing.assert_allclose(energies[layer], values, atol=1e-5 * values[0])
                m = side.shape[2]
                assert values[m - 1] - values[m : m + 1].sum() > 1e-3 * values[0]  # the subspace is unique
                inside = vectors[:, :m] @ (vectors[:, :m].T @ side[layer])
                np.testing.assert_allclose(inside, side[layer], atol=1e-3)


def test_frames_of_weights_are_singular_vectors_of_the_kernels():
    frames = made(("v_proj", "down_proj", HEAD), label_ids=THREE, source="weights")
    module = BASE.module
    for name, frame in frames.items():
        if name == HEAD:
            rows = np.asarray(module.lm_head[...], np.float64)[list(THREE)]
            kernels = (rows - rows.mean(0))[None]
        else:
            kernels = np.asarray(module.layers[name][...], np.float64)[1:].swapaxes(1, 2)
        left, values, right = np.linalg.svd(kernels, full_matrices=False)
        assert sines(frame.left, left[:, :, :2]).max() < 1e-5
        assert sines(frame.right, right[:, :2].swapaxes(1, 2)).max() < 1e-5
        for energies in frame.energies:
            np.testing.assert_allclose(energies[:, : values.shape[1]], values**2, rtol=1e-5, atol=1e-10)


def test_random_frames_are_orthonormal_and_depend_on_the_key():
    first = made(("v_proj", HEAD), source="random")
    again = made(("v_proj", HEAD), source="random")
    other = bl.frames(jax.random.key(9), BASE, ["v_proj", HEAD], ROWS, label_ids=TWO, size=2, source="random")
    for name, frame in first.items():
        for side, same, moved in zip(
            *((f.left, f.right) for f in (frame, again[name], other[name])), strict=True
        ):
            np.testing.assert_allclose(
                side.swapaxes(1, 2) @ side, np.eye(side.shape[2])[None] + 0 * side[:, :1, :1], atol=1e-6
            )
            np.testing.assert_array_equal(side, same)
            assert side.shape[1:] == (2, 1) or sines(side, moved).min() > 0.01
    assert not first["v_proj"].energies
    assert first["v_proj"].captured == ()


def test_given_frames_are_orthonormalised_and_keep_their_mark():
    given = {HEAD: (np.array([[[3.0], [-3.0]]]), np.random.default_rng(0).normal(size=(1, 16, 3)))}
    marked = made(source=given, label_free=False)
    assert (marked.source, marked.label_free) == ("given", False)
    assert made(source=given).label_free
    assert made(label_free=False).label_free  # frames that are made here read no label
    right = marked[HEAD].right
    np.testing.assert_allclose(right[0].T @ right[0], np.eye(3), atol=1e-6)
    assert sines(right, np.linalg.qr(given[HEAD][1])[0]).max() < 1e-6
    np.testing.assert_allclose(marked[HEAD].left[0, :, 0], [0.5**0.5, -(0.5**0.5)], rtol=1e-6)
    assert not np.array_equal(right, given[HEAD][1])


# -- the unit


@pytest.mark.slow
@pytest.mark.parametrize(("label_ids", "scale"), [(TWO, 1.7), (THREE, 0.4)])
def test_a_scale_is_the_prior_deviation_of_a_contrast_between_two_classes(label_ids, scale):
    frames = made(("v_proj", HEAD, "slope"), label_ids=label_ids)
    pairs = [(a, b) for a in range(len(label_ids)) for b in range(a)]
    prior = bl.priors.core(frames, scale=scale)
    tangent = bl.Tangent(bl.Classifier(BASE, frames.sites, prior, label_ids=label_ids))
    rows = bl.cache_prefix(tangent, ROWS)

    def squares(key: jax.Array) -> dict[str, jax.Array]:
        """Mean over rows and pairs of the squared change of a contrast, for each family separately."""
        adapters, found = numpyro.handlers.seed(tangent.prior, key)(), {}
        for name in frames:
            alone = {
                n: pair if n == name else {"a": pair["a"], "b": 0 * pair["b"]} for n, pair in adapters.items()
            }
            moved = tangent.logits(BASE.weights, alone, rows) - rows.features.offset
            found[name] = jnp.mean(jnp.stack([(moved[:, a] - moved[:, b]) ** 2 for a, b in pairs]))
        return found

    drawn = jax.jit(jax.vmap(squares))(jax.random.split(jax.random.key(7), 4000))
    for name, values in drawn.items():
        error = float(values.std()) / len(values) ** 0.5
        assert abs(float(values.mean()) - scale**2) < 4 * error, name
        assert 4 * error < 0.15 * scale**2


def network_at(frames: Frames, core: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Contrasts of the network itself, not of its tangent, at one value of the core of a family."""
    prior = bl.priors.core(frames, scale=scale)
    model = bl.Classifier(BASE, frames.sites, prior, label_ids=frames.label_ids)
    fixed = numpyro.handlers.substitute(
        model.prior, data={f"{next(iter(frames))}.U": jnp.asarray(core, jnp.float32)}
    )
    adapters = numpyro.handlers.seed(fixed, KEY)()
    logits = np.asarray(model.logits(BASE.weights, adapters, ROWS), np.float64)
    return logits[:, 1:] - logits[:, :1]


def test_the_slope_of_two_classes_multiplies_the_contrast_of_the_base():
    frames = made(("slope",))
    base = network_at(frames, np.zeros((1, 1, 1)))
    deviation = np.sqrt((base**2).mean())
    for core in (1.5, -0.8):
        found = network_at(frames, np.full((1, 1, 1), core), scale=0.3)
        np.testing.assert_allclose(found, base * (1 + 0.3 * core / deviation), atol=1e-5 * np.abs(base).max())


def test_the_slope_of_three_classes_has_the_multiples_of_the_base_among_its_updates():
    frames = made(("slope",), label_ids=THREE)
    base = network_at(frames, np.zeros((1, 2, 2)))
    rows = np.asarray(BASE.module.lm_head[...], np.float64)[list(THREE)]
    frame = frames["slope"]
    core = frame.left[0].T @ rows @ frame.right[0]
    found = network_at(frames, 0.7 * frame.unit * core[None])
    np.testing.assert_allclose(found, 1.7 * base, atol=1e-5 * np.abs(base).max())
    for source in ("weights", "random", PAIR):  # exact whatever the others are made of
        again = made((HEAD, "slope"), label_ids=TWO, source=source)["slope"]
        np.testing.assert_array_equal(again.right, made(("slope",))["slope"].right)


def head_inputs(rows) -> np.ndarray:
    """Inputs of the head at the last token of each row, from the layers themselves."""
    module = BASE.module
    hidden = module.embed(rows.tokens)
    final = module.blocks(hidden, rows.mask, first_layer=0, stop=2, at=rows.last[:, None])[:, 0]
    gain = np.asarray(module.final_norm[...], np.float64)
    final = np.asarray(final, np.float64)
    return final / np.sqrt((final**2).mean(1, keepdims=True) + module.config.norm_eps) * gain


@pytest.mark.slow
@pytest.mark.parametrize("label_ids", [TWO, THREE])
def test_the_bias_is_the_direction_of_the_head_that_is_most_nearly_constant(label_ids):
    frames = made(("bias",), label_ids=label_ids)
    frame, inputs = frames["bias"], head_inputs(ROWS)
    classes = len(label_ids)
    assert frame.size == (1, classes - 1, 1)
    np.testing.assert_allclose(frame.left[0].T @ frame.left[0], np.eye(classes - 1), atol=1e-6)
    np.testing.assert_allclose(frame.left[0].sum(0), 0.0, atol=1e-6)
    square = inputs.T @ inputs / len(inputs)
    ridge = 1e-3 * np.trace(square) / 16 * np.eye(16)
    expected = np.linalg.solve(square + ridge, inputs.mean(0))
    np.testing.assert_allclose(frame.right[0, :, 0], expected / np.linalg.norm(expected), atol=1e-4)
    core = np.linspace(0.5, 1.0, classes - 1).reshape(1, classes - 1, 1)
    moved = network_at(frames, core) - network_at(frames, 0 * core)
    shift = frame.left[0] @ core[0, :, 0] / frame.unit
    by_row = inputs @ frame.right[0, :, 0]
    np.testing.assert_allclose(moved, np.outer(by_row, shift[1:] - shift[0]), atol=1e-4)


def test_the_bias_of_rows_that_are_all_alike_is_a_constant():
    alike = bl.frames(KEY, BASE, ["bias"], ROWS[[3] * 6], label_ids=TWO)
    model = bl.Classifier(BASE, alike.sites, bl.priors.core(alike), label_ids=TWO)
    tangent = bl.Tangent(model)
    phi = np.asarray(tangent.prepare(ROWS[[3] * 6]).features.phi)[:, 0, 0] / alike["bias"].unit
    np.testing.assert_allclose(np.abs(phi), 1.0, rtol=1e-4)  # the unit is their root mean square


# -- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 17}, r"size of 'lm_head' must be a whole number from 1 to 16, its smaller side.*got 17"),
        ({"targets": ("v_proj",), "size": 9}, r"'v_proj' must be a whole number from 1 to 8.*got 9"),
        ({"size": 0}, "whole number from 1 to 16.*got 0"),
        ({"size": 1.5}, "or a share of the energy between 0 and 1; got 1.5"),
        ({"size": True}, "whole number from 1 to 16.*got True"),
        ({"size": 0.5, "source": "random"}, "from 1 to 16, its smaller side; got 0.5"),
        ({"size": 0.5, "source": PAIR}, "from 1 to 16, its smaller side; got 0.5"),
        ({"size": {"v_proj": 2}}, "size must be one value, or one for each family lm_head; got v_proj"),
        ({"source": "jacobean"}, "source must be one of .*got 'jacobean', nearest is 'jacobian'"),
        ({"source": "activation"}, "source must be one of .*got .activation., nearest is .activations."),
        ({"source": "given"}, "source must be one of .*got 'given'"),
        ({"targets": ("q_prj",)}, "'q_prj' matches no module; nearest names: q_proj"),
        ({"targets": (HEAD, "slop")}, "'slop' matches no module; nearest names: slope"),
        ({"targets": "slope"}, "targets must be a list of names"),
        ({"targets": ()}, "`targets` is empty"),
        ({"label_ids": 5}, "label_ids must be a list of integers; got 5"),
        ({"label_ids": (3, 3)}, "label_ids must be at least two different token ids"),
        ({"source": {"v_proj": PAIR[HEAD]}}, "source must have frames for lm_head; got v_proj"),
        (
            {"source": {HEAD: PAIR[HEAD][::-1]}},
            r"L of 'lm_head' must have the shape \(1, 2, m\).*got \(1, 16",
        ),
        ({"source": {HEAD: (PAIR[HEAD][0], np.full((1, 16, 1), np.nan))}}, "R of 'lm_head' must be finite"),
        ({"source": {HEAD: (PAIR[HEAD][0], np.ones((1, 16, 2)))}}, "R .* linearly independent columns"),
        ({"source": {HEAD: (np.ones((1, 2, 1)), np.ones((1, 16, 1)))}}, "no update of lm_head .* changes"),
        ({"rows": ROWS[np.zeros(0, int)]}, "frames need at least one row; got none"),
        ({"rows": replace(ROWS, mask=ROWS.mask.at[4].set(False))}, "marks no token in row 4"),
        ({"rows": replace(ROWS, tokens=ROWS.tokens + 40)}, "token id .* which the model has not"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_queries_of_single_tokens_are_refused():
    single = Batch(ROWS.tokens[:, :1], ROWS.mask[:, :1], ROWS.labels)
    with pytest.raises(ValueError, match="no update of q_proj in these frames changes a logit contrast"):
        made(("q_proj", "v_proj"), single)


def test_the_core_prior_is_refused_on_other_sites():
    frames = made(("v_proj", HEAD), source="random")
    prior = bl.priors.core(frames)

    def run(sites, prior=prior):
        return bl.Classifier(BASE, sites, prior, label_ids=TWO).prior()

    with numpyro.handlers.seed(rng_seed=0):
        assert run(frames.sites)["v_proj"]["b"].shape == (1, 8, 2)
        with pytest.raises(
            ValueError, match="'v_proj' belong to other sites: their rank is 2, that .* 3; use"
        ):
            run(bl.select(BASE, ["v_proj", HEAD], rank=3, layers=[1]))
        with pytest.raises(ValueError, match=r"their layers is \(1,\), that of these sites is \(0,\); use"):
            run(bl.select(BASE, ["v_proj", HEAD], rank=2, layers=[0]))
        with pytest.raises(ValueError, match="frames are for v_proj, lm_head; the sites also have 'q_proj'"):
            run(bl.select(BASE, ["q_proj", HEAD], rank=2, layers=[1]))
        with pytest.raises(ValueError, match="cannot fill only 'a': use by_family instead of per_factor"):
            run(frames.sites, bl.priors.per_factor(a=prior, b=bl.priors.normal()))
        with pytest.raises(ValueError, match="has 2 rows, one for each label token; the sites have 3"):
            bl.Classifier(BASE, frames.sites, prior, label_ids=THREE).prior()
    with pytest.raises(KeyError, match="no frame for the family 'q_proj'; the frames are v_proj, lm_head"):
        frames["q_proj"]


def test_frames_of_two_bases_or_other_classes_are_not_joined():
    own, slope = made(), made(("slope",))
    both = joined({HEAD: own, "slope": slope})
    assert list(both) == list(both.sites) == [HEAD, "slope"]
    assert both.source == "jacobian"
    assert joined({HEAD: own, "slope": made(source="random", targets=("slope",))}).source == "given"
    marked = joined({"slope": slope, HEAD: made(source=PAIR, label_free=False)})
    assert not marked.label_free
    other = tiny_base(jax.random.key(8), num_layers=2)
    foreign = bl.frames(KEY, other, ["slope"], ROWS, label_ids=TWO)
    for frames in (foreign, made(("slope",), label_ids=THREE)):
        with pytest.raises(ValueError, match="must belong to the same base and the same classes"):
            bl.priors.by_family({HEAD: bl.priors.core(own), "slope": bl.priors.core(frames)})
