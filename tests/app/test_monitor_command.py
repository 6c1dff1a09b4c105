"""`bnlora monitor` on logs as `bnlora predict` writes them: alarms, exit codes, states, errors."""

import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from builders.commands import call, reviews

import bnlora as bl
from bnlora.app import tasks
from bnlora.app.outcome import ExitCode, with_columns
from bnlora.assess.monitor import load_monitor
from bnlora.data.tables import write_table

CLASSES = ("bad", "good")


def write_log(
    path, seed, count, *, noise=0.0, scale=2.0, label="label", prefix="", information=True, labels=None
):
    """A log of a calibrated classifier, with wrong labels at random; label None leaves the column out."""
    random = np.random.default_rng(seed)
    logits = scale * (random.normal(size=(count, 1)) + 0.3 * random.normal(size=(8, count, 1)))
    by_draw = 1 / (1 + np.exp(-logits[..., 0]))
    good = by_draw.mean(0)
    right = (random.random(count) < good) ^ (random.random(count) < noise)

    def entropy(p):
        return -(p * np.log(p) + (1 - p) * np.log(1 - p))

    columns = {
        "text": [f"text {i}" for i in range(count)],
        "day": [f"2026-03-{1 + i % 28:02}" for i in range(count)],
    }
    if label is not None:
        columns[label] = [CLASSES[int(x)] for x in right] if labels is None else labels
    columns |= {f"{prefix}probability bad": 1 - good, f"{prefix}probability good": good}
    columns[f"{prefix}entropy"] = entropy(good)
    if information:
        columns[f"{prefix}mutual information"] = entropy(good) - entropy(by_draw).mean(0)
    columns[f"{prefix}prediction"] = [CLASSES[int(x)] for x in good > 0.5]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A reference, a day like it, and days with a fault."""
    folder = tmp_path_factory.mktemp("logs")
    write_log(folder / "reference.csv", 0, 400)
    write_log(folder / "fine.csv", 1, 300)
    write_log(folder / "wrong.csv", 2, 300, noise=0.45)
    write_log(folder / "shifted.csv", 3, 300, scale=0.5, label=None)
    return folder


def monitor(logs, log, *options):
    return call("monitor", logs / log, "--reference", logs / "reference.csv", *options)


def test_a_stream_without_a_fault_exits_with_zero(logs):
    done = monitor(logs, "fine.csv", "--label", "label")
    assert done.exit_code == ExitCode.DONE, done.output
    for piece in ("300 rows, 300 labelled; 4 fine", "Nothing to do", "running mean", "running ECE"):
        assert piece in done.stdout


@pytest.mark.parametrize(
    ("log", "options", "test"),
    [("wrong.csv", ["--label", "label"], "accuracy"), ("shifted.csv", [], "entropy")],
)
def test_a_fault_raises_an_alarm_and_exits_with_five(logs, log, options, test):
    done = monitor(logs, log, *options, "--time", "day", "--json")
    assert done.exit_code == ExitCode.ALARM == 5, done.output
    result = json.loads(done.stdout)
    alert = next(alert for alert in result["alerts"] if alert["test"] == test)
    assert 0 < alert["row"] <= 300
    assert alert["time"].startswith("2026-03-")
    assert next(f for f in result["findings"] if f["name"] == test)["status"] in ("problem", "caution")
    assert (result["rows"], result["labelled"]) == (300, 300 if options else 0)
    assert result["recommendation"]


def test_a_state_goes_on_tomorrow_as_if_in_one_run(logs, tmp_path):
    state, options = tmp_path / "new" / "state.json", ["--label", "label", "--every", "50", "--json"]
    done = monitor(logs, "fine.csv", "--state", state, *options)
    assert done.exit_code == 0, done.output
    first = load_monitor(state)
    assert len(first.history) == 6
    second = monitor(logs, "wrong.csv", "--state", state, *options)  # the same command
    assert second.exit_code == ExitCode.ALARM
    assert json.loads(second.stdout)["rows"] == 600
    lines = [(logs / name).read_text().splitlines() for name in ("fine.csv", "wrong.csv")]
    (tmp_path / "both.csv").write_text("\n".join([*lines[0], *lines[1][1:]]) + "\n")
    both = call("monitor", tmp_path / "both.csv", "--reference", logs / "reference.csv", *options)
    one, two = json.loads(both.stdout), json.loads(second.stdout)
    assert [a["row"] for a in one["alerts"]] == [a["row"] for a in two["alerts"]]
    assert one["means"]["nll"]["low"] == pytest.approx(two["means"]["nll"]["low"])
    again = monitor(logs, "wrong.csv", "--state", state, *options)
    assert again.exit_code == ExitCode.BAD_INPUT
    assert "was monitored before; pass a log with new rows only" in again.stderr
    assert load_monitor(state).num_rows == 600
    # The state remembers an alarm: a good day does not make it go away.
    write_log(tmp_path / "good.csv", 7, 50)
    assert call("monitor", tmp_path / "good.csv", "--state", state, *options).exit_code == ExitCode.ALARM


def test_labels_may_come_later(logs, tmp_path):
    lines = (logs / "fine.csv").read_text().splitlines()
    state, options = tmp_path / "state.json", ["--label", "label", "--json"]
    cells = [line.split(",") for line in lines]
    bare = [",".join([*c[:2], "" if i else c[2], *c[3:]]) for i, c in enumerate(cells)]
    (tmp_path / "bare.csv").write_text("\n".join(bare) + "\n")
    done = call(
        "monitor", tmp_path / "bare.csv", "--reference", logs / "reference.csv", "--state", state, *options
    )
    assert json.loads(done.stdout)["labelled"] == 0
    done = call("monitor", logs / "fine.csv", "--state", state, "--late-labels", *options)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["rows"], result["labelled"]) == (300, 300)


def test_the_page_has_a_chart_and_no_outside_resources(logs, tmp_path):
    done = monitor(logs, "wrong.csv", "--label", "label", "--html", tmp_path / "page.html")
    assert done.exit_code == ExitCode.ALARM
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 1
    assert "Refit on recent labelled rows" in html
    assert "running ECE" in html
    assert "http" not in html
    assert f"report: {tmp_path / 'page.html'}" in done.stdout.replace("\n", "")


def test_columns_have_the_names_that_options_give(logs, tmp_path):
    log = write_log(tmp_path / "log.csv", 4, 60, label="truth", prefix="new ", information=False)
    done = call("monitor", log, "--prefix", "new ", "--label", "truth", "--floor", "0.6", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["floor"], result["labelled"]) == (0.6, 60)
    named = ["--probability", "new probability bad", "--probability", "new probability good"]
    done = call("monitor", log, *named, "--label", "truth", "--prefix", "new ", "--floor", "0.6", "--json")
    assert json.loads(done.stdout)["means"] == result["means"]


def test_it_reads_what_predict_writes(tmp_path, monkeypatch):
    """The columns come from the code of `bnlora predict`, with a prediction in place of a model's."""
    random, table = np.random.default_rng(8), reviews(40)
    logits = random.normal(size=(3, 40, 2))
    prediction = bl.Prediction(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
    monkeypatch.setattr(tasks, "predict", lambda *_, **__: prediction)
    recipe = SimpleNamespace(task="words", words=(" bad", " good"))
    columns = tasks.predicted(None, recipe, None, None, num_draws=3, console=None)
    for name, order in (("log.csv", slice(None)), ("reference.csv", slice(None, None, -1))):
        rows = table.with_format("arrow")[:].take(np.arange(40)[order])
        shuffled = {key: values[order] for key, values in columns.items()}
        write_table(with_columns(rows, shuffled), tmp_path / name)
    done = monitor(tmp_path, "log.csv", "--label", "label", "--json")
    result = json.loads(done.stdout)
    assert (result["rows"], result["labelled"]) == (40, 40)
    assert {finding["status"] for finding in result["findings"]} <= {"fine", "problem"}
    labels = np.array(table["label"][:])
    assert result["means"]["nll"]["value"] == pytest.approx(bl.metrics.nll(prediction, labels))


def refused(*words):
    """The sentence of a command that is refused."""
    done = call("monitor", *words)
    assert done.exit_code == ExitCode.BAD_INPUT, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_errors_are_one_sentence(logs, tmp_path):
    assert "there is no file" in refused(logs / "fin.csv")
    assert f"the nearest is {str(logs / 'fine.csv')!r}" in refused(logs / "fin.csv")
    (tmp_path / "empty.csv").write_text("")
    assert "is empty" in refused(tmp_path / "empty.csv")
    (tmp_path / "header.csv").write_text("probability bad,probability good\n")
    assert "has no rows" in refused(tmp_path / "header.csv")
    (tmp_path / "other.csv").write_text("text,label\ngood film,good\n")
    assert "has 0 columns of probabilities, at least two are needed" in refused(tmp_path / "other.csv")
    assert "has no column 'labels'; its columns are" in refused(logs / "fine.csv", "--label", "labels")
    assert "has no column 'when'" in refused(logs / "fine.csv", "--time", "when")
    assert "has no column 'p'" in refused(logs / "fine.csv", "--probability", "p", "--probability", "q")
    odd = write_log(tmp_path / "odd.csv", 5, 4, labels=["good", "", "goood", "bad"])
    sentence = refused(odd, "--label", "label")
    assert f"label 'goood' in line 4 of {str(odd)!r}" in sentence
    assert "nearest is 'good'" in sentence
    assert "--late-labels reads labels" in refused(logs / "fine.csv", "--late-labels")
    assert "is the input table" in refused(logs / "fine.csv", "--html", logs / "fine.csv")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("0.5,x", "line 3 of .* has no number in the column 'probability good'; got 'x'"),
        ("0.5,", "line 3 of .* has no number in the column 'probability good'; got ''"),
        ("0.5,nan", "line 3 of .* has no number"),
        ("0.5,0.7", "line 3 of .* has no distribution: its probabilities are 0.5, 0.7"),
        ("1.5,-0.5", "line 3 of .* has no distribution"),
    ],
)
def test_a_row_without_a_distribution_is_named(tmp_path, cells, message):
    (tmp_path / "log.csv").write_text(f"probability bad,probability good\n0.5,0.5\n{cells}\n")
    assert re.search(message, refused(tmp_path / "log.csv"))


