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
# # Monitor a classifier over weeks
#
# **Question.** A classifier of film reviews is in use. Texts change, labels come a week late, and some labels are wrong. When does a
# monitor notice, how often does it raise a false alarm although you look every week, and what do you do after an alarm?
#
# **At the end you have** a monitor of a real stream with a planted change, one of a stream with planted label errors, a report as an HTML
# page from two CSV files, and a measurement on streams without a change: how often a weekly test raises a false alarm, and how often the
# monitor does.
#
# **Model.** Each test bets against its null hypothesis. A bet pays $L_t$ at row $t$, with $\mathbb E[L_t \mid \text{past}] \le 1$ under the
# null. The evidence $E_t$ is the capital of these bets, averaged over bets and over the rows at which they start. Ville's inequality
# then holds for all rows together, so you may look as often as you like:
#
# $$P\Bigl(\sup_t E_t \ge \tfrac 1 \alpha\Bigr) \le \alpha .$$
#
# | test | null hypothesis | needs labels |
# |---|---|---|
# | accuracy | the classifier is right at least as often as on reference rows | yes |
# | calibration | the classifier is right as often as its confidence says | yes |
# | entropy, mutual information | new rows and reference rows are exchangeable | no |

# %%
# %matplotlib inline
import base64
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import numpyro.distributions as dist
from IPython.display import IFrame, display
from scipy.stats import binomtest, mannwhitneyu

import bnlora as bl
from bnlora._util.display import Table
from bnlora.data.assets import LABELS, fetch_smollm2, vader_splits
from bnlora.infer.approximate import fit_temperature, tempered
from bnlora.plots.base import BLUE, COLOURS, GREY, ORANGE, caption, legend_above, make_axes

fast = bool(os.environ.get("BNLORA_FAST"))
num_streams, num_shifted = (8, 4) if fast else (200, 60)
random = np.random.default_rng(0)

# %% [markdown]
# ## False alarms of a weekly look
#
# First a classifier without a language model, because its truth is known: its probabilities are correct, and nothing ever changes. Every
# alarm is false. `spread` is the spread of the log-odds: a small one means doubtful rows. `sharpness` above one makes the classifier
# too sure of itself. `noise` is the share of wrong labels.


# %%
def rows(count, spread=2.0, sharpness=1.0, noise=0.0):
    """Predictions of four draws for new rows, and their labels."""
    log_odds = spread * random.normal(size=count) + 0.3 * random.normal(size=(4, count))
    honest = bl.Prediction(-np.logaddexp(0, np.stack([log_odds, -log_odds], -1)))
    labels = random.random(count) < honest.probs[:, 1]
    wrong = random.random(count) < noise
    return tempered(honest, 1 / sharpness), (labels ^ wrong).astype(int)


weeks, per_week, num_reference = 26, 25, 400
prediction, _ = rows(200_000)
accuracy = prediction.probs.max(1).mean()
print(f"True accuracy {accuracy:.3f}; {weeks} weeks of {per_week} rows, a reference of {num_reference} rows.")

# %% [markdown]
# The usual approach tests all rows so far, each week, as if it were the only look: a binomial test of the accuracy against its true
# value, and a rank test of the entropies against those of the reference. Each has level 0.025, so that *one* look has a false alarm
# with probability at most about 0.05. The monitor has `alpha=0.05` over all weeks together.


# %%
def first_week(alarms):
    """Number of the first week with an alarm; infinity without one."""
    return int(np.argmax(alarms)) + 1 if any(alarms) else np.inf


def weekly_tests(reference, batches):
    """First alarm of two ordinary tests that are repeated every week."""
    entropies, right, alarms = [], [], []
    for prediction, labels in batches:
        entropies.append(prediction.entropy)
        right.append(prediction.probs.argmax(1) == labels)
        hits = np.concatenate(right)
        below = binomtest(int(hits.sum()), len(hits), accuracy, alternative="less").pvalue
        moved = mannwhitneyu(np.concatenate(entropies), reference.entropy).pvalue
        alarms.append(min(below, moved) < 0.025)
    return first_week(alarms)


def monitored(key, reference, batches):
    """A monitor after all weeks."""
    monitor = bl.monitor.Monitor.start(key, *reference)
    for week, batch in enumerate(batches, start=1):
        monitor = monitor.update(*batch, time=week)
    return monitor


