"""The service: its probabilities, limits, token, counts and labels, and what hostile requests get."""

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace

import jax
import numpy as np
import pytest
from builders.commands import call, reviews
from builders.html_page import Page
from hypothesis import given, settings
from hypothesis import strategies as st

from bnlora import metrics
from bnlora.app.serve import command, queue, web
from bnlora.app.serve.bodies import Refused
from bnlora.app.serve.command import require_packages, token_for
from bnlora.app.serve.log import PredictionLog
from bnlora.app.serve.server import bound
from bnlora.app.serve.service import load_service
from bnlora.app.serve.web import is_loopback
from bnlora.app.tasks import column_names
from bnlora.data.tables import read_table
from bnlora.prediction.conformal import calibrate_sets
from bnlora.prediction.predict import Prediction

pytest.importorskip("fastapi")
from builders.served import LIMITS, TEXTS, TOKEN, opened, refusal, rows_of, wait_for  # noqa: E402


@pytest.fixture
def place(served_place):
    return served_place


def test_probabilities_are_those_of_the_command_predict(place, client):
    out = place / "out.csv"
    done = call("predict", place / "fit", place / "new.csv", "--out", out, "--draws", 4)
    assert done.exit_code == 0, done.output
    answer = client.post("/predict", json={"texts": TEXTS}).json()
    assert (answer["kind"], answer["draws"]) == ("network", 4)
    for row, written in zip(answer["rows"], read_table(out), strict=True):
        for name in ("bad", "good"):
            expected = float(written[f"probability {name}"])
            assert row["probabilities"][name] == pytest.approx(expected, abs=1e-5)
        assert row["entropy"] == pytest.approx(float(written["entropy"]), abs=1e-5)
        assert row["epistemic"] == pytest.approx(float(written["mutual information"]), abs=1e-5)
        assert row["entropy"] == pytest.approx(row["epistemic"] + row["aleatoric"])
        assert row["prediction"] == written["prediction"]
    assert rows_of(client, TEXTS[:1])[0]["probabilities"]["bad"] == pytest.approx(
        answer["rows"][0]["probabilities"]["bad"], abs=1e-5
    )


def test_sets_and_actions_are_those_of_the_library(place):
    service = load_service(jax.random.key(0), place / "fit", LIMITS, 4, place / "costs.json")
    service = service.with_rule(place / "calibration.csv", "text", "label", "utf-8", 0.8)
    calibration = reviews(40, seed=1)
    parts = [calibration["text"][:][i : i + 6] for i in range(0, 40, 6)]
    answers = [service.answer([part])[0].prediction.draw_log_probs for part in parts]
    rule = calibrate_sets(
        Prediction(np.concatenate(answers, 1)), np.array(calibration["label"][:]), level=0.8
    )
    with opened(service) as client:
        for row in rows_of(client):
            good = row["probabilities"]["good"]
            members = rule.sets(np.log([[1 - good, good]]))[0]
            assert row["set"] == [
                name for name, member in zip(["bad", "good"], members, strict=True) if member
            ]
            costs = {"drop": 5 * good, "ask": 0.1, "keep": 5 * (1 - good)}
            assert row["action"] == min(costs, key=costs.get)
            assert row["expected cost"] == pytest.approx(min(costs.values()))
        page = client.get("/").text
        assert "level 0.8" in page
        assert "drop, ask, keep" in page


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"texts": []}, "at least one entry"),
        (["the film was bad"], "a list of strings"),
        ({"texts": {"a": 1}}, "a list of strings"),
        ({"texts": "good"}, "a list of strings"),
        ({"texts": ["good"], "seed": 1}, "a list of strings"),
    ],
    ids=["none", "list", "object", "string", "more"],
)
def test_a_body_of_another_form_is_refused(client, body, reason):
    answer = client.post("/predict", json=body)
    assert answer.status_code == 422
    assert reason in refusal(answer)


