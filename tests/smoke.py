"""The main path on a tiny model, in a second Python: `make smoke`.

From rows to two fits, chains, their predictions and a tree of ArviZ. It finds what another version of Python,
JAX or ArviZ breaks at once; `make elsewhere` finds more.
"""

import jax
import numpy as np
import optax
from rich.console import Console

import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows

QUIET = Console(quiet=True)


def main() -> None:
    """Run it."""
    key = jax.random.key(0)
    base, rows, new = tiny_base(key, num_layers=2), tiny_rows(key, 24), tiny_rows(jax.random.key(1), 8)
    core = bl.fit_core(key, base, rows, label_ids=(3, 5), size={"v_proj": 2}, num_steps=10, console=QUIET)
    sites = bl.select(base, ["v_proj", "lm_head"], rank=2)
    model = bl.Classifier(base, sites, bl.priors.sparse_gp(rows=2, cols=2), label_ids=(3, 5))
    guide = bl.guides.SiteFlow(model.prior)
    fit = bl.fit(key, model, guide, rows, optax.adam(1e-2), num_steps=10, batch_size=8, console=QUIET)
    few = {"num_warmup": 50, "num_draws": 50, "num_chains": 2, "console": QUIET}
    chains = bl.sample_nuts(key, core.model, core.fit.train, mass=core.gaussian, **few)
    for posterior in (core, fit, chains):
        prediction = bl.predict(key, posterior, new, num_draws=8, console=QUIET)
        np.testing.assert_allclose(prediction.probs.sum(1), 1, atol=1e-5)
        print(type(posterior).__name__, bl.metrics.nll(prediction.log_probs, new.labels))
    print(bl.to_arviz(key, fit, new, num_draws=20)["posterior"].sizes)
    print(chains.certificate)


if __name__ == "__main__":
    main()
