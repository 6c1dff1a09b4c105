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
# **Question.** An adapter has $r$ ranks, and nobody knows how many it needs. Can a prior leave that open, what does such a prior say
# before any label has been seen, and what do the data make of it?
#
# **Model.** The update of the head is a sum over ranks, $\Delta W = \sum_k b_k a_k^\top$ with
#
# $$a_k \sim \mathcal N(0, I / d), \qquad b_k = s\, g_k z_k, \quad z_k \sim \mathcal N(0, I), \qquad
# g_k = \frac{\tau \lambda_k}{\sqrt{1 + \tau^2 \lambda_k^2}}, \quad \lambda_k \sim \mathrm C^+(0, 1), \quad
# \tau \sim \mathrm C^+(0, \tau_0).$$
#
# This is the regularised horseshoe (Piironen and Vehtari 2017) with a slab of scale $s$: a gain $g_k \in (0, 1)$ is the part of the slab
# that rank $k$ gets, near one for ranks that are in use and near zero for all others. $m = \sum_k g_k^2$ counts the ranks in
# use. `bl.priors.regularized_horseshoe` ships a version of it; here we write our own.

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
num_prior = 100 if fast else 400
run = {"num_warmup": 80, "num_draws": 80, "max_doublings": 5}
if not fast:
    run = {"num_warmup": 500, "num_draws": 400, "thinning": 2, "max_doublings": 7}

# %% [markdown]
# ## The prior
#
# A prior is a function of the sites that returns adapters. What it samples, and under which names, is its own affair;
# layers come first in every shape. `infer={"init": ...}` says where guides and chains start: at the median of a scale,
# and with $b = 0$, so that the first step is the untouched model.


# %%
def gain(tau, local):
    """The gain tau lambda / sqrt(1 + (tau lambda)^2); hypot lets no square of a large Cauchy draw overflow."""
    return tau * local / jnp.hypot(1.0, tau * local)


def horseshoe(scale, tau_0=0.25):
    """Regularised horseshoe over the ranks of every layer."""

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
# The weights are *non-centred*: $z$ is sampled, and $b$ computed. Sampling $b$ given its scale would make a funnel, which neither guides nor
# NUTS handle well.
#
# ## The rows and the model
#
# News about eight topics, each named by one word, on the rows of these words in SmolLM2's head. All layers lie below the adapter,
# so they run once.

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
        max_length=64,
        truncate="right",
    )


sizes = {"seed": 0, "train": 64, "validation": 1, "test": 32}
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
# At $\tau = 1$ the share $g_k^2 = \lambda_k^2 / (1 + \lambda_k^2)$ of a half-Cauchy $\lambda_k$ follows $\mathrm{Beta}(\tfrac12, \tfrac12)$, whose density goes up
# at both ends: a rank is off, or on, and rarely in between. So the sites of the program above must have that law once $\tau$ is
# held at one, whatever the code looks like. A smaller $\tau$ moves mass to the left.

# %%
program = numpyro.handlers.condition(model.prior, data={"lm_head.tau": jnp.array(1.0)})
drawn = numpyro.infer.Predictive(program, num_draws=500)(jax.random.key(1))
shares = np.asarray(gain(1.0, drawn["lm_head.local"])).ravel() ** 2
test = stats.kstest(shares, stats.beta(0.5, 0.5).cdf)
print(f"Kolmogorov-Smirnov against Beta(1/2, 1/2): distance {test.statistic:.3f}, p = {test.pvalue:.2f}")
assert test.pvalue > 1e-3

(panel,), figure, _ = make_axes(None, 1, width=5.5, height=2.8)
grid = np.linspace(0.004, 0.996, 300)
panel.hist(
    shares, bins=np.linspace(0, 1, 26), density=True, color=BLUE, alpha=0.55, label="draws of the program"
)
panel.plot(grid, stats.beta(0.5, 0.5).pdf(grid), color=ORANGE, label="Beta(1/2, 1/2)")
panel.set(xlabel=r"$g_k^2$, share of the slab", ylabel="density", ylim=(0, 6))
panel.legend(fontsize=8)
caption(figure, f"The horseshoe: {len(shares):,} draws of the gains under the prior with tau held at one.")
figure

