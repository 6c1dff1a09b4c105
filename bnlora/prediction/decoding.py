r"""The compiled programs of generation: the prompts at once, then token after token.

A *stream* is a text that is being written: one for each prompt where the draws share a text, or one for each
draw. With the draws' distributions p_s(x) = p(x | prefix, adapters_s) of the next token,

    p(x) = sum_s w_s p_s(x),    w_s \propto prod_t p_s(token_t)            one shared stream
    p(x) = p_s(x)                                                          the stream of draw s

The layers below the lowest adapted one have one cache for each stream, those above one for each draw.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from bnlora._util.typing import Adapters
from bnlora.adapters.sites import HEAD, Sites
from bnlora.models.decoder_cache import Cache, empty_cache
from bnlora.models.decoder_layer import positions_of

Choice = Literal["greedy", "plain", "filtered"]
NO_TOKEN = -1
"""Fills up lists of tokens that stop a text."""

BLOCK = 256
"""Tokens of the vocabulary that are added up at a time."""

TOGETHER = 4096
"""Tokens of all prompts under all draws up to which the draws read the prompts at once."""


class Plan(NamedTuple):
    """What a program depends on besides the shapes of its arguments.

    Attributes:
        shared: Whether the draws share a stream.
        draws: Number of draws.
        room: Largest number of new tokens.
        choice: How a token is chosen.
    """

    shared: bool
    draws: int
    room: int
    choice: Choice

    @property
    def streams(self) -> int:
        """Number of streams of a prompt."""
        return 1 if self.shared else self.draws


class Rule(NamedTuple):
    """How tokens are chosen, and which ones end a text.

    Attributes:
        keys: Random key of each prompt.
        temperature: Divides the log-probabilities.
        top_k: Number of tokens that may be chosen.
        top_p: Probability of the smallest set of tokens that may be chosen.
        stops: Tokens that end a text, filled up with `NO_TOKEN`.
    """

    keys: Any
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    stops: Int[Array, " k"]


class State(NamedTuple):
    """Texts as far as they are written.

    Attributes:
        below: Cache of the layers below the adapters; its rows are (stream, prompt).
        above: Cache of the adapted layers, with a leading axis of draws.
        mask: True at the real tokens of the prompts, (prompt, slot).
        step: Number of tokens that every stream has, those after its end included.
        alive: Whether a stream goes on, (stream, prompt).
        lengths: Number of its tokens up to its end, (stream, prompt).
        tokens: The new tokens, (stream, prompt, token).
        log_weights: Log of the draws' weights after these tokens, (draw, prompt); equal unless shared.
        draw_log_probs: Log-probability of the tokens under each draw, (draw, prompt, token).
        log_probs: Log-probability of the tokens, (stream, prompt, token).
        aleatoric: Weighted mean over the draws of the entropy of theirs, (stream, prompt, token).
        epistemic: Mutual information of the token and the draw; zero unless shared.
    """

    below: Cache
    above: Cache
    mask: Bool[Array, "n slots"]
    step: Int[Array, ""]
    alive: Bool[Array, "g n"]
    lengths: Int[Array, "g n"]
    tokens: Int[Array, "g n room"]
    log_weights: Float[Array, "s n"]
    draw_log_probs: Float[Array, "s n room"]
    log_probs: Float[Array, "g n room"]
    aleatoric: Float[Array, "g n room"]
    epistemic: Float[Array, "g n room"]


def started(
    owner: Any, weights: Any, adapters: Adapters, tokens: Array, mask: Array, rule: Rule, plan: Plan
) -> State:
    """Read the prompts and choose the first token of every stream.

    Args:
        owner: A classifier or a base.
        weights: The frozen weights.
        adapters: Draws of the adapters; empty for a base.
        tokens: Prompts, padded on the left, (prompt, column).
        mask: True at their tokens.
        rule: How tokens are chosen.
        plan: Sizes, and whether the draws share a stream.
    """
    net = Network.of(owner, weights)
    rows, width = tokens.shape
    slots, dtype = width + plan.room, net.module.execution.dtype
    slot_mask = jnp.zeros((rows, slots), bool).at[:, :width].set(mask)
    hidden = net.module.embed_at(tokens, positions_of(mask))
    below = empty_cache(net.module.config, net.first, rows, slots, dtype)
    hidden, below = net.module.extend(hidden, slot_mask, below, 0, first_layer=0)
    above = empty_cache(net.module.config, net.total - net.first, rows, slots, dtype)

    def upper(draw: Adapters) -> tuple[Array, Cache]:
        return net.upper(draw, hidden, slot_mask, above, 0)

    # Long prompts fill the processor one draw at a time, and the memory if all draws run at once.
    few = plan.draws * rows * width <= TOGETHER or not adapters
    over = jax.vmap(upper, axis_size=plan.draws) if few else partial(jax.lax.map, upper)
    log_probs, above = over(adapters)
    shape = (plan.streams, rows)
    blank = jnp.zeros((*shape, plan.room))
    state = State(
        jax.tree.map(lambda x: jnp.tile(x, (1, plan.streams, 1, 1, 1)), below),
        above,
        slot_mask,
        jnp.asarray(0),
        jnp.ones(shape, bool),
        jnp.zeros(shape, int),
        blank.astype(int),
        jnp.full((plan.draws, rows), -jnp.log(plan.draws)),
        jnp.zeros((plan.draws, rows, plan.room)),
        blank,
        blank,
        blank,
    )
    return _chosen(state, log_probs, rule, plan)


def continued(
    owner: Any, weights: Any, adapters: Adapters, state: State, rule: Rule, count: Array, plan: Plan
) -> State:
    """Write up to `count` further tokens of every stream, fewer where all have ended."""
    net = Network.of(owner, weights)
    last = state.step + count

    def step(state: State) -> State:
        log_probs, below, above = _next(net, adapters, state, plan)
        return _chosen(state._replace(below=below, above=above), log_probs, rule, plan)

    return jax.lax.while_loop(lambda s: (s.step < last) & s.alive.any(), step, state)


class Network(NamedTuple):
    """A base with its weights, and where the adapters are.

    Attributes:
        module: The Flax module.
        sites: The sites; None for a base alone.
        first: The lowest adapted layer.
        total: Number of layers.
    """

    module: Any
    sites: Sites | None
    first: int
    total: int

    @classmethod
    def of(cls, owner: Any, weights: Any) -> "Network":
        """That of a classifier or a base."""
        base, sites = getattr(owner, "base", owner), getattr(owner, "sites", None)
        first = base.num_layers if sites is None else sites.first_layer
        return cls(base.bind(weights), sites, first, base.num_layers)

    def upper(
        self, adapters: Adapters, hidden: Array, mask: Array, cache: Cache, start: Any
    ) -> tuple[Float[Array, "n vocab"], Cache]:
        """The adapted layers under one draw, and log-probabilities after the last of the tokens."""
        placed = {} if self.sites is None else self.sites.place(adapters)
        head = placed.pop(HEAD, None)
        hidden, cache = self.module.extend(
            hidden, mask, cache, start, first_layer=self.first, adapters=placed
        )
        return jax.nn.log_softmax(self.module.head(hidden[:, -1], adapter=head)), cache


def _next(
    net: Network, adapters: Adapters, state: State, plan: Plan
) -> tuple[Float[Array, "s n vocab"], Cache, Cache]:
    """Distributions of the next token under each draw, after the last chosen one."""
    streams, rows, room = state.tokens.shape
    slots = jnp.arange(state.mask.shape[1])
    place = state.mask.shape[1] - room + state.step - 1
    mask = state.mask | ((slots >= state.mask.shape[1] - room) & (slots <= place))
    last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, 2)
    positions = jax.lax.dynamic_index_in_dim(positions_of(mask), place, 1)
    tiled = jnp.tile(mask, (streams, 1))
    hidden = net.module.embed_at(last.reshape(-1, 1), jnp.tile(positions, (streams, 1)))
    hidden, below = net.module.extend(hidden, tiled, state.below, place, first_layer=0)
    hidden = hidden.reshape(streams, rows, 1, -1)

    def upper(draw: Adapters, cache: Cache, hidden: Array) -> tuple[Array, Cache]:
        return net.upper(draw, hidden, mask, cache, place)

    shared = (hidden[0], None) if plan.shared else (hidden, 0)
    over = jax.vmap(upper, in_axes=(0, 0, shared[1]), axis_size=plan.draws)
    log_probs, above = over(adapters, state.above, shared[0])
    return log_probs, below, above


def _chosen(state: State, log_probs: Float[Array, "s n vocab"], rule: Rule, plan: Plan) -> State:
    """The state with the next token of every stream and its numbers."""
    mixture, aleatoric = log_probs, entropy(log_probs)
    epistemic = jnp.zeros_like(aleatoric)
    if plan.shared:
        mixture = jax.nn.logsumexp(state.log_weights[..., None] + log_probs, axis=0, keepdims=True)
        parts = aleatoric, divergence(log_probs, mixture)
        aleatoric, epistemic = (jnp.sum(jnp.exp(state.log_weights) * x, 0, keepdims=True) for x in parts)
    tokens = choose(rule, mixture, state.step, plan.choice)
    own = jnp.broadcast_to(tokens, (plan.draws, tokens.shape[1]))
    by_draw = jnp.take_along_axis(log_probs, own[..., None], axis=2)[..., 0]
    chosen = jnp.take_along_axis(mixture, tokens[..., None], axis=2)[..., 0]
    new = {
        "tokens": tokens,
        "draw_log_probs": by_draw,
        "log_probs": chosen,
        "aleatoric": aleatoric,
        "epistemic": epistemic,
    }

    def written(name: str, value: Array) -> Array:
        numbers = getattr(state, name)  # of one type for all steps, also where JAX has 64 bits
        return jax.lax.dynamic_update_index_in_dim(numbers, value.astype(numbers.dtype), state.step, 2)

    kept: dict[str, Any] = {name: written(name, value) for name, value in new.items()}
    log_weights = jax.nn.log_softmax(state.log_weights + by_draw, axis=0).astype(state.log_weights.dtype)
    ended = (tokens[..., None] == rule.stops).any(-1)
    return state._replace(
        step=state.step + 1,
        alive=state.alive & ~ended,
        lengths=state.lengths + state.alive,
        log_weights=log_weights if plan.shared else state.log_weights,
        **kept,
    )


def choose(rule: Rule, log_probs: Float[Array, "g n vocab"], step: Array, choice: Choice) -> Array:
    """The next token of every stream, (stream, prompt).

    A token depends on the key of its prompt, the number of its stream and its place in the text, and not on
    the other prompts.
    """
    if choice == "greedy":
        return jnp.argmax(log_probs, axis=-1)
    # The largest becomes zero before the division, so that it stays finite.
    scaled = (log_probs - log_probs.max(-1, keepdims=True)) / rule.temperature
    if choice == "filtered":
        scaled = filtered(scaled, rule.top_k, rule.top_p)

    def one(stream: Array, key: Array, scores: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, stream), step), scores)

    over_prompts = jax.vmap(one, in_axes=(None, 0, 0))
    return jax.vmap(over_prompts, in_axes=(0, None, 0))(jnp.arange(len(scaled)), rule.keys, scaled)


def filtered(scores: Float[Array, "*batch vocab"], top_k: Any, top_p: Any) -> Float[Array, "*batch vocab"]:
    """Scores with -inf at the tokens that may not be chosen.

    The `top_k` best stay; of these, the smallest set of the best whose probability reaches `top_p`. Tokens
    with the score of the last one that stays also stay.
    """
    ordered = -jnp.sort(-scores, axis=-1)
    inside = jnp.arange(scores.shape[-1]) < top_k
    probs = jax.nn.softmax(jnp.where(inside, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # The best one always stays; rounding may take it out for a `top_p` near zero.
    stays = (inside & (before < top_p)).at[..., 0].set(True)
    lowest = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores >= lowest, scores, -jnp.inf)


def entropy(log_probs: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """Entropy in nats; 0 log 0 is 0."""
    return -_sum(jnp.exp(log_probs) * jnp.maximum(log_probs, jnp.finfo(log_probs.dtype).min))


def divergence(log_p: Float[Array, "s n vocab"], log_q: Float[Array, "1 n vocab"]) -> Float[Array, "s n"]:
    """KL(p || q) in nats, precise where it is small.

    The terms p (e^r - 1 - r), r = log q - log p, add up to it and none is negative. A difference of entropies
    would lose a mutual information below 1e-4 nats to rounding.
    """
    r, p = log_q - log_p, jnp.exp(log_p)
    near = p * (jnp.expm1(jnp.minimum(r, 1.0)) - r)
    return _sum(jnp.where(r < 1, near, jnp.exp(log_q) - p * (1 + r)))


def _sum(x: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """Sum over the vocabulary, in blocks: one after the other, 50,000 numbers lose four digits."""
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)])
    blocks = padded.reshape(*x.shape[:-1], -1, BLOCK).sum(-1)
    return jax.lax.optimization_barrier(blocks).sum(-1)  # the compiler would make one sum of both
