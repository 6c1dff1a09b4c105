"""The built wheel and source archive hold the whole library, under one name, and nothing else."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from builders.thorough import sample_of
from packaging.version import Version

import bnlora

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# uv makes an environment in a second.
BUILD = [sys.executable, "-m", "build", "--installer", "uv"]


def modules() -> list[Path]:
    """Every file of the library, those behind the two links too."""
    folders = [ROOT / "bnlora", ROOT / "bnlora" / "models", ROOT / "bnlora" / "kernels"]
    return sorted({path for folder in folders for path in folder.rglob("*.py")})


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Source archive, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([*BUILD, "--outdir", folder, ROOT], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_wheel_holds_every_module_once(built):
    (wheel,) = built.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    sources = modules()
    expected = {path.relative_to(ROOT).as_posix() for path in sources} | {"bnlora/py.typed"}
    assert names == expected
    assert wheel.stat().st_size < 1e6


@pytest.mark.slow
def test_source_archive_holds_the_real_folders(built):
    (archive,) = built.glob("*.tar.gz")
    names = {name.split("/", 1)[-1] for name in tarfile.open(archive).getnames()}
    own = {"bnlora/infer/svi/fit.py", "bnlora/infer/approximate/laplace.py", "LICENSE", "README.md"}
    assert {"models/llama.py", "kernels/api.py"} | own <= names
    assert not any(name.startswith(("benchmarks/", "bnlora/models/", "bnlora/kernels/")) for name in names)


@pytest.mark.slow
def test_wheel_is_imported_from_elsewhere(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import bnlora, bnlora.models.llama as m, bnlora.kernels.api; print(bnlora.__file__, m.__file__)"
    # The unpacked wheel comes first on the path; the dependencies are those of this Python.
    run = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"]
    out = subprocess.run(run, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert out.count(str(tmp_path / "site")) == 2


@pytest.mark.slow
def test_archives_say_the_version_of_the_tag_or_the_fallback(built):
    """A tree without git is what the wheel was built from: the version came out of the source archive."""
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    assert archive.name == f"bnlora-{version}.tar.gz"
    assert re.match(r"\d+\.\d+", version)


@pytest.mark.slow
def test_a_tree_without_git_or_tags_has_a_version(tmp_path):
    for name in ("bnlora", "models", "kernels", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / name)
    run = [*BUILD, "--wheel", "--outdir", tmp_path / "dist", tmp_path]
    subprocess.run(run, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.split("-")[1] == PROJECT["tool"]["setuptools_scm"]["fallback_version"]


def test_the_version_is_that_of_the_installed_package():
    assert bnlora.__version__ == metadata.version("bnlora")


def test_what_the_library_imports_is_what_it_depends_on():
    """No module may lean on what another dependency happens to bring along."""
    sources = modules()
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported = {name.split(".")[0] for name in named} - {"bnlora", *sys.stdlib_module_names}
    stated = distributions(PROJECT["project"]["dependencies"])
    packages = {"ot": "pot", "sklearn": "scikit_learn", "orbax": "orbax_checkpoint"}
    served = distributions(PROJECT["project"]["optional-dependencies"]["serve"])
    # Controls in a notebook; IPython comes with its kernel.
    noted = distributions(PROJECT["project"]["optional-dependencies"]["notebooks"]) | {"IPython"}
    assert {packages.get(name, name) for name in imported} <= stated | served | noted


def distributions(lines: list[str]) -> set[str]:
    """Names of the distributions of a list of dependencies."""
    return {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}


def test_only_the_service_imports_its_extra_and_only_inside_functions():
    served = distributions(PROJECT["project"]["optional-dependencies"]["serve"])
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        users = [
            n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and names(n) & served
        ]
        assert not users or path.parent.name == "serve", path
        assert not [node for node in tree.body if node in users], path


def names(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Top packages that a statement imports."""
    whole = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return {name.split(".")[0] for name in whole}


UV = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
PYTHONS, RESOLUTIONS = ("3.11", "3.12", "3.13"), ("lowest-direct", "highest")
SETS = {f"{python}, {resolution}": (python, resolution) for python in PYTHONS for resolution in RESOLUTIONS}
END = "3.11, lowest-direct"
"""What the other sets hold changes with the package index, and resolving them takes twenty seconds."""


