"""uvicorn's HTTP connection, with bounds, and open to those who write to it without a task."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .sse import CONNECTION, PIPE


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's, which would collect headers without end."""

    max_header_bytes = 64 << 10

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > self.max_header_bytes + 4096:  # up to there the door answers
            self.transport.close()
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        scope = self.scope
        super().on_headers_complete()
        cycle = self.cycle  # its task runs later
        if cycle is not None and cycle.scope is scope and BodyWriter.knows(cycle):
            scope["extensions"] = {PIPE: {CONNECTION: BodyWriter(cycle)}}


class BodyWriter:
    """Parts of an answer's body, written as the cycle's `send` does but for its coroutine."""

    __slots__ = ("_cycle",)

    @staticmethod
    def knows(cycle: object) -> bool:
        """Whether a cycle is as used here, which uvicorn promises nobody; where it is not,
        everything goes through `send`."""
        parts = ("chunked_encoding", "transport", "flow", "response_complete")
        return all(hasattr(cycle, name) for name in parts) and hasattr(cycle.flow, "write_paused")  # type: ignore[attr-defined]

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_open(self) -> bool:
        """False where `send` would wait, drop the part, or frame it in another way."""
        cycle = self._cycle
        return (
            cycle.chunked_encoding is True
            and not cycle.transport.is_closing()  # which the cycle is told a turn later
            and not cycle.flow.write_paused
            and not cycle.response_complete
        )

    def write(self, part: bytes) -> None:
        """One chunk (RFC 9112, 7.1)."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))


__all__ = ["BodyWriter", "BoundedProtocol"]
