"""How `copy` and `pickle` handle objects that hold programs.

Priors, families of guides and parts of NumPyro's autoguides are functions inside functions, which `pickle`
cannot find by name. cloudpickle stores their code, so only the same versions of Python and bnlora can read
it. Use a pickle for another process and `bnlora.save_fit` to keep a fit.
"""

import copy
import copyreg
import sys
from importlib.metadata import version
from typing import Any


class ByValue:
    """Wraps a program for `pickle` and `copy`; both give the program back without the wrapper."""

    def __init__(self, program: Any):
        self.program = program

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.program, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        import cloudpickle

        return _program, (cloudpickle.dumps(self.program), _versions())


def state(holder: Any, *programs: str) -> dict[str, Any]:
    """What `__getstate__` returns: all attributes; those named in `programs` are stored by value."""
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
