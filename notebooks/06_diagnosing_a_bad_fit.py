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
# **Question.** `bl.diagnose` writes one page about a fit. Does it detect known faults, do its remedies correct them, and what does it not
# detect?
#
# **Model.** The model is so small that parts of the exact posterior are known. The hidden states of the training rows have principal
# directions $v_1, \dots, v_4$, computed without labels. The factor $a$ is *fixed*: $a_k = v_k$, scaled so that $x_{ik} = a_k^\top h_i$ has
# mean square one. Only the factor $b$ of two label words is random:
#
# $$\eta_i = o_i + \sum_{k=1}^{4} (b_{1k} - b_{0k})\, x_{ik}, \qquad b_{ck} \sim \mathcal N(0, \sigma^2 / 4), \qquad
# p(y_i = 1) = \frac{1}{1 + e^{-\eta_i}} .$$
#
# The likelihood depends on the eight entries of $b$ only through the four differences $b_1 - b_0$. The four sums are independent of the
# differences under the prior, so **their posterior is exactly the prior**:
#
# $$b_{1k} + b_{0k} \mid y \sim \mathcal N(0, \sigma^2 / 2) .$$
#
# The data reduce the variance of the differences and leave the variance of the sums unchanged. Therefore $b_{0k}$ and $b_{1k}$ are
# positively correlated in the posterior.

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
train, test = bl.cache_prefix(plain, data.train), bl.cache_prefix(plain, data["movies"])


@jax.jit
def log_odds(weights, first):
    """Log-odds of every training row, shape (row,), for an adapter in which only class 1 uses the first rank."""
    a = jnp.zeros((1, 4, base.config.d_model)).at[0, 0].set(first)
    b = jnp.zeros((1, 2, 4)).at[0, 1, 0].set(1.0)
    logits = plain.logits(weights, {"lm_head": {"a": a, "b": b}}, train)
    return logits[:, 1] - logits[:, 0]


H = np.asarray(jax.jit(jax.jacrev(lambda a: log_odds(base.weights, a)))(jnp.zeros(base.config.d_model)))
_, sizes, directions = np.linalg.svd(H, full_matrices=False)
fixed_a = jnp.asarray(directions[:4] * (np.sqrt(len(H)) / sizes[:4, None]), jnp.float32)
np.testing.assert_allclose(np.mean((H @ fixed_a.T) ** 2, 0), 1.0, rtol=1e-3)


# %%
def fixed(sites):
    """Prior of a that samples nothing and returns the fixed factor."""
    return {name: {"a": fixed_a[None]} for name in sites}


def prior_at(scale):
    """Fixed directions a, and independent normals with this scale for b."""
    return bl.priors.per_factor(a=fixed, b=bl.priors.normal(scale=scale))


k_scale, k_fit, k_more, k_draw, k_shuffle = jax.random.split(jax.random.key(0), 5)
spread = 2.0  # nats of log-odds, as in 02_your_own_prior
scale = bl.scale_for_spread(k_scale, plain, prior_at, train, spread=spread)
model = model_of(prior_at(scale))
print(f"The prior has a spread of {spread:g} nats at scale {scale:.3f}.\n{model}")


def fitted(model, family, *, steps=num_steps, rate=3e-2, key=k_fit, start=None, rows=train):
    """Full-batch SVI with rates that decay to zero."""
    return bl.fit(
        key,
        model,
        guides.Guide(model.prior, family),
        rows,
        optax.adam(optax.cosine_decay_schedule(rate, steps)),
        optimisation=bl.Optimisation(
            scale_optimizer=optax.adam(optax.cosine_decay_schedule(3 * rate, steps))
        ),
        num_steps=steps,
        batch_size=len(rows),
        num_particles=4,
        init_params=start,
    )


def page_of(fit):
    """Page of diagnostics of a fit on rows that were not fitted."""
    return bl.diagnose(fit.draw_key, fit, test, num_draws=num_draws)


# %% [markdown]
# ## A good fit, for comparison
#
# A Gaussian with a full covariance can approximate this posterior closely.