# %% [markdown]
# ## What the prior predictive teaches
#
# A scale of a weight means nothing to anybody; a probability does. `bl.prior_predictive` draws adapters from the prior and runs the
# model, labels unread. Start with three scales of the slab.

# %%
key = jax.random.key(0)
tried = {
    scale: bl.prior_predictive(key, model_of(horseshoe(scale), news), train, num_draws=num_prior)
    for scale in (0.01, 1.0, 100.0)
}
for scale, found in tried.items():
    print(f"scale {scale:g}: {found.verdict}\n")
assert tried[0.01].verdict.startswith("no change")
assert tried[100.0].verdict.startswith("confident nonsense")

# %%
bl.plots.prior_predictive(tried[100.0])

# %% [markdown]
# A wide prior is not a modest one. With a scale of 100 almost every draw is certain of a topic, each draw of another one: to say that one
# knows nothing of the weights is to say a great deal about the labels.
#
# So turn the question round: ask for a spread of the log-odds that one would bet on, here 2 nats (the middle two thirds of the draws
# change the odds of a pair of topics by a factor of up to $e^2 \approx 7$), and find the scale. The search uses one
# set of random numbers for all scales, so that the answer is exact for the draws that it looks at.

# %%
scale = bl.scale_for_spread(key, model, horseshoe, train, spread=2.0, num_draws=num_prior)
model = model_of(horseshoe(scale), news)
sensible = bl.prior_predictive(key, model, train, num_draws=num_prior)
print(f"scale {scale:.3f} has a spread of {sensible.overall_spread:.3f} nats.\n{sensible.verdict}")
np.testing.assert_allclose(sensible.overall_spread, 2.0, rtol=5e-3)
assert sensible.verdict.startswith("reasonable")

# %%
bl.plots.prior_predictive(sensible)

# %% [markdown]
# The slab is what makes this question well-posed: the *plain* horseshoe, $b_k = \tau \lambda_k z_k$, has no standard deviation at all, and any spread
# measured on draws of it would be that of its largest draw. Two scales of the same spread are not the same prior either: half of
# the draws here change next to nothing, and the others a lot.
#
# ## Shrinkage of ranks in the posterior
#
# NUTS samples the posterior of all sites. Beside the eight topics we give the same prior a task of two words, film reviews. With
# two classes the likelihood sees $w = \sum_k (b_{k1} - b_{k0})\, a_k$ alone, and given all $b$,
#
# $$w \sim \mathcal N\bigl(0, \; \textstyle\sum_k (b_{k1} - b_{k0})^2 \; I / d\bigr) :$$
#
# how the total is dealt out among the ranks does not enter. So **two words say how large the update is, and nothing else about
# the ranks**: the gains move with that total, and the rest is the prior's own voice. Eight topics have seven directions to learn.

# %%
reviews = classification(vader_splits(**sizes), "Review: {text}\nSentiment:", [" negative", " positive"])
two_words = model_of(horseshoe(scale), reviews)
chains = {
    "eight topics": bl.sample_nuts(jax.random.key(2), model, train, **run),
    "two words": bl.sample_nuts(
        jax.random.key(3), two_words, bl.cache_prefix(two_words, reviews.train), **run
    ),
}
for name, found in chains.items():
    certificate = found.certificate
    print(
        f"{name}: {found}\n  largest R-hat {max(certificate.rhat):.3f}, least bulk ESS {min(certificate.ess_bulk):.0f}, "
        f"{certificate.divergences} divergences"
    )
    if not fast:
        assert max(certificate.rhat) < 1.05
        assert certificate.divergences <= 0.01 * found.num_chains * found.num_draws * found.thinning


