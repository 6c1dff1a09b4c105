"""With JAX_ENABLE_X64=1 every public function runs; models stay in 32 bits, what JAX makes itself has 64."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from builders.thorough import EVERY, sample_of

import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows

WALK = Path(__file__).parents[1] / "builders" / "walk_in_64_bits.py"


def test_smc_runs_in_64_bit_mode():
    """Its solver of the powers takes one type of number for all."""
    with jax.enable_x64(True):
        base = tiny_base(jax.random.key(1), num_layers=1)
        model = bl.Classifier(
            base, bl.select(base, ["lm_head"], rank=1), bl.priors.normal(), label_ids=(3, 5)
        )
        rows = tiny_rows(jax.random.key(2), 8)
        runs = bl.sample_smc(
            jax.random.key(0), model, rows, num_runs=2, num_draws=20, num_integration_steps=2
        )
        assert np.isfinite(runs.vectors).all()


PARTS = ("fits", "references", "families", "samplers", "laws", "tangent", "others")
IN_SHORT = PARTS[:1]
"""The way from a fit to its diagnosis."""


@pytest.fixture(scope="module")
def walk():
    """What one process printed on its way through the parts, which share imports and programs."""
    environment = os.environ | {
        "JAX_ENABLE_X64": "1",
        "PYTHONPATH": os.pathsep.join(map(str, WALK.parents[1:3])),
    }
    run = [sys.executable, str(WALK), *(PARTS if EVERY else IN_SHORT)]
    return subprocess.run(run, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("part", sample_of(PARTS, IN_SHORT))
def test_every_public_function_runs_in_64_bit_mode(part, walk):
    assert f"{part} done" in walk.stdout, walk.stderr[-3000:]