# %%
good = fitted(model, guides.full())
good_page = page_of(good)
display(good_page)

# %% [markdown]
# Read a page from the top: problems, cautions, checks that passed, and checks that do not apply. Each entry has its value, its threshold
# and a remedy. Two of the entries in detail:
#
# - **convergence** compares the mean of the bound over the last fifth of the steps with the mean over the fifth before, in units of the
#   tolerance and of the noise;
# - **k-hat** is the tail shape of a generalised Pareto distribution fitted to the importance weights $w_s = p(y, \theta_s) / q(\theta_s)$.
#   Below $\min(1 - 1 / \log_{10} S, 0.7)$ the draws can be reweighted to the posterior.

# %%
for name in ("convergence", "last step", "k-hat", "prior predictive"):
    assert good_page[name].status == "fine", good_page[name]
assert not good_page.problems


def sums_and_differences(fit):
    """Standard deviations of b_1 + b_0 and of b_1 - b_0, each of shape (rank,)."""
    b = np.asarray(fit.draw_adapters(k_draw, 4000)["lm_head"]["b"])[:, 0]
    return (b[:, 1] + b[:, 0]).std(0), (b[:, 1] - b[:, 0]).std(0)


prior_sd = scale * np.sqrt(1 / 2)  # sd of a sum, and of a difference under the prior
sums, differences = sums_and_differences(good)
print(
    f"Standard deviation of the sums: exact {prior_sd:.3f}; good fit {', '.join(f'{x:.3f}' for x in sums)}.\n"
    f"Standard deviation of the differences: good fit {', '.join(f'{x:.3f}' for x in differences)}."
)
np.testing.assert_allclose(sums, prior_sd, rtol=0.15)
assert (differences < prior_sd).all(), "the data do not inform the differences"

# %% [markdown]
# ## First fault: too few steps
#
# The same guide after a few steps at a low learning rate.

# %%
hasty = fitted(model, guides.full(), steps=60, rate=2e-3)
hasty_page = page_of(hasty)
display(hasty_page)

# %%
assert hasty_page["convergence"].status == "problem"
print("Remedy for 'convergence':", hasty_page["convergence"].remedy)
for finding in hasty_page.problems:
    if finding.name != "convergence":
        print(f"Remedy for '{finding.name}':", finding.remedy)

# %% [markdown]
# Other findings can be problems as well, and **their remedies can be wrong**. For example, a guide close to its start has smaller updates
# than the prior; the scale of the prior is correct here and must not be lowered. Apply one remedy at a time, convergence first. The code
# below applies its remedy literally: more steps, at a higher rate that decays, from the current parameters.

# %%
resumed = fitted(model, guides.full(), key=k_more, start=hasty.params)
resumed_page = page_of(resumed)
display(resumed_page)

# %%
display(bl.plots.elbo({"too few steps": hasty, "resumed": resumed}))
print(bl.plots.ELBO_CAPTION)
assert resumed_page["convergence"].status == "fine"
assert len(resumed_page.problems) < len(hasty_page.problems)
assert resumed_page.final_bound.value > hasty_page.final_bound.value

# %% [markdown]
# ## Second fault: a prior that is far too narrow
#
# The scale is one hundredth of the correct one. The prior then determines the posterior: the fault is in the model, not in the fit. The
# page can have other problems too, because the guide starts wider than this prior and needs many steps. The check "prior predictive"
# depends on the prior only, not on the fit.

# %%
narrow_model = model_of(prior_at(scale / 100))
narrow = fitted(narrow_model, guides.full())
narrow_page = page_of(narrow)
display(narrow_page)

# %%
assert narrow_page["prior predictive"].status == "problem"
print("Remedy:", narrow_page["prior predictive"].remedy)

# %% [markdown]
# `bl.scale_for_spread` needs a spread of the log-odds. This spread is a prior belief; no diagnostic gives it. For the two nats used above,
# with different random numbers, the result is close to the scale of the good fit.