# %%
def gains_of(drawn):
    """Gains of the ranks, largest first, shape (draw, rank)."""
    tau, local = np.asarray(drawn["lm_head.tau"]), np.asarray(drawn["lm_head.local"])
    gains = np.asarray(gain(tau.reshape(-1, 1), local.reshape(-1, local.shape[-1])))
    return -np.sort(-gains, axis=1)


prior_draws = numpyro.infer.Predictive(model.prior, num_draws=4000)(jax.random.key(4))
gains = {"prior": gains_of(prior_draws)} | {name: gains_of(found.sites()) for name, found in chains.items()}
used = {name: (g**2).sum(1) for name, g in gains.items()}

panels, figure, _ = make_axes(None, 2, width=4.6, height=3.0, columns=2)
places, colours = (
    np.arange(1, sites["lm_head"].rank + 1),
    {"prior": GREY, "eight topics": BLUE, "two words": ORANGE},
)
for offset, (name, g) in zip((-0.2, 0.0, 0.2), gains.items(), strict=True):
    for inner, width in ((0.9, 1.5), (0.5, 4.0)):
        low, high = np.quantile(g, [(1 - inner) / 2, (1 + inner) / 2], axis=0)
        panels[0].vlines(places + offset, low, high, color=colours[name], linewidth=width)
    panels[0].plot(places + offset, np.median(g, axis=0), "o", color=colours[name], markersize=5, label=name)
    panels[1].hist(
        used[name],
        bins=np.linspace(0, len(places), 25),
        density=True,
        histtype="step",
        color=colours[name],
        linewidth=1.6,
    )
panels[0].set(xticks=places, xlabel="rank, by size of its gain", ylabel="gain", ylim=(0, 1.02))
legend_above(panels[0])
panels[1].set(xlabel="ranks in use, $m = \\sum_k g_k^2$", ylabel="density")
caption(
    figure,
    "Left, gains of the ranks under the prior and two posteriors: medians, middle 50 % (thick) and 90 % (thin). Right, the number of ranks "
    "in use.",
)
figure

# %%
middle = {name: np.median(values) for name, values in used.items()}
low, high = np.quantile(used["eight topics"], [0.05, 0.95])
print(
    f"Ranks in use, median: {middle['prior']:.2f} of {len(places)} under the prior, {middle['two words']:.2f} given two words, "
    f"{middle['eight topics']:.2f} given eight topics (90 %: {low:.2f} to {high:.2f}).\n"
    f"Share of draws in which the last rank is shrunk below one half: {(gains['prior'][:, -1] < 0.5).mean():.0%} under the prior, "
    f"{(gains['two words'][:, -1] < 0.5).mean():.0%} given two words, {(gains['eight topics'][:, -1] < 0.5).mean():.0%} given "
    f"eight topics."
)
assert middle["eight topics"] > middle["prior"] + 0.5, (
    "eight topics ask for more ranks than the prior expects"
)
if not fast:
    assert abs(middle["two words"] - middle["prior"]) < middle["eight topics"] - middle["prior"]

# %% [markdown]
# ## What to conclude, and what not
#
# - A prior is a short NumPyro function, and a known law of its sites is the way to test it.
# - Scales belong on the log-odds. The prior predictive shows both failures, certainty and no effect, before a step of any fit.
# - The horseshoe shrinks ranks until the data object. Where the rows are about many directions they do object, and the
#   posterior uses ranks that the prior expected to be off; where the task has one direction, they can speak of the size alone,
#   and ranks that a small update does not need stay shrunk.
#
# **Not** to conclude: that the number of ranks in use is a property of the task. It is that of this prior with this slab: a wider one
# reaches the same size of update with fewer ranks. Nor that a mean-field guide would find the same; a guide that starts at $b = 0$ may stay
# there, and `03_guides_and_the_bound` shows how to tell.
