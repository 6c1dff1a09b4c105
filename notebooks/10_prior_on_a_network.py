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
# # Your own prior on a network: from frames to an exact check
#
# **Question.** You have an opinion on how much each layer of a language model should change. How do you write it as a prior, see what it
# predicts before the fit, compare its evidence with that of another prior, and fit the network itself under it? How far from exact is the
# fit?
#
# **At the end you have** a prior of your own between frames, its prior predictive on the network, its evidence on the tangent model, two
# variational fits of the network, NUTS on the tangent model and, for one layer, on the network, and a summary for ArviZ.
#
# **Model.** The update of module $f$ in layer $l$ lies between fixed frames $L$ and $R$,
#
# $$\Delta W_{fl} = \frac{s_{fl}}{c_f}\, L_{fl}\, U_{fl} R_{fl}^\top, \qquad U_{fl} \text{ with independent } \mathcal N(0, 1) \text{ entries}.$$
#
# The constant $c_f$ makes $s$ the prior standard deviation of the log-odds, in nats and to first order. Two priors of the scales:
#
# - the **core** prior of the library has one scale for each module, $s_{fl} = s_f$ with $s_f \sim \mathcal N^+(0, \sigma^2)$;
# - **our own** has one scale for the whole network, and a factor for each module and layer:
#   $s_{fl} = \tau\, \lambda_{fl}$ with $\tau \sim \mathcal N^+(0, \sigma^2)$ and $\log \lambda_{fl} \sim \mathcal N(0, \omega^2)$.

# %%
# %matplotlib inline
import os

import arviz_stats
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from IPython.display import display
from numpyro.handlers import seed, substitute, trace

import bnlora as bl
from bnlora._util.display import Table
from bnlora.data.assets import fetch_smollm2, vader_splits
from bnlora.plots.base import BLUE, GREY, caption, legend_above, make_axes

fast = bool(os.environ.get("BNLORA_FAST"))
num_train, num_test, size = (32, 16, 2) if fast else (48, 40, 4)
num_steps, num_prior, num_draws = (5, 4, 20) if fast else (200, 40, 40)
nuts = {"num_warmup": 20, "num_draws": 20} if fast else {"num_warmup": 200, "num_draws": 500}
costly_nuts = nuts if fast else {"num_warmup": 60, "num_draws": 250}
keys = iter(jax.random.split(jax.random.key(0), 20))

# %%
base = bl.load(fetch_smollm2())
splits = vader_splits(seed=0, train=num_train, validation=1, test=num_test)
data = bl.text_classification(
    type(splits)({name: splits[name] for name in ("train", "movies")}),
    base.tokenizer,
    text="text",
    label="label",
    template="Review: {text}\nSentiment:",
    words=[" negative", " positive"],
    max_length=32,
    truncate="right",
)
print(data)

# %% [markdown]
# ## The frames
#
# Frames choose the directions in which a module may change, from the rows without their labels: here queries and values of the two
# uppermost layers.

# %%
modules = ["q_proj", "v_proj"]
options = {"label_ids": data.label_ids, "size": size}
frames = bl.frames(next(keys), base, modules, data.train, layers=slice(-2, None), **options)
display(*frames.overview)
display(bl.plots.frame_energies(frames))
print(bl.plots.FRAME_CAPTION)

# %% [markdown]
# A curve that falls steeply before the dot says that few directions are enough for first-order changes of the log-odds.
#
# ## The prior
#
# A prior is a NumPyro program: it takes the sites and returns the two factors of every update. $U$ and the scales are separate sites, so
# there is no funnel of a scale and weights of that scale; `bl.laplace` recognises cores by the ending `.U` and scales by the ending `.scale`.


# %%
def layered(sigma, omega=0.7):
    """One scale for the network, and a factor for each module and layer."""

    def prior(sites):
        tau = numpyro.sample("tau.scale", dist.HalfNormal(sigma), infer={"init": "median"})
        adapters = {}
        for name, site in sites.items():
            frame = frames[name]
            with bl.priors.layers(site):
                factor = numpyro.sample(
                    f"{name}.factor.scale", dist.LogNormal(0.0, omega), infer={"init": "median"}
                )
                U = numpyro.sample(
                    f"{name}.U",
                    dist.Normal(jnp.zeros(frame.size), 1.0).to_event(2),
                    infer={"init": "zero", "weight": True},
                )
            core = (tau * factor / frame.unit)[:, None, None] * U
            adapters[name] = {"a": jnp.swapaxes(frame.right, 1, 2), "b": frame.left @ core / site.scale}
        return adapters

    return prior


def core(sigma):
    """The prior of the library, with one random scale for each module."""
    return bl.priors.core(frames, scale=dist.HalfNormal(sigma))


