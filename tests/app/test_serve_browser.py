"""The page of the service in headless Chromium: a phone, a dark page, and the keyboard."""

import io
import shutil

import jax
import numpy as np
import pytest

import bnlora as bl
from bnlora.app.serve.watch import Watching
from bnlora.assess.monitor import Monitor

pytest.importorskip("fastapi")
from builders.served import TEXTS, listening, opened, rows_of  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
TOO_WIDE = """() => [...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
  && !e.closest('.wide *') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"""


def alarmed() -> Monitor:
    """A monitor with rows, labels and alarms."""
    random = np.random.default_rng(0)

    def rows(count, scale):
        by_draw = scale * random.normal(size=count) + 0.3 * random.normal(size=(4, count))
        logits = np.stack([-np.logaddexp(0, by_draw), -np.logaddexp(0, -by_draw)], -1)
        return bl.Prediction(logits), random.random(count) < 1 / (1 + np.exp(-by_draw[0]))

    first, labels = rows(300, 2.0)
    monitor = Monitor.start(jax.random.key(0), first, labels.astype(int))
    for day in range(30):
        prediction, labels = rows(20, 2.0 if day < 12 else 0.6)
        labels = labels ^ (random.random(20) < (0.0 if day < 12 else 0.4))
        monitor = monitor.update(prediction, labels.astype(int), f"2026-12-{day + 1:02} 10:00 UTC")
    return monitor


@pytest.fixture(scope="module")
def address(service):
    """The address of a service whose monitor has raised alarms."""
    with listening(service, watching=Watching(alarmed(), {})) as (place, _):
        yield f"http://127.0.0.1:{place[1]}"


@pytest.fixture
def tab(tmp_path):
    """A tab of Chromium as wide as a phone, dark, and what went wrong in it."""
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as started:
        context = started.chromium.launch_persistent_context(
            tmp_path, executable_path=BROWSER, headless=True, args=FLAGS,
            viewport={"width": 390, "height": 844}, color_scheme="dark",
        )  # fmt: skip
        tab, wrong = context.pages[0], []
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("requestfailed", lambda request: wrong.append(request.url))
        yield tab
        assert wrong == []
        context.close()


@pytest.mark.thorough
def test_the_page_on_a_phone_in_the_dark_by_keyboard(tab, address):
    from PIL import Image

    tab.goto(f"{address}/")
    assert tab.evaluate(TOO_WIDE) == []
    assert "alarm" in tab.title()
    assert "Alarm: " in tab.inner_text("p.state")
    shot = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("L"), float)
    assert np.median(shot) < 60  # a dark page
    assert shot.max() > 200  # with light letters
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.tagName") == "SUMMARY"
    assert not tab.locator("details table").is_visible()
    tab.keyboard.press("Enter")
    assert tab.locator("details table").is_visible()
    assert tab.evaluate(TOO_WIDE) == []
    tab.keyboard.press("Tab")  # a table that is too wide for a phone scrolls by keyboard
    before = tab.evaluate("document.activeElement.scrollLeft")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function(f"document.activeElement.scrollLeft > {before}")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Stop that"
    assert tab.locator("meta[http-equiv=refresh]").count() == 1
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/?reload=off")
    assert tab.locator("meta[http-equiv=refresh]").count() == 0
    assert tab.inner_text("main").count("Reload it") == 1


def test_the_page_without_a_browser_has_what_the_browser_test_looks_for(service):
    with opened(service, watching=Watching(alarmed(), {})) as client:
        rows_of(client, TEXTS)
        for query, count in (("", 1), ("?reload=off", 0), ("?reload=on", 1)):
            assert client.get(f"/{query}").text.count('http-equiv="refresh"') == count
