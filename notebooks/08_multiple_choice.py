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
# # Multiple choice: the likelihood of whole answers
#
# **Question.** SmolLM2-135M answers questions of primary-school science without examples. How good are its probabilities, and what does
# a posterior fitted to a few dozen questions add?
#
# **Model.** Question $x$ has the choices $c = 1, \dots, C$, with tokens $t_{c1}, \dots, t_{cJ_c}$. The score of a choice is the
# log-likelihood of its tokens after the question, divided by a number $d_c$; the answer has the softmax of the scores:
#
# $$s_c(x) = \frac{1}{d_c} \sum_{j=1}^{J_c} \log p(t_{cj} \mid x, t_{c1}, \dots, t_{c,j-1}), \qquad
# p(y = c \mid x) = \frac{\exp s_c(x)}{\sum_k \exp s_k(x)} .$$
#
# The divisor is a part of the model. Here it is $d_c = T\, |c|$: the size $|c|$ is 1 (`normalise="none"`), the number of tokens, or
# the number of characters, and $T$ is one number for all questions. Both are chosen on validation rows, before any fit.
#
# The core prior of `01_quickstart` then adds an update of the value projections of the last layer. With its entries $u \sim N(0, I)$,
# the scale $\sigma$ chosen by evidence, and $\phi_c$ the derivative of $s_c$,
#
# $$p(y = c \mid x, u) \propto \exp\{s_c(x) + \sigma\, \phi_c(x)^\top u\}.$$
#
# This is the first-order expansion of the network. The posterior is that of this expansion, not of the network.

# %%
# %matplotlib inline
import os
from dataclasses import replace

import jax
import numpy as np
import optax
from datasets import disable_progress_bars
from IPython.display import display
from numpyro import handlers
from scipy.special import log_softmax

import bnlora as bl
from bnlora._util.display import Table
from bnlora.data.assets import fetch_smollm2, vader_splits
from bnlora.data.questions import distinct_questions, question_files, question_splits
from bnlora.infer.approximate import fit_temperature, tempered
from bnlora.plots.base import BLUE, GREY, ORANGE, caption, make_axes

disable_progress_bars()
fast = bool(os.environ.get("BNLORA_FAST"))
num_train, num_validation, num_test, size = (4, 4, 4, 2) if fast else (48, 40, 64, 16)
num_steps, num_epochs, num_draws = (2, 1, 20) if fast else (100, 4, 200)
longest = 60 if fast else 75

# %% [markdown]
# ## The questions
#
# ARC-Easy (Clark et al. 2018), without the solved questions that its package puts in front. Some training questions are also test
# questions; these are left out. Only short questions with four short choices are used, because they run faster. The numbers below are
# therefore not those of the whole set.

# %%
base = bl.load(fetch_smollm2())
whole = {file: len(numbers) for file, numbers in distinct_questions("arc_easy").items()}
print("Questions without repeats: " + ", ".join(f"{file} {count:,}" for file, count in whole.items()))


def is_short(row):
    """Whether a question has four short choices; in the fast mode all splits then share their programs."""
    if len(row["choices"]) != 4 or len(row["context"]) > longest or max(map(len, row["choices"])) > 30:
        return False
    return not fast or max(map(len, base.tokenizer(row["choices"])["input_ids"])) == 2


short = {name: rows.filter(is_short) for name, rows in question_splits("arc_easy", seed=0, **whole).items()}
sizes = {"train": num_train, "validation": num_validation, "test": num_test}
questions = {name: short[name].select(range(count)) for name, count in sizes.items()}
example = questions["train"][0]
print(f"{example['context']}\nchoices {example['choices']}, right: {example['choices'][example['gold']]!r}")

# %% [markdown]
# ## What to divide by
#
# The base runs once on every row. All divisors use the same log-likelihoods. A sum over tokens favours short choices, and it is
# overconfident: errors of all tokens add up, while only one choice is right.

# %%
columns = {"context": "context", "choices": "choices", "label": "gold"}
normalisations = ("none", "tokens", "characters")
data = {name: bl.multiple_choice(questions, base, **columns, normalise=name) for name in normalisations}
likelihood = bl.likelihoods.Completions(4)
sites = bl.select(base, ["q_proj", "v_proj"], rank=4, layers=slice(-1, None))
lora = bl.Classifier(base, sites, bl.priors.point(), likelihood=likelihood)
rows = {name: bl.cache_prefix(lora, data["none"][name]) for name in sizes}
labels = {name: np.asarray(batch.labels) for name, batch in rows.items()}

