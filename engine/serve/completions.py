"""POST /v1/completions: plain text, one or several prompts in one call."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import AsyncGenerator, Sequence

from msgspec import UNSET

from ..core.answers import CompletionOutput, Growth, RequestOutput
from . import answer_schema, answers, schema
from .requests import completion_params, prompts
from .service import Caller, Service, Work
from .sse import DONE, NOWHERE, Frame, event
from .structured import asked_in, complete


class Completions:
    """One call: `whole()` or `events()`, once. Choice p * n + i is sample i of prompt p.

    Errors: those of Service.run().
    """

    def __init__(self, service: Service, request: schema.CompletionRequest, caller: Caller) -> None:
        service.check_model(request.model)
        self._service = service
        self._request = request
        self._params = completion_params(request)
        self._id = f"cmpl-{request.request_id or secrets.token_hex(12)}"
        self._created = int(time.time())
        self._fingerprint = service.fingerprint
        self.connection = NOWHERE
        self._first_texts: dict[int, str] = {}  # of echoed prompts' first tokens
        many = prompts(request.prompt)
        self._works = [
            Work(
                prompt=prompt,
                params=self._params,
                caller=caller,
                priority=request.priority,
                timeout_ms=request.timeout_ms,
                cache_salt=request.cache_salt,
                final_only=not request.stream,
                request_id=self._id if len(many) == 1 else f"{self._id}-{index}",
                form_field=asked_in(request.structured_outputs),
                push=self._push if self._text_alone(many) else None,
            )
            for index, prompt in enumerate(many)
        ]

    async def _outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        async for prompt, output in _together([self._service.run(w) for w in self._works]):
            echoes = self._request.echo and output.prompt_logprobs is not None
            if echoes and prompt not in self._first_texts:
                llm = self._service.keeper.llm
                self._first_texts[prompt] = await llm.detokenize(output.prompt_token_ids[:1])
            yield prompt, output

    async def whole(self) -> answer_schema.Completion:
        """The answer when all of it is complete."""
        last = {index: output async for index, output in self._outputs()}
        outputs = [last[index] for index in sorted(last)]
        return self._answer(
            [
                self._choice(prompt, c, c.text, 0, True, output)
                for prompt, output in enumerate(outputs)
                for c in output.outputs
            ],
            usage=answers.total_usage(outputs),
            timings=answers.timings(outputs[0]) if len(outputs) == 1 else UNSET,
            receipt=await self._service.receipt(outputs[0], self._params)
            if self._request.receipt
            else UNSET,
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: the text as it comes, an ending of each choice, usage."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        shown: dict[tuple[int, int], int] = {}  # tokens of each choice
        last: dict[int, RequestOutput] = {}
        ended: set[tuple[int, int]] = set()
        async for prompt, output in self._outputs():
            last[prompt] = output
            for completion, delta in zip(output.outputs, output.deltas, strict=True):
                key = (prompt, completion.index)
                start = shown.get(key, 0)
                finished = completion.finish_reason is not None and key not in ended
                news = completion.logprobs is not None and len(completion.token_ids) > start
                if not (delta or finished or news):
                    continue
                first = key not in shown
                shown[key] = len(completion.token_ids)
                if finished:
                    ended.add(key)
                yield event(
                    self._answer(
                        [self._choice(prompt, completion, delta, start, finished, output, first)],
                        usage=answers.part_usage(options, last.values()),
                    )
                )
        if with_usage:
            outputs = list(last.values())
            yield event(
                self._answer(
                    [],
                    usage=answers.total_usage(outputs),
                    timings=answers.timings(outputs[0]) if len(outputs) == 1 else UNSET,
                )
            )
        yield DONE

    def _text_alone(self, many: Sequence[object]) -> bool:
        """Whether the parts between the first and the last are a text's and nothing else."""
        request, options = self._request, self._request.stream_options
        return (
            bool(request.stream)
            and len(many) == self._params.n == 1
            and not request.return_token_ids
            and not (options is not None and options.continuous_usage_stats)
        )

    def _push(self, growth: Growth) -> bool:
        connection = self.connection
        if not connection.is_open:
            return False
        if growth.text:
            connection.write(self._frame.of(growth.text))
        return True

    @functools.cached_property
    def _frame(self) -> Frame:
        usage = answers.part_usage(self._request.stream_options, ())

        def made(text: str) -> bytes:
            choice = answer_schema.CompletionChoice(
                index=0, text=text, logprobs=None, finish_reason=None
            )
            return event(self._answer([choice], usage=usage))

        return Frame(made)

    def _choice(
        self,
        prompt: int,
        completion: CompletionOutput,
        text: str,
        start: int,
        finished: bool,
        output: RequestOutput,
        first: bool = True,
    ) -> answer_schema.CompletionChoice:
        logprobs = None
        if completion.logprobs is not None:
            echoed = first and self._request.echo and output.prompt_logprobs is not None
            logprobs = answers.completion_logprobs(
                completion,
                start,
                self._request.logprobs or 0,
                offset=len(completion.text) - len(text),
                prompt=(output.prompt_token_ids, output.prompt_logprobs or ()) if echoed else None,
                first_text=self._first_texts.get(prompt, ""),
            )
        return answer_schema.CompletionChoice(
            index=prompt * self._params.n + completion.index,
            text=text,
            logprobs=logprobs,
            finish_reason=completion.finish_reason if finished else None,
            stop_reason=completion.stop_reason if finished else UNSET,
            seed=completion.seed if finished else UNSET,
            complete=complete(completion.complete) if finished else UNSET,
            token_ids=completion.token_ids[start:] if self._request.return_token_ids else UNSET,
        )

    def _answer(
        self,
        choices: list[answer_schema.CompletionChoice],
        *,
        usage: answer_schema.Usage | object | None = UNSET,
        timings: answer_schema.Timings | object = UNSET,
        receipt: object = UNSET,
    ) -> answer_schema.Completion:
        return answer_schema.Completion(
            id=self._id,
            created=self._created,
            model=self._service.model_name,
            choices=choices,
            system_fingerprint=self._fingerprint,
            usage=usage,  # type: ignore[arg-type]
            timings=timings,  # type: ignore[arg-type]
            receipt=receipt,
        )


async def _together(
    streams: Sequence[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of several requests as they come, with their index. One's failure ends all."""
    if len(streams) == 1:  # no task for each token
        async with contextlib.aclosing(streams[0]) as alone:
            async for output in alone:
                yield 0, output
        return
    waiting: dict[asyncio.Future[RequestOutput], int] = {}

    def ask(index: int) -> None:
        waiting[asyncio.ensure_future(anext(streams[index]))] = index

    try:
        for index in range(len(streams)):
            ask(index)
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(future)
                try:
                    output = future.result()
                except StopAsyncIteration:
                    continue
                ask(index)
                yield index, output
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


__all__ = ["Completions"]
