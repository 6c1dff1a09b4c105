"""A small fit that `bnlora serve` answers from, and clients of it in the test's own process."""

import json
import threading
import time
from contextlib import contextmanager

from builders.commands import WORDS, call, reviews
from fastapi.testclient import TestClient

from bnlora.app.serve.bodies import Limits
from bnlora.app.serve.server import bound, server_of
from bnlora.app.serve.web import Site, build_app
from bnlora.data.tables import write_table

SMALL = ["--steps", "3", "--batch-size", "4", "--rank", "2", "--top-layers", "1", "--target", "lm_head"]
LIMITS = Limits(max_bytes=4000, max_rows=6, max_characters=200, max_tokens=24, max_requests=3, batch_rows=4)
TOKEN = "a-token-of-the-tests"
TEXTS = reviews(5, seed=3)["text"][:]


def written_place(folder, base):
    """A folder with tables and a fit."""
    write_table(reviews(12), folder / "train.csv")
    write_table(reviews(40, seed=1), folder / "calibration.csv")
    write_table(reviews(5, seed=3).remove_columns("label"), folder / "new.csv")
    costs = {"actions": ["drop", "ask", "keep"], "costs": {"good": [5, 0.1, 0], "bad": [0, 0.1, 5]}}
    (folder / "costs.json").write_text(json.dumps(costs))
    done = call("fit", folder / "train.csv", "--out", folder / "fit", "--base", base, *WORDS, *SMALL)
    assert done.exit_code == 0, done.output
    return folder


def opened(service, log=None, token=None, watching=None) -> TestClient:
    """A client on this machine; it is a context."""
    return TestClient(build_app(Site(service, log, token, watching)), base_url="http://127.0.0.1:8000")


@contextmanager
def listening(service, log=None, token=None, watching=None, grace=30):
    """The address of a real server in a thread, and the server."""
    ready, place = threading.Event(), bound("127.0.0.1", 0)
    address = place.getsockname()
    app = build_app(Site(service, log, token, watching))
    server = server_of(app, grace, LIMITS.max_requests, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        assert ready.wait(60)
        yield address, server
    finally:
        server.should_exit = True
        thread.join(60)
        place.close()
    assert not thread.is_alive()


def rows_of(client, texts=TEXTS) -> list:
    """The rows of the answer to texts."""
    answer = client.post("/predict", json={"texts": texts})
    assert answer.status_code == 200, answer.text
    return answer.json()["rows"]


def refusal(answer) -> str:
    """The one sentence of a refused request."""
    assert 400 <= answer.status_code < 500, answer.text
    (sentence,) = answer.json().values()
    assert sentence
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    return sentence


def wait_for(condition) -> None:
    """Wait until something is true, at most a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
