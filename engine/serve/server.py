"""Run the application: sockets, signals, draining, and the engine's process beside it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn

from ..async_llm import AsyncLLM
from ..config import EngineConfig
from .accesslog import JsonFormatter
from .app import make_app
from .connection import BoundedProtocol
from .heap import settle
from .keeper import Keeper
from .service import Service
from .settings import ServeConfig
from .tracing import Traced, exporting, untraced

log = logging.getLogger(__name__)
_CLOSE_SECONDS = 2  # for connections that have had their answer


class ServeError(OSError):
    """The server cannot listen where it was told to."""


class Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the first signal drains, a second one stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    config: EngineConfig,
    settings: ServeConfig,
    *,
    version: str = "",
    make: Callable[[], AsyncLLM] | None = None,
) -> int:
    """Load the model and serve it until a signal; the exit status.

    `make` gives the engine (default: a supervised child process). Errors: ServeError where the
    address cannot be bound; EngineStartError; ConfigError where traces are asked for and their
    packages are not there.
    """
    traced: Traced = untraced
    flush: Callable[[], None] = _nothing
    if settings.otlp_endpoint is not None:
        traced, flush = exporting(settings.otlp_endpoint, version)
    listener = bind(settings)
    settle()
    _log_as_json()
    names = [f.name for f in dataclasses.fields(config) if f.name != "model"]
    options = {name: getattr(config, name) for name in names}
    keeper = Keeper(make or (lambda: AsyncLLM(config.model, client="process", **options)))
    service = Service(keeper, settings, config.model, version=version)
    service.traced = traced
    try:
        with listener:
            asyncio.run(_serve(service, listener))
    finally:
        flush()
    return 0


def _nothing() -> None:
    """There are no traces to send."""


async def _serve(service: Service, listener: socket.socket) -> None:
    runner = Runner(service)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runner.stop)
    try:
        await runner.run(listener)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


class Runner:
    """A service on a socket, from loading its model to its last answer."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._asked = asyncio.Event()
        self._insisted = asyncio.Event()

    def stop(self) -> None:
        """Drain: take nothing more and let what runs finish; again: end it."""
        (self._insisted if self._asked.is_set() else self._asked).set()

    async def run(self, listener: socket.socket) -> None:
        """Serve until stop(). Health is answered, and the rest refused, while the model loads.

        Errors: EngineStartError.
        """
        service = self._service
        limit = service.settings.max_header_bytes
        server = Server(
            uvicorn.Config(
                make_app(service),
                http=type("Protocol", (BoundedProtocol,), {"max_header_bytes": limit}),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )
        loading = asyncio.create_task(service.keeper.start())
        serving = asyncio.create_task(server.serve([listener]))
        asked = asyncio.create_task(self._asked.wait())
        first = asyncio.FIRST_COMPLETED
        try:
            await asyncio.wait((loading, asked, serving), return_when=first)
            if loading.done():
                loading.result()
                log.info("serving %s on %s", service.model_name, url(listener))
                if service.storage is not None:
                    service.storage.batches.start()
                await asyncio.wait((serving, asked), return_when=first)
                await self._drain()
        finally:
            service.draining = True
            loading.cancel()
            asked.cancel()
            if service.storage is not None:
                await asyncio.to_thread(service.storage.close)
            await service.keeper.close()
            server.should_exit = True
            await asyncio.gather(serving, loading, asked, return_exceptions=True)

    async def _drain(self) -> None:
        service, settings = self._service, self._service.settings
        service.draining = True
        log.info(
            "draining: %d requests may finish within %g s (a second signal stops them)",
            service.num_live,
            settings.drain_timeout,
        )
        idle = asyncio.create_task(service.idle(settings.drain_timeout))
        insisted = asyncio.create_task(self._insisted.wait())
        await asyncio.wait((idle, insisted), return_when=asyncio.FIRST_COMPLETED)
        if service.num_live:
            log.warning("%d requests are ended before they finished", service.num_live)
        for task in (idle, insisted):
            task.cancel()
        await asyncio.gather(idle, insisted, return_exceptions=True)


def bind(settings: ServeConfig) -> socket.socket:
    """The listening socket, before anything is loaded. Errors: ServeError."""
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        listener = socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; "
            "is another server running there? --port 0 takes any free port"
        ) from error
    # Connections inherit this. asyncio asks for it only where a socket names its protocol, which
    # create_server() does not; without it an answer's body waits 40 ms for its head's receipt.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url(listener: socket.socket) -> str:
    """Where the server answers."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("engineroom", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    logging.getLogger("engineroom").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


__all__ = ["Runner", "ServeError", "bind", "serve", "url"]
