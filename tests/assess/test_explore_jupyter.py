"""The controls of `bl.explore` in JupyterLab, in headless Chromium, by the keyboard alone.

It needs `jupyter-lab` with jupyterlab_widgets on the path, Playwright and Chromium. Pictures of the page are
kept in the folder that `BNLORA_PICTURES` names.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough
BROWSER, LAB = shutil.which("chromium"), shutil.which("jupyter-lab")
CELL = """
import jax
import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows

base, rows = tiny_base(jax.random.key(0), num_layers=2), tiny_rows(jax.random.key(1), 120)
train, validation = rows[:60], rows[60:]
targets = ["v_proj", "o_proj", "slope"]
frames = bl.frames(jax.random.key(2), base, targets, train, label_ids=(3, 5), size=4)
tangent = bl.Tangent(bl.Classifier(base, frames.sites, bl.priors.core(frames), label_ids=(3, 5)))
texts = [f"Sentence {i} of the validation rows, which is neither short nor long" for i in range(60)]
bl.explore(tangent, train, validation, texts=texts)
"""
EVIDENCE = re.compile(r"log evidence \(nats\)[\s\S]*?(-[\d.,]+)\s*(-[\d.,]+)")


def notebook(cell: str) -> str:
    code = {
        "cell_type": "code",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
        "source": cell,
        "id": "one",
    }
    kernel = {"kernelspec": {"name": "tested", "display_name": "tested", "language": "python"}}
    return json.dumps({"cells": [code], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})


@contextmanager
def served(folder: Path, cell: str, theme: str = "JupyterLab Light") -> Iterator[str]:
    """The address of JupyterLab with a notebook of one cell, whose kernel is this Python."""
    spec = folder / "jupyter" / "kernels" / "tested"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    about = {"argv": argv, "display_name": "tested", "language": "python", "env": env}
    (spec / "kernel.json").write_text(json.dumps(about), encoding="utf-8")
    settings = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}', encoding="utf-8")
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}), encoding="utf-8")
    (folder / "work").mkdir()
    (folder / "work" / "explore.ipynb").write_text(notebook(cell), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "JUPYTER_PATH": str(folder / "jupyter"),
        "HOME": str(folder),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
    }
    command = [
        LAB, "--no-browser", f"--port={port}", "--ip=127.0.0.1", "--allow-root", "--IdentityProvider.token=",
        f"--notebook-dir={folder / 'work'}", "--LabApp.news_url=", "--LabApp.check_for_updates_class="
        "jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/api")
            yield f"http://127.0.0.1:{port}/doc/tree/explore.ipynb"
        finally:
            server.terminate()
            server.wait(30)


def wait_for(address: str, seconds: float = 60) -> None:
    for _ in range(int(seconds * 5)):
        try:
            urllib.request.urlopen(address).read()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"nothing answers at {address}")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The notebook in a browser, after its cell has run."""
    pytest.importorskip("ipywidgets")
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None or LAB is None:
        pytest.skip("no Chromium or no JupyterLab here")
    folder = tmp_path_factory.mktemp("lab")
    with served(folder, CELL) as address, sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        tab = browser.new_page(viewport={"width": 1280, "height": 1400})
        tab.goto(address)
        tab.wait_for_selector(".jp-Cell .cm-content", timeout=60_000)
        tab.wait_for_timeout(2_000)
        tab.click(".jp-Cell .cm-content")
        tab.keyboard.press("Shift+Enter")
        tab.wait_for_selector(".jp-OutputArea-output svg[role=img]", timeout=180_000)
        yield tab
        browser.close()


def picture(page, name: str) -> None:
    folder = os.environ.get("BNLORA_PICTURES")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def evidence(page) -> str:
    """The log evidence that the page shows."""
    rows = page.locator(".jp-OutputArea-output .bnlora tr", has_text="log evidence (nats)")
    return rows.first.locator("td").last.inner_text()


def changed(page, before: str) -> str:
    """The evidence after it has changed."""
    for _ in range(300):  # the first choice of scales by evidence compiles
        if evidence(page) != before:
            return evidence(page)
        page.wait_for_timeout(100)
    raise AssertionError(f"the evidence stays at {before}")


def label(page) -> str:
    """The label of the control that has the focus."""
    return page.evaluate(
        """() => { const e = document.activeElement; if (e.tagName === 'BUTTON') return e.innerText.trim();
        const w = e.closest('.widget-inline-hbox, .jupyter-widgets');
        return w ? w.innerText.split('\\n')[0].trim() : e.tagName; }"""
    )


def to(page, name: str) -> None:
    """Press Tab until a control has the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if label(page).startswith(name):
            return
    raise AssertionError(f"Tab does not reach {name!r}")


def test_every_control_is_moved_by_keys(page):
    picture(page, "start")
    page.locator(".jp-OutputArea-output .widget-checkbox input").first.focus()
    before = evidence(page)
    page.keyboard.press("Space")
    before = changed(page, before)
    page.keyboard.press("Space")
    before = changed(page, before)
    to(page, "v_proj")
    page.keyboard.press("ArrowRight")
    before = changed(page, before)
    to(page, "layer 0")
    page.keyboard.press("Space")
    before = changed(page, before)
    to(page, "evidence, half-normal")
    page.keyboard.press("Space")
    before = changed(page, before)
    to(page, "rows in use")
    page.keyboard.press("ArrowLeft")
    changed(page, before)
    to(page, "code")
    assert "train[:45]" in page.evaluate("document.activeElement.value")
    picture(page, "moved")
