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
# # A case from end to end: medical questions, and when to ask a person
#
# **Question.** A model answers multiple-choice questions of medicine. A wrong answer has a cost, and a person who answers instead has a
# price. Which questions should the model answer, and what does the posterior add to that decision?
#
# **At the end you have** a posterior over adapters from a few dozen questions, a check of its calibration, sets of answers with a stated
# coverage, a rule with a bounded error rate, decisions with a price of review, and a monitor that notices when questions of another
# source arrive. You also have the answer for this model, SmolLM2-135M, whose knowledge of medicine is small. The numbers below say how
# small.
#
# **Model.** As in `08_multiple_choice`: the score of a choice is the log-likelihood of its tokens after the question, divided by their
# number and by one temperature $T$. A core prior on the values of the last layer gives, to first order,
#
# $$p(y = c \mid x, u) \propto \exp\{s_c(x) + \sigma\, \phi_c(x)^\top u\}, \qquad u \sim \mathcal N(0, I),$$
#
# and the prediction is the mean over the posterior of $u$.

# %%
# %matplotlib inline
import os
from dataclasses import replace

import jax
import numpy as np
import optax
from datasets import disable_progress_bars
from IPython.display import display

import bnlora as bl
from bnlora._util.display import Table
from bnlora.data.assets import fetch_smollm2
from bnlora.data.medical import held_out_questions
from bnlora.infer.approximate import tempered
from bnlora.plots.base import COLOURS, GREY, caption, legend_above, make_axes

disable_progress_bars()
fast = bool(os.environ.get("BNLORA_FAST"))
sizes = {"fit": 40, "choose": 40, "calibrate": 85, "test": 85}
if fast:
    sizes = {"fit": 4, "choose": 4, "calibrate": 30, "test": 8}
num_new, weekly, longest = (8, 4, 16) if fast else (85, 17, 24)
size, num_steps, num_epochs, num_draws = (2, 2, 1, 20) if fast else (16, 100, 4, 200)

# %% [markdown]
# ## The questions
#
# MedMCQA (Pal et al. 2022): questions of entrance examinations for medical schools in India, with four choices. Only short questions, because they
# run faster. They are split at random into four parts, and each part has one purpose:
#
# | part | what it is for |
# |---|---|
# | fit | the posterior |
# | choose | the temperature, before the fit |
# | calibrate | sets, error rate, and the reference of the monitor |
# | test | every number that is reported |
#
# Questions of another source come at the end: SciQ (Welbl et al. 2017), science at the level of schools.

# %%
base = bl.load(fetch_smollm2())


def short_questions(name, count):
    """Questions of a set in a random order, of few tokens with each of their choices."""
    rows = held_out_questions(name).shuffle(seed=0)

    def is_short(row):
        texts = [row["context"] + choice for choice in row["choices"]]
        return max(map(len, base.tokenizer(texts)["input_ids"])) <= longest

    return rows.filter(is_short).select(range(count))


medical, science = short_questions("medmcqa", sum(sizes.values())), short_questions("sciq", num_new)
ends = np.cumsum(list(sizes.values()))
spans = zip(sizes, ends - list(sizes.values()), ends, strict=True)
questions = {name: medical.select(range(begin, end)) for name, begin, end in spans} | {"science": science}
columns = {"context": "context", "choices": "choices", "label": "gold", "normalise": "tokens"}
data = bl.multiple_choice(questions, base, **columns)
print(data)
for name in ("test", "science"):
    row = questions[name][0]
    print(f"{row['context']}{row['choices'][row['gold']]}   (of {row['choices']})")

# %% [markdown]
# ## What the untouched model knows

# %%
likelihood = bl.likelihoods.Completions(4)
sites = bl.select(base, ["q_proj", "v_proj"], rank=4, layers=slice(-1, None))
lora = bl.Classifier(base, sites, bl.priors.point(), likelihood=likelihood)
cached = {name: bl.cache_prefix(lora, data[name]) for name in questions}
labels = {name: np.asarray(rows.labels) for name, rows in cached.items()}
untouched = bl.PointPosterior.untouched(lora)
key = jax.random.key(0)  # of bootstrap samples
raw = {name: bl.predict(key, untouched, cached[name], num_draws=1) for name in questions if name != "fit"}
for name in ("choose", "calibrate", "test", "science"):
    metrics = {"accuracy": bl.metrics.accuracy, "nll": bl.metrics.nll}
    summary = bl.metrics.summary(key, raw[name], labels[name], metrics=metrics)
    print(f"{name}: accuracy {summary['accuracy']}, NLL {summary['nll']}")
