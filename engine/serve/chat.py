"""POST /v1/chat/completions."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import AsyncGenerator, Sequence

from msgspec import UNSET, UnsetType

from ..core.answers import CompletionOutput, Growth, RequestOutput
from ..dialects.parts import CallArguments, CallBegin, Part, Reasoning, Text
from . import answer_schema, answers, schema
from .dialect import Reader
from .requests import chat_params, template_messages, template_options, tool_use
from .service import Caller, Service, Work
from .sse import DONE, NOWHERE, Frame, event
from .structured import asked_in, complete


class Chat:
    """One chat completion: `whole()` or `events()`, once. Errors: those of Service.run()."""

    def __init__(self, service: Service, request: schema.ChatRequest, caller: Caller) -> None:
        service.check_model(request.model)
        self._service = service
        self._request = request
        self._caller = caller
        self._params = chat_params(request)
        self._tools = tool_use(request)
        self._options = template_options(request, service.dialect)
        self._id = f"chatcmpl-{request.request_id or secrets.token_hex(12)}"
        self._created = int(time.time())
        self._fingerprint = service.fingerprint
        self._readers: list[Reader] = []
        self.connection = NOWHERE

    async def _outputs(self) -> AsyncGenerator[RequestOutput, None]:
        request, service = self._request, self._service
        turn = await service.dialect.turn(
            service.keeper.llm,
            template_messages(request.messages),
            self._params,
            self._tools,
            self._options,
        )
        self._readers = [turn.reader() for _ in range(self._params.n)]
        work = Work(
            prompt=turn.prompt,
            params=turn.params,
            caller=self._caller,
            priority=request.priority,
            timeout_ms=request.timeout_ms,
            cache_salt=request.cache_salt,
            final_only=not request.stream,
            request_id=self._id,
            form_field=turn.form_field(asked_in(request.structured_outputs)),
            push=self._push if self._text_alone() else None,
        )
        async for output in service.run(work):
            yield output

    async def whole(self) -> answer_schema.ChatCompletion:
        """The answer when it is complete."""
        last = None
        async for output in self._outputs():
            last = output
        assert last is not None  # run() yields at least the ending
        for reader, completion in zip(self._readers, last.outputs, strict=True):
            reader.feed(completion.text, last=True)
        return answer_schema.ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._service.model_name,
            choices=[
                answer_schema.ChatChoice(
                    index=i,
                    message=_message(self._readers[i]),
                    logprobs=answers.chat_logprobs(c, 0, self._request.top_logprobs or 0),
                    finish_reason=self._readers[i].finish_reason(c),
                    stop_reason=c.stop_reason,
                    seed=c.seed,
                    token_ids=c.token_ids if self._request.return_token_ids else UNSET,
                    complete=complete(c.complete),
                )
                for i, c in enumerate(last.outputs)
            ],
            usage=await self._usage(last),
            timings=answers.timings(last),
            prompt_logprobs=answers.prompt_logprobs(last),
            receipt=await self._service.receipt(last, self._params)
            if self._request.receipt
            else UNSET,
            system_fingerprint=self._fingerprint,
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: the role, the answer as it comes, an ending of each choice, usage."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        shown = [0] * self._params.n  # tokens
        ended = [False] * self._params.n
        begun = False
        async for output in self._outputs():
            usage = answers.part_usage(options, [output])
            if not begun:  # what the door refuses is refused before the first part
                begun = True
                for index in range(self._params.n):
                    yield self._part(
                        index, answer_schema.Delta(role="assistant", content=""), usage
                    )
            for index, completion in enumerate(output.outputs):
                if ended[index]:
                    continue
                reader = self._readers[index]
                num_calls = len(reader.answer.calls or ())
                finished = ended[index] = completion.finish_reason is not None
                parts = reader.feed(output.deltas[index], last=finished)
                deltas = _deltas(reader, parts, num_calls)
                news = len(completion.token_ids) > shown[index]
                if not deltas and (finished or (news and completion.logprobs is not None)):
                    deltas = [answer_schema.Delta()]
                for number, delta in enumerate(deltas):
                    first, last = number == 0, number == len(deltas) - 1
                    yield self._part(
                        index,
                        delta,
                        usage,
                        **(self._news(completion, shown[index]) if first else {}),
                        **(_ending(reader, completion) if last and finished else {}),
                    )
                if deltas:
                    shown[index] = len(completion.token_ids)
            if output.finished and with_usage:
                yield event(
                    answer_schema.ChatChunk(
                        id=self._id,
                        created=self._created,
                        model=self._service.model_name,
                        choices=[],
                        system_fingerprint=self._fingerprint,
                        usage=await self._usage(output),
                        timings=answers.timings(output),
                    )
                )
        yield DONE

    def _text_alone(self) -> bool:
        """Whether the parts between the first and the last tell of text and nothing else."""
        request, options = self._request, self._request.stream_options
        return (
            bool(request.stream)
            and self._params.n == 1
            and not request.return_token_ids
            and not (options is not None and options.continuous_usage_stats)
        )

    def _push(self, growth: Growth) -> bool:
        if not self.connection.is_open:
            return False
        reader = self._readers[0]
        num_calls = len(reader.answer.calls or ())
        parts = reader.feed(growth.text, last=False)
        match parts:
            case []:
                return True
            case [Text(text=text)]:
                frames = self._frame.of(text)
            case _:
                usage = self._part_usage()
                deltas = _deltas(reader, parts, num_calls)
                frames = b"".join([self._part(0, delta, usage) for delta in deltas])
        self.connection.write(frames)
        return True

    @functools.cached_property
    def _frame(self) -> Frame:
        usage = self._part_usage()
        return Frame(lambda text: self._part(0, answer_schema.Delta(content=text), usage))

    def _part_usage(self) -> answer_schema.Usage | UnsetType | None:
        return answers.part_usage(self._request.stream_options, ())

    def _news(self, completion: CompletionOutput, shown: int) -> dict[str, object]:
        """What a part says of the tokens that are new in it."""
        ids = completion.token_ids[shown:] if self._request.return_token_ids else UNSET
        logprobs = answers.chat_logprobs(completion, shown, self._request.top_logprobs or 0)
        return {"logprobs": logprobs, "token_ids": ids}

    async def _usage(self, output: RequestOutput) -> answer_schema.Usage:
        service, thoughts = self._service, 0
        for reader, completion in zip(self._readers, output.outputs, strict=True):
            thoughts += await service.dialect.reasoning_tokens(
                service.keeper.llm, reader, completion.token_ids
            )
        return answers.usage(output, thoughts)

    def _part(
        self,
        index: int,
        delta: answer_schema.Delta,
        usage: answer_schema.Usage | UnsetType | None,
        **fields: object,
    ) -> bytes:
        choice = answer_schema.ChunkChoice(
            index=index,
            delta=delta,
            **{"logprobs": None, "finish_reason": None, **fields},  # type: ignore[arg-type]
        )
        return event(
            answer_schema.ChatChunk(
                id=self._id,
                created=self._created,
                model=self._service.model_name,
                choices=[choice],
                system_fingerprint=self._fingerprint,
                usage=usage,
            )
        )


def _ending(reader: Reader, completion: CompletionOutput) -> dict[str, object]:
    return {
        "finish_reason": reader.finish_reason(completion),
        "stop_reason": completion.stop_reason,
        "seed": completion.seed,
        "complete": complete(completion.complete),
    }


def _message(reader: Reader) -> answer_schema.AnswerMessage:
    answer = reader.answer
    message = answer_schema.AnswerMessage(content=answer.text)
    if answer.reasoning:
        message.reasoning_content = message.reasoning = answer.reasoning
    if answer.calls:
        message.content = answer.text or None
        message.tool_calls = [
            answer_schema.AnswerCall(
                id=reader.call_id(i),
                function=schema.FunctionCall(name=call.name, arguments=call.arguments),
            )
            for i, call in enumerate(answer.calls)
        ]
    return message


def _deltas(reader: Reader, parts: Sequence[Part], num_calls: int) -> list[answer_schema.Delta]:
    """One a part. `num_calls`: of the answer before these parts."""
    deltas = []
    for part in parts:
        match part:
            case Text(text=text):
                delta = answer_schema.Delta(content=text)
            case Reasoning(text=text):
                delta = answer_schema.Delta(reasoning_content=text, reasoning=text)
            case CallBegin(name=name):
                call = answer_schema.ToolCallDelta(
                    index=num_calls,
                    id=reader.call_id(num_calls),
                    type="function",
                    function=answer_schema.FunctionDelta(name=name, arguments=""),
                )
                delta = answer_schema.Delta(tool_calls=[call])
                num_calls += 1
            case CallArguments(text=text):
                function = answer_schema.FunctionDelta(arguments=text)
                piece = answer_schema.ToolCallDelta(index=num_calls - 1, function=function)
                delta = answer_schema.Delta(tool_calls=[piece])
        deltas.append(delta)
    return deltas


__all__ = ["Chat"]
