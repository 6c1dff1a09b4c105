"""Generation: every number against whole forward passes, and sampled texts against exact probabilities."""

import dataclasses
from functools import cache
from io import StringIO

import jax
import numpy as np
import pytest
from builders.written import Drawn, entropy, log_probs_by_draw, writer
from rich.console import Console
from scipy import stats

import bnlora as bl
from bnlora.prediction import decoding
from bnlora.prediction.generation import generate
from bnlora.testing import tiny_base

KEY = jax.random.key(0)
PROMPTS = [[3, 5, 7, 11], [9], list(range(20))]  # of lengths that need padding, in two widths


@cache
def generation(mixture="token", **options):
    options = {"max_new_tokens": 7, "num_draws": 3, "temperature": 1.0} | options
    return generate(KEY, writer(), PROMPTS, mixture=mixture, **options)


def draws(posterior, num_draws=3):
    """The draws that `generate` takes."""
    return posterior.draw_adapters(jax.random.split(KEY)[0], num_draws)


def expected(row, tokens):
    return log_probs_by_draw(writer(), draws(writer()), PROMPTS[row], tokens)


@pytest.mark.slow
@pytest.mark.parametrize("row", range(3))
def test_numbers_of_a_shared_text_are_those_of_whole_passes(row):
    found = generation()
    tokens = found.tokens[row]
    by_draw = expected(row, tokens)
    own = np.take_along_axis(by_draw, tokens[None, :, None], 2)[..., 0]
    before = np.cumsum(own, 1) - own
    weights = np.exp(before) / np.exp(before).sum(0)
    mixture = np.log((weights[..., None] * np.exp(by_draw)).sum(0))
    np.testing.assert_allclose(found.draw_log_probs[:, row], own, atol=1e-4)
    np.testing.assert_allclose(found.weights[:, row], weights, atol=1e-4)
    np.testing.assert_allclose(found.log_probs[row], mixture[np.arange(len(tokens)), tokens], atol=1e-4)
    np.testing.assert_allclose(found.entropy[row], entropy(mixture), atol=1e-4)
    np.testing.assert_allclose(found.aleatoric[row], (weights * entropy(by_draw)).sum(0), atol=1e-4)
    np.testing.assert_allclose(
        found.epistemic[row], entropy(mixture) - (weights * entropy(by_draw)).sum(0), atol=2e-4
    )
    assert found.epistemic[row].max() > 0.05  # the draws differ, or nothing was tested
    assert np.ptp(weights[:, -1]) > 0.1


def test_the_chain_rule_gives_the_mean_over_draws_of_the_texts_probability():
    found = generation()
    by_draw = found.draw_log_probs.sum(2)
    np.testing.assert_allclose(
        found.sequence_log_probs, np.logaddexp.reduce(by_draw, axis=0) - np.log(3), atol=1e-4
    )


def test_epistemic_uncertainty_far_below_rounding_errors_of_entropies_is_right():
    """Draws that hardly differ, on a vocabulary of the size of a real one: a closed form in 64 bits."""
    random = np.random.default_rng(0)
    logits = 3 * random.normal(size=50_000) + 1e-3 * random.normal(size=(4, 1, 50_000))
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    log_q = np.logaddexp.reduce(log_p, axis=0, keepdims=True) - np.log(4)
    exact = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert exact.max() < 1e-6
    given = np.float32(log_p), np.float32(log_q)
    np.testing.assert_allclose(jax.jit(decoding.divergence)(*given), exact, rtol=2e-2)
    np.testing.assert_allclose(jax.jit(decoding.entropy)(given[0]), entropy(log_p), atol=2e-5)
    far = np.log([[[1 - 1e-30, 1e-30]], [[0.5, 0.5]]]), np.log([[[1e-30, 1 - 1e-30]]])
    exact = (np.exp(far[0]) * (far[0] - far[1])).sum(-1)
    np.testing.assert_allclose(decoding.divergence(*map(np.float32, far)), exact, rtol=1e-5)


def test_each_draw_writes_a_text_of_its_own():
    found = generation("sequence")
    assert list(found.prompt_of) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for row in range(9):
        prompt, draw = divmod(row, 3)
        tokens = found.tokens[row]
        own = expected(prompt, tokens)[draw]
        np.testing.assert_allclose(found.log_probs[row], own[np.arange(7), tokens], atol=1e-4)
        np.testing.assert_allclose(found.entropy[row], entropy(own), atol=1e-4)
    np.testing.assert_array_equal(found.draw_log_probs[0], found.log_probs)
    np.testing.assert_array_equal(found.aleatoric, found.entropy)
    assert np.isnan(found.epistemic).all()
    assert len({tuple(row) for row in found.tokens[:3].tolist()}) == 3
    assert found.texts_of(1) == found.texts[3:6]


