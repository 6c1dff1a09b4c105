"""A stored fit that answers texts: probabilities, where their uncertainty comes from, sets and actions.

The entropy of a prediction is its total uncertainty. It has two parts, all in nats:

    entropy = epistemic + aleatoric,    epistemic = mutual information of class and adapters.

The draws of the adapters are made once, with the key and number of `bnlora predict`, so both give the same
probabilities up to rounding. Rows run with a fixed number of rows, and with widths that are powers of two, so
few programs are compiled: two for each power of two up to the limit of tokens.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from bnlora._util.files import read_json
from bnlora.app.predicting import Drawn
from bnlora.app.recipe import Recipe
from bnlora.app.serve.bodies import Limits, Refused
from bnlora.app.tasks import class_columns, class_names
from bnlora.data.batch import Batch
from bnlora.data.tables import RowError, naming_lines, read_table
from bnlora.infer.svi.checkpoint import load_fit, read_notes
from bnlora.prediction.conformal import SetRule, calibrate_sets
from bnlora.prediction.decisions import Costs, decide
from bnlora.prediction.predict import Prediction, outputs_with_draws, require_labels

TASKS = ("words", "labels", "votes", "grades")
"""Tasks whose outcome is a class of a text."""


class Answer(NamedTuple):
    """What the service says about the texts of one request.

    Attributes:
        prediction: Their predictive distributions.
        rows: An object for each text, as it goes out.
        columns: The columns that `bnlora predict` adds to a table.
    """

    prediction: Prediction
    rows: list[dict[str, Any]]
    columns: dict[str, list[Any]]


@dataclass(frozen=True)
class Service:
    """A fit with its draws, and what is done with its probabilities.

    Attributes:
        name: Name of the fit.
        recipe: Recipe of the fit, with the limit of tokens.
        drawn: Draws of its adapters.
        num_draws: Their number.
        limits: Limits of a request.
        rule: Rule of the prediction sets, if there are any.
        costs: Costs of the actions, if there are any.
    """

    name: str
    recipe: Recipe
    drawn: Drawn
    num_draws: int
    limits: Limits
    rule: SetRule | None = None
    costs: Costs | None = None

    @property
    def names(self) -> list[str]:
        """Names of the classes."""
        return class_names(self.recipe)

    @property
    def kind(self) -> str:
        """The kind of model that answers: "network" or "tangent"."""
        return self.drawn.model.kind

    def answer(self, requests: Sequence[list[str]]) -> list[Answer | Refused]:
        """Answer the texts of several requests together.

        Args:
            requests: The texts of each request.

        Returns:
            The answer to each request, or why it is refused; one refusal does not affect the others.
        """
        found = [self._checked(texts) for texts in requests]
        good = [texts for texts, refused in zip(requests, found, strict=True) if refused is None]
        if not good:
            return [refused for refused in found if refused is not None]
        outputs = self.predict(self._read([text for texts in good for text in texts])).draw_log_probs
        ends = np.cumsum([0, *map(len, good)])
        answers = iter([self._answer(Prediction(outputs[:, a:b])) for a, b in pairwise(ends)])
        return [next(answers) if refused is None else refused for refused in found]

    def predict(self, rows: Batch) -> Prediction:
        """Predictive distributions of rows; a single row runs alone."""
        size = 1 if len(rows) == 1 else self.limits.batch_rows
        model, adapters = self.drawn.model, self.drawn.adapters
        quiet = Console(quiet=True)
        return Prediction(
            outputs_with_draws(model, adapters, rows, batch_size=size, widths="few", console=quiet)
        )

    def warm(self) -> None:
        """Compile the programs of short texts, so that the first request need not wait for them."""
        for count in (1, 2):
            self.predict(self._read(["a text of some words"] * count))

    def with_rule(self, table: Path, text: str, label: str, encoding: str, level: float) -> "Service":
        """The service with prediction sets that are calibrated on a table.

        Args:
            table: Table of rows that were not used for the fit.
            text: Column of the texts.
            label: Column of the labels.
            encoding: Encoding of the table.
            level: Probability with which a set contains the true class.

        Raises:
            ValueError: If the table cannot be used, or a label is not one class.
        """
        require_labels(self.drawn.model, "--calibration")
        rows = read_table(table, columns=[text, label], encoding=encoding)
        with naming_lines({"rows": table}, encoding=encoding):
            read = self.recipe.read({"rows": rows}, self.drawn.model.base, text=text, label=label)
        batch = read["rows"]
        return replace(self, rule=calibrate_sets(self.predict(batch), batch, level=level))

    def _checked(self, texts: list[str]) -> Refused | None:
        """Why the texts of a request are refused, if they are."""
        try:
            lengths = np.asarray(self._read(texts).used).sum(1)
        except RowError as error:
            return Refused(422, str(error.at(f"texts[{error.row}]")))
        except ValueError:  # its sentence may name files of this machine
            logging.getLogger(__name__).exception("a request could not be read")
            return Refused(422, "the fit cannot read these texts; the service's standard error says why")
        row, most = int(lengths.argmax()), self.limits.max_tokens
        if lengths[row] > most:
            return Refused(413, f"texts[{row}] has {lengths[row]:,} tokens; a row may have at most {most:,}")
        return None

    def _read(self, texts: list[str]) -> Batch:
        """The texts as rows, of any length."""
        from datasets import Dataset

        longest = replace(self.recipe, max_length=2**20, truncate="error")
        rows = {"rows": Dataset.from_dict({"text": texts})}
        return longest.read(rows, self.drawn.model.base, text="text", label=None)["rows"]

    def _answer(self, prediction: Prediction) -> Answer:
        names = self.names
        columns = class_columns(self.recipe, prediction)
        total, epistemic = prediction.entropy, prediction.mutual_information
        rows: list[dict[str, Any]] = [
            {
                "prediction": best,
                "probabilities": dict(zip(names, probs, strict=True)),
                "entropy": float(whole),
                "epistemic": float(part),
                "aleatoric": float(whole - part),
            }
            for best, probs, whole, part in zip(
                columns["prediction"], prediction.probs.tolist(), total, epistemic, strict=True
            )
        ]
        if self.rule is not None:
            for row, mask in zip(rows, self.rule.sets(prediction), strict=True):
                row["set"] = [name for name, member in zip(names, mask, strict=True) if member]
        if self.costs is not None:
            chosen = decide(prediction, self.costs)
            for row, action, cost in zip(rows, chosen.actions, chosen.expected, strict=True):
                row |= {"action": self.costs.actions[action], "expected cost": float(cost)}
        return Answer(prediction, rows, columns)


def load_service(
    key: jax.Array, folder: Path, limits: Limits, num_draws: int, costs: Path | None = None
) -> Service:
    """Load a fit and draw its adapters.

    Args:
        key: Random key of the draws.
        folder: Folder that `bnlora fit` wrote.
        limits: Limits of a request. Its limit of tokens is lowered to that of the fit.
        num_draws: Number of posterior draws.
        costs: File of the costs of actions (`read_costs`).

    Raises:
        ValueError: If a file is not valid, or the outcome of the fit is not a class of a text.
        OSError: If a file cannot be read.
    """
    from datasets import Dataset

    recipe = Recipe.from_folder(folder)
    if recipe.task not in TASKS:
        raise ValueError(
            f"bnlora serve answers with classes of texts, the tasks {', '.join(TASKS)}; "
            f"this fit has the task {recipe.task!r}"
        )
    recipe.require_fitted(read_notes(folder))
    priced = None if costs is None else read_costs(costs, class_names(recipe))
    base = recipe.load_base()
    most = min(
        limits.max_tokens, recipe.max_length or limits.max_tokens, int(base.tokenizer.model_max_length)
    )
    recipe = replace(recipe, max_length=most, truncate="error")
    # The likelihood is made from rows; any row serves, for no outcome is computed.
    row = Dataset.from_dict({"text": ["a"]})
    data = replace(recipe, max_length=None).read({"rows": row}, base, text="text", label=None)
    fit = load_fit(folder, *recipe.build(base, recipe.likelihood(data)))
    drawn = Drawn(fit.model, fit.draw_adapters(key, num_draws))
    limits = replace(limits, max_tokens=most)
    return Service(folder.resolve().name, recipe, drawn, num_draws, limits, costs=priced)


def read_costs(path: Path, names: Sequence[str]) -> Costs:
    """Costs by the names of classes: `{"actions": ["keep", "ask"], "costs": {"bad": [0, 1], ...}}`.

    Args:
        path: The file.
        names: Names of the classes.

    Raises:
        ValueError: If the file has another form, or its classes are not those of the fit.
        OSError: If it cannot be read.
    """
    content = read_json(path)
    by_class, actions = content.get("costs"), content.get("actions")
    if set(content) != {"costs", "actions"} or not isinstance(by_class, Mapping):
        raise ValueError(f'{str(path)!r} must have "actions", a list, and "costs", a list for each class')
    if not isinstance(actions, list) or not all(isinstance(name, str) for name in actions):
        raise ValueError(f'"actions" in {str(path)!r} must be a list of names')
    if set(by_class) != set(names):
        raise ValueError(
            f"{str(path)!r} must have costs of the classes {list(names)}; got {sorted(by_class)}"
        )
    return Costs([by_class[name] for name in names], actions)
