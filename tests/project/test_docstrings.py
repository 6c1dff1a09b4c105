"""Every public name says what it takes, what it gives and what it refuses, and shows itself at work."""

import ast
import importlib
import inspect
import re
import textwrap
from types import ModuleType

import pytest

import bnlora as bl

PACKAGES = (
    "assess.comparison",
    "assess.monitor",
    "assess.sbc",
    "guides",
    "infer.approximate",
    "infer.mcmc",
    "metrics",
    "plots",
    "prediction.conformal",
    "prediction.decisions",
    "prediction.risk_control",
    "prediction.selective",
    "priors",
)


def own(module: ModuleType) -> dict[str, object]:
    """Public functions and classes of this library in a module, by their full names."""
    names = [name for name in dir(module) if not name.startswith("_")]
    found = {f"{module.__name__}.{name}": getattr(module, name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__.startswith(home(module))
    }


def home(module: ModuleType) -> str:
    """A package shows what its members define; a single module only what is its own."""
    return "bnlora" if hasattr(module, "__path__") else module.__name__


def public() -> dict[str, object]:
    """Each public function and class once, under its shortest name."""
    names = own(bl)
    for package in PACKAGES:
        names |= own(importlib.import_module(f"bnlora.{package}"))
    shortest: dict[int, str] = {}
    for name, value in names.items():
        shortest.setdefault(id(value), name)
    return {name: names[name] for name in shortest.values()}


PUBLIC = public()
FUNCTIONS = sorted(name for name, value in PUBLIC.items() if inspect.isfunction(value))


def sections(text: str) -> dict[str, str]:
    """The sections of a docstring in Google's style."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True)) | {"": parts[0]}


def raises_itself(function: object) -> bool:
    """Whether the body raises, or calls one of the checks that do."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    checks = any(re.match(r"_?(check|require)_", name) for name in calls)
    return checks or any(isinstance(node, ast.Raise) for node in ast.walk(tree))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_it_has_a_docstring_of_its_own(name):
    text = PUBLIC[name].__doc__
    assert text
    assert not text.startswith(f"{name.split('.')[-1]}("), "this is what `dataclass` writes"
    if inspect.isclass(PUBLIC[name]):
        members = {n: m for n, m in vars(PUBLIC[name]).items() if not n.startswith("_")}
        for member, value in members.items():
            if isinstance(value, property) or inspect.isfunction(value):
                assert inspect.getdoc(value), member


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_gives_and_refuses(name):
    function = PUBLIC[name]
    found = sections(inspect.getdoc(function))
    taken = {n.lstrip("*") for n in inspect.signature(function).parameters}
    stated = set(re.findall(r"^    \**(\w+)(?: \(.*\))?:", found.get("Args", ""), re.MULTILINE))
    assert taken == stated
    given = inspect.signature(function).return_annotation
    assert given is not inspect.Signature.empty
    assert given is None or "Returns" in found
    assert not raises_itself(function) or "Raises" in found


@pytest.mark.parametrize("name", sorted(name for name, value in PUBLIC.items() if inspect.isclass(value)))
def test_a_class_says_what_its_fields_are(name):
    stated = getattr(PUBLIC[name], "__dataclass_fields__", {})
    fields = {n for n, field in stated.items() if field.init and not n.startswith("_")}
    found = sections(inspect.getdoc(PUBLIC[name]))
    listed = found.get("Attributes", "") + found.get("Args", "")
    assert fields <= set(re.findall(r"^    (\w+):", listed, re.MULTILINE))
