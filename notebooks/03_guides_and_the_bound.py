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
# # Choose a guide, and read its bound
#
# **Question.** A fit reports an evidence lower bound, in nats. When is a bound good, what do differences between guides mean,
# and what is the effect of `lam`? Usually bounds can only be compared with each other; here they are compared with the exact evidence.
#
# **Model.** An adapter of rank one on the rows of two label words of SmolLM2's head,
#
# $$\eta_i = o_i + (b_1 - b_0)\, a^\top h_i, \qquad p(y_i = 1) = \frac{1}{1 + e^{-\eta_i}}, \qquad
# a \sim \mathcal N(0, I / d), \quad b_0, b_1 \sim \mathcal N(0, 1),$$
#
# with $o_i$ the log-odds of the untouched model and $h_i$ the last hidden state of row $i$. With $\delta = b_1 - b_0$ known,
# the changes $f = \delta H a$ of the log-odds are Gaussian with covariance $\delta^2 K$, $K = H H^\top / d$, so
#
# $$p(y) = \int \mathcal N(\delta; 0, 2)\, Z(\delta)\, d\delta, \qquad
# Z(\delta) = \mathbb E_{f \sim \mathcal N(0, \delta^2 K)} \prod_i p(y_i \mid o_i + f_i) .$$
#
# The outer integral is over one number, so quadrature computes it. $Z$ is the evidence of a logistic regression, and importance
# sampling around its mode estimates it to any accuracy.

# %%
# %matplotlib inline
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from IPython.display import display
from scipy.special import log_expit, logsumexp

import bnlora as bl
from bnlora import guides
from bnlora._util.display import Table
from bnlora.data.assets import fetch_smollm2, vader_splits
from bnlora.plots.base import BLUE, GREY, ORANGE, caption, make_axes

fast = bool(os.environ.get("BNLORA_FAST"))
num_steps, num_draws = (100, 400) if fast else (2000, 4000)

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
sites = bl.select(base, ["lm_head"], rank=1)
model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=data.label_ids)
train = bl.cache_prefix(model, data.train)  # the transformer does not run after this
print(model)

# %% [markdown]
# ## The exact evidence: a logistic regression and one integral
#
# The log-odds are linear in $a$, so their Jacobian at $b = (0, 1)$ is $H$. The code checks at a random adapter that the model is the
# regression above.


# %%
@jax.jit
def log_odds(weights, a, b):
    """Log-odds of every training row, shape (row,)."""
    logits = model.logits(weights, {"lm_head": {"a": a[None, None], "b": b[None, :, None]}}, train)
    return logits[:, 1] - logits[:, 0]


zero, unit = jnp.zeros(base.config.d_model), jnp.array([0.0, 1.0])
offset = np.asarray(log_odds(base.weights, zero, unit), np.float64)
H = np.asarray(jax.jit(jax.jacrev(lambda a: log_odds(base.weights, a, unit)))(zero), np.float64)
a = jax.random.normal(jax.random.key(0), zero.shape)
b = jnp.array([0.7, -0.4])
np.testing.assert_allclose(
    log_odds(base.weights, a, b), offset + (b[1] - b[0]) * (H @ np.asarray(a)), rtol=2e-3, atol=2e-3
)

sign = 2.0 * np.asarray(train.labels) - 1
values, vectors = np.linalg.eigh(H @ H.T / H.shape[1])
# K = root root^T, so f = delta root u with u standard normal. Rounding can make eigenvalues slightly negative.
root = vectors * np.sqrt(np.maximum(values, 0))


def mode(delta):
    """Posterior mode of u by Newton's method, and the Cholesky factor of the precision at the mode."""
    u, G = np.zeros(len(sign)), sign[:, None] * delta * root  # G: (row, entry of u)
    for _ in range(50):
        p = np.exp(log_expit(-(sign * offset + G @ u)))
        precision = np.eye(len(u)) + (G.T * (p * (1 - p))) @ G
        step = np.linalg.solve(precision, G.T @ p - u)
        u = u + step
        if np.abs(step).max() < 1e-9:
            break
    return u, np.linalg.cholesky(precision)


