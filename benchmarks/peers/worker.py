"""The parent's side of a worker: start, ask with a time limit, pause, end, and say why it died."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerFailed(Exception):
    """A worker that died, hung, refused or spoke nonsense; the message ends with its last lines."""


class Refused(WorkerFailed):
    """The worker answered with an error and lives on."""


class Worker:
    """One process, started at once. It leads a process group, so its children end with it.

    Errors of every call: WorkerFailed. After one that is not Refused the worker is gone.
    """

    def __init__(
        self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the worker lives
        self.started = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise WorkerFailed(str(error)) from error
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._paused = False

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next line's object."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise self._failed(f"no answer in {timeout:.0f} s") from None
        if line is None:
            try:
                status: object = self._process.wait(5)
            except subprocess.TimeoutExpired:
                status = "none yet"
            raise self._failed(f"it ended (exit status {status})")
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._failed(f"it said {line[:200]!r}, which is no JSON object")
        if "error" in value:
            raise Refused(str(value["error"]))
        return value

    def ask(self, timeout: float, **asked: Any) -> dict[str, Any]:
        if self._paused:
            self.go()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is dead; receive() says how
        return self.receive(timeout)

    def pause(self) -> None:
        """Stop the whole group, so that what it spins on costs the others nothing."""
        self._signal(signal.SIGSTOP)
        self._paused = True

    def go(self) -> None:
        self._signal(signal.SIGCONT)
        self._paused = False

    def close(self) -> None:
        """End it. Harmless when it is gone."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------- private

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._lines.put(line)
        except ValueError:  # closed by close()
            pass
        self._lines.put(None)

    def _failed(self, what: str) -> WorkerFailed:
        self._errors.seek(0)
        lines = self._errors.read()[-8192:].decode("utf-8", "replace").splitlines()
        said = "\n".join("  | " + line[:300] for line in lines[-8:])
        self.close()
        return WorkerFailed(
            f"{what}; its last lines:\n{said}" if said else f"{what}; it said nothing"
        )

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass
