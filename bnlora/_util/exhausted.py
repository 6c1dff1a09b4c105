"""A device without free memory: JAX's error becomes a `MemoryError` of one sentence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

_MARK = "RESOURCE_EXHAUSTED"


@contextmanager
def naming_memory(remedy: Callable[[], str]) -> Iterator[None]:
    """Raise `MemoryError` if the device runs out of memory inside the block.

    Args:
        remedy: What was running and what would take less; called after the failure.

    Raises:
        MemoryError: What was running, the reason, and the remedy, in one sentence.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _MARK not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0].removeprefix(f"{_MARK}: ")[:200].rstrip(".")
        raise MemoryError(f"the memory is exhausted ({reason}); {remedy()}") from error
