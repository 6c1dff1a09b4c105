"""Pages of the API reference, made from the package: every public name gets an entry.

The package is read and never imported. Each public package, for instance `bl.priors`, has a page. The other
names of `bl.` are on the page of the group that their module belongs to.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from types import MappingProxyType

import griffe
from names import HIDDEN, PublicNames

ROOT = Path(__file__).parents[1]
PACKAGE = "bnlora"

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Base, data and sites": ("base", "data", "adapters"),
        "Model": ("program",),
        "Fit": ("infer.svi", "infer.core"),
        "Predict": ("assess.prior_predictive", "assess.explore", "prediction"),
        "Save, load and exchange": ("infer.svi.checkpoint", "infer.core.stored", "adapters.peft"),
    }
)
"""Title of a page, and the rooms whose names in `bl.` it shows, in this order. The longest match wins."""

INSIDE: tuple[str, ...] = (
    "app.outcome",
    "app.recipe",
    "assess.sbc.core",
    "data.assets",
    "data.catalogue",
    "data.medical",
    "data.questions",
    "data.tables",
    "guides.affine",
    "guides.flows",
    "infer.mcmc.certificate",
    "infer.mcmc.options",
    "infer.svi.elbo",
    "kernels.api",
    "kernels.reference",
    "metrics.ranks",
    "models.execution",
    "prediction.functions",
    "prediction.selective",
    "priors.distributions",
    "priors.gp",
    "testing",
    "_util.display",
)
"""Modules whose names are not in `bl.` or a public package, but which a reader may want to know."""

_REEXPORTED = re.compile(rf"^from {PACKAGE}\.\S+ import (\w+) as \1$", re.MULTILINE)
"""The convention of type checkers: a name that is imported as itself is public where it is imported."""

_HEADING_ONLY = {"members": "false", "show_root_full_path": "true", "heading_level": "2"}


@dataclass
class Page:
    """A page of the reference.

    Attributes:
        title: Its title.
        modules: Modules on it, with the full names of their entries.
        notes: Docstring of a module, by the first name that comes from it.
    """

    title: str
    modules: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Path of the page in the documents."""
        return f"api/{self.title.lower().replace(',', '').replace(' ', '-').replace('.', '-')}.md"

    def markdown(self) -> str:
        """The page for mkdocstrings: each module with its docstring, then its members."""
        parts = [f"# {self.title}\n"]
        for module, names in self.modules.items():
            parts.append(_entry(module, _HEADING_ONLY))
            for name in names:
                parts.append(_entry(name, {"heading_level": "3"}))
                if name in self.notes:
                    parts.append(
                        f'??? note "From the top of its file"\n\n{indent(self.notes[name], "    ")}\n'
                    )
        return "\n".join(parts)


def _entry(name: str, options: Mapping[str, str]) -> str:
    lines = "\n".join(f"      {key}: {value}" for key, value in options.items())
    return f"::: {name}\n    options:\n{lines}\n"


def load() -> griffe.Module:
    """The package with its aliases resolved, without importing it."""
    extensions = griffe.load_extensions(PublicNames)
    loader = griffe.GriffeLoader(search_paths=[str(ROOT)], docstring_parser="google", extensions=extensions)
    package = loader.load(PACKAGE)
    loader.resolve_aliases()
    assert isinstance(package, griffe.Module)
    return package


def exported(module: griffe.Module) -> list[str]:
    """Public names of a module that have a docstring, including those that a package re-exports."""
    if module.is_init_module:
        names = [name for name, path in module.imports.items() if path.startswith(f"{PACKAGE}.")]
    else:
        names = [name for name, member in module.members.items() if not member.is_alias]
        names = [*_REEXPORTED.findall(Path(module.filepath).read_text(encoding="utf-8")), *names]
    return [name for name in names if not name.startswith("_") and _has_docstring(module[name])]


def _has_docstring(member: griffe.Object | griffe.Alias) -> bool:
    """Whether there is a docstring. Griffe cannot resolve constants that are unpacked from a tuple."""
    try:
        return member.has_docstring and not member.is_module
    except griffe.AliasResolutionError:
        return False


