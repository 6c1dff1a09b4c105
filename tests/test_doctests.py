"""Every example in a docstring prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import bnlora

MODULES = sorted(m.name for m in pkgutil.walk_packages(bnlora.__path__, "bnlora."))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_some_examples_exist():
    finder = doctest.DocTestFinder()
    tests = [t for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(tests) >= 2
