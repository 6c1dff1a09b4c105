r"""Generated texts, and the uncertainty of every token.

Before token t the draws have the weights w_{s,t} (below), and p_s is the distribution of the next token under
draw s. In nats,

    entropy     H[sum_s w_{s,t} p_s]              all uncertainty about the token
    aleatoric   sum_s w_{s,t} H[p_s]              what would remain if the adapters were known
    epistemic   sum_s w_{s,t} KL(p_s || mixture)  mutual information of token and adapters: the difference

With a text that all draws share (`mixture="token"`), w_{s,t} \propto prod_{u<t} p_s(token_u): the posterior
of the draws given the text so far, and equal weights before the first token. The prompt is given and weighs
nothing. By the chain rule,

    sum_t log sum_s w_{s,t} p_s(token_t) = log 1/S sum_s prod_t p_s(token_t)

so texts that are drawn at temperature 1 are draws from the posterior predictive distribution of texts. The
equal mean of the p_s at every step is another distribution, in which the adapters change from token to token.
With a text for each draw (`mixture="sequence"`) the texts have the same distribution, because each draw
writes its own. But nobody else has read it, so only the entropy of its own draw is known.

Reference: Malinin and Gales (2021), Uncertainty estimation in autoregressive structured prediction, who call
the weighted mixture an expectation of products and the equal mean a product of expectations.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from bnlora._util.checks import check_option
from bnlora._util.display import Shades, Showable, Shown, Table

Mixture = Literal["token", "sequence"]
Uncertainty = Literal["epistemic", "aleatoric", "entropy"]

SHOWN = 12
"""Largest number of texts in an overview."""


@dataclass(frozen=True, repr=False, eq=False)  # arrays cannot be compared by one truth value
class Generation(Shown):
    """Texts that a posterior wrote, and how sure it was of every token; notebooks and rich shade them.

    A row is one text. Rows of a prompt stand together, in the order of the draws. Numbers at tokens after the
    end of a text are zero, and count nowhere.

    Attributes:
        prompts: Text of each prompt; its token ids if the base has no tokenizer.
        texts: Text of each row, up to what ended it.
        pieces: The same text by token, what ended it included.
        tokens: New tokens, shape (row, token).
        mask: True at tokens that belong to the text, the one that ended it included.
        prompt_of: Prompt of each row.
        draw_log_probs: Log-probability of each token under each draw, shape (draw, row, token). With
            `mixture="sequence"` a row has one draw, its own, and the first axis has length one.
        log_probs: Log-probability of each token given those before it, shape (row, token), without
            temperature, `top_k` or `top_p`.
        aleatoric: Mean over the weighted draws of the entropy under each in nats, shape (row, token).
        epistemic: Mutual information of each token and the adapters in nats, shape (row, token); NaN where
            one draw alone has read the text.
        mixture: "token" if the draws share a text, "sequence" if each wrote its own.
        by: The uncertainty that the shade shows.
        top: Value in nats at which the shade is full; the largest of all texts when None.

    Example:
        >>> generation = bl.generate(key, base, [[3, 5, 7]], max_new_tokens=4)  # the base has no draws
        >>> generation.tokens.shape, bool((generation.epistemic == 0).all())
        ((1, 4), True)
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    pieces: tuple[tuple[str, ...], ...]
    tokens: Int[np.ndarray, "n t"]
    mask: Bool[np.ndarray, "n t"]
    prompt_of: Int[np.ndarray, " n"]
    draw_log_probs: Float[np.ndarray, "s n t"]
    log_probs: Float[np.ndarray, "n t"]
    aleatoric: Float[np.ndarray, "n t"]
    epistemic: Float[np.ndarray, "n t"]
    mixture: Mixture = "token"
    by: Uncertainty = "epistemic"
    top: float | None = None

    def __post_init__(self) -> None:
        """Check what the shade shows."""
        check_option("by", self.by, get_args(Uncertainty))
        if self.top is not None and not self.top > 0:
            raise ValueError(f"top must be positive, or None for the largest of the texts; got {self.top}")
        if self.mixture == "sequence" and self.by == "epistemic":
            raise ValueError(
                "each text was read by one draw, which tells nothing of the epistemic uncertainty; shade by "
                "'entropy', or generate with mixture='token'"
            )

    def shaded(self, by: Uncertainty, *, top: float | None = None) -> Self:
        """The same texts with another shade; use the same `top` to compare several generations."""
        return replace(self, by=by, top=top)

    @property
    def entropy(self) -> Float[np.ndarray, "n t"]:
        """Entropy in nats of the distribution of each token; of its own draw's with `mixture="sequence"`."""
        return self.aleatoric if self.mixture == "sequence" else self.aleatoric + self.epistemic

    @property
    def weights(self) -> Float[np.ndarray, "s n t"]:
        """Weight of each draw before each token: its posterior probability given the tokens before."""
        before = np.cumsum(self.draw_log_probs, axis=2) - self.draw_log_probs
        return np.exp(before - np.logaddexp.reduce(before, axis=0))

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Number of tokens of each text, the one that ended it included."""
        return self.mask.sum(1)

    @property
    def sequence_log_probs(self) -> Float[np.ndarray, " n"]:
        """Log-probability of each text in nats, the sum over its tokens."""
        return self.log_probs.sum(1)

    def texts_of(self, prompt: int) -> tuple[str, ...]:
        """The texts of a prompt, by its number."""
        return tuple(text for text, own in zip(self.texts, self.prompt_of, strict=True) if own == prompt)

    @property
    def table(self) -> Table:
        """One row for each text: the numbers of the shades, without colour."""
        rows = tuple(
            (self._name(row), f"{self.lengths[row]}", f"{self.sequence_log_probs[row]:.2f}",
             *(f"{self._mean(values, row):.3f}" for values in (self.entropy, self.aleatoric)),
             "-" if self.mixture == "sequence" else f"{self._mean(self.epistemic, row):.4f}")
            for row in range(len(self.texts))
        )  # fmt: skip
        header = ("text", "tokens", "log-probability", "entropy", "aleatoric", "epistemic")
        return Table("Texts; log-probabilities and means over the tokens in nats", header, rows)

    def tokens_of(self, row: int) -> Table:
        """One row for each token of a text."""
        header = ("token", "probability", "entropy", "aleatoric", "epistemic")
        rows = tuple((repr(piece)[1:-1], *self._numbers(row, t)) for t, piece in enumerate(self.pieces[row]))
        return Table(f"{self._name(row)}: its tokens, uncertainties in nats", header, rows)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """The shaded texts, and their numbers."""
        shown = range(min(len(self.texts), SHOWN))
        parts: list[Showable] = []
        for row in shown:
            prompt = self.prompts[self.prompt_of[row]]
            parts += [f"{self._name(row)} continues {prompt!r}", self._shades(row)]
        if len(self.texts) > SHOWN:
            parts.append(f"and {len(self.texts) - SHOWN:,} more texts, of which the table has the numbers")
        return (*parts, self.table)

    def _shades(self, row: int) -> Shades:
        values, count = getattr(self, self.by), self.lengths[row]
        names = ("probability", "entropy", "aleatoric", "epistemic")
        notes = tuple(
            f"{piece!r}: {', '.join(map(' '.join, zip(names, self._numbers(row, t), strict=True)))}; nats"
            for t, piece in enumerate(self.pieces[row])
        )
        return Shades(
            label=f"{self.by if self.by == 'entropy' else f'{self.by} uncertainty'} of the token in nats",
            pieces=self.pieces[row],
            values=tuple(map(float, values[row, :count])),
            top=float(values.max(initial=0.0)) if self.top is None else self.top,
            below=("",) * count,
            notes=notes,
        )

    def _numbers(self, row: int, t: int) -> tuple[str, str, str, str]:
        epistemic = "-" if self.mixture == "sequence" else f"{self.epistemic[row, t]:.4f}"
        return (
            f"{np.exp(self.log_probs[row, t]):.3f}",
            f"{self.entropy[row, t]:.3f}",
            f"{self.aleatoric[row, t]:.3f}",
            epistemic,
        )

    def _mean(self, values: np.ndarray, row: int) -> float:
        return float(values[row, : self.lengths[row]].mean()) if self.lengths[row] else 0.0

    def _name(self, row: int) -> str:
        own = self.prompt_of[row]
        if self.mixture == "token":
            return f"text {row}"
        return f"text {row} (prompt {own}, draw {row - int(np.argmax(self.prompt_of == own))})"

    def __repr__(self) -> str:
        draws, rows, _ = self.draw_log_probs.shape
        who = f"each by {draws} draws" if self.mixture == "token" else "each by its own draw"
        return f"Generation({rows} texts of {int(self.mask.sum()):,} tokens, {who})"
