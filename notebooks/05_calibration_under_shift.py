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
# # Calibration under shift: a posterior compared with a temperature
#
# **Question.** Adapters are fitted to a few film reviews and then predict product reviews, editorials and tweets. Are the
# probabilities still calibrated there? Does a posterior improve on a much cheaper method, one temperature chosen on held-out reviews?
#
# **Model.** Adapters of rank one on the rows of two label words of SmolLM2's head. With $o_i$ the log-odds of the untouched model and
# $h_i$ the last hidden state of row $i$,
#
# $$\eta_i = o_i + (b_1 - b_0)\, a^\top h_i, \qquad p(y_i = 1 \mid a, b) = \frac{1}{1 + e^{-\eta_i}} .$$
#
# *Plain LoRA* maximises the likelihood over $(a, b)$. Three methods reduce its confidence:
#
# - **early stopping** at the step with the lowest NLL on validation rows;
# - a **temperature**, $p_T = \mathrm{softmax}(\mathrm{logits} / T)$, with $T$ chosen for the lowest NLL on validation rows (Guo et al. 2017);
# - a **posterior** under $a \sim \mathcal N(0, \sigma^2 I / d)$, $b_c \sim \mathcal N(0, \sigma^2)$, with the scale $\sigma$ chosen on
#   the same rows. It predicts $p(y \mid x) = \tfrac 1 S \sum_s p(y \mid x, a_s, b_s)$.
#
# The guide is the mean field. `04_nuts_against_variational` shows that it is overconfident here, which is a disadvantage of the
# posterior in this comparison. All choices use **validation rows, which are film reviews**. No row of another domain is used before the
# tables.

# %%
# %matplotlib inline
import os

import jax
import numpy as np
import optax
from IPython.display import display

import bnlora as bl
from bnlora import guides
from bnlora._util.display import Table
from bnlora.data.assets import fetch_smollm2, vader_splits
from bnlora.infer.approximate import fit_temperature, tempered
from bnlora.plots.base import BLUE, COLOURS, ORANGE, caption, make_axes
from bnlora.prediction.selective import risk_coverage, separation

fast = bool(os.environ.get("BNLORA_FAST"))
num_steps, num_draws = (300, 100) if fast else (2000, 400)
num_train, num_validation, num_test = (64, 16, 16) if fast else (256, 128, 192)
domains = ("movies", "nyt") if fast else ("movies", "amazon", "nyt", "tweets")
scales = (1.0, 3.0) if fast else (0.3, 1.0, 3.0, 10.0)
template = "Review: {text}\nSentiment:"

# %%
base = bl.load(fetch_smollm2())
splits = vader_splits(seed=0, train=num_train, validation=num_validation, test=num_test)
data = bl.text_classification(
    type(splits)({name: splits[name] for name in ("train", "validation", *domains)}),
    base.tokenizer,
    text="text",
    label="label",
    template=template,
    words=[" negative", " positive"],
    max_length=64,
    truncate="right",
)
sites = bl.select(base, ["lm_head"], rank=1)


def model_of(prior):
    """A classifier under a prior."""
    return bl.Classifier(base, sites, prior, label_ids=data.label_ids)


plain = model_of(bl.priors.point())
rows = {name: bl.cache_prefix(plain, data[name]) for name in ("train", "validation", *domains)}
labels = {name: np.asarray(rows[name].labels) for name in rows}
k_fit, k_predict, k_base, k_read = jax.random.split(jax.random.key(0), 4)
print(plain)

# %% [markdown]
# ## The fits, and the choices on validation rows


# %%
def fitted(model, guide, **options):
    """Fit by full-batch SVI; maximum likelihood if the prior has no random variable."""
    rate, widths = (optax.adam(optax.cosine_decay_schedule(start, num_steps)) for start in (1e-2, 3e-2))
    train = rows["train"]
    return bl.fit(
        k_fit,
        model,
        guide,
        train,
        rate,
        optimisation=bl.Optimisation(scale_optimizer=widths),
        num_steps=num_steps,
        batch_size=len(train),
        **options,
    )


def predictions_of(fit, num_draws=num_draws):
    """Predictions of every set of rows."""
    return {name: bl.predict(k_predict, fit, rows[name], num_draws=num_draws) for name in rows}


def no_guide(*_):
    """Plain LoRA has no random variables, so its guide is empty."""


early_stopping = bl.EarlyStopping(every=10, patience=num_steps, num_draws=1)
unstopped = fitted(plain, no_guide)
stopped = fitted(plain, no_guide, validation=rows["validation"], early_stopping=early_stopping)
predictions = {"plain LoRA": predictions_of(unstopped, 1), "stopped early": predictions_of(stopped, 1)}
temperature = fit_temperature(predictions["plain LoRA"]["validation"], labels["validation"])
predictions["temperature"] = {
    name: tempered(prediction, temperature) for name, prediction in predictions["plain LoRA"].items()
}

