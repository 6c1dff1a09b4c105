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
# # Diagnosing a bad fit
#
# **Question.** `bl.diagnose` writes one page about a fit. Does it find faults that are known to be there, do its remedies mend them, and
# what does it not see?
#
# **Model.** One small enough that we know what is right. The hidden states of the training rows have principal directions
# $v_1, \dots, v_4$ (labels unread). The factor $a$ is *given*, $a_k = v_k$ scaled so that $x_{ik} = a_k^\top h_i$ has mean square one, and
# only the factor $b$ of two label words is random:
#
# $$\eta_i = o_i + \sum_{k=1}^{4} (b_{1k} - b_{0k})\, x_{ik}, \qquad b_{ck} \sim \mathcal N(0, \sigma^2 / 4), \qquad
# p(y_i = 1) = \frac{1}{1 + e^{-\eta_i}} .$$
#
# Of the eight numbers the likelihood sees the four differences $b_1 - b_0$. The four sums are independent of the differences under the prior,
# so **their posterior is the prior**, exactly:
#
# $$b_{1k} + b_{0k} \mid y \sim \mathcal N(0, \sigma^2 / 2) .$$
#
# Sums known as little as before and differences known better make $b_{0k}$ and $b_{1k}$ positively correlated.

# %%
# %matplotlib inline
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from IPython.display import display

import bnlora as bl
from bnlora import guides
from bnlora._util.display import Table
from bnlora.data.assets import fetch_smollm2, vader_splits
from bnlora.plots.base import BLUE, GREY, ORANGE, caption, make_axes

fast = bool(os.environ.get("BNLORA_FAST"))
num_steps, num_draws = (300, 400) if fast else (2000, 2000)

# %%
base = bl.load(fetch_smollm2())
splits = vader_splits(seed=0, train=64, validation=1, test=32)
data = bl.text_classification(
    type(splits)({name: splits[name] for name in ("train", "movies")}),
    base.tokenizer,
    text="text",
    label="label",
    template="Review: {text}\nSentiment:",
    words=[" negative", " positive"],
    max_length=64,
    truncate="right",
)
sites = bl.select(base, ["lm_head"], rank=4)


def model_of(prior):
    """A classifier under a prior."""
    return bl.Classifier(base, sites, prior, label_ids=data.label_ids)


plain = model_of(bl.priors.normal())
train, others = bl.cache_prefix(plain, data.train), bl.cache_prefix(plain, data["movies"])


@jax.jit
def log_odds(params, first):
    """Log-odds of every training row, shape (row,), where class 1 alone reads the first of the ranks."""
    a = jnp.zeros((1, 4, base.config.d_model)).at[0, 0].set(first)
    b = jnp.zeros((1, 2, 4)).at[0, 1, 0].set(1.0)
    logits = plain.logits(params, {"lm_head": {"a": a, "b": b}}, train)
    return logits[:, 1] - logits[:, 0]


H = np.asarray(jax.jit(jax.jacrev(lambda a: log_odds(base.weights, a)))(jnp.zeros(base.config.d_model)))
_, sizes, directions = np.linalg.svd(H, full_matrices=False)
given_a = jnp.asarray(directions[:4] * (np.sqrt(len(H)) / sizes[:4, None]), jnp.float32)
np.testing.assert_allclose(np.mean((H @ given_a.T) ** 2, 0), 1.0, rtol=1e-3)


# %%
def given(sites):
    """Not a law at all: the factor a as it is."""
    return {name: {"a": given_a[None]} for name in sites}


def prior_at(scale):
    """Given directions, and independent normals of a scale for b."""
    return bl.priors.per_factor(a=given, b=bl.priors.normal(scale=scale))


k_scale, k_fit, k_more, k_draw, k_shuffle = jax.random.split(jax.random.key(0), 5)
spread = 2.0  # nats of log-odds, as in 02_your_own_prior
scale = bl.scale_for_spread(k_scale, plain, prior_at, train, spread=spread)
model = model_of(prior_at(scale))
print(f"The prior has a spread of {spread:g} nats at scale {scale:.3f}.\n{model}")


def fitted(model, law, *, steps=num_steps, rate=3e-2, key=k_fit, start=None, rows=train):
    """Full-batch SVI with rates that decay to zero."""
    return bl.fit(
        key,
        model,
        guides.Guide(model.prior, law),
        rows,
        optax.adam(optax.cosine_decay_schedule(rate, steps)),
        scale_optimizer=optax.adam(optax.cosine_decay_schedule(3 * rate, steps)),
        num_steps=steps,
        batch_size=len(rows),
        num_particles=4,
        init_params=start,
    )