untouched = jax.tree.map(np.zeros_like, handlers.seed(lora.prior, jax.random.key(0))())
run = jax.jit(lora.logits)
parts = {name: [batch[slice(i, i + 16)] for i in range(0, len(batch), 16)] for name, batch in rows.items()}
sums = {
    name: np.concatenate([np.asarray(run(base.weights, untouched, part)) for part in pieces])
    for name, pieces in parts.items()
}


def divided(normalise, name, temperature=1.0):
    """Prediction of the base with a divisor."""
    counts = np.asarray(data[normalise][name].choices.size)
    return bl.Prediction(log_softmax(sums[name] / (temperature * counts), axis=1)[None])


lines, losses, temperatures = [], {}, {}
for normalise in normalisations:
    prediction = divided(normalise, "validation")
    temperature = temperatures[normalise] = fit_temperature(prediction, labels["validation"])
    at_best = divided(normalise, "validation", temperature)
    losses[normalise] = bl.metrics.nll(at_best, labels["validation"])
    raw = bl.metrics.nll(prediction, labels["validation"])
    assert losses[normalise] <= raw + 1e-6
    summary = bl.metrics.summary(
        jax.random.key(0), prediction, labels["validation"], metrics={"accuracy": bl.metrics.accuracy}
    )
    values = (str(summary["accuracy"]), f"{raw:.3f}", f"{temperature:.2f}", f"{losses[normalise]:.3f}")
    lines.append((normalise, *values))
header = ("divided by", "accuracy", "NLL at T = 1", "best T", "NLL at best T")
display(Table(f"Untouched base, {num_validation} validation rows; NLL in nats", header, tuple(lines)))
chosen = min(losses, key=losses.get)
T = temperatures[chosen]
print(f"Chosen: {chosen}, T = {T:.2f}. A uniform guess has NLL {np.log(4):.3f}.")

# %% [markdown]
# With so few validation rows the accuracies of the three differ by less than their intervals, so this is a choice and not a
# finding about the sizes. From here on all methods use the chosen divisor.


# %%
def with_divisor(name):
    """The cached rows with the chosen divisor."""
    choices = data[chosen][name].choices
    return replace(rows[name], choices=replace(choices, size=T * choices.size))


ready = {name: with_divisor(name) for name in sizes}
again = np.asarray(run(base.weights, untouched, ready["validation"][slice(0, 4)]))
np.testing.assert_allclose(
    log_softmax(again, axis=1), divided(chosen, "validation", T).log_probs[:4], atol=1e-3
)

# %% [markdown]
# ## The fits
#
# *Plain LoRA* maximises the likelihood of the same rows over adapters of rank four on the queries and values of the last layer, by
# Adam, for a fixed number of epochs.

# %%
k_core, k_lora, k_predict = jax.random.split(jax.random.key(0), 3)
core = bl.fit_core(
    k_core,
    base,
    ready["train"],
    likelihood=likelihood,
    size={"v_proj": size},
    layers=slice(-1, None),
    num_steps=num_steps,
)
print(core.scales)
print("Seconds: " + ", ".join(f"{part} {seconds:.0f}" for part, seconds in core.seconds.items()))
gain = core.gaussian.log_evidence - core.scales.base
print(f"Laplace's evidence minus the log-likelihood of the untouched base: {gain:+.2f} nats")


# %%
def no_guide(*_):
    """Plain LoRA has no random variables, so its guide is empty."""


batch_size = min(8, num_train)
plain = bl.fit(
    k_lora,
    lora,
    no_guide,
    ready["train"],
    optax.adam(2e-3),
    num_steps=num_epochs * num_train // batch_size,
    batch_size=batch_size,
)
print(plain)

# %% [markdown]
# ## Predictions

# %%
predictions = {"base, T = 1": {name: divided(chosen, name) for name in ("validation", "test")}}
predictions["base"] = {name: divided(chosen, name, T) for name in ("validation", "test")}
features = {name: bl.cache_prefix(core.model, ready[name]) for name in ("validation", "test")}
for name, fit, fitted_rows, draws in (
    ("plain LoRA", plain, ready, 1),
    ("posterior", core, features, num_draws),
):
    predictions[name] = {
        part: bl.predict(k_predict, fit, fitted_rows[part], num_draws=draws)
        for part in ("validation", "test")
    }
after = fit_temperature(predictions["plain LoRA"]["validation"], labels["validation"])
predictions["LoRA + T"] = {
    name: tempered(prediction, after) for name, prediction in predictions["plain LoRA"].items()
}

