"""Make griffe, which reads the package without importing it, see names, shapes and examples as a reader does.

- If a package takes a name from its module of the same name, the name is the object and not the module:
  `bnlora.priors.normal` is a function.
- The shape in a jaxtyping annotation stays a string, `Float[Array, "..."]`; griffe would parse it as code.
  A name that abbreviates such an annotation is written out.
- A section `Example:` of a docstring is code, as `Examples:` is.
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import griffe

SHAPED = ("jaxtyping.Float", "jaxtyping.Int", "jaxtyping.Bool")

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)

HIDDEN = "hidden modules"
"""Key of a package's `extra` for the modules that its members hide."""


class PublicNames(griffe.Extension):
    """Correct names, shapes and examples of a package after it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Change the package in place."""
        for module in _modules(pkg):
            for item, attribute in _annotated(module):
                setattr(item, attribute, _written_out(getattr(item, attribute), module))
            for docstring in _docstrings(module):
                docstring.value = _EXAMPLE.sub("Examples:", docstring.value)
        for module in _modules(pkg):
            _uncover(module)


def _modules(package: griffe.Module) -> list[griffe.Module]:
    """A package and all modules in it. A module that imports the package has it as an alias; skip these."""
    inside = (module for module in package.modules.values() if not module.is_alias)
    return [package, *(below for module in inside for below in _modules(module))]


def _docstrings(scope: griffe.Object) -> Iterator[griffe.Docstring]:
    """Docstrings of a module or class and of everything in it, except modules."""
    if scope.docstring:
        yield scope.docstring
    for member in scope.members.values():
        if not member.is_alias and not member.is_module:
            yield from _docstrings(member)


def _uncover(package: griffe.Module) -> None:
    """Replace modules by the members of the same name that hide them."""
    for name, path in package.imports.items():
        module = package.modules.get(name)
        if module is not None and path == f"{package.path}.{name}.{name}":
            package.extra[HIDDEN][name] = module
            package.set_member(name, module.members[name])


def _annotated(scope: griffe.Module | griffe.Class) -> Iterator[tuple[Any, str]]:
    """Everything with an annotation, and the name of the attribute that has it."""
    for member in scope.members.values():
        if isinstance(member, griffe.Class):
            yield from _annotated(member)
        elif isinstance(member, griffe.Attribute):
            yield member, "annotation"
        elif isinstance(member, griffe.Function):
            yield member, "returns"
            yield from ((parameter, "annotation") for parameter in member.parameters)


def _written_out(annotation: Any, module: griffe.Module) -> Any:
    """The annotation with its shapes as strings and without abbreviations of shaped arrays."""
    if isinstance(annotation, griffe.ExprName):
        meant = module.members.get(annotation.name)
        value = meant.value if isinstance(meant, griffe.Attribute) else None
        return _written_out(value, module) if _is_shaped(value) else annotation
    if _is_shaped(annotation):
        kind, shape = annotation.slice.elements
        annotation.slice.elements = [kind, f'"{str(shape).strip(chr(39) + chr(34)).strip()}"']
    elif isinstance(annotation, griffe.Expr):
        for part in fields(annotation):
            value = getattr(annotation, part.name)
            if isinstance(value, griffe.Expr):
                setattr(annotation, part.name, _written_out(value, module))
            elif isinstance(value, list):
                setattr(annotation, part.name, [_written_out(x, module) for x in value])
    return annotation


def _is_shaped(annotation: Any) -> bool:
    return (
        isinstance(annotation, griffe.ExprSubscript)
        and annotation.canonical_path in SHAPED
        and isinstance(annotation.slice, griffe.ExprTuple)
    )