def page_of(fit):
    """The page, on rows that were not fitted."""
    return bl.diagnose(fit, others, num_draws=num_draws)


# %% [markdown]
# ## A good fit, for comparison
#
# A Gaussian with a full covariance contains nearly this posterior.

# %%
good = fitted(model, guides.full())
good_page = page_of(good)
display(good_page)

# %% [markdown]
# Read a page from the top: problems, then cautions, then what is fine, then what could not be asked, each with its number, its threshold
# and a remedy. Two of its entries, in formulas:
#
# - **convergence** compares the mean of the bound over the last fifth of the steps with that over the fifth before, in units of the
#   tolerance and of the noise;
# - **k-hat** is the shape of the tail of the importance weights $w_s = p(y, \theta_s) / q(\theta_s)$, fitted by a generalised Pareto law. Below
#   $\min(1 - 1 / \log_{10} S, 0.7)$ the draws can be reweighted to the posterior.

# %%
for name in ("convergence", "last step", "k-hat", "prior predictive"):
    assert good_page[name].status == "fine", good_page[name]
assert not good_page.problems


def sums_and_differences(fit):
    """Standard deviations of b_1 + b_0 and of b_1 - b_0, each of shape (rank,)."""
    b = np.asarray(fit.draw_adapters(k_draw, 4000)["lm_head"]["b"])[:, 0]
    return (b[:, 1] + b[:, 0]).std(0), (b[:, 1] - b[:, 0]).std(0)


prior_sd = scale * np.sqrt(1 / 2)  # of a sum and, under the prior, of a difference
sums, differences = sums_and_differences(good)
print(
    f"Exact sd of the sums {prior_sd:.3f}; the good fit has {', '.join(f'{x:.3f}' for x in sums)}.\n"
    f"Its differences have {', '.join(f'{x:.3f}' for x in differences)}."
)
np.testing.assert_allclose(sums, prior_sd, rtol=0.15)
assert (differences < prior_sd).all(), "the data speak of the differences"

# %% [markdown]
# ## First fault: stopped too soon
#
# The same guide after a few steps at a small rate.

# %%
hasty = fitted(model, guides.full(), steps=60, rate=2e-3)
hasty_page = page_of(hasty)
display(hasty_page)

# %%
assert hasty_page["convergence"].status == "problem"
print("The page on convergence:", hasty_page["convergence"].remedy)
for finding in hasty_page.problems:
    if finding.name != "convergence":
        print(f"The page on '{finding.name}':", finding.remedy)

# %% [markdown]
# Other findings may be problems too, and **their remedies can be wrong**: updates of a guide that has not left its start are smaller than the
# prior's, and this is no reason to lower the scale of a prior that we know to be right. A page is for one remedy at a time, and
# convergence is the first. It is taken word for word: more steps, at a higher rate that decays, from where the fit stands.

# %%
resumed = fitted(model, guides.full(), key=k_more, start=hasty.params)
resumed_page = page_of(resumed)
display(resumed_page)

# %%
display(bl.plots.elbo({"stopped too soon": hasty, "fitted on": resumed}))
print(bl.plots.ELBO_CAPTION)
assert resumed_page["convergence"].status == "fine"
assert len(resumed_page.problems) < len(hasty_page.problems)
assert resumed_page.final_bound.value > hasty_page.final_bound.value

# %% [markdown]
# ## Second fault: a prior far too narrow
#
# The scale a hundredth of what it should be. The posterior is decided by the prior: the fault is in the question. Other findings may
# stand beside it (the guide starts wider than such a prior, and has a way to go), but "prior predictive" asks the prior alone, whatever was fitted.

# %%
narrow_model = model_of(prior_at(scale / 100))
narrow = fitted(narrow_model, guides.full())
narrow_page = page_of(narrow)
display(narrow_page)

# %%
assert narrow_page["prior predictive"].status == "problem"
print("The page:", narrow_page["prior predictive"].remedy)

# %% [markdown]
# `bl.scale_for_spread` needs a spread of the log-odds, which is a belief and not a diagnostic: at the two nats of above it finds the
# scale of the good fit again, on its own random numbers.