metrics = {name: bl.metrics.METRICS[name] for name in ("accuracy", "nll", "ece")}
lines = []
for method, by_part in predictions.items():
    prediction = by_part["test"]
    np.testing.assert_allclose(prediction.probs.sum(1), 1.0, rtol=1e-5)
    summary = bl.metrics.summary(jax.random.key(0), prediction, labels["test"], metrics=metrics)
    lines.append((method, *map(str, summary.values()), f"{bl.metrics.null_ece(prediction.log_probs):.3f}"))
header = ("method", "accuracy", "NLL", "ECE", "null ECE")
display(Table(f"{num_test} test rows, 95 % bootstrap intervals; nats", header, tuple(lines)))

# %% [markdown]
# **Null ECE** is the ECE for labels drawn from the prediction itself. An ECE near it is no evidence of miscalibration. Compare methods
# on the same rows, resampled together:

# %%
verdicts, lines = {}, []
for first, second in (
    ("base", "base, T = 1"),
    ("posterior", "base"),
    ("posterior", "plain LoRA"),
    ("posterior", "LoRA + T"),
    ("plain LoRA", "base"),
):
    one, two = predictions[first]["test"], predictions[second]["test"]
    nll, accuracy = (
        bl.metrics.paired_difference(jax.random.key(0), metric, one, two, labels["test"])
        for metric in (bl.metrics.nll, bl.metrics.accuracy)
    )
    verdict = "better" if nll.high < 0 else "worse" if nll.low > 0 else "undecided"
    verdicts[first, second] = verdict
    lines.append((f"{first} - {second}", str(nll), str(accuracy), verdict))
header = ("methods", "NLL", "accuracy", "first by NLL")
display(
    Table("Paired differences with 95 % intervals; NLL below zero: the first is better", header, tuple(lines))
)
if not fast:
    assert verdicts["base", "base, T = 1"] == "better", "the divisor must matter on test rows"

# %%
shown = ("base, T = 1", "base", "plain LoRA", "posterior")
panels = {f"{num_test} test rows": {name: predictions[name]["test"] for name in shown}}
display(bl.plots.reliability(panels, dict.fromkeys(shown, labels["test"])))
print(bl.plots.RELIABILITY_CAPTION)

# %% [markdown]
# ## What the posterior is unsure of
#
# The entropy of the answer is the sum of the mean entropy within a draw (aleatoric) and the mutual information of answer and adapters
# (epistemic). More training rows can reduce only the second.

# %%
prediction = predictions["posterior"]["test"]
within = -(np.exp(prediction.draw_log_probs) * prediction.draw_log_probs).sum(2).mean(0)
np.testing.assert_allclose(prediction.entropy, within + prediction.mutual_information, atol=1e-5)
print(
    f"Mean over test rows, in nats: total {prediction.entropy.mean():.3f} of at most {np.log(4):.3f}, aleatoric "
    f"{within.mean():.3f}, epistemic {prediction.mutual_information.mean():.4f}."
)

order = np.argsort(-prediction.mutual_information)[:3]
spread = np.exp(prediction.draw_log_probs).std(0)
lines = []
for row in order:
    question = questions["test"][int(row)]
    lines.append((question["context"].split("\n")[0].removeprefix("Question: "), "", "", ""))
    for c, choice in enumerate(question["choices"]):
        mark = "right" if c == question["gold"] else ""
        lines.append(("-" + choice, f"{prediction.probs[row, c]:.2f}", f"{spread[row, c]:.3f}", mark))
header = ("question and choices", "probability", "sd over draws", "")
display(Table("The test questions with the largest epistemic uncertainty", header, tuple(lines)))

# %%
panels, figure, _ = make_axes(None, 2, width=4.4, height=2.9, columns=2)
right = prediction.probs.argmax(1) == labels["test"]
for mask, colour, name in ((right, BLUE, "right"), (~right, ORANGE, "wrong")):
    panels[0].plot(
        within[mask],
        prediction.mutual_information[mask],
        "o",
        color=colour,
        markersize=4,
        alpha=0.7,
        label=name,
    )
panels[0].set(xlabel="aleatoric (nats)", ylabel="epistemic (nats)")
panels[0].legend(fontsize=8)
before = predictions["base"]["test"].probs[np.arange(num_test), labels["test"]]
now = prediction.probs[np.arange(num_test), labels["test"]]
panels[1].plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
panels[1].plot(before, now, "o", color=BLUE, markersize=4, alpha=0.7)
panels[1].set(xlabel="base: probability of the right choice", ylabel="posterior")
caption(
    figure,
    "Test questions. Left: epistemic against aleatoric uncertainty of the posterior, by whether its most probable choice is right. "
    "Right: probability of the right choice after the fit against that before it; above the dashed line the fit helps.",
)
figure