@pytest.mark.parametrize(
    ("texts", "status", "reason"),
    [
        (["good"] * 7, 413, "texts has 7 entries; a request may have at most 6"),
        (["good", "x" * 201], 413, r"texts\[1\] has 201 characters; a text may have at most 200"),
        (["good", "bad good " * 20], 413, r"texts\[1\] has \d+ tokens; a row may have at most 24"),
        (["good", " "], 422, r"texts\[1\] must be a string that is not empty"),
        (["good", 3], 422, r"texts\[1\] must be a string .* got 3"),
        (["x" * 5000], 413, "the body may have at most 4,000 bytes"),
    ],
    ids=["rows", "characters", "tokens", "empty", "number", "bytes"],
)
def test_a_request_beyond_a_limit_is_refused_in_one_sentence(client, texts, status, reason):
    answer = client.post("/predict", json={"texts": texts})
    assert answer.status_code == status
    assert re.search(reason, refusal(answer))
    assert len(rows_of(client)) == 5


def test_a_body_that_states_no_length_is_read_up_to_the_limit(client):
    read = []

    def body():
        for index in range(1000):
            read.append(index)
            yield b" " * 1000

    answer = client.post("/predict", content=body(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert "4,000 bytes" in refusal(answer)


class Slow:
    """A request whose body comes in two parts, of which the second never comes or is an end of connection."""

    def __init__(self, last):
        self.headers = {"content-type": "application/json"}
        self.messages = [{"type": "http.request", "body": b"{", "more_body": True}, *last]

    async def receive(self):
        if not self.messages:
            await asyncio.sleep(60)
        return self.messages.pop(0)


@pytest.mark.parametrize(
    ("last", "status"), [([], 408), ([{"type": "http.disconnect"}], 400)], ids=["slow", "closed"]
)
def test_a_body_that_does_not_end_is_given_up(last, status, monkeypatch):
    monkeypatch.setattr(web, "BODY_SECONDS", 0.05)
    with pytest.raises(Refused) as refused:
        asyncio.run(web.body_of(Slow(last), LIMITS))
    assert refused.value.status == status


def test_a_form_or_text_of_another_site_is_refused(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"Content-Type": kind} if kind else {}
        answer = client.post("/predict", content=b'{"texts": ["good"]}', headers=headers)
        assert answer.status_code == 415
        assert "application/json" in refusal(answer)
    answer = client.get("/metrics", headers={"Host": "evil.example:8000"})
    assert answer.status_code == 403
    assert "localhost" in refusal(answer)
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80"):
        assert client.get("/health", headers={"Host": host}).status_code == 200


def test_other_routes_and_methods_are_refused(client):
    for answer in (
        client.get("/predict"),
        client.get("/docs"),
        client.post("/"),
        client.get("/nothing", headers={"Host": "["}),  # no address
    ):
        assert answer.status_code in (404, 405)
        assert "POST /predict" in refusal(answer)
        assert answer.status_code == 404 or answer.headers["allow"] in ("POST", "GET")


def test_too_many_requests_at_a_time_are_refused_and_the_others_answered(service, monkeypatch):
    """The thread stands still until all requests are there."""
    go, answer = threading.Event(), queue.Service.answer
    groups = []

    def slow(self, requests):
        groups.append(len(requests))
        assert go.wait(60)
        return answer(self, requests)

    monkeypatch.setattr(queue.Service, "answer", slow)
    with opened(service) as client:
        found: list = []
        ask = lambda: found.append(client.post("/predict", json={"texts": TEXTS[:1]}))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(LIMITS.max_requests)]
        threads[0].start()
        wait_for(lambda: groups == [1])  # it runs alone, and the others wait behind it
        for thread in threads[1:]:
            thread.start()
        wait_for(lambda: "bnlora_open_requests 3.0" in client.get("/metrics").text)
        refused = client.post("/predict", json={"texts": TEXTS[:1]})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert "3 requests wait or run already" in refusal(refused)
        assert client.get("/health").status_code == 200
        go.set()
        for thread in threads:
            thread.join()
        assert [one.status_code for one in found] == [200, 200, 200]
        assert groups == [1, 2]  # those that waited ran together
        assert len(rows_of(client)) == 5


def test_one_refusal_in_a_group_does_not_affect_the_others(service):
    first, refused, last = service.answer([TEXTS[:2], ["good " * 100], TEXTS[2:]])
    assert refused.status == 413
    alone = service.answer([TEXTS])[0].prediction
    together = np.concatenate([first.prediction.probs, last.prediction.probs])
    np.testing.assert_allclose(together, alone.probs, atol=1e-5)
    assert [one.status for one in service.answer([["good " * 100]])] == [413]


def test_a_token_is_required_everywhere_but_for_health(service):
    with opened(service, token=TOKEN) as client:
        assert client.get("/health").status_code == 200
        good = {"Authorization": f"Bearer {TOKEN}"}
        sent = {"json": {"texts": TEXTS[:1]}}
        wrong = [
            {},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer "},
            {"Authorization": b"Bearer \xff"},
        ]
        wrong += [{"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": f"Basic {encoded(TOKEN)}"}]
        for headers in wrong:
            asked = [
                client.post("/predict", **sent, headers=headers),
                client.get("/metrics", headers=headers),
            ]
            for answer in asked:
                assert (answer.status_code, answer.json()) == (401, {"error": "unauthorised"})
                assert answer.headers["www-authenticate"] == "Bearer"
        assert client.post("/predict", **sent, headers=good).status_code == 200
        assert client.get("/", headers=good).status_code == 200
        asked = client.get("/")
        assert (asked.status_code, asked.headers["www-authenticate"]) == (401, 'Basic realm="bnlora"')
        assert client.get("/", headers={"Authorization": f"Basic {encoded(TOKEN)}"}).status_code == 200
        for bad in ("Basic !", f"Basic {encoded('other')}"):
            assert client.get("/", headers={"Authorization": bad}).status_code == 401
        assert client.get("/", headers={**good, "Host": "service.example"}).status_code == 200


def encoded(token: str) -> str:
    return base64.b64encode(f"user:{token}".encode()).decode()


def test_the_command_requires_a_token_where_others_can_reach_it(place, tmp_path, monkeypatch):
    monkeypatch.delenv(command.TOKEN, raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        assert not is_loopback(host)
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    done = call("serve", place / "fit", "--host", "0.0.0.0", "--port", "0")
    assert done.exit_code == 1
    assert "give a token with --token-file or BNLORA_TOKEN" in done.output.replace("\n", " ")
    file = tmp_path / "token"
    file.write_text(f" {TOKEN}\n")
    assert token_for("0.0.0.0", file, {}) == TOKEN
    assert token_for("0.0.0.0", None, {command.TOKEN: TOKEN}) == TOKEN
    assert token_for("127.0.0.1", None, {}) is None
    for bad in (
        b"short",
        b"a token that has spaces",
        b"a-token-with-\xff-in-it",
        b"two-lines-of-it\nthe-second",
    ):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="at least 16 characters, all of them visible ASCII"):
            token_for("127.0.0.1", file, {})


def test_missing_packages_and_a_port_in_use_are_named(place, monkeypatch):
    taken = bound("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    done = call("serve", place / "fit", "--port", port)
    assert done.exit_code == 1
    assert f"cannot listen on '127.0.0.1', port {port}" in done.output
    taken.close()
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs fastapi, uvicorn, prometheus-client: pip install fastapi"):
        require_packages()


def test_another_task_and_wrong_costs_are_refused(place, tmp_path, monkeypatch):
    file = tmp_path / "costs.json"
    for content, reason in [
        ({"costs": {"bad": [1], "superb": [0]}, "actions": ["a"]}, "costs of the classes"),
        ({"costs": [[1], [0]], "actions": ["a"]}, "a list for each class"),
        ({"costs": {"bad": [1], "good": ["x"]}, "actions": ["a"]}, "costs must be numbers"),
        ({"costs": {"bad": [1], "good": [2]}, "actions": [1]}, "list of names"),
    ]:
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=reason):
            load_service(jax.random.key(0), place / "fit", LIMITS, 2, file)
    recipe = json.loads((place / "fit" / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"task": "values"}))
    with pytest.raises(ValueError, match="this fit has the task 'values'"):
        load_service(jax.random.key(0), tmp_path, LIMITS, 2)


