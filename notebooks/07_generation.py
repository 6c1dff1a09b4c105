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
# # Generation: where in a text is a posterior unsure?
#
# **Question.** Adapters of SmolLM2 are fitted to a few film reviews, to tell positive from negative. Their posterior is one over language
# models. What do its draws write, and at which tokens do they disagree?
#
# **Model.** Adapters $A, B$ of rank one on the values of attention in the last layer, with independent normal priors. With $p_s$ the
# language model under draw $s$ of the posterior, the next token of a text that all draws write together comes from
#
# $$p(x_t \mid x_{<t}) = \sum_s w_{s,t}\, p_s(x_t \mid x_{<t}), \qquad w_{s,t} \propto \prod_{u<t} p_s(x_u \mid x_{<u}).$$
#
# Its entropy is the sum of two parts, in nats:
#
# $$\underbrace{\textstyle H\big[\sum_s w_s p_s\big]}_{\text{entropy}} = \underbrace{\textstyle\sum_s w_s H[p_s]}_{\text{aleatoric}} +
# \underbrace{\textstyle\sum_s w_s \mathrm{KL}\big(p_s \,\|\, \sum_r w_r p_r\big)}_{\text{epistemic}}.$$
#
# The epistemic part is the mutual information of the token and the adapters: what one would learn about the adapters from the token.

# %%
import os

import jax
import numpy as np
import optax
from IPython.display import display

import bnlora as bl
from bnlora import guides
from bnlora.data.assets import fetch_smollm2, vader_splits

fast = bool(os.environ.get("BNLORA_FAST"))
num_train, num_steps, num_draws, num_tokens = (8, 20, 3, 6) if fast else (64, 400, 12, 32)
template = "Review: {text}\nSentiment:"

# %%
base = bl.load(fetch_smollm2())
splits = vader_splits(seed=0, train=num_train, validation=2, test=2)
data = bl.text_classification(
    splits["train"],
    base.tokenizer,
    text="text",
    label="label",
    template=template,
    words=[" negative", " positive"],
    max_length=64,
    truncate="right",
)
sites = bl.select(base, ["v_proj"], rank=1, layers=slice(-1, None))
model = bl.Classifier(base, sites, bl.priors.normal(scale=2.0), label_ids=data.label_ids)
rows = bl.cache_prefix(model, data.train)
k_fit, k_write, k_own = jax.random.split(jax.random.key(0), 3)
widths = bl.Optimisation(scale_optimizer=optax.adam(3e-2))
fit = bl.fit(
    k_fit,
    model,
    guides.Guide(model.prior, guides.mean_field(init_scale=0.02)),
    rows,
    optax.adam(1e-2),
    optimisation=widths,
    num_steps=num_steps,
    batch_size=num_train,
)
print(fit)
divergence = fit.history["inducing_kl"][-50:].mean()
print(f"divergence of the posterior from the prior: {divergence:.2f} nats")

# %% [markdown]
# If the divergence is below a nat, the reviews have taught these adapters almost nothing, and what follows is the prior's uncertainty.
#
# ## One text, written by all draws
#
# The shade behind a token is its epistemic uncertainty; a tooltip has all numbers of a token. The most probable token is taken at every
# step, so the untouched model, which has no draws, differs from the posterior only through the adapters.

# %%
prompts = [
    template.format(text="A moving story, and wonderful acting."),
    "The film was",
    "The capital of France is",
]
options = {"max_new_tokens": num_tokens, "num_draws": num_draws}
untouched = bl.generate(k_write, base, prompts, **options)
written = bl.generate(k_write, fit, prompts, **options)
display(written)
for prompt, before, after in zip(prompts, untouched.texts, written.texts, strict=True):
    print(f"{prompt!r}\n  untouched: {before!r}\n  posterior: {after!r}")

# %% [markdown]
# The first token after each prompt, where all draws have equal weights:

# %%
for row, prompt in enumerate(prompts):
    print(
        f"{prompt!r}: entropy {written.entropy[row, 0]:.3f} nats, of which epistemic "
        f"{written.epistemic[row, 0]:.2g} (untouched: entropy {untouched.entropy[row, 0]:.3f})"
    )
counted = written.mask
assert (written.epistemic[counted] >= 0).all()
assert (untouched.epistemic == 0).all()
shares = written.epistemic[counted].sum() / written.entropy[counted].sum()
print(f"epistemic share of all entropy: {shares:.2g}")
assert shares < 0.5

# %% [markdown]
# ## The text is evidence about the adapters
#
# A draw that explains the text so far badly loses weight. The log-probabilities of the tokens then add up to the log of the mean over
# the draws of the text's probability, which equal weights would not give:

# %%
of_text = np.logaddexp.reduce(written.draw_log_probs.sum(2), axis=0) - np.log(num_draws)
equal = (np.logaddexp.reduce(written.draw_log_probs, axis=0) - np.log(num_draws)) * counted
for row, weights in enumerate(np.moveaxis(written.weights[:, :, -1], 0, 1)):
    print(
        f"text {row}: log-probability {written.sequence_log_probs[row]:.4f}, log of the mean over the draws "
        f"{of_text[row]:.4f}; with equal weights {equal[row].sum():.4f}. Effective number of draws at the "
        f"last token: {1 / (weights**2).sum():.1f} of {num_draws}"
    )
assert np.allclose(written.sequence_log_probs, of_text, atol=1e-3)

# %% [markdown]
# ## A text for each draw
#
# At temperature 1 these are draws from the posterior predictive distribution of texts, as are those that the draws write together. They
# differ through the adapters and through chance; a text alone does not tell which.

# %%
own = bl.generate(
    k_own, fit, prompts[1:2], mixture="sequence", temperature=1.0, **(options | {"num_draws": 3})
)
print(own.table)
for text in own.texts_of(0):
    print(repr(text))
assert np.isnan(own.epistemic).all()

# %% [markdown]
# ## What to conclude, and what not
#
# - Epistemic uncertainty of a token is measured against *this* posterior: these adapters, this prior, this guide. It says nothing of
#   what the frozen weights do not know. A model can be wrong about the capital of a country without any epistemic uncertainty here.
# - A low value can also mean that the draws have collapsed: look at the effective number of draws.
# - Nearly all uncertainty about the next word is aleatoric, because a text can go on in many ways. Compare epistemic values between
#   places in a text, and not with the entropy.
# - The fit saw labels of reviews, and no text. What it changes elsewhere in the language model is a side effect that the prior permits,
#   and a prior that is wide there gives epistemic uncertainty to tokens that no label speaks of.
