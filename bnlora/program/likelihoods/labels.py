"""Classes that are the outputs of the classification head of an encoder.

    p(y = c | x) = softmax_c(output c of the head at the first real token of x)

That token is the one that the tokenizer adds in front, [CLS] or <s>. The head is adapted like any module. If
it is new, as after `bl.load(..., num_labels=...)`, it is zero, and the prior over its adapter is the prior
over the logits.
"""

from dataclasses import dataclass
from typing import Any

from jax import Array
from jaxtyping import Float, Int

from bnlora._util.checks import check_at_least
from bnlora.adapters.sites import HEAD, Sites
from bnlora.data.batch import Batch
from bnlora.program.likelihoods.base import Likelihood, Upper, require_plain_rows


@dataclass(frozen=True)
class Labels(Likelihood):
    """Each class is one output of the classification head of an encoder.

    Attributes:
        num_labels: Number of classes, all outputs of the head.

    Raises:
        ValueError: If it is not an integer of at least two.

    Example:
        >>> likelihood = bl.likelihoods.Labels(2)
        >>> sites = bl.select(encoder, ["v_proj", "lm_head"], rank=2)
        >>> bl.Classifier(encoder, sites, bl.priors.normal(), likelihood=likelihood).num_classes
        2
    """

    num_labels: int

    def __post_init__(self) -> None:
        """Check the number of classes."""
        check_at_least({"num_labels": self.num_labels}, 2)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.num_labels

    def check(self, base: Any) -> None:
        """Raise `ValueError` unless the base is an encoder whose head has this number of outputs."""
        if not getattr(base, "is_encoder", False):
            raise ValueError(
                "Labels need an encoder with a classification head, such as BERT; this base has a "
                "language-model head: give the classifier label_ids, or likelihoods.Completions"
            )
        outputs = base.modules[HEAD][1]
        if outputs != self.num_labels:
            raise ValueError(
                f"num_labels must be {outputs}, the outputs of the base's classification head; "
                f"got {self.num_labels}"
            )

    def check_rows(self, batch: Batch) -> None:
        """Raise `ValueError` for rows with choices."""
        require_plain_rows(batch, "which the labels of an encoder do not read; give rows of one text each")

    def position(self, batch: Batch) -> Int[Array, " n"]:
        """The first real token of each row."""
        return batch.first

    def sites(self, sites: Sites) -> Sites:
        """The sites as they are: the classes are all rows of the head."""
        return sites

    def logits(self, upper: Upper, batch: Batch) -> Float[Array, "n c"]:
        """Outputs of the head at the first real token; the last layer runs only there."""
        return upper.head(upper.final(batch.first[:, None])[:, 0])

    def facts(self, base: Any) -> dict[str, str]:
        """The names of the classes, if the base has them."""
        names = getattr(getattr(base, "config", None), "label_names", ())
        return {"labels": ", ".join(names) or f"{self.num_labels} outputs of the classification head"}

    def record(self) -> dict[str, Any]:
        """The number of classes."""
        return {"kind": "labels", "num_labels": self.num_labels}


def require_adapted_head(base: Any, sites: Sites) -> None:
    """Raise `ValueError` if a new classification head, which is zero, is not adapted: no logit could move."""
    is_new = getattr(getattr(base, "config", None), "new_head", False)
    if is_new and not any(site.module == HEAD for site in sites.values()):
        raise ValueError(
            f"the classification head of the base is new and zero, so {HEAD!r} must be among the adapted "
            f"modules; got {list(sites)}"
        )