def log_weights(delta, normals):
    """Log importance weights (likelihood times prior over proposal) of Laplace draws; the mean weight estimates Z(delta)."""
    u, L = mode(delta)
    proposals = u + np.linalg.solve(L.T, normals.T).T  # (draw, entry of u), covariance (L L^T)^-1
    log_likelihood = log_expit(sign * (offset + delta * proposals @ root.T)).sum(1)
    return log_likelihood - 0.5 * (proposals**2).sum(1) + 0.5 * (normals**2).sum(1) - np.log(np.diag(L)).sum()


random = np.random.default_rng(0)
nodes, widths = np.polynomial.legendre.leggauss(40)
delta = 4.5 * (nodes + 1)  # (0, 9): the prior mass beyond six standard deviations of delta is negligible
log_prior = (
    np.log(2 * 4.5 * widths) - 0.25 * delta**2 - 0.5 * np.log(4 * np.pi)
)  # factor 2: both signs of delta
log_weight = np.stack([log_weights(x, random.normal(size=(num_draws, len(sign)))) for x in delta])
log_z = logsumexp(log_weight, axis=1) - np.log(num_draws)


def with_error(terms):
    """Log of the mean of exp(terms), and its standard error."""
    total = logsumexp(terms) - np.log(terms.size)
    return total, np.std(np.exp(terms - total)) / np.sqrt(terms.size)


evidence = logsumexp(log_prior + log_z)
share = np.exp(log_prior + log_z - evidence)  # contribution of each node to the integral
evidence_error = np.sqrt(np.sum((share * [with_error(row)[1] for row in log_weight]) ** 2))

# %% [markdown]
# A second estimate averages the likelihood over draws of the prior. Both estimates use $H$; otherwise they are independent.

# %%
count = 200_000
changes = np.sqrt(2) * random.normal(size=(count, 1)) * (random.normal(size=(count, len(sign))) @ root.T)
crude, crude_error = with_error(log_expit(sign * (offset + changes)).sum(1))
print(f"log p(y) = {evidence:.3f} +- {evidence_error:.3f} nats by quadrature and importance sampling,")
print(f"           {crude:.3f} +- {crude_error:.3f} nats by {count:,} draws of the prior;")
print(f"the untouched model has a log-likelihood of {log_expit(sign * offset).sum():.3f}.")
assert abs(evidence - crude) < 4 * np.hypot(evidence_error, crude_error)
assert evidence_error < 0.05

# %% [markdown]
# ## Four guides, one bound
#
# For a guide $q$ over the sites $W$, $\log p(y) = \mathrm{ELBO} + \mathrm{KL}(q \,\|\, p(\cdot \mid y))$ and
#
# $$\mathrm{ELBO} = \underbrace{\mathbb E_q \log p(y \mid W)}_{\text{data}} -
# \underbrace{\mathbb E_q [\log q(W) - \log p(W)]}_{\text{KL to the prior}} .$$
#
# The **gap** to the evidence is therefore exactly the KL divergence of the guide from the posterior. Usually only differences between
# gaps are known: the evidence is the same for all guides with the same prior and rows.


# %%
def fitted(model, guide):
    """Fit of a guide by full-batch SVI."""
    rate, scales = (optax.adam(optax.cosine_decay_schedule(start, num_steps)) for start in (1e-2, 3e-2))
    return bl.fit(
        jax.random.key(1),
        model,
        guide,
        train,
        rate,
        optimisation=bl.Optimisation(scale_optimizer=scales),
        num_steps=num_steps,
        batch_size=len(train),
    )


families = {
    "mean field": guides.mean_field(),
    "low rank 8, a tied to b": guides.low_rank(rank=8, over="all"),
    "row-shared flow (SiteFlow)": None,
    "full covariance of each factor": guides.full(),
}
if fast:
    del families["low rank 8, a tied to b"]
fits = {
    name: fitted(model, guides.SiteFlow(model.prior) if family is None else guides.Guide(model.prior, family))
    for name, family in families.items()
}

# %%
display(bl.plots.elbo(fits))
print(bl.plots.ELBO_CAPTION)


# %% [markdown]
# The bound in the history uses one draw for each step, and the parameters still change. Therefore estimate the bound from new draws of
# each fitted guide. `fit.draws` returns the log-densities, and `bl.predict` uses the same draws if it gets the same key.


