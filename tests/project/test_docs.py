"""The pages of the documentation site run as they stand, and nothing that is public is missing from it."""

import doctest
import inspect
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import typer

import bnlora as bl
from bnlora.app.cli import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^([ ]*)```(python|pycon)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
SLOW = {"guides/diagnose.md", "guides/nuts.md"}
"""Pages with several programs to compile."""

THOROUGH = {"guides/likelihoods.md", "guides/memory.md", "guides/resume.md"}
"""Such pages whose steps are also those of one test file."""


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and text of the pieces of Python of a page, in order."""
    return [
        (kind, textwrap.dedent(text)) for _, kind, text in BLOCK.findall(path.read_text(encoding="utf-8"))
    ]


def _marks(name: str) -> list[pytest.MarkDecorator]:
    if name in THOROUGH:
        return [pytest.mark.thorough]
    return [pytest.mark.slow] if name in SLOW else []


PAGES = [
    pytest.param(path, id=name, marks=_marks(name))
    for path in sorted(DOCS.rglob("*.md"))
    if blocks(path)
    for name in [path.relative_to(DOCS).as_posix()]
]


@pytest.mark.parametrize("path", PAGES)
def test_the_code_of_a_page_runs_and_prints_what_it_says(path, tiny_folder, tmp_path, monkeypatch, capsys):
    """In one namespace from top to bottom; only the pages on data and outcomes take their base as given."""
    monkeypatch.chdir(tmp_path)
    names = {"base": bl.load(tiny_folder)} if path.name in ("data.md", "likelihoods.md") else {}
    runner = doctest.DocTestRunner()
    for kind, text in blocks(path):
        if kind == "python":
            exec(compile(text, str(path), "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(text, names, path.name, str(path), 0)
        assert runner.run(test, clear_globs=False).failed == 0
        names |= test.globs  # a doctest works on a copy
    if path.name == "core.md":
        the_steps_of_the_core_prior_agree(names, capsys.readouterr().out)


def the_steps_of_the_core_prior_agree(names: dict, printed: str) -> None:
    assert "labels unused" in printed
    assert "gain in evidence" in printed
    gaussian, fit = names["gaussian"], names["fit"]
    assert abs(gaussian.log_evidence - fit.history["elbo"][-20:].mean()) < 2


@pytest.mark.parametrize(
    "path", [*sorted(DOCS.rglob("*.md")), ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_code_is_as_wide_as_a_page(path):
    """Beside two sidebars at 1280 pixels a page has room for about 90 characters of code."""
    code = re.findall(r"^ *```\w+\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert [line for block in code for line in block.split("\n") if len(line) > 88] == []


