"""A script for a process with eight devices: the same fit, predictions and chains on meshes of several forms.

Prints JSON: for each mesh that its command line names, numbers of a fit and what follows, and the collectives
of the compiled step.
"""

import collections
import json
import re
import sys

import jax
import numpy as np
import optax

import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
ROWS = tiny_rows(jax.random.key(2), 32)
MESHES = {
    "one": None,
    "data": ({"data": 8}, "tensor"),
    "data and model": ({"data": 4, "model": 2}, "tensor"),
    "fully, with draws": ({"data": 2, "model": 2, "draw": 2}, "fully"),
}
OPERATION = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
)


def collectives(step, state) -> dict:
    """Collectives of the compiled step by kind, and the shapes of gathered arrays."""
    lowered = step.compiled(16).lower(*step.arguments(state, KEY, np.arange(16)[None]))
    found = OPERATION.findall(lowered.compile().as_text())
    gathered = [
        shape for of, kind in found if kind == "all-gather" for shape in re.findall(r"\[([\d,]*)\]", of)
    ]
    return {"kinds": dict(collections.Counter(kind for _, kind in found)), "gathered": sorted(set(gathered))}


def measured(name: str) -> dict:
    """The numbers of one mesh."""
    base = tiny_base(jax.random.key(1), num_layers=3)
    if MESHES[name] is not None:
        sizes, split = MESHES[name]
        base = base.on(bl.mesh(**sizes), split=split)
    sites = bl.select(base, ["q_proj", "o_proj", "lm_head"], rank=2)
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    adam = optax.adam(0.02)
    fit = bl.fit(KEY, model, guide, ROWS, adam, num_steps=4, batch_size=16)
    step, state = bl.svi_step(KEY, model, guide, ROWS, adam, batch_size=16)
    result = {
        "bound": fit.history["elbo"].tolist(),
        "probabilities": bl.predict(KEY, fit, ROWS, num_draws=8).probs.tolist(),
        "traces": fit.num_traces,
        "collectives": collectives(step, state),
        "split": {
            path: list(leaf.sharding.spec)
            for path, leaf in ((jax.tree_util.keystr(p), x) for p, x in leaves(base))
            if hasattr(leaf.sharding, "spec")
        },
    }
    if name in ("one", "fully, with draws"):
        head = bl.Classifier(base, bl.select(base, ["lm_head"], rank=1), bl.priors.normal(), label_ids=(3, 5))
        sizes = {"num_chains": 2, "num_warmup": 20, "num_draws": 10}
        result["chains"] = bl.sample_nuts(KEY, head, ROWS, **sizes).vectors[:, :3].tolist()
    return result


def leaves(base):
    return jax.tree_util.tree_flatten_with_path(base.weights)[0]


if __name__ == "__main__":
    assert jax.device_count() == 8
    json.dump({name: measured(name) for name in sys.argv[1:]}, sys.stdout)
