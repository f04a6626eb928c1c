"""`engineroom bench serve`: its traffic, its client against servers that misbehave, its page."""

from __future__ import annotations

import asyncio
import json
import math
import re
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine.bench.charts import Bars, Line, Lines
from engineroom.engine.bench.files import KINDS, write
from engineroom.engine.bench.serve import level
from engineroom.engine.bench.serve.client import Answer, ServerFailed, Target, ask, fetch
from engineroom.engine.bench.serve.measures import Limits, row, slowest, stretches
from engineroom.engine.bench.serve.traffic import Lengths, Load, Planned, plan
from engineroom.engine.bench.tables import Column, Report, Table
from engineroom.engine.cli import main

FIXED = Lengths(20, 7)


class Server:
    """Speaks the completions interface: one token a part, as many as were asked for.

    `script` may replace the bytes after the head of a stream; `delay` is before each part.
    """

    def __init__(self) -> None:
        self.models = ["tiny"]
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.refuse: Callable[[dict[str, Any]], str | None] = lambda body: None
        self.script: list[bytes] | None = None
        self.delay = 0.0
        self.now = self.most = 0  # requests being answered
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if head.startswith("GET"):
                data = {"data": [{"id": name} for name in self.models]}
                self._whole(writer, 200, data)
            else:
                length = int(re.search(r"Content-Length: (\d+)", head).group(1))  # type: ignore[union-attr]
                body = json.loads(await reader.readexactly(length))
                self.bodies.append(body)
                if message := self.refuse(body):
                    self._whole(writer, 400, {"error": {"message": message}})
                else:
                    await self._stream(writer, body)
        finally:
            self.now -= 1
            writer.close()

    def _whole(self, writer: asyncio.StreamWriter, status: int, data: Any) -> None:
        body = json.dumps(data).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        for part in self.script if self.script is not None else self._parts(body):
            await asyncio.sleep(self.delay)
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    def _parts(self, body: dict[str, Any]) -> list[bytes]:
        words = body["prompt"].split() if "prompt" in body else [""]
        parts = [event({"choices": [{"text": f"t{i} "}]}) for i in range(body["max_tokens"])]
        usage = {"prompt_tokens": 2 * len(words), "completion_tokens": body["max_tokens"]}
        return [*parts, event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Target]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    async with listening:
        yield Target(f"http://127.0.0.1:{server.port}/v1", "tiny", "completions", timeout=5)


def asked(server: Server, output_len: int = 3, *, timeout: float = 5) -> Answer:
    async def once() -> Answer:
        async with serving(server) as target:
            where = Target(target.url, "tiny", "completions", key="s3cret", timeout=timeout)
            return await ask(where, where.body("a b", output_len, {"ignore_eos": True}))

    return asyncio.run(once())


# ----------------------------------------------------------------------------------------- traffic


def test_a_seed_makes_the_same_traffic() -> None:
    load, lengths = Load(rate=5.0), Lengths(50, 80, "lognormal")
    assert plan(load, 30, lengths, 0.7, 1) == plan(load, 30, lengths, 0.7, 1)
    assert plan(load, 30, lengths, 0.7, 1) != plan(load, 30, lengths, 0.7, 2)


def test_poisson_arrivals_have_their_rate_and_their_spread() -> None:
    moments = [p.at for p in plan(Load(rate=4.0), 4000, FIXED, 1.0, 3)]
    gaps = [b - a for a, b in pairwise(moments)]
    assert moments == sorted(moments)
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)  # of an exponential, its mean
    assert {p.at for p in plan(Load(rate=math.inf), 9, FIXED, 1.0, 3)} == {0.0}


def test_lengths_are_fixed_or_spread_about_their_means() -> None:
    assert {(len(p.prompt.split()), p.output_len) for p in plan(Load(users=1), 9, FIXED, 1, 0)} == {
        (20, 7)
    }
    many = plan(Load(users=1), 5000, Lengths(100, 200, "lognormal"), 0.5, 0)
    outputs = [p.output_len for p in many]
    assert statistics.mean(outputs) == pytest.approx(200, rel=0.08)
    assert 4 <= min(outputs) < 60 and 800 < max(outputs) <= 1600
    assert statistics.mean(len(p.prompt.split()) for p in many) == pytest.approx(50, rel=0.08)


# ------------------------------------------------------------------------------------------ client


def test_a_stream_is_read_with_the_moment_of_each_part() -> None:
    server = Server()
    server.delay = 0.01
    answer = asked(server, 4)
    assert answer.error is None
    assert (answer.input_tokens, answer.output_tokens, len(answer.parts)) == (4, 4, 4)
    assert answer.sent < answer.parts[0] and answer.parts == sorted(set(answer.parts))
    assert answer.parts[-1] <= answer.end
    (body,), (head,) = server.bodies, server.heads
    assert body["stream"] and body["stream_options"] == {"include_usage": True}
    assert body["ignore_eos"] is True and body["max_tokens"] == 4
    assert "Authorization: Bearer s3cret\r\n" in head and head.startswith("POST /v1/completions ")


