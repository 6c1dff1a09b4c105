"""The cache folder: where it is, and that compiled programs go there unless the user said otherwise."""

import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import pytest

from bnlora._util import caching
from bnlora._util.compilation import options


@pytest.fixture(autouse=True)
def no_setting(monkeypatch):
    """JAX without a folder for programs, whatever the tests run with."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("BNLORA_CACHE", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def folder_in_use():
    options()
    return jax.config.jax_compilation_cache_dir


def test_programs_are_kept_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    place = Path(folder_in_use())
    assert place.parent == tmp_path / ".cache" / "bnlora"
    assert place.name.startswith("programs-")
    assert place.is_dir()


def test_the_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("BNLORA_CACHE", str(tmp_path / "mine"))
    assert Path(folder_in_use()).parent == caching.cache_folder() == tmp_path / "mine"


def test_another_processor_has_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("BNLORA_CACHE", str(tmp_path))
    first = folder_in_use()
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(caching, "_processor", lambda: 7)
    assert folder_in_use() == str(tmp_path / "programs-00000007") != first


def test_off_keeps_programs_out_of_it(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("BNLORA_CACHE", "off")
    assert folder_in_use() is None
    assert caching.cache_folder() == tmp_path / ".cache" / "bnlora"  # of downloads
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("own", ["/some/folder", ""])
def test_a_setting_of_the_user_stays(monkeypatch, tmp_path, own):
    monkeypatch.setenv("BNLORA_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", own)
    assert folder_in_use() == own
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_changes_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BNLORA_CACHE", str(tmp_path / "file"))
    assert folder_in_use() is None


PROGRAM = """
import jax
import bnlora as bl
from bnlora._util.compilation import program
assert jax.config.jax_compilation_cache_dir == {before!r}, "by the import"
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
class Owner: pass
jax.numpy.ones(3).sum()  # JAX has compiled before the library does
program(Owner(), lambda owner, x: x + 1)(1.0)
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, "own"])
def test_a_process_writes_its_programs(tmp_path, own):
    """The variable of JAX comes first; nothing happens at the import."""
    place = {} if own is None else {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / own)}
    plain = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=place.get("JAX_COMPILATION_CACHE_DIR"))],
        env=plain | place | {"BNLORA_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert Path(told).parent == (tmp_path / "cache" if own is None else tmp_path)
    assert any("compiled" in path.name or "lambda" in path.name for path in Path(told).iterdir())


FAULTS = """
import resource
import signal
import sys

import jax

from bnlora._util.compilation import program

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class Owner:
    pass


def double(owner, x):
    return jax.numpy.sin(x) * 2


if sys.argv[1] == "full":  # files of more than 200 bytes end there, with an error
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
print("ready", flush=True)
if sys.argv[1] == "meet":
    sys.stdin.readline()
print(float(program(Owner(), double)(0.5)))
"""


def started(cache: Path, how: str) -> subprocess.Popen:
    """A process that compiles one program."""
    plain = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return subprocess.Popen(
        [sys.executable, "-c", FAULTS, how],
        env=plain | {"BNLORA_CACHE": str(cache)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_faults_of_the_programs_folder_cost_only_a_compilation(tmp_path):
    """Two processes at once, a full disk, and programs that were cut short: the number is the same."""
    expected = f"ready\n{float(jax.numpy.sin(0.5) * 2)}\n"
    both = [started(tmp_path / "shared", "meet") for _ in range(2)]
    full = started(tmp_path / "full", "full")
    for process in both:
        assert process.stdout.readline() == "ready\n"
    told = [process.communicate("go\n", timeout=120) for process in both]
    assert [out for out, _ in told] == [expected.removeprefix("ready\n")] * 2
    out, errors = full.communicate(timeout=120)
    assert out == expected
    assert "Error writing persistent compilation cache entry" in errors
    assert "File too large" in errors
    assert "Traceback" not in errors + "".join(error for _, error in told)
    (cut,) = (tmp_path / "full").rglob("*double*-cache")
    assert cut.stat().st_size == 200
    os.utime(cut, (1, 1))  # not one that another process is just writing
    (cut.parent / ".checked").unlink()
    out, errors = started(tmp_path / "full", "plain").communicate(timeout=120)
    assert (out, errors) == (expected, "")
    assert cut.stat().st_size > 200


def test_only_programs_that_were_cut_short_are_removed(tmp_path):
    whole = zlib.compress(b"a program" * 99)
    now = time.time()
    kept = {"whole": (whole, 1), "other": (b"\x28\xb5\x2f\xfd and so on", 1), "just now": (whole[:9], now)}
    dropped = {"half": (whole[: len(whole) // 2], 1), "empty": (b"", 1), "changed": (whole[:2] + b"xyz", 1)}
    for name, (content, changed) in (kept | dropped).items():
        (tmp_path / f"{name}-cache").write_bytes(content)
        os.utime(tmp_path / f"{name}-cache", (changed, changed))
    caching._drop_broken(tmp_path)
    assert {path.name for path in tmp_path.glob("*-cache")} == {f"{name}-cache" for name in kept}
    os.utime(
        tmp_path / "just now-cache", (now - 61, now - 61)
    )  # older than the last check, so not read again
    caching._drop_broken(tmp_path)
    assert (tmp_path / "just now-cache").exists()
    os.utime(tmp_path / ".checked", (now - 99, now - 99))
    caching._drop_broken(tmp_path)
    assert not (tmp_path / "just now-cache").exists()