def network(prior):
    """The classifier under a prior: the network itself."""
    return bl.Classifier(base, frames.sites, prior, label_ids=data.label_ids)


sites = network(core(1.0)).sites
for name, prior in {"core": core(1.0), "own": layered(1.0)}.items():
    executed = trace(seed(prior, 0)).get_trace(sites)
    print(name, {k: site["value"].shape for k, site in executed.items() if site["type"] == "sample"})

# %% [markdown]
# **Test it before you use it.** With all factors at one, both priors must make the same update of the same $U$:

# %%
U = {name: jax.random.normal(next(keys), frames[name].size) for name in modules}
values = {f"{name}.U": value for name, value in U.items()}
ones = {f"{name}.factor.scale": jnp.ones(frames[name].size[0]) for name in modules}
mine = substitute(seed(layered(1.0), 0), {"tau.scale": 2.0, **ones, **values})(sites)
theirs = substitute(seed(bl.priors.core(frames, scale=2.0), 0), values)(sites)
for name in modules:
    np.testing.assert_allclose(
        mine[name]["b"] @ mine[name]["a"], theirs[name]["b"] @ theirs[name]["a"], rtol=1e-4, atol=1e-7
    )
print("Same update for the same U.")

# %% [markdown]
# ## What the prior predicts
#
# The unit of a scale holds to first order, at the untouched weights. A large update leaves this range. So look at draws of the prior in
# the network, beside those in its tangent model, at the same $\sigma$:

# %%
tangent = bl.Tangent(network(core(1.0)))
train = bl.cache_prefix(network(core(1.0)), data.train)
few, key = train[:16], next(keys)
lines = []
for sigma in (0.1, 3.0):
    for kind, model in {
        "tangent": tangent.with_prior(layered(sigma)),
        "network": network(layered(sigma)),
    }.items():
        drawn = bl.prior_predictive(key, model, few, num_draws=num_prior)
        numbers = (drawn.overall_spread, drawn.decided, drawn.distance_from_base)
        lines.append((f"{sigma:g}", kind, *(f"{x:.3f}" for x in numbers)))
header = ("sigma", "model", "spread of the log-odds, nats", "share above 0.99", "distance from the base")
Table(f"{num_prior} draws of our own prior, {len(few)} rows, no labels", header, tuple(lines))

# %% [markdown]
# At a small scale the two models agree, because the expansion holds. At a large one they need not. So choose $\sigma$ for the *network*
# by what it predicts there: a spread of 0.5 nats.

# %%
key = next(keys)
sigma = bl.scale_for_spread(
    key, network(core(1.0)), layered, few, spread=0.5, num_draws=num_prior, tolerance=0.05, bounds=(0.01, 10)
)
drawn = bl.prior_predictive(key, network(layered(sigma)), few, num_draws=num_prior)
print(f"sigma {sigma:.3f}: spread {drawn.overall_spread:.3f} nats\n{drawn.verdict}")
bl.plots.prior_predictive(drawn)

# %% [markdown]
# Left: the blue histogram should cover the middle and not pile up in the grey edges. Right: for most rows, the intervals should be longer
# than the mark of the base and shorter than the whole range.
#
# ## Evidence on the tangent model
#
# The tangent model has an evidence that is cheap to compute: Laplace's approximation, with the scales integrated out. Here $\sigma$ is
# larger than above, because the tangent model is linear at any scale.

# %%
wide = 1.0
rows = bl.cache_prefix(tangent, data.train)
models = {"core": tangent.with_prior(core(wide)), "own": tangent.with_prior(layered(wide))}
gaussians = {name: bl.laplace(model, rows) for name, model in models.items()}
by_layer = bl.choose_scales(tangent, rows, by="layer", prior=dist.HalfNormal(wide))
lines = [(name, f"{gaussian.log_evidence:.2f}") for name, gaussian in gaussians.items()]
lines += [
    ("scales at their best, by layer", f"{by_layer.log_evidence:.2f}"),
    ("untouched base", f"{by_layer.base:.2f}"),
]
display(
    Table(f"log p(labels of {num_train} rows) in nats, tangent model", ("prior", "Laplace"), tuple(lines))
)
print(by_layer)
gap = gaussians["own"].log_evidence - gaussians["core"].log_evidence
best = max(gaussian.log_evidence for gaussian in gaussians.values()) - by_layer.base
print(f"Better of the two priors minus the untouched base: {best:+.2f} nats.")
print(f"Our own prior minus the core prior: {gap:+.2f} nats, a Bayes factor of {np.exp(gap):.2f}.")

