"""Time limits of a connection that uvicorn lacks: requests that begin slowly, answers that nobody reads.

`web` limits the time of a body. Without limits of the other parts, a client that sends or reads a byte now
and then could hold its connection for ever, and a few dozen of them would block the service.
"""

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the extra `serve` need not be installed
    from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""Seconds in which first line and headers must come, from the connection or from their first byte on."""

READ_SECONDS = 30.0
"""Seconds in which a client must read something of an answer that does not fit into the buffers."""


def limited_protocol() -> "type[H11Protocol]":
    """The protocol of uvicorn for HTTP/1.1 with these limits."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Limited(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._limit_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for timer in (self._head, self._unread):
                if timer is not None:
                    timer.cancel()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._limit_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            if self.transport.get_write_buffer_size():  # closing waits for the client otherwise
                self.loop.call_later(READ_SECONDS, self.transport.abort)

        def _limit_head(self) -> None:
            """Start the time of a head that has not come, and stop it once a request is under way."""
            if self.cycle is not None and not self.cycle.response_complete:
                if self._head is not None:
                    self._head.cancel()
                    self._head = None
            elif self._head is None:
                self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    return Limited