# %%
mended_scale = bl.scale_for_spread(k_more, narrow_model, prior_at, train, spread=spread)
mended_model = model_of(prior_at(mended_scale))
mended = fitted(mended_model, guides.full())
mended_page = page_of(mended)
display(mended_page)
print(f"Scale {mended_scale:.3f}; that of the good fit is {scale:.3f}.")
np.testing.assert_allclose(mended_scale, scale, rtol=0.15)
assert mended_page["prior predictive"].status == "fine"
assert len(mended_page.problems) < len(narrow_page.problems)

# %%
display(bl.plots.prior_predictive(bl.prior_predictive(k_draw, narrow_model, others, num_draws=100)))
display(bl.plots.prior_predictive(bl.prior_predictive(k_draw, mended_model, others, num_draws=100)))

# %% [markdown]
# ## Third fault: a guide without correlations
#
# The mean field has an independent normal for each number. With $w$ the information of the data about a difference, and directions
# that do not mix, the precision of $(b_{0k}, b_{1k})$ is
#
# $$\frac{4}{\sigma^2} I + w \begin{pmatrix} 1 & -1 \\ -1 & 1 \end{pmatrix}, \qquad
# \mathrm{Var}_q[b_{1k} \pm b_{0k}] = \frac{2}{4 / \sigma^2 + w} \quad\text{against}\quad
# \frac{\sigma^2}{2} \text{ for the sum}, \quad \frac{2}{4 / \sigma^2 + 2 w} \text{ for the difference:}$$
#
# the best mean field keeps the diagonal of the precision. It is too **narrow** in the sums and, at the same time, too **wide** in the differences, by up to
# $\sqrt 2$, and these are what predictions are made of.

# %%
independent = fitted(model, guides.mean_field())
independent_page = page_of(independent)
display(independent_page)

# %%
assert independent_page["convergence"].status == "fine"
assert independent_page["k-hat"].status in ("caution", "problem")
print("The page:", independent_page["k-hat"].remedy)

# %% [markdown]
# The bound has converged, so k-hat blames the guide, and names the families to try. `full()` is the first of them:

# %%
richer = fitted(model, guides.full(), key=k_more)
richer_page = page_of(richer)
display(richer_page)
assert richer_page["k-hat"].status == "fine"
assert richer_page["k-hat"].number < independent_page["k-hat"].number
assert richer_page.final_bound.value > independent_page.final_bound.value

# %%
narrow_sums, wide_differences = sums_and_differences(independent)
right_sums, right_differences = sums_and_differences(richer)
(panel, other), figure, _ = make_axes(None, 2, width=3.8, height=3.6, columns=2)
limit = 1.7 * scale
for axes, fit, colour, title in (
    (panel, independent, ORANGE, "mean field"),
    (other, richer, BLUE, "full covariance"),
):
    b = np.asarray(fit.draw_adapters(k_draw, 1000)["lm_head"]["b"])[:, 0, :, 0]
    axes.plot(b[:, 0], b[:, 1], "o", color=colour, markersize=2, alpha=0.4)
    axes.axline((0, 0), slope=1, color=GREY, linewidth=1, linestyle="--")
    axes.set(title=title, xlabel="$b_{01}$, first direction", ylabel="$b_{11}$")
    axes.set(aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit))
caption(
    figure,
    "A thousand draws of the two numbers of the first direction. Along the dashed diagonal the sum changes, of which the data say nothing; "
    "across it the difference, of which they do.",
)
figure

# %%
lines = tuple(
    (
        str(k + 1),
        f"{prior_sd:.3f}",
        f"{narrow_sums[k]:.3f}",
        f"{right_sums[k]:.3f}",
        f"{wide_differences[k]:.3f}",
        f"{right_differences[k]:.3f}",
    )
    for k in range(4)
)
header = ("direction", "sum: exact", "mean field", "full", "difference: mean field", "full")
display(Table("Standard deviations", header, lines))
assert (narrow_sums < 0.9 * prior_sd).all()
np.testing.assert_allclose(right_sums, prior_sd, rtol=0.15)
assert wide_differences.mean() > right_differences.mean()

# %% [markdown]
# ## All pages side by side

# %%
pages = {
    "good": good_page,
    "stopped too soon": hasty_page,
    "... fitted on": resumed_page,
    "prior too narrow": narrow_page,
    "... scale from a spread": mended_page,
    "mean field": independent_page,
    "... full covariance": richer_page,
}
header = ("fit", "bound", "k-hat (at most)", "problems", "cautions")
display(
    Table(
        "What the pages find",
        header,
        tuple(
            (
                name,
                f"{page.final_bound.value:.2f}",
                f"{page['k-hat'].number:.2f} ({page['k-hat'].threshold:.2f})",
                ", ".join(f.name for f in page.problems) or "none",
                ", ".join(f.name for f in page.cautions) or "none",
            )
            for name, page in pages.items()
        ),
    )
)

