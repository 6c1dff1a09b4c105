"""How large the program of a step is, which is what the first step's user waits for."""

import jax
import numpy as np
import optax
import pytest

import bnlora as bl
from bnlora.infer.svi.step import prepared_step
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
ROWS = tiny_rows(jax.random.key(2), 24)
SIZES = {"sparse": 820_000, "normal": 365_000}
"""Characters of the lowered text, some per cent above what they are; the loop of the steps is a tenth."""


class Counted:
    """A program that counts how often it is traced."""

    def __init__(self, program):
        self.program, self.count = program, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.program(*args, **kwargs)


def step_of(kind):
    """The loop and the arguments of its step; prior and guide count their traces from here on."""
    base = tiny_base(jax.random.key(1), num_layers=2)
    sites = bl.select(base, ["q_proj", "k_proj", "lm_head"], rank=2)
    prior = Counted(bl.priors.sparse_gp() if kind == "sparse" else bl.priors.normal())
    model = bl.Classifier(base, sites, prior, label_ids=(3, 5))
    family = bl.guides.Guide(model.prior, bl.guides.mean_field())
    guide = Counted(bl.guides.SiteFlow(model.prior) if kind == "sparse" else family)
    adam = optax.adam(1e-2)
    loop, state = prepared_step(KEY, model, guide, ROWS, adam, bl.Optimisation(scale_optimizer=adam))
    prior.count = guide.count = 0
    return loop, loop.arguments(state, KEY, np.arange(8)[None]), prior, guide


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
def test_the_text_of_a_step_stays_small(kind):
    loop, arguments, prior, guide = step_of(kind)
    text = loop.compiled(8).lower(*arguments).as_text()
    assert len(text) < SIZES[kind]
    assert guide.count == 1
    assert prior.count == 2  # once for its numbers, once for the marks of its sites
