"""The engine child's main: a ThreadClient behind the socket that its parent holds the other end of.

`python -m engineroom.engine.child --fd N`. Two threads do I/O: this one reads, one writes, so that
heartbeats are answered while a step runs. When the parent's end closes, the child ends by itself.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import logging
import os
import queue
import select
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import differences, wire
from .client import (
    EngineDeadError,
    EngineError,
    EngineLike,
    EngineStartError,
    RequestRefused,
    describe,
    merge,
)
from .client_thread import ThreadClient
from .config import EngineConfig
from .core.answers import Growth, RequestOutput

EXIT_BAD_START = 3
EXIT_ENGINE_FAILED = 4
EXIT_BAD_WIRE = 5
_ORPHANED_SECONDS = 1.0  # what an orphan gives its step before it exits without it
_FLUSH_SECONDS = 0.5  # for the last words
_CLOSE_SECONDS = 3600.0  # a parent that asked for an end watches the time itself
_CHUNK = 1 << 18
_MAX_LOGS = 1000  # records waiting for a parent that does not read; later ones are counted

_Question = wire.RenderChat | wire.Tokenize | wire.Detokenize | wire.Stats | wire.Facts
Progress = Callable[[str], None]
ConfiguredFactory = Callable[[EngineConfig, Progress], EngineLike]


class Outbox:
    """What waits to be sent: one merged RequestOutput per request, and other messages in order.

    So a parent that reads slowly costs memory per live request and never per token.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a log record may come from inside
        # What wait() sleeps on, one token at most: in C, where a Condition takes a new lock and
        # a dozen lines of Python for each of a stream's tokens.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._woken = False
        self._outputs: dict[str, RequestOutput] = {}
        self._growths: dict[str, Growth] = {}  # later than the output of the same request
        self._others: collections.deque[wire.ToParent] = collections.deque()
        self._logs = 0
        self._lost_logs = 0
        self.ending = False

    def output(self, output: RequestOutput) -> None:
        """Wakes nobody: a step brings many, and its end is told by wake() or a take()."""
        with self._lock:
            rid = output.request_id
            growth = self._growths.pop(rid, None)
            if growth is not None:
                deltas = (growth.text + output.deltas[0], *output.deltas[1:])
                output = dataclasses.replace(output, deltas=deltas)
            self._outputs[rid] = merge(self._outputs.get(rid), output)

    def grow(self, growths: Sequence[Growth]) -> None:
        """As output()."""
        with self._lock:
            for growth in growths:
                earlier = self._growths.get(growth.request_id)
                self._growths[growth.request_id] = earlier.then(growth) if earlier else growth

    def message(self, message: wire.ToParent) -> None:
        with self._lock:
            if isinstance(message, wire.Log):
                if self._logs >= _MAX_LOGS:
                    self._lost_logs += 1
                    return
                self._logs += 1
            self._others.append(message)
            self.wake()

    def end(self) -> None:
        """What waits, and waits when wait() returns, is the last."""
        with self._lock:
            self.ending = True
            self.wake()

    def wake(self) -> None:
        """Let wait() return."""
        with self._lock:
            if not self._woken:
                self._woken = True
                self._wakes.put(None)

    def wait(self) -> None:
        """Until somebody wakes it."""
        self._wakes.get()
        self._woken = False

    def take(self) -> tuple[list[RequestOutput], list[Growth], list[wire.ToParent]]:
        """Everything that waits, in this order."""
        with self._lock:
            outputs, growths = list(self._outputs.values()), list(self._growths.values())
            others = list(self._others)
            if self._lost_logs:
                text = f"{self._lost_logs} log records were lost: the parent reads too slowly"
                others.append(wire.Log(level=logging.WARNING, logger=__name__, text=text))
            self._outputs.clear()
            self._growths.clear()
            self._others.clear()
            self._logs = self._lost_logs = 0
            return outputs, growths, others


