"""References on disk: what comes back compares as what went in, and on its own rows alone."""

import json
import shutil
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import bnlora as bl
from bnlora.assess import sbc
from bnlora.assess.comparison.stored import checksum
from bnlora.infer.mcmc.certificate import Certificate, Evidence, Thresholds, certify
from bnlora.prediction.functions import evaluate, identifiable
from bnlora.testing import tiny_base, tiny_rows

BASE, ROWS = tiny_base(jax.random.key(1), num_layers=1), tiny_rows(jax.random.key(2), 6)
MODEL = bl.Classifier(
    BASE, bl.select(BASE, ["lm_head"], rank=1), bl.priors.normal(scale=1.0), label_ids=(3, 5)
)
KEY = jax.random.key(3)


@dataclass(frozen=True)
class Run:
    """Exact draws that are stored as if four chains had made them."""

    adapters: dict
    certificate: Certificate
    num_chains: int = 4
    model: bl.Classifier = MODEL
    record: tuple = (("sampler", "importance"), ("bias", "none"))
    target: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(held=""))
    thinning: int = 1

    def stored_adapters(self):
        return self.adapters


@dataclass(frozen=True)
class Given:
    """A posterior that hands out given draws in order."""

    adapters: dict
    model: bl.Classifier = MODEL

    def draw_adapters(self, key, num_draws):
        return jax.tree.map(lambda x: x[:num_draws], self.adapters)


@pytest.fixture(scope="module")
def draws():
    infer = sbc.importance_inference(MODEL, num_particles=30_000, num_draws=800, num_together=1000)
    return [jax.jit(infer)(jax.random.key(seed), BASE.weights, ROWS) for seed in (0, 1)]


@pytest.fixture(scope="module")
def run(draws):
    names, values = evaluate(identifiable(MODEL, ROWS), MODEL, draws[0], ROWS)
    none = np.zeros((4, 200))
    # Draws of importance resampling repeat, so the default thresholds are not theirs to reach.
    thresholds = Thresholds(ess=100, rhat=1.05, autocorrelation=0.2)
    evidence = Evidence(names, values.reshape(4, 200, -1), none.astype(bool), none * np.nan)
    return Run(draws[0], certify(evidence, thresholds))


@pytest.mark.slow
def test_a_reference_comes_back_as_it_was(run, draws, tmp_path):
    stored = bl.store_reference(run, ROWS, num_draws=100)
    bl.save_reference(stored, tmp_path)
    again = bl.load_reference(tmp_path)
    assert again.certificate == stored.certificate == run.certificate
    assert dict(again.record) == dict(stored.record)
    assert again.rows == checksum(ROWS)
    np.testing.assert_allclose(again.draws.values, stored.draws.values, rtol=1e-6)
    assert again.prediction.draw_log_probs.shape == (100, 6, 2)
    fresh = bl.compare(KEY, Given(draws[1]), run, ROWS, num_draws=100)
    found = bl.compare(KEY, Given(draws[1]), again, ROWS, num_draws=100)
    assert found.names == fresh.names
    np.testing.assert_allclose(
        found.to_dataframe().select_dtypes("number"),
        fresh.to_dataframe().select_dtypes("number"),
        rtol=1e-3,
        atol=1e-4,
    )
    assert "importance, 4 chains of 200 draws, 8 functions" in repr(again)


def test_another_problem_is_refused(run, draws, tmp_path):
    stored = bl.store_reference(run, ROWS)
    with pytest.raises(ValueError, match="other rows; give the rows"):
        bl.compare(KEY, Given(draws[1]), stored, ROWS[:5])
    other = bl.Classifier(BASE, MODEL.sites, bl.priors.normal(), label_ids=(3, 7))
    with pytest.raises(ValueError, match="label ids"):
        bl.compare(KEY, Given(draws[1], other), stored, ROWS)
    with pytest.raises(ValueError, match="only the default functions"):
        bl.compare(KEY, Given(draws[1]), stored, ROWS, functions=identifiable(MODEL, ROWS[:2]))


def test_padding_does_not_change_the_rows():
    assert checksum(ROWS) == checksum(ROWS.cut(slice(0, 8)))
    wider = bl.Batch(
        *(np.pad(np.asarray(x), ((0, 0), (3, 0))) for x in (ROWS.tokens, ROWS.mask)), labels=ROWS.labels
    )
    assert checksum(ROWS) == checksum(wider)
    assert checksum(ROWS) != checksum(bl.Batch(ROWS.tokens, ROWS.mask, 1 - ROWS.labels))


def test_what_failed_its_checks_stays_refused_on_disk(run, draws, tmp_path):
    strict = Thresholds(ess=1e6)
    names, values = run.certificate.names, np.random.default_rng(0).normal(size=(4, 50, 8))
    none = np.zeros((4, 50))
    failed = certify(Evidence(names, values, none.astype(bool), none * np.nan), strict)
    bl.save_reference(bl.store_reference(Run(draws[0], failed), ROWS), tmp_path)
    with pytest.raises(ValueError, match="bulk ESS .* draw more"):
        bl.compare(KEY, Given(draws[1]), bl.load_reference(tmp_path), ROWS)


def test_missing_and_corrupt_files_get_a_sentence(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="contains no reference: it lacks certificate.json and draws"):
        bl.load_reference(tmp_path)
    bl.save_reference(bl.store_reference(run, ROWS), tmp_path)
    (tmp_path / "draws.nc").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is corrupt"):
        bl.load_reference(tmp_path)


def test_files_of_two_references_and_impossible_numbers_are_refused(run, tmp_path):
    stored = bl.store_reference(run, ROWS, num_draws=20)
    one, two = tmp_path / "one", tmp_path / "two"
    bl.save_reference(stored, one)
    values = stored.draws.values.copy()
    values[0, 0, 0] += 1
    bl.save_reference(replace(stored, draws=replace(stored.draws, values=values)), two)
    shutil.copy(two / "draws.nc", one / "draws.nc")
    with pytest.raises(ValueError, match="draws.nc is not the file that certificate.json describes"):
        bl.load_reference(one)
    values[0, 0, 0] = np.nan
    log_probs = stored.prediction.draw_log_probs + 0.1
    for message, changes in {
        "has values that are not finite": {"draws": SimpleNamespace(names=stored.draws.names, values=values)},
        "do not sum to one": {"prediction": bl.Prediction(log_probs)},
    }.items():
        bl.save_reference(replace(stored, **changes), two)
        with pytest.raises(ValueError, match=message):
            bl.load_reference(two)
    (two / "certificate.json").write_text("[]")
    with pytest.raises(ValueError, match="is corrupt"):
        bl.load_reference(two)


def test_a_reference_on_other_rows_than_those_of_the_run_is_read(run, tmp_path):
    bl.save_reference(bl.store_reference(run, ROWS[:3], num_draws=20), tmp_path)
    again = bl.load_reference(tmp_path)
    assert len(again.draws.names) < len(again.certificate.names)
    assert again.prediction.probs.shape == (3, 2)


def test_a_reference_of_before_the_checksum_is_read(run, tmp_path):
    bl.save_reference(bl.store_reference(run, ROWS, num_draws=20), tmp_path)
    about = json.loads((tmp_path / "certificate.json").read_text())
    del about["checksums"]
    (tmp_path / "certificate.json").write_text(json.dumps(about))
    assert bl.load_reference(tmp_path).certificate == run.certificate
