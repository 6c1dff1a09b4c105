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
# # Calibration under shift: a posterior against a temperature
#
# **Question.** Adapters learn from a few film reviews, and are then asked about products, editorials and tweets. Are their
# probabilities still right there? And does a posterior give more than what costs nothing: one temperature, chosen on held-out
# reviews?
#
# **Model.** Adapters of rank one on the rows of two label words of SmolLM2's head. With $o_i$ the log-odds of the untouched model and
# $h_i$ the last hidden state of row $i$,
#
# $$\eta_i = o_i + (b_1 - b_0)\, a^\top h_i, \qquad p(y_i = 1 \mid a, b) = \frac{1}{1 + e^{-\eta_i}} .$$
#
# Three ways to be less sure than *plain LoRA*, which maximises the likelihood over $(a, b)$:
#
# - **stop early**, at the step of the least NLL on validation rows;
# - a **temperature**, $p_T = \mathrm{softmax}(\mathrm{logits} / T)$ with $T$ of the least NLL on validation rows (Guo et al. 2017);
# - a **posterior** under $a \sim \mathcal N(0, \sigma^2 I / d)$, $b_c \sim \mathcal N(0, \sigma^2)$, whose scale $\sigma$ is chosen on
#   the same rows, and $p(y \mid x) = \tfrac 1 S \sum_s p(y \mid x, a_s, b_s)$.
#
# The guide is the mean field, which `04_nuts_against_variational` finds too sure of itself; that is a handicap of the posterior
# here, and stays one. Everything that is chosen is chosen on **validation rows, which are film reviews**. No row of another domain is looked at before the
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
from bnlora.prediction.selective import separation

fast = bool(os.environ.get("BNLORA_FAST"))
num_steps, num_draws = (300, 100) if fast else (2000, 400)
num_train, num_validation, num_test = (64, 32, 32) if fast else (256, 128, 192)
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
# ## Four fits, and what is chosen on validation rows


# %%
def fitted(model, guide, **options):
    """Full-batch SVI, or maximum likelihood where the prior has no random variable."""
    rate, widths = (optax.adam(optax.cosine_decay_schedule(start, num_steps)) for start in (1e-2, 3e-2))
    train = rows["train"]
    return bl.fit(
        k_fit,
        model,
        guide,
        train,
        rate,
        scale_optimizer=widths,
        num_steps=num_steps,
        batch_size=len(train),
        **options,
    )


def predictions_of(fit, num_draws=num_draws):
    """Predictions of every set of rows."""
    return {name: bl.predict(k_predict, fit, rows[name], num_draws=num_draws) for name in rows}


def no_guide(*_):
    """Plain LoRA has parameters alone."""


looks = bl.EarlyStopping(every=10, patience=num_steps, num_draws=1)
unstopped = fitted(plain, no_guide)
stopped = fitted(plain, no_guide, validation=rows["validation"], early_stopping=looks)
found = {"plain LoRA": predictions_of(unstopped, 1), "stopped early": predictions_of(stopped, 1)}
temperature = fit_temperature(found["plain LoRA"]["validation"], labels["validation"])
found["temperature"] = {name: tempered(made, temperature) for name, made in found["plain LoRA"].items()}

# %%
tried = {}
for scale in scales:
    model = model_of(bl.priors.normal(scale=scale))
    tried[scale] = fitted(model, guides.Guide(model.prior, guides.mean_field()))
made = {scale: predictions_of(fit) for scale, fit in tried.items()}
losses = {
    scale: bl.metrics.nll(found_at["validation"].log_probs, labels["validation"])
    for scale, found_at in made.items()
}
chosen = min(losses, key=losses.get)
posterior, found["posterior"] = tried[chosen], made[chosen]


def untouched(name):
    """Prediction of the base model, whose logits come with every prior predictive."""
    logits = bl.prior_predictive(k_base, posterior.model, rows[name], num_draws=2).base_logits
    logits = logits.astype(np.float64)
    return bl.Prediction((logits - np.logaddexp.reduce(logits, 1, keepdims=True))[None])


found = {"untouched": {name: untouched(name) for name in rows}} | found
print(
    f"Stopped early: step {stopped.best_step} of {num_steps}. Temperature: T = {temperature:.2f}. Scale of the posterior: {chosen:g}, of "
    + ", ".join(f"{scale:g} (validation NLL {loss:.3f})" for scale, loss in losses.items())
    + "."
)
for better, worse in (("temperature", "plain LoRA"), ("stopped early", "plain LoRA")):
    first, second = (
        bl.metrics.nll(found[m]["validation"].log_probs, labels["validation"]) for m in (better, worse)
    )
    assert first <= second + 1e-6, "chosen on these rows, so no worse on these rows"

