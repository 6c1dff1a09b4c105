"""The code in the documents runs as it stands there."""

import doctest
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows

ROOT = Path(__file__).parents[2]


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def names_of_a_tiny_model() -> dict:
    """What the pieces of code in the documents take as given."""
    base = tiny_base(jax.random.key(0), num_layers=2)
    sites = bl.select(base, ["lm_head"], rank=2)
    data = SimpleNamespace(train=tiny_rows(jax.random.key(1), 6), label_ids=(3, 5))
    return {
        "numpyro": numpyro,
        "dist": dist,
        "jnp": jnp,
        "bl": bl,
        "base": base,
        "sites": sites,
        "data": data,
    }


def fit_two_steps(names: dict, model, guide) -> bl.Fit:
    return bl.fit(
        jax.random.key(2), model, guide, names["data"].train, optax.adam(0.01), num_steps=2, batch_size=3
    )


def test_the_examples_of_the_contributing_guide_print_what_they_say_and_fit():
    names = names_of_a_tiny_model()
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    test = doctest.DocTestParser().get_doctest(text, names, "CONTRIBUTING.md", None, 0)
    assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
    ran = test.globs
    model = bl.Classifier(names["base"], names["sites"], ran["prior"], label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, ran["student_guide"](5.0))
    assert fit_two_steps(names, model, guide).skipped_steps == 0


@pytest.mark.slow
def test_the_script_of_the_readme_runs(capsys, tmp_path, monkeypatch):
    """As it stands, but with few steps, rows and draws, and rows of one width."""
    monkeypatch.chdir(tmp_path)
    script, *_ = blocks("README.md")
    script = re.sub(r"num_draws=\d+", "num_draws=4", script)
    script = re.sub(r"train=\d+, validation=\d+, test=\d+", "train=16, validation=1, test=8", script)
    script = script.replace('" positive"]}', '" positive"], "max_length": 16, "truncate": "right"}')
    script = script.replace('"v_proj": 32', '"v_proj": 4')
    script = script.replace('300, "num_draws": 1000', '50, "num_draws": 40')
    names: dict = {}
    exec(script, names)
    assert "accuracy" in capsys.readouterr().out
    assert len([line for line in script.splitlines() if line]) <= 20
    assert set(names["tree"].children) >= {"posterior", "log_likelihood"}
    again = bl.predict(names["k_predict"], bl.load_core("core", names["base"]), names["data"]["movies"])
    assert again.probs.shape == names["prediction"].probs.shape


def test_the_table_of_rooms_is_the_floor_plan():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (`[^|]+`) \|", text, re.MULTILINE)
    floors = {room.replace("/", "."): int(n) for n, rooms in rows for room in re.findall(r"`(.+?)`", rooms)}
    assert floors == runpy.run_path(str(ROOT / "tests/project/test_architecture.py"))["FLOORS"]


def test_readme_opens_with_the_two_commands_and_a_script():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    picture = text.index("![")
    assert text.index("make demo") < text.index("make test") < picture < text.index("```python")


def test_the_files_that_the_readme_points_to_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target