def test_metrics_count_requests_rows_errors_and_means(client):
    rows = rows_of(client)
    refusal(client.post("/predict", json={}))
    refusal(client.get("/nothing"))
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if line[0] != "#")
    assert lines['bnlora_requests_total{route="/predict",status="200"}'] == "1.0"
    assert lines['bnlora_errors_total{status="422"}'] == "1.0"
    assert lines['bnlora_requests_total{route="other",status="404"}'] == "1.0"
    assert lines["bnlora_rows_total"] == "5.0"
    assert lines["bnlora_open_requests"] == "0.0"
    assert lines['bnlora_request_seconds_bucket{le="+Inf",route="/predict"}'] == "2.0"
    confidence = np.mean([max(row["probabilities"].values()) for row in rows])
    assert float(lines["bnlora_mean_confidence"]) == pytest.approx(confidence)
    assert float(lines["bnlora_mean_entropy"]) == pytest.approx(np.mean([row["entropy"] for row in rows]))
    assert "the film" not in answer.text


def test_labels_give_accuracy_and_reliability(client):
    rows = rows_of(client)
    labels = [i % 2 for i in range(5)]
    sent = [{"id": row["id"], "label": ["bad", "good"][c]} for row, c in zip(rows, labels, strict=True)]
    assert client.post("/labels", json={"labels": sent[:2]}).json()["labelled"] == 2
    sent[3]["label"], sent[4]["label"] = float(labels[3]), labels[4]  # the number of a class
    scores = client.post("/labels", json={"labels": sent}).json()
    probs = np.array([list(row["probabilities"].values()) for row in rows])
    assert scores["labelled"] == 5
    assert scores["accuracy"] == metrics.accuracy(np.log(probs), np.array(labels))
    assert scores["nll"] == pytest.approx(metrics.nll(np.log(probs), np.array(labels)))
    unknown = [{"id": rows[0]["id"], "label": 1 - labels[0]}, {"id": "nobody", "label": "bad"}]
    assert "'nobody' is no id" in refusal(client.post("/labels", json={"labels": unknown}))
    again = client.post("/labels", json={"labels": sent[:1]}).json()
    assert again == scores
    wrong = [{"id": "a", "label": label} for label in ("ugly", True, 2, -1, 0.5, 1e400, None)]
    for entry in [{"id": rows[0]["id"]}, {"id": 3, "label": "bad"}, *wrong]:
        body = json.dumps({"labels": [entry]})
        answer = client.post("/labels", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422
        refusal(answer)
    page = client.get("/").text
    assert "Reliability diagram" in page
    assert f"{scores['nll']:.3f} nats" in page
    assert f"bnlora_accuracy {scores['accuracy']}" in client.get("/metrics").text


def test_the_page_is_whole_and_loads_nothing(client):
    empty = client.get("/")
    assert "No rows yet" in empty.text
    rows_of(client)
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "svg" in Page.of(answer.text).tags
    assert "prefers-color-scheme: dark" in answer.text
    assert "width=device-width" in answer.text
    assert "network, 4 draws" in answer.text
    assert not re.search(r"<script|src=|href=(?!\"\?)|url\(|@import", answer.text)
    assert "Mean confidence and entropy over time" in answer.text


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_texts_are_stored_only_in_a_log_with_the_columns_of_predict(place, service, ending, tmp_path):
    path, names = tmp_path / f"log.{ending}", column_names(service.recipe)
    odd = 'the "film",\nwas good'
    for _ in range(2):
        with opened(service, PredictionLog(path, names)) as client:
            rows = rows_of(client, [*TEXTS[:2], odd])
            refusal(client.post("/predict", json={"texts": ["x" * 201]}))
    written = read_table(path)
    assert written.column_names == ["text", *names]
    assert written["text"][:] == [*TEXTS[:2], odd] * 2
    for row, line in zip(rows, list(written)[3:], strict=True):
        assert float(line["probability good"]) == row["probabilities"]["good"]
        assert line["prediction"] == row["prediction"]
    other = tmp_path / "other.csv"
    other.write_text("text,label\n")
    with pytest.raises(ValueError, match="other columns"):
        PredictionLog(other, names)


def test_a_log_that_cannot_be_written_refuses_the_request(service, tmp_path):
    log = PredictionLog(tmp_path / "gone" / "log.jsonl", column_names(service.recipe))
    (tmp_path / "gone" / "log.jsonl").unlink()
    (tmp_path / "gone").rmdir()
    with opened(service, log) as client:
        answer = client.post("/predict", json={"texts": TEXTS})
        assert answer.status_code == 503
        assert "log" in answer.json()["error"]


def test_a_failure_is_no_detail_for_the_client(service, monkeypatch):
    def fail(self, requests):
        raise RuntimeError("secret")

    monkeypatch.setattr(queue.Service, "answer", fail)
    with opened(service) as client:
        answer = client.post("/predict", json={"texts": TEXTS})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        monkeypatch.undo()
        assert len(rows_of(client)) == 5


def test_few_programs_are_compiled(service):
    """Any length and number of rows has one of two row counts and a power of two as its width."""
    shapes = set()
    model = service.drawn.model

    class Recording:
        def __getattr__(self, name):
            return getattr(model, name)

        def compiled_outputs(self, piece, count, batch, together):
            shapes.add(batch.tokens.shape)
            return model.compiled_outputs(piece, count, batch, together)

    recorded = replace(service, drawn=replace(service.drawn, model=Recording()))
    for length in range(1, 10):
        for rows in (1, 2, 3, 5):
            recorded.answer([["good " * length] * rows])
    assert {rows for rows, _ in shapes} == {1, 4}
    assert len(shapes) <= 4


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
BODIES = st.one_of(
    st.binary(max_size=200),
    JUNK.map(json.dumps).map(str.encode),
    JUNK.map(lambda x: json.dumps({"texts": x}).encode()),
    JUNK.map(lambda x: json.dumps({"labels": x}).encode()),
    st.lists(JUNK, min_size=1, max_size=8).map(lambda x: json.dumps({"texts": x}).encode()),
    st.lists(JUNK, min_size=1, max_size=8).map(lambda x: json.dumps({"labels": x}).encode()),
    st.sampled_from(
        [
            b"[" * 3900, b'{"texts": ' + b"[" * 3000, b'{"texts": [' + b"9" * 3900 + b"]}",
            b'{"texts": ["\\ud800"]}', b'{"texts": ["\\u0000"], "texts": []}', b'{"texts": [1e999, NaN]}',
            b"\xff\xfe", b'\xef\xbb\xbf{"texts": []}', b"", b"null", b'{"texts": ["good", {"texts": []}]}',
            b'{"labels": [{"id": "a", "label": ' + b"9" * 3000 + b"}]}", b"Infinity",
        ]
    ),
)  # fmt: skip


@given(st.sampled_from(["/predict", "/labels"]), BODIES)
@settings(max_examples=50, derandomize=True)
def test_hostile_bodies_are_refused_in_one_sentence(hostile, route, body):
    answer = hostile.post(route, content=body, headers={"Content-Type": "application/json"})
    if answer.status_code == 200:  # strings of letters are texts
        texts = json.loads(body)["texts"]
        assert all(isinstance(text, str) for text in texts)
        return
    assert len(refusal(answer)) < 300


@pytest.fixture(scope="module")
def hostile(service):
    with opened(service) as client:
        yield client


@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=3))
@settings(max_examples=15, derandomize=True)
def test_strange_texts_are_answered_or_refused(hostile, texts):
    body = json.dumps({"texts": texts})
    answer = hostile.post("/predict", content=body, headers={"Content-Type": "application/json"})
    if answer.status_code == 200:
        for row in answer.json()["rows"]:
            assert sum(row["probabilities"].values()) == pytest.approx(1)
        return
    refusal(answer)


@pytest.mark.slow
def test_a_stopped_process_answers_what_it_has_begun(place):
    """A process of its own, on loopback, gets SIGTERM while requests wait and run."""
    command = [sys.executable, "-m", "bnlora", "serve", place / "fit", "--port", "0", "--draws", "2000"]
    command += ["--json", "--log", place / "served.jsonl"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        started = json.loads(process.stdout.readline())
        assert started["kind"] == "network"
        address, found = started["address"], []
        texts = [TEXTS[i % 5] for i in range(64)]

        def ask():
            found.append(json.loads(fetched(f"{address}/predict", {"texts": texts})))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_for(lambda: b"bnlora_open_requests 3.0" in fetched(f"{address}/metrics"))
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(120)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert [len(one["rows"]) for one in found] == [64] * 3
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert len(read_table(place / "served.jsonl")) == 3 * 64


def fetched(address: str, content: dict | None = None) -> bytes:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()
