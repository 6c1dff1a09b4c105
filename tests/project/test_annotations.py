"""The shapes that annotations state are the shapes that come and go.

In a process of its own the library is imported through jaxtyping's hook, by which beartype checks every
call; a fit, a prediction and what follows run under it. A wrong shape, planted, must be found.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders.thorough import EVERY

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import jaxtyping

NAMES = "data metrics prediction.predict assess.prior_predictive priors.gp program.draws guides.affine"
NAMES += " infer.approximate.temperature _util.fingerprint adapters.frames infer.svi.plateau priors.core"
NAMES += " prediction.selective prediction.risk_control prediction.class_scores prediction.conformal"
NAMES += " prediction.decisions assess.monitor guides.around program.tangent infer.core infer.mcmc.whitened"
hook = jaxtyping.install_import_hook([f"bnlora.{name}" for name in NAMES.split()], "beartype.beartype")
import jax, numpy as np, numpyro.distributions as dist, optax
import bnlora as bl
from bnlora.infer.approximate import fit_temperature
from bnlora.testing import tiny_base, tiny_rows
import datasets
sys.modules["bnlora.data.text"].Dataset = datasets.Dataset  # which is there for type checkers alone

key, rows = jax.random.key(0), tiny_rows(jax.random.key(1), 8)
base = tiny_base(key, num_layers=1)
sites = bl.select(base, ["lm_head"], rank=1)
model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=np.array([3, 5]))
guide = bl.guides.SiteFlow(model.prior, hidden=4, blocks=1)
"""
RUN = """
fit = bl.fit(key, model, guide, rows, optax.adam(0.01), num_steps=2, batch_size=4)
many = bl.Prediction(np.log(np.full((2, 40, 2), 0.5)))
bl.monitor.Monitor.start(key, many, np.zeros(40, int)).update(many, np.ones(40, int)).overview
prediction = bl.predict(key, fit, rows, num_draws=3)
labels = np.asarray(rows.labels)
bl.metrics.summary(key, prediction, labels, num_resamples=10)
bl.metrics.reliability(prediction, labels)
prediction.entropy, prediction.mutual_information
rule = bl.conformal.calibrate_sets(prediction, labels, level=0.5, score="adaptive", key=key)
rule.report(prediction, labels, key=key).mean_size
bl.conformal.coverage_range(8)
bl.risk_control.control_risk(prediction, labels, max_risk=0.5).answers(prediction)
costs = bl.decisions.zero_one(2, review=0.2)
bl.decisions.decide(prediction, costs)
bl.decisions.posterior_value(key, prediction, prediction, labels, costs, num_resamples=10)
bl.selective.risk_coverage(key, prediction, labels, num_resamples=10)
bl.prior_predictive(key, model, rows, num_draws=3).spread
frames = bl.frames(key, base, ["q_proj", "slope"], rows, label_ids=np.array([3, 5]), size=2)
for scale in (1.0, dist.HalfNormal(1.0)):
    core = bl.priors.core(frames, scale=scale)
    tangent = bl.Tangent(bl.Classifier(base, frames.sites, core, label_ids=(3, 5)))
    gaussian = bl.laplace(tangent, rows)
    guide = bl.guides.Guide(tangent.prior, bl.guides.around(gaussian))
    start, plateau = bl.start_at(key, guide, gaussian), bl.Plateau(window=2)
    steps = {"num_steps": 4, "batch_size": 4, "init_params": start, "plateau": plateau}
    bl.predict(key, bl.fit(key, tangent, guide, rows, optax.adam(0.01), **steps), rows, num_draws=3)
    bl.sample_nuts(key, tangent, rows, mass=gaussian, num_warmup=20, num_draws=5, num_chains=2)
bl.choose_scales(tangent, rows, by="layer", prior=dist.HalfNormal(1.0))
gaussian.log_density(gaussian.draw_vectors(key, 3))
print("checked")
"""
PLANTED = {
    "labels of another shape": "bl.metrics.nll(np.log([[0.5, 0.5]]), np.zeros((1, 1), int))",
    "draws without their axis": "bl.Prediction(np.zeros((3, 2)))",
    "tokens that are no integers": "bl.Batch(rows.tokens * 1.0, rows.mask, rows.labels)",
    "a mask of another length": "bl.Batch(rows.tokens, rows.mask[:, 1:], rows.labels)",
    "a bound that is no vector": "bl.Plateau().reached(np.zeros((2, 2)))",
}


ATTEMPT = "try:\n    {}\nexcept jaxtyping.TypeCheckError:\n    print({!r})\n"


@pytest.fixture(scope="module")
def checked() -> subprocess.CompletedProcess:
    """What one process prints that tries the planted shapes and then runs the fit: its imports take long."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    planted = "".join(ATTEMPT.format(code, name) for name, code in PLANTED.items())
    run = [sys.executable, "-W", "ignore", "-c", PROGRAM + planted + (RUN if EVERY else "")]
    return subprocess.run(run, env=env, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.thorough
def test_a_fit_and_what_follows_keep_to_their_annotations(checked):
    assert checked.stdout.endswith("checked\n"), checked.stderr


def test_a_wrong_shape_is_found(checked):
    assert [line for line in checked.stdout.splitlines() if line != "checked"] == list(PLANTED), (
        checked.stderr
    )
