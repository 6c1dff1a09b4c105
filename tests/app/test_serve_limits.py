"""Slow clients, a stop while requests are open, and the log of predictions: nothing hangs or gets lost."""

import json
import resource
import signal
import socket
import threading

import pytest

from bnlora.app.serve import connection, queue
from bnlora.app.serve.log import PredictionLog
from bnlora.app.tasks import column_names
from bnlora.data.tables import read_table

pytest.importorskip("fastapi")
from builders.served import LIMITS, TEXTS, listening, opened, refusal, rows_of, wait_for  # noqa: E402

HEAD = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def request_of(texts) -> bytes:
    body = json.dumps({"texts": texts}).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def answer_of(client) -> tuple[int, dict]:
    """Status and body of the next answer on a connection."""
    with client.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = dict(line.split(b": ", 1) for line in iter(file.readline, b"\r\n"))
        return status, json.loads(file.read(int(headers[b"content-length"])))


def test_a_connection_that_says_nothing_or_begins_slowly_is_closed(service, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    with listening(service) as (address, _):
        for first in (b"", b"GET /health HTTP/1.1\r\nHo", request_of(["a"])):
            with socket.create_connection(address, 60) as client:
                client.sendall(first)
                if b"POST" in first:  # the second request of a connection is limited too
                    assert answer_of(client)[0] == 200
                    client.sendall(b"GET /he")
                assert client.recv(1) == b""


def test_the_time_of_a_head_is_not_that_of_the_answer(service, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.05)
    go, answer = threading.Event(), queue.Service.answer
    monkeypatch.setattr(queue.Service, "answer", lambda self, texts: go.wait(60) and answer(self, texts))
    with listening(service) as (address, server), socket.create_connection(address, 60) as client:
        client.sendall(request_of(TEXTS[:1]))
        threading.Timer(0.3, go.set).start()
        assert answer_of(client)[0] == 200


def test_a_client_that_does_not_read_is_cut_off(service, monkeypatch):
    monkeypatch.setattr(connection, "READ_SECONDS", 0.2)
    with listening(service) as (address, server), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(60)
        client.connect(address)
        wait_for(lambda: server.server_state.connections)
        page = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        with pytest.raises(OSError, match="reset|pipe"):  # noqa: PT012
            while True:  # the buffers of the machine fill up first
                client.sendall(100 * page)
        wait_for(lambda: not server.server_state.connections)


def test_slow_bodies_do_not_take_the_places_of_others(service):
    with listening(service) as (address, _):
        slow = [socket.create_connection(address, 60) for _ in range(LIMITS.max_requests + 1)]
        for client in slow:
            client.sendall(request_of(TEXTS[:1])[:-1])
        with socket.create_connection(address, 60) as client:
            client.sendall(request_of(TEXTS))
            assert answer_of(client)[0] == 200
        for client in slow:
            client.close()


def test_a_request_that_a_stop_gives_up_is_told_so_and_not_logged(service, tmp_path, monkeypatch):
    go, begun, answer = threading.Event(), threading.Event(), queue.Service.answer

    def slow(self, requests):
        begun.set()
        assert go.wait(60)
        return answer(self, requests)

    monkeypatch.setattr(queue.Service, "answer", slow)
    log = PredictionLog(tmp_path / "log.jsonl", column_names(service.recipe))
    with (
        listening(service, log, grace=1) as (address, server),
        socket.create_connection(address, 60) as client,
    ):
        client.sendall(request_of(TEXTS))
        assert begun.wait(60)
        server.should_exit = True
        status, body = answer_of(client)
        assert (status, body) == (503, {"error": "the service stopped before it could answer"})
        go.set()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("bnlora-serve")]
    for thread in threads:
        thread.join(60)
    assert (tmp_path / "log.jsonl").read_text() == ""


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_text_cannot_forge_or_break_rows_of_the_log(service, tmp_path, ending):
    path = tmp_path / f"log.{ending}"
    log, names = PredictionLog(path, column_names(service.recipe)), column_names(service.recipe)
    odd = [
        "a\rb,0.5,0.5,0,0,good",
        "a\r\nb",
        'a"\nb',
        "a\x00b",
        "a\u2028b\x85c\x0bd",
        "\ufeffa",
        "=1+1",
        " , ",
    ]
    columns = {name: [0.5] * len(odd) for name in names}
    log.append(odd, columns)
    log.append(["next"], {name: [0.5] for name in names})
    assert read_table(path)["text"][:] == [*odd, "next"]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_full_disk_leaves_whole_rows(service, tmp_path, ending):
    path, names = tmp_path / f"log.{ending}", column_names(service.recipe)
    with opened(service, PredictionLog(path, names)) as client:
        rows_of(client, TEXTS[:2])
        before = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 30, hard))  # room for a part of a row
        try:
            answer = client.post("/predict", json={"texts": TEXTS[:2]})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert answer.status_code == 503
        assert "log" in answer.json()["error"]
        assert path.read_bytes() == before
        rows_of(client, TEXTS[2:4])
    assert read_table(path)["text"][:] == TEXTS[:4]


def test_a_log_that_was_moved_away_begins_anew_and_one_that_was_cut_off_is_refused(service, tmp_path):
    path, names = tmp_path / "log.csv", column_names(service.recipe)
    log, columns = PredictionLog(path, names), {name: [0.5] for name in names}
    log.append(["one"], columns)
    path.rename(tmp_path / "yesterday.csv")
    log.append(["two"], columns)
    assert read_table(path)["text"][:] == ["two"]
    assert read_table(tmp_path / "yesterday.csv")["text"][:] == ["one"]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="may be cut off"):
        PredictionLog(path, names)


def test_messages_name_no_file_of_the_machine(service, served_place, monkeypatch):
    """Whatever a request gets, it has no path; errors of the fit are for standard error."""

    def fail(self, texts):
        raise ValueError(f"cannot read {served_place}/secret")

    with opened(service) as client:
        for texts in (["good " * 100], ["\ud83d"], ["x" * 300], [""]):
            body = json.dumps({"texts": texts})
            sentence = refusal(
                client.post("/predict", content=body, headers={"Content-Type": "application/json"})
            )
            assert "/" not in sentence
        for route in ("/", "/monitor", "/metrics", "/openapi.json", "/health"):
            assert str(served_place.parent) not in client.get(route).text
        monkeypatch.setattr(queue.Service, "_read", fail)
        assert "secret" not in client.post("/predict", json={"texts": ["a"]}).text