# %%
def terms(fit):
    """Data term and log q - log p for new draws of a guide, each of shape (draw,)."""
    key = jax.random.key(2)
    sample, _ = fit.draws(key, num_draws)
    log_likelihood = bl.predict(key, fit, train, num_draws=num_draws).log_probs_of(train.labels).sum(1)
    return log_likelihood, np.asarray(sample.log_q, np.float64) - np.asarray(sample.log_prior, np.float64)


lines, gaps = [], {}
for name, fit in fits.items():
    log_likelihood, excess = terms(fit)
    bounds = log_likelihood - excess
    error = bounds.std() / np.sqrt(num_draws)
    gaps[name] = evidence - bounds.mean()
    assert gaps[name] > -4 * np.hypot(error, evidence_error), "the bound exceeds the evidence"
    lines.append(
        (
            name,
            f"{fit.num_parameters:,}",
            f"{log_likelihood.mean():.2f}",
            f"{excess.mean():.2f}",
            f"{bounds.mean():.2f} +- {error:.2f}",
            f"{gaps[name]:.2f}",
        )
    )
header = ("guide", "parameters", "data", "KL to prior", "ELBO", "gap")
display(Table(f"Nats; log p(y) = {evidence:.2f} +- {evidence_error:.2f}", header, tuple(lines)))

# %%
best, worst = min(gaps, key=gaps.get), max(gaps, key=gaps.get)
largest = max(fits, key=lambda name: fits[name].num_parameters)
print(
    f"'{best}' has the tightest bound, {gaps[best]:.2f} nats below the evidence. Up to log 2 = {np.log(2):.2f} of these nats come "
    f"from symmetry: (a, b) and (-a, -b) are the same update, and a guide with one mode covers half of the posterior.\n"
    f"'{worst}' has the loosest bound, {gaps[worst]:.2f} nats below; '{largest}' has the most parameters. A full covariance "
    f"contains the mean field as a special case, so its best bound is at least as high. If its measured bound is lower, the "
    f"optimisation is unfinished after {num_steps:,} steps; the family itself is not worse."
)
assert gaps["mean field"] < gaps["full covariance of each factor"]

# %% [markdown]
# ## What causes the gap
#
# The integrand above gives the exact marginal posterior of $|\delta|$: $p(|\delta| \mid y) \propto \mathcal N(\delta; 0, 2)\, Z(\delta)$.

# %%
compared = ("mean field", best) if best != "mean field" else ("mean field", "row-shared flow (SiteFlow)")
sizes = {}
for name in compared:
    b = np.asarray(fits[name].draw_adapters(jax.random.key(3), num_draws)["lm_head"]["b"])[:, 0, :, 0]
    sizes[name] = np.abs(b[:, 1] - b[:, 0])
panels, figure, _ = make_axes(None, 2, width=4.2, height=2.9, columns=2, share="all")
density = share / (4.5 * widths)
for panel, (name, size) in zip(panels, sizes.items(), strict=True):
    panel.plot(delta, density, color=BLUE, label="exact")
    panel.hist(size, bins=np.linspace(0, 6, 31), density=True, color=ORANGE, alpha=0.5, label="guide")
    panel.set(title=name, xlabel=r"$|\delta| = |b_1 - b_0|$", ylabel="density", xlim=(0, 6))
panels[0].legend(fontsize=8)
caption(
    figure,
    "Size of the update under the exact posterior (quadrature, blue) and under two guides (histograms of draws, orange).",
)
figure

# %%
exact_mean = np.sum(share * delta)
exact_sd = np.sqrt(np.sum(share * delta**2) - exact_mean**2)
for name, size in sizes.items():
    print(
        f"|delta|: exact mean {exact_mean:.2f} and sd {exact_sd:.2f}; {name}: mean {size.mean():.2f}, sd {size.std():.2f}"
    )
assert all(size.std() < exact_sd for size in sizes.values()), "these guides are too narrow in the size"

