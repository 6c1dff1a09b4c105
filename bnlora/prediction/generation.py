"""`generate`: texts from a posterior, token by token, with what every token's uncertainty is made of.

`bnlora.prediction.generated` has the mathematics. The prompts run once; every token then runs alone, over
keys and values that are kept. The layers below the lowest adapted one serve all draws that share a text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import jax
import numpy as np
from jax import Array
from rich.console import Console

from bnlora._util.checks import brief, check_at_least, check_key, check_option
from bnlora._util.progress import track
from bnlora._util.typing import Adapters
from bnlora.adapters.sites import HEAD
from bnlora.base import Base
from bnlora.prediction.decoding import Choice, Plan
from bnlora.prediction.generated import Generation, Mixture
from bnlora.prediction.posterior import Posterior
from bnlora.prediction.predict import all_equal
from bnlora.prediction.prompts import read_prompts, read_stops
from bnlora.prediction.writing import ROUND, NewToken, Writing, rule_of
from bnlora.program.likelihoods.base import require_language_model
from bnlora.program.model import kind_of

TEMPERATURES = (1e-3, 1e3)


def generate(
    key: Array,
    posterior: Posterior | Base,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_draws: int = 8,
    mixture: Mixture = "token",
    stop: str | int | Sequence[str | int] | None = None,
    batch_size: int = 8,
    on_token: Callable[[NewToken], Any] | None = None,
    console: Console | None = None,
) -> Generation:
    """Write on after prompts, with draws of a posterior over the adapters.

    With `mixture="token"` all draws write one text for each prompt: a token comes from the posterior
    predictive distribution given the tokens before it, in which the draws weigh as much as they explain the
    text so far. Each token has an epistemic uncertainty. With `mixture="sequence"` each draw writes a text of
    its own. `bnlora.prediction.generated` has the formulas.

    Args:
        key: Random key of the draws and of the tokens. What is written after a prompt does not depend on the
            prompts after it.
        posterior: A fit of a network, any other posterior of one, or a base alone.
        prompts: Texts, or lists of token ids.
        max_new_tokens: Largest number of tokens of a text.
        temperature: 0 takes the most probable token at every step; above, tokens are drawn with
            probabilities proportional to p^(1 / temperature), where p is the mixture's or the draw's.
        top_k: Draw from the so many most probable tokens; all when None.
        top_p: Of these, draw from the fewest that have this probability together; all when None.
        num_draws: Number of posterior draws.
        mixture: "token" or "sequence".
        stop: Strings or token ids that end a text, beside the tokenizer's end token. The text ends before
            them.
        batch_size: Prompts to run at a time; each has keys and values for every draw.
        on_token: Called with every token as soon as it is written. The program then stops after each one.
        console: Where to draw a progress bar; the terminal or notebook when omitted.

    Returns:
        Texts, and log-probabilities, entropy and its epistemic part for every token.

    Raises:
        ValueError: If the posterior is that of a tangent model, or adapts the head for label words alone; if
            there is no prompt, or one is empty, too long for the model, or has a token that the base lacks;
            if a number is out of its range.

    Example:
        >>> network = bl.Classifier(
        ...     base, bl.select(base, ["q_proj"], rank=1), bl.priors.normal(), label_ids=(3, 5)
        ... )
        >>> zeros = {"q_proj": {"a": jnp.ones((2, 1, 16)), "b": jnp.zeros((2, 16, 1))}}
        >>> point = bl.PointPosterior(network, zeros)
        >>> bl.generate(key, point, [[3, 5, 7], [9]], max_new_tokens=4)
        Generation(2 texts of 8 tokens, each by 8 draws)
    """
    key = check_key(key)
    source = _source(posterior)
    limits = {"max_new_tokens": max_new_tokens, "num_draws": num_draws, "batch_size": batch_size}
    check_at_least(limits, 1)
    check_option("mixture", mixture, get_args(Mixture))
    _check_choice(temperature, top_k, top_p)
    read = read_prompts(prompts, source.tokenizer, source.vocabulary)
    stops = read_stops(stop, source.tokenizer, source.vocabulary)
    _check_lengths(read, max_new_tokens, source.base.config.max_length)
    draw_key, token_key = jax.random.split(key)
    draws, copies = source.draws(draw_key, num_draws, mixture)
    drawn: Choice = "plain" if top_k is None and top_p is None else "filtered"
    choice: Choice = "greedy" if temperature == 0 else drawn
    room = -(-max_new_tokens // ROUND) * ROUND
    plan = Plan(mixture == "token", num_draws // copies, room, choice)
    filters = source.vocabulary if top_k is None else top_k, 1.0 if top_p is None else top_p
    rule = rule_of(temperature, *filters, stops)
    writing = Writing(source.owner, source.base, draws, plan, rule, stops, max_new_tokens, on_token)
    steps = writing.run(token_key, read, min(batch_size, len(read)))
    for _ in track(steps, max_new_tokens * -(-len(read) // batch_size), "generate", console):
        pass
    shown = tuple(p if isinstance(p, str) else " ".join(map(str, p)) for p in prompts)
    return writing.result(shown, copies)


@dataclass(frozen=True)
class _Source:
    """What writes: a classifier with its posterior, or a base."""

    owner: Any
    base: Base
    posterior: Any

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    @property
    def vocabulary(self) -> int:
        return self.base.modules[HEAD][1]

    def draws(self, key: Array, count: int, mixture: Mixture) -> tuple[Adapters, int]:
        """Draws of the adapters, and how many equal draws each stands for."""
        if self.owner is self.base:
            return {}, count if mixture == "token" else 1
        drawn = self.owner.trunk.held(self.posterior.draw_adapters(key, count))
        if mixture == "token" and count > 1 and all_equal(drawn):  # those of a point: one serves all
            return jax.tree.map(lambda x: x[:1], drawn), count
        return drawn, 1


def _source(posterior: Any) -> _Source:
    """The posterior's classifier and base; `ValueError` for one that cannot write."""
    if isinstance(posterior, Base):
        require_language_model(posterior, "generated texts")
        return _Source(posterior, posterior, None)
    if not isinstance(posterior, Posterior):
        raise ValueError(
            "expected a posterior, such as a fit or a bl.PointPosterior, or a base; got an object of type "
            f"{type(posterior).__name__}"
        )
    model = posterior.model
    if kind_of(model) == "tangent":
        raise ValueError(
            "a tangent posterior has logits of its classes only and no next token; fit the network instead: "
            "bl.fit with a bl.Classifier"
        )
    if not isinstance(model.base, Base):
        raise ValueError(
            f"generation needs a base of bl.load; got an object of type {type(model.base).__name__}"
        )
    require_language_model(model.base, "generated texts")
    base, rows = model.base, [site.d_out for site in model.sites.values() if site.module == HEAD]
    if rows and rows[0] != base.modules[HEAD][1]:
        raise ValueError(
            f"the adapter of {HEAD!r} has only the {rows[0]} rows of the label words, so it says nothing of "
            f"other tokens; fit modules without {HEAD!r}, or completions (bl.likelihoods.Completions)"
        )
    return _Source(model, base, posterior)


def _check_choice(temperature: Any, top_k: Any, top_p: Any) -> None:
    low, high = TEMPERATURES
    numeric = isinstance(temperature, int | float | np.number) and not isinstance(temperature, bool)
    if not numeric or not (temperature == 0 or low <= temperature <= high):
        raise ValueError(
            f"temperature must be 0, for the most probable token, or from {low:g} to {high:g}; got "
            f"{brief(temperature)}"
        )
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p need a temperature above 0; at 0 the most probable token is taken")
    if top_k is not None:
        check_at_least({"top_k": top_k}, 1)
    if top_p is not None and not (isinstance(top_p, int | float | np.number) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be above 0 and at most 1; got {brief(top_p)}")


def _check_lengths(prompts: list[list[int]], new: int, longest: int) -> None:
    for index, prompt in enumerate(prompts):
        if len(prompt) + new > longest:
            room = longest - len(prompt)
            remedy = f"max_new_tokens can be {room}" if room > 0 else "shorten the prompt"
            raise ValueError(
                f"the model has {longest} positions; prompt {index} has {len(prompt)} tokens and "
                f"max_new_tokens is {new}, so {remedy}"
            )
