"""The demonstration on the real model and sentences, with small sizes."""

from dataclasses import replace
from functools import partial

import pytest
from typer.testing import CliRunner

import bnlora as bl
from bnlora.app import demo, experiment, results
from bnlora.app.cli import app
from bnlora.data.assets import DOMAINS


@pytest.mark.slow
def test_demo_prints_its_table_and_writes_its_report(tmp_path, monkeypatch):
    """In this process, which shares imports with others; `tests/app/test_cli.py` starts one of its own."""
    chains = {"num_warmup": 50, "num_draws": 50, "target_acceptance": 0.8}
    monkeypatch.setattr(experiment, "NUTS_OPTIONS", chains)
    monkeypatch.setattr(experiment, "SiteFlow", partial(bl.guides.SiteFlow, hidden=4, blocks=1))
    # Short rows of one width: one program serves all, and the model runs for a quarter of the time.
    monkeypatch.setattr(demo, "RECIPE", replace(demo.RECIPE, max_length=16, truncate="right"))
    sizes = {"train": 16, "validation": 8, "test": 8, "epochs": 2, "draws": 2}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = ["demo", *options, "--report", str(tmp_path / "report.html")]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.stderr
    methods = (experiment.BASE, experiment.LORA, experiment.CAREFUL, experiment.BAYES, experiment.NUTS)
    for piece in (*DOMAINS, *methods, *results.SHOWN, "gain in evidence", "NLL of Bayesian-LoRA"):
        assert piece in done.stdout
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 3
    assert "bnlora demo --train 16" in html