# %%
fits = {}
for scale in scales:
    model = model_of(bl.priors.normal(scale=scale))
    fits[scale] = fitted(model, guides.Guide(model.prior, guides.mean_field()))
by_scale = {scale: predictions_of(fit) for scale, fit in fits.items()}
losses = {
    scale: bl.metrics.nll(by_rows["validation"].log_probs, labels["validation"])
    for scale, by_rows in by_scale.items()
}
best_scale = min(losses, key=losses.get)
posterior, predictions["posterior"] = fits[best_scale], by_scale[best_scale]


def predict_base(name):
    """Prediction of the base model. Every prior predictive contains the logits of the base."""
    logits = bl.prior_predictive(k_base, posterior.model, rows[name], num_draws=2).base_logits
    logits = logits.astype(np.float64)
    return bl.Prediction((logits - np.logaddexp.reduce(logits, 1, keepdims=True))[None])


predictions = {"base": {name: predict_base(name) for name in rows}} | predictions
print(
    f"Early stopping: step {stopped.best_step} of {num_steps}. Temperature: T = {temperature:.2f}. Scale of the posterior: "
    f"{best_scale:g}, chosen from "
    + ", ".join(f"{scale:g} (validation NLL {loss:.3f})" for scale, loss in losses.items())
    + "."
)
for better, worse in (("temperature", "plain LoRA"), ("stopped early", "plain LoRA")):
    first, second = (
        bl.metrics.nll(predictions[m]["validation"].log_probs, labels["validation"]) for m in (better, worse)
    )
    assert first <= second + 1e-6, "a method chosen on the validation rows must not be worse on them"

# %% [markdown]
# ## Where are the probabilities calibrated?
#
# The expected calibration error compares confidence $c_i = \max_y p(y \mid x_i)$ with accuracy in fifteen bins,
# $\mathrm{ECE} = \sum_b \tfrac{n_b}{n} \lvert \mathrm{acc}_b - \mathrm{conf}_b \rvert$. With this number
# of rows it is biased upwards for every method. Therefore the table also has the NLL, which needs no bins, and the signed difference of
# mean confidence and accuracy.


# %%
def cells(name, method):
    """Table row: metrics of a method on a set of rows."""
    prediction = predictions[method][name]
    names = ("accuracy", "nll", "ece")
    metrics = {metric: bl.metrics.METRICS[metric] for metric in names}
    summary = bl.metrics.summary(jax.random.key(0), prediction, labels[name], metrics=metrics)
    excess = prediction.probs.max(1).mean() - summary["accuracy"].value
    return (name, method, *(str(summary[metric]) for metric in names), f"{excess:+.3f}")


header = ("rows", "method", "accuracy", "NLL", "ECE", "confidence - accuracy")
display(
    Table(
        "95 % bootstrap intervals over rows; NLL in nats",
        header,
        tuple(cells(name, method) for name in domains for method in predictions),
    )
)

# %%
for name in domains:
    prediction = predictions["plain LoRA"][name]
    assert prediction.probs.max(1).mean() > bl.metrics.accuracy(prediction.log_probs, labels[name]), (
        "plain LoRA is not overconfident"
    )

compared = {method: predictions[method] for method in ("plain LoRA", "temperature", "posterior")}
test_labels = {name: labels[name] for name in domains}
display(bl.plots.reliability(compared, test_labels))
print(bl.plots.RELIABILITY_CAPTION)

# %% [markdown]
# The intervals of two methods can overlap although one method is better on nearly every row. Therefore compare pairs on the same rows,
# resampled together.

# %%
verdicts, lines = {}, []
for first, second in (
    ("temperature", "plain LoRA"),
    ("posterior", "plain LoRA"),
    ("posterior", "temperature"),
    ("posterior", "stopped early"),
    ("posterior", "base"),
):
    for name in domains:
        one, two = predictions[first][name], predictions[second][name]
        nll, ece = (
            bl.metrics.paired_difference(jax.random.key(0), metric, one, two, labels[name])
            for metric in (bl.metrics.nll, bl.metrics.ece)
        )
        verdict = "better" if nll.high < 0 else "worse" if nll.low > 0 else "undecided"
        verdicts[first, second, name] = verdict
        lines.append((f"{first} - {second}", name, str(nll), str(ece), verdict))
display(
    Table(
        "Paired differences; below zero: the first is better",
        ("methods", "rows", "NLL", "ECE", "by NLL"),
        tuple(lines),
    )
)