def test_references_and_states_that_do_not_fit_are_refused(logs, tmp_path):
    three = tmp_path / "three.csv"
    three.write_text("probability a,probability b,probability c\n" + "0.2,0.3,0.5\n" * 40)
    assert "has the classes ['a', 'b', 'c']; the log has ['bad', 'good']" in refused(
        logs / "fine.csv", "--reference", three
    )
    few = write_log(tmp_path / "few.csv", 6, 5)
    assert "at least 30 reference rows are needed; got 5" in refused(logs / "fine.csv", "--reference", few)
    bare = write_log(tmp_path / "bare.csv", 6, 40, information=False)
    assert "the reference has mutual information, but these rows have none" in refused(
        bare, "--reference", logs / "reference.csv"
    )
    state = tmp_path / "state.json"
    assert monitor(logs, "fine.csv", "--state", state).exit_code == 0
    assert "was started with another reference" in refused(bare, "--state", state, "--reference", bare)
    assert "was started with another --alpha than 0.1" in refused(
        logs / "wrong.csv", "--state", state, "--alpha", 0.1
    )
    assert "has the classes ['bad', 'good']" in refused(three, "--state", state)
    state.write_text("{}")
    assert "is not the state of a monitor: 'format' is missing" in refused(
        logs / "wrong.csv", "--state", state
    )
