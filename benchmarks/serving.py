"""What serving and batches cost: the same requests over HTTP, from a file, and by LLM.generate().

`python benchmarks/serving.py [--model smollm2] [--rounds 4]` runs the forms in turn (A B A B) and
prints medians. The client shares the machine's cores with the server, and every microsecond of it
is one that a step waits; so it reads bare sockets as their parts come and counts events. What it
and the server's process (not the engine's) used of the cores for a token is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from engineroom import LLM, SamplingParams

PORT = 8141
TOKENS = 128  # in and out
Prompts = list[list[int]]


def prompts(count: int, rng: random.Random) -> Prompts:
    """Random token ids, never the same twice: no prefix is found in a cache."""
    return [[rng.randrange(100, 40_000) for _ in range(TOKENS)] for _ in range(count)]


def body(prompt: list[int]) -> dict[str, object]:
    """A request of the completions interface, but for the model."""
    return {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


def ask(model: str, prompt: list[int]) -> socket.socket:
    """A connection of its own on which one streamed request was sent."""
    data = json.dumps({"model": model, **body(prompt), "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    sock = socket.create_connection(("127.0.0.1", PORT))
    sock.sendall(head.encode() + data)
    return sock


def over_http(model: str, many: Prompts) -> None:
    """All at once, read to their ends as the parts come."""
    buffer = bytearray(1 << 16)
    events = 0
    waiting: dict[int, socket.socket] = {}
    with select.epoll() as poll:
        for prompt in many:
            sock = ask(model, prompt)
            poll.register(sock, select.EPOLLIN)
            waiting[sock.fileno()] = sock
        while waiting:
            for number, _ in poll.poll():
                received = waiting[number].recv_into(buffer)
                events += buffer.count(b"data: {", 0, received)
                if not received:
                    waiting.pop(number).close()
    if not events:
        raise RuntimeError("the server sent no event; is another one on the port?")


def processor_seconds(pid: int) -> float:
    """What a process has used, all its threads together."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks)


def from_file(llm: LLM, many: Prompts, folder: Path) -> None:
    """LLM.batch() over a new file."""
    source = folder / f"{time.monotonic_ns()}.jsonl"
    with source.open("w") as out:
        for i, prompt in enumerate(many):
            asked = {"method": "POST", "url": "/v1/completions", "body": body(prompt)}
            out.write(json.dumps({"custom_id": str(i), **asked}) + "\n")
    llm.batch(source, source.with_suffix(".out"), use_tqdm=False)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(
    name: str, count: int, rounds: int, offline: Callable[[], object], other: Callable[[], object]
) -> None:
    """Alternate, and print medians."""
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(seconds(offline))
        theirs.append(seconds(other))
    a, b = statistics.median(ours), statistics.median(theirs)
    print(
        f"{name}: {count * TOKENS / b:.0f} tok/s, generate() {count * TOKENS / a:.0f}, ratio "
        f"{a / b:.3f}, {(b - a) / TOKENS * 1000:+.2f} ms a step",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    model = args.model
    rng = random.Random(5)
    flags = ["--max-model-len", "512", "--no-enable-prefix-caching", "--port", str(PORT)]
    command = [sys.executable, "-m", "engineroom", "serve", model, *flags]
    llm = LLM(model, max_model_len=512, enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)

    def generate(count: int) -> None:
        llm.generate(prompts(count, rng), params, use_tqdm=False)

    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stderr=subprocess.DEVNULL) as server,
    ):
        try:
            time.sleep(5)  # it loads
            generate(2)
            over_http(model, prompts(2, rng))
            for count, rounds in ((32, args.rounds), (1, 2 * args.rounds)):
                compare(
                    f"{count} clients over HTTP, streamed",
                    count,
                    rounds,
                    lambda n=count: generate(n),  # type: ignore[misc]
                    lambda n=count: over_http(model, prompts(n, rng)),  # type: ignore[misc]
                )
                before, own = processor_seconds(server.pid), time.process_time()
                over_http(model, prompts(count, rng))
                own = time.process_time() - own
                used = processor_seconds(server.pid) - before
                tokens = count * TOKENS / 1000
                print(
                    f"  processor: server {used / tokens:.3f} ms a token, client {own / tokens:.3f}"
                )
            compare(
                "96 requests from a file",
                96,
                2,
                lambda: generate(96),
                lambda: from_file(llm, prompts(96, rng), Path(folder)),
            )
        finally:
            server.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    main()