def test_events_may_be_cut_anywhere() -> None:
    whole = b"".join(Server()._parts({"prompt": "é", "max_tokens": 3}))
    server = Server()
    server.script = [whole[i : i + 1] for i in range(len(whole))]
    answer = asked(server)
    assert (answer.error, answer.output_tokens, len(answer.parts)) == (None, 3, 3)


def test_parts_without_text_are_no_tokens() -> None:
    server = Server()
    empty = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}, {"choices": []}]
    server.script = [*map(event, empty), event({"choices": [{"delta": {"content": "x"}}]})]
    server.script += [b": a comment\n\n", b"data: [DONE]\n\n"]
    assert len(asked(server).parts) == 1


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ([event({"choices": [{"text": "a"}]})], "broke off"),
        ([event({"error": {"message": "out of luck"}})], "out of luck"),
        ([b"data: {nonsense\n\n"], "Expecting"),
    ],
)
def test_a_stream_that_fails_says_how(script: list[bytes], words: str) -> None:
    server = Server()
    server.script = script
    assert words in (asked(server).error or "")


def test_a_refusal_is_told_in_the_server_s_words() -> None:
    server = Server()
    server.refuse = lambda body: "no such field"
    assert asked(server).error == "status 400: no such field"


def test_a_server_that_hangs_or_is_not_there() -> None:
    server = Server()
    server.delay = 30
    assert asked(server, timeout=0.2).error == "no end after 0.2 s"
    nobody = Target("http://127.0.0.1:9/v1", "m", "completions", timeout=5)
    assert asyncio.run(ask(nobody, {})).error
    with pytest.raises(OSError):
        asyncio.run(fetch(nobody, "models"))


def test_what_is_no_json_is_no_list_of_models() -> None:
    async def once() -> None:
        server = Server()
        async with serving(server) as target:
            await fetch(target, "models")
            server._whole = lambda writer, status, data: writer.write(  # type: ignore[method-assign]
                b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n<>"
            )
            await fetch(target, "models")

    with pytest.raises(ServerFailed, match="no JSON"):
        asyncio.run(once())


# ------------------------------------------------------------------------------------------ levels


def answered(server: Server, load: Load, planned: list[Planned]) -> tuple[list[Answer], float]:
    async def once() -> tuple[list[Answer], float]:
        async with serving(server) as target:
            return await level.run(target, load, planned, {}, lambda done: None)

    return asyncio.run(once())


def test_users_send_when_they_are_answered_and_no_sooner() -> None:
    server = Server()
    server.delay = 0.005
    planned = [Planned(0.0, f"w{i}", 2) for i in range(12)]
    answers, _ = answered(server, Load(users=3), planned)
    assert server.most == 3
    assert sorted(body["prompt"] for body in server.bodies) == sorted(p.prompt for p in planned)
    assert all(answer.error is None for answer in answers)


def test_a_rate_waits_for_nobody() -> None:
    server = Server()
    server.delay = 0.1
    planned = [Planned(0.02 * i, "w", 2) for i in range(6)]
    answers, late = answered(server, Load(rate=50.0), planned)
    assert server.most == 6  # each lasts longer than all arrivals
    gaps = [b.sent - a.sent for a, b in pairwise(answers)]
    assert min(gaps) > 0.005 and late < 5


# ---------------------------------------------------------------------------------------- measures


def made(sent: float, parts: list[float], end: float, **more: Any) -> Answer:
    return Answer(sent, parts, end, input_tokens=10, output_tokens=2 * len(parts), **more)


def test_rates_waits_and_goodput_of_a_level() -> None:
    quick = made(0.0, [0.1, 0.2], 0.25)
    slow = made(1.0, [1.5, 2.1], 2.2)
    failed = Answer(0.5, [], 0.6, error="no")
    cells = row([quick, slow, failed], Limits(first=200, token=150))
    assert (cells["requests"], cells["failed"]) == (2, 1)
    assert cells["requests_s"] == pytest.approx(2 / 2.2)
    assert cells["output_tokens_s"] == pytest.approx(8 / 2.2)
    assert cells["total_tokens_s"] == pytest.approx(28 / 2.2)
    assert cells["first_median_ms"] == pytest.approx(300)
    assert cells["token_median_ms"] == pytest.approx((100 / 3 + 200) / 2)
    assert cells["between_median_ms"] == pytest.approx(350)
    assert cells["whole_median_ms"] == pytest.approx((250 + 1200) / 2)
    assert cells["goodput_s"] == pytest.approx(1 / 2.2)
    assert cells["goodput_percent"] == pytest.approx(100 / 3)  # one that failed was asked for too
    assert row([failed], Limits()) == {"requests": 0, "failed": 1}
    assert slowest([quick, slow, failed]) is slow and slowest([failed]) is None


