"""How a model reads the outcome of a row off the network, one file for each way.

| module        | outcome                                                                  |
|---------------|--------------------------------------------------------------------------|
| `base`        | what every likelihood has, and the upper layers that it reads            |
| `words`       | a class: the next token is the word of the class                         |
| `completions` | a class: the text goes on with the completion of the class, of any length |
| `labels`      | a class: an output of the classification head of an encoder              |
| `reading`     | likelihoods that give the logits of another one another distribution     |
| `ordinal`     | a grade, along the contrast of two words                                 |
| `soft_labels` | votes of raters for the classes                                          |
| `regression`  | a real value, along the contrast of two words                            |
| `texts`       | the text itself: language modelling                                      |
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from bnlora.program.likelihoods.base import PARAMETERS, Likelihood, Upper, require_softmax
from bnlora.program.likelihoods.completions import Completions
from bnlora.program.likelihoods.labels import Labels
from bnlora.program.likelihoods.ordinal import Ordinal
from bnlora.program.likelihoods.reading import readout
from bnlora.program.likelihoods.regression import Regression
from bnlora.program.likelihoods.soft_labels import SoftLabels
from bnlora.program.likelihoods.texts import Texts
from bnlora.program.likelihoods.words import Words

__all__ = [
    "PARAMETERS",
    "Completions",
    "Labels",
    "Likelihood",
    "Ordinal",
    "Regression",
    "SoftLabels",
    "Texts",
    "Upper",
    "Words",
    "likelihood_from",
    "readout",
    "require_softmax",
]

_KINDS: Mapping[str, Callable[..., Likelihood]] = MappingProxyType(
    {
        "labels": Labels,
        "ordinal": Ordinal,
        "regression": Regression,
        "soft labels": SoftLabels,
        "texts": Texts,
    }
)


def likelihood_from(record: Mapping[str, Any]) -> Likelihood:
    """The likelihood of a record that `Likelihood.record` of this package made."""
    if "kind" not in record:
        return Words(tuple(record["ids"])) if "ids" in record else Completions(**record)
    values = {name: value for name, value in record.items() if name != "kind"}
    if "reads" in values:
        values["reads"] = likelihood_from(values["reads"])
    return _KINDS[record["kind"]](**values)