print(f"Chance: accuracy {1 / 4}, NLL {np.log(4):.3f}")

# %% [markdown]
# An interval of the accuracy that contains chance means that these questions do not show any knowledge. An NLL above that of chance
# means that the probabilities are worse than no model at all: the scores are too far apart for what they are worth.
#
# One temperature repairs that. It is chosen on its own part, over a grid that ends where all choices are nearly equal.

# %%
grid = np.geomspace(0.5, 20, 60)


def best_temperature(prediction, truth):
    """The temperature of the grid with the smallest NLL."""
    return min(grid, key=lambda T: bl.metrics.nll(tempered(prediction, T).log_probs, truth))


T = best_temperature(raw["choose"], labels["choose"])
before, after = (
    bl.metrics.nll(prediction.log_probs, labels["choose"])
    for prediction in (raw["choose"], tempered(raw["choose"], T))
)
end = ", the end of the grid" if T == grid[-1] else ""
print(f"T = {T:.2f}{end}: NLL {after:.3f} instead of {before:.3f}, on the part on which it was chosen.")


def with_temperature(rows):
    """The rows with T in their divisor, so that all fits use it."""
    return replace(rows, choices=replace(rows.choices, size=T * rows.choices.size))


ready = {name: with_temperature(rows) for name, rows in cached.items()}

# %% [markdown]
# ## The fits
#
# The posterior of `bl.fit_core`, and an ordinary adapter for comparison: maximum likelihood by Adam on the same questions, one point.
# Both use the temperature from above. `base, T = 1` keeps the scores as they are and shows what would happen without it.

# %%
k_core, k_lora, k_predict, k_monitor = jax.random.split(jax.random.key(1), 4)
core = bl.fit_core(
    k_core,
    base,
    ready["fit"],
    likelihood=likelihood,
    size={"v_proj": size},
    layers=slice(-1, None),
    num_steps=num_steps,
)
gain = core.gaussian.log_evidence - core.scales.base
print(core.scales)
print(f"Evidence minus the log-likelihood of the untouched base: {gain:+.2f} nats")


def no_guide(*_):
    """An ordinary adapter has no random variables, so its guide is empty."""


batch_size = min(8, sizes["fit"])
ordinary = bl.fit(
    k_lora,
    lora,
    no_guide,
    ready["fit"],
    optax.adam(2e-3),
    num_steps=num_epochs * sizes["fit"] // batch_size,
    batch_size=batch_size,
)

# %% [markdown]
# A gain of less than a nat or two says that the questions hardly prefer the fit to the untouched base.
#
# ## Is it calibrated?

# %%
parts = ("calibrate", "test", "science")
predictions = {
    "base, T = 1": {part: raw[part] for part in parts},
    "base": {part: tempered(raw[part], T) for part in parts},
    "adapter": {part: bl.predict(k_predict, ordinary, ready[part], num_draws=1) for part in parts},
    "posterior": {
        part: bl.predict(k_predict, core, bl.cache_prefix(core.model, ready[part]), num_draws=num_draws)
        for part in parts
    },
}

metrics = {name: bl.metrics.METRICS[name] for name in ("accuracy", "nll", "ece")}
lines = []
for method, by_part in predictions.items():
    summary = bl.metrics.summary(key, by_part["test"], labels["test"], metrics=metrics)
    null = bl.metrics.null_ece(by_part["test"].log_probs)
    lines.append((method, *map(str, summary.values()), f"{null:.3f}"))
header = ("method", "accuracy", "NLL", "ECE", "ECE if calibrated")
display(Table(f"{sizes['test']} test questions, 95 % bootstrap intervals; nats", header, tuple(lines)))
panels = {"test": {method: by_part["test"] for method, by_part in predictions.items()}}
display(bl.plots.reliability(panels, dict.fromkeys(predictions, labels["test"])))
print(bl.plots.RELIABILITY_CAPTION)

# %% [markdown]
# Look at where the grey bars are: that is the confidence. If they all lie near one quarter, the model says itself that it does not know.
# Points below the dashed line say that it claims more than it keeps.
#
# ## Sets of answers with a stated coverage
#
# A set contains the right choice with probability at least 0.9, whatever the model. What a poor model costs is the size of the sets.

