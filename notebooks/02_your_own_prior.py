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
# # Write your own prior: a horseshoe over ranks
#
# **Question.** An adapter has $r$ ranks, and the number that a task needs is unknown. Can a prior represent this uncertainty? What does
# such a prior predict before any label is observed, and how do the data change it?
#
# **Model.** The update of the head is a sum over ranks, $\Delta W = \sum_k b_k a_k^\top$ with
#
# $$a_k \sim \mathcal N(0, I / d), \qquad b_k = s\, g_k z_k, \quad z_k \sim \mathcal N(0, I), \qquad
# g_k = \frac{\tau \lambda_k}{\sqrt{1 + \tau^2 \lambda_k^2}}, \quad \lambda_k \sim \mathrm C^+(0, 1), \quad
# \tau \sim \mathrm C^+(0, \tau_0).$$
#
# This is the regularised horseshoe (Piironen and Vehtari 2017) with a slab of scale $s$. The gain $g_k \in (0, 1)$ is the fraction of
# the slab scale that rank $k$ has: near one for ranks in use, near zero for all others. $m = \sum_k g_k^2$ is the effective number of
# ranks in use. The library has a version, `bl.priors.regularized_horseshoe`; this notebook writes one from scratch.

# %%
# %matplotlib inline
import os

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats

import bnlora as bl
from bnlora.data.assets import REUTERS_WORDS, fetch_smollm2, reuters_splits, vader_splits
from bnlora.plots.base import BLUE, GREY, ORANGE, caption, legend_above, make_axes

fast = bool(os.environ.get("BNLORA_FAST"))
num_prior, max_length = (100, 32) if fast else (400, 64)
nuts_options = {"num_warmup": 50, "num_draws": 50, "max_doublings": 4}
if not fast:
    nuts_options = {"num_warmup": 500, "num_draws": 400, "thinning": 2, "max_doublings": 7}

# %% [markdown]
# ## The prior
#
# A prior is a function that takes the sites and returns adapters. It may sample any variables under any names. The first axis of every
# shape is the layer. `infer={"init": ...}` sets the start of guides and chains: scales start at their median, and $b$ starts at zero,
# so the first step evaluates the untouched model.


# %%
def gain(tau, local):
    """The gain tau lambda / sqrt(1 + (tau lambda)^2). `hypot` avoids overflow of the square of a large Cauchy draw."""
    return tau * local / jnp.hypot(1.0, tau * local)


def horseshoe(scale, tau_0=0.25):
    """Regularised horseshoe over the ranks of each layer."""

    def prior(sites):
        adapters = {}
        for name, site in sites.items():
            layers, rank = site.depth, site.rank
            tau = numpyro.sample(f"{name}.tau", dist.HalfCauchy(tau_0), infer={"init": "median"})
            with numpyro.plate(f"{name}.layer", layers):
                local = numpyro.sample(
                    f"{name}.local",
                    dist.HalfCauchy(1.0).expand([layers, rank]).to_event(1),
                    infer={"init": "median"},
                )
                a = numpyro.sample(
                    f"{name}.a", dist.Normal(0, site.d_in**-0.5).expand([layers, rank, site.d_in]).to_event(2)
                )
                z = numpyro.sample(
                    f"{name}.z",
                    dist.Normal(0, 1).expand([layers, site.d_out, rank]).to_event(2),
                    infer={"init": "zero"},
                )
            adapters[name] = {"a": a, "b": scale * gain(tau, local)[:, None, :] * z}
        return adapters

    return prior


# %% [markdown]
# The weights are *non-centred*: the prior samples $z$ and computes $b$. Sampling $b$ given its scale would give the posterior a funnel
# shape, which is difficult for guides and for NUTS.
#
# ## The rows and the model
#
# The task is to classify news by topic. There are eight topics, and one word names each of them. The adapter changes only the rows of
# these words in the head of SmolLM2. All layers are below the adapter, so they run once.

# %%
base = bl.load(fetch_smollm2())


def classification(splits, template, words):
    """The training rows of a task, tokenised."""
    rows = type(splits)({"train": splits["train"]})
    return bl.text_classification(
        rows,
        base.tokenizer,
        text="text",
        label="label",
        template=template,
        words=words,
        max_length=max_length,
        truncate="right",
    )


sizes = {"seed": 0, "train": 32 if fast else 64, "validation": 1, "test": 32}
news = classification(reuters_splits(**sizes), "News: {text}\nTopic:", list(REUTERS_WORDS))
sites = bl.select(base, ["lm_head"], rank=4)


def model_of(prior, data):
    """A classifier for a task under a prior."""
    return bl.Classifier(base, sites, prior, label_ids=data.label_ids)


