"""A fit of no steps, for tests of what happens to fits."""

import jax
import numpy as np

import bnlora as bl
from bnlora.infer.svi.elbo import TERMS


def unfitted(model, guide, train, params, last_params=None) -> bl.Fit:
    """A fit whose parameters are given; `last_params` are the same when omitted."""
    none = np.zeros(0)
    return bl.Fit(
        model=model,
        guide=guide,
        params=params,
        last_params=params if last_params is None else last_params,
        history={name: none for name in TERMS},
        validation={"step": none, "nll": none},
        train=train,
        best_step=0,
        skipped_steps=0,
        num_traces=1,
        step_seconds=none,
        draw_key=jax.random.key(1),
        stopped="steps",
    )
