"""Keeper: one engine, loaded, watched, and started anew when its process has ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ..async_llm import AsyncLLM, EngineError, EngineInfo
from .aside import Aside
from .errors import ApiError

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25  # between two looks at an engine that says nothing by itself
_FIRST_WAIT_SECONDS = 0.5  # before the second attempt to start; doubled up to the longest
_LONGEST_WAIT_SECONDS = 30.0


class Keeper:
    """`make` gives a new AsyncLLM each time it is called; its engine lives in another process.

    The first start's failure is start()'s caller's: a wrong option does not mend itself. Later ones
    are tried again for ever, since a machine short of memory may recover.
    """

    def __init__(self, make: Callable[[], AsyncLLM]) -> None:
        self._make = make
        self._llm: AsyncLLM | None = None
        self._info: EngineInfo | None = None
        self._aside = Aside()
        self._watcher: asyncio.Task[None] | None = None
        self._why_down = ""
        self.num_restarts = 0
        self.started = 0.0  # Unix seconds, of the first start

    async def start(self) -> EngineInfo:
        """Load the model. Errors: EngineStartError, ConfigError."""
        # A worker may begin the next engine's process, which takes over the worker's cores.
        loop, leave = asyncio.get_running_loop(), self._aside.leave
        loop.set_default_executor(
            ThreadPoolExecutor(thread_name_prefix="beside", initializer=leave)
        )
        self._llm, self._info = await self._load()
        self.started = time.time()
        self._watcher = asyncio.create_task(self._watch(), name="engine keeper")
        return self._info

    async def close(self) -> None:
        """End the engine; what runs is aborted."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self._llm is not None:
            await self._llm.close()

    @property
    def llm(self) -> AsyncLLM:
        """The engine that runs. Errors: ApiError("loading"), ApiError("engine_down")."""
        if self._info is None:
            raise ApiError("loading", "the model is still being loaded")
        if self._llm is None or not self._llm.is_alive:
            raise ApiError("engine_down", self._why_down or "the engine's process has ended")
        return self._llm

    @property
    def info(self) -> EngineInfo:
        """What the engine last said of itself. Errors: ApiError("loading")."""
        if self._info is None:
            raise ApiError("loading", "the model is still being loaded")
        return self._info

    @property
    def is_ready(self) -> bool:
        """True while requests would be accepted."""
        return self._info is not None and self._llm is not None and self._llm.is_alive

    @property
    def stalled_s(self) -> float:
        """Seconds without progress on what runs."""
        return self._llm.stalled_s if self._llm is not None else 0.0

    async def _load(self) -> tuple[AsyncLLM, EngineInfo]:
        llm = self._make()
        try:
            return llm, await llm.load()
        except BaseException:
            await llm.close()
            raise

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._llm is not None and self._llm.is_alive:
                self._aside.look(self.info.pid, self.info.thread)
                continue
            old, self._llm = self._llm, None
            if old is not None:
                # Its last words went to whoever was reading, and to the log.
                self._why_down = "the engine's process has ended and is being started anew"
                log.error("the engine is down; starting it anew")
                await old.close()
            await self._restart()

    async def _restart(self) -> None:
        wait = _FIRST_WAIT_SECONDS
        while True:
            try:
                self._llm, self._info = await self._load()
            except EngineError as error:
                self._why_down = f"the engine could not be started anew: {error}"
                log.error("%s; trying again in %.1f s", self._why_down, wait)
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
            else:
                self.num_restarts += 1
                log.warning("the engine runs again (process %d)", self._info.pid)
                return


__all__ = ["Keeper"]