# %% [markdown]
# ## What the page sees of wrong labels
#
# A page holds a fit against *its own* model and rows. Give the same model labels in random order, and fit it well:

# %%
order = jax.random.permutation(k_shuffle, len(train))
shuffled = replace(train, labels=train.labels[order])
senseless = fitted(model, guides.full(), rows=shuffled)
senseless_page = page_of(senseless)
display(senseless_page)

# %%
print(
    f"Share of labels that are still right: {np.mean(shuffled.labels == train.labels):.2f}. Problems on the page: "
    f"{', '.join(f.name for f in senseless_page.problems) or 'none'}; cautions: "
    f"{', '.join(f.name for f in senseless_page.cautions) or 'none'}."
)
for name in ("convergence", "k-hat", "prior predictive"):
    assert senseless_page[name].status == "fine", "a fine fit to senseless labels"

# %% [markdown]
# The optimiser converged, the guide fits the posterior, the prior is a sensible one, and all three findings are right: this *is* the posterior
# given these labels. Where the page objects, it is for its price: "against guessing" asks that the bound be no worse than an even bet on
# every row. Labels that are wrong in a way that can be *learned* (a cue that goes with the class in these rows alone) would pass that too.
#
# ## What the page cannot see
#
# Whether the adapters were worth having. Hold the fits against the untouched model, on rows that nothing was fitted to:

# %%
truth = np.asarray(others.labels)
base_logits = bl.prior_predictive(k_draw, model, others, num_draws=2).base_logits.astype(np.float64)
answers = {"untouched": base_logits - np.logaddexp.reduce(base_logits, 1, keepdims=True)}
for name, fit in (("good", good), ("prior too narrow", narrow), ("labels in random order", senseless)):
    answers[name] = bl.predict(k_draw, fit, others, num_draws=num_draws).log_probs
lines = tuple(
    (
        name,
        f"{bl.metrics.accuracy(found, truth):.3f}",
        f"{bl.metrics.nll(found, truth):.3f}",
        str(
            bl.metrics.paired_difference(
                jax.random.key(0), bl.metrics.nll, found, answers["untouched"], truth
            )
        ),
    )
    for name, found in answers.items()
)
display(Table(f"{len(truth)} rows", ("fit", "accuracy", "NLL", "NLL minus that of the untouched"), lines))
gap = narrow_page.final_bound.value - good_page.final_bound.value
print(
    f"The bound of the narrow prior is {abs(gap):.2f} nats {'higher' if gap > 0 else 'lower'} than that of the good fit. "
    + (
        "These rows do not object to a prior that changes nothing; the page does, because nothing can be learned under it."
        if gap > 0
        else "These rows prefer the wider prior."
    )
)
np.testing.assert_allclose(answers["prior too narrow"], answers["untouched"], atol=0.1)

# %% [markdown]
# ## What to conclude, and what not
#
# - Each of the three faults was found by the finding that is about it, and its remedy made the page better: in the finding itself, in the bound
#   where the model stayed the same, and, where it is known, against the exact posterior.
# - The order of reading matters. While the bound moves, k-hat says nothing about the guide, and remedies for the prior may be wrong ones.
# - "Too narrow" of a guide is not a narrow posterior of everything: the mean field is too sure of what the data do not speak of, and less sure
#   than it should be of what they do. Which of the two matters depends on the function.
#
# **Not** to conclude: that a page without problems is a certificate. It does not see
#
# - **a fit that nobody needs**, as just shown: "good" says that this is the posterior of this model, not that it predicts better than
#   the untouched one;
# - **labels or words that mean something else** than one thinks, as long as they can be learned;
# - **a missed mode**: every draw that it looks at comes from the guide. Here the posterior has one peak; with both factors random,
#   $(a, b)$ and $(-a, -b)$ are one update, and a guide on one side of them passes as well as it would alone. `diagnose(restarts=...)`
#   holds fits from other keys together, `bl.sample_nuts` asks the posterior itself;
# - **text of another kind**: rows for the page come from the domain that was fitted, unless one gives others
#   (`05_calibration_under_shift`);
# - **a fit a little too narrow**: k-hat has a threshold, and spreads that are off by a fifth can lie below it. The exact sums above are a
#   stricter judge, and they exist in this model alone; elsewhere it is NUTS (`04_nuts_against_variational`).