model = model_of(horseshoe(1.0), news)
train = bl.cache_prefix(model, news.train)
print(model)

# %% [markdown]
# ## Why it is called a horseshoe
#
# At $\tau = 1$ the squared gain $g_k^2 = \lambda_k^2 / (1 + \lambda_k^2)$ of a half-Cauchy $\lambda_k$ follows
# $\mathrm{Beta}(\tfrac12, \tfrac12)$. The density of this distribution increases towards both ends: a rank is off or on, and rarely in
# between. The draws of the program above must therefore follow this distribution if $\tau$ is fixed at one. A smaller $\tau$ moves mass
# to the left.

# %%
program = numpyro.handlers.condition(model.prior, data={"lm_head.tau": jnp.array(1.0)})
prior_sites = numpyro.infer.Predictive(program, num_samples=500)(jax.random.key(1))
squared_gains = np.asarray(gain(1.0, prior_sites["lm_head.local"])).ravel() ** 2
test = stats.kstest(squared_gains, stats.beta(0.5, 0.5).cdf)
print(f"Kolmogorov-Smirnov test against Beta(1/2, 1/2): distance {test.statistic:.3f}, p = {test.pvalue:.2f}")
assert test.pvalue > 1e-3

(panel,), figure, _ = make_axes(None, 1, width=5.5, height=2.8)
grid = np.linspace(0.004, 0.996, 300)
panel.hist(
    squared_gains,
    bins=np.linspace(0, 1, 26),
    density=True,
    color=BLUE,
    alpha=0.55,
    label="draws of the program",
)
panel.plot(grid, stats.beta(0.5, 0.5).pdf(grid), color=ORANGE, label="Beta(1/2, 1/2)")
panel.set(xlabel=r"squared gain $g_k^2$", ylabel="density", ylim=(0, 6))
panel.legend(fontsize=8)
caption(
    figure,
    f"The horseshoe: {len(squared_gains):,} draws of the squared gains under the prior with tau fixed at one.",
)
figure

# %% [markdown]
# ## The prior predictive
#
# The scale of a weight is hard to interpret; a probability is not. `bl.prior_predictive` draws adapters from the prior and evaluates the
# model without the labels. Start with three scales of the slab.

# %%
key = jax.random.key(0)
by_scale = {
    scale: bl.prior_predictive(key, model_of(horseshoe(scale), news), train, num_draws=num_prior)
    for scale in (0.01, 1.0, 100.0)
}
for scale, predictive in by_scale.items():
    print(f"scale {scale:g}: {predictive.verdict}\n")
assert by_scale[0.01].verdict.startswith("no change")
assert by_scale[100.0].verdict.startswith("confident nonsense")

# %%
bl.plots.prior_predictive(by_scale[100.0])

# %% [markdown]
# A wide prior is not an uninformative prior. With a scale of 100 almost every draw is certain of one topic, and different draws are
# certain of different topics. A vague prior on the weights is a strong prior on the predictions.
#
# Instead, choose a plausible spread of the log-odds and compute the scale. Here the spread is 2 nats: the middle two thirds of the
# draws change the odds of a pair of topics by a factor of up to $e^2 \approx 7$. The search uses the same random numbers for all
# scales, so the result is exact for these draws.

# %%
scale = bl.scale_for_spread(key, model, horseshoe, train, spread=2.0, num_draws=num_prior)
model = model_of(horseshoe(scale), news)
sensible = bl.prior_predictive(key, model, train, num_draws=num_prior)
print(f"Scale {scale:.3f} has a spread of {sensible.overall_spread:.3f} nats.\n{sensible.verdict}")
np.testing.assert_allclose(sensible.overall_spread, 2.0, rtol=5e-3)
assert sensible.verdict.startswith("reasonable")

# %%
bl.plots.prior_predictive(sensible)

# %% [markdown]
# The slab makes this problem well-posed: the *plain* horseshoe, $b_k = \tau \lambda_k z_k$, has no finite standard deviation, and its
# largest draw would determine any spread measured on draws. Two priors with the same spread can also differ: here half of the draws
# change almost nothing, and the others change a lot.
#
# ## Shrinkage of ranks in the posterior
#
# NUTS samples the posterior of all sites. We use the same prior for two tasks: the eight topics, and film reviews with two label words.
# With two classes the likelihood depends only on $w = \sum_k (b_{k1} - b_{k0})\, a_k$, and given all $b$,
#
# $$w \sim \mathcal N\bigl(0, \; \textstyle\sum_k (b_{k1} - b_{k0})^2 \; I / d\bigr) :$$
#
# The likelihood does not depend on the distribution of the total among the ranks. Therefore **two words are informative about the size of
# the update and about nothing else of the ranks**: the data change the gains only through the total, and the prior determines the
# rest. With eight topics there are seven directions to learn.

