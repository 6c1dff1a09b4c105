"""Every public function once on the tiniest model: run by `test_64_bits.py` with JAX_ENABLE_X64=1."""

import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
import numpyro.distributions as dist
import optax
from numpyro.infer.autoguide import AutoNormal

import bnlora as bl
from bnlora import guides, priors
from bnlora.assess import sbc
from bnlora.infer import approximate as inference
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=1)
ROWS = tiny_rows(jax.random.key(2), 8)
FOLDER = Path(tempfile.mkdtemp())
CHAINS = {"num_warmup": 20, "num_draws": 10, "num_chains": 2}


def model(prior, targets=("q_proj", "lm_head")):
    return bl.Classifier(BASE, bl.select(BASE, list(targets), rank=1), prior, label_ids=(3, 5))


NORMAL, HEAD = model(priors.normal()), model(priors.normal(), ["lm_head"])


def fitted(chosen, guide, **options):
    options = {"num_steps": 2, "batch_size": 4} | options
    return bl.fit(KEY, chosen, guide, ROWS, optax.adam(1e-2), **options)


def finite(posterior):
    assert np.isfinite(bl.predict(KEY, posterior, ROWS, num_draws=2).probs).all()
    return posterior


def samplers():
    finite(bl.sample_smc(KEY, HEAD, ROWS, num_runs=2, num_draws=20, num_integration_steps=2))
    finite(bl.sample_nuts(KEY, HEAD, ROWS, init_strategy="pathfinder", mass="dense", **CHAINS)).certify()
    for _ in range(2):  # the second reads the pieces of the first
        finite(bl.sample_hmc(KEY, HEAD, ROWS, num_integration_steps=2, folder=FOLDER / "pieces", **CHAINS))
    finite(bl.sample_mclmc(KEY, HEAD, ROWS, num_warmup=100, num_draws=8, num_chains=2))
    finite(bl.sample_elliptical(KEY, HEAD, ROWS, num_warmup=5, num_draws=10, num_chains=2))


def references():
    fit = fitted(NORMAL, guides.Guide(NORMAL.prior, guides.mean_field()))
    chains = bl.sample_nuts(KEY, NORMAL, ROWS, sites=["lm_head"], given=fit, **(CHAINS | {"num_draws": 60}))
    bl.compare(KEY, fit, chains, ROWS, num_draws=30, against="anything")
    bl.save_reference(bl.store_reference(chains, ROWS, num_draws=30), FOLDER / "reference")
    stored = bl.load_reference(FOLDER / "reference")
    bl.compare(KEY, fit, stored, ROWS, num_draws=30, against="anything")


def fits():
    sparse = model(priors.sparse_gp(rows=2, cols=2))
    fit = finite(fitted(sparse, guides.SiteFlow(sparse.prior, hidden=4, blocks=1)))
    bl.save_fit(fit, FOLDER / "fit")
    finite(bl.load_fit(FOLDER / "fit", sparse, guides.SiteFlow(sparse.prior, hidden=4, blocks=1)))
    prediction = bl.predict(KEY, fit, ROWS, num_draws=4)
    bl.metrics.summary(jax.random.key(0), prediction, ROWS.labels)
    bl.to_arviz(fit.draw_key, fit, ROWS, num_draws=20)
    bl.diagnose(fit.draw_key, fit, ROWS)


def families():
    made = (
        guides.blob(), guides.matrix_normal(), guides.full(), guides.low_rank(rank=2),
        guides.ensemble(size=2), guides.row_shared(hidden=4, blocks=1), guides.iaf(hidden=4),
        guides.spline(hidden=4), guides.block_neural(hidden=2),
    )  # fmt: skip
    for family in made:
        finite(fitted(HEAD, guides.Guide(HEAD.prior, family)))
    mixed = guides.Guide(HEAD.prior, {r".*\.a": guides.dropout(), ".*": guides.delta()})
    finite(fitted(HEAD, mixed, memory=bl.Memory(accumulate=2, activations="bfloat16", remat="layers")))
    finite(fitted(HEAD, AutoNormal(HEAD.prior, init_loc_fn=guides.init_to_base)))


def laws():
    members = (
        priors.laplace(), priors.spike_and_slab(), priors.matrix_normal(), priors.ard(), priors.horseshoe(),
        priors.regularized_horseshoe(), priors.pooled_scales(priors.normal()),
        priors.pooled_sparse_gp(rows=2, cols=2), priors.subspace(),
    )  # fmt: skip
    for prior in members:
        bl.prior_predictive(KEY, model(prior, ["q_proj"]), ROWS, num_draws=4)


def tangent():
    frames = bl.frames(KEY, BASE, ["v_proj", "lm_head", "slope"], ROWS, label_ids=(3, 5), size=2)
    scale = dist.HalfNormal(1.0)
    core = bl.Classifier(BASE, frames.sites, priors.core(frames, scale=scale), label_ids=(3, 5))
    linear = bl.Tangent(core)
    gaussian = finite(bl.laplace(linear, ROWS))
    guide = guides.Guide(linear.prior, guides.full(over="all"))
    start, plateau = bl.start_at(KEY, guide, gaussian), bl.Plateau(window=2)
    finite(fitted(linear, guide, num_steps=8, init_params=start, plateau=plateau))
    scales = bl.choose_scales(linear, ROWS, by="layer", prior=scale).values
    fixed = linear.with_prior(priors.core(frames, scale=scales))
    finite(bl.sample_nuts(KEY, fixed, ROWS, mass=bl.laplace(fixed, ROWS), **CHAINS))
    finite(bl.fit_core(KEY, BASE, ROWS, label_ids=(3, 5), size={"v_proj": 2}, num_steps=4))


def others():
    inner = model(priors.normal(), ["q_proj"])
    post = fitted(inner, guides.Guide(inner.prior, guides.mean_field()))
    for mixture in ("token", "sequence"):
        texts = bl.generate(KEY, post, [[3, 5]], max_new_tokens=3, temperature=1.0, mixture=mixture)
        assert np.isfinite(texts.log_probs).all()
    point = fitted(HEAD, guides.Guide(HEAD.prior, guides.delta()), num_steps=50)
    for structure in ("full", "diagonal", "kronecker"):
        finite(inference.laplace(point, ROWS, structure=structure))
    finite(inference.swag(KEY, point, learning_rate=0.01, num_steps=20, batch_size=4))
    finite(inference.training_free(KEY, point, ROWS, tolerance=0.1, num_draws=2, num_bisections=1))
    schedule = inference.Schedule(num_warmup=2, num_draws=4, thinning=1, batch_size=4)
    finite(inference.sgld(KEY, HEAD, ROWS, schedule, step_size=1e-3))
    finite(inference.sghmc(KEY, HEAD, ROWS, schedule, step_size=1e-3, friction=1.0))
    rate = optax.adam(1e-2)
    ensemble = partial(inference.fit_ensemble, KEY, HEAD, guides.SiteFlow, ROWS, rate, size=2)
    finite(ensemble(num_steps=1, batch_size=4))
    guide = guides.Guide(HEAD.prior, guides.mean_field())
    infer = sbc.svi_inference(KEY, HEAD, guide, rate, num_steps=2, num_draws=4)
    sbc.run(KEY, HEAD, infer, ROWS, num_simulations=2)


if __name__ == "__main__":
    assert jax.config.jax_enable_x64
    for part in sys.argv[1:]:
        globals()[part]()
        print(part, "done", flush=True)
