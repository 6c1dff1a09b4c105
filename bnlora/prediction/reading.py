r"""How a prediction changes along a text: the prediction after every token.

    p_t(y) = 1/S sum_s softmax(logits(template(x_1 ... x_t); adapters_s)),      t = 1, ..., T

Every prefix of the text is filled into the template and predicted as a separate text, with the same draws
of the adapters. So the number at a token is the result of `predict` if the text ended there. Nothing is
attributed to single tokens. The last prefix is the whole text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

from jax import Array
from rich.console import Console

from bnlora._util.checks import check_key, check_option
from bnlora._util.display import Shades, Showable, Shown, Table, percent
from bnlora.data.text import text_classification
from bnlora.prediction.posterior import Posterior
from bnlora.prediction.predict import Prediction, predict

Shade = Literal["mutual_information", "entropy"]


@dataclass(frozen=True, repr=False)
class Reading(Shown):
    """A text with the prediction after each of its tokens; notebooks and rich show it as shaded text.

    Attributes:
        pieces: The text, cut after every token; their concatenation is the text.
        words: Word of each class.
        prediction: Prediction for every prefix, one row each.
        by: The quantity that the shade shows.
        top: Value in nats at which the shade is full; the largest value of the text when None.

    Example:
        >>> prediction = bl.Prediction(np.log([[[0.5, 0.5], [0.2, 0.8]]]))  # one draw, a row for each token
        >>> reading = bl.Reading(("a good", " film"), (" bad", " good"), prediction)
        >>> reading.words[reading.shown_class]
        ' good'
    """

    pieces: tuple[str, ...]
    words: tuple[str, ...]
    prediction: Prediction
    by: Shade = "mutual_information"
    top: float | None = None

    def __post_init__(self) -> None:
        check_option("by", self.by, get_args(Shade))
        if self.top is not None and not self.top > 0:
            raise ValueError(f"top must be positive, or None for the largest of the text; got {self.top}")

    def shaded(self, by: Shade, *, top: float | None = None) -> Self:
        """The same reading with another shade; use the same `top` to compare several texts."""
        return replace(self, by=by, top=top)

    @property
    def shown_class(self) -> int:
        """The class whose probability is shown: the last of two, else the most probable after the text."""
        return 1 if len(self.words) == 2 else int(self.prediction.log_probs[-1].argmax())

    @property
    def table(self) -> Table:
        """One row for each token."""
        columns = zip(
            self.pieces,
            self.prediction.probs,
            self.prediction.entropy,
            self.prediction.mutual_information,
            strict=True,
        )
        rows = tuple(
            (repr(piece)[1:-1], *(f"{p:.3f}" for p in probs), f"{entropy:.3f}", f"{information:.4f}")
            for piece, probs, entropy, information in columns
        )
        probabilities = tuple(f"p({word.strip()})" for word in self.words)
        header = ("read up to", *probabilities, "entropy", "mutual information")
        return Table("Predictions after each token, in nats where they are uncertainties", header, rows)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """The shaded text, and the prediction after all of it."""
        prediction, word = self.prediction, self.words[self.shown_class].strip()
        values = getattr(prediction, self.by)
        probs = prediction.probs[:, self.shown_class]
        notes = tuple(
            f"after {piece.strip()!r}: p({word}) = {p:.3f}, entropy {e:.3f}, mutual information {m:.4f} nats"
            for piece, p, e, m in zip(
                self.pieces, probs, prediction.entropy, prediction.mutual_information, strict=True
            )
        )
        shades = Shades(
            label=f"{self.by.replace('_', ' ')} in nats",
            pieces=self.pieces,
            values=tuple(map(float, values)),
            top=float(values.max()) if self.top is None else self.top,
            below=tuple(map(percent, probs)),
            notes=notes,
        )
        end = (
            f"Below each token, where shown: p({word}) in percent if the text ended there; "
            f"{len(prediction.draw_log_probs)} draws. After the whole text: p({word}) = {probs[-1]:.3f}, "
            f"entropy {prediction.entropy[-1]:.3f}, mutual information "
            f"{prediction.mutual_information[-1]:.4f} nats."
        )
        return (shades, end)

    def __repr__(self) -> str:
        word, last = self.words[self.shown_class].strip(), self.prediction.probs[-1, self.shown_class]
        draws = len(self.prediction.draw_log_probs)
        return f"Reading({len(self.pieces)} tokens, {draws} draws, p({word}) = {last:.3f} after the last)"


def read_along(
    key: Array,
    posterior: Posterior,
    text: str,
    *,
    template: str = "{text}",
    by: Shade = "mutual_information",
    num_draws: int = 32,
    batch_size: int = 32,
    console: Console | None = None,
) -> Reading:
    """Predict after every token of a text.

    Args:
        key: Random key of the posterior draws; all prefixes use the same draws.
        posterior: A fit, or any other posterior, over a base with a tokenizer.
        text: The text; one row is predicted for each of its tokens.
        template: Text around it, with `{text}` in it, as in `text_classification`.
        by: What the shade of a token shows: "mutual_information" or "entropy" of the prediction after it.
        num_draws: Number of posterior draws.
        batch_size: Prefixes to run at a time.
        console: Where to draw a progress bar; the terminal or notebook when omitted.

    Returns:
        The tokens with their predictions, which notebooks and rich show as shaded text.

    Raises:
        ValueError: If the base has no tokenizer that reports the positions of tokens, the template does not
            contain `{text}` exactly once, the text is blank or too long, the words are other tokens after
            this template than those of the model, or `by` is unknown.

    Example:
        >>> reading = bl.read_along(key, text_fit, "the plot is good", num_draws=2)
        >>> "".join(reading.pieces), len(reading.prediction.probs) == len(reading.pieces)
        ('the plot is good', True)
    """
    key = check_key(key)
    check_option("by", by, get_args(Shade))
    tokenizer: Any = getattr(posterior.model.base, "tokenizer", None)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "reading along needs a base with a fast tokenizer, which reports the positions of tokens; "
            f"got {type(tokenizer).__name__}"
        )
    from datasets import Dataset  # imported here because it takes as long as the rest of the library

    if not posterior.model.label_ids:
        raise ValueError(
            f"reading along needs a model whose classes are label words; got {posterior.model.likelihood!r}"
        )
    if template.count("{text}") != 1:
        raise ValueError(f"the template must contain {{text}} once; got {template!r}")
    if not text.strip():
        raise ValueError(f"the text must be a non-empty string; got {text!r}")
    pieces = tokens_of(text, tokenizer, template)
    words = tuple(tokenizer.decode([i]) for i in posterior.model.label_ids)
    prefixes = Dataset.from_dict({"text": ["".join(pieces[: t + 1]) for t in range(len(pieces))]})
    data = text_classification(
        {"prefixes": prefixes}, tokenizer, text="text", label=None, words=words, template=template
    )
    if tuple(map(int, data.label_ids)) != tuple(posterior.model.label_ids):
        raise ValueError(
            f"after this template the words {list(words)} are the tokens {data.label_ids.tolist()}, but the "
            f"model reads {list(posterior.model.label_ids)}; pass the template that it was fitted with"
        )
    prediction = predict(
        key, posterior, data["prefixes"], num_draws=num_draws, batch_size=batch_size, console=console
    )
    return Reading(tuple(pieces), words, prediction, by)


def tokens_of(text: str, tokenizer: Any, template: str) -> Sequence[str]:
    """The text cut after every token that it has inside the template.

    Blanks belong to the token after them (those at the end to the last one). Tokens that end inside one
    letter, as the bytes of rare letters do, count as one.
    """
    start = template.index("{text}")
    filled = template.replace("{text}", text)
    offsets = tokenizer(filled, return_offsets_mapping=True)["offset_mapping"]
    # Ends of tokens that reach into the text, counted from its first letter; a set joins bytes of one letter.
    ends = {min(end, start + len(text)) - start for begin, end in offsets if end > max(begin, start)}
    cuts = [end for end in sorted(ends) if text[:end].strip()]
    kept = [end for before, end in zip([0, *cuts], cuts, strict=False) if text[before:end].strip()]
    kept[-1] = len(text)
    return [text[before:end] for before, end in zip([0, *kept], kept, strict=False)]
