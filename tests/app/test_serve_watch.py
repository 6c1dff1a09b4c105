"""The monitor of the service: rows and labels reach it once and in order, and its alarms are shown."""

import csv
import json

import jax
import numpy as np
import pytest
from builders.commands import call, reviews
from builders.html_page import Page

import bnlora as bl
from bnlora.app.monitor import monitor_result
from bnlora.app.outcome import as_json
from bnlora.app.serve import command, watch
from bnlora.app.serve.service import Service
from bnlora.app.serve.watch import Watching, reference_of, start_watching
from bnlora.assess.monitor import Monitor, load_monitor, read_notes
from bnlora.data.tables import read_table, write_table

pytest.importorskip("fastapi")
from builders.served import LIMITS, TEXTS, opened, refusal, rows_of, wait_for  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

KEY = jax.random.key(7)
NOTHING = {"alpha": None, "floor": None, "tolerance": None}


class Stated(Service):
    """A service whose texts are the logits of the second class: "0.3"."""

    def answer(self, requests):
        return [self._answer(prediction_of([float(text) for text in texts])) for texts in requests]


def prediction_of(logits):
    """Predictions of four draws around some logits."""
    by_draw = np.array(logits) + np.array([-0.4, -0.1, 0.1, 0.4])[:, None]
    return bl.Prediction(np.stack([-np.logaddexp(0, by_draw), -np.logaddexp(0, -by_draw)], -1))


def rows(seed, count, scale):
    """Logits of rows, and labels that agree with them."""
    random = np.random.default_rng(seed)
    logits = np.round(scale * random.normal(size=count), 4)
    return logits, (random.random(count) < prediction_of(logits).probs[:, 1]).astype(int)


def reference():
    logits, labels = rows(0, 400, 2.0)
    return Monitor.start(KEY, prediction_of(logits), labels)


@pytest.fixture
def watched(service):
    """A client of a stated service with a monitor."""
    fields = {name: getattr(service, name) for name in Service.__dataclass_fields__}
    with opened(Stated(**fields), watching=Watching(reference(), {})) as client:
        yield client


def sent(client, logits) -> list:
    """Ids of rows, which are sent a few at a time."""
    parts = [logits[i : i + LIMITS.max_rows] for i in range(0, len(logits), LIMITS.max_rows)]
    return [row["id"] for part in parts for row in rows_of(client, [str(x) for x in part])]


def label(client, ids, labels) -> None:
    for i in range(0, len(ids), LIMITS.max_rows):
        some = slice(i, i + LIMITS.max_rows)
        entries = [{"id": a, "label": int(b)} for a, b in zip(ids[some], labels[some], strict=True)]
        assert client.post("/labels", json={"labels": entries}).status_code == 200


def test_every_row_and_label_reaches_the_monitor_once_and_in_order(watched):
    logits, labels = rows(1, 40, 2.0)
    ids = sent(watched, logits)
    order = np.random.default_rng(2).permutation(40)[:25]  # labels come late, in another order, and not all
    label(watched, [ids[i] for i in order], labels[order])
    label(
        watched, [ids[i] for i in order[:6]], 1 - labels[order[:6]]
    )  # a second label of a row is no new bet
    refusal(watched.post("/labels", json={"labels": [{"id": "nobody", "label": 0}]}))
    refusal(watched.post("/predict", json={"texts": ["0.1"] * 7}))
    expected = reference().update(prediction_of(logits))
    expected = expected.label(prediction_of(logits[order]), labels[order])
    got, want = watched.get("/monitor").json(), json.loads(as_json(monitor_result(expected)))
    assert (got["rows"], got["labelled"]) == (40, 25)
    for name in ("alpha", "floor", "alerts", "recommendation"):
        assert got[name] == want[name]
    for name in ("accuracy", "nll", "brier"):
        assert got["means"][name]["low"] == pytest.approx(want["means"][name]["low"])
    for one, two in zip(got["findings"], want["findings"], strict=True):
        assert (one["name"], one["status"]) == (two["name"], two["status"])
        assert one["number"] == pytest.approx(two["number"])


