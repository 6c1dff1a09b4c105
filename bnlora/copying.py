"""What `copy` and `pickle` make of objects that hold programs.

Priors, families of guides and parts of NumPyro's autoguides are functions inside functions, which `pickle`
cannot find by their name. They go by value (cloudpickle), and come back in a Python and a bnlora of the same
version alone, for the bytes are code. A pickle is for another process; `bnlora.save_fit` is for keeping.
"""

import copy
import copyreg
import sys
from importlib.metadata import version
from typing import Any


class ByValue:
    """A program on its way through `pickle` or `copy`, out of which it comes as itself."""

    def __init__(self, program: Any):
        self.program = program

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.program, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        import cloudpickle

        return _program, (cloudpickle.dumps(self.program), _versions())


def state(holder: Any, *programs: str) -> dict[str, Any]:
    """What `__getstate__` returns: every attribute, those named as programs by value."""
    kept = vars(holder)
    return kept | {name: ByValue(kept[name]) for name in programs}


def error_parts(error: Exception) -> tuple[Any, ...]:
    """What `__reduce__` returns for an error whose arguments are not those of its `__init__`."""
    return copyreg.__newobj__, (type(error), *error.args), vars(error)  # type: ignore[attr-defined]


def _versions() -> str:
    return f"bnlora {version('bnlora')} on Python {sys.version_info.major}.{sys.version_info.minor}"


def _program(code: bytes, versions: str) -> Any:
    import cloudpickle

    if versions != _versions():
        raise ValueError(
            f"this pickle holds programs of {versions}, which {_versions()} cannot run; a fit that "
            "bnlora.save_fit wrote is read by later versions too"
        )
    return cloudpickle.loads(code)