def test_greedy_takes_the_most_probable_token():
    shared, own = generation(temperature=0.0), generation("sequence", temperature=0.0)
    for row in range(3):
        tokens = shared.tokens[row]
        mixture = np.log((shared.weights[:, row, :, None] * np.exp(expected(row, tokens))).sum(0))
        np.testing.assert_array_equal(mixture.argmax(1), tokens)
        for draw in range(3):
            written = own.tokens[3 * row + draw]
            np.testing.assert_array_equal(expected(row, written)[draw].argmax(1), written)


def test_one_draw_is_the_same_either_way():
    shared, own = generation(num_draws=1), generation("sequence", num_draws=1)
    np.testing.assert_array_equal(shared.tokens, own.tokens)
    np.testing.assert_allclose(shared.log_probs, own.log_probs, atol=1e-5)
    np.testing.assert_allclose(shared.epistemic, 0.0, atol=1e-5)


def test_the_order_of_the_draws_changes_a_shared_text_in_nothing():
    order = [2, 0, 1]
    permuted = Drawn(writer().model, order=order)
    options = {"max_new_tokens": 7, "num_draws": 3}
    found = generate(KEY, permuted, PROMPTS, temperature=1.0, **options)
    np.testing.assert_array_equal(found.tokens, generation().tokens)
    np.testing.assert_allclose(found.draw_log_probs, generation().draw_log_probs[order], atol=1e-5)
    for name in ("log_probs", "aleatoric", "epistemic"):
        np.testing.assert_allclose(getattr(found, name), getattr(generation(), name), atol=1e-5)
    alone = generate(KEY, permuted, PROMPTS, mixture="sequence", **options)  # the most probable tokens
    rows = np.arange(9).reshape(3, 3)[:, order].ravel()
    np.testing.assert_array_equal(alone.tokens, generation("sequence", temperature=0.0).tokens[rows])


@pytest.mark.slow
@pytest.mark.parametrize("mixture", ["token", "sequence"])
def test_neither_padding_nor_other_prompts_nor_batches_matter(mixture):
    """The first prompt has four tokens: beside one of twenty, and alone, where it is padded to sixteen."""
    together = generation(mixture)
    alone = generate(
        KEY, writer(), PROMPTS[:1], max_new_tokens=7, num_draws=3, temperature=1.0, mixture=mixture
    )
    rows = 3 if mixture == "sequence" else 1
    np.testing.assert_array_equal(alone.tokens, together.tokens[:rows])
    np.testing.assert_allclose(alone.log_probs, together.log_probs[:rows], atol=1e-4)
    in_parts = generation(mixture, batch_size=2)  # the second batch is filled up
    np.testing.assert_array_equal(in_parts.tokens, together.tokens)
    np.testing.assert_allclose(in_parts.draw_log_probs, together.draw_log_probs, atol=1e-4)


def test_a_point_runs_once_for_all_of_its_draws():
    model = writer().model
    point = bl.PointPosterior(model, jax.tree.map(lambda x: x[0], draws(writer())))
    found = generate(KEY, point, PROMPTS, max_new_tokens=3, num_draws=4)
    assert found.draw_log_probs.shape == (4, 3, 3)
    assert (found.draw_log_probs == found.log_probs).all()
    assert found.epistemic.max() == 0


def test_a_base_alone_writes_what_zero_adapters_write():
    model = writer().model
    zero = jax.tree.map(lambda x: 0 * x[0], draws(writer()))
    for options in ({}, {"temperature": 1.0, "mixture": "sequence", "num_draws": 2}):
        base = generate(KEY, model.base, PROMPTS, max_new_tokens=5, **options)
        adapted = generate(KEY, bl.PointPosterior(model, zero), PROMPTS, max_new_tokens=5, **options)
        np.testing.assert_array_equal(base.tokens, adapted.tokens)
        np.testing.assert_allclose(base.log_probs, adapted.log_probs, atol=1e-5)
        assert base.draw_log_probs.shape == adapted.draw_log_probs.shape


def test_held_sites_stay_at_their_values():
    """Adapters of the lower layer are fixed; a posterior that draws them anyway writes the same."""
    base = tiny_base(jax.random.key(1), num_layers=2)
    sites = bl.select(base, ["q_proj", "down_proj"], rank=2)
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5))
    full = jax.tree.map(lambda x: x[0], Drawn(model).draw_adapters(KEY, 1))
    values = {f"{name}.{f}": x for name, pair in full.items() for f, x in pair.items()}
    held = bl.condition(model, {name: values[name] for name in ("q_proj.a", "q_proj.b")})
    mixed = {**Drawn(model).draw_adapters(jax.random.split(KEY)[0], 3)}
    mixed["q_proj"] = {f: np.broadcast_to(x, (3, *x.shape)) for f, x in full["q_proj"].items()}

    class Fixed:
        def __init__(self, model):
            self.model = model

        def draw_adapters(self, key, num_draws):
            return mixed

    conditional, plain = (
        generate(KEY, posterior, PROMPTS, max_new_tokens=4, num_draws=3)
        for posterior in (Drawn(held), Fixed(model))
    )
    np.testing.assert_array_equal(conditional.tokens, plain.tokens)
    np.testing.assert_allclose(conditional.draw_log_probs, plain.draw_log_probs, atol=1e-5)