def test_rows_like_the_reference_raise_no_alarm_and_others_do(watched):
    sent(watched, rows(3, 150, 2.0)[0])
    assert watched.get("/monitor").json()["alerts"] == []
    page = Page.of(watched.get("/").text)
    assert "No alarm after 150 rows and 0 labels." in page.text
    assert "alarm)" not in page.text
    sent(watched, rows(4, 200, 0.4)[0])
    result = watched.get("/monitor").json()
    alert = result["alerts"][0]
    assert alert["test"] in ("entropy", "mutual information")
    assert alert["row"] > 150
    assert alert["time"].endswith("UTC")
    page = Page.of(watched.get("/").text)
    assert f"Alarm: {', '.join(one['test'] for one in result['alerts'])}." in page.text
    assert "Collect labels of recent rows" in page.text
    metrics = watched.get("/metrics").text
    assert f'bnlora_monitor_alarm{{test="{alert["test"]}"}} 1.0' in metrics
    assert 'bnlora_monitor_alarm{test="accuracy"} 0.0' in metrics
    threshold = f"{np.log(80)}"  # a quarter of 5 % each
    assert f'bnlora_monitor_log_threshold{{test="entropy"}} {threshold}' in metrics


def test_wrong_labels_raise_the_alarm_of_accuracy_and_the_page_shows_calibration(watched):
    logits, labels = rows(5, 250, 2.0)
    ids = sent(watched, logits)
    label(watched, ids, np.where(np.random.default_rng(6).random(250) < 0.5, 1 - labels, labels))
    result = watched.get("/monitor").json()
    assert "accuracy" in {alert["test"] for alert in result["alerts"]}
    assert result["recommendation"].startswith("Refit on recent labelled rows")
    text = watched.get("/").text
    page = Page.of(text)
    for piece in ("Running", "250 labels since the monitor was started", "Stop that"):
        assert piece in page.text
    for title in ("Reliability diagram", "Evidence of each test over rows", "Running accuracy over rows"):
        assert title in text
    assert f"running ECE {result['ece']:.3f}" in page.text


def test_without_a_monitor_the_service_says_how_to_start_one(client):
    answer = client.get("/monitor")
    assert answer.status_code == 404
    assert "--reference" in refusal(answer)
    assert "bnlora_monitor_alarm{" not in client.get("/metrics").text
    assert "Monitor" not in client.get("/").text


def test_the_service_predicts_its_reference_itself(served_place, service, tmp_path):
    table = reviews(40, seed=1)
    path = served_place / "calibration.csv"
    watching = start_watching(
        KEY, served_place / "fit", service, None, reference_of(service, path, "text", "label", "utf-8"),
        NOTHING, 0,
    )  # fmt: skip
    parts = [table["text"][:][i : i + 6] for i in range(0, 40, 6)]
    log_probs = np.concatenate([service.answer([p])[0].prediction.draw_log_probs for p in parts], 1)
    labels = np.array(table["label"][:])
    expected = Monitor.start(KEY, bl.Prediction(log_probs), labels)
    assert watching.monitor.floor == expected.floor
    for name, ranks in expected.ranks.items():
        np.testing.assert_allclose(watching.monitor.ranks[name].edges, ranks.edges, atol=1e-5)
    # Empty cells have no label, and a table without the column has none at all.
    half = table.remove_columns("label").add_column("label", ["good", ""] * 20)
    write_table(half, tmp_path / "half.csv")
    _, found = reference_of(service, tmp_path / "half.csv", "text", "label", "utf-8").read()
    assert found.tolist() == [1, -1] * 20
    assert reference_of(service, tmp_path / "half.csv", "text", "other", "utf-8").read()[1] is None
    bad = half.remove_columns("label").add_column("label", ["", "", "ugly"] + [""] * 37)
    write_table(bad, tmp_path / "bad.csv")
    with pytest.raises(ValueError, match="label 'ugly' in line 4 of"):
        reference_of(service, tmp_path / "bad.csv", "text", "label", "utf-8").read()
    with pytest.raises(FileNotFoundError, match=r"nearest is .*half\.csv"):
        reference_of(service, tmp_path / "hal.csv", "text", "label", "utf-8")


