"""The cache folder: what is downloaded or compiled once serves later processes.

`$BNLORA_CACHE` is the folder, `~/.cache/bnlora` where it is not set. `BNLORA_CACHE=off` keeps compiled
programs in memory only; downloads are then in `~/.cache/bnlora`.
"""

import os
import platform
import tempfile
import time
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import jax

OFF = "off"
"""Value of `$BNLORA_CACHE` that keeps compiled programs out of the cache folder."""

GRACE = 60.0
"""Seconds for which a compiled program that looks cut short may still be in the middle of its writing."""


def cache_folder() -> Path:
    """Where downloads and compiled programs are kept: `$BNLORA_CACHE`, otherwise `~/.cache/bnlora`."""
    chosen = os.environ.get("BNLORA_CACHE")
    return Path(chosen) if chosen and chosen != OFF else Path.home() / ".cache" / "bnlora"


def programs_folder() -> Path:
    """Where compiled programs are kept: one folder for each kind of processor."""
    return cache_folder() / f"programs-{_processor():08x}"


def keep_programs() -> None:
    """Let JAX keep compiled programs in the cache folder, unless its user has chosen a place or none.

    JAX's own setting comes first (`jax_compilation_cache_dir`, `JAX_COMPILATION_CACHE_DIR`). A folder that
    cannot be written changes nothing: programs are then compiled in every process.
    """
    config: Any = jax.config  # its types leave its own settings out
    if os.environ.get("BNLORA_CACHE") == OFF or config.jax_compilation_cache_dir is not None:
        return
    folder = programs_folder()
    if _is_writable(folder):
        _drop_broken(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))


@cache
def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _drop_broken(folder: Path) -> None:
    """Remove programs that a full disk or a killed process has cut short.

    JAX does not replace them, and warns of them in every process. Only files that are new since the last
    check are read, and not those of the last `GRACE` seconds, which another process may be writing.
    """
    mark, until = folder / ".checked", time.time() - GRACE
    try:
        since = mark.stat().st_mtime if mark.exists() else 0.0
        for path in folder.glob("*-cache"):
            if since <= path.stat().st_mtime < until and _is_broken(path.read_bytes()):
                path.unlink(missing_ok=True)
        mark.touch()
        os.utime(mark, (until, until))
    except OSError:  # it is only a cache
        return


def _is_broken(content: bytes) -> bool:
    """Whether a program ends too early; unknown, and no, where JAX compresses in another way than zlib."""
    if content[:1] not in (b"", b"\x78"):
        return False
    try:
        unpack = zlib.decompressobj()
        unpack.decompress(content)
        return not unpack.eof
    except zlib.error:
        return True


@cache
def _processor() -> int:
    """Checksum of the processor's model and features.

    JAX tells versions, options and accelerators apart, but not the processors that a program was compiled
    for; another one may lack its instructions.
    """
    told = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux, where two machines of one user rarely share a home
        lines = []
    told += sorted({line for line in lines if line.lower().startswith(("model name", "flags", "features"))})
    return zlib.crc32("\n".join(told).encode())