# %% [markdown]
# ## A posterior is a temperature for each row
#
# Under a posterior the log-odds $\eta$ of a row have a mean $\mu(x)$ and a standard deviation $s(x)$. If they are Gaussian, MacKay's
# approximation
#
# $$\int \frac{\mathcal N(\eta; \mu, s^2)}{1 + e^{-\eta}}\, d\eta \approx \frac{1}{1 + e^{-\mu / T(x)}}, \qquad
# T(x) = \sqrt{1 + \pi s(x)^2 / 8},$$
#
# describes the effect of averaging: it divides the log-odds by a temperature that **depends on the row**. One temperature from validation
# rows cannot increase on unfamiliar text. $T(x)$ can, if $s(x)$ increases. The draws show whether it does.


# %%
def row_temperature(prediction):
    """T(x) of every row, and the resulting probability of class 1; both of shape (row,)."""
    log_odds = prediction.draw_log_probs[:, :, 1] - prediction.draw_log_probs[:, :, 0]
    t = np.sqrt(1 + np.pi * log_odds.var(0) / 8)
    return t, 1 / (1 + np.exp(-log_odds.mean(0) / t))


temperatures, error = {}, {}
for name in domains:
    temperatures[name], implied = row_temperature(predictions["posterior"][name])
    error[name] = np.abs(implied - predictions["posterior"][name].probs[:, 1]).max()
    assert error[name] < 0.05, "the log-odds are too far from Gaussian for MacKay's approximation"

panels, figure, _ = make_axes(None, 2, width=4.8, height=2.9, columns=2)
pooled = np.concatenate(list(temperatures.values()))
edges = np.linspace(pooled.min(), pooled.max(), 25)
for (name, values), colour in zip(temperatures.items(), COLOURS, strict=False):
    panels[0].hist(values, edges, density=True, histtype="step", linewidth=1.5, label=name, color=colour)
panels[0].set(xlabel="$T(x)$ of the posterior", ylabel="density")
panels[0].legend(fontsize=8)
for name, colour in ((domains[0], BLUE), (domains[-1], ORANGE)):
    log_probs = predictions["posterior"][name].draw_log_probs
    mean = (log_probs[:, :, 1] - log_probs[:, :, 0]).mean(0)
    panels[1].plot(np.abs(mean), temperatures[name], "o", color=colour, markersize=3, alpha=0.6, label=name)
panels[1].set(xlabel="absolute mean log-odds, $|\\mu(x)|$", ylabel="$T(x)$")
panels[1].legend(fontsize=8)
caption(
    figure,
    "Temperature equivalent to averaging over the posterior, for each row. Left: by domain. Right: against the absolute mean log-odds, in "
    "domain (blue) and out of domain (orange).",
)
figure

# %%
averaging = {}
for name in domains:
    prediction = predictions["posterior"][name]
    log_odds = prediction.draw_log_probs[:, :, 1] - prediction.draw_log_probs[:, :, 0]
    plug_in = 1 / (1 + np.exp(-log_odds.mean(0)))
    averaging[name] = np.abs(plug_in - prediction.probs[:, 1]).mean()
print(
    f"Largest error of the approximation: {max(error.values()):.4f} of probability. Median T(x): "
    + ", ".join(f"{np.median(values):.3f} on {name}" for name, values in temperatures.items())
    + f"; the single temperature of plain LoRA is {temperature:.2f}.\nMean change of a probability by averaging, compared with the "
    "probability at the mean log-odds: "
    + ", ".join(f"{size:.4f} on {name}" for name, size in averaging.items())
    + "."
)

# %% [markdown]
# ## Does uncertainty detect another domain?

# %%
bl.plots.domains({name: predictions["posterior"][name] for name in domains})

# %%
areas = {}
for name in domains[1:]:
    for method, measure in (
        ("plain LoRA", "entropy"),
        ("posterior", "entropy"),
        ("posterior", "mutual_information"),
    ):
        inside, outside = (getattr(predictions[method][domain], measure) for domain in (domains[0], name))
        areas[name, method, measure] = separation(inside, outside)
lines = tuple(
    (name, method, measure.replace("_", " "), f"{area:.2f}")
    for (name, method, measure), area in areas.items()
)
display(
    Table(
        f"Probability that a row of the domain is more uncertain than a row of {domains[0]}",
        ("rows", "method", "uncertainty", "AUC"),
        lines,
    )
)

# %% [markdown]
# ## Selective prediction
#
# Answer only the rows with the lowest uncertainty. A temperature has **no effect** on this order: with two classes it moves all
# probabilities towards one half and keeps their order, as the code below asserts. If its curve differs from that of plain LoRA, plain
# LoRA has rows with confidence *rounded to one*, and their order is lost. A posterior has a different temperature for each row, so its
# order can differ.

