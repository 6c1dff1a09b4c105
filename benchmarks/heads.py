"""Small heads whose exact posterior can be sampled, for the benchmarks `posteriors`, `references` and `nuts`.

Each is an adapter on SmolLM2 with independent normal weights. They are so small that a gradient takes
milliseconds: rows of the output layer for two words of sentiment and for eight topics of news, and the
queries of the last layer, at ranks 1 and 2. The prior's scales give the log-odds a spread of about two nats
(`bl.prior_predictive`).
"""

from dataclasses import dataclass, replace

import bnlora as bl
from bnlora.data.assets import REUTERS_WORDS, fetch_smollm2, reuters_splits, vader_splits

REVIEW = {"template": "Review: {text}\nSentiment:", "words": [" negative", " positive"]}
NEWS = {"template": "News: {text}\nTopic:", "words": list(REUTERS_WORDS)}


@dataclass(frozen=True)
class Head:
    """A problem whose exact posterior MCMC can sample.

    Attributes:
        news: "reuters" for eight topics, "vader" for two sentiments.
        module: The adapted module.
        rank: Rank of the adapter.
        scale: Prior scale of B; that of A is 1.
        train: Number of training rows.
        length: Largest length of a row in tokens.
    """

    news: str
    module: str
    rank: int
    scale: float
    train: int
    length: int

    def load(self, base: bl.Base) -> tuple[bl.Classifier, bl.Batch, bl.Batch]:
        """The model, its training rows, and 32 other rows for functions and predictions."""
        splits = reuters_splits if self.news == "reuters" else vader_splits
        rows = splits(seed=0, train=self.train, validation=1, test=32)
        kept = {name: rows[name] for name in ("train", "test" if "test" in rows else "movies")}
        data = bl.text_classification(
            type(rows)(kept),
            base.tokenizer,
            text="text",
            label="label",
            max_length=self.length,
            truncate="right",
            **(NEWS if self.news == "reuters" else REVIEW),
        )
        layers = None if self.module == "lm_head" else slice(-1, None)
        sites = bl.select(base, [self.module], rank=self.rank, layers=layers)
        prior = bl.priors.normal(scale={"a": 1.0, "b": self.scale})
        others = data[next(name for name in kept if name != "train")]
        model = bl.Classifier(base, sites, prior, label_ids=data.label_ids)
        return model, data.train, replace(others, cached=None)


HEADS = {
    "two-words": Head("vader", "lm_head", rank=1, scale=1.0, train=64, length=64),
    "eight-topics": Head("reuters", "lm_head", rank=1, scale=1.0, train=64, length=64),
    "two-words-rank-2": Head("vader", "lm_head", rank=2, scale=1.0, train=64, length=64),
    "eight-topics-rank-2": Head("reuters", "lm_head", rank=2, scale=1.0, train=64, length=64),
    "queries-rank-1": Head("vader", "q_proj", rank=1, scale=100.0, train=16, length=32),
    "queries-rank-2": Head("vader", "q_proj", rank=2, scale=100.0, train=16, length=32),
}


def smollm2() -> bl.Base:
    """The base of every head."""
    return bl.load(fetch_smollm2())
