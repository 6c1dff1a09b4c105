"""The reference draws that ship with the benchmarks: certified, small, and found again from scratch."""

from pathlib import Path

import jax
import pytest

import bnlora as bl
from benchmarks.heads import HEADS, smollm2
from bnlora.infer.mcmc.certificate import Thresholds

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FOLDERS = sorted((BENCHMARKS / "references").iterdir())


def test_every_reference_belongs_to_a_head():
    assert {folder.name for folder in FOLDERS} <= set(HEADS)
    assert {"two-words", "eight-topics"} <= {folder.name for folder in FOLDERS}


def test_references_are_small():
    size = sum(path.stat().st_size for folder in FOLDERS for path in folder.iterdir())
    assert size < 5_000_000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_reference_is_certified_at_the_default_thresholds(folder):
    stored = bl.load_reference(folder)
    assert stored.certificate.passed
    # Those of earlier versions were asked for nearly independent draws too.
    assert stored.certificate.thresholds in (Thresholds(), Thresholds(autocorrelation=0.05))
    assert stored.record["sampler"] == "NUTS"
    assert {"key", "command", "versions", "options"} <= set(stored.record)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_reference_is_found_again_from_scratch():
    """Other seed, other starts, another sampler: no aspect differs from the shipped draws."""
    model, train, others = HEADS["two-words"].load(smollm2())
    chains = bl.sample_elliptical(
        jax.random.key(1),
        model,
        train,
        init_strategy="prior",
        num_draws=400,
        steps_per_draw=60,
        num_warmup=2000,
    )
    stored = bl.load_reference(BENCHMARKS / "references" / "two-words")
    found = bl.compare(jax.random.key(2), chains, stored, others)
    assert found.differences == (), found.verdict