ordinary, by_monitor = [], []
for key in jax.random.split(jax.random.key(0), num_streams):
    reference, batches = rows(num_reference), [rows(per_week) for _ in range(weeks)]
    ordinary.append(weekly_tests(reference[0], batches))
    alerts = monitored(key, reference, batches).alerts
    by_monitor.append(int(alerts[0].time) if alerts else np.inf)

# %%
shares = {"weekly tests": np.array(ordinary), "monitor": np.array(by_monitor)}
(panel,), figure, _ = make_axes(None, 1, width=5.5, height=2.8)
for (name, first), colour in zip(shares.items(), (ORANGE, BLUE), strict=True):
    share = [(first <= week).mean() for week in range(1, weeks + 1)]
    panel.step(range(1, weeks + 1), share, where="post", color=colour, label=name)
panel.axhline(0.05, color=GREY, linewidth=1, linestyle="--")
panel.set(xlabel="week", ylabel="share of streams", ylim=(0, None))
legend_above(panel)
caption(
    figure,
    f"Share of {num_streams} streams without a change in which there was a false alarm up to this week. Dashed: 0.05, "
    "the level of one weekly look, and of the monitor for all weeks together.",
)
figure

# %%
intervals = {}
for name, first in shares.items():
    hits = np.isfinite(first).sum()
    low, high = bl.metrics.wilson(np.array([hits]), np.array([num_streams]))
    intervals[name] = (low[0], high[0])
    print(f"{name}: {hits} of {num_streams} streams with a false alarm (95 %: {low[0]:.3f} to {high[0]:.3f})")
assert intervals["monitor"][0] <= 0.05, "more false alarms than the guarantee allows"
if not fast:
    assert intervals["weekly tests"][0] > 0.05, "repeated looks do not raise the level of the weekly tests"

# %% [markdown]
# The orange curve grows with every look: a test that is repeated until it rejects has no level. The probability behind the blue curve
# is at most the dashed line, whatever the number of looks. If the curve lies far below it, the bound is cautious for such streams, and
# alarms come later than they could.
#
# ## How late is the alarm?
#
# Now something changes after ten weeks. Three kinds of change, each in streams of its own:

# %%
before = 10
changes = {
    "doubtful texts, no labels": {"spread": 0.8},
    "wrong labels, 20 %": {"noise": 0.2},
    "too sure of itself": {"sharpness": 2.0},
}
delays, tests, false_alarms = {}, {}, {}
for number, (name, change) in enumerate(changes.items()):
    delays[name], tests[name], false_alarms[name] = [], [], 0
    for key in jax.random.split(jax.random.key(1 + number), num_shifted):
        reference = rows(num_reference)
        batches = [rows(per_week, **(change if week >= before else {})) for week in range(weeks)]
        if "spread" in change:
            batches = [(prediction, None) for prediction, _ in batches]
        alerts = monitored(key, reference, batches).alerts
        if alerts and alerts[0].row <= before * per_week:
            false_alarms[name] += 1
        else:
            delays[name].append(alerts[0].row - before * per_week if alerts else np.inf)
            tests[name] += [alerts[0].test] if alerts else []

# %%
(panel,), figure, _ = make_axes(None, 1, width=5.5, height=2.8)
lines = []
for (name, delay), colour in zip(delays.items(), COLOURS, strict=False):
    since = np.arange((weeks - before) * per_week + 1)
    panel.plot(since, [(np.array(delay) <= n).mean() for n in since], color=colour, label=name)
    first = max(set(tests[name]), key=tests[name].count) if tests[name] else "none"
    share, median = np.isfinite(delay).mean(), np.median(delay)
    lines.append((name, f"{median:.0f}", f"{share:.2f}", first, str(false_alarms[name])))
panel.set(xlabel="rows since the change", ylabel="share of streams", ylim=(0, 1.02))
legend_above(panel, ncols=1)
caption(
    figure,
    f"Share of {num_shifted} streams with an alarm up to this row after a planted change; streams with an alarm before "
    "the change are left out.",
)
display(figure)
header = ("change", "median delay in rows", "found", "first alarm, most often", "false alarms before")
Table(f"{num_shifted} streams of each kind, {weeks - before} weeks after the change", header, tuple(lines))

# %% [markdown]
# A steep curve means that nearly all streams need the same number of rows. Where a curve ends below one, some streams had no alarm by
# the end. The delay depends on the size of the change, on the number of rows before it, and on the size of the reference. Repeat this
# measurement with your own numbers before you promise anything.
#
# ## A real classifier
#
# SmolLM2-135M with a core prior, fitted to a few film reviews by `bl.fit_core`, as in `01_quickstart`. The reference are other film
# reviews with their labels. The stream has two versions:
#
# - **tweets**: after half of the weeks, tweets arrive instead of film reviews;
# - **label errors**: film reviews all the time. Two people label them, each about half of the rows. In the second half one of the two
#   confuses the classes.