# %% [markdown]
# ## Where are the probabilities right?
#
# The expected calibration error compares confidence $c_i = \max_y p(y \mid x_i)$ with accuracy in fifteen bins,
# $\mathrm{ECE} = \sum_b \tfrac{n_b}{n} \lvert \mathrm{acc}_b - \mathrm{conf}_b \rvert$. On so many rows it is biased upwards, for
# every method alike, so it stands beside the NLL, which has no bins, and beside the signed difference of mean confidence and accuracy.


# %%
def cells(name, method):
    """Metrics of a method on a set of rows, as text."""
    prediction = found[method][name]
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
        tuple(cells(name, method) for name in domains for method in found),
    )
)

# %%
for name in domains:
    sure = found["plain LoRA"][name]
    assert sure.probs.max(1).mean() > bl.metrics.accuracy(sure.log_probs, labels[name]), (
        "plain LoRA is too sure"
    )

shown = {method: found[method] for method in ("plain LoRA", "temperature", "posterior")}
test_labels = {name: labels[name] for name in domains}
display(bl.plots.reliability(shown, test_labels))
print(bl.plots.RELIABILITY_CAPTION)

# %% [markdown]
# Intervals of two methods overlap even where one is better on nearly every row. So pairs are compared on the same rows, resampled together.

# %%
verdicts, lines = {}, []
for first, second in (
    ("temperature", "plain LoRA"),
    ("posterior", "plain LoRA"),
    ("posterior", "temperature"),
    ("posterior", "stopped early"),
    ("posterior", "untouched"),
):
    for name in domains:
        one, two = found[first][name], found[second][name]
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
# Under a posterior the log-odds $\eta$ of a row have a mean $\mu(x)$ and a spread $s(x)$. For Gaussian ones, MacKay's approximation
#
# $$\int \frac{\mathcal N(\eta; \mu, s^2)}{1 + e^{-\eta}}\, d\eta \approx \frac{1}{1 + e^{-\mu / T(x)}}, \qquad
# T(x) = \sqrt{1 + \pi s(x)^2 / 8},$$
#
# says what averaging does: it divides the log-odds by a temperature that **depends on the row**. One temperature from validation rows cannot
# grow where the text is strange. $T(x)$ can, if $s(x)$ does. Whether it does is a question for the draws.


# %%
def row_temperature(prediction):
    """T(x) of every row, and the probability of class 1 that it implies."""
    log_odds = prediction.draw_log_probs[:, :, 1] - prediction.draw_log_probs[:, :, 0]
    each = np.sqrt(1 + np.pi * log_odds.var(0) / 8)
    return each, 1 / (1 + np.exp(-log_odds.mean(0) / each))


each, error = {}, {}
for name in domains:
    each[name], implied = row_temperature(found["posterior"][name])
    error[name] = np.abs(implied - found["posterior"][name].probs[:, 1]).max()
    assert error[name] < 0.05, "the log-odds are near enough to Gaussian for the reading above"

panels, figure, _ = make_axes(None, 2, width=4.8, height=2.9, columns=2)
together = np.concatenate(list(each.values()))
edges = np.linspace(together.min(), together.max(), 25)
for (name, values), colour in zip(each.items(), COLOURS, strict=False):
    panels[0].hist(values, edges, density=True, histtype="step", linewidth=1.5, label=name, color=colour)
panels[0].set(xlabel="$T(x)$ of the posterior", ylabel="density")
panels[0].legend(fontsize=8)
for name, colour in ((domains[0], BLUE), (domains[-1], ORANGE)):
    odds = found["posterior"][name].draw_log_probs
    mean = (odds[:, :, 1] - odds[:, :, 0]).mean(0)
    panels[1].plot(np.abs(mean), each[name], "o", color=colour, markersize=3, alpha=0.6, label=name)
panels[1].set(xlabel="size of the mean log-odds, $|\\mu(x)|$", ylabel="$T(x)$")
panels[1].legend(fontsize=8)
caption(
    figure,
    "The temperature that averaging over the posterior amounts to, row by row. Left, by domain; right, against the mean log-odds in "
    "domain (blue) and out of domain (orange).",
)
figure

# %%
averaging = {}
for name in domains:
    log_odds = (
        found["posterior"][name].draw_log_probs[:, :, 1] - found["posterior"][name].draw_log_probs[:, :, 0]
    )
    plug_in = 1 / (1 + np.exp(-log_odds.mean(0)))
    averaging[name] = np.abs(plug_in - found["posterior"][name].probs[:, 1]).mean()
print(
    f"The approximation is off by at most {max(error.values()):.4f} of probability. Median T(x): "
    + ", ".join(f"{np.median(values):.3f} on {name}" for name, values in each.items())
    + f"; the one temperature of plain LoRA is {temperature:.2f}.\nAveraging moves probabilities, against those of the mean log-odds, by "
    + ", ".join(f"{size:.4f} on {name}" for name, size in averaging.items())
    + ", on average."
)

