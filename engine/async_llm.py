"""The asyncio face: streams of RequestOutputs over an EngineClient, aborted when nobody reads."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from .client import (
    CLOSE_SECONDS,
    EngineClient,
    EngineDeadError,
    EngineError,
    EngineInfo,
    EngineStartError,
    Messages,
    RequestFailed,
    RequestRefused,
)
from .client_process import ProcessClient
from .client_thread import ThreadClient
from .config import ConfigError, EngineConfig
from .core.answers import RequestOutput
from .core.checks import AdmissionError
from .core.parameter import ParameterError
from .core.sampling_params import SamplingParams
from .engine import Engine
from .mailbox import Mailbox, Push
from .receipts import Receipt, make

Prompt = str | Sequence[int]
_Result = TypeVar("_Result")


class AsyncLLM:
    """A model for programs that run on asyncio.

        async with AsyncLLM("smollm2") as llm:
            async for out in llm.generate("Once upon a time", SamplingParams(max_tokens=32)):
                print(out.deltas[0], end="", flush=True)

    `client` says where the engine runs: "thread" of this process, or a child "process". Options are
    EngineConfig's fields; an unknown one is an error. Nothing is loaded until `async with`,
    `await AsyncLLM.start(...)` or the first request, and then off the event loop. Streams of many
    tasks run together in one batch.
    """

    def __init__(
        self, model: str, *, client: Literal["thread", "process"] = "thread", **options: Any
    ) -> None:
        config = EngineConfig.from_options(model, options)
        if client == "thread":
            self._client: EngineClient = ThreadClient(lambda: Engine.from_model(model, config))
        elif client == "process":
            self._client = ProcessClient(config)
        else:
            raise ConfigError("client", f"client must be 'thread' or 'process', not {client!r}")
        self._ids = itertools.count()

    @classmethod
    async def start(
        cls, model: str, *, client: Literal["thread", "process"] = "thread", **options: Any
    ) -> AsyncLLM:
        """Make one and load it. Errors: ConfigError, EngineStartError."""
        return await cls(model, client=client, **options).__aenter__()

    @classmethod
    def from_client(cls, client: EngineClient) -> AsyncLLM:
        """Over a client made elsewhere, which close() closes."""
        llm = cls.__new__(cls)
        llm._client = client
        llm._ids = itertools.count()
        return llm

    async def __aenter__(self) -> AsyncLLM:
        try:
            await self.load()
        except BaseException:
            await self.close()  # also when cancelled: loading is given up
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ------------------------------------------------------------------------------- requests

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: bytes | str | None = None,
        final_only: bool = False,
        embed: bool = False,
        tenant: str = "",
        weight: float = 1.0,
        push: Push | None = None,
    ) -> OutputStream:
        """Complete text or token ids: growing RequestOutputs, `.deltas` is what is new.

        With `final_only` there is one output, at the end: nothing is made or sent before it. With
        `embed` that one has the prompt's embedding (see embed()), and nothing is generated.
        `tenant` and `weight`: whose tokens they are, where several share the engine fairly.

        The request starts with the first output asked for. Leaving the loop, cancelling its task or
        aclose() aborts the request at once. A slow reader skips outputs, never text: deltas add up.
        `push` is the short way for whoever streams text and no more: it is called on the loop,
        while the reader waits for its next output, with what a step brought, and where it returns
        True no output is made of that and nothing wakes. It must not block.
        Errors, from the loop: ParameterError, AdmissionError, EngineDeadError, RequestFailed.
        """

        async def ready() -> Prompt:
            await self._loaded()
            return prompt

        return self._stream(
            ready,
            params,
            request_id,
            priority,
            cache_salt,
            final_only=final_only,
            embed=embed,
            tenant=tenant,
            weight=weight,
            push=push,
        )

    async def embed(
        self,
        prompt: Prompt,
        *,
        truncate_prompt_tokens: int | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> RequestOutput:
        """One prompt's RequestOutput, whose `.embedding` is as LLM.embed()'s.

        Cancelling the task aborts the request. Errors: those of generate(); RequestFailed where its
        step failed.
        """
        params = SamplingParams(truncate_prompt_tokens=truncate_prompt_tokens)
        stream = self.generate(prompt, params, request_id=request_id, priority=priority, embed=True)
        try:
            output = await anext(stream)
        finally:
            await stream.aclose()
        if output.outputs[0].error is not None:
            raise RequestFailed(output.outputs[0].error)
        return output

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: bytes | str | None = None,
        **template_options: Any,
    ) -> OutputStream:
        """Answer a conversation through the model's chat template; as generate() otherwise.

        `template_options` (tools, documents, add_generation_prompt, the template's own variables)
        go to the template. Errors besides generate()'s: RequestRefused with kind "TemplateError".
        """

        async def ready() -> Prompt:
            return await self.render_chat(messages, **template_options)

        return self._stream(ready, params, request_id, priority, cache_salt)

    async def render_chat(self, messages: Messages, **template_options: Any) -> list[int]:
        """Prompt token ids of a conversation, as chat() takes it. Errors: chat()'s."""
        return await self._ask(lambda: self._client.render_chat(list(messages), **template_options))

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Errors: ParameterError, EngineDeadError, RequestFailed."""
        return await self._ask(
            lambda: self._client.tokenize(text, add_special_tokens=add_special_tokens)
        )

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str:
        """The text of token ids. Errors: AdmissionError("token_id"), ParameterError,
        EngineDeadError, RequestFailed."""
        return await self._ask(
            lambda: self._client.detokenize(token_ids, skip_special_tokens=skip_special_tokens)
        )

    async def _ask(self, question: Callable[[], _Result]) -> _Result:
        await self._loaded()
        try:
            return await asyncio.to_thread(question)
        except RequestRefused as error:
            if isinstance(error.error, ParameterError | AdmissionError):
                raise error.error from None
            raise  # the same from a thread and from another process

    async def abort(self, request_id: str) -> None:
        """End a request with what it has; its stream ends with finish_reason "abort".

        At any moment, also twice; an id that is not known is nothing to do.
        """
        self._client.abort(request_id)

    # --------------------------------------------------------------------------------- engine

    async def load(self) -> EngineInfo:
        """Load the model if that has not happened. Errors: EngineStartError, EngineDeadError."""
        return await asyncio.to_thread(self._client.start)

    async def _loaded(self) -> None:
        if not self._client.is_alive:  # else a thread hop for every request
            await self.load()

    async def stats(self) -> dict[str, Any]:
        """EngineStats as plain data. Errors: EngineDeadError."""
        return await asyncio.to_thread(self._client.stats)

    async def receipt(self, output: RequestOutput, params: SamplingParams | None = None) -> Receipt:
        """As LLM.receipt(). Errors: ReceiptError, RequestFailed, EngineDeadError."""
        facts = await self._ask(self._client.facts)
        return make(facts, output, params or SamplingParams())

    async def close(self, *, drain: bool = False, timeout: float = CLOSE_SECONDS) -> None:
        """End the engine: abort what runs, or with `drain` let it finish first. Again: nothing."""
        closing = asyncio.ensure_future(
            asyncio.to_thread(self._client.close, drain=drain, timeout=timeout)
        )
        await asyncio.shield(closing)  # a cancelled caller leaves the closing to finish

    @property
    def client(self) -> EngineClient:
        return self._client

    @property
    def is_alive(self) -> bool:
        """True while requests are accepted."""
        return self._client.is_alive

    @property
    def stalled_s(self) -> float:
        """For how long the engine has shown no progress on what it has to do, in seconds."""
        return self._client.stalled_s

    def _stream(
        self,
        ready: Callable[[], Awaitable[Prompt]],
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        cache_salt: bytes | str | None,
        push: Push | None = None,
        **shape: Any,
    ) -> OutputStream:
        salt = cache_salt.encode() if isinstance(cache_salt, str) else cache_salt or b""
        return OutputStream(
            self._client,
            ready,
            params if params is not None else SamplingParams(),
            request_id=f"async-{next(self._ids)}" if request_id is None else request_id,
            priority=priority,
            cache_salt=salt,
            push=push,
            shape=shape,
        )


class OutputStream(AsyncIterator[RequestOutput]):
    """One request's outputs, newest only: what was not read in time is merged into one.

    Closes like an async generator, and surer: dropping it aborts without the event loop's help.
    """

    def __init__(
        self,
        client: EngineClient,
        ready: Callable[[], Awaitable[Prompt]],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int,
        cache_salt: bytes,
        push: Push | None,
        shape: Mapping[str, Any],
    ) -> None:
        """`push`: AsyncLLM.generate()'s. `shape`: what else EngineClient.submit() takes."""
        self.request_id = request_id
        self._client = client
        self._ready = ready
        self._params = params
        self._priority = priority
        self._cache_salt = cache_salt
        self._push = push
        self._shape = shape
        # The client knows the mailbox and not the stream, so that a dropped stream is collected.
        self._mailbox: Mailbox | None = None
        self._over = False

    async def __anext__(self) -> RequestOutput:
        if self._over:
            raise StopAsyncIteration
        try:
            if self._mailbox is None:
                await self._submit()
            assert self._mailbox is not None  # ours: _submit() made it
            item = await self._mailbox.take()
        except BaseException:
            self._abandon()
            raise
        if isinstance(item, EngineError):
            self._over = True
            raise item.unwrap() if isinstance(item, RequestRefused) else item
        self._over = item.finished
        return item

    def so_far(self) -> RequestOutput | None:
        """All that has come, read or pushed or not; None before the first output."""
        return None if self._mailbox is None else self._mailbox.so_far()

    def push_no_more(self) -> None:
        """From now on everything is an output."""
        self._push = None
        if self._mailbox is not None:
            self._mailbox.push = None

    async def aclose(self) -> None:
        """Abort the request if it still runs. Again: nothing."""
        self._abandon()
        if self._mailbox is not None:
            self._mailbox.wake()  # a reader in another task need not wait

    def __del__(self) -> None:
        if not getattr(self, "_over", True):
            self._abandon()

    async def _submit(self) -> None:
        prompt = await self._ready()
        if self._over:  # closed meanwhile
            raise StopAsyncIteration
        loop = asyncio.get_running_loop()
        mailbox = Mailbox(loop, self._push)
        self._client.read_on(loop)
        self._client.submit(
            self.request_id,
            prompt,
            self._params,
            priority=self._priority,
            cache_salt=self._cache_salt,
            sink=mailbox.put,
            grown=None if self._push is None else mailbox.grow,
            **self._shape,
        )
        self._mailbox = mailbox

    def _abandon(self) -> None:
        if not self._over:
            self._over = True
            if self._mailbox is not None:
                self._mailbox.close()
                self._client.abort(self.request_id)


__all__ = [
    "AsyncLLM",
    "EngineClient",
    "EngineDeadError",
    "EngineError",
    "EngineInfo",
    "EngineStartError",
    "OutputStream",
    "Push",
    "RequestFailed",
    "RequestRefused",
]
