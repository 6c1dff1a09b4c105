"""Support of `copy` and `pickle` for objects with programs (functions).

Priors, families of guides and parts of NumPyro's autoguides are functions inside functions, which `pickle`
cannot find by name. cloudpickle stores their code, which only the same versions of Python and bnlora can
read. Use a pickle for another process, and `bnlora.save_fit` to store a fit permanently.
"""

import copy
import copyreg
import sys
from importlib.metadata import version
from typing import Any


class ByValue:
    """Wraps a program for `pickle` and `copy`; both return the program without the wrapper."""

    def __init__(self, program: Any):
        self.program = program

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.program, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        import cloudpickle

        return _program, (cloudpickle.dumps(self.program), _versions())


def state(holder: Any, *programs: str) -> dict[str, Any]:
    """State for `__getstate__`: all attributes, with those named in `programs` stored by value."""
    attributes = vars(holder)
    return attributes | {name: ByValue(attributes[name]) for name in programs}


def error_parts(error: Exception) -> tuple[Any, ...]:
    """Value of `__reduce__` for an error whose arguments differ from those of its `__init__`."""
    return copyreg.__newobj__, (type(error), *error.args), vars(error)  # type: ignore[attr-defined]


def _versions() -> str:
    return f"bnlora {version('bnlora')} on Python {sys.version_info.major}.{sys.version_info.minor}"


def _program(code: bytes, versions: str) -> Any:
    import cloudpickle

    if versions != _versions():
        raise ValueError(
            f"this pickle has programs of {versions}, which {_versions()} cannot run; use bnlora.save_fit, "
            "whose files later versions can read"
        )
    return cloudpickle.loads(code)