# Frequencies: chi-square tests at a level of 1e-4, with a fixed key.


def two_tokens(temperature, keep) -> np.ndarray:
    """Exact probability of every pair of new tokens, (draw, first, second), of texts by each draw."""
    texts = np.stack([np.arange(40), np.zeros(40, int)], 1)
    log_probs = log_probs_by_draw(writer(), draws(writer()), [3, 5], texts)
    first, second = (np.exp(ruled(log_probs[:, :, place], temperature, keep)) for place in (0, 1))
    return first[:, 0, :, None] * second


def ruled(log_probs, temperature, keep) -> np.ndarray:
    scaled = keep(log_probs / temperature)
    return scaled - np.logaddexp.reduce(scaled, axis=-1, keepdims=True)


def best_five(scores) -> np.ndarray:
    return np.where(scores >= np.sort(scores, -1)[..., -5:-4], scores, -np.inf)


def nucleus(scores) -> np.ndarray:
    """The fewest best tokens of a probability of 0.6."""
    probs = np.exp(scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))
    order = np.argsort(-probs, axis=-1)
    before = np.cumsum(np.take_along_axis(probs, order, -1), -1) - np.take_along_axis(probs, order, -1)
    kept = np.zeros(scores.shape, bool)
    np.put_along_axis(kept, order, before < 0.6, -1)
    return np.where(kept, scores, -np.inf)


RULES = {
    "plain": ({"temperature": 1.0}, lambda x: x),
    "cooler": ({"temperature": 0.6}, lambda x: x),
    "five best": ({"temperature": 1.3, "top_k": 5}, best_five),
    "nucleus": ({"temperature": 1.0, "top_p": 0.6}, nucleus),
}
NUM_TEXTS = 2048


def pairs_of(mixture, **options) -> np.ndarray:
    found = generate(
        KEY, writer(), [[3, 5]] * NUM_TEXTS, max_new_tokens=2, num_draws=3, batch_size=NUM_TEXTS,
        mixture=mixture, **options,
    )  # fmt: skip
    return found.tokens


def p_value(counts, probs) -> float:
    """Of a chi-square test, cells of fewer than five expected texts taken together."""
    wanted = counts.sum() * probs.ravel()
    small = wanted < 5
    assert counts.ravel()[probs.ravel() == 0].sum() == 0
    cells = np.array([[x.ravel()[small].sum(), *x.ravel()[~small]] for x in (counts, wanted)])
    return stats.chisquare(*cells[:, cells[1] > 0]).pvalue


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_each_draws_texts_have_its_probabilities(rule):
    options, keep = RULES[rule]
    exact = two_tokens(options["temperature"], keep)
    found = pairs_of("sequence", **options).reshape(NUM_TEXTS, 3, 2)
    for draw in range(3):
        counts = np.zeros((40, 40))
        np.add.at(counts, tuple(found[:, draw].T), 1)
        assert p_value(counts, exact[draw]) > 1e-4


@pytest.mark.slow
def test_shared_texts_and_texts_by_each_draw_have_the_posterior_predictive_probabilities():
    """The mean over the draws of a text's probability, which equal weights at every step do not give."""
    exact = two_tokens(1.0, lambda x: x)
    for mixture in ("token", "sequence"):
        counts = np.zeros((40, 40))
        np.add.at(counts, tuple(pairs_of(mixture, temperature=1.0).T), 1)
        assert p_value(counts, exact.mean(0)) > 1e-4
        first, second = exact.sum(2), exact / exact.sum(2, keepdims=True)
        equal = first.mean(0)[:, None] * second.mean(0)
        assert p_value(counts, equal) < 1e-4


def test_filters_keep_the_best():
    scores = np.log([[0.5, 0.2, 0.2, 0.1]])
    kept = [np.isfinite(decoding.filtered(scores, k, p))[0].tolist()
            for k, p in ((1, 1.0), (2, 1.0), (4, 0.5), (4, 0.6), (3, 0.8), (4, 1e-9))]  # fmt: skip
    assert kept == [
        [True, False, False, False],
        [True, True, True, False],  # a tie with the second
        [True, False, False, False],
        [True, True, True, False],
        [True, True, True, False],
        [True, False, False, False],
    ]


