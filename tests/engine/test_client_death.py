"""How a child may die or hang, and its parent: each is noticed in time, with the reason."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from engineroom.engine import wire
from engineroom.engine.client import EngineDeadError, EngineStartError
from engineroom.engine.client_process import ProcessClient
from engineroom.engine.config import EngineConfig
from engineroom.engine.core.sampling_params import SamplingParams
from tests.engine.client_tools import CHILD, LONG, Collector, is_running, submit, until
from tests.engine.test_wire import PICKLES

FAKE = EngineConfig(model="paced")
ONE = SamplingParams(max_tokens=1)


@pytest.fixture
def make() -> Iterator[Any]:
    made: list[ProcessClient] = []

    def start(**options: Any) -> ProcessClient:
        made.append(ProcessClient(FAKE, command=CHILD, **options))
        made[-1].start()
        return made[-1]

    yield start
    for client in made:
        client.close()


def streams(client: ProcessClient, number: int = 20) -> list[Collector]:
    collectors = [submit(client, f"r{i}", params=LONG) for i in range(number)]
    for collector in collectors:
        collector.wait_first()
    return collectors


def assert_all_ended(collectors: list[Collector], by: float, match: str) -> None:
    for collector in collectors:
        error = collector.error(max(by - time.monotonic(), 0.01))
        assert isinstance(error, EngineDeadError) and match in str(error), error
        assert collector.ended_at <= by and collector.endings == 1


def test_a_killed_child_is_noticed_at_once(make: Any) -> None:
    client = make()
    collectors = streams(client)
    os.kill(client.pid, signal.SIGKILL)
    assert_all_ended(collectors, time.monotonic() + 5.0, "SIGKILL")
    assert not client.is_alive
    assert not os.path.exists(f"/proc/{client.pid}")  # reaped, no zombie
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        submit(client, "too late")


def test_a_child_that_ends_itself_is_quoted(make: Any) -> None:
    client = make()
    error = submit(client, "r", "exit:").error(5.0)
    assert "ended with code 7" in str(error) and "last words" in str(error)


def test_a_call_in_flight_ends_too(make: Any) -> None:
    client = make()
    submit(client, "r", "hang:30", ONE)
    answer = client._link.call(lambda ticket: wire.Stats(ticket=ticket))
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        answer.result(5.0)


def test_a_stopped_child_is_noticed_by_its_heart(make: Any) -> None:
    client = make(watchdog=2.0)
    collectors = streams(client)
    os.kill(client.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    for i in range(600):  # writing to it must block nobody: more than a socket holds
        submit(client, f"unheard{i}", "x" * 1000)
    assert time.monotonic() - stopped < 1.8
    assert_all_ended(collectors, stopped + 8.0, "no heartbeat")
    assert collectors[0].ended_at - stopped >= 1.9
    assert not os.path.exists(f"/proc/{client.pid}")


def test_a_long_step_is_no_hang(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    client = make(watchdog=0.5)
    assert submit(client, "r", "hang:1.6", ONE).output().finished
    assert "step has been running" in caplog.text
    assert client.is_alive


def test_an_endless_step_is_a_hang(make: Any) -> None:
    client = make(watchdog=1.0, step_timeout=0.6)
    collector = submit(client, "r", "hang:60", ONE)
    assert_all_ended([collector], time.monotonic() + 5.0, "one step has been running")
    assert not is_running(client.pid)


def test_closing_does_not_wait_for_an_endless_step(make: Any) -> None:
    client = make()
    collector = submit(client, "r", "hang:60", ONE)
    time.sleep(0.1)
    started = time.monotonic()
    client.close(timeout=0.3)
    assert time.monotonic() - started < 2.0
    assert_all_ended([collector], time.monotonic() + 0.1, "closed")
    assert not is_running(client.pid)


@pytest.mark.parametrize("busy", ["hello", "hang:60"])
def test_a_child_survives_its_parent_by_two_seconds_at_most(busy: str) -> None:
    script = (
        "from tests.engine.client_tools import *\n"
        "client = make_client('process')\n"
        "client.start()\n"
        f"submit(client, 'r', {busy!r}, LONG)\n"
        "print(client.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.1)
        assert is_running(pid)
        parent.kill()
    assert until(lambda: not is_running(pid), 2.0)


# ------------------------------------------------------------------------- what is no child of ours


def strange_child(*lines: str) -> ProcessClient:
    script = "import os, sys, time\nfd = int(sys.argv[2])\n" + "\n".join(lines)
    return ProcessClient(FAKE, command=(sys.executable, "-c", script))


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        *((struct.pack("<I", len(p)) + p, "cannot be understood") for p in PICKLES[:1]),
        (struct.pack("<I", wire.MAX_FRAME + 1), "exceeds the limit"),
        (wire.encode(wire.Shutdown(drain=False)), "cannot be understood"),
        (b"\xff" * 100, "exceeds the limit"),
    ],
)
def test_a_child_that_talks_nonsense_is_ended(frame: bytes, match: str) -> None:
    client = strange_child(f"os.write(fd, {frame!r})", "time.sleep(60)")
    with pytest.raises(EngineStartError, match=match):
        client.start()
    assert not is_running(client.pid or 0)


@pytest.mark.parametrize(
    "words",
    [
        ("os.write(2, b'no such thing\\n')",),
        ("os.write(2, b'no such')", "time.sleep(0.2)", "os.write(2, b' thing\\n')"),
        ("os.write(2, b'no such thing')", "time.sleep(0.2)"),  # and no end of the line
    ],
)
def test_a_child_that_cannot_start_is_quoted(words: tuple[str, ...]) -> None:
    client = strange_child(*words, "sys.exit(3)")
    with pytest.raises(EngineStartError, match=r"with code 3; it said last:\n  no such thing$"):
        client.start()


def test_a_child_that_is_no_program_is_said() -> None:
    client = ProcessClient(FAKE, command=("/nonexistent/python",))
    with pytest.raises(EngineStartError, match="could not be started"):
        client.start()


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 16)
    except ConnectionResetError:  # what it refused to read was still on the way
        return b""


@pytest.mark.parametrize(
    "data",
    [
        *(struct.pack("<I", len(p)) + p for p in PICKLES[:1]),
        struct.pack("<I", wire.MAX_FRAME + 1),
        wire.encode(wire.Abort(request_id="before Configure")),
        wire.encode(wire.Pong(ticket=1, stalled_s=0.0)),
        wire.encode(wire.Configure(model="fake", options={}, log_level=30)) * 2,
    ],
)
def test_a_child_ends_at_what_it_does_not_understand(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [*CHILD, "--fd", str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as child:
            theirs.close()
            ours.sendall(data)
            ours.settimeout(10.0)
            frames, messages = wire.Frames(), []
            while received := _receive(ours):
                messages += [wire.decode_to_parent(p) for p in frames.feed(received)]
            assert child.wait(10.0) == 5
    assert "WireError" in [m.kind for m in messages if isinstance(m, wire.Fatal)]


def test_a_child_is_of_no_use_by_hand() -> None:
    done = subprocess.run([*CHILD, "--fd", "77"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no socket" in done.stderr
