"""ChildProcess: the child as its parent holds it, from its start over its last words to its end."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Sequence

from ..client import EngineStartError

log = logging.getLogger(__name__)

_REAP_SECONDS = 5.0  # for the kernel to take a killed process down
_QUOTED_LINES = 20  # of what it said, in the message that tells its death
_CHUNK = 1 << 16  # bytes of a read, and of a line


class ChildProcess:
    """A running child. `pid`; `words`, the descriptor of what it prints, for poll().

    What it prints is logged line by line, and its last lines are kept.
    """

    def __init__(self, command: Sequence[str], sock: socket.socket) -> None:
        """Start it, with `--fd N` of the socket added. Errors: EngineStartError."""
        try:
            self._process = subprocess.Popen(
                [*command, "--fd", str(sock.fileno())],
                pass_fds=[sock.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,  # stdout is the parent's: a pipe may read it
                start_new_session=True,  # Ctrl-C is the parent's to act on
            )
        except OSError as exc:
            raise EngineStartError(
                f"the engine's process could not be started: {exc}", kind=type(exc).__name__
            ) from exc
        assert self._process.stdout is not None  # ours: a pipe was asked for
        self._output = self._process.stdout
        self.pid = self._process.pid
        self.words = self._output.fileno()
        os.set_blocking(self.words, False)
        self._lines: collections.deque[str] = collections.deque(maxlen=_QUOTED_LINES)
        self._unfinished = b""  # of the line that it has not ended

    @property
    def ended_well(self) -> bool:
        """Once reaped."""
        return self._process.returncode == 0

    def listen(self) -> bool:
        """Take what it has printed, once poll() has something; False where it prints no more."""
        data = os.read(self.words, _CHUNK)
        self._keep(data)
        return bool(data)

    def _keep(self, data: bytes) -> None:
        """What the child wrote; b"" where it writes no more, which ends its last line."""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        self._unfinished = self._unfinished[-_CHUNK:]
        if not data and self._unfinished:
            lines, self._unfinished = [*lines, self._unfinished], b""
        for line in lines:
            words = "".join(c if c.isprintable() else "?" for c in line.decode("utf-8", "replace"))
            self._lines.append(words)
            log.warning("engine process: %s", words)

    def kill(self) -> None:
        """It and what it has started: its session is its own. Harmless once it is reaped."""
        if self._process.returncode is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self._process.kill()

    def reap(self, patience: float) -> None:
        """Leave nothing of it but its last words; it has `patience` seconds to end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if patience:
                self._process.wait(patience)
        self.kill()
        try:
            self._process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("process %d does not die", self.pid)
        with contextlib.suppress(OSError):
            self._keep(self._output.read() or b"")
        self._keep(b"")
        self._output.close()

    def epitaph(self, how: str | None) -> str:
        """Once reaped: how it came to its end (None: by itself), and what it said last."""
        text = f"the engine's process {self.pid} {how or _ending(self._process.returncode)}"
        if self._lines:
            text += "; it said last:\n  " + "\n  ".join(self._lines)
        return text


def _ending(code: int | None) -> str:
    if code is None:
        return "ended"
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


__all__ = ["ChildProcess"]
