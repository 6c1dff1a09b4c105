"""The process of the service: a socket, and uvicorn, which listens until it is asked to stop."""

import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bnlora.app.serve.connection import limited_protocol

if TYPE_CHECKING:  # the extra `serve` need not be installed
    from fastapi import FastAPI
    from uvicorn import Server


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


def server_of(app: "FastAPI", grace: int, most: int, started: Callable[[], None]) -> "Server":
    """The server of an application.

    Args:
        app: The application.
        grace: Seconds after which open requests are given up at a stop.
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

    return Server(
        uvicorn.Config(  # uvicorn's own logging would close the streams of other packages' handlers
            app, loop="asyncio", http=limited_protocol(), ws="none", lifespan="on", log_config=None,
            log_level="warning", access_log=False, proxy_headers=False, server_header=False,
            limit_concurrency=4 * most + 16, timeout_graceful_shutdown=grace,
        )
    )  # fmt: skip


def run(server: "Server", listening: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; requests that are open then are answered first."""

    def stop(number: int, frame: Any) -> None:
        server.should_exit = True

    # Uvicorn raises a signal again after it has stopped; then and before it listens, these handlers take it.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