def pages(package: griffe.Module) -> list[Page]:
    """All pages: the groups, the public packages, and the modules inside the library."""
    public = {name: path for name, path in package.imports.items() if not name.startswith("_")}
    packages = {name: _within(path) for name, path in public.items() if package[name].is_module}
    made = {title: Page(title) for title in GROUPS}
    for name in sorted(packages):
        entries = _entries(package, name)
        made[name] = Page(f"bl.{name}", entries, _notes(package, name, entries))
    for name, path in public.items():
        home = _within(path.rpartition(".")[0])
        if name in packages or any(_is_in(home, room) for room in packages.values()):
            continue  # the page of the public package shows these
        title = _group(home)
        page = made.setdefault(title, Page(title))
        page.modules.setdefault(f"{PACKAGE}.{home}", []).append(f"{PACKAGE}.{name}")
    for page in made.values():
        page.modules = dict(sorted(page.modules.items(), key=lambda item: _rank(item[0])))
    return [*made.values(), _inside(package, made.values())]


def _inside(package: griffe.Module, others: Iterable[Page]) -> Page:
    """The page of `INSIDE`, without what other pages show under a shorter name."""
    names = {name for page in others for entries in page.modules.values() for name in entries}
    shown = {_canonical(package, name) for name in names}
    page = Page("Inside the library")
    for module in INSIDE:
        for path, entries in _entries(package, module).items():
            page.modules[path] = [name for name in entries if _canonical(package, name) not in shown]
    return page


def _canonical(package: griffe.Module, name: str) -> str:
    return package[_within(name)].canonical_path


def _within(path: str) -> str:
    return path.removeprefix(f"{PACKAGE}.")


def _is_in(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"{room}.")


def _group(module: str) -> str:
    """The title of a module's page; a module in no group has a page of its own."""
    matches = {room: title for title, rooms in GROUPS.items() for room in rooms if _is_in(module, room)}
    return matches[max(matches, key=len)] if matches else f"{PACKAGE}.{module}"


def _rank(module: str) -> tuple[int, str]:
    """Position of a module on its page: in the order of the rooms of `GROUPS`, then by name."""
    rooms = [room for rooms in GROUPS.values() for room in rooms]
    around = [room for room in rooms if _is_in(_within(module), room)]
    return (rooms.index(max(around, key=len)) if around else len(rooms), module)


def _entries(package: griffe.Module, module: str) -> dict[str, list[str]]:
    """Names of a module, by the module; a name that is in `bl.` too has its short path and comes first."""
    path = f"{PACKAGE}.{module}"
    target = _resolved(package[module])
    short = {path: f"{PACKAGE}.{name}" for name, path in package.imports.items()}
    names = []
    for name in exported(target):
        origin = target.imports.get(name, f"{target.path}.{name}")
        names.append(short.get(f"{target.path}.{name}", short.get(origin, f"{path}.{name}")))
    return {path: sorted(names, key=lambda name: name.count(".") > 1)}


def _resolved(module: griffe.Object | griffe.Alias) -> griffe.Module:
    """The module itself, where its name in `bl.` is an alias of a package further down."""
    return module.final_target if isinstance(module, griffe.Alias) else module


def _notes(package: griffe.Module, module: str, entries: Mapping[str, list[str]]) -> dict[str, str]:
    """Docstrings of the files of a package, each at the first name that comes from its file."""
    notes: dict[str, str] = {}
    target = _resolved(package[module])
    files = {**target.modules, **target.extra[HIDDEN]}
    for name in (name for names in entries.values() for name in names):
        origin = target.imports.get(name.rpartition(".")[2], "")
        file = (
            files.get(origin.split(".")[-2]) if origin else None
        )  # a module shows its own docstring already
        text = file.docstring.value if file is not None and file.docstring else ""
        if text and text not in notes.values():
            notes[name] = text
    return notes


def index(package: griffe.Module, made: list[Page]) -> str:
    """The first page: every public name with the first line of its docstring."""
    parts = [
        "# API reference\n",
        "Import the library as `import bnlora as bl`. Annotations state shapes in the notation of "
        '[jaxtyping](https://docs.kidger.site/jaxtyping/): `Float[Array, "n c"]` is an array of floats with '
        "an axis of length `n` and one of length `c`. `...` stands for any leading axes. A name means "
        "one length throughout a signature. Nothing checks shapes at run time.\n",
    ]
    for page in made:
        parts += [f"## [{page.title}]({page.path.removeprefix('api/')})\n", "| name | |", "|---|---|"]
        for names in page.modules.values():
            parts += [
                f"| [`{name.removeprefix('bnlora.')}`][{name}] | {_summary(package, name)} |"
                for name in names
            ]
        parts.append("")
    return "\n".join(parts)


def _summary(package: griffe.Module, name: str) -> str:
    """The first paragraph of a docstring, as a cell of a table."""
    member = package[_within(name)]
    text = member.docstring.value if member.docstring else ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
