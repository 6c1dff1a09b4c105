"""Tasks of the grid: the labelled rows of a seed, and the rows that are predicted.

Words: the classes are words of the base. Completions: the classes are the choices of a question. The score
of a choice is its log-likelihood, divided by T times its number of tokens. T belongs to the likelihood and is
the same for every method: it maximises the likelihood of the untouched base on the labelled rows.

Activations below the adapted layers do not depend on the method. They are computed once: those of questions
that every seed predicts are kept on disk, all others in memory.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import bnlora as bl
from benchmarks.data import places, sentences
from bnlora._util.caching import cache_folder
from bnlora._util.files import write_whole
from bnlora.app.experiment import best_temperature
from bnlora.base import Base
from bnlora.data.assets import DOMAINS, REUTERS_WORDS, fetch_smollm2, reuters_splits
from bnlora.data.batch import CachedActivations
from bnlora.data.medical import MedicalSet, held_out_questions
from bnlora.data.questions import QuestionSet, distinct_questions, question_splits
from bnlora.infer.core.fit import SIZES
from bnlora.prediction.predict import predict_with_draws
from bnlora.program.likelihoods import Likelihood

QUIET = Console(quiet=True)
LAYERS = 2
"""Number of uppermost layers that every method adapts, unless a cell says otherwise."""

LONGEST = 64
"""Most tokens of a question with a choice; longer questions lose their beginning."""

MOST_DIVISOR = 100
"""Largest T of the scores of questions, and the inverse of the smallest."""

QUESTIONS, SENTENCES = 500, 500
"""Predicted questions of a set, and predicted sentences of a domain."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What every method of a cell gets.

    Attributes:
        base: The frozen base.
        likelihood: The likelihood of the classes.
        train: Labelled rows, in random order, with their activations below the adapted layers.
        tests: Rows to predict by name; the first set is in domain, the others are shifted.
        targets: Modules of plain LoRA.
        layers: Number of uppermost layers to adapt.
        about: What was chosen for all methods from the labelled rows.
        made: What several cells need, with its seconds (`Setting.shared`).
    """

    base: Base
    likelihood: Likelihood
    train: bl.Batch
    tests: Mapping[str, bl.Batch]
    targets: tuple[str, ...]
    layers: int
    about: Mapping[str, Any]
    made: dict[str, tuple[Any, float]] = field(default_factory=dict)


def film_reviews(size: int, seed: int, layers: int, *, rows: int = SENTENCES) -> Rows:
    """Sentences of four domains: labelled ones of films, and others of each domain to predict."""
    base, data = _sentences()
    train, tests = places({name: len(data[name]) for name in DOMAINS}, seed, labelled=size, test=rows)
    likelihood = bl.likelihoods.Words(tuple(data.label_ids.tolist()))
    model = _model_below(base, likelihood, layers)
    cached = partial(bl.cache_prefix, model, console=QUIET)
    return Rows(
        base,
        likelihood,
        cached(data["movies"][train]),
        {name: cached(data[name][numbers]) for name, numbers in tests.items()},
        (*SIZES, "lm_head"),
        layers,
        {},
    )


def news(size: int, seed: int, layers: int, *, rows: int = SENTENCES) -> Rows:
    """News of eight topics, and news of topics that are none of these, which have no class."""
    base = _smollm2()
    splits = reuters_splits(seed=seed, train=size, validation=0, test=rows)
    options = {"text": "text", "words": list(REUTERS_WORDS), "labels_are": "integers", "max_length": 128}
    known = bl.text_classification(
        {name: splits[name] for name in ("train", "test")}, base.tokenizer, label="label", **options
    )
    unseen = bl.text_classification({"unseen": splits["unseen"]}, base.tokenizer, label=None, **options)
    likelihood = bl.likelihoods.Words(tuple(known.label_ids.tolist()))
    cached = partial(bl.cache_prefix, _model_below(base, likelihood, layers), console=QUIET)
    tests = {"R8": cached(known["test"]), "unseen topics": cached(unseen["unseen"])}
    return Rows(base, likelihood, cached(known.train), tests, (*SIZES, "lm_head"), layers, {})


def questions(
    size: int,
    seed: int,
    layers: int,
    *,
    name: str,
    shifts: tuple[str, ...] = (),
    choices: int = 4,
    longest: int = LONGEST,
) -> Rows:
    """Questions of a set: labelled ones of its training file, and test questions of it and of other sets.

    The seed draws the labelled questions only. The predicted questions are the same for all seeds.
    """
    base, likelihood = _smollm2(), bl.likelihoods.Completions(choices)
    model = _model_below(base, likelihood, layers)

    def rows_from(other: str, split: str, seed: int, count: int) -> bl.Batch:
        return _batch(base, with_choices(choices, other, split, seed, count), longest)

    train = bl.cache_prefix(model, rows_from(name, "train", seed, size), console=QUIET)
    tests = {
        other: on_disk(model, rows_from(other, "test", 0, QUESTIONS), other) for other in (name, *shifts)
    }
    scores = predict_with_draws(model, untouched(model), train, console=QUIET)
    temperature = best_temperature(scores, train, most=MOST_DIVISOR)
    scaled = partial(_divided, temperature=temperature)
    tests = {other: scaled(rows) for other, rows in tests.items()}
    return Rows(base, likelihood, scaled(train), tests, tuple(SIZES), layers, {"T": temperature})


TASKS: Mapping[str, Callable[[int, int, int], Rows]] = {
    "vader": film_reviews,
    "reuters": news,
    "arc_easy": partial(questions, name="arc_easy", shifts=("arc_challenge",)),
    "arc_challenge": partial(questions, name="arc_challenge", shifts=("arc_easy",)),
    "openbookqa": partial(questions, name="openbookqa", shifts=("arc_challenge",)),
    "medical": partial(questions, name="arc_easy", shifts=("openbookqa", "sciq", "medmcqa")),
    "winogrande": partial(questions, name="winogrande", choices=2),
    "boolq": partial(questions, name="boolq", choices=2, longest=192),
}
"""A function of size, seed and number of adapted layers, by the name of its task."""


def _model_below(base: Base, likelihood: Likelihood, layers: int) -> bl.Classifier:
    """A classifier whose activations below the adapters are those of every method of these layers."""
    sites = bl.select(base, ["v_proj"], rank=1, layers=slice(-layers, None))
    return bl.Classifier(base, sites, bl.priors.point(), likelihood=likelihood)


@lru_cache(maxsize=1)
def rows_of(task: str, size: int, seed: int, layers: int) -> Rows:
    """Rows of a task; kept until other rows are requested, because the cells of a seed follow one another."""
    return TASKS[task](size, seed, layers)


def untouched(model: bl.Classifier) -> Any:
    """One draw of adapters that change nothing: every factor is zero."""
    shapes = {name: site.shapes for name, site in model.sites.items()}
    return jax.tree.map(lambda shape: jnp.zeros((1, *shape)), shapes, is_leaf=lambda x: isinstance(x, tuple))


@lru_cache(maxsize=1)
def _sentences() -> tuple[Base, bl.TextData]:
    """The base and all sentences, read and tokenised once for all seeds."""
    return sentences()


@lru_cache(maxsize=1)
def _smollm2() -> Base:
    return bl.load(fetch_smollm2())


def with_choices(choices: int, name: str, split: str, seed: int, count: int) -> Any:
    """Questions with this number of choices, of a file in the order of a seed."""
    rows = _file(name, split, seed)
    kept = [row for row, found in enumerate(rows["choices"]) if len(found) == choices]
    if len(kept) < count:
        raise ValueError(
            f"{name} has {len(kept)} {split} questions of {choices} choices; {count} were requested"
        )
    return rows.select(kept[:count])


def _file(name: str, split: str, seed: int) -> Any:
    """All questions of a file without repeats, in the order of a seed; medical sets have a test file only."""
    if name in get_args(MedicalSet):
        return held_out_questions(cast(MedicalSet, name)).shuffle(seed=seed)
    chosen = cast(QuestionSet, name)
    files = distinct_questions(chosen)
    # Test rows of a set without a test file come from its validation file.
    file = split if split in files else "validation"
    nothing = {"train": 0, "validation": 0, "test": 0}
    return question_splits(chosen, seed=seed, **nothing | {split: len(files[file])})[split]


def _batch(base: Base, rows: Any, longest: int) -> bl.Batch:
    options = {"context": "context", "choices": "choices", "label": "gold", "normalise": "tokens"}
    return bl.multiple_choice({"rows": rows}, base, **options, max_length=longest).splits["rows"]


def _divided(rows: bl.Batch, temperature: float) -> bl.Batch:
    return replace(rows, choices=replace(rows.choices, size=temperature * rows.choices.size))


def on_disk(model: bl.Classifier, batch: bl.Batch, name: str) -> bl.Batch:
    """The rows with activations below the adapted layers, which are computed once and kept on disk."""
    path = cached_file(model, batch, name)
    if not path.is_file():
        hidden = np.asarray(bl.cache_prefix(model, batch, console=QUIET).cached.hidden)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda at: _save(at, hidden))
    return replace(batch, cached=CachedActivations(jnp.asarray(np.load(path)), model.first_layer))


def cached_file(model: bl.Classifier, batch: bl.Batch, name: str) -> Path:
    """Where the activations of these rows are kept: by name, depth and the tokens themselves."""
    content = np.asarray(batch.tokens).tobytes() + np.asarray(batch.mask).tobytes()
    return cache_folder() / "grid-rows" / f"{name}-{model.first_layer}-{zlib.crc32(content):08x}.npy"


def _save(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:  # a file, because `np.save` adds a suffix to a path
        np.save(file, values)
