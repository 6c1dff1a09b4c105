"""The code in the documents runs as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_prior_of_the_contributing_guide_fits():
    (code,) = blocks("CONTRIBUTING.md")
    names = {"numpyro": numpyro, "dist": dist, "jnp": jnp}
    exec(code, names)
    base = tiny_base(jax.random.key(0), num_layers=2)
    sites = bl.select(base, ["lm_head"], rank=2)
    model = bl.Classifier(base, sites, names["laplace"](0.5), label_ids=(3, 5))
    rows = tiny_rows(jax.random.key(1), 6)
    guide = bl.guides.SiteFlow(model.prior)
    fit = bl.fit(jax.random.key(2), model, guide, rows, optax.adam(0.01), num_steps=2, batch_size=3)
    assert fit.skipped_steps == 0


@pytest.mark.slow
def test_the_script_of_the_readme_runs(capsys):
    """As it stands, but with few steps, rows and draws."""
    script, *_ = blocks("README.md")
    for pattern in (r"num_steps=\d+", r"num_samples=\d+"):
        script = re.sub(pattern, lambda m: m[0].split("=")[0] + "=4", script)
    script = re.sub(r"train=\d+, validation=\d+, test=\d+", "train=32, validation=16, test=16", script)
    names: dict = {}
    exec(script, names)
    assert "accuracy" in capsys.readouterr().out
    assert len(script.strip().splitlines()) <= 26
    assert set(names["tree"].children) >= {"posterior", "log_likelihood"}


def test_readme_opens_with_the_two_commands_and_a_script():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("make demo") < text.index("make test") < text.index("```python")


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.py")), ids=lambda path: path.name)
def test_notebooks_run(path):
    done = subprocess.run(
        [sys.executable, path],
        env=os.environ | {"BNLORA_FAST": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
