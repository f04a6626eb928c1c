"""What a request leaves behind in server and engine once it is over: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from .conftest import Running
from .http import chat, completion

WINDOWS, ROUNDS = 5, 20  # of six requests a round


def send(running: Running, path: str, body: dict[str, Any], read: int | None = None) -> None:
    """On a connection that ends with the answer, or after `read` bytes of it: one that is kept
    alive has a timer of some seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), headers)
        connection.getresponse().read(read)


def ask_of_every_kind(running: Running, turn: int) -> None:
    short = {"max_tokens": 4}
    parts = {"stream": True, "stream_options": {"include_usage": True}}
    send(running, "/v1/completions", completion(f"a{turn}", **short))
    send(running, "/v1/completions", completion(f"b{turn}", **short, **parts))
    send(running, "/v1/completions", completion("refuse: it"))
    send(running, "/v1/completions", completion("slow: e", max_tokens=4000, stream=True), read=20)
    send(running, "/v1/chat/completions", chat(f"c{turn}", **short, **parts))
    send(running, "/v1/messages", chat(f"d{turn}", **short, stream=True))


def blocks(running: Running) -> int:
    """Memory blocks that Python holds when all is quiet."""
    running.wait_until(lambda: running.service.num_live == 0)
    time.sleep(0.2)  # the last connection's end
    gc.collect()
    return sys.getallocatedblocks()


def blocks_of_the_engine(running: Running) -> int:
    """The same of its process, as the fake engine counts them."""
    stats = asyncio.run_coroutine_threadsafe(running.service.keeper.llm.stats(), running.loop)
    return int(stats.result(10)["blocks"])


def test_a_request_leaves_nothing_behind(serving: Callable[..., Running]) -> None:
    """Blocks, not bytes: malloc's pages go on growing for some ten thousand requests until their
    gaps fit what is asked for, though nothing is held."""
    running = serving()
    recent = running.service.metrics
    for latest in (recent.recent_ttft, recent.recent_per_token):
        latest.extend(i / 7 for i in range(1000))  # bounded, and full on a server that has run
    held, engine_s = [], []
    for _ in range(WINDOWS):
        held.append(blocks(running))
        engine_s.append(blocks_of_the_engine(running))
        for turn in range(ROUNDS):
            ask_of_every_kind(running, turn)
    for process, found in (("server", held), ("engine", engine_s)):
        grown = [b - a for a, b in itertools.pairwise(found)]
        # Caches fill in the first windows; a leak is in every one.
        assert min(grown) < ROUNDS / 2, f"{process}: blocks of each {6 * ROUNDS} requests: {grown}"
