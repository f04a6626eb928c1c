"""Reader: a socket's input, read by the thread that watches it or by an event loop in its stead."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable

from ..client import describe

log = logging.getLogger(__name__)

ENDED = "ended"  # why nothing more is read, where the other side has closed
_CHUNK = 1 << 16  # bytes of a read


class Reader:
    """Of one socket, which it closes.

    `serve` is called with what has arrived, by one thread at a time; where it returns why that was
    the last, nothing more is read.
    """

    def __init__(self, sock: socket.socket, serve: Callable[[memoryview], str | None]) -> None:
        self.over: str | None = None  # why nothing more is read
        self._sock: socket.socket | None = sock  # until close()
        self._serve = serve
        self._buffer = bytearray(_CHUNK)
        self._reading = threading.Lock()  # of the socket's input and what it leads to
        self._pumper = 0  # the thread in pump()
        self._lock = threading.RLock()  # of the two below
        self._on_loop: _OnLoop | None = None  # reads in the watching thread's stead

    def fileno(self) -> int:
        """For poll(); -1 once it is closed."""
        return -1 if self._sock is None else self._sock.fileno()

    @property
    def is_left_to_a_loop(self) -> bool:
        return self._on_loop is not None

    @property
    def is_here(self) -> bool:
        """True where the caller was called by serve()."""
        return self._pumper == threading.get_ident()

    def pump(self) -> bool:
        """Serve what has arrived; False where nothing has. The last of it sets `over`."""
        with self._reading:
            sock = self._sock
            if sock is None or self.over is not None:
                return False
            self._pumper = threading.get_ident()
            try:
                count = sock.recv_into(self._buffer, _CHUNK, socket.MSG_DONTWAIT)
                self.over = self._serve(memoryview(self._buffer)[:count]) if count else ENDED
            except BlockingIOError:
                return False  # another thread was faster
            except ConnectionError:  # the other side left what we sent unread
                self.over = ENDED
            except OSError as exc:
                self.over = f"cannot be read from: {exc}"
            except BaseException as exc:  # ours; requests must not wait for ever
                log.exception("reading from the engine's process failed")
                self.over = f"was given up: {describe(exc)}"
            finally:
                self._pumper = 0
            if self.over is not None:
                self.leave_loop()  # it would find the end again and again
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # which wakes the thread that watches
            return True

    def read_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """On that loop, which is running: let it read from now on."""
        on_loop = self._on_loop
        if on_loop is not None and on_loop.loop is loop:
            return
        with self._lock:
            self.leave_loop()
            if self._sock is not None and self.over is None:
                self._on_loop = _OnLoop(loop, self._sock, self.pump)

    def leave_loop(self) -> None:
        """Let the watching thread read again."""
        with self._lock:
            left, self._on_loop = self._on_loop, None
            if left is not None:
                left.leave()

    def close(self) -> None:
        with self._lock:
            sock, self._sock = self._sock, None
            self.leave_loop()
        if sock is not None:
            sock.close()


class _OnLoop:
    """An event loop's own handle of the socket: closed by that loop, which alone may forget it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, pump: Callable[[], object]
    ) -> None:
        """On the loop."""
        self.loop = loop
        self._sock = sock.dup()
        loop.add_reader(self._sock, pump)

    def leave(self) -> None:
        """From any thread."""
        try:
            self.loop.call_soon_threadsafe(self._leave)
        except RuntimeError:  # the loop is closed, its selector with it
            self._sock.close()

    def _leave(self) -> None:
        self.loop.remove_reader(self._sock)
        self._sock.close()


__all__ = ["ENDED", "Reader"]
