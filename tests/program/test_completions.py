"""Completions: scores against the logits of the whole model, and all that follows from them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from builders.families import tangent_features_are_the_jacobian
from numpyro.infer.util import log_density
from scipy.special import log_softmax
from scipy.stats import norm

import bnlora as bl
from bnlora.data.batch import Choices
from bnlora.infer.svi.stored_rows import row_arrays, rows_from
from bnlora.program.likelihoods import Upper, completions
from bnlora.program.likelihoods.completions import ABSENT
from bnlora.testing import tiny_base

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=3)
CHOICES, LENGTH, SPAN = 3, 16, 4
LIKELIHOOD = bl.likelihoods.Completions(CHOICES)
RUN = jax.jit(lambda tokens, mask, adapters: BASE.module(tokens, mask, adapters=adapters))


def rows_of(count: int, *, absent: bool = True, size: float | None = None) -> bl.Batch:
    """Random rows whose completions have one to four tokens; the last choice of every other row is absent."""
    generator = np.random.default_rng(3)
    shape = (count, CHOICES, LENGTH)
    tokens = generator.integers(0, BASE.config.vocab_size, shape)
    lengths = generator.integers(SPAN + 1, LENGTH + 1, shape[:2])
    counts = generator.integers(1, SPAN + 1, shape[:2])
    back = LENGTH - np.arange(LENGTH)
    mask, scored = (back <= x[..., None] for x in (lengths, counts))
    there = np.ones(shape[:2], bool)
    there[::2, -1] = not absent
    labels = generator.integers(0, CHOICES - 1, count)
    sizes = np.full(shape[:2], size) if size else counts
    choices = Choices(jnp.asarray(scored & there[..., None]), jnp.asarray(sizes, jnp.float32), SPAN)
    mask = jnp.asarray(mask & there[..., None])
    return bl.Batch(jnp.asarray(tokens), mask, jnp.asarray(labels), choices=choices)


ROWS = rows_of(6)


def model_of(modules=("v_proj", "down_proj", "lm_head"), prior=None, rank: int = 2) -> bl.Classifier:
    sites = bl.select(BASE, list(modules), rank=rank, layers=slice(-2, None))
    return bl.Classifier(BASE, sites, prior or bl.priors.normal(), likelihood=LIKELIHOOD)


def scores(rows: bl.Batch, model: bl.Classifier, adapters) -> np.ndarray:
    """Sums of the tokens' log-probabilities from the logits at all positions, without caches."""
    placed = model.sites.place(adapters, first_layer=0)
    head = placed.pop("lm_head", None)
    placed |= {} if head is None else {"lm_head": {name: x[None] for name, x in head.items()}}
    tokens, mask, scored = (
        np.asarray(x).reshape(-1, LENGTH) for x in (rows.tokens, rows.mask, rows.choices.scored)
    )
    log_probs = log_softmax(np.asarray(RUN(tokens, mask, placed), np.float64), axis=-1)
    own = np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    total = np.where(scored[:, 1:], own, 0.0).sum(1).reshape(-1, CHOICES) / rows.choices.size
    return np.where(scored.any(1).reshape(-1, CHOICES), total, ABSENT)


def adapters_of(model: bl.Classifier):
    return numpyro.handlers.seed(model.prior, KEY)()


def logits_of(model: bl.Classifier):
    """One program for each kind of rows: run eagerly, every operation would be compiled."""
    return jax.jit(model.logits)


@pytest.mark.parametrize("size", [1.0, None], ids=["sum", "per token"])
def test_scores_are_those_of_the_whole_model(size):
    rows, model = rows_of(5, size=size), model_of()
    adapters = adapters_of(model)
    got = logits_of(model)(BASE.weights, adapters, model.prepare(rows))
    np.testing.assert_allclose(got, scores(rows, model, adapters), rtol=1e-5, atol=1e-4)


