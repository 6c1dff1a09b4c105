"""The floor plan: a module imports only from the floors below its own, and files and functions stay small."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package is named after its folder. It stands on the floor given here, with every member that has none of
# its own: `bnlora/inference/swag.py` is `inference.swag` and stands on the floor of `inference`.
FLOORS = {
    "typing": 0, "data": 0, "assets": 0, "progress": 0, "display": 0, "tables": 0, "checks": 0, "files": 0,
    "scores": 0, "copying": 0, "kernels": 0, "formats": 0, "compilation": 0, "fingerprint": 0,
    "gp": 1, "distributions": 1, "ranks": 1, "sites": 1, "metrics": 1, "text": 1, "monte_carlo": 1,
    "labels": 1, "affine": 1, "frame": 1, "plateau": 1,
    "models": 1, "models.layers": 1, "models.execution": 1, "models.gguf": 1, "models.loading": 1,
    "models.gguf_file": 1, "models.tensors": 1, "priors": 2, "flows": 2, "calibration": 2, "certificate": 2,
    "program": 2,
    "models.llama": 2, "models.llama_config": 2,
    "base": 3, "model": 3, "guides": 3, "elbo": 3, "posterior": 3, "cache": 3, "density": 3,
    "maximise": 3, "accumulate": 3,
    "conditional": 4, "svi": 4, "fits": 4, "predict": 4, "functions": 4, "samplers": 4,
    "watch": 4, "tangent": 4,
    "prior_predictive": 4, "prior_draws": 3, "validation": 4, "testing": 4,
    "diagnostics": 5, "plots": 5, "sbc": 5, "checkpoint": 5, "report": 5, "recipe": 5, "tangent.fit": 5,
    "ranking": 5, "tangent.calibrate": 5, "tangent.stored": 5,
    "inference": 5, "mcmc": 5, "comparison": 5, "peft": 5, "selective": 5, "reading": 5, "comparison.khat": 4,
    "__init__": 6, "experiment": 6, "outcome": 7, "results": 7, "demo": 8,
    "kept": 8, "options": 9, "cli": 9, "__main__": 10,
}  # fmt: skip
# Within a floor these pairs are allowed: the right one is part of the left one's own job.
SAME_FLOOR = {
    ("distributions", "gp"), ("prior_draws", "density"), ("scores", "checks"), ("density", "guides"),
    ("density", "posterior"),
    ("elbo", "guides.automatic"), ("svi", "fits"), ("svi", "validation"), ("validation", "predict"),
    ("maximise", "elbo"), ("functions", "predict"),
    ("models.loading", "models.gguf"), ("guides", "flows"),
    ("tables", "formats"), ("tables", "files"), ("text", "labels"), ("data", "display"), ("data", "checks"),
    ("report", "plots"), ("plots.comparison", "comparison.report"), ("cli", "options"),
    ("plots.uncertainty", "selective"), ("frame", "sites"), ("svi", "watch"), ("watch", "validation"),
    ("sbc", "ranking"), ("tangent.calibrate", "sbc"), ("tangent.stored", "checkpoint"),
}  # fmt: skip


def sources() -> dict[str, Path]:
    """Every file of the library by the name that follows `bnlora.` when it is imported."""
    found = {path.stem: path for path in (ROOT / "bnlora").glob("*.py")}
    for folder in packages():
        for path in folder.glob("*.py"):
            found[folder.name if path.stem == "__init__" else f"{folder.name}.{path.stem}"] = path
    return found


def packages() -> list[Path]:
    """Folders of packages below the library; two of them are links to the top of the repository."""
    return [path.parent for path in sorted((ROOT / "bnlora").glob("*/__init__.py"))]


def floor(module: str) -> int:
    return FLOORS[module] if module in FLOORS else FLOORS[package(module)]


def package(module: str) -> str:
    return module.split(".")[0]


def is_allowed(module: str, target: str) -> bool:
    """Whether a module may import another: from below, or what is part of its own job."""
    if target == module or (module, target) in SAME_FLOOR or floor(target) < floor(module):
        return True
    # A package gathers its members, and they may use each other, but none of them the package as a whole.
    return package(module) == package(target) != target and floor(target) == floor(module)


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, `from x import y` counting as `x.y`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str) -> str | None:
    """The module of this library that an imported name belongs to."""
    parts = name.split(".")
    if parts[0] != "bnlora":
        return None
    known = sources()
    for end in (3, 2):
        if ".".join(parts[1:end]) in known:
            return ".".join(parts[1:end])
    return "__init__"


def test_every_module_has_a_floor_and_every_floor_a_module():
    found = sources()
    assert {module for module in found if module not in FLOORS and package(module) not in FLOORS} == set()
    assert set(FLOORS) <= set(found)


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_come_from_below(module):
    for name in imports(sources()[module]):
        target = inside(name)
        assert target is None or is_allowed(module, target), f"{module} imports {target}"


def test_members_of_a_package_know_each_other_but_not_the_package():
    assert is_allowed("inference", "inference.swag")
    assert is_allowed("inference.swag", "inference.mode")
    assert is_allowed("inference.swag", "svi")
    assert not is_allowed("inference.swag", "inference")
    assert not is_allowed("svi", "inference.swag")
    assert not is_allowed("inference.swag", "recipe")
    assert not is_allowed("models.layers", "models.llama")


def test_the_project_file_names_every_package():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert set(stated["packages"]) == {"bnlora"} | {f"bnlora.{folder.name}" for folder in packages()}


def test_kernels_import_jax_alone():
    allowed = {"jax", "jaxtyping", "bnlora", *sys.stdlib_module_names}
    for module, path in sources().items():
        if module.startswith("kernels"):
            assert {name.split(".")[0] for name in imports(path)} <= allowed, module


def test_models_know_nothing_of_probability():
    for module, path in sources().items():
        if module.startswith(("models", "kernels")):
            assert not any(name.startswith(("numpyro", "bnlora.sites")) for name in imports(path)), module


def users(library: str) -> set[str]:
    """The modules that import a library."""
    return {m for m, path in sources().items() if any(n.split(".")[0] == library for n in imports(path))}


@pytest.mark.parametrize("library", ["arviz_base", "arviz_stats", "blackjax", "ot", "sklearn"])
def test_a_heavy_library_is_imported_in_one_file(library):
    assert len(users(library)) <= 1


def test_only_the_package_of_plots_imports_matplotlib():
    assert {package(module) for module in users("matplotlib")} == {"plots"}


@pytest.mark.parametrize("module", sorted(sources()))
def test_files_and_functions_are_small(module):
    text = sources()[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 40, f"{module}.{node.name} has {length} lines"