# %% [markdown]
# A Bayes factor between a third and three is no evidence for either prior. The third line is the evidence at one choice of the scales, and
# not averaged over a prior, so it may be higher or lower than both. If the base is above both priors, these few rows do not ask for
# updates of this size, and the posterior of the scales moves towards zero.
#
# ## NUTS on the tangent model
#
# `mass=` gives the sampler coordinates that follow the scales. The certificate checks the run, and bridge sampling checks Laplace.

# %%
chains = bl.sample_nuts(
    next(keys), models["own"], rows, mass=gaussians["own"], target_acceptance=0.9, max_doublings=6, **nuts
)
print(chains)
display(chains.certificate)
bridge = bl.log_evidence(next(keys), chains)
print(
    f"log evidence by bridge sampling {bridge.value:.2f} +- {bridge.stderr:.2f}, by Laplace {gaussians['own'].log_evidence:.2f}"
)


# %%
def scales_of(values):
    """Draws of the scale of each module and layer, by name; the last axis of a factor is the layer."""
    tau = np.asarray(values["tau.scale"]).reshape(-1, 1)
    scales = {}
    for name in modules:
        factor = np.asarray(values[f"{name}.factor.scale"])
        product = tau * factor.reshape(-1, factor.shape[-1])
        scales |= {f"{name}, layer {at}": product[:, i] for i, at in enumerate(frames.sites[name].layers)}
    return scales


# %%
prior_draws = numpyro.infer.Predictive(models["own"].prior, num_samples=4000)(next(keys))
pairs = {"prior": (scales_of(prior_draws), GREY), "posterior": (scales_of(chains.sites()), BLUE)}
(panel,), figure, _ = make_axes(None, 1, width=5.5, height=2.8)
for offset, (name, (draws, colour)) in zip((-0.12, 0.12), pairs.items(), strict=True):
    places = np.arange(len(draws)) + offset
    stacked = np.stack(list(draws.values()))
    for inner, width in ((0.9, 1.5), (0.5, 4.0)):
        low, high = np.quantile(stacked, [(1 - inner) / 2, (1 + inner) / 2], axis=1)
        panel.vlines(places, low, high, color=colour, linewidth=width)
    panel.plot(places, np.median(stacked, axis=1), "o", color=colour, markersize=5, label=name)
panel.set_xticks(range(len(draws)), [name.replace(", ", "\n") for name in draws], fontsize=8)
panel.set(ylabel="scale (nats)", ylim=(0, None))
legend_above(panel)
caption(
    figure,
    "Scale of each module and layer under our own prior, tangent model: medians, central 50 % (thick) and 90 % (thin) intervals.",
)
figure

# %% [markdown]
# Where blue and grey are alike, the rows say nothing about the scale. Where blue lies below grey, they ask for a smaller change than the
# prior expected.
#
# ## The network itself, by variational inference
#
# The same two priors, now without the expansion, at the $\sigma$ that was chosen on the network. The guide has an independent normal for
# each entry of $U$ and for each scale. It starts as wide as the prior: from a narrow start, most of the steps would be spent on widening
# it again in the directions that the rows do not inform.


# %%
def fitted(prior):
    """A mean-field fit of the network."""
    model = network(prior)
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field(init_scale=1.0))
    rate = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    return bl.fit(next(keys), model, guide, train, rate, num_steps=num_steps, batch_size=16)


