"""What a request leaves behind in the server's process once it is over: nothing."""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Callable

from .conftest import Running
from .http import chat, completion, get, post, streaming

WINDOWS, ROUNDS = 7, 20  # of six requests a round


def ask_of_every_kind(running: Running, turn: int) -> None:
    short = {"max_tokens": 4}
    post(running, "/v1/completions", completion(f"a{turn}", **short))
    post(running, "/v1/completions", completion("refuse: it"))
    for path, body in (
        ("/v1/completions", completion(f"b{turn}", stream_options={"include_usage": True}, **short)),
        ("/v1/chat/completions", chat(f"c{turn}", **short)),
        ("/v1/messages", chat(f"d{turn}", **short)),
    ):
        with streaming(running, path, body) as response:
            response.read()
    with streaming(running, "/v1/completions", completion("slow: e", max_tokens=4000)) as response:
        response.read(20)  # and leaves
    if turn % 10 == 0:
        get(running, "/metrics")


def blocks(running: Running) -> int:
    """Memory blocks that Python holds when all is quiet."""
    running.wait_until(lambda: running.service.num_live == 0)
    time.sleep(0.3)  # the last connection's end
    gc.collect()
    return sys.getallocatedblocks()


def test_a_request_leaves_nothing_behind(serving: Callable[..., Running]) -> None:
    """Blocks, not bytes: malloc's pages go on growing for some ten thousand requests until their
    gaps fit what is asked for, though nothing is held."""
    running = serving()
    recent = running.service.metrics
    for latest in (recent.recent_ttft, recent.recent_per_token):
        latest.extend([0.0] * 1000)  # they are bounded, and full on a server that has run
    held = []
    for _ in range(WINDOWS):
        held.append(blocks(running))
        for turn in range(ROUNDS):
            ask_of_every_kind(running, turn)
    grown = [b - a for a, b in itertools.pairwise(held)]
    # Caches fill in the first windows, and timers come and go: a leak is in every window.
    assert min(grown) < ROUNDS, f"blocks after each {6 * ROUNDS} requests: {grown}"
