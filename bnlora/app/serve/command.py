"""`bnlora serve`: the command, and the process that listens until it is asked to stop."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import typer
from rich.console import Console
from rich.markup import escape

from bnlora._util.checks import check_level
from bnlora.app import options
from bnlora.app.printing import print_result, reporting
from bnlora.app.serve.bodies import Limits
from bnlora.app.serve.log import PredictionLog
from bnlora.app.serve.service import load_service
from bnlora.app.serve.web import Site, build_app, is_loopback
from bnlora.app.tasks import column_names
from bnlora.data.formats import ENCODING

if TYPE_CHECKING:
    from fastapi import FastAPI

NEEDS = ("fastapi", "uvicorn", "prometheus_client")
TOKEN = "BNLORA_TOKEN"
"""Variable of the environment that may have the token."""

SHORTEST_TOKEN = 16


def serve_command(
    folder: options.Folder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help=f"File with the token that clients must send; or set {TOKEN}. Required unless only this "
            "machine can reach the address.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Table with labels that calibrates prediction sets.", show_default=False),
    ] = None,
    text: options.TextColumn = "text",
    label: options.LabelColumn = "label",
    encoding: options.Encoding = ENCODING,
    level: Annotated[float, typer.Option(help="Probability that a set contains the true class.")] = 0.9,
    costs: Annotated[
        Path | None,
        typer.Option(help="JSON file with the costs of actions for each class.", show_default=False),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(help="File (.csv, .jsonl) to append texts and predictions to.", show_default=False),
    ] = None,
    max_bytes: Annotated[int, typer.Option(help="Largest body.", min=1)] = Limits.max_bytes,
    max_rows: Annotated[int, typer.Option(help="Most texts of a request.", min=1)] = Limits.max_rows,
    max_characters: Annotated[int, typer.Option(help="Longest text.", min=1)] = Limits.max_characters,
    max_tokens: Annotated[
        int, typer.Option(help="Longest row in tokens; that of the fit if it is lower.", min=1)
    ] = Limits.max_tokens,
    max_requests: Annotated[
        int, typer.Option(help="Most requests that wait or run at a time.", min=1)
    ] = Limits.max_requests,
    batch_rows: Annotated[int, typer.Option(help="Rows that run together.", min=2)] = Limits.batch_rows,
    grace: Annotated[int, typer.Option(help="Seconds that a stop waits for open requests.", min=1)] = 60,
    draws: options.Draws = 16,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Answer texts over HTTP: probabilities, uncertainty, prediction sets, actions.

    Needs the packages of the extra `serve`: pip install fastapi uvicorn prometheus-client.
    """
    with reporting() as progress:
        require_packages()
        check_level(level)
        token = token_for(host, token_file, os.environ)
        limits = Limits(max_bytes, max_rows, max_characters, max_tokens, max_requests, batch_rows)
        with closing(bound(host, port)) as listening:
            service = load_service(jax.random.key(seed), folder, limits, draws, costs)
            written = None if log is None else PredictionLog(log, column_names(service.recipe))
            if calibration is not None:
                service = service.with_rule(calibration, text, label, encoding, level)
                _warn(progress, "" if service.rule is None else service.rule.caution)
            service.warm()
            address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
            result = {"address": address, "kind": service.kind, "token": token is not None}
            shown = f"{service.name} answers at {address}; Ctrl-C stops it"
            started = partial(print_result, result, shown, json=json)
            run(build_app(Site(service, written, token)), listening, grace, limits.max_requests, started)


def require_packages() -> None:
    """Raise `ValueError` with the command that installs them if packages of the extra are missing."""
    missing = [name.replace("_", "-") for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ValueError(f"bnlora serve needs {', '.join(missing)}: pip install {' '.join(missing)}")


def token_for(host: str, file: Path | None, environment: Mapping[str, str]) -> str | None:
    """The token of the service; None without one, which only a loopback address allows.

    Args:
        host: Address of the service.
        file: File of the token; spaces and line ends around it are dropped.
        environment: Variables of the environment.

    Raises:
        ValueError: If a token is required and there is none, or it is too short.
        OSError: If the file cannot be read.
    """
    token = environment.get(TOKEN) if file is None else file.read_text(encoding="utf-8")
    if token is None:
        if is_loopback(host):
            return None
        raise ValueError(f"other machines can reach {host!r}: give a token with --token-file or {TOKEN}")
    token = token.strip()
    if len(token) < SHORTEST_TOKEN or not token.isascii():
        raise ValueError(f"the token must have at least {SHORTEST_TOKEN} characters, all of them ASCII")
    return token


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, so that a port in use is known before the fit is loaded.

    Raises:
        OSError: If the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host!r}, port {port} ({error.strerror or error})") from error
    return made


def run(app: "FastAPI", listening: socket.socket, grace: int, most: int, started: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests that are open then are answered first.

    Args:
        app: The application.
        listening: The socket.
        grace: Seconds after which open requests are given up.
        most: Most requests for predictions at a time; some more connections are accepted.
        started: Called once the service listens.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                started()
                sys.stdout.flush()  # a pipe keeps the line otherwise

    server = Server(
        uvicorn.Config(
            app, loop="asyncio", http="h11", ws="none", lifespan="on", log_level="warning", access_log=False,
            proxy_headers=False, server_header=False, limit_concurrency=4 * most + 16,
            timeout_graceful_shutdown=grace,
        )
    )  # fmt: skip

    def stop(number: int, frame: Any) -> None:
        server.should_exit = True

    # Uvicorn raises a signal again after it has stopped; then and before it listens, these handlers take it.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warn(console: Console, caution: str) -> None:
    if caution:
        console.print(f"[bold]caution:[/] {escape(caution)}", highlight=False, soft_wrap=True)