# %%
chains = {"eight topics": bl.sample_nuts(jax.random.key(2), model, train, **nuts_options)}
if not fast:
    reviews = classification(vader_splits(**sizes), "Review: {text}\nSentiment:", [" negative", " positive"])
    two_words = model_of(horseshoe(scale), reviews)
    reviewed = bl.cache_prefix(two_words, reviews.train)
    chains["two words"] = bl.sample_nuts(jax.random.key(3), two_words, reviewed, **nuts_options)
for name, result in chains.items():
    certificate = result.certificate
    print(
        f"{name}: {result}\n  largest R-hat {max(certificate.rhat):.3f}, least bulk ESS {min(certificate.ess_bulk):.0f}, "
        f"{certificate.divergences} divergences"
    )
    if not fast:
        assert max(certificate.rhat) < 1.05
        assert certificate.divergences <= 0.01 * result.num_chains * result.num_draws * result.thinning


# %%
def gains_of(sites):
    """Gains of the ranks, largest first, shape (draw, rank)."""
    tau, local = np.asarray(sites["lm_head.tau"]), np.asarray(sites["lm_head.local"])
    gains = np.asarray(gain(tau.reshape(-1, 1), local.reshape(-1, local.shape[-1])))
    return -np.sort(-gains, axis=1)


prior_draws = numpyro.infer.Predictive(model.prior, num_samples=4000)(jax.random.key(4))
gains = {"prior": gains_of(prior_draws)} | {name: gains_of(result.sites()) for name, result in chains.items()}
num_used = {name: (g**2).sum(1) for name, g in gains.items()}

panels, figure, _ = make_axes(None, 2, width=4.6, height=3.0, columns=2)
positions, colours = (
    np.arange(1, sites["lm_head"].rank + 1),
    {"prior": GREY, "eight topics": BLUE, "two words": ORANGE},
)
for offset, (name, g) in zip((-0.2, 0.0, 0.2), gains.items(), strict=not fast):
    for inner, width in ((0.9, 1.5), (0.5, 4.0)):
        low, high = np.quantile(g, [(1 - inner) / 2, (1 + inner) / 2], axis=0)
        panels[0].vlines(positions + offset, low, high, color=colours[name], linewidth=width)
    panels[0].plot(
        positions + offset, np.median(g, axis=0), "o", color=colours[name], markersize=5, label=name
    )
    panels[1].hist(
        num_used[name],
        bins=np.linspace(0, len(positions), 25),
        density=True,
        histtype="step",
        color=colours[name],
        linewidth=1.6,
    )
panels[0].set(xticks=positions, xlabel="rank, ordered by gain", ylabel="gain", ylim=(0, 1.02))
legend_above(panels[0])
panels[1].set(xlabel="ranks in use, $m = \\sum_k g_k^2$", ylabel="density")
caption(
    figure,
    "Left: gains of the ranks under the prior and the two posteriors; medians, central 50 % (thick) and 90 % (thin) intervals. Right: "
    "effective number of ranks in use.",
)
figure

# %%
median = {name: np.median(values) for name, values in num_used.items()}
low, high = np.quantile(num_used["eight topics"], [0.05, 0.95])
print(
    f"Ranks in use of {len(positions)}, median: "
    + ", ".join(f"{value:.2f} ({name})" for name, value in median.items())
    + f"; 90 % given eight topics: {low:.2f} to {high:.2f}.\n"
    "Share of draws in which the smallest gain is below one half: "
    + ", ".join(f"{(g[:, -1] < 0.5).mean():.0%} ({name})" for name, g in gains.items())
    + "."
)
assert median["eight topics"] > median["prior"] + 0.5, "eight topics need more ranks than the prior expects"
if not fast:
    assert abs(median["two words"] - median["prior"]) < median["eight topics"] - median["prior"]

# %% [markdown]
# ## What to conclude, and what not
#
# - A prior is a short NumPyro function. To test it, compare draws of a site with its known distribution.
# - Choose scales by the spread of the log-odds. The prior predictive shows both failures, certainty and no effect, before any fit.
# - The horseshoe shrinks ranks unless the data require them. If the task has many directions, the data require them, and the posterior
#   uses ranks that the prior expected to be off. If the task has one direction, the data are informative only about the size of the
#   update, and ranks that a small update does not need stay shrunk.
#
# **Not** to conclude:
#
# - that the number of ranks in use is a property of the task. It depends on the prior and its slab: a wider slab reaches the same size
#   of update with fewer ranks;
# - that a mean-field guide would give the same result. A guide that starts at $b = 0$ may stay there; `03_guides_and_the_bound` shows
#   how to detect this.