# %% [markdown]
# ## Who is a stranger?

# %%
bl.plots.domains({name: found["posterior"][name] for name in domains})

# %%
areas = {}
for name in domains[1:]:
    for method, what in (
        ("plain LoRA", "entropy"),
        ("posterior", "entropy"),
        ("posterior", "mutual_information"),
    ):
        inside, outside = (getattr(found[method][at], what) for at in (domains[0], name))
        areas[name, method, what] = separation(inside, outside)
lines = tuple(
    (name, method, what.replace("_", " "), f"{area:.2f}") for (name, method, what), area in areas.items()
)
display(
    Table(
        f"Probability that a row of the domain is in more doubt than one of {domains[0]}",
        ("rows", "method", "doubt", "AUC"),
        lines,
    )
)

# %% [markdown]
# ## Refusing to answer
#
# Answer the share of rows with the least doubt. Here a temperature can do **nothing**: with two classes it moves all probabilities
# towards one half and keeps their order, as is asserted below. Where its curve is not that of plain LoRA, the latter has rows whose confidence
# has been *rounded to one* and which it cannot tell apart any more. A posterior has a temperature for each row, and so another order.

# %%
bl.plots.risk_coverage(jax.random.key(0), shown, test_labels)

# %%
curves = {
    (method, name): bl.selective.risk_coverage(jax.random.key(0), found[method][name], labels[name])
    for method in found
    for name in domains
}
by_information = {
    name: bl.selective.risk_coverage(
        jax.random.key(0), found["posterior"][name], labels[name], by="mutual_information"
    )
    for name in domains
}
lines, certain = [], {}
for name in domains:
    gain = bl.metrics.paired_difference(
        jax.random.key(0), bl.metrics.aurc, found["posterior"][name], found["plain LoRA"][name], labels[name]
    )
    columns = (
        str(curves[method, name].aurc) for method in ("untouched", "plain LoRA", "temperature", "posterior")
    )
    lines.append((name, *columns, str(by_information[name].aurc), str(gain)))
    # The order of the rows by plain LoRA's log-odds, in which rounding has not made rows alike, is that of the temperature.
    log_probs = found["plain LoRA"][name].log_probs
    order = np.argsort(np.abs(log_probs[:, 1] - log_probs[:, 0]))
    assert (np.diff(found["temperature"][name].probs.max(1)[order]) > -1e-9).all()
    assert (found["temperature"][name].log_probs.argmax(1) == log_probs.argmax(1)).all()
    certain[name] = (log_probs.max(1) == 0).sum()
header = (
    "rows",
    "untouched",
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
# What would be predicted had the text ended here? The shade is the mutual information, on one scale for both sentences; they were
# written for this page and are no rows of any table.

# %%
sentences = ("A dull first hour, but the ending is a triumph.", "The central bank left its rates unchanged.")
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
    ("posterior", "untouched"),
):
    for verdict in ("better", "worse", "undecided"):
        where = [name for name in domains if verdicts[first, second, name] == verdict]
        if where:
            print(f"By NLL, {first} against {second}: {verdict} on {', '.join(where)}.")
inside = np.median(each[domains[0]])
print(
    f"Median T(x) against that on {domains[0]}: "
    + ", ".join(f"{np.median(each[name]) / inside - 1:+.1%} on {name}" for name in domains[1:])
    + "."
)
gains = [
    name for name in domains if curves["posterior", name].aurc.value < curves["plain LoRA", name].aurc.value
]
print(
    f"The posterior refuses better than plain LoRA, by the value of AURC alone, on: {', '.join(gains) or 'nothing'}."
)

# %% [markdown]
# The lines above are the answer for these rows. What holds whatever they say:
#
# - Plain LoRA that runs to the end of its likelihood is far too sure, in domain as well: the rows are few, and they can be separated.
#   Anything chosen on validation rows mends most of that, a single number included. Any claim for a posterior has to be made against
#   *that*, and on the same rows.
# - A temperature mends confidence and nothing else: the same classes, the same order of the rows. Accuracy and refusal need another fit.
# - A posterior does two things: its prior keeps the update small, and averaging divides by $T(x)$. Where $T(x)$ is near one, as
#   printed above, all that sets it apart from plain LoRA is the prior, and it is near the untouched model. Nor does anything promise that
#   $T(x)$ grows out of domain: the spread of $(b_1 - b_0)\, a^\top h$ grows with the part of $h$ that the rows left open.
# - The untouched model is a method too, and has to be in the table: a posterior that the rows hardly move is close to it.
#
# **Not** to conclude: that one of these methods is better calibrated in general. The adapters are on the head alone, there is one seed,
# one base, one template, and VADER's four domains are English sentences, all of them. ECE on so few rows is biased upwards by amounts of
# the size of the differences above, and mutual information of a mean field is too small.
