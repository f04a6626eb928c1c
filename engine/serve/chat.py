"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator

from msgspec import UNSET

from ..core.request import RequestOutput
from . import answers, schema
from .requests import chat_params, template_messages, template_options
from .service import Caller, Service, Work
from .sse import DONE, event


class Chat:
    """One chat completion: `whole()` or `events()`, once. Errors: those of Service.run()."""

    def __init__(self, service: Service, request: schema.ChatRequest, caller: Caller) -> None:
        service.check_model(request.model)
        self._service = service
        self._request = request
        self._caller = caller
        self._params = chat_params(request)
        self._options = template_options(request)
        self._id = f"chatcmpl-{request.request_id or secrets.token_hex(12)}"
        self._created = int(time.time())
        self._fingerprint = service.fingerprint

    async def _outputs(self) -> AsyncGenerator[RequestOutput, None]:
        request = self._request
        ids = await self._service.keeper.llm.render_chat(
            template_messages(request.messages), **self._options
        )
        work = Work(
            prompt=ids,
            params=self._params,
            caller=self._caller,
            priority=request.priority,
            timeout_ms=request.timeout_ms,
            cache_salt=request.cache_salt,
            final_only=not request.stream,
            request_id=self._id,
        )
        async for output in self._service.run(work):
            yield output

    async def whole(self) -> schema.ChatCompletion:
        """The answer when it is complete."""
        last = None
        async for output in self._outputs():
            last = output
        assert last is not None  # run() yields at least the ending
        return schema.ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._service.model_name,
            choices=[
                schema.ChatChoice(
                    index=i,
                    message=schema.AnswerMessage(content=c.text),
                    logprobs=answers.chat_logprobs(c, 0, self._request.top_logprobs or 0),
                    finish_reason=c.finish_reason or "abort",
                    stop_reason=c.stop_reason,
                    seed=c.seed,
                    token_ids=c.token_ids if self._request.return_token_ids else UNSET,
                )
                for i, c in enumerate(last.outputs)
            ],
            usage=answers.usage(last),
            timings=answers.timings(last),
            prompt_logprobs=answers.prompt_logprobs(last),
            receipt=await self._service.receipt(last, self._params)
            if self._request.receipt
            else UNSET,
            system_fingerprint=self._fingerprint,
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: the role, the text as it comes, an ending of each choice, usage."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        shown = [0] * self._params.n  # tokens
        ended = [False] * self._params.n
        begun = False
        async for output in self._outputs():
            if not begun:  # what the door refuses is refused before the first part
                begun = True
                for index in range(self._params.n):
                    yield self._part(index, schema.Delta(role="assistant", content=""), with_usage)
            for index, completion in enumerate(output.outputs):
                delta = output.deltas[index]
                news = len(completion.token_ids) > shown[index]
                finished = completion.finish_reason is not None and not ended[index]
                if not (delta or finished or (news and completion.logprobs is not None)):
                    continue
                yield self._part(
                    index,
                    schema.Delta(content=delta) if delta else schema.Delta(),
                    with_usage,
                    logprobs=answers.chat_logprobs(
                        completion, shown[index], self._request.top_logprobs or 0
                    ),
                    finish_reason=completion.finish_reason if finished else None,
                    stop_reason=completion.stop_reason if finished else UNSET,
                    seed=completion.seed if finished else UNSET,
                    token_ids=completion.token_ids[shown[index] :]
                    if self._request.return_token_ids
                    else UNSET,
                )
                shown[index] = len(completion.token_ids)
                ended[index] = completion.finish_reason is not None
            if output.finished and with_usage:
                yield event(
                    schema.ChatChunk(
                        id=self._id,
                        created=self._created,
                        model=self._service.model_name,
                        choices=[],
                        system_fingerprint=self._fingerprint,
                        usage=answers.usage(output),
                        timings=answers.timings(output),
                    )
                )
        yield DONE

    def _part(self, index: int, delta: schema.Delta, with_usage: bool, **fields: object) -> bytes:
        choice = schema.ChunkChoice(
            index=index,
            delta=delta,
            **{"logprobs": None, "finish_reason": None, **fields},  # type: ignore[arg-type]
        )
        return event(
            schema.ChatChunk(
                id=self._id,
                created=self._created,
                model=self._service.model_name,
                choices=[choice],
                system_fingerprint=self._fingerprint,
                usage=None if with_usage else UNSET,
            )
        )


__all__ = ["Chat"]
