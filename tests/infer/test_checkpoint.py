"""Fits on disk: the same numbers come back, and what does not belong together is refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import bnlora as bl
from bnlora._util.files import file_checksum
from bnlora.infer.svi import checkpoint
from bnlora.infer.svi.checkpoint import ARRAYS, RECORD, fit_size, read_notes
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
    first, second = (bl.predict(fit.draw_key, f, ROWS, num_draws=3) for f in (fit, back))
    np.testing.assert_array_equal(first.draw_log_probs, second.draw_log_probs)


def test_base_weights_are_not_stored(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 50_000
    assert sorted(path.name for path in folder.iterdir()) == [RECORD, ARRAYS]


@pytest.mark.parametrize("name", ["save_file", "write_json"])
def test_a_fit_that_cannot_be_written_leaves_the_earlier_one(fit, folder, monkeypatch, name):
    def full(*_):
        raise {"save_file": SafetensorError, "write_json": OSError}[name]("No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(checkpoint, name, full)
    with pytest.raises(OSError, match="No space left on device"):
        bl.save_fit(fit, folder, notes={"later": True})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_later_fit_replaces_an_earlier_one(fit, folder):
    bl.save_fit(fit, folder)
    assert bl.load_fit(folder, *build()).best_step == fit.best_step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 1}, "made with rank 2 of site 'lm_head'; got 1"),
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
    with pytest.raises(ValueError, match="has format 99; this version of bnlora reads formats 1 and 2"):
        bl.load_fit(folder, *build())


def rewritten(folder, *, arrays=(), record=()):
    """Change a fit on disk and make its checksum anew, as an unlucky program would."""
    stored = load_file(folder / ARRAYS)
    for start, change in dict(arrays).items():
        name = next(name for name in stored if name.startswith(start))  # of a tree, the first leaf
        stored[name] = change(stored[name].copy())
    save_file(stored, folder / ARRAYS)
    told = json.loads((folder / RECORD).read_text()) | {"checksum": file_checksum(folder / ARRAYS)}
    (folder / RECORD).write_text(json.dumps(told | dict(record)))


def put(value):
    """Write a number into the first place of an array."""

    def change(array):
        array.flat[0] = value
        return array

    return change


SCALE = "params['lm_head.b.V.q.scale']"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (SCALE, put(-0.1), r"'lm_head.b.V.q.scale' in .* has a value outside its range, SoftplusPositive"),
        (f"last_{SCALE}", put(np.nan), "'lm_head.b.V.q.scale' in .* outside its range"),
        ("params['lm_head.a.V.q.loc']", put(np.inf), "'lm_head.a.V.q.loc' in .* outside its range, Real"),
        ("params['lm_head.b.V.q.flow']", put(np.nan), "'lm_head.b.V.q.flow' in .* outside its range"),
        ("train.tokens", put(40), "tokens of the rows in .* from 0 to 39, the 40 tokens of the base; got 40"),
        ("train.labels", put(2), "labels of the rows in .* from 0 to 1, the 2 classes of the model; got 2"),
        ("train.labels", put(-1), "labels of the rows in .* from 0 to 1, the 2 classes of the model; got -1"),
        ("train.labels", lambda x: x.astype(np.float32), "its rows are not tokens, mask and labels"),
        ("train.mask", lambda x: x[:2], "its rows are not tokens, mask and labels"),
        ("step_seconds", lambda x: x[:2], "the columns of the history in fit.safetensors differ in length"),
    ],
)
def test_numbers_outside_their_range_are_refused(folder, name, change, message):
    rewritten(folder, arrays={name: change})
    with pytest.raises(ValueError, match=message):
        bl.load_fit(folder, *build())


def test_a_scale_that_rounded_to_zero_is_read(folder):
    rewritten(folder, arrays={SCALE: put(0.0)})
    assert bl.load_fit(folder, *build()).params["lm_head.b.V.q.scale"].min() == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"best_step": -1}, "'best_step' in fit.json must be a whole number of at least 0; got -1"),
        ({"num_traces": True}, "'num_traces' in fit.json must be a whole number of at least 0; got True"),
        ({"stopped": "never"}, "'stopped' in fit.json must be one of steps, patience, .*; got 'never'"),
    ],
)
def test_a_record_that_cannot_be_is_refused(folder, record, message):
    rewritten(folder, record=record)
    with pytest.raises(ValueError, match=message):
        bl.load_fit(folder, *build())


def test_an_incomplete_record_is_refused(folder):
    told = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({k: v for k, v in told.items() if k not in ("key", "model")}))
    with pytest.raises(ValueError, match="is corrupt: fit.json lacks key, model"):
        bl.load_fit(folder, *build())


def test_the_arrays_of_another_fit_are_refused(fit, folder, tmp_path):
    bl.save_fit(bl.fit(KEY, *build(), ROWS, optax.adam(0.2), num_steps=4, batch_size=6), tmp_path / "other")
    shutil.copy(tmp_path / "other" / ARRAYS, folder / ARRAYS)
    with pytest.raises(ValueError, match="fit.safetensors is not the file that fit.json describes"):
        bl.load_fit(folder, *build())
    bl.save_fit(fit, folder)
    content = bytearray((folder / ARRAYS).read_bytes())
    content[-1] ^= 1
    (folder / ARRAYS).write_bytes(content)
    with pytest.raises(ValueError, match="belongs to another fit, or was changed"):
        bl.load_fit(folder, *build())


def test_a_model_of_the_same_shapes_is_refused(folder):
    model, guide = build()
    parts = {"base": BASE, "sites": model.sites, "prior": model.prior.program, "label_ids": model.label_ids}
    others = {
        r"ids \[3, 5\] of label ids; got \[5, 3\]": {"label_ids": (5, 3)},
        "made with alpha 2.0 of site 'lm_head'; got 8.0": {
            "sites": bl.select(BASE, ["lm_head"], rank=2, alpha=8.0)
        },
        "has label ids, site 'lm_head'; the model has label ids, site 'q_proj', site 'lm_head'": {
            "sites": bl.select(BASE, ["q_proj", "lm_head"], rank=2)
        },
        "with a base other than Base": {"base": tiny_base(jax.random.key(7), num_layers=2)},
    }
    for message, change in others.items():
        new = parts | change
        other = bl.Classifier(new["base"], new["sites"], new["prior"], label_ids=new["label_ids"])
        with pytest.raises(ValueError, match=message):
            bl.load_fit(folder, other, guide)


def test_a_fit_given_other_values_of_the_held_sites_is_refused(tmp_path):
    model, _ = build(prior=bl.priors.normal())
    one, two = (bl.condition(model, {"lm_head.a": np.full((1, 2, 16), x, np.float32)}) for x in (0.1, 0.2))
    guide = bl.guides.Guide(one.prior, bl.guides.mean_field())
    bl.save_fit(bl.fit(KEY, one, guide, ROWS, optax.adam(0.1), num_steps=1, batch_size=6), tmp_path)
    bl.load_fit(tmp_path, one, guide)
    with pytest.raises(ValueError, match="values of the fixed sites; its frozen weights differ"):
        bl.load_fit(tmp_path, two, guide)


def test_notes_come_back(fit, folder):
    assert read_notes(folder) == {}
    bl.save_fit(fit, folder, notes={"words": (" bad", " good"), "rank": 2})
    assert read_notes(folder) == {"words": [" bad", " good"], "rank": 2}


def test_a_fit_takes_no_more_room_than_was_said(fit, folder):
    said = fit_size(fit.model, fit.guide, fit.train, len(fit.step_seconds))
    taken = sum(path.stat().st_size for path in folder.iterdir())
    assert taken <= said <= taken + 2**18


def test_a_file_of_the_first_format_is_read():
    """It was written before checksums, with vectors of one number for the horseshoe's scalars."""
    base = tiny_base(jax.random.key(1), num_layers=1)
    model = bl.Classifier(base, bl.select(base, ["lm_head"], rank=1), bl.priors.horseshoe(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    read = bl.load_fit(Path(__file__).parents[1] / "references" / "fit-format-1", model, guide)
    assert read.params["lm_head.b.tau.q.loc"].shape == ()
    assert float(read.params["lm_head.b.tau.q.loc"]) == pytest.approx(-0.5864017)
    assert (len(read.train), read.stopped, read.best_step) == (6, "steps", 2)
    np.testing.assert_allclose(read.history["elbo"], [-74.8298645, -66.58757019])


def test_a_fit_of_the_first_format_has_no_frames():
    folder = Path(__file__).parents[1] / "references" / "fit-format-1"
    with pytest.raises(ValueError, match="has no frames: its prior was not priors.core"):
        bl.load_frames(folder, BASE)