# %% [markdown]
# ## By letter
#
# The same questions with the choices in the text and a letter as the answer: one token, and one pass for each question. Models of this
# size know what the letters stand for hardly better than chance.

# %%
letters = question_files("arc_easy", form="letters")["test"]
place = {name: row for row, name in enumerate(letters["id"])}
letters = letters.select([place[name] for name in questions["test"]["id"]])
assert letters["gold"][:] == questions["test"]["gold"][:]
options = {"text": "context", "label": "gold", "template": "{text}", "labels_are": "integers"}
by_letter = bl.text_classification(
    {"test": letters}, base.tokenizer, **options, words=[" A", " B", " C", " D"]
)


def untouched_words(data, name):
    """Prediction of the base for classes that are words."""
    head = bl.select(base, ["lm_head"], rank=1)
    model = bl.Classifier(base, head, bl.priors.point(), label_ids=data.label_ids)
    cached = bl.cache_prefix(model, data[name])
    zeros = jax.tree.map(np.zeros_like, handlers.seed(model.prior, jax.random.key(0))())
    return bl.Prediction(log_softmax(np.asarray(model.logits(base.weights, zeros, cached)), axis=1)[None])


answered = untouched_words(by_letter, "test")
accuracy = {
    name: bl.metrics.summary(
        jax.random.key(0), which, labels["test"], metrics={"accuracy": bl.metrics.accuracy}
    )["accuracy"]
    for name, which in (("letters", answered), ("completions", predictions["base"]["test"]))
}
share = np.bincount(answered.probs.argmax(1), minlength=4) / num_test
print(f"Accuracy by letter {accuracy['letters']}, by completion {accuracy['completions']}; chance is 0.25.")
print("Share of each letter among the answers: " + ", ".join(f"{x:.2f}" for x in share))
difference = bl.metrics.paired_difference(
    jax.random.key(0), bl.metrics.accuracy, answered, predictions["base"]["test"], labels["test"]
)
print(f"By letter minus by completion: {difference}")

# %% [markdown]
# ## Classes of several tokens
#
# Classes that are the same in every row are a list of choices in place of a column. Here they are two phrases about a film review.

# %%
count = num_validation
reviews = vader_splits(seed=0, train=count, validation=1, test=1)["train"]
reviews = reviews.filter(lambda row: len(row["text"]) <= 2 * longest)
reviews = reviews.add_column("context", [f"Review: {text}\nThe film is" for text in reviews["text"]])
phrases = [" not worth watching", " well worth watching"]
film = bl.multiple_choice(reviews, base, context="context", choices=phrases, label="label")
two = bl.Classifier(base, sites, bl.priors.point(), likelihood=bl.likelihoods.Completions(2))
cached = bl.cache_prefix(two, film.train)
scores = np.asarray(jax.jit(two.logits)(base.weights, untouched, cached))
by_phrase = bl.Prediction(log_softmax(scores, axis=1)[None])
truth = np.asarray(film.train.labels)
summary = bl.metrics.summary(jax.random.key(0), by_phrase, truth, metrics={"accuracy": bl.metrics.accuracy})
print(f"{len(truth)} reviews, accuracy {summary['accuracy']}; share of positive reviews {truth.mean():.2f}")
print(f"Mean probability of {phrases[1]!r}: {by_phrase.probs[:, 1].mean():.2f}")

# %% [markdown]
# ## What to conclude, and what not

# %%
for (first, second), verdict in verdicts.items():
    print(f"By NLL on {num_test} test rows, {first} compared with {second}: {verdict}.")
chance = "above" if accuracy["letters"].low > 0.25 else "not distinguishable from"
print(f"By letter the base is {chance} chance on these rows.")

# %% [markdown]
# The lines above are the result for these rows. The following points do not depend on them:
#
# - The log-likelihood of a text is not on the scale of a decision between a few texts, so the divisor matters. Choose it on validation
#   rows, give the same one to all methods, and report the base with it: otherwise any fit seems to calibrate the model.
# - The tangent model has no multiple of the scores among its directions here (`"slope"` belongs to classes that are words). A fit
#   therefore does not repair the scale of the scores.
# - A gain in evidence of less than a nat or two says that the rows hardly prefer the fit to the untouched base. Epistemic uncertainty is
#   then mostly that of the prior.
#
# **Not** to conclude: anything about ARC-Easy as a whole (these are short questions), about other seeds (there is one), or about methods
# whose difference is undecided: the interval is over test rows and leaves out the draw of the training rows. Letters at chance is a
# statement about this model, not about the form.
