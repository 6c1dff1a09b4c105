"""Pages of the API reference, from the package as it stands: whatever is public gets its entry.

The package is read, never imported. Names at its top go to the page of the group that their module is in, and
a module that no group names gets a page of its own; a public module at the top is a page of its own too.
"""

import re
from collections.abc import Mapping
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
        "Base, sites and data": ("base", "sites", "data", "text", "model", "conditional", "cache"),
        "Tangent model": ("tangent",),
        "Fit and predict": ("svi", "fits", "validation", "plateau", "predict", "prior_predictive", "reading"),
        "Samplers": ("mcmc", "certificate"),
        "Comparison": ("comparison",),
        "Save, load and exchange": ("checkpoint", "peft"),
    }
)
"""Title of a page and the modules whose names at the top of the package it shows, in this order."""

INSIDE: tuple[str, ...] = (
    "gp",
    "frame",
    "affine",
    "elbo",
    "distributions",
    "flows",
    "functions",
    "certificate",
    "mcmc.options",
    "calibration",
    "ranks",
    "selective",
    "display",
    "testing",
    "assets",
    "tables",
    "recipe",
    "outcome",
    "models.execution",
    "kernels.api",
    "kernels.reference",
)
"""Modules that are not at the top of the package and that a reader may want to know."""

_HANDED_ON = re.compile(rf"^from {PACKAGE}\.\S+ import (\w+) as \1$", re.MULTILINE)
"""As typing has it: a name that is imported as itself is public where it is imported."""

_ALONE = {"members": "false", "show_root_full_path": "true", "heading_level": "2"}


@dataclass
class Page:
    """A page of the reference.

    Attributes:
        title: Its title.
        modules: Modules on it with the full names of what they offer.
        notes: What the file of a name says at its top, by the first name out of it.
    """

    title: str
    modules: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where the page is in the documents."""
        return f"api/{self.title.lower().replace(',', '').replace(' ', '-').replace('.', '-')}.md"

    def markdown(self) -> str:
        """The page for mkdocstrings: each module with its docstring, then its members."""
        parts = [f"# {self.title}\n"]
        for module, names in self.modules.items():
            parts.append(_entry(module, _ALONE))
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
    """What a module offers with a docstring: what a package takes from its modules, others define."""
    if module.is_init_module:
        names = [name for name, path in module.imports.items() if path.startswith(f"{PACKAGE}.")]
    else:
        names = [name for name, member in module.members.items() if not member.is_alias]
        names = [*_HANDED_ON.findall(Path(module.filepath).read_text(encoding="utf-8")), *names]
    return [name for name in names if not name.startswith("_") and _described(module[name])]


def _described(member: griffe.Object | griffe.Alias) -> bool:
    """Whether there is a docstring; constants that are unpacked from a tuple are not even found."""
    try:
        return member.has_docstring and not member.is_module
    except griffe.AliasResolutionError:
        return False


def pages(package: griffe.Module) -> list[Page]:
    """All pages: the groups, then public modules, then modules inside."""
    by_module = {module: title for title, modules in GROUPS.items() for module in modules}
    found = {title: Page(title) for title in GROUPS}
    inside = Page("Inside the library")
    public = {name: path for name, path in package.imports.items() if not name.startswith("_")}
    modules = [name for name in public if package[name].is_module]
    for name in modules:
        offered = _offered(package, name)
        found[name] = Page(f"{PACKAGE}.{name}", offered, _notes(package[name], offered))
    for name, path in public.items():
        home = path.split(".")[1]
        if name in modules or home in modules:
            continue  # names of a module that is public itself are on its page
        page = found.setdefault(by_module.get(home, home), Page(by_module.get(home, f"{PACKAGE}.{home}")))
        page.modules.setdefault(f"{PACKAGE}.{home}", []).append(f"{PACKAGE}.{name}")
    for module in INSIDE:
        inside.modules |= _offered(package, module)
    made = [*found.values(), inside]
    for page in made:
        page.modules = dict(sorted(page.modules.items(), key=lambda item: _place(item[0])))
    return made


def _place(module: str) -> int:
    order = [name for modules in GROUPS.values() for name in modules]
    short = module.removeprefix(f"{PACKAGE}.")
    return order.index(short) if short in order else len(order)


def _offered(package: griffe.Module, module: str) -> dict[str, list[str]]:
    """Names of a module, shorter for those that stand at the top of the package too."""
    path = f"{PACKAGE}.{module}"
    names = [f"{path}.{name}" for name in exported(package[module])]
    short = {path: f"{PACKAGE}.{name}" for name, path in package.imports.items()}
    return {path: sorted((short.get(name, name) for name in names), key=lambda name: name.count(".") > 1)}


def _notes(package: griffe.Module, offered: Mapping[str, list[str]]) -> dict[str, str]:
    """The docstrings of the files of a package, each at the first name that is taken from it."""
    notes: dict[str, str] = {}
    if not package.is_init_module:
        return notes
    files = {**package.modules, **package.extra[HIDDEN]}
    for name in (name for names in offered.values() for name in names):
        file = files.get(package.imports[name.rpartition(".")[2]].split(".")[-2])
        text = file.docstring.value if file is not None and file.docstring else ""
        if text and text not in notes.values():
            notes[name] = text
    return notes


def index(package: griffe.Module, made: list[Page]) -> str:
    """The first page: every public name with the first line of its docstring."""
    parts = [
        "# API reference\n",
        "Import the library as `import bnlora as bl`. Shapes stand in the annotations, by "
        '[jaxtyping](https://docs.kidger.site/jaxtyping/): `Float[Array, "n c"]` is an array of floats with '
        "an axis of length `n` and one of length `c`, `...` stands for any leading axes, and a name means "
        "one length throughout a signature. Nothing checks them at run time.\n",
    ]
    for page in made:
        parts += [f"## [{page.title}]({page.path.removeprefix('api/')})\n", "| name | |", "|---|---|"]
        for names in page.modules.values():
            parts += [
                f"| [`{name.removeprefix('bnlora.')}`][{name}] | {_first(package, name)} |" for name in names
            ]
        parts.append("")
    return "\n".join(parts)


def _first(package: griffe.Module, name: str) -> str:
    found = package[name.removeprefix(f"{PACKAGE}.")]
    text = found.docstring.value if found.docstring else ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
