"""The routes of the service: who may ask, how much, and what comes back.

| status | meaning                                                                    |
|--------|----------------------------------------------------------------------------|
| 200    | answered                                                                   |
| 400    | the connection was closed before the whole body came                       |
| 401    | no token, or another one                                                   |
| 403    | without a token only `localhost` and loopback addresses may name the host  |
| 404    | no such route, id or monitor                                               |
| 405    | the route has another method                                               |
| 408    | the body came too slowly                                                   |
| 413    | more bytes, rows, characters or tokens than the limits allow               |
| 415    | the body is not declared as `application/json`                             |
| 422    | the body is not what the route takes                                       |
| 429    | too many requests at a time; try again later                               |
| 500    | the service failed                                                         |
| 503    | there is not enough memory or space, or the service stops                  |

Every answer but 200 is `{"error": "one sentence"}`. Only what is no HTTP (400) and connections beyond the
limit (503) are answered by uvicorn itself, in plain text. A page of another site cannot send
`application/json` or another host name to a service on this machine, so it cannot use the service through the
user's browser.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bnlora.app.monitor import monitor_result
from bnlora.app.outcome import as_json
from bnlora.app.serve.bodies import Limits, Refused, labels_of, texts_of
from bnlora.app.serve.counts import Counts, Feedback, History
from bnlora.app.serve.log import PredictionLog
from bnlora.app.serve.page import POLICY, status_page
from bnlora.app.serve.queue import Queue
from bnlora.app.serve.schema import description
from bnlora.app.serve.service import Service
from bnlora.app.serve.watch import SAVE_SECONDS, Watching

if TYPE_CHECKING:  # the extra `serve` need not be installed
    from fastapi import FastAPI, Request, Response

BODY_SECONDS = 30.0
"""Seconds in which a body must come."""

HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Site:
    """What the routes share: the queue, counts and labels. Only the thread of the event loop changes them.

    Args:
        service: The fit that answers.
        log: Where predictions are appended, if anywhere.
        token: What a client must send; None if any client of this machine may ask.
        watching: The monitor, if there is one.
    """

    def __init__(
        self,
        service: Service,
        log: PredictionLog | None = None,
        token: str | None = None,
        watching: Watching | None = None,
    ):
        self.service, self.token, self.watching = service, token, watching
        self.counts, self.history, self.feedback = Counts(), History(), Feedback()
        self.queue = Queue(service, log)
        self._open = 0
        if watching is not None:
            self.counts.watch(watching.monitor)

    async def predict(self, request: "Request") -> dict[str, Any]:
        """Probabilities, uncertainty, sets and actions of texts."""
        limits = self.service.limits
        self._check_room()  # before the body is read
        texts = texts_of(await body_of(request, limits), limits)
        self._check_room()
        self._open += 1
        self.counts.open.set(self._open)
        try:
            answer = await self.queue.ask(texts)
        finally:
            self._open -= 1
            self.counts.open.set(self._open)
        self.history.add(answer.prediction)
        self.counts.rows(len(answer.rows), self.history.total)
        ids = [secrets.token_hex(8) for _ in answer.rows]
        self.feedback.remember(ids, answer.prediction)
        if self.watching is not None:
            self.watching.predicted(answer.prediction)
            self.counts.watch(self.watching.monitor)
        rows = [{"id": name, **row} for name, row in zip(ids, answer.rows, strict=True)]
        return {"kind": self.service.kind, "draws": self.service.num_draws, "rows": rows}

    def _check_room(self) -> None:
        """Refuse a request beyond the limit; one whose body still comes does not count."""
        most = self.service.limits.max_requests
        if self._open >= most:
            raise Refused(429, f"{most} requests wait or run already; try again later")

    async def labels(self, request: "Request") -> dict[str, Any]:
        """Take labels of earlier predictions; the answer has the scores so far."""
        limits = self.service.limits
        first = self.feedback.label(labels_of(await body_of(request, limits), self.service.names, limits))
        labelled = self.feedback.labelled()
        assert labelled is not None  # a request has at least one label
        scores = labelled.scores()
        self.counts.labels(scores)
        if self.watching is not None and first is not None:
            self.watching.labelled(first)
            self.counts.watch(self.watching.monitor)
        return scores

    async def monitor(self, request: "Request") -> dict[str, Any]:
        """Alarms, findings and running means of the monitor."""
        if self.watching is None:
            raise Refused(404, "this service has no monitor; --reference or --monitor-state starts one")
        return monitor_result(self.watching.monitor)

    async def health(self, request: "Request") -> dict[str, Any]:
        """Whether the service answers."""
        return {"status": "ok"}

    async def metrics(self, request: "Request") -> "Response":
        """Counts and means in Prometheus's text format."""
        from fastapi.responses import Response
        from prometheus_client import CONTENT_TYPE_LATEST

        return Response(self.counts.text(), headers={**HEADERS, "Content-Type": CONTENT_TYPE_LATEST})

    async def page(self, request: "Request") -> "Response":
        """The page."""
        from fastapi.responses import HTMLResponse

        page = status_page(
            self.service,
            self.counts,
            self.history,
            self.feedback.labelled(),
            None if self.watching is None else self.watching.monitor,
            reloads=request.query_params.get("reload") != "off",
        )
        return HTMLResponse(page, headers={**HEADERS, "Content-Security-Policy": POLICY})

    async def openapi(self, request: "Request") -> dict[str, Any]:
        """The routes, for programs."""
        return description(self.service, has_token=self.token is not None)

    def check(self, request: "Request", route: str) -> None:
        """Raise `Refused` unless the client may use a route."""
        if self.token is None:
            if not is_loopback(_host_of(request)):
                raise Refused(403, "this service answers only to localhost and loopback addresses")
        elif route != "/health" and not _has_token(request, self.token, basic=route == "/"):
            raise Refused(401, "unauthorised")