class _LogHandler(logging.Handler):
    """Log records of `engineroom` go to the parent's loggers."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        self._outbox.message(wire.Log(level=record.levelno, logger=record.name, text=text))


class _Server:
    """One parent's requests on one engine."""

    def __init__(self, sock: socket.socket, factory: ConfiguredFactory) -> None:
        self._sock = sock
        self._coming = select.poll()
        self._coming.register(sock, select.POLLIN)
        self._factory = factory
        self._outbox = Outbox()
        self._client: ThreadClient | None = None
        self._writer = threading.Thread(target=self._write, name="engineroom-writer", daemon=True)
        self._exit_code = 0
        self._sending = threading.Lock()  # of the socket's output, and what follows
        self._rest = b""  # what the socket did not take from _stepped()
        self._sent: dict[str, RequestOutput] = {}  # the last output of each live request
        self._unsendable: dict[str, str] = {}  # live requests whose output has no wire form: why

    def run(self) -> int:
        """Serve until the parent asks for the end or is gone; the exit code."""
        self._writer.start()
        frames = wire.Frames()
        buffer = bytearray(_CHUNK)
        try:
            while count := self._receive(buffer):
                for payload in frames.feed(memoryview(buffer)[:count]):
                    self._handle(wire.decode_to_child(payload))
        except wire.WireError as exc:
            text = f"the engine's process was sent what it cannot understand: {exc}"
            self._finish(EXIT_BAD_WIRE, wire.Fatal(kind="WireError", field="", text=text))
        if self._client is not None:
            self._client.close(timeout=_ORPHANED_SECONDS)
        self._finish(self._exit_code)
        self._writer.join(_FLUSH_SECONDS)
        return self._exit_code

    # ------------------------------------------------------------------------------- reading

    def _receive(self, buffer: bytearray) -> int:
        """How many bytes came; 0 at the end."""
        try:
            self._coming.poll()  # recv() would be woken by what is sent, too
            return self._sock.recv_into(buffer)
        except OSError:
            return 0

    def _handle(self, message: wire.ToChild) -> None:
        if isinstance(message, wire.Configure):
            self._configure(message)
            return
        client = self._client
        if client is None:
            raise wire.WireError(f"{type(message).__name__} before Configure")
        match message:
            case wire.Submit():
                self._submit(client, message)
            case wire.Abort(request_id=request_id):
                client.abort(request_id)
            case wire.Ping(ticket=ticket):
                self._outbox.message(wire.Pong(ticket=ticket, stalled_s=client.stalled_s))
            case (
                wire.RenderChat()
                | wire.Tokenize()
                | wire.Detokenize()
                | wire.Stats()
                | wire.Facts()
            ):
                self._spawn(self._answer, client, message)
            case wire.Shutdown(drain=drain):
                self._spawn(self._shut_down, client, drain)

    @staticmethod
    def _spawn(function: Callable[..., None], *args: object) -> None:
        """What may take its time must not hold up the heartbeat."""
        threading.Thread(target=function, args=args, daemon=True).start()

    def _configure(self, message: wire.Configure) -> None:
        if self._client is not None:
            raise wire.WireError("Configure came twice")
        logger = logging.getLogger("engineroom")
        logger.setLevel(message.log_level)
        logger.addHandler(_LogHandler(self._outbox))
        logger.propagate = False

        def progress(text: str) -> None:
            self._outbox.message(wire.Progress(text=text))

        def load() -> EngineLike:
            config = EngineConfig.from_options(message.model, message.options)
            return self._factory(config, progress)

        self._client = ThreadClient(load, self._stepped)
        progress("the engine's process has started")
        self._spawn(self._watch, self._client)

    def _watch(self, client: ThreadClient) -> None:
        """Tell that the engine is loaded, and that it has failed."""
        try:
            info = client.start()
        except EngineStartError as exc:
            fatal = wire.Fatal(kind=exc.kind, field=exc.field, text=str(exc))
            self._finish(EXIT_BAD_START, fatal)
            return
        self._outbox.message(
            wire.Ready(
                config=info.config,
                model=info.model,
                has_chat_template=info.has_chat_template,
                chat_template=info.chat_template,
                pid=info.pid,
                thread=info.thread,
            )
        )
        failure = client.wait()
        if failure is not None:
            fatal = wire.Fatal(kind="EngineDeadError", field="", text=failure)
            self._finish(EXIT_ENGINE_FAILED, fatal)

    def _submit(self, client: ThreadClient, message: wire.Submit) -> None:
        rid = message.request_id

        def sink(item: RequestOutput | EngineError) -> None:
            if isinstance(item, RequestOutput):
                self._outbox.output(item)
            elif not isinstance(item, EngineDeadError):  # that is told of all at once, by Fatal
                self._outbox.message(_refused(item, request_id=rid))

        try:
            client.submit(
                rid,
                message.prompt,
                wire.unpack_params(message.params),
                priority=message.priority,
                cache_salt=message.cache_salt,
                final_only=message.final_only,
                embed=message.embed,
                tenant=message.tenant,
                weight=message.weight,
                sink=sink,
                grown=_ignore if message.growths else None,  # _stepped() has them
            )
        except ValueError as exc:
            self._outbox.message(_refused(RequestRefused.of(exc), request_id=rid))
        except EngineDeadError:
            pass  # every sink is told by Fatal, or by the socket's end

    def _answer(self, client: ThreadClient, message: _Question) -> None:
        try:
            self._outbox.message(_ask(client, message))
        except EngineDeadError:
            pass  # as in _submit()
        except Exception as exc:
            self._outbox.message(_refused(exc, ticket=message.ticket))

    def _shut_down(self, client: ThreadClient, drain: bool) -> None:
        client.close(drain=drain, timeout=_CLOSE_SECONDS)
        self._finish(0)

    def _finish(self, exit_code: int, fatal: wire.Fatal | None = None) -> None:
        """Let the writer send what waits, and close the socket, which ends run()."""
        if fatal is not None:
            self._exit_code = exit_code
            self._outbox.message(fatal)
        self._outbox.end()

    # ------------------------------------------------------------------------------- writing

    def _stepped(self, growths: Sequence[Growth]) -> None:
        """On the engine's thread: send what its step brought, as far as the socket takes it.

        A writer that woke for it would run beside the next step, and take a core from it.
        """
        if not self._sending.acquire(blocking=False):
            self._outbox.grow(growths)
            self._outbox.wake()
            return
        try:
            if self._rest:
                self._outbox.grow(growths)
            else:
                data = self._take(growths)
                sent = self._sock.send(data, socket.MSG_DONTWAIT) if data else 0
                self._rest = data[sent:]
        except BlockingIOError:
            self._rest = data
        except OSError:
            pass  # the parent is gone, which the reader is told too
        finally:
            self._sending.release()
        if self._rest:
            self._outbox.wake()

    def _take(self, latest: Sequence[Growth] = ()) -> bytes:
        """What waits, and the latest growths behind it, as frames."""
        outputs, growths, others = self._outbox.take()
        frames = [frame for output in outputs for frame in self._frames(output)]
        for told in (growths, latest):
            if told:
                frames += self._growth_frames(told)
        frames += [self._frame(message) for message in others]
        return b"".join(frames)

    def _write(self) -> None:
        try:
            last = False
            while not last:
                self._outbox.wait()
                last = self._outbox.ending
                with self._sending:
                    data, self._rest = self._rest, b""
                    self._sock.sendall(data + self._take())
        except OSError:
            pass  # the parent is gone
        finally:
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _frames(self, output: RequestOutput) -> list[bytes]:
        rid = output.request_id
        frames: list[bytes] = []
        if rid not in self._unsendable:
            try:
                frames = [
                    wire.encode(m) for m in differences.difference(self._sent.get(rid), output)
                ]
                self._sent[rid] = output
            except wire.WireError as exc:
                self._give_up(rid, exc)
        if output.finished:
            self._sent.pop(rid, None)
            if (why := self._unsendable.pop(rid, None)) is not None:
                frames = [wire.encode(_refused(EngineError(why), request_id=rid))]
        return frames

    def _growth_frames(self, growths: Sequence[Growth]) -> list[bytes]:
        """One, but for a heap that no frame holds."""
        try:
            return [wire.encode(wire.Growths(growths=list(growths)))]
        except wire.WireError as exc:
            if len(growths) > 1:
                return [frame for one in growths for frame in self._growth_frames([one])]
            self._give_up(growths[0].request_id, exc)
            return []

    def _give_up(self, request_id: str, why: Exception) -> None:
        self._unsendable[request_id] = str(why)
        if self._client is not None:
            self._client.abort(request_id)

    def _frame(self, message: wire.ToParent) -> bytes:
        if isinstance(message, wire.Refused):
            self._sent.pop(message.request_id, None)  # its id is free again
        try:
            return wire.encode(message)
        except wire.WireError as exc:
            if isinstance(message, (wire.Rendered, wire.Text, wire.StatsReply, wire.FactsReply)):
                return wire.encode(_refused(exc, ticket=message.ticket))
            if isinstance(message, wire.Ready):
                return wire.encode(wire.Fatal(kind="WireError", field="", text=str(exc)))
            text = f"a message was lost: {exc}"
            return wire.encode(wire.Log(level=logging.ERROR, logger=__name__, text=text))