# %%
num_train, num_kept, num_weeks, weekly = (32, 30, 4, 8) if fast else (128, 240, 12, 30)
base = bl.load(fetch_smollm2())
splits = vader_splits(seed=0, train=num_train, validation=num_kept, test=num_weeks * weekly)
names = {"train": "train", "reference": "validation", "films": "movies", "tweets": "tweets"}
data = bl.text_classification(
    type(splits)({name: splits[split] for name, split in names.items()}),
    base.tokenizer,
    text="text",
    label="label",
    template="Review: {text}\nSentiment:",
    words=[" negative", " positive"],
    max_length=32,
    truncate="right",
)
k_fit, k_predict, k_monitor = jax.random.split(jax.random.key(0), 3)
core = bl.fit_core(
    k_fit,
    base,
    data.train,
    label_ids=data.label_ids,
    size={"v_proj": 4 if fast else 16},
    scale_prior=dist.HalfNormal(1.0),
)
print(core.scales)

# %%
predictions, labels = {}, {}
for name in ("reference", "films", "tweets"):
    cached = bl.cache_prefix(core.model, data[name])
    predictions[name] = bl.predict(k_predict, core, cached, num_draws=100)
    labels[name] = np.asarray(cached.labels)
    print(f"accuracy on {name}: {bl.metrics.accuracy(predictions[name], labels[name]):.3f}")
bl.plots.domains({name: predictions[name] for name in ("reference", "tweets")})

# %% [markdown]
# The picture compares what the unlabelled tests will see. The more the two rows of histograms overlap, the later the alarm. An AUC of one
# half means that the score does not order the two. Only a posterior has the right panel: a point has no mutual information.
#
# ## Two streams, with labels that are a week late
#
# `update` takes the predictions of a week. `label` takes the same predictions a week later, with the labels that have come in the
# meantime; -1 marks a row without one. Here about four of five rows ever get a label.

# %%
half = num_weeks // 2
kinds = {"tweets": ["films"] * half + ["tweets"] * half, "label errors": ["films"] * num_weeks}


def week_of(kind, week):
    """Predictions and labels of a week, -1 for a row that never gets a label."""
    source, rows_of = kinds[kind][week], slice(week * weekly, (week + 1) * weekly)
    random = np.random.default_rng(week)
    truth = labels[source][rows_of]
    confused = random.random(len(truth)) < 0.5
    if kind == "label errors" and week >= half:
        truth = np.where(confused, 1 - truth, truth)
    known = np.where(random.random(len(truth)) < 0.8, truth, -1)
    return predictions[source][rows_of], known


def watched(kind):
    """The monitor of a stream whose labels are a week late."""
    monitor = bl.monitor.Monitor.start(k_monitor, predictions["reference"], labels["reference"])
    late = None
    for week in range(num_weeks):
        now = week_of(kind, week)
        monitor = monitor.update(now[0], time=f"week {week + 1}")
        if late is not None:
            monitor = monitor.label(*late, time=f"week {week + 1}")
        late = now
    return monitor.label(*late, time=f"week {num_weeks + 1}")


monitors = {kind: watched(kind) for kind in kinds}
for kind, monitor in monitors.items():
    print(f"{kind}: {monitor.num_rows} rows, {monitor.num_labelled} labels, floor {monitor.floor:.3f}")
    for alert in monitor.alerts:
        print(f"  {alert}")
    print(f"  {monitor.recommendation}")
print(f"The change comes with row {half * weekly + 1}, in week {half + 1}.")

# %%
bl.plots.monitoring(monitors["tweets"])

# %%
bl.plots.monitoring(monitors["label errors"])

# %% [markdown]
# Look at the right panels. A line above the dashed line is an alarm, and a dotted line marks its row, which may lie between two points of
# the line. The lines of entropy and mutual information see the texts, and those of accuracy and calibration see the labels. Label errors
# leave the texts as they were, so they can only move the second pair.

# %%
for kind, monitor in monitors.items():
    seen = {finding.name: finding.number for finding in monitor.findings if finding.number is not None}
    texts = max(seen["entropy"], seen["mutual information"])
    print(
        f"{kind}: largest evidence on texts {texts:.3g}, on labels {max(seen['accuracy'], seen['calibration']):.3g}"
    )
