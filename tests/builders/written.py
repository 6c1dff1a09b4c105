"""A posterior with draws that differ, and what its draws say of a text by whole forward passes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

import bnlora as bl
from bnlora.adapters.sites import HEAD
from bnlora.testing import tiny_base


class Drawn:
    """Independent normal adapters; `order` permutes the draws."""

    def __init__(self, model, *, scale=0.5, order=None):
        self.model, self.scale, self.order = model, scale, order

    def draw_adapters(self, key, num_draws):
        shapes = {name: site.shapes for name, site in self.model.sites.items()}
        leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
        keys = jax.random.split(key, len(leaves))
        drawn = [
            self.scale * jax.random.normal(k, (num_draws, *shape))
            for k, shape in zip(keys, leaves, strict=True)
        ]
        order = jnp.arange(num_draws) if self.order is None else jnp.asarray(self.order)
        return jax.tree.unflatten(tree, [x[order] for x in drawn])


@cache
def writer(targets=("q_proj", "down_proj", "lm_head"), *, scale=0.5) -> Drawn:
    """A posterior over adapters of a tiny model; those of the layers are in the second of two."""
    base = tiny_base(jax.random.key(1), num_layers=2)
    sites = bl.select(base, list(targets), rank=2, layers=[1])
    likelihood = bl.likelihoods.Completions(2)
    return Drawn(bl.Classifier(base, sites, bl.priors.normal(), likelihood=likelihood), scale=scale)


def log_probs_by_draw(posterior, adapters, prompt, tokens) -> np.ndarray:
    """Log-probabilities of all tokens at every place after a prompt under each draw.

    For tokens (place,) the shape is (draw, place, token), for texts (text, place) (draw, text, place, token).
    """
    texts = np.atleast_2d(tokens)
    rows = jnp.asarray(np.concatenate([np.tile(prompt, (len(texts), 1)), texts], 1))
    base = posterior.model.base
    whole = _by_draw(posterior)(base.weights, adapters, rows)[:, :, len(prompt) - 1 : -1]
    found = np.asarray(whole, np.float64)
    return found[:, 0] if np.ndim(tokens) == 1 else found


@cache
def _by_draw(posterior):
    """The program that runs rows through the whole network under each draw."""

    def one(weights, rows, draw):
        placed = posterior.model.sites.place(draw, first_layer=0)
        if HEAD in placed:
            placed[HEAD] = jax.tree.map(lambda x: x[None], placed[HEAD])
        return jax.nn.log_softmax(posterior.model.base.bind(weights)(rows, adapters=placed))

    return jax.jit(lambda weights, draws, rows: jax.lax.map(lambda d: one(weights, rows, d), draws))


def entropy(log_probs: np.ndarray) -> np.ndarray:
    return -(np.exp(log_probs) * log_probs).sum(-1)
