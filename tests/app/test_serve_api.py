"""The description of the service in OpenAPI: it has every route, and answers are as it says."""

import re
import subprocess
import sys

import jax
import pytest

from bnlora.app.serve.service import load_service
from bnlora.app.serve.watch import Watching
from bnlora.assess.monitor import Monitor

pytest.importorskip("fastapi")
from builders.served import TEXTS, TOKEN, listening, opened  # noqa: E402

CONFIG = """
seed = 1
[generation]
max-examples = 300
allow-x00 = true
[checks.positive_data_acceptance]
# A schema can count letters, not tokens (413), and does not know the ids of predictions (404).
expected-statuses = ["2xx", "404", "413"]
[checks.negative_data_rejection]
# Too many rows or letters are refused with 413.
expected-statuses = ["400", "401", "403", "405", "413", "415", "422"]
"""


@pytest.fixture(scope="module")
def priced(served_place, service):
    """The service with prediction sets and actions."""
    made = load_service(
        jax.random.key(0), served_place / "fit", service.limits, 4, served_place / "costs.json"
    )
    return made.with_rule(served_place / "calibration.csv", "text", "label", "utf-8", 0.8)


def watching():
    return Watching(Monitor.start(jax.random.key(0), floor=0.5), {})


def described(client, route, method, status, headers=None):
    """The schema of an answer and the headers that it must have."""
    found = client.get("/openapi.json", headers=headers).json()["paths"][route][method]["responses"][
        str(status)
    ]
    (content,) = found["content"].values()
    return content["schema"], list(found.get("headers", {}))


def check(client, answer, headers=None):
    """Raise unless an answer is as the description of the service says."""
    jsonschema = pytest.importorskip("jsonschema")
    method, route = answer.request.method.lower(), answer.request.url.path
    schema, needed = described(client, route, method, answer.status_code, headers)
    value = answer.json() if answer.headers["content-type"] == "application/json" else answer.text
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)
    assert all(name in answer.headers for name in needed)


def test_every_route_is_described(client):
    content = client.get("/openapi.json").json()
    routes = {f"{m.upper()} {route}" for route, methods in content["paths"].items() for m in methods}
    known = client.get("/nothing").json()["error"].removeprefix("the routes are ")
    assert routes == set(known.split(", "))
    assert content["openapi"].startswith("3.1")


def test_answers_are_as_described(priced):
    with opened(priced, watching=watching()) as client:
        ids = [row["id"] for row in client.post("/predict", json={"texts": TEXTS}).json()["rows"]]
        labels = [{"id": name, "label": "good"} for name in ids]
        for answer in (
            client.post("/predict", json={"texts": TEXTS}),
            client.post("/predict", json={}),
            client.post("/predict", content="{}"),
            client.post("/predict", json={"texts": ["good"] * 7}),
            client.post("/labels", json={"labels": labels}),
            client.post("/labels", json={"labels": [{"id": "nobody", "label": 0}]}),
            client.get("/monitor"),
            client.get("/health"),
            client.get("/metrics"),
            client.get("/"),
            client.get("/health", headers={"Host": "evil.example"}),
        ):
            check(client, answer)
    with opened(priced, token=TOKEN) as client:
        token = {"Authorization": f"Bearer {TOKEN}"}
        check(client, client.get("/monitor"), token)
        check(client, client.get("/monitor", headers=token), token)
        check(client, client.get("/health"), token)


@pytest.mark.thorough
@pytest.mark.parametrize("token", [None, TOKEN], ids=["open", "token"])
def test_no_generated_request_breaks_the_description(priced, token, tmp_path):
    """Schemathesis, with all of its checks, against the service on a socket."""
    pytest.importorskip("schemathesis", reason="pip install schemathesis: the extra `fuzz`")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    with listening(priced, token=token, watching=watching()) as (address, _):
        where = f"http://127.0.0.1:{address[1]}/openapi.json"
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", tmp_path / "schemathesis.toml"]
        command += ["run", where, "--no-color", "--checks", "all"]
        command += [] if token is None else ["--header", f"Authorization: Bearer {token}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) generated", done.stdout)[1]) > 500, done.stdout
