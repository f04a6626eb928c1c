"""POST /v1/responses: OpenAI's Responses interface."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator

from ..core.answers import RequestOutput
from ..dialects.answer import Answer
from ..dialects.parts import CallArguments, CallBegin, Part, Reasoning, Text
from . import answers
from . import responses_schema as schema
from .dialect import Reader
from .errors import as_api_error
from .responses_input import (
    Messages,
    arguments_of,
    messages_of,
    sampling_params,
    template_options,
    tool_use,
)
from .service import Caller, Service, Work
from .sse import NOWHERE, event
from .structured import complete

PATH = "/v1/responses"
_COMPLETE = ("stop", "tool_calls")  # finish reasons
_REASONS = {"length": "max_output_tokens"}  # of an incomplete response; the others keep our names


class Responses:
    """One response: `whole()` or `events()`, once. Errors: ApiError, and those of Service.run()."""

    connection = NOWHERE  # whatever is offered: every part is an output

    def __init__(self, service: Service, request: schema.ResponsesRequest, caller: Caller) -> None:
        service.check_model(request.model)
        self._service = service
        self._request = request
        self._caller = caller
        self._params = sampling_params(request)
        self._tools = tool_use(request)
        self._options = template_options(request, service.dialect)
        earlier: Messages = []
        if request.previous_response_id is not None:
            earlier = service.responses.get(caller.name, request.previous_response_id)
        self._messages = messages_of(request, earlier)
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._fingerprint = service.fingerprint
        self._items = _Items()
        self._reader: Reader | None = None

    async def _outputs(self) -> AsyncGenerator[RequestOutput, None]:
        request, service = self._request, self._service
        messages = self._messages
        if request.instructions:
            messages = [{"role": "system", "content": request.instructions}, *messages]
        turn = await service.dialect.turn(
            service.keeper.llm, messages, self._params, self._tools, self._options
        )
        self._reader = turn.reader()
        work = Work(
            prompt=turn.prompt,
            params=turn.params,
            caller=self._caller,
            priority=request.priority,
            timeout_ms=request.timeout_ms,
            cache_salt=request.cache_salt,
            request_id=self._id,
            form_field=turn.form_field("text.format"),
        )
        async for output in service.run(work):
            yield output

    async def whole(self) -> schema.ResponsesAnswer:
        """The response when it is complete."""
        last = None
        async for output in self._outputs():
            last = output
        assert last is not None and self._reader is not None  # run() yields at least the ending
        for part in self._reader.feed(last.outputs[0].text, last=True):
            for _ in self._items.add(part):
                pass
        for _ in self._items.end(self._status(last)):
            pass
        return await self._ended(last)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: the response as it begins, its items as they come, its end."""
        number = 0

        def said(one: schema.ResponsesEvent) -> bytes:
            nonlocal number
            one.sequence_number = number
            number += 1
            return event(one, one.type)

        try:
            async for output in self._outputs():
                assert self._reader is not None
                if number == 0:  # what the door refuses is refused before the first event
                    for kind in ("response.created", "response.in_progress"):
                        yield said(_event(kind, response=self._answer("in_progress", [])))
                for part in self._reader.feed(output.deltas[0], last=output.finished):
                    for one in self._items.add(part):
                        yield said(one)
                if output.finished:
                    for one in self._items.end(self._status(output)):
                        yield said(one)
                    answer = await self._ended(output)
                    yield said(_event(f"response.{answer.status}", response=answer))
        except Exception as error:
            known = as_api_error(error)
            if number == 0 or known is None:
                raise
            answer = self._answer("failed", self._items.items)
            answer.error = schema.Failure(code=known.row.code, message=str(known))
            yield said(_event("response.failed", response=answer))

    def _status(self, output: RequestOutput) -> str:
        assert self._reader is not None
        complete = self._reader.finish_reason(output.outputs[0]) in _COMPLETE
        return "completed" if complete else "incomplete"

    async def _ended(self, output: RequestOutput) -> schema.ResponsesAnswer:
        """The whole response; kept, where it may be gone on with."""
        reader, service = self._reader, self._service
        assert reader is not None
        (completion,) = output.outputs
        answer = self._answer(self._status(output), self._items.items)
        if answer.status == "incomplete":
            reason = reader.finish_reason(completion)
            answer.incomplete_details = schema.Incomplete(reason=_REASONS.get(reason, reason))
        thoughts = await service.dialect.reasoning_tokens(
            service.keeper.llm, reader, completion.token_ids
        )
        usage = output.usage
        answer.usage = schema.ResponsesUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=schema.TokenDetails(usage.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=schema.CompletionDetails(thoughts),
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
        )
        answer.seed = completion.seed
        answer.complete = complete(completion.complete)
        answer.timings = answers.timings(output)
        if answer.store:
            kept = [*self._messages, *_as_messages(reader.answer, self._items)]
            service.responses.keep(self._caller.name, self._id, kept)
        return answer

    def _answer(self, status: str, items: list[schema.OutputItem]) -> schema.ResponsesAnswer:
        request, params = self._request, self._params
        return schema.ResponsesAnswer(
            id=self._id,
            created_at=self._created,
            status=status,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            model=self._service.model_name,
            output=items,
            parallel_tool_calls=self._tools.parallel,
            previous_response_id=request.previous_response_id,
            reasoning=request.reasoning or schema.ReasoningOptions(),
            store=request.store is not False,
            temperature=params.temperature,
            text=request.text or schema.TextOptions(format=schema.PlainFormat()),
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            top_p=params.top_p,
            usage=None,
            metadata=request.metadata or {},
            user=request.user,
            system_fingerprint=self._fingerprint,
        )


