"""The floor plan: a module imports only from the floors below its own, and files and functions stay small."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "typing": 0, "data": 0, "assets": 0, "progress": 0, "display": 0, "tables": 0,
    "kernels": 0, "kernels.api": 0, "kernels.reference": 0,
    "gp": 1, "ranks": 1, "sites": 1, "metrics": 1, "text": 1,
    "models": 1, "models.layers": 1, "models.gguf": 1, "models.loading": 1,
    "priors": 2, "flows": 2, "calibration": 2, "models.llama": 2,
    "base": 3, "model": 3, "guides": 3, "elbo": 3, "posterior": 3, "cache": 3,
    "svi": 4, "predict": 4, "prior_predictive": 4, "validation": 4, "testing": 4,
    "diagnostics": 5, "plots": 5, "sbc": 5, "checkpoint": 5, "report": 5, "recipe": 5, "experiment": 5,
    "__init__": 6, "cli": 6, "demo": 6, "__main__": 7,
}  # fmt: skip
# Within a floor these pairs are allowed: the right one is part of the left one's own job.
SAME_FLOOR = {
    ("svi", "validation"), ("validation", "predict"), ("cli", "demo"), ("experiment", "recipe"),
    ("kernels.api", "kernels.reference"), ("models.loading", "models.gguf"), ("guides", "flows"),
    ("report", "plots"),
}  # fmt: skip


def sources() -> dict[str, Path]:
    found = {path.stem: path for path in (ROOT / "bnlora").glob("*.py")}
    for package in ("models", "kernels"):
        for path in (ROOT / package).glob("*.py"):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


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
    for end in (3, 2):
        if ".".join(parts[1:end]) in FLOORS:
            return ".".join(parts[1:end])
    return "__init__"


def test_every_module_has_a_floor():
    assert set(sources()) == set(FLOORS)


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_come_from_below(module):
    for name in imports(sources()[module]):
        target = inside(name)
        if target is not None and target != module and (module, target) not in SAME_FLOOR:
            assert FLOORS[target] < FLOORS[module], f"{module} imports {target}"


def test_kernels_import_jax_alone():
    allowed = {"jax", "jaxtyping", "bnlora", *sys.stdlib_module_names}
    for module, path in sources().items():
        if module.startswith("kernels"):
            assert {name.split(".")[0] for name in imports(path)} <= allowed, module


def test_models_know_nothing_of_probability():
    for module, path in sources().items():
        if module.startswith(("models", "kernels")):
            assert not any(name.startswith(("numpyro", "bnlora.sites")) for name in imports(path)), module


@pytest.mark.parametrize("library", ["arviz_base", "arviz_stats", "matplotlib", "blackjax"])
def test_a_heavy_library_is_imported_in_one_file(library):
    users = {m for m, path in sources().items() if any(n.split(".")[0] == library for n in imports(path))}
    assert len(users) <= 1


@pytest.mark.parametrize("module", sorted(sources()))
def test_files_and_functions_are_small(module):
    text = sources()[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 40, f"{module}.{node.name} has {length} lines"