def commands() -> list[str]:
    """Every command of the library in a shell block of a page or the README."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *DOCS.rglob("*.md"))]
    found = [
        line
        for text in texts
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.split("\n")
    ]
    return sorted({line.split("  #")[0].strip() for line in found if line.strip()})


@pytest.mark.parametrize("line", commands())
def test_shell_blocks_name_commands_and_options_that_exist(line):
    """They are parsed by the parser of the command itself, and not run."""
    program, *arguments = shlex.split(line.removeprefix("XLA_FLAGS=--xla_force_host_platform_device_count=8"))
    if program == "python":
        assert arguments == ["script.py"]  # the reader's own
        return
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return
    if program == "pip":
        assert arguments == ["install", "."]
        return
    assert program == "bnlora"
    group = typer.main.get_command(app)
    if "--help" in arguments:
        assert arguments[0] in {*group.commands, "--help"}
        return
    context = group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    assert context.params


def test_every_public_plot_is_in_the_gallery():
    pictures = runpy.run_path(str(DOCS / "gallery.py"))["PICTURES"]
    public = {
        name for name, _ in inspect.getmembers(bl.plots, inspect.isfunction) if not name.startswith("_")
    }
    assert {name for name, picture in pictures.items() if picture.home == "bnlora.plots"} == public
    assert all(hasattr(bl, name) for name, picture in pictures.items() if picture.home == "bnlora")
    assert all(picture.title and picture.caption for picture in pictures.values())


PACKAGES = (
    "approximate", "comparison", "conformal", "decisions", "diagnostics", "guides", "mcmc", "metrics",
    "monitor", "plots", "priors", "risk_control", "sbc", "selective",
)  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    """The package as the reference reads it, and its pages."""
    pytest.importorskip("griffe")
    sys.path.insert(0, str(DOCS))
    try:
        import reference
    finally:
        sys.path.remove(str(DOCS))
    return reference.load(), reference


def test_every_public_name_is_in_the_reference(reference):
    package, made = reference
    shown = {name for page in made.pages(package) for names in page.modules.values() for name in names}
    offered = {f"bnlora.{name}" for name in vars(bl) if not name.startswith("_")}
    modules = {f"bnlora.{name}" for name, value in vars(bl).items() if inspect.ismodule(value)}
    assert offered - modules <= shown
    assert "bnlora.metrics.nll" in shown  # of another module, and handed on
    for module in PACKAGES:
        room = getattr(bl, module)
        public = {n for n, x in vars(room).items() if inspect.isfunction(x) or inspect.isclass(x)}
        home = "bnlora." if hasattr(room, "__path__") else room.__name__  # a single module shows its own
        own = {n for n in public if getattr(room, n).__module__.startswith(home) and n[0] != "_"}
        top = {n for n in own if getattr(bl, n, None) is getattr(getattr(bl, module), n)}
        assert {f"bnlora.{module}.{name}" for name in own - top} <= shown


def test_names_and_shapes_are_read_as_they_are_meant(reference):
    package, _ = reference
    assert package["priors.normal"].is_function  # and not the file of that name
    assert str(package["metrics.nll"].parameters["log_probs"].annotation) == 'Float[np.ndarray, "n c"]'
    assert str(package["priors.gp.conditional_kl"].returns) == 'Float[Array, "..."]'
    assert str(package["prediction.functions.update_norm"].returns) == 'Float[Array, ""]'


@pytest.fixture
def check():
    return runpy.run_path(str(DOCS / "check_site.py"))


def write(folder: Path, **pages: str) -> Path:
    for name, body in pages.items():
        (folder / f"{name}.html").write_text(f"<html><body>{body}</body></html>", encoding="utf-8")
    return folder


def test_broken_links_anchors_and_files_of_other_hosts_are_found(check, tmp_path):
    good = (
        '<a href="other.html#here">x</a> <a href="https://example.org/">x</a> <a href="#top" id="top">x</a>'
    )
    site = write(tmp_path, index=good, other='<p id="here"></p>')
    assert check["broken_links"](site) == []
    write(tmp_path, index='<a href="gone.html">x</a>', other='<a href="index.html#gone">x</a>')
    write(tmp_path, third='<script src="https://example.org/x.js"></script>')
    found = " ".join(check["broken_links"](site))
    for piece in (
        "gone.html, which does not exist",
        "#gone, a page without that anchor",
        "from another host",
    ):
        assert piece in found


def test_a_browser_finds_errors_and_what_is_too_wide(check, tmp_path):
    pytest.importorskip("playwright")
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no Chromium here")
    icon = '<link rel="icon" href="data:,">'
    wide = '<div class="md-content"><p style="width: 600px">wide</p></div>'
    write(tmp_path, fine=f'{icon}<div class="md-content">fine</div>', wide=icon + wide)
    write(tmp_path, error=f"{icon}<script>console.error('broken'); nothing()</script>")
    write(tmp_path, asks=f'{icon}<img src="http://127.0.0.1:9/x.png">')
    found = check["seen_by_a_browser"](tmp_path, browser)
    pages = {problem.split(" ")[0] for problem in found}
    assert pages == {"/wide.html", "/error.html", "/asks.html"}
    for piece in ("wider than a phone", "to the console: broken", "fails in a script", "from another host"):
        assert any(piece in problem for problem in found)