# %%
corrected_scale = bl.scale_for_spread(k_more, narrow_model, prior_at, train, spread=spread)
corrected_model = model_of(prior_at(corrected_scale))
corrected = fitted(corrected_model, guides.full())
corrected_page = page_of(corrected)
display(corrected_page)
print(f"Scale {corrected_scale:.3f}; scale of the good fit {scale:.3f}.")
np.testing.assert_allclose(corrected_scale, scale, rtol=0.15)
assert corrected_page["prior predictive"].status == "fine"
assert len(corrected_page.problems) < len(narrow_page.problems)

# %%
display(bl.plots.prior_predictive(bl.prior_predictive(k_draw, narrow_model, test, num_draws=100)))
display(bl.plots.prior_predictive(bl.prior_predictive(k_draw, corrected_model, test, num_draws=100)))

# %% [markdown]
# ## Third fault: a guide without correlations
#
# The mean field has an independent normal for each entry. Let $w$ be the information of the data about a difference, and assume that the
# directions are uncorrelated. Then the precision of $(b_{0k}, b_{1k})$ is
#
# $$\frac{4}{\sigma^2} I + w \begin{pmatrix} 1 & -1 \\ -1 & 1 \end{pmatrix}, \qquad
# \mathrm{Var}_q[b_{1k} \pm b_{0k}] = \frac{2}{4 / \sigma^2 + w} .$$
#
# The best mean field has the diagonal of this precision. The exact variances are
#
# $$\frac{\sigma^2}{2} \text{ for the sum}, \qquad \frac{2}{4 / \sigma^2 + 2 w} \text{ for the difference.}$$
#
# The mean field is too **narrow** in the sums and too **wide** in the differences, by a factor of up to $\sqrt 2$. Predictions depend on
# the differences.

# %%
independent = fitted(model, guides.mean_field())
independent_page = page_of(independent)
display(independent_page)

# %%
assert independent_page["convergence"].status == "fine"
assert independent_page["k-hat"].status in ("caution", "problem")
print("Remedy:", independent_page["k-hat"].remedy)

# %% [markdown]
# The bound has converged, so a high k-hat is due to the guide. The remedy names other families; `full()` is the first of them:

# %%
richer = good if fast else fitted(model, guides.full(), key=k_more)
richer_page = good_page if fast else page_of(richer)
display(richer_page)
assert richer_page["k-hat"].status == "fine"
assert richer_page["k-hat"].number < independent_page["k-hat"].number
assert richer_page.final_bound.value > independent_page.final_bound.value

# %%
narrow_sums, wide_differences = sums_and_differences(independent)
full_sums, full_differences = sums_and_differences(richer)
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
    "A thousand draws of the two entries of the first direction. The sum varies along the dashed diagonal; the data do not inform it. The "
    "difference varies across the diagonal; the data inform it.",
)
figure

# %%
lines = tuple(
    (
        str(k + 1),
        f"{prior_sd:.3f}",
        f"{narrow_sums[k]:.3f}",
        f"{full_sums[k]:.3f}",
        f"{wide_differences[k]:.3f}",
        f"{full_differences[k]:.3f}",
    )
    for k in range(4)
)
header = ("direction", "sum: exact", "mean field", "full", "difference: mean field", "full")
display(Table("Standard deviations", header, lines))
assert (narrow_sums < 0.9 * prior_sd).all()
np.testing.assert_allclose(full_sums, prior_sd, rtol=0.15)
assert wide_differences.mean() > full_differences.mean()

# %% [markdown]
# ## Summary of all pages

