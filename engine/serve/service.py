"""Service: what every route needs: the engine, the settings, who is running, how it all ends."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from ..async_llm import AsyncLLM, EngineInfo, OutputStream, Push
from ..core.answers import RequestOutput
from ..core.sampling_params import SamplingParams
from ..receipts import ReceiptError
from .dialect import Dialect
from .errors import ApiError
from .keeper import Keeper
from .metrics import Metrics
from .responses_input import ResponseStore
from .settings import ServeConfig
from .storage import Storage
from .structured import naming
from .tracing import Traced, untraced

TIMEOUT = "timeout"  # the finish reason of a request that its deadline ended


@dataclass(frozen=True)
class Caller:
    """Who asks: a short name of the API key, never the key itself; "" where none is asked for."""

    name: str
    salt: bytes  # makes the prefix cache private
    weight: float = 1.0  # its share beside other keys; see core/fairness.py
    owner: str = "nobody"  # of files: the name of a folder

    @classmethod
    def of(cls, key: str, *, shared_cache: bool, weight: float = 1.0) -> Caller:
        digest = hashlib.sha256(b"engineroom\0" + key.encode()).digest()
        salt = b"" if shared_cache else digest[:16]
        return cls(digest[:4].hex(), salt, weight, digest[16:].hex())


NOBODY = Caller("", b"")


@dataclass(frozen=True, kw_only=True)
class Work:
    """One prompt and how to run it."""

    prompt: str | Sequence[int]
    params: SamplingParams
    caller: Caller
    priority: int = 0
    timeout_ms: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    form_field: str = "response_format"  # what the request calls params.structured
    final_only: bool = False  # nobody reads before the end
    push: Push | None = None  # AsyncLLM.generate()'s
    embed: bool = False

    @property
    def salt(self) -> bytes:
        """Of the prefix cache: the caller's and the request's own, hashed into 32 bytes."""
        if not self.caller.salt and not self.cache_salt:
            return b""
        return hashlib.sha256(self.caller.salt + b"\0" + (self.cache_salt or "").encode()).digest()


class Service:
    """One served model."""

    def __init__(
        self, keeper: Keeper, settings: ServeConfig, model_name: str, *, version: str = ""
    ) -> None:
        self.version = version  # engineroom's own, for /openapi.json
        self.keeper = keeper
        self.settings = settings
        self.model_name = settings.served_model_name or model_name
        self.metrics = Metrics(self.model_name)
        self.draining = False
        self.responses = ResponseStore()
        self._dialect: Dialect | None = None
        self._fingerprint = ("", "")  # of what, and it
        self.traced: Traced = untraced
        self.storage: Storage | None = None
        if settings.data_dir is not None:
            self.storage = Storage(
                settings.data_dir, settings, keeper, self.metrics, self.model_name
            )
        self._live: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_live(self) -> int:
        """Requests between their admission and their last output."""
        return len(self._live)

    @property
    def created(self) -> int:
        return int(self.keeper.started)

    @property
    def info(self) -> EngineInfo:
        return self.keeper.info

    @property
    def dialect(self) -> Dialect:
        """How the model calls tools and thinks; a new one where a restart changed its template."""
        info = self.keeper.info
        if self._dialect is None or self._dialect.template != (info.chat_template or ""):
            self._dialect = Dialect(info, self.settings)
        return self._dialect

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: changes where the same seed may give another output."""
        config = self.keeper.info.config
        said = f"{config.model}|{config.dtype}|{config.quantization}|{config.kv_cache_dtype}"
        if said != self._fingerprint[0]:
            self._fingerprint = said, "er_" + hashlib.sha256(said.encode()).hexdigest()[:12]
        return self._fingerprint[1]

    @property
    def status(self) -> str:
        """ "ok", "draining", "stalled" (no progress on what runs) or "engine_down"."""
        if self.keeper.is_ready and self.keeper.stalled_s > self.settings.health_timeout:
            return "stalled"
        return "draining" if self.draining else "ok" if self.keeper.is_ready else "engine_down"

    def check_model(self, name: str | None) -> None:
        """Errors: ApiError("model_not_found")."""
        if name is not None and name != self.model_name:
            raise ApiError(
                "model_not_found",
                f"the model {name[:100]!r} is not served here; this server has {self.model_name!r}",
                param="model",
            )

    async def run(self, work: Work) -> AsyncGenerator[RequestOutput, None]:
        """Growing outputs of one prompt. Leaving the loop aborts it within a step.

        Errors: ApiError, ParameterError, AdmissionError, EngineDeadError, RequestFailed.
        """
        if self.draining:
            raise ApiError("draining", "the server is ending and takes no more requests")
        llm = self.keeper.llm
        timeout_ms = work.timeout_ms or self.settings.timeout_ms
        request_id = work.request_id or uuid.uuid4().hex
        stream = llm.generate(
            work.prompt,
            work.params,
            request_id=request_id,
            priority=work.priority,
            cache_salt=work.salt,
            final_only=work.final_only,
            embed=work.embed,
            tenant=work.caller.name,
            weight=work.caller.weight,
            push=work.push,
        )
        deadline = _Deadline(llm, stream, timeout_ms)
        self._live.add(request_id)
        self._idle.clear()
        started = time.monotonic()
        last: RequestOutput | None = None
        try:
            with naming(work.form_field):
                async for output in stream:
                    last = deadline.over(output) if deadline.late else output
                    yield last
                    _raise_failure(last)
        finally:
            deadline.cancel()
            await stream.aclose()
            if last is None or not last.finished:
                last = stream.so_far()
            self._live.discard(request_id)
            if not self._live:
                self._idle.set()
            seconds = time.monotonic() - started
            self.metrics.ended(last, seconds)
            self.traced(self.model_name, request_id, last, seconds)

    async def receipt(self, output: RequestOutput, params: SamplingParams) -> object:
        """Of an answer that run() gave to `params`, as plain data; None where it was cut short."""
        try:
            return (await self.keeper.llm.receipt(output, params)).as_plain()
        except ReceiptError:
            return None

    async def idle(self, timeout: float) -> bool:
        """Wait until nothing runs; False where it took longer."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class _Deadline:
    """Aborts a request when its time is over, and gives that end its own finish reason."""

    def __init__(self, llm: AsyncLLM, stream: OutputStream, timeout_ms: int | None) -> None:
        self._llm = llm
        self._stream = stream
        self.late = False
        self._timer = None
        if timeout_ms is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(timeout_ms / 1000.0, self._expire)

    def over(self, output: RequestOutput) -> RequestOutput:
        """The output of a late request as the caller should see it."""
        if not output.finished:
            self._abort()  # it began after its time
        outputs = tuple(
            replace(c, finish_reason=TIMEOUT) if c.finish_reason == "abort" else c
            for c in output.outputs
        )
        return replace(output, outputs=outputs)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        self.late = True
        self._stream.push_no_more()
        self._abort()

    def _abort(self) -> None:
        self._llm.client.abort(self._stream.request_id)


def _raise_failure(output: RequestOutput) -> None:
    for completion in output.outputs:
        if completion.finish_reason == "error":
            raise ApiError("engine_error", completion.error or "the engine gave no reason")


__all__ = ["NOBODY", "TIMEOUT", "Caller", "Service", "Work"]