@pytest.mark.slow
def test_the_command_keeps_the_state_which_both_commands_read(served_place, tmp_path, monkeypatch):
    state, seen = tmp_path / "new" / "state.json", []

    def serve(*words, ask=None):
        def run(server, listening):
            with TestClient(server.config.app, base_url="http://127.0.0.1") as client:
                seen.append(client.get("/monitor").json()["rows"])
                if ask is not None:
                    ask(client)

        monkeypatch.setattr(command, "run", run)
        small = ("--draws", 4, "--batch-rows", 4, "--max-tokens", 24, "--port", 0, "--monitor-state", state)
        done = call("serve", served_place / "fit", *small, *words)
        return done.exit_code, " ".join(done.output.split())

    def ask(client):
        ids = [row["id"] for row in rows_of(client)]
        label(client, ids[:2], [0, 1])

    known = ("--reference", served_place / "calibration.csv", "--log", tmp_path / "log.csv")
    assert serve(*known, ask=ask)[0] == 0
    kept = load_monitor(state)
    assert (kept.num_rows, kept.num_labelled) == (5, 2)
    assert kept.history[-1].time.endswith("UTC")
    assert serve(ask=ask)[0] == 0  # the state is enough
    assert serve(*known)[0] == 0
    assert seen == [0, 5, 10]
    assert load_monitor(state).num_labelled == 4
    for words, reason in [
        (("--draws", 8), "the monitor of another fit, --draws or --seed"),
        (("--seed", 1), "the monitor of another fit, --draws or --seed"),
        (("--alpha", 0.2), "was started with another --alpha than 0.2"),
        (("--reference", served_place / "train.csv"), "was started with another reference"),
    ]:
        code, output = serve(*words)
        assert code == 1
        assert reason in output
    # Labels of rows of an earlier run come through the other command.
    log = read_table(tmp_path / "log.csv")
    with (tmp_path / "late.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*log.column_names, "label"])
        writer.writeheader()
        writer.writerow({**log[2], "label": "bad"})
    late = call("monitor", tmp_path / "late.csv", "--state", state, "--label", "label", "--late-labels")
    assert late.exit_code == 0, late.output
    assert (load_monitor(state).num_rows, load_monitor(state).num_labelled) == (10, 5)
    assert read_notes(state)["served"]["draws"] == 4
    assert serve()[0] == 0
    no_monitor = call("serve", served_place / "fit", "--floor", 0.5)
    assert "give --reference too" in " ".join(no_monitor.output.split())


def test_the_state_is_stored_while_the_service_runs_and_a_full_disk_does_not_stop_it(
    service, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("bnlora.app.serve.web.SAVE_SECONDS", 0.02)
    watching = Watching(Monitor.start(KEY), {"classes": ["bad", "good"]}, tmp_path / "state.json")
    with opened(service, watching=watching) as client:
        rows_of(client, TEXTS[:1])
        wait_for(lambda: watching.saved is watching.monitor)
        assert load_monitor(tmp_path / "state.json").num_rows == 1

        def fail(*args, **options):
            raise OSError("no space left")

        monkeypatch.setattr(watch, "save_monitor", fail)
        rows_of(client, TEXTS[:1])
        wait_for(lambda: "no space left" in caplog.text)
        assert len(rows_of(client)) == 5
    assert load_monitor(tmp_path / "state.json").num_rows == 1
