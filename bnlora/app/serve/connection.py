"""Time limits of a connection that uvicorn lacks: requests that begin slowly, answers that nobody reads.

`web` limits the time of a body. Without limits of the other parts, a client that sends or reads a byte now
and then could hold its connection for ever, and a few dozen of them would block the service.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the extra `serve` need not be installed
    from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""Seconds in which first line and headers must come, from the connection or from their first byte on."""

READ_SECONDS = 30.0
"""Seconds in which a client must read something of an answer that does not fit into the buffers."""


class _Deadline:
    """A time after which something is done, unless it is stopped before."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop, seconds: float, then: Callable[[], None]) -> None:
        """Let the time run; nothing changes if it runs already."""
        if self._timer is None:
            self._timer = loop.call_later(seconds, then)

    def stop(self) -> None:
        """Stop the time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def limited_protocol() -> "type[H11Protocol]":
    """The protocol of uvicorn for HTTP/1.1 with these limits."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Limited(H11Protocol):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self._head, self._unread = _Deadline(), _Deadline()

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._limit_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._head.stop()
            self._unread.stop()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._limit_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread.start(self.loop, READ_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._unread.stop()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            if self.transport.get_write_buffer_size():  # closing waits for the client otherwise
                self._unread.start(self.loop, READ_SECONDS, self.transport.abort)

        def _limit_head(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:  # a request is under way
                self._head.stop()
            else:
                self._head.start(self.loop, HEAD_SECONDS, self.transport.close)

    return Limited