def _ignore(_: Growth) -> None:
    """A request takes growths, and who reads them is said elsewhere."""


def _ask(client: ThreadClient, message: _Question) -> wire.ToParent:
    ticket = message.ticket
    match message:
        case wire.RenderChat(messages=messages, options=options):
            ids = client.render_chat(messages, **options)
        case wire.Tokenize(text=text, add_special_tokens=special):
            ids = client.tokenize(text, add_special_tokens=special)
        case wire.Detokenize(token_ids=token_ids, skip_special_tokens=skip):
            text = client.detokenize(token_ids, skip_special_tokens=skip)
            return wire.Text(ticket=ticket, text=text)
        case wire.Stats():
            return wire.StatsReply(ticket=ticket, stats=client.stats(_CLOSE_SECONDS))
        case wire.Facts():
            return wire.FactsReply(ticket=ticket, facts=client.facts())
    return wire.Rendered(ticket=ticket, token_ids=tuple(ids))


def _refused(error: Exception, *, request_id: str = "", ticket: int = 0) -> wire.Refused:
    caller = isinstance(error, RequestRefused)
    return wire.Refused(
        request_id=request_id,
        fault="caller" if caller else "engine",
        kind=error.kind if isinstance(error, RequestRefused) else type(error).__name__,
        field=error.field if isinstance(error, RequestRefused) else "",
        text=str(error) if isinstance(error, EngineError) else describe(error),
        ticket=ticket,
    )


def main(factory: ConfiguredFactory, argv: Sequence[str] | None = None) -> NoReturn:
    """Serve the parent on the inherited socket, with an engine that `factory` loads, and exit."""
    parser = argparse.ArgumentParser(
        prog="python -m engineroom.engine.child",
        description="The engine's process. ProcessClient starts it; it is of no use by hand.",
    )
    parser.add_argument("--fd", type=int, required=True, help="an inherited socket's descriptor")
    fd = parser.parse_args(argv).fd
    try:
        os.set_inheritable(fd, False)  # a helper of ours must not keep the parent's end waiting
        sock = socket.socket(fileno=fd)
    except OSError as exc:
        parser.error(f"--fd {fd} is no socket: {exc}")

    def load(config: EngineConfig, progress: Progress) -> EngineLike:
        engine = factory(config, progress)
        gc.freeze()  # what is loaded stays: collections need not look at it
        return engine

    code = _Server(sock, load).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a step that hangs must not keep an orphan alive


if __name__ == "__main__":
    # Here alone: who brings another factory does not load the whole engine.
    from .engine import Engine

    main(lambda config, progress: Engine.from_model(config.model, config, progress))