# %% [markdown]
# A product has a well-determined size only if both factors do. A guide that factorises over $a$ and $b$ loses the spread of the size
# first, and with it the large updates. `04_nuts_against_variational` shows the same effect by comparison with NUTS.
#
# ## The effect of `lam`
#
# The sparse-GP prior has the same distribution of the weights, $W_{ij} \sim \mathcal N(0, \sigma^2)$, and therefore **the same evidence**.
# Only its sites differ: inducing values $V$ and a noise $E$ for each weight. The noise of the guide is $\mathcal N(0, \lambda^2)$, with
# the cost
#
# $$\mathrm{KL}(q(W \mid U) \,\|\, p(W \mid U)) = d_o d_i \left( \tfrac{\lambda^2}{2} - \log \lambda - \tfrac 1 2 \right)$$
#
# for each factor. The cost is zero at $\lambda = 1$ and unbounded as $\lambda \to 0$. It does not depend on the data: fixing a weight has
# this cost even if the data are not informative about it. The published method caps $\lambda$. The capped family is smaller; its bound is
# valid but very loose.

# %%
caps = (0.03, 1.0) if fast else (0.03, 0.3, 1.0)
sparse = bl.Classifier(base, sites, bl.priors.sparse_gp(rows=9, cols=9), label_ids=data.label_ids)
capped = {cap: fitted(sparse, guides.SiteFlow(sparse.prior, lam_max=cap)) for cap in caps}


def noise_kl(size, lam):
    """Closed form, in nats."""
    return size * (lam**2 / 2 - np.log(lam) - 0.5)


factors = {"a": base.config.d_model, "b": 2}  # number of weights
lines = []
for cap, fit in capped.items():
    lam = {name: float(np.squeeze(fit.params[f"lm_head.{name}.E.q.lam"])) for name in factors}
    closed = sum(noise_kl(size, lam[name]) for name, size in factors.items())
    last = {
        name: fit.history[name][-20:].mean() for name in ("elbo", "data", "inducing_kl", "conditional_kl")
    }
    np.testing.assert_allclose(last["conditional_kl"], closed, rtol=0.05, atol=0.5)
    assert last["elbo"] < evidence + 4 * fit.history["elbo"][-20:].std() / np.sqrt(20)
    cells = (last["data"], last["inducing_kl"], last["conditional_kl"], closed, last["elbo"])
    lines.append((f"{cap:g}", ", ".join(f"{lam[n]:.3f}" for n in factors), *(f"{x:,.2f}" for x in cells)))
header = ("cap", "lam of a, b", "data", "inducing KL", "conditional KL", "closed form", "ELBO")
display(Table(f"Nats, mean of the last 20 steps; log p(y) = {evidence:.2f}", header, tuple(lines)))

# %%
(panel,), figure, _ = make_axes(None, 1, width=6.0, height=3.0)
grid = np.geomspace(0.005, 1, 200)
panel.plot(grid, noise_kl(factors["a"], grid), color=GREY, label="closed form, factor a")
for cap, fit in capped.items():
    lam = float(np.squeeze(fit.params["lm_head.a.E.q.lam"]))
    panel.plot(lam, noise_kl(factors["a"], lam), "o", color=BLUE)
    panel.axvline(cap, color=ORANGE, linestyle="--", linewidth=1)
panel.set(xscale="log", xlabel=r"$\lambda$ of factor a", ylabel="conditional KL (nats)")
panel.legend(fontsize=8)
caption(
    figure,
    f"Cost of the noise of {factors['a']} weights. Points: final values of the fits; dashed: the caps {caps}. With a small cap the "
    "optimiser ends at the cap.",
)
figure

# %%
loose, free = capped[caps[0]].history["elbo"][-20:].mean(), capped[1.0].history["elbo"][-20:].mean()
print(
    f"The cap of {caps[0]:g} lowers the bound by {free - loose:,.0f} nats. The model is the same, and its evidence is "
    f"{evidence:.2f}. A difference of that size between two settings of a capped family is not evidence for either setting."
)
assert free - loose > 100

# %% [markdown]
# ## What to conclude, and what not
#
# - With the same prior and rows, the guide with the higher bound is closer to the posterior in KL divergence, in nats.
# - If a larger family has a lower bound, the optimisation is unfinished. Use more steps, a smaller rate, or a smaller family.
# - With $\lambda$ free, the bound of the sparse GP is comparable with the bound of any other guide for the same distribution of the
#   weights. Under a cap it is not comparable with any other bound.
#
# **Not** to conclude:
#
# - that a small gap in nats means good predictions or intervals. The histograms above differ by more than the gaps suggest;
# - that bounds can choose among *priors* whose frames or scales were learned during the fit;
# - that any of this applies to adapters inside the layers. The evidence is unknown there, so none of this can be checked.