@pytest.mark.thorough  # the scores and derivatives of other tests are those of one piece
@pytest.mark.parametrize("modules", [["v_proj"], ["v_proj", "lm_head"]], ids=["frozen head", "adapted head"])
def test_pieces_change_neither_scores_nor_derivatives(modules, monkeypatch):
    model, rows = model_of(modules), ROWS[:4]
    adapters = adapters_of(model)
    along = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), adapters)
    there = rows.choices.scored.any(-1)

    def everything(piece: int) -> list:
        monkeypatch.setattr(completions, "PIECE", piece)

        def total(adapters):
            return jnp.where(there, jnp.sin(model.logits(BASE.weights, adapters, rows)), 0.0).sum()

        two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapters)
        values = [total(adapters), jax.grad(total)(adapters), jax.jvp(total, (adapters,), (along,))[1]]
        twice = jax.jvp(jax.grad(total), (adapters,), (along,))[1]
        return jax.tree.leaves([*values, jax.vmap(jax.grad(total))(two), twice])

    whole = jax.jit(lambda: everything(10_000))()
    for got, expected in zip(jax.jit(lambda: everything(7))(), whole, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert max(float(np.abs(x).max()) for x in whole) > 1e-2


def test_pieces_without_completions_are_skipped(monkeypatch):
    ran, head = [], Upper.head

    def counted(self, final, rows=None):
        jax.debug.callback(lambda: ran.append(len(final)))
        return head(self, final, rows)

    monkeypatch.setattr(Upper, "head", counted)
    monkeypatch.setattr(completions, "PIECE", 8)
    model = model_of(["v_proj"])
    rows = bl.cache_prefix(model, ROWS)
    jax.block_until_ready(model.logits(BASE.weights, adapters_of(model), rows))
    jax.effects_barrier()
    scored, positions = int(rows.choices.scored.sum()), len(ROWS) * CHOICES * SPAN
    assert len(ran) == -(-scored // 8) < positions // 8


def test_completions_of_one_token_are_label_words():
    """After the same context, scores differ from logits by one number for each row."""
    words = (3, 5, 11)
    context = jax.random.randint(KEY, (4, 7), 0, 40)
    plain = bl.Batch(context, jnp.ones((4, 7), bool), jnp.array([0, 1, 2, 0]))
    tokens = jnp.concatenate(
        [jnp.repeat(context[:, None], 3, 1), jnp.broadcast_to(jnp.array(words)[:, None], (4, 3, 1))], axis=2
    )
    scored = jnp.zeros(tokens.shape, bool).at[..., -1].set(True)
    chosen = bl.Batch(
        tokens, jnp.ones(tokens.shape, bool), plain.labels, choices=Choices(scored, jnp.ones((4, 3)), 1)
    )
    model = model_of(["v_proj"])
    same = bl.Classifier(BASE, model.sites, bl.priors.normal(), label_ids=words)
    adapters = adapters_of(model)
    expected = log_softmax(logits_of(same)(BASE.weights, adapters, plain), axis=1)
    got = log_softmax(logits_of(model)(BASE.weights, adapters, chosen), axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_an_absent_choice_has_no_probability_and_changes_no_gradient():
    model = model_of()
    adapters = adapters_of(model)

    def total(adapters):
        logits = model.logits(BASE.weights, adapters, ROWS)
        return jax.nn.log_softmax(logits)[jnp.arange(len(ROWS)), ROWS.labels].sum(), jax.nn.softmax(logits)

    (value, probs), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(adapters)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
    np.testing.assert_array_equal(probs[::2, -1], 0.0)


def line(sites):
    """One number along a fixed direction."""
    s = numpyro.sample("s", dist.Normal(0.0, 2.0))
    fixed = {}
    for name, site in sites.items():
        keys = jax.random.split(jax.random.key(len(name)))
        a, b = (jax.random.normal(k, shape) for k, shape in zip(keys, site.shapes.values(), strict=True))
        fixed[name] = {"a": a, "b": s * b}
    return fixed


@pytest.mark.slow
def test_the_posterior_is_that_of_quadrature():
    rows = rows_of(12)
    model = model_of(["lm_head"], line, rank=1)
    grid = np.linspace(-8, 8, 161)

    def adapters(s):
        return numpyro.handlers.substitute(model.prior, {"s": jnp.asarray(s)})()

    def log_joint(s: float) -> float:
        log_probs = log_softmax(scores(rows, model, adapters(s)), axis=1)
        return log_probs[np.arange(12), rows.labels].sum() + norm.logpdf(s, 0.0, 2.0)

    density = jax.jit(lambda s: log_density(model, (BASE.weights, rows), {}, {"s": s})[0])
    for s in (-3.0, 0.5, 4.0):
        assert float(density(s)) == pytest.approx(log_joint(s), abs=2e-3)
    log_joints = np.array([float(density(s)) for s in grid])
    weights = np.exp(log_joints - log_joints.max())
    mean = (weights * grid).sum() / weights.sum()
    sd = ((weights * (grid - mean) ** 2).sum() / weights.sum()) ** 0.5
    chains = bl.mcmc.sample_nuts(KEY, model, rows, num_chains=2, num_warmup=100, num_draws=200)
    draws = chains.sites()["s"].ravel()
    # Four standard errors, if at least a tenth of the draws are independent.
    assert abs(draws.mean() - mean) < 4 * sd / (len(draws) / 10) ** 0.5


def test_tangent_features_are_the_jacobian():
    rows = ROWS[:2]

    def read(logits):
        log_probs = jax.nn.log_softmax(logits).reshape(2, CHOICES, LENGTH, -1)[..., :-1, :]
        own = jnp.take_along_axis(log_probs, rows.tokens[..., 1:, None], axis=-1)[..., 0]
        total = jnp.where(rows.choices.scored[..., 1:], own, 0.0).sum(-1) / rows.choices.size
        return jnp.where(rows.choices.scored.any(-1), total, ABSENT)

    tangent_features_are_the_jacobian(model_of(["v_proj", "down_proj"], rank=1), rows, read, (2, 2))


def test_rows_of_any_width_and_order_have_the_same_predictions():
    """Columns that no row uses are cut, rows are sorted by length, and minibatches take some rows."""
    wide = replace(
        ROWS,
        tokens=jnp.pad(ROWS.tokens, ((0, 0), (0, 0), (24, 0))),
        mask=jnp.pad(ROWS.mask, ((0, 0), (0, 0), (24, 0))),
        choices=replace(ROWS.choices, scored=jnp.pad(ROWS.choices.scored, ((0, 0), (0, 0), (24, 0)))),
    )
    model = model_of()
    posterior = bl.PointPosterior(model, adapters_of(model))
    expected = bl.predict(KEY, posterior, ROWS, num_draws=1).log_probs
    for rows in (wide, bl.cache_prefix(model, wide), bl.cache_prefix(model, ROWS)):
        got = bl.predict(KEY, posterior, rows, num_draws=1, batch_size=4).log_probs
        np.testing.assert_allclose(got, expected, atol=1e-4)
    some = bl.predict(KEY, posterior, ROWS[np.array([4, 1])], num_draws=1).log_probs
    np.testing.assert_allclose(some, expected[[4, 1]], atol=1e-4)


def test_short_rows_are_read_beside_a_completion_that_is_longer_than_they_are():
    """Large models get short rows in parts of few columns, fewer than the longest completion may have."""
    long, missing = 30, ((0, 0), (0, 0), (40 - LENGTH, 0))
    tokens, mask, scored = (jnp.pad(x, missing) for x in (ROWS.tokens, ROWS.mask, ROWS.choices.scored))
    choices = replace(ROWS.choices, scored=scored.at[0, 0, -long:].set(True), span=long)  # noqa: FBT003
    rows = replace(ROWS, tokens=tokens, mask=mask.at[0, 0].set(True), choices=choices)  # noqa: FBT003
    model = model_of()
    adapters = adapters_of(model)
    short = rows[1:].cut(slice(-LENGTH, None))
    expected = scores(ROWS, model, adapters)[1:]
    np.testing.assert_allclose(model.logits(BASE.weights, adapters, short), expected, rtol=1e-5, atol=1e-4)


def test_from_a_fit_to_its_diagnosis(tmp_path):
    rows, model = rows_of(8), model_of(["v_proj", "lm_head"])
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    fit = bl.fit(KEY, model, guide, rows, optax.adam(0.01), num_steps=4, batch_size=4)
    prediction = bl.predict(KEY, fit, rows, num_draws=4)
    assert bl.metrics.accuracy(prediction, rows) == (prediction.probs.argmax(1) == rows.labels).mean()
    bl.save_fit(fit, tmp_path / "fit")
    again = bl.load_fit(tmp_path / "fit", model, guide)
    jax.tree.map(np.testing.assert_array_equal, again.train.plain, rows)
    np.testing.assert_array_equal(bl.predict(KEY, again, rows, num_draws=4).probs, prediction.probs)
    tree = bl.to_arviz(KEY, fit, rows, num_draws=8)
    assert tree["log_likelihood"]["y"].shape == (4, 2, 8)
    other = bl.Classifier(BASE, model.sites, bl.priors.normal(), label_ids=(3, 5, 11))
    with pytest.raises(ValueError, match="was made with"):
        bl.load_fit(tmp_path / "fit", other, bl.guides.Guide(other.prior, bl.guides.mean_field()))


def test_files_of_words_and_of_completions_are_told_apart(tmp_path):
    """Their sites are the same if the head is not adapted."""
    model, rows = model_of(["v_proj"]), rows_of(8)
    words = bl.Classifier(BASE, model.sites, bl.priors.normal(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    fit = bl.fit(KEY, model, guide, rows, optax.adam(0.01), num_steps=1, batch_size=4)
    bl.save_fit(fit, tmp_path / "fit")
    with pytest.raises(ValueError, match="was made with num_choices 3 of label ids; got"):
        bl.load_fit(tmp_path / "fit", words, guide)


BROKEN = {
    "a score before the last columns": {"scored": jnp.ones(ROWS.tokens.shape, bool)},
    "a size of zero": {"size": jnp.zeros(ROWS.tokens.shape[:2])},
    "a span beyond the row": {"span": LENGTH},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_choices_in_a_file_are_refused(name, tmp_path):
    rows = replace(ROWS, choices=replace(ROWS.choices, **BROKEN[name]))
    arrays = {f"train.{key}": np.asarray(x) for key, x in row_arrays(rows).items()}
    with pytest.raises(ValueError, match="is corrupt: its rows have broken choices"):
        rows_from(arrays, model_of(["v_proj"]), tmp_path)


@pytest.mark.slow
def test_the_core_prior_on_completions():
    """The head is left out by default, and refused where it is asked for."""
    rows = rows_of(8)
    core = bl.fit_core(KEY, BASE, rows, likelihood=LIKELIHOOD, num_steps=4)
    assert sorted(core.model.sites) == ["k_proj", "q_proj", "v_proj"]
    assert np.isfinite(bl.predict(KEY, core, rows, num_draws=4).log_probs[1::2]).all()
    with pytest.raises(ValueError, match=r"the targets \['slope'\] are in the head, whose 40 rows are"):
        bl.frames(KEY, BASE, ["v_proj", "slope"], rows, likelihood=LIKELIHOOD, size=2)


def test_rows_and_likelihood_must_fit():
    plain = bl.Batch(ROWS.tokens[:, 0], jnp.ones((6, LENGTH), bool), ROWS.labels)
    model = model_of(["v_proj"])
    words = bl.Classifier(BASE, model.sites, bl.priors.normal(), label_ids=(3, 5))
    with pytest.raises(ValueError, match="reads 3 choices of each row, .* got rows without choices"):
        bl.predict(KEY, bl.PointPosterior(model, adapters_of(model)), plain, num_draws=1)
    with pytest.raises(ValueError, match="the rows have several choices each, which label words do not read"):
        bl.predict(KEY, bl.PointPosterior(words, adapters_of(words)), ROWS, num_draws=1)
    with pytest.raises(ValueError, match="give either label_ids, .* or a likelihood; got neither"):
        bl.Classifier(BASE, model.sites, bl.priors.normal())
    with pytest.raises(ValueError, match="num_choices must be at least 2; got 1"):
        bl.likelihoods.Completions(1)
