"""Commands of the command line in the test's own process, and a table of reviews for them."""

import random
from typing import Any

from datasets import Dataset
from typer.testing import CliRunner

from bnlora.app import cli

RUN = CliRunner()
WORDS = ["--word", " bad", "--word", " good"]


def reviews(size: int, seed: int = 0) -> Dataset:
    """Sentences with label 1 if they contain the word good, and 0 if they contain the word bad."""
    stream = random.Random(seed)
    labels = [i % 2 for i in range(size)]
    texts = [
        f"the {stream.choice(['plot', 'film'])} {stream.choice(['is', 'was'])} {['bad', 'good'][i]}"
        for i in labels
    ]
    return Dataset.from_dict({"text": texts, "label": labels})


def call(*words: object) -> Any:
    """Output and exit code of a command."""
    return RUN.invoke(cli.app, [str(word) for word in words])
