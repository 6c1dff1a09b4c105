"""The demonstration on the real model and sentences, with small sizes."""

import os
import subprocess
import sys

import pytest

from bnlora.app import experiment, results
from bnlora.data.assets import DOMAINS


@pytest.mark.slow
def test_demo_prints_its_table_and_writes_its_report(tmp_path):
    sizes = {"train": 32, "validation": 16, "test": 24, "epochs": 2, "draws": 2}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "bnlora", "demo", *options, "--report", str(tmp_path / "report.html")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stderr
    methods = (experiment.BASE, experiment.LORA, experiment.CAREFUL, experiment.BAYES, experiment.NUTS)
    for piece in (*DOMAINS, *methods, *results.SHOWN, "gain in evidence", "NLL of Bayesian-LoRA"):
        assert piece in done.stdout
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 3
    assert "bnlora demo --train 32" in html
