"""Load on `bnlora serve`: rows per second, latency and memory, and a stop while requests are open.

The service is a process of its own. Its clients are threads of this process on the same processors, each with
one connection. Every client sends its next request as soon as it has an answer, so the latency of many
clients is mostly waiting. Memory is that of the process of the service (VmRSS). At the end the service gets
SIGTERM: each request that was sent before must be answered, and each row of the log must reach a client.
"""

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.report import Report
from bnlora.data.assets import vader_domains
from bnlora.data.tables import write_table

FIT = [
    "--base",
    "smollm2",
    "--word",
    " negative",
    "--word",
    " positive",
    "--top-layers",
    "2",
    "--steps",
    "20",
]
WARM_UP = 5.0  # seconds of clients at work that are not counted


@dataclass
class Request:
    """What became of one request.

    Attributes:
        sent: When it was sent completely.
        seconds: From then to its answer.
        status: The status; 0 if the connection was closed or refused.
        rows: Number of rows of the answer.
    """

    sent: float
    seconds: float
    status: int
    rows: int


@dataclass
class Clients:
    """Clients that send requests until they are told to stop, or the service is gone.

    Attributes:
        address: Host and port.
        bodies: Bodies of requests, which take turns.
        requests: What became of each request.
    """

    address: str
    bodies: Sequence[bytes]
    requests: list[Request] = field(default_factory=list)

    @contextmanager
    def running(self, count: int) -> Iterator[None]:
        """Let `count` clients run during the block; they end with the answers to their last requests."""
        done = threading.Event()
        threads = [threading.Thread(target=self._ask, args=(i, done)) for i in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()

    def warm(self) -> None:
        """Send every body once, and once with its texts twice.

        A row alone and several rows have programs of their own, one for each width.
        """
        connection = http.client.HTTPConnection(self.address, timeout=300)
        twice = [json.dumps({"texts": 2 * json.loads(body)["texts"]}).encode() for body in self.bodies]
        self.requests += [self._asked(connection, body) for body in (*self.bodies, *twice)]

    def _ask(self, first: int, done: threading.Event) -> None:
        connection, turn = http.client.HTTPConnection(self.address, timeout=300), first
        while not done.is_set():
            one = self._asked(connection, self.bodies[turn % len(self.bodies)])
            self.requests.append(one)
            turn += 7
            if not one.status:
                return

    def _asked(self, connection: http.client.HTTPConnection, body: bytes) -> Request:
        """One request and its answer."""
        kind = {"Content-Type": "application/json"}
        one = Request(time.monotonic(), 0.0, 0, 0)
        try:
            connection.request("POST", "/predict", body, kind)
            one.sent = time.monotonic()
            answer = connection.getresponse()
            content = json.loads(answer.read())
            one.status, one.rows = answer.status, len(content.get("rows", []))
        except (OSError, http.client.HTTPException):
            connection.close()
        one.seconds = time.monotonic() - one.sent
        return one


def options(parser: argparse.ArgumentParser) -> None:
    """The fit, the load, and its time."""
    parser.add_argument("--fit", type=Path, help="folder of a fit; a quick one of SmolLM2 if omitted")
    parser.add_argument("--clients", type=int, nargs=2, default=[1, 8], help="clients at a time, two levels")
    parser.add_argument("--rows", type=int, default=4, help="texts of a request")
    parser.add_argument("--letters", type=int, default=400, help="of a text, which is cut there")
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each level, after the warm-up")


def run(given: argparse.Namespace, report: Report) -> None:
    """Load at both levels, then a stop under the higher one."""
    texts = list(vader_domains()["movies"]["text"])
    bodies = [
        json.dumps({"texts": [t[: given.letters] for t in texts[i : i + given.rows]]}).encode()
        for i in range(64, 64 + 40 * given.rows, given.rows)
    ]
    with tempfile.TemporaryDirectory() as folder:
        fit = given.fit or _fitted(Path(folder), report)
        log = Path(folder) / "log.jsonl"
        with _service(fit, log, given.draws) as (process, address):
            clients = Clients(address, bodies)
            clients.warm()
            table = report.table(
                "Load",
                ("clients", "requests", "rows/s", "p50, ms", "p95, ms", "p99, ms", "MiB before", "MiB after"),
            )
            for count in given.clients:
                table.row(count, *_level(process.pid, clients, count, given.seconds))
            _note(report, given, process.pid)
            _stop(process, clients, given.clients[-1], log, report)


def _fitted(folder: Path, report: Report) -> Path:
    report.progress("a quick fit of SmolLM2")
    write_table(vader_domains()["movies"].select(range(64)), folder / "train.csv")
    command = [sys.executable, "-m", "bnlora", "fit", folder / "train.csv", "--out", folder / "fit", *FIT]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "fit"


@contextmanager
def _service(fit: Path, log: Path, draws: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process of the service, and its host and port."""
    command = [sys.executable, "-m", "bnlora", "serve", fit, "--port", "0", "--json", "--log", log]
    process = subprocess.Popen(
        [*command, "--draws", str(draws)], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        if not first:
            raise RuntimeError("the service has not started")
        yield process, json.loads(first)["address"].removeprefix("http://")
    finally:
        process.kill()
        process.wait()


def _level(pid: int, clients: Clients, count: int, seconds: float) -> list[str]:
    """Cells of one level: requests, rows per second, quantiles of the latency, memory."""
    with clients.running(count):
        time.sleep(WARM_UP)
        begin, before = time.monotonic(), _memory(pid)
        time.sleep(seconds)
        end, after = time.monotonic(), _memory(pid)
    counted = [x for x in clients.requests if begin <= x.sent + x.seconds < end]
    failed = [x for x in counted if x.status != 200]
    if failed or not counted:
        statuses = sorted({x.status for x in failed})
        raise RuntimeError(f"{len(failed)} of {len(counted)} requests failed, with status {statuses}")
    late = np.quantile([x.seconds for x in counted], [0.5, 0.95, 0.99])
    rate = sum(x.rows for x in counted) / (end - begin)
    return [f"{len(counted):,}", f"{rate:.1f}", *(f"{1000 * x:,.0f}" for x in late), before, after]


def _note(report: Report, given: argparse.Namespace, pid: int) -> None:
    processors = len(os.sched_getaffinity(pid))
    shared = f"share {processors} processor{'s' if processors > 1 else ''}"
    report.text(
        "Load",
        f"{given.rows} sentences a request, {given.draws} draws, {given.seconds:g} s a level; "
        f"service and clients {shared}.",
    )


def _stop(process: subprocess.Popen[str], clients: Clients, count: int, log: Path, report: Report) -> None:
    """SIGTERM while clients send; nothing that was sent before it may be lost."""
    with clients.running(count):
        time.sleep(WARM_UP)
        signalled = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(300)
    opened = [x for x in clients.requests if x.sent < signalled < x.sent + x.seconds]
    answered = sum(x.status == 200 for x in opened)
    late = [x for x in clients.requests if x.sent >= signalled]
    logged = len(log.read_text(encoding="utf-8").splitlines())
    rows = sum(x.rows for x in clients.requests)
    table = report.table("A stop under load", ("what", "number"))
    table.row("requests open at SIGTERM", len(opened))
    table.row("of these answered", answered)
    table.row("later requests answered", sum(x.status == 200 for x in late))
    table.row("later requests refused: the connection was closed", sum(x.status == 0 for x in late))
    table.row("rows in the log", f"{logged:,}")
    table.row("rows that clients got", f"{rows:,}")
    table.row("exit code", code)
    if answered != len(opened) or logged != rows or code:
        raise RuntimeError("a stop has lost requests, or failed")


def _memory(pid: int) -> str:
    """Resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return f"{kibibytes / 1024:,.0f}"