def test_a_life_is_split_by_the_server_s_timings_and_no_further() -> None:
    told = made(0.0, [0.1], 0.3, timings={"queue_ms": 20.0, "prefill_ms": 500.0})
    assert stretches(told) == [
        ("queue", 0.0, 20.0),
        ("prefill", 20.0, pytest.approx(100)),
        ("way", pytest.approx(100), pytest.approx(100)),
        ("decode", pytest.approx(100), pytest.approx(300)),
    ]
    assert [name for name, *_ in stretches(made(0.0, [0.1], 0.3))] == ["first token", "decode"]


# ------------------------------------------------------------------------------------------ report


def test_a_page_is_whole_by_itself_and_no_text_of_a_model_is_markup(tmp_path: Path) -> None:
    bad = '<script>alert("x")</script>'
    table = Table(bad, (Column("a", "A", 1), Column("b", bad)), [{"a": 1234.5, "b": bad}], bad)
    charts = (
        Lines(bad, bad, bad, [Line(bad, [(0.0, 0.0), (2.0, 7.0)], [bad, bad])]),
        Bars(bad, "ms", [(bad, 0.0, 3.0)], [1.0], bad),
        Lines("empty", "x", "y", []),
    )
    report = Report("serve", {bad: bad}, [table], [bad], charts)
    (path,) = write(report, {"html": str(tmp_path / "in" / "page.html"), "md": None})
    page = path.read_text()
    assert "<script" not in page and "1,234.5" in page
    assert not re.search(r"""(src|href)=|url\(|@import|https?:""", page)
    assert page.count("<svg") == page.count("</svg>") == 3
    assert set(KINDS) == {"json", "csv", "md", "html"}


def command(server: Server, *argv: str) -> int:
    """The command in a thread, as it makes loops of its own."""

    async def once() -> int:
        async with serving(server):
            where = f"http://127.0.0.1:{server.port}"
            return await asyncio.to_thread(main, ["bench", "serve", where, *argv])

    return asyncio.run(once())


def test_the_command_measures_levels_and_writes_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server()
    files = [part for kind in KINDS for part in (f"--{kind}", str(tmp_path / f"made.{kind}"))]
    sizes = ["--requests", "6", "--warmup", "1", "--input-len", "20", "--output-len", "5"]
    limits = ["--first-ms", "60000", "--whole-ms", "60000"]
    assert command(server, "--users", "1,3", *sizes, *limits, *files) == 0
    assert "3 users" in capsys.readouterr().out
    rates, waits = json.loads((tmp_path / "made.json").read_text())["tables"]
    assert [r["load"] for r in rates["rows"]] == ["1 user", "3 users"]
    for cells in rates["rows"]:
        assert (cells["requests"], cells["failed"], cells["model"]) == (6, 0, "tiny")
        # The server counts two tokens a word, which the first request found out.
        assert (cells["input_len"], cells["output_len"]) == (20, 5)
        assert cells["goodput_percent"] == 100
    assert len(server.bodies) == 1 + 2 * (6 + 1)
    assert all(r["first_median_ms"] > 0 for r in waits["rows"])
    page = (tmp_path / "made.html").read_text()
    assert "First token against throughput" in page and "The slowest request at 3 users" in page


def test_the_command_says_why_it_cannot_ask(capsys: pytest.CaptureFixture[str]) -> None:
    many = Server()
    many.models = ["a", "b"]
    assert command(many) == 1
    assert "2 models (a, b)" in capsys.readouterr().err
    strict = Server()
    strict.refuse = lambda body: "unknown field ignore_eos" if "ignore_eos" in body else None
    assert command(strict) == 1
    assert "--no-ignore-eos" in capsys.readouterr().err
    few = ["--users", "1", "--requests", "1", "--warmup", "0"]
    assert command(strict, "--no-ignore-eos", *few) == 0
    silent = Server()
    silent.script = [event({"choices": [{"text": "a"}]}), b"data: [DONE]\n\n"]
    assert command(silent) == 1
    assert "usage.prompt_tokens" in capsys.readouterr().err


def test_a_level_of_which_nothing_came_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    server = Server()
    server.refuse = lambda body: "too much" if body["max_tokens"] > 1 else None
    assert command(server, "--users", "1", "--requests", "2", "--warmup", "0") == 1
    assert "2 requests failed; the first: status 400: too much" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["localhost:8000"], "no http:// or https:// address"),
        (["http://h", "--rate", "0"], "no rate above 0"),
        (["http://h", "--users", "1", "--rate", "1"], "not allowed with"),
        (["http://h", "--extra-body", "[1]"], "no JSON object"),
    ],
)
def test_flags_that_cannot_be_meant(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *argv]) == 2
    assert words in capsys.readouterr().err