# %%
bl.plots.risk_coverage(jax.random.key(0), compared, test_labels)

# %%
curves = {
    (method, name): risk_coverage(jax.random.key(0), predictions[method][name], labels[name])
    for method in predictions
    for name in domains
}
by_information = {
    name: risk_coverage(
        jax.random.key(0), predictions["posterior"][name], labels[name], by="mutual_information"
    )
    for name in domains
}
lines, certain = [], {}
for name in domains:
    gain = bl.metrics.paired_difference(
        jax.random.key(0),
        bl.metrics.aurc,
        predictions["posterior"][name],
        predictions["plain LoRA"][name],
        labels[name],
    )
    columns = (
        str(curves[method, name].aurc) for method in ("base", "plain LoRA", "temperature", "posterior")
    )
    lines.append((name, *columns, str(by_information[name].aurc), str(gain)))
    # Order the rows by the log-odds of plain LoRA: unlike the probabilities, the log-odds are not rounded to ties.
    log_probs = predictions["plain LoRA"][name].log_probs
    order = np.argsort(np.abs(log_probs[:, 1] - log_probs[:, 0]))
    assert (np.diff(predictions["temperature"][name].probs.max(1)[order]) > -1e-9).all()
    assert (predictions["temperature"][name].log_probs.argmax(1) == log_probs.argmax(1)).all()
    certain[name] = (log_probs.max(1) == 0).sum()
header = (
    "rows",
    "base",
    "plain LoRA",
    "temperature",
    "posterior",
    "posterior, by mutual information",
    "posterior - plain LoRA",
)
display(Table("AURC, lower is better", header, tuple(lines)))
print(
    "Rows with a confidence of exactly one under plain LoRA: "
    + ", ".join(f"{count} on {name}" for name, count in certain.items())
    + "."
)

# %% [markdown]
# ## Two sentences, token by token
#
# What would the prediction be if the text ended at this token? The shade is the mutual information, on the same scale for both
# sentences. The sentences were written for this notebook and are not rows of any table.

# %%
sentences = ("A dull first hour, but the ending is a triumph.", "The central bank left its rates unchanged.")
if fast:
    sentences = sentences[:1]
readings = [
    bl.read_along(k_read, posterior, text, template=template, num_draws=num_draws) for text in sentences
]
top = max(reading.prediction.mutual_information.max() for reading in readings)
for reading in readings:
    display(reading.shaded("mutual_information", top=float(top)))
    assert "".join(reading.pieces) in sentences

# %% [markdown]
# ## What to conclude, and what not

# %%
for first, second in (
    ("posterior", "plain LoRA"),
    ("posterior", "temperature"),
    ("posterior", "stopped early"),
    ("posterior", "base"),
):
    for verdict in ("better", "worse", "undecided"):
        names = [name for name in domains if verdicts[first, second, name] == verdict]
        if names:
            print(f"By NLL, {first} compared with {second}: {verdict} on {', '.join(names)}.")
inside = np.median(temperatures[domains[0]])
print(
    f"Median T(x) relative to {domains[0]}: "
    + ", ".join(f"{np.median(temperatures[name]) / inside - 1:+.1%} on {name}" for name in domains[1:])
    + "."
)
gains = [
    name for name in domains if curves["posterior", name].aurc.value < curves["plain LoRA", name].aurc.value
]
print(
    f"The posterior has a lower AURC than plain LoRA (point estimate only) on: {', '.join(gains) or 'no rows'}."
)

# %% [markdown]
# The lines above are the result for these rows. The following points do not depend on them:
#
# - Plain LoRA, run to the maximum of its likelihood, is strongly overconfident, in domain as well: the rows are few and can be separated.
#   Any choice on validation rows corrects most of this, even a single number. Compare a posterior with *these* methods, on the same rows.
# - A temperature corrects the confidence only: the classes and the order of the rows stay the same. Accuracy and selective prediction
#   need a different fit.
# - A posterior has two effects: its prior keeps the update small, and averaging divides by $T(x)$. If $T(x)$ is near one, as printed
#   above, it differs from plain LoRA only by the prior, and is close to the untouched model. $T(x)$ need not increase out of domain: the
#   spread of $(b_1 - b_0)\, a^\top h$ increases with the component of $h$ that the rows do not determine.
# - The untouched model is also a method and belongs in the table: a posterior that the rows hardly change is close to it.
#
# **Not** to conclude: that one of these methods is better calibrated in general. The adapters are on the head only. There is one seed,
# one base and one template, and all four domains of VADER are English sentences. The upward bias of the ECE on so few rows is as large
# as the differences above, and the mutual information of a mean field is too small.
