"""The controls of `bl.explore` without a browser, and without ipywidgets."""

import asyncio
import subprocess
import sys

import numpy as np
import pytest
from builders.linearised import NEW, ROWS, frames, tangent_of

import bnlora as bl

pytest.importorskip("ipywidgets")


@pytest.fixture(scope="module")
def explorer():
    return bl.explore(tangent_of(frames("v_proj", "lm_head", layers=2)), ROWS, NEW)


@pytest.fixture
def panel(explorer):
    return explorer.panel()


def controls(panel) -> dict:
    """The controls by their label, in the order of the tab key."""
    found, waiting = {}, [panel.widget]
    while waiting:
        widget = waiting.pop(0)
        waiting[:0] = getattr(widget, "children", ())
        if getattr(widget, "description", ""):
            found.setdefault(f"{widget.description} {type(widget).__name__}", widget)
    return found


def test_every_control_has_a_label(panel):
    assert list(controls(panel)) == [
        "v_proj Checkbox", "v_proj FloatLogSlider", "lm_head Checkbox", "lm_head FloatLogSlider",
        "layer 0 Checkbox", "layer 1 Checkbox", "scales from ToggleButtons", "width (nats) FloatLogSlider",
        "rows in use SelectionSlider", "code Textarea",
    ]  # fmt: skip


def test_a_change_of_a_control_is_a_change_of_the_setting(panel, explorer):
    by_name = controls(panel)
    by_name["v_proj FloatLogSlider"].value = 0.31622
    by_name["lm_head Checkbox"].value = False
    by_name["layer 0 Checkbox"].value = False
    by_name["rows in use SelectionSlider"].value = 12
    expected = explorer.at(scales={"v_proj": 0.3162, "lm_head": 0.0}, layers=[1], rows=12)
    assert panel.result.settings == expected.settings
    assert panel.result.log_evidence == expected.log_evidence
    assert panel._out.value.startswith(expected.html()[:50])
    assert f"{expected.log_evidence:,.1f}" in panel._out.value
    assert by_name["code Textarea"].value == expected.code
    assert by_name["lm_head FloatLogSlider"].disabled
    assert "s for this change" in panel._out.value


def test_sliders_follow_the_evidence_and_keep_what_it_chose(panel, explorer):
    by_name = controls(panel)
    assert by_name["width (nats) FloatLogSlider"].disabled
    by_name["scales from ToggleButtons"].value = "half-normal"
    chosen = explorer.at(law="half-normal").scale
    assert panel.result.scale == chosen
    for name, value in chosen.items():
        slider = by_name[f"{name} FloatLogSlider"]
        assert slider.disabled
        assert slider.value == pytest.approx(value, rel=1e-6)
    by_name["scales from ToggleButtons"].value = "fixed"
    assert panel.result.settings.law == "fixed"
    assert {n: s for n, s in panel.result.scale.items()} == pytest.approx(chosen, rel=1e-4)


def test_the_step_to_which_the_page_moves_a_slider_changes_nothing(panel):
    by_name, before = controls(panel), panel.result
    by_name["scales from ToggleButtons"].value = "half-normal"
    chosen = panel.result
    for name in before.scale:
        slider = by_name[f"{name} FloatLogSlider"]
        slider.value = 10 ** (0.05 * round(np.log10(slider.value) / 0.05))
    assert panel.result is chosen
    by_name["scales from ToggleButtons"].value = "fixed"
    assert panel.result.scale == chosen.scale
    slider.value *= 10**0.05
    assert panel.result.scale != chosen.scale


def test_an_error_is_a_sentence_and_the_result_stays(explorer):
    panel = bl.explore(explorer.tangent, explorer.train[np.argsort(ROWS.labels)], NEW).panel()
    before = panel.result
    controls(panel)["rows in use SelectionSlider"].value = 2
    assert panel.result is before
    assert panel._out.value.startswith("<p role='alert'>")
    assert "at least two classes" in panel._out.value


def test_changes_in_quick_succession_are_computed_once(panel, monkeypatch):
    shown = []
    monkeypatch.setattr(panel, "_show", lambda: shown.append(panel._rows.value))

    async def keys() -> None:
        for rows in (2, 3, 6):
            panel._rows.value = rows
        await asyncio.sleep(0.5)

    asyncio.run(keys())
    assert shown == [6]


def test_without_ipywidgets_a_sentence_says_what_to_do(explorer, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ModuleNotFoundError, match="need ipywidgets: pip install ipywidgets; without it"):
        explorer.panel()
    explorer._ipython_display_()
    assert "pip install ipywidgets" in capsys.readouterr().out


@pytest.mark.slow
def test_the_library_does_not_import_ipywidgets():
    code = "import sys, bnlora as bl; bl.explore; assert 'ipywidgets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
