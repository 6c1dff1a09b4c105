"""Fits on disk: the same numbers come back, and what does not belong together is refused."""

import json

import jax
import numpy as np
import optax
import pytest

import bnlora as bl
from bnlora.checkpoint import ARRAYS, RECORD
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=2)
ROWS = tiny_rows(jax.random.key(2), 12)


def build(rank=2, prior=None):
    sites = bl.select(BASE, ["lm_head"], rank=rank)
    prior = prior or bl.priors.sparse_gp(rows=2, cols=2)
    model = bl.Classifier(BASE, sites, prior, label_ids=(3, 5))
    return model, bl.guides.SiteFlow(model.prior, hidden=4, blocks=1)


@pytest.fixture(scope="module")
def fit():
    rule = bl.EarlyStopping(every=2)
    options = {"num_steps": 4, "batch_size": 6, "validation": ROWS[:6], "early_stopping": rule}
    return bl.fit(KEY, *build(), ROWS, optax.adam(0.1), **options)


@pytest.fixture
def folder(fit, tmp_path):
    bl.save_fit(fit, tmp_path / "fit")
    return tmp_path / "fit"


def test_everything_comes_back(fit, folder):
    back = bl.load_fit(folder, *build())
    for name in ("params", "last_params", "history", "validation"):
        jax.tree.map(np.testing.assert_array_equal, getattr(fit, name), getattr(back, name))
    assert (back.best_step, back.skipped_steps, back.stopped) == (fit.best_step, 0, "steps")
    np.testing.assert_array_equal(back.step_seconds, fit.step_seconds)
    np.testing.assert_array_equal(back.train.tokens, ROWS.tokens)
    first, second = (bl.predict(fit.draw_key, f, ROWS, num_samples=3) for f in (fit, back))
    np.testing.assert_array_equal(first.draw_log_probs, second.draw_log_probs)


def test_base_weights_are_not_stored(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 50_000
    assert sorted(path.name for path in folder.iterdir()) == [RECORD, ARRAYS]


def test_a_later_fit_replaces_an_earlier_one(fit, folder):
    bl.save_fit(fit, folder)
    assert bl.load_fit(folder, *build()).best_step == fit.best_step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 1}, r"another prior, guide or sites \(of another shape: params\['lm_head"),
        ({"prior": bl.priors.normal()}, r"\(missing: params\['lm_head.a.q.flow'\]"),
    ],
)
def test_another_model_is_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        bl.load_fit(folder, *build(**changes))


@pytest.mark.parametrize("name", [ARRAYS, RECORD])
def test_missing_and_broken_files(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is corrupt or truncated"):
        bl.load_fit(folder, *build())
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no fit: it lacks {name}"):
        bl.load_fit(folder, *build())


def test_a_format_of_the_future_is_refused(folder):
    record = json.loads((folder / RECORD).read_text()) | {"format": 99}
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="has format 99; this version of bnlora reads format 1"):
        bl.load_fit(folder, *build())