fits = {"core": fitted(core(sigma)), "own": fitted(layered(sigma))}
display(bl.plots.elbo(fits))
print(bl.plots.ELBO_CAPTION)
last = max(num_steps // 4, 1)
for name, fit in fits.items():
    steps = fit.history["elbo"][-last:]
    print(
        f"{name}: bound {steps.mean():.1f} +- {steps.std() / last**0.5:.1f} nats (mean of the last {last} steps)"
    )
print(f"untouched base: {by_layer.base:.1f} nats")

# %% [markdown]
# Both curves should be flat at the end. A bound of the network and an evidence of the tangent model belong to different models, so do not
# compare the two.
#
# ## Predictions

# %%
test = {
    "network": bl.cache_prefix(network(core(1.0)), data["movies"]),
    "tangent": bl.cache_prefix(tangent, data["movies"]),
}
labels, key = np.asarray(test["network"].labels), next(keys)
offset = np.asarray(test["tangent"].features.offset, np.float64)
predictions = {"base": bl.Prediction((offset - np.logaddexp.reduce(offset, 1, keepdims=True))[None])}
for name, fit in fits.items():
    predictions[f"network, {name}"] = bl.predict(key, fit, test["network"], num_draws=num_draws)
predictions["tangent, own (NUTS)"] = bl.predict(key, chains, test["tangent"], num_draws=num_draws)
metrics = {name: bl.metrics.METRICS[name] for name in ("accuracy", "nll", "ece")}
lines = []
for name, prediction in predictions.items():
    summary = bl.metrics.summary(jax.random.key(0), prediction, labels, metrics=metrics)
    lines.append((name, *map(str, summary.values()), f"{prediction.mutual_information.mean():.3f}"))
header = ("posterior", "accuracy", "NLL", "ECE", "mutual information")
Table(f"{num_test} test reviews with 95 % bootstrap intervals; nats", header, tuple(lines))

# %%
difference = bl.metrics.paired_difference(
    jax.random.key(0), bl.metrics.nll, predictions["network, own"], predictions["network, core"], labels
)
verdict = "better" if difference.high < 0 else "worse" if difference.low > 0 else "undecided"
print(f"network: NLL under our own prior minus that under the core prior {difference} ({verdict})")

# %% [markdown]
# ## Do the two priors give the same posterior?
#
# `bl.compare` compares functions that the rows can identify: log-odds of some rows, and norms of the updates. None of the two is exact,
# so neither is called a reference. A difference can come from the priors or from the fits: a mean field has its own errors under each.

# %%
two = bl.compare(
    next(keys), fits["own"], fits["core"], test["network"][:8], num_draws=100, against="anything"
)
print("\n".join(two.sentences))

# %% [markdown]
# ## Exact sampling of the network, for one layer
#
# With adapters in the last layer only, each gradient of the network runs a single layer, so NUTS is affordable, here for half of the
# rows and few directions. The scale is fixed at one nat. The variational guide is a Gaussian with a full covariance. It starts at
# Laplace's Gaussian of the tangent model, `bl.start_at`.

# %%
options |= {"size": 2, "layers": slice(-1, None)}
top = bl.frames(next(keys), base, ["v_proj"], data.train, **options)
last_layer = bl.Classifier(base, top.sites, bl.priors.core(top, scale=1.0), label_ids=data.label_ids)
last_rows = bl.cache_prefix(last_layer, data.train[: num_train // 2])
exact = bl.sample_nuts(
    next(keys), last_layer, last_rows, target_acceptance=0.8, max_doublings=5, **costly_nuts
)
print(exact)
display(exact.certificate)

# %%
guide = bl.guides.Guide(last_layer.prior, bl.guides.full(over="all"))
rate = optax.adam(optax.cosine_decay_schedule(1e-2, 2 * num_steps))
variational = bl.fit(
    next(keys),
    last_layer,
    guide,
    last_rows,
    rate,
    num_steps=2 * num_steps,
    batch_size=len(last_rows),
    num_particles=2,
    init_params=bl.start_at(next(keys), guide, bl.laplace(bl.Tangent(last_layer), last_rows)),
)
against = "reference" if exact.certificate.passed else "anything"
checked = bl.compare(
    next(keys),
    variational,
    exact,
    bl.cache_prefix(last_layer, data["movies"]),
    num_draws=100 if fast else 200,
    against=against,
)
print("\n".join(checked.sentences))
bl.plots.forest(checked)

# %% [markdown]
# Blue is NUTS and orange the variational fit, in units of the blue spread. Where the two intervals lie on each other, the fit is right in
# this function. The sentences above the picture say which aspects differ by more than chance.
#
# ## ArviZ
#
# The tree has the scales by name, and norms and singular values instead of the factors, which are not identifiable.

# %%
tree = bl.to_arviz(next(keys), fits["own"], test["network"], num_draws=40 if fast else 100)
arviz_stats.summary(
    tree, var_names=["tau.scale", "factor.scale", "update_norm"], filter_vars="like", kind="stats"
)

# %% [markdown]
# ## What to conclude, and what not

# %%
print(f"Evidence on the tangent model, own minus core: {gap:+.2f} nats.")
print(f"Differences of the two network fits: {', '.join(two.differences) or 'none detected'}.")
name = "NUTS" if against == "reference" else "NUTS without a certificate"
print(
    f"Last layer, variational fit against {name}: {', '.join(checked.differences) or 'no difference detected'}."
)

# %% [markdown]
# - A prior is a function of the sites. Names of its sites are free, but `.U` and `.scale` give it Laplace, evidence and NUTS in good
#   coordinates on the tangent model.
# - Test a prior against a known one at values where both agree, and look at its predictions in the model that you will fit.
# - A difference of a nat between two priors of the scales is no reason to prefer one.
#
# **Not** shown: a prior on all layers, which needs memory and time and no other code; more than a few dozen rows; several seeds; a NUTS
# run of the network in two layers, whose gradients need every position of a row. The certificate of the tangent model says nothing about the network.