def build_app(site: Site) -> "FastAPI":
    """The application with its routes; it has no pages of FastAPI's own."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(site.queue.run()), asyncio.create_task(_saving(site.watching))]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    app = FastAPI(lifespan=running, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    routes: list[tuple[str, str, Callable[[Any], Awaitable[Any]]]] = [
        ("POST", "/predict", site.predict),
        ("POST", "/labels", site.labels),
        ("GET", "/monitor", site.monitor),
        ("GET", "/health", site.health),
        ("GET", "/metrics", site.metrics),
        ("GET", "/openapi.json", site.openapi),
        ("GET", "/", site.page),
    ]
    for method, route, handle in routes:
        app.add_api_route(route, _endpoint(site, route, handle), methods=[method], response_model=None)

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        status = getattr(error, "status_code", 404)
        site.counts.request(request.scope["path"], status, 0.0)  # `request.url` may be no address
        known = ", ".join(f"{method} {route}" for method, route, _ in routes)
        headers = HEADERS | dict(getattr(error, "headers", None) or {})  # those of 405 name the methods
        return JSONResponse({"error": f"the routes are {known}"}, status, headers=headers)

    app.add_exception_handler(404, unknown)
    app.add_exception_handler(405, unknown)
    return app


async def _saving(watching: Watching | None) -> None:
    """Store the monitor now and then, in another thread."""
    while watching is not None:
        await asyncio.sleep(SAVE_SECONDS)
        await asyncio.to_thread(watching.try_to_save)


def _endpoint(site: Site, route: str, handle: Callable[[Any], Awaitable[Any]]) -> Callable[..., Any]:
    """A route that checks the client, counts the request, and turns errors into one sentence."""
    from fastapi import Request
    from fastapi.responses import Response

    async def endpoint(request: Request) -> Response:
        start = time.perf_counter()
        try:
            site.check(request, route)
            found = await handle(request)
            response = found if isinstance(found, Response) else _json(200, found)
        except Refused as error:
            response = _json(error.status, {"error": error.sentence}, **_headers(error.status, route))
        except asyncio.CancelledError:  # `--grace` is over
            response = _json(503, {"error": "the service stopped before it could answer"})
        except MemoryError:
            response = _json(503, {"error": "there is not enough memory for this request; send fewer rows"})
        except Exception:
            logging.getLogger(__name__).exception("%s failed", route)
            response = _json(500, {"error": "the service failed; its standard error says why"})
        site.counts.request(route, response.status_code, time.perf_counter() - start)
        return response

    return endpoint


def _json(status: int, value: dict[str, Any], **headers: str) -> "Response":
    from fastapi.responses import Response

    return Response(as_json(value) + "\n", status, {**HEADERS, **headers}, media_type="application/json")


def _headers(status: int, route: str) -> dict[str, str]:
    """Headers that go with a refusal."""
    if status == 401:  # a browser asks for the token as the password of the page
        return {"WWW-Authenticate": 'Basic realm="bnlora"' if route == "/" else "Bearer"}
    return {"Retry-After": "1"} if status == 429 else {}


async def body_of(request: "Request", limits: Limits) -> bytes:
    """The body of a request, which is read only up to the limit.

    Raises:
        Refused: If it is too large, too slow, broken off, or not declared as JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "the body must have the header Content-Type: application/json")
    stated = request.headers.get("content-length", "")
    too_large = Refused(413, f"the body may have at most {limits.max_bytes:,} bytes")
    if stated.isdecimal() and (len(stated) > 15 or int(stated) > limits.max_bytes):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the connection was closed before the whole body came")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > limits.max_bytes:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body must come within {BODY_SECONDS:g} seconds") from None
    return bytes(body)


def _host_of(request: "Request") -> str:
    """The host that the client names, without the port."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def _has_token(request: "Request", token: str, *, basic: bool) -> bool:
    """Whether a request has the token; with `basic` also as a password. It is compared in constant time."""
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    got = sent.strip().encode("latin-1", "replace")
    if basic and scheme.lower() == "basic":
        try:
            got = base64.b64decode(got, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(got, token.encode())