def _as_messages(answer: Answer, items: _Items) -> Messages:
    """An answer as a later turn's template reads it."""
    message: dict[str, object] = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    calls = [item for item in items.items if isinstance(item, schema.OutputCall)]
    if calls:
        message["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": arguments_of(call.arguments)},
            }
            for call in calls
        ]
    return [message]


class _Items:
    """The items of an answer as they grow, and the events that tell so; the last one is open."""

    def __init__(self) -> None:
        self.items: list[schema.OutputItem] = []

    def add(self, part: Part) -> Iterator[schema.ResponsesEvent]:
        """The events of one part. They show the items as they are when they are made."""
        match part:
            case Text(text=text):
                if not self._is_open(schema.OutputMessage):
                    yield from self._begin_message()
                message = self.items[-1]
                assert isinstance(message, schema.OutputMessage)
                message.content[0].text += text
                yield self._at("response.output_text.delta", delta=text, logprobs=[], content=True)
            case Reasoning(text=text):
                if not self._is_open(schema.OutputReasoning):
                    yield from self._begin_reasoning()
                thoughts = self.items[-1]
                assert isinstance(thoughts, schema.OutputReasoning)
                thoughts.content[0].text += text
                yield self._at("response.reasoning_text.delta", delta=text, content=True)
            case CallBegin(name=name):
                yield from self._begin_call(name)
            case CallArguments(text=text):
                call = self.items[-1]
                assert isinstance(call, schema.OutputCall)
                call.arguments += text
                yield self._at("response.function_call_arguments.delta", delta=text)

    def end(self, status: str) -> Iterator[schema.ResponsesEvent]:
        """The last events. An answer has one item at least."""
        if not self.items:
            yield from self._begin_message()
        yield from self._end(status)

    def _is_open(self, kind: type) -> bool:
        return bool(self.items) and isinstance(self.items[-1], kind)

    def _begin(self, item: schema.OutputItem) -> Iterator[schema.ResponsesEvent]:
        if self.items:
            yield from self._end("completed")
        self.items.append(item)

    def _begin_message(self) -> Iterator[schema.ResponsesEvent]:
        new = schema.OutputMessage(id=_id("msg"), status="in_progress", content=[])
        yield from self._begin(new)
        yield self._at("response.output_item.added", item=new)
        part = schema.OutputText(text="", annotations=[], logprobs=[])
        new.content.append(part)
        yield self._at("response.content_part.added", part=part, content=True)

    def _begin_reasoning(self) -> Iterator[schema.ResponsesEvent]:
        new = schema.OutputReasoning(id=_id("rs"), status="in_progress", content=[])
        yield from self._begin(new)
        yield self._at("response.output_item.added", item=new)
        part = schema.ReasoningText(text="")
        new.content.append(part)
        yield self._at("response.content_part.added", part=part, content=True)

    def _begin_call(self, name: str) -> Iterator[schema.ResponsesEvent]:
        new = schema.OutputCall(
            id=_id("fc"), call_id=_id("call"), name=name, arguments="", status="in_progress"
        )
        yield from self._begin(new)
        yield self._at("response.output_item.added", item=new)

    def _end(self, status: str) -> Iterator[schema.ResponsesEvent]:
        item = self.items[-1]
        match item:
            case schema.OutputMessage(content=[part]):
                yield self._at(
                    "response.output_text.done", text=part.text, logprobs=[], content=True
                )
                yield self._at("response.content_part.done", part=part, content=True)
            case schema.OutputReasoning(content=[thought]):
                yield self._at("response.reasoning_text.done", text=thought.text, content=True)
                yield self._at("response.content_part.done", part=thought, content=True)
            case schema.OutputCall(name=name, arguments=arguments):
                yield self._at(
                    "response.function_call_arguments.done", name=name, arguments=arguments
                )
        item.status = status
        yield self._at("response.output_item.done", item=item)

    def _at(self, kind: str, *, content: bool = False, **fields: object) -> schema.ResponsesEvent:
        """An event of the last item."""
        said = _event(kind, output_index=len(self.items) - 1, **fields)
        if "item" not in fields:
            said.item_id = self.items[-1].id
        if content:
            said.content_index = 0
        return said


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


def _event(kind: str, **fields: object) -> schema.ResponsesEvent:
    return schema.ResponsesEvent(type=kind, sequence_number=0, **fields)  # type: ignore[arg-type]


__all__ = ["PATH", "Responses"]
