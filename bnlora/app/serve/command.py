"""`bnlora serve`: the command and its options."""

import os
from collections.abc import Mapping
from contextlib import ExitStack, closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.markup import escape

from bnlora._util.checks import check_level
from bnlora._util.files import room_for
from bnlora.app import options
from bnlora.app.kept import exit_if_elsewhere, keep
from bnlora.app.printing import print_result, reporting
from bnlora.app.serve.bodies import Limits
from bnlora.app.serve.log import PredictionLog
from bnlora.app.serve.server import bound, run, server_of
from bnlora.app.serve.service import Service, load_service
from bnlora.app.serve.watch import Watching, reference_of, start_watching
from bnlora.app.serve.web import Site, build_app, is_loopback
from bnlora.app.tasks import column_names
from bnlora.data.formats import ENCODING

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
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Table of texts like those that are expected, with or without labels: a monitor watches.",
            show_default=False,
        ),
    ] = None,
    monitor_state: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of the monitor; read if it exists, and written each minute and at the end.",
            show_default=False,
        ),
    ] = None,
    alpha: options.Alpha = None,
    floor: options.Floor = None,
    tolerance: options.Tolerance = None,
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
    with reporting() as progress, ExitStack() as opened:
        require_packages()
        check_level(level)
        token = token_for(host, token_file, os.environ)
        opened.enter_context(room_for(monitor_state))
        start = {"alpha": alpha, "floor": floor, "tolerance": tolerance}
        is_watched = reference is not None or monitor_state is not None
        if not is_watched and any(value is not None for value in start.values()):
            raise ValueError("--alpha, --floor and --tolerance are of a monitor: give --reference too")
        limits = Limits(max_bytes, max_rows, max_characters, max_tokens, max_requests, batch_rows)
        listening = opened.enter_context(closing(bound(host, port)))
        service = load_service(jax.random.key(seed), folder, limits, draws, costs)
        written = None if log is None else PredictionLog(log, column_names(service.recipe))
        if calibration is not None:
            service = service.with_rule(calibration, text, label, encoding, level)
            _warn(progress, "" if service.rule is None else service.rule.caution)
        watching = None
        if is_watched:
            known = None if reference is None else reference_of(service, reference, text, label, encoding)
            key = jax.random.fold_in(jax.random.key(seed), 1)
            watching = start_watching(key, folder, service, monitor_state, known, start, seed)
        service.warm()
        result, shown = _started(service, host, listening.getsockname()[1], token, watching)
        app = build_app(Site(service, written, token, watching))
        started = partial(print_result, result, shown, json=json)
        run(server_of(app, grace, limits.max_requests, started), listening)
        if watching is not None:
            _keep(watching, progress)


def _started(
    service: Service, host: str, port: int, token: str | None, watching: Watching | None
) -> tuple[dict[str, Any], str]:
    """What is printed once the service listens."""
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    shown = f"{service.name} answers at {address}; Ctrl-C stops it"
    result = {"address": address, "kind": service.kind, "token": token is not None}
    if watching is not None:
        result["monitored"] = watching.monitor.num_rows
        shown += f"\na monitor watches, with {watching.monitor.num_rows:,} rows so far"
    return result, shown


def _keep(watching: Watching, console: Console) -> None:
    """Store the monitor at the end, elsewhere if its file cannot be written."""
    if watching.file is not None and watching.monitor is not watching.saved:
        exit_if_elsewhere(watching.file, keep(watching.file, watching.write, console))


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
    token = environment.get(TOKEN) if file is None else file.read_text(encoding="ascii", errors="replace")
    if token is None:
        if is_loopback(host):
            return None
        raise ValueError(f"other machines can reach {host!r}: give a token with --token-file or {TOKEN}")
    token = token.strip()
    if len(token) < SHORTEST_TOKEN or not all("!" <= letter <= "~" for letter in token):
        raise ValueError(
            f"the token must have at least {SHORTEST_TOKEN} characters, all of them visible ASCII; "
            "python -c 'import secrets; print(secrets.token_hex())' makes one"
        )
    return token


def _warn(console: Console, caution: str) -> None:
    if caution:
        console.print(f"[bold]caution:[/] {escape(caution)}", highlight=False, soft_wrap=True)
