"""A server in a process of its own, for the benchmarks that ask it over HTTP."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen


@contextmanager
def serving(model: str, port: int, *flags: str) -> Iterator[int]:
    """`engineroom serve` on this port; the process id, once it is ready."""
    command = [sys.executable, "-m", "engineroom", "serve", model, "--port", str(port), *flags]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            _wait(server, port)
            yield server.pid
        finally:
            server.send_signal(signal.SIGTERM)


def family(pid: int) -> list[int]:
    """A process and all that it started, by any of its threads."""
    found = [pid]
    for process in found:
        lists = Path(f"/proc/{process}/task").glob("*/children")
        found += [int(child) for path in lists for child in path.read_text().split()]
    return found


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(600):
        try:
            with urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5):
                return
        except OSError:
            if server.poll() is not None:
                raise SystemExit("the server ended before it was ready") from None
            time.sleep(0.1)
    raise SystemExit("the server was not ready within a minute")