# %%
posterior = predictions["posterior"]
rule = bl.conformal.calibrate_sets(posterior["calibrate"], labels["calibrate"], level=0.9)
report = rule.report(posterior["test"], labels["test"])
display(*report.overview[:1])
low, high = bl.conformal.coverage_range(sizes["calibrate"], level=0.9)
print(
    f"With {sizes['calibrate']} calibration rows the coverage lies in {low:.3f} to {high:.3f} in 95 % of cases."
)
counts = ", ".join(f"{number} choices: {count}" for number, count in enumerate(report.sizes) if count)
print(f"Sets by size: {counts}")

# %% [markdown]
# A set of all four choices is an honest way to say nothing.
#
# ## Answers with a bounded error rate
#
# The curve shows the error rate if only the questions of least doubt are answered. The further it falls to the left, the better the model
# knows what it knows. A flat curve means that its doubt is no guide.

# %%
bl.plots.risk_coverage(key, predictions, {"test": labels["test"]})

# %%
lines = []
for max_risk in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7):
    rule = bl.risk_control.control_risk(posterior["calibrate"], labels["calibrate"], max_risk=max_risk)
    answered = rule.answers(posterior["test"])
    wrong = (posterior["test"].probs.argmax(1) != labels["test"])[answered]
    share = f"{wrong.mean():.2f}" if len(wrong) else "no answer"
    lines.append((f"{max_risk:g}", f"{answered.mean():.2f}", share))
header = ("largest share of wrong answers", "answered", "wrong among them")
display(Table("Rules that hold with probability 0.95", header, tuple(lines)))
strict = bl.risk_control.control_risk(posterior["calibrate"], labels["calibrate"], max_risk=0.1)
print(
    strict.caution or f"With at most 0.1 wrong: {strict.coverage:.2f} of the calibration questions answered"
)

# %% [markdown]
# ## Decisions with a price
#
# A wrong answer costs 1, a right one nothing, and a person who answers costs a price. `bl.decisions.decide` takes the action of least
# expected cost: the most probable choice, or the person. `posterior_value` compares the decisions of two predictions on the same
# questions.

# %%
price = 0.3
costs = bl.decisions.zero_one(4, review=price)
display(*costs.overview)
lines = []
for method, by_part in predictions.items():
    decisions = bl.decisions.decide(by_part["test"], costs)
    reviewed = (decisions.actions == 4).mean()
    realised = bl.decisions.realised_cost(key, by_part["test"], labels["test"], costs)
    lines.append((method, f"{reviewed:.2f}", f"{decisions.expected.mean():.3f}", str(realised)))
error = (posterior["test"].probs.argmax(1) != labels["test"]).mean()
lines += [("a person for all", "1.00", f"{price:.3f}", f"{price:.3f}")]
lines += [("the posterior answers all", "0.00", "", f"{error:.3f}")]
header = ("decisions of", "to the person", "expected cost", "realised cost")
Table(f"{sizes['test']} test questions, a review costs {price:g}", header, tuple(lines))

# %% [markdown]
# The expected cost is the opinion of the method, the realised cost is what the labels say. A method whose opinion is much lower than the
# truth is overconfident, and pays for it here. The price decides too, so look at all prices:

# %%
prices = np.linspace(0, 0.75, 31)
(panel,), figure, _ = make_axes(None, 1, width=5.5, height=3.0)
for (method, by_part), colour in zip(predictions.items(), COLOURS, strict=False):
    realised = [
        costs_at.matrix[labels["test"], bl.decisions.decide(by_part["test"], costs_at).actions].mean()
        for costs_at in (bl.decisions.zero_one(4, review=price_at) for price_at in prices)
    ]
    panel.plot(prices, realised, color=colour, label=method)
panel.plot(prices, prices, color=GREY, linewidth=1, linestyle="--")
panel.set(xlabel="price of a person", ylabel="realised cost per question", ylim=(0, None))
legend_above(panel, ncols=2)
caption(
    figure,
    f"Realised cost on {sizes['test']} test questions by the price of a review. Dashed: a person for all. A curve above the dashed "
    "line means that the model's own answers cost more than a person.",
)
figure

# %%
values = {
    method: bl.decisions.posterior_value(
        key, posterior["test"], predictions[method]["test"], labels["test"], costs
    )
    for method in ("base, T = 1", "base", "adapter")
}
for method, value in values.items():
    verdict = "pays" if value.saving.low > 0 else "costs" if value.saving.high < 0 else "undecided"
    print(
        f"posterior instead of {method}: saves {value.saving} per question, other action in {value.changed:.2f} of them "
        f"({verdict})"
    )

# %% [markdown]
# Where no action differs, the posterior has nothing to save. If it saves only against `T = 1`, one number from held-out questions has the
# same value as the posterior: both say that the model does not know, and the decision is the person's.
#
# ## Questions of another source arrive
#
# The monitor starts with the calibration part as its reference. Each week brings some questions, first medical ones (the test part), then
# science. Labels come for all of them. As in `11_monitoring`, it may be read after every week.

# %%
monitor = bl.monitor.Monitor.start(k_monitor, posterior["calibrate"], labels["calibrate"])
week = 0
for part in ("test", "science"):
    for begin in range(0, len(labels[part]), weekly):
        week, rows = week + 1, slice(begin, begin + weekly)
        monitor = monitor.update(posterior[part][rows], labels[part][rows], time=f"week {week}, {part}")
for alert in monitor.alerts:
    print(alert)
print(monitor.recommendation)
print(f"science from row {len(labels['test']) + 1} on")
bl.plots.monitoring(monitor)

# %%
bl.plots.domains({part: posterior[part] for part in ("test", "science")})

# %% [markdown]
# The first picture shows which test noticed and when, and the second why: entropy and mutual information of the two sources. A shift is not a
# harm by itself. What the same rules do on the new questions:

# %%
old = bl.conformal.calibrate_sets(posterior["calibrate"], labels["calibrate"], level=0.9)
for part in ("test", "science"):
    sets = old.report(posterior[part], labels[part])
    hits = bl.metrics.summary(key, posterior[part], labels[part], metrics={"accuracy": bl.metrics.accuracy})
    decisions = bl.decisions.decide(posterior[part], costs)
    realised = bl.decisions.realised_cost(key, posterior[part], labels[part], costs)
    print(
        f"{part}: accuracy {hits['accuracy']}, coverage of the sets {sets.coverage}, mean size {sets.mean_size:.2f}, to the person "
        f"{(decisions.actions == 4).mean():.2f}, realised cost {realised}"
    )

# %% [markdown]
# ## A new temperature for the new source
#
# The temperature of the medical questions is not that of the new ones. Half of these choose a new one, and the other half shows what it
# changes, at two prices. The posterior stays as it is.

# %%
middle = num_new // 2
first, second = posterior["science"][:middle], posterior["science"][middle:]
truth = labels["science"][middle:]
fresh = best_temperature(first, labels["science"][:middle])
for price_at in (price, 0.5):
    at = bl.decisions.zero_one(4, review=price_at)
    for name, prediction in {
        "as it was": second,
        f"temperature {fresh:.2f}": tempered(second, fresh),
    }.items():
        reviewed = (bl.decisions.decide(prediction, at).actions == 4).mean()
        realised = bl.decisions.realised_cost(key, prediction, truth, at)
        print(f"price {price_at:g}, {name}: to the person {reviewed:.2f}, realised cost {realised}")

# %% [markdown]
# ## What to conclude, and what not

# %%
accuracy = bl.metrics.summary(
    key, posterior["test"], labels["test"], metrics={"accuracy": bl.metrics.accuracy}
)["accuracy"]
chance = "above chance" if accuracy.low > 0.25 else "not distinguishable from chance"
reviewed = (bl.decisions.decide(posterior["test"], costs).actions == 4).mean()
print(f"Accuracy on medical test questions {accuracy}: {chance}.")
print(f"At a price of {price:g} the posterior sends {reviewed:.0%} of them to the person.")
raised = ", ".join(alert.test for alert in monitor.alerts) or "none"
print(f"Alarms of the monitor: {raised}.")

# %% [markdown]
# - A calibrated posterior of a model that knows little says so, and the decision follows: the person answers, at the price of a person.
#   This is what such a tool is for. It does not make the model better.
# - Sets, error rates and decisions keep their promises for any model, good or bad. A poor model pays in size of sets, in unanswered
#   questions and in reviews.
# - Compare a posterior with a point that has a temperature, not only with a point. Much of what overconfidence costs can be had back by
#   one number.
# - The guarantees are for questions like those of the calibration part. The monitor says when that ends.
#
# **Not** shown: a larger model; questions longer than these; costs that depend on the question; persons, who also make errors; and any
# use with patients. There is one split and one seed, and the intervals are over test questions only.
