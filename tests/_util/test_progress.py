"""Output of a fit while it runs: bars on a terminal, nothing elsewhere."""

from io import StringIO

import jax
import optax
import pytest
from rich.console import Console

import bnlora as bl
from bnlora._util.progress import progress_bar, speaker, track
from bnlora.testing import tiny_base, tiny_rows


@pytest.fixture(scope="module")
def make():
    base = tiny_base(jax.random.key(0), num_layers=2)
    model = bl.Classifier(
        base, bl.select(base, ["q_proj"], rank=1, layers=[1]), bl.priors.point(), label_ids=(3, 5)
    )
    guide = bl.guides.SiteFlow(model.prior)
    rows = tiny_rows(jax.random.key(1), 8)

    def fit(console):
        options = {"num_steps": 3, "batch_size": 4, "console": console}
        return bl.fit(jax.random.key(2), model, guide, rows, optax.adam(0.01), **options)

    return fit


def test_a_terminal_sees_the_terms_the_speed_and_the_time_left(make):
    text = StringIO()
    make(Console(file=text, force_terminal=True, width=200))
    shown = text.getvalue()
    for piece in ("ELBO -", "= data -", "inducing KL 0", "conditional KL 0", "steps/s", "3/3", "0:00:0"):
        assert piece in shown
    assert "prefix cache: 8 rows through 1 of 2 layers, 0.0 MiB" in shown


def test_a_pipe_sees_no_bar(make, capfd):
    text = StringIO()
    make(Console(file=text, force_terminal=False, width=200))
    assert text.getvalue().splitlines() == ["prefix cache: 8 rows through 1 of 2 layers, 0.0 MiB"]
    make(None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["force_terminal", "force_jupyter"])
def test_a_quiet_console_gets_no_bar(where):
    """Also in a notebook, where rich would create a widget for an invisible bar."""
    assert progress_bar(Console(quiet=True, **{where: True})).disable


def test_track_yields_every_item():
    assert list(track(range(5), 5, "items", Console(quiet=True))) == [0, 1, 2, 3, 4]


def test_the_given_console_is_spoken_on():
    console = Console(file=StringIO())
    assert speaker(console) is console
    assert speaker(None).quiet