display(monitors["label errors"])

# %% [markdown]
# ## The same from the command line
#
# `bnlora predict` writes a table with the probabilities and the mutual information. `bnlora monitor` reads such tables, keeps its state in a
# file, and writes a page to send around. Here the tables are written by hand, from the predictions above.


# %%
def write_log(path, prediction, classes, weeks):
    """A table as `bnlora predict` writes it, with a label where there is one, and the week."""
    names = [f"probability {name}" for name in LABELS]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "mutual information", "label", "week"])
        for probs, information, label, week in zip(
            prediction.probs, prediction.mutual_information, classes, weeks, strict=True
        ):
            writer.writerow([*probs, information, LABELS[label] if label >= 0 else "", week])


folder = tempfile.TemporaryDirectory()
here = Path(folder.name)
write_log(here / "reference.csv", predictions["reference"], labels["reference"], [0] * num_kept)
parts = [week_of("label errors", week) for week in range(num_weeks)]
stream = bl.Prediction(np.concatenate([prediction.draw_log_probs for prediction, _ in parts], axis=1))
numbers = np.repeat(np.arange(1, num_weeks + 1), weekly)
write_log(here / "weeks.csv", stream, np.concatenate([known for _, known in parts]), numbers)

command = "bnlora monitor weeks.csv --reference reference.csv --label label --time week --html report.html"
done = subprocess.run(
    [sys.executable, "-m", *command.split()], cwd=here, capture_output=True, text=True, check=False
)
print(f"$ {command}\n{done.stdout}{done.stderr}exit code {done.returncode}: 0 without an alarm, 5 with one")
assert done.returncode in (0, 5)

# %% [markdown]
# The page `report.html` is one file without links to other files:

# %%
page = base64.b64encode((here / "report.html").read_bytes()).decode()
folder.cleanup()
IFrame(f"data:text/html;base64,{page}", width="100%", height=700)

# %% [markdown]
# ## What to do then
#
# | alarm of | first step |
# |---|---|
# | only accuracy or calibration, and the texts look as before | let somebody label some rows again: the labels may be wrong |
# | only entropy or mutual information | get labels of recent rows; the change may do no harm |
# | both | refit on recent labelled rows |
#
# A temperature is the cheapest repair. It needs no fit, and it changes no answer. Here it is chosen on half of the tweets, as if
# they had been labelled, and measured on the other half.

# %%
middle = len(labels["tweets"]) // 2
recent, later = predictions["tweets"][:middle], predictions["tweets"][middle:]
known, held_out = labels["tweets"][:middle], labels["tweets"][middle:]
temperature = fit_temperature(recent, known)
difference = bl.metrics.paired_difference(
    jax.random.key(0), bl.metrics.nll, tempered(later, temperature), later, held_out
)
verdict = "better" if difference.high < 0 else "worse" if difference.low > 0 else "undecided"
print(f"Temperature from {middle} tweets: {temperature:.2f}")
print(f"NLL with it minus NLL without it, on {len(held_out)} other tweets: {difference} ({verdict})")

# %% [markdown]
# If accuracy itself has fallen, a temperature does not help: then refit with the new labelled rows among the training rows. After a
# repair the old reference is no longer that of the classifier. Start a new monitor, with rows that the repair did not use:

# %%
repaired = tempered(later, temperature)
new = bl.monitor.Monitor.start(k_monitor, repaired, held_out) if middle >= 30 else None
if new is not None:
    print(f"floor of the old monitor {monitors['tweets'].floor:.3f}, of the new one {new.floor:.3f}")

# %% [markdown]
# ## What to conclude, and what not

# %%
for name, (low, high) in intervals.items():
    print(f"False alarms of {name} in {weeks} weeks: a share of {low:.3f} to {high:.3f} (95 %).")
for kind, monitor in monitors.items():
    alerts = [alert for alert in monitor.alerts if alert.row > half * weekly]
    print(f"{kind}: {alerts[0] if alerts else 'no alarm after the change'}")

# %% [markdown]
# - Decide before the first row how often you will look, or use a test that may be read at any time.
# - Alarms of texts and alarms of labels mean different things. Read both before you act.
# - A monitor does not know whether the classifier or the labels are wrong. Only a second look at the labels does.
#
# **Not** shown: rows that depend on each other, such as many reviews of one film, which raise alarms without a change of the source;
# labels that are there only because somebody complained; slow changes over a year; and the refit itself. The delays are those of planted
# changes. There is one real stream of each kind, so its alarm says nothing about the next one.