def test_one_program_reads_prompts_and_one_writes_on():
    """For another key, prompts, temperature and number of tokens, too."""
    posterior = Drawn(bl.Classifier(*parts_of(writer().model), likelihood=bl.likelihoods.Completions(2)))
    for key, prompts, new in ((0, PROMPTS[:2], 5), (1, [[1], [2, 3, 4]], 5), (2, PROMPTS[:2], 12)):
        generate(
            jax.random.key(key), posterior, prompts, max_new_tokens=new, num_draws=2, temperature=key + 0.5
        )
    for function in (decoding.started, decoding.continued):
        (kept,) = [run for (_, kind, *_), run in vars(posterior.model)["_kept"].items() if kind is function]
        assert kept._cache_size() == 1


def parts_of(model):
    return model.base, model.sites, model.prior.program


def test_every_token_is_reported_when_it_is_written():
    seen = []
    console = Console(force_terminal=True, width=80, file=StringIO())
    found = generate(
        KEY, writer(), PROMPTS, max_new_tokens=7, num_draws=3, temperature=1.0, on_token=seen.append,
        console=console, batch_size=2,
    )  # fmt: skip
    np.testing.assert_array_equal(found.tokens, generation().tokens)
    assert [(t.place, t.row) for t in seen[:14]] == [(place, row) for place in range(7) for row in (0, 1)]
    assert len(seen) == 21
    assert "generate" in console.file.getvalue()
    for token in seen:
        assert token.token == found.tokens[token.row, token.place]
        assert token.piece == found.pieces[token.row][token.place]
        assert token.aleatoric == found.aleatoric[token.row, token.place]
        assert token.epistemic == found.epistemic[token.row, token.place]
        assert token.log_prob == found.log_probs[token.row, token.place]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts must have at least one prompt; got an empty list"),
        ({"prompts": "good"}, r"prompts must be a list of texts or of token ids, such as \['good'\]"),
        ({"prompts": [[1], []]}, "prompt 1 has no token"),
        ({"prompts": [[1, 40]]}, "tokens of prompt 0 must be from 0 to 39; got 40"),
        ({"prompts": [[1.5]]}, r"prompt 0 must be a text or a list of token ids; got \[1.5\]"),
        ({"prompts": ["good"]}, "prompt 0 is a text, and the base has no tokenizer; give its token ids"),
        ({"prompts": [[1] * 60]}, "60 tokens and max_new_tokens is 5, so max_new_tokens can be 4"),
        ({"prompts": [[1] * 64]}, "shorten the prompt"),
        ({"temperature": -1.0}, "temperature must be 0, .*, or from 0.001 to 1000; got -1.0"),
        ({"temperature": "hot"}, "temperature must be 0.*got 'hot'"),
        ({"temperature": float("nan")}, "temperature must be 0.*got nan"),
        ({"top_p": 0.5, "temperature": 0.0}, "top_k and top_p need a temperature above 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1; got 0"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"num_draws": 0}, "num_draws must be at least 1; got 0"),
        ({"mixture": "tokens"}, "mixture must be one of.*nearest is 'token'"),
        ({"stop": "."}, "stop '.' cannot end a text, because the base has no tokenizer"),
        ({"stop": [40]}, "tokens of stop must be from 0 to 39; got 40"),
        ({"stop": 1.5}, "stop must be strings and token ids; got 1.5"),
        ({"key": 7}, "key must be a random key.*got 7"),
        ({"posterior": 7}, "expected a posterior, such as a fit.*got an object of type int"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(change, message):
    options = {"key": KEY, "posterior": writer(), "prompts": PROMPTS, "max_new_tokens": 5, "temperature": 1.0}
    options |= change
    with pytest.raises(ValueError, match=message) as refused:
        generate(options.pop("key"), options.pop("posterior"), options.pop("prompts"), **options)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_tangent_posterior_and_a_head_of_label_words_are_refused():
    base = writer().model.base
    rows = bl.testing.tiny_rows(KEY, 6)
    frames = bl.frames(KEY, base, ["lm_head"], rows, label_ids=(3, 5), size=2)
    core = bl.Classifier(base, frames.sites, bl.priors.core(frames), label_ids=(3, 5))
    with pytest.raises(ValueError, match="fit the network instead: bl.fit with a bl.Classifier"):
        generate(KEY, Drawn(bl.Tangent(core)), PROMPTS)
    words = bl.Classifier(base, bl.select(base, ["lm_head"], rank=1), bl.priors.normal(), label_ids=(3, 5))
    with pytest.raises(ValueError, match="has only the 2 rows of the label words"):
        generate(KEY, Drawn(words), PROMPTS)
    foreign = dataclasses.replace(writer().model.base, name="other")
    foreign = Drawn(
        bl.Classifier(foreign, writer().model.sites, bl.priors.normal(), label_ids=(3, 5)).over(object())
    )
    with pytest.raises(ValueError, match="needs a base of bl.load; got an object of type object"):
        generate(KEY, foreign, PROMPTS)