def resolved(python: str, resolution: str, *options: str) -> dict[str, str]:
    """Version of every package in a set of dependencies, as the package index has it now."""
    if UV is None:
        pytest.skip("uv is not installed")
    run = [UV, "pip", "compile", "--quiet", "--no-header", "--no-annotate", ROOT / "pyproject.toml"]
    run += ["--python-version", python, "--resolution", resolution, *options]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if "Failed to fetch" in done.stderr or "error sending request" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^([\w-]+)==(\S+)", done.stdout, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(SETS, [END]))
def test_a_set_of_dependencies_has_a_jax_and_a_flax_that_go_together(name):
    """`flax.nnx` 0.12.8 cannot be imported with JAX 0.11.1, nor 0.12.9 with 0.11.2; neither states it."""
    found = resolved(*SETS[name])
    jax, flax = Version(found["jax"]), Version(found["flax"])
    assert flax == Version("0.12.8") if jax < Version("0.11.1") else flax >= Version("0.12.10"), found
    assert found["jax"] == found["jaxlib"]
    # Every one of them has a wheel for this Python: nothing is compiled where it is installed.
    assert resolved(*SETS[name], "--only-binary", ":all:") == found


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("BNLORA_MATRIX") != "1", reason="BNLORA_MATRIX=1 installs every set")
@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("python", PYTHONS)
def test_every_module_is_imported_with_a_set_of_dependencies(python, resolution, tmp_path):
    needed = tmp_path / "requirements.txt"
    needed.write_text("".join(f"{name}=={v}\n" for name, v in resolved(python, resolution).items()))
    found = subprocess.run(
        [UV, "python", "find", "--no-python-downloads", python], capture_output=True, text=True
    )
    if found.returncode:
        pytest.skip(f"there is no Python {python} here")
    code = "import pkgutil, importlib, bnlora; [importlib.import_module(m.name) for m in "
    code += "pkgutil.walk_packages(bnlora.__path__, 'bnlora.') if not m.name.endswith('__main__')]"
    run = [UV, "run", "--isolated", "--no-project", "--python", found.stdout.strip()]
    run += ["--with-requirements", needed, "python", "-c", code]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_citation_file_says_what_the_project_file_says():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["title"] == f"bnlora: {PROJECT['project']['description']}"
    assert cited["license"] == PROJECT["project"]["license"]
    assert cited["keywords"] == PROJECT["project"]["keywords"]
    assert {"cff-version", "message", "authors"} <= set(cited)


HEAVY = (
    "arviz_base arviz_plots arviz_stats blackjax datasets fastapi flax gguf huggingface_hub IPython "
    "jax.experimental.pallas jinja2 matplotlib optax orbax ot pandas pyarrow scipy.optimize scipy.stats "
    "sklearn tokenizers torch transformers typer xarray"
).split()


def test_importing_leaves_what_takes_long_for_later():
    code = f"import sys, bnlora; print([name for name in {HEAVY} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"


def test_names_that_come_later_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "bnlora" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    later = {(module, name) for module, names in bnlora._LATER.items() for name in names.split()}
    packages = {(module.rpartition(".")[0], name) for name, module in bnlora._PACKAGES.items()}
    assert seen == later | packages
    for _, name in seen:
        assert name in dir(bnlora)
        assert getattr(bnlora, name) is vars(bnlora)[name]  # kept, so that it is looked up once


def test_a_function_is_never_shadowed_by_a_module_of_its_name():
    """A module that is imported stands in its package: no name of later may be that of one."""
    below = {path.stem for path in (ROOT / "bnlora").iterdir()}
    assert not below & {name for names in bnlora._LATER.values() for name in names.split()}


def test_a_name_that_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(AttributeError, match="has no attribute 'sample_nutz'; the nearest is 'sample_nuts'"):
        _ = bnlora.sample_nutz


def test_importing_allocates_nothing_on_a_device():
    code = "import bnlora, jax; assert not jax._src.xla_bridge._backends, 'a backend was started'"
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_bare_names_of_the_folders_are_not_importable(tmp_path):
    code = "import importlib.util as u; assert not (u.find_spec('models') or u.find_spec('kernels'))"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path)
