"""The floor plan: a module imports only from the floors below its own, and files and functions stay small."""

import ast
import graphlib
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {
    "_util": 0,
    "kernels": 1, "data": 1, "metrics": 1,
    "models": 2,
    "base": 3, "adapters": 3,
    "priors": 4,
    "guides.flows": 4, "guides": 5,
    "program": 6, "program.tangent": 7,
    "prediction": 8,
    "infer.svi": 9, "infer.mcmc": 10, "infer.approximate": 11, "infer.core": 11, "infer": 11,
    "testing": 10,
    "assess": 12, "assess.comparison": 13, "assess.sbc": 13, "assess.diagnostics": 13, "assess.monitor": 13,
    "assess.explore": 13,
    "plots": 14,
    "__init__": 15, "app": 16, "__main__": 17,
}  # fmt: skip
"""Rooms from the ground up. A module imports from rooms below its own, and from its own room."""


@cache
def sources() -> dict[str, Path]:
    """Every file of the library by the name that follows `bnlora.` when it is imported."""
    found = {}
    for path in (ROOT / "bnlora").glob("*.py"):
        found[path.stem] = path
    for folder in packages():
        for path in folder.glob("*.py"):
            found[dotted(folder) if path.stem == "__init__" else f"{dotted(folder)}.{path.stem}"] = path
    return found


def packages() -> list[Path]:
    """Folders of packages below the library; two of them are links to the top of the repository."""
    links = [ROOT / "bnlora" / "models", ROOT / "bnlora" / "kernels"]
    below = [path.parent for path in (ROOT / "bnlora").glob("*/**/__init__.py")]
    return sorted({*links, *below})


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "bnlora").parts)


def room(module: str) -> str:
    """The innermost room that has a floor: `infer.svi` for `infer.svi.elbo`."""
    parts = module.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next(name for name in names if name in FLOORS)


def package(module: str) -> str:
    return module.split(".")[0]


def is_allowed(module: str, target: str) -> bool:
    """Whether a module may import another: from below, or another member of its own room."""
    if room(module) == room(target):
        return target != room(module) or module == target
    return FLOORS[room(target)] < FLOORS[room(module)]


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
    for end in range(len(parts), 1, -1):
        if ".".join(parts[1:end]) in known:
            return ".".join(parts[1:end])
    return "__init__"


@cache
def arrows() -> dict[str, set[str]]:
    """What every module imports of this library."""
    return {m: {t for t in map(inside, imports(path)) if t and t != m} for m, path in sources().items()}


def test_the_rooms_are_few():
    own = {
        p.name
        for p in (ROOT / "bnlora").iterdir()
        if p.is_dir() and not p.is_symlink() and p.name[:2] != "__"
    }
    assert len(own) <= 12
    assert {path.stem for path in (ROOT / "bnlora").glob("*.py")} == {
        "__init__",
        "__main__",
        "base",
        "testing",
    }


def test_every_module_has_a_floor_and_every_floor_a_module():
    found = sources()
    assert {module for module in found if package(module) not in FLOORS} <= set()
    assert set(FLOORS) <= set(found)


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_come_from_below(module):
    for target in arrows()[module]:
        assert is_allowed(module, target), f"{module} imports {target}"


def test_there_is_no_circle():
    order = graphlib.TopologicalSorter(arrows())
    order.prepare()  # raises `CycleError`, which names the modules


def test_members_of_a_room_know_each_other_but_not_the_room():
    assert is_allowed("infer.approximate", "infer.approximate.swag")
    assert is_allowed("infer.approximate.swag", "infer.approximate.mode")
    assert is_allowed("infer.approximate.swag", "infer.svi.fit")
    assert not is_allowed("infer.approximate.swag", "infer.approximate")
    assert not is_allowed("infer.svi.fit", "infer.approximate.swag")
    assert not is_allowed("infer.approximate.swag", "app.recipe")
    assert not is_allowed("models.layers", "guides.guide")


def test_tests_have_the_rooms_of_the_library():
    rooms = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert rooms - {"project"} <= {package(module) for module in sources()}
    assert not list((ROOT / "tests").glob("test_*.py"))


def test_the_project_file_names_every_package():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert set(stated["packages"]) == {"bnlora"} | {f"bnlora.{dotted(folder)}" for folder in packages()}


def test_kernels_import_jax_alone():
    allowed = {"jax", "jaxtyping", "bnlora", *sys.stdlib_module_names}
    for module, path in sources().items():
        if module.startswith("kernels"):
            assert {name.split(".")[0] for name in imports(path)} <= allowed, module


def test_models_know_nothing_of_probability():
    for module, path in sources().items():
        if module.startswith(("models", "kernels")):
            assert not any(name.startswith("numpyro") for name in imports(path)), module


def users(library: str) -> set[str]:
    """The modules that import a library."""
    return {m for m, path in sources().items() if any(n.split(".")[0] == library for n in imports(path))}


@pytest.mark.slow
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