# %%
pages = {
    "good": good_page,
    "too few steps": hasty_page,
    "... resumed": resumed_page,
    "prior too narrow": narrow_page,
    "... scale from a spread": corrected_page,
    "mean field": independent_page,
    "... full covariance": richer_page,
}
header = ("fit", "bound", "k-hat (at most)", "problems", "cautions")
display(
    Table(
        "Findings of all pages",
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
# ## Wrong labels
#
# A page compares a fit with *its own* model and rows. Shuffle the labels, and fit the same model well:

# %%
order = jax.random.permutation(k_shuffle, len(train))
shuffled = replace(train, labels=train.labels[order])
shuffled_fit = fitted(model, guides.full(), rows=shuffled)
shuffled_page = page_of(shuffled_fit)
display(shuffled_page)

# %%
print(
    f"Share of labels that are still correct: {np.mean(shuffled.labels == train.labels):.2f}. Problems on the page: "
    f"{', '.join(f.name for f in shuffled_page.problems) or 'none'}; cautions: "
    f"{', '.join(f.name for f in shuffled_page.cautions) or 'none'}."
)
for name in ("convergence", "k-hat", "prior predictive"):
    assert shuffled_page[name].status == "fine", "the fit to the shuffled labels is not good"

# %% [markdown]
# The optimiser converged, the guide fits the posterior, and the prior is reasonable. All three findings are correct: this *is* the
# posterior given these labels. If the page reports a problem, it is "against guessing", which compares the bound with the
# log-likelihood of equal probabilities on every row. Wrong labels that can be *learned* (for example, a cue that predicts the class only
# in these rows) would pass this check too.
#
# ## What the page cannot detect
#
# The page cannot show whether the adapters improve predictions. Compare the fits with the untouched model on rows that were not used
# for any fit:

# %%
truth = np.asarray(test.labels)
base_logits = bl.prior_predictive(k_draw, model, test, num_draws=2).base_logits.astype(np.float64)
log_probs = {"base": base_logits - np.logaddexp.reduce(base_logits, 1, keepdims=True)}
for name, fit in (("good", good), ("prior too narrow", narrow), ("shuffled labels", shuffled_fit)):
    log_probs[name] = bl.predict(k_draw, fit, test, num_draws=num_draws).log_probs
lines = tuple(
    (
        name,
        f"{bl.metrics.accuracy(values, truth):.3f}",
        f"{bl.metrics.nll(values, truth):.3f}",
        str(
            bl.metrics.paired_difference(jax.random.key(0), bl.metrics.nll, values, log_probs["base"], truth)
        ),
    )
    for name, values in log_probs.items()
)
display(Table(f"{len(truth)} rows", ("fit", "accuracy", "NLL", "NLL minus that of the base"), lines))
gap = narrow_page.final_bound.value - good_page.final_bound.value
print(
    f"The bound of the narrow prior is {abs(gap):.2f} nats {'higher' if gap > 0 else 'lower'} than that of the good fit. "
    + (
        "The bound prefers a prior under which the adapters change nothing. The page reports a problem, because nothing can be learned "
        "under this prior."
        if gap > 0
        else "The bound prefers the wider prior."
    )
)
np.testing.assert_allclose(log_probs["prior too narrow"], log_probs["base"], atol=0.1)

# %% [markdown]
# ## What to conclude, and what not
#
# - The corresponding check detected each of the three faults. Its remedy improved the check itself, the bound (if the model stayed the
#   same), and the agreement with the exact posterior (where it is known).
# - The order of reading matters. While the bound still changes, k-hat carries no information about the guide, and remedies for the prior
#   can be wrong.
# - A guide that is "too narrow" is not too narrow in every function: the mean field is too narrow in functions that the data do not
#   inform, and too wide in functions that they inform. Which error matters depends on the function.
#
# **Not** to conclude: that a page without problems is a certificate. It does not detect
#
# - **a fit without benefit**, as just shown: a good page means that this is the posterior of this model, not that it predicts better
#   than the untouched model;
# - **labels or words with an unintended meaning**, if they can be learned;
# - **a missed mode**: every draw used by the page comes from the guide. Here the posterior has one mode. With both factors random,
#   $(a, b)$ and $(-a, -b)$ are the same update, and a guide on one of the two modes passes just as it would if that mode were the only
#   one. `diagnose(restarts=...)` compares fits from other keys, and `bl.sample_nuts` samples the posterior itself;
# - **text of another kind**: the rows for the page come from the fitted domain unless you pass others (`05_calibration_under_shift`);
# - **a slightly too narrow fit**: k-hat has a threshold, and spreads with an error of one fifth can be below it. The exact sums above are
#   a stricter test, but exist only in this model; in other models use NUTS (`04_nuts_against_variational`).
