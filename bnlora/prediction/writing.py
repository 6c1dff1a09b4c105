"""The loop of generation around its compiled programs: batches of prompts, what ends a text, its pieces."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlora._util.compilation import level_for, program
from bnlora._util.typing import Adapters
from bnlora.base import Base
from bnlora.prediction import decoding
from bnlora.prediction.decoding import NO_TOKEN, Plan, Rule, State
from bnlora.prediction.generated import Generation
from bnlora.prediction.prompts import Pieces, Stops, left_padded

STEPS = 8
"""Tokens between two looks at what was written, for stop strings and the progress bar."""

ROUND = 16
"""Widths are rounded up to a multiple of this, so that one program serves prompts of many lengths."""


class NewToken(NamedTuple):
    """A token that was just written.

    Attributes:
        row: Row of its text in the `Generation`.
        place: Its number in the text, from 0.
        token: Its id.
        piece: Its text.
        log_prob: Its log-probability given the tokens before it.
        aleatoric: Weighted mean over the draws of the entropy of their distributions, in nats.
        epistemic: Mutual information of the token and the draw, in nats; zero where each draw writes alone.
    """

    row: int
    place: int
    token: int
    piece: str
    log_prob: float
    aleatoric: float
    epistemic: float


def rule_of(temperature: float, top_k: int, top_p: float, stops: Stops) -> Rule:
    """The rule by which tokens are chosen, without the keys of the prompts."""
    ids = [*stops.ids, *[NO_TOKEN] * (8 - len(stops.ids) % 8)]  # few lengths, so few programs
    numbers = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    return Rule(None, *numbers, jnp.asarray(ids, jnp.int32))


class Writing:
    """Texts that are being written.

    Args:
        owner: A classifier or a base, which keeps the programs.
        base: The base.
        draws: Draws of the adapters; empty for a base.
        plan: Sizes, and whether the draws share a text.
        rule: How tokens are chosen, without keys.
        stops: What ends a text.
        most: Largest number of new tokens.
        on_token: Called with every new token, or None.
    """

    def __init__(
        self,
        owner: Any,
        base: Base,
        draws: Adapters,
        plan: Plan,
        rule: Rule,
        stops: Stops,
        most: int,
        on_token: Callable[[NewToken], Any] | None,
    ):
        self.owner, self.base, self.draws, self.plan = owner, base, draws, plan
        self.rule, self.stops, self.most, self.on_token = rule, stops, most, on_token
        self.texts: list[Pieces] = []
        self.parts: list[dict[str, np.ndarray]] = []

    def run(self, key: Array, prompts: list[list[int]], size: int) -> Iterator[None]:
        """Write the texts, `size` prompts at a time; yields once for every token that a text may have."""
        width = -(-max(map(len, prompts)) // ROUND) * ROUND
        for begin in range(0, len(prompts), size):
            own = prompts[begin : begin + size]
            rows = [*own, *own[:1] * (size - len(own))]  # those that fill up the last batch are dropped
            fold = jax.vmap(lambda index: jax.random.fold_in(key, index))
            rule = self.rule._replace(keys=fold(jnp.arange(begin, begin + size)))
            first = len(self.texts)
            streams = range(self.plan.streams)
            self.texts += [Pieces(self.base.tokenizer, prompt) for prompt in own for _ in streams]
            yield from self._write(rows, rule, first, width)

    def _write(self, rows: list[list[int]], rule: Rule, first: int, width: int) -> Iterator[None]:
        """Write the texts from number `first` on, which continue these prompts."""
        tokens, mask = left_padded(rows, width)
        level = level_for(tokens.size * max(map(max, self.base.modules.values())))
        begin, go_on = (
            program(self.owner, function, level=level, static=(5,))
            for function in (decoding.started, decoding.continued)
        )
        weights, seen = self.base.weights, 0
        count = (len(self.texts) - first) // self.plan.streams
        state = begin(weights, self.draws, tokens, mask, rule, self.plan)
        while True:
            found = _by_row(state, self.plan, count)
            ended = self._read(found, seen, first)
            yield from [None] * (int(state.step) - seen)
            seen = int(state.step)
            if ended.all() or seen >= self.most:
                break
            alive = np.zeros(state.alive.shape, bool)
            alive[:, :count] = ~ended.reshape(count, -1).T
            steps = 1 if self.on_token else min(STEPS, self.most - seen)
            state = go_on(weights, self.draws, state._replace(alive=alive), rule, steps, self.plan)
        yield from [None] * (self.most - seen)
        self.parts.append(found)

    def _read(self, found: dict[str, np.ndarray], seen: int, first: int) -> np.ndarray:
        """Take up the tokens from number `seen` on; returns which texts have ended."""
        ended = ~found["alive"]
        for row, text in enumerate(self.texts[first:]):
            for place in range(seen, found["lengths"][row]):
                text.add(int(found["tokens"][row, place]))
                if self.on_token is not None:
                    numbers = (float(found[name][row, place]) for name in NUMBERS[1:])
                    self.on_token(NewToken(first + row, place, text.tokens[-1], text.pieces[-1], *numbers))
                if self.stops.end(text.pieces):
                    ended[row] = True
                    break
            found["lengths"][row] = len(text.pieces)
        return ended

    def result(self, prompts: tuple[str, ...], copies: int) -> Generation:
        """All that was written; each draw stands for `copies` equal ones."""
        joined = {
            name: [np.moveaxis(part[name], -1, 0) for part in self.parts] for name in ("tokens", *NUMBERS)
        }
        lengths = np.concatenate([part["lengths"] for part in self.parts])
        mask = np.arange(lengths.max()) < lengths[:, None]
        cut = {
            name: np.where(mask, np.moveaxis(np.concatenate(parts, -1), 0, -1)[..., : mask.shape[1]], 0)
            for name, parts in joined.items()
        }
        shared = self.plan.shared
        return Generation(
            prompts=prompts,
            texts=tuple(text.text(self.stops) for text in self.texts),
            pieces=tuple(tuple(text.pieces) for text in self.texts),
            tokens=cut["tokens"],
            mask=mask,
            prompt_of=np.repeat(np.arange(len(prompts)), self.plan.streams),
            draw_log_probs=np.repeat(cut["draw_log_probs"], copies, axis=0),
            log_probs=cut["log_probs"],
            aleatoric=cut["aleatoric"],
            epistemic=cut["epistemic"] if shared else np.full(mask.shape, np.nan),
            mixture="token" if shared else "sequence",
            by="epistemic" if shared else "entropy",
        )


NUMBERS = ("draw_log_probs", "log_probs", "aleatoric", "epistemic")
"""Fields of a state with a number for every token."""


def _by_row(state: State, plan: Plan, count: int) -> dict[str, np.ndarray]:
    """The texts of the first `count` prompts so far, one row for each prompt and stream."""

    def rows(value: Array) -> np.ndarray:
        swapped = np.swapaxes(np.asarray(value), 0, 1)[:count]
        return swapped.reshape(-1, *swapped.shape[2:]).copy()

    found = {name: rows(getattr(state, name)) for name in ("alive", "lengths", "tokens", *NUMBERS)}
    by_draw = np.asarray(state.draw_log_probs)[:, :count]
    found["draw_log_probs"] = by_draw if plan.shared else found["draw_log_probs"][None]
    return found | {name: found[name].astype(np.float64) for name in NUMBERS}
