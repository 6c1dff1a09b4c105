"""What `make test` does on a sample of members or sizes and `make slow` does on all of them."""

import os
from collections.abc import Collection, Iterable
from typing import Any

import pytest

EVERY = "BNLORA_EVERY" in os.environ
"""Whether everything runs: `make slow`."""


def sample_of(members: Iterable[str], sample: Collection[str]) -> list[Any]:
    """Members for `pytest.mark.parametrize`; those outside the sample are marked `thorough`."""
    return [name if name in sample else pytest.param(name, marks=pytest.mark.thorough) for name in members]
