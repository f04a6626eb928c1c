"""POST /v1/embeddings: texts as vectors, the mean of the served model's last hidden states."""

from __future__ import annotations

import asyncio
import math
import secrets

from ..core.answers import RequestOutput
from ..core.sampling_params import SamplingParams
from ..core.vectors import handed_out
from . import answer_schema, schema
from .bounds import MAX_INPUTS
from .errors import ApiError
from .requests import prompts
from .service import TIMEOUT, Caller, Service, Work


class Embeddings:
    """One call: `whole()`, once. Errors: those of Service.run()."""

    def __init__(self, service: Service, request: schema.EmbeddingRequest, caller: Caller) -> None:
        service.check_model(request.model)
        self._service = service
        self._request = request
        many = prompts(request.input, "input")
        if len(many) > MAX_INPUTS:
            raise ApiError(
                "invalid_value",
                f"input has {len(many)} entries; at most {MAX_INPUTS} in one request",
                param="input",
            )
        width = service.info.model.hidden_size
        self._width = width if request.dimensions is None else request.dimensions
        if not 1 <= self._width <= width:
            raise ApiError(
                "invalid_value",
                f"dimensions must be in 1..{width}, the model's own, not {request.dimensions}",
                param="dimensions",
            )
        params = SamplingParams(truncate_prompt_tokens=request.truncate_prompt_tokens)
        ident = f"embd-{request.request_id or secrets.token_hex(12)}"
        self._works = [
            Work(
                prompt=prompt,
                params=params,
                caller=caller,
                priority=request.priority,
                timeout_ms=request.timeout_ms,
                request_id=f"{ident}-{index}",
                embed=True,
            )
            for index, prompt in enumerate(many)
        ]
        # As many at once as run at once: one call does not fill the queue that others wait in.
        self._seats = asyncio.Semaphore(service.info.config.max_num_seqs)

    async def whole(self) -> answer_schema.EmbeddingList:
        """The answer; one input's failure is the call's, and ends the others."""
        tasks = [asyncio.ensure_future(self._output(work)) for work in self._works]
        try:
            outputs = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        tokens = sum(output.usage.prompt_tokens for output in outputs)
        return answer_schema.EmbeddingList(
            data=[
                answer_schema.Embedding(
                    index=i,
                    embedding=handed_out(
                        output.embedding or (),
                        self._width,
                        as_base64=self._request.encoding_format == "base64",
                    ),
                )
                for i, output in enumerate(outputs)
            ],
            model=self._service.model_name,
            usage=answer_schema.EmbeddingUsage(tokens, tokens),
        )

    async def _output(self, work: Work) -> RequestOutput:
        async with self._seats:
            async for output in self._service.run(work):
                last = output
        if last.outputs[0].finish_reason == TIMEOUT:
            raise ApiError(
                "deadline", f"timeout_ms={work.timeout_ms} ended an input", param="timeout_ms"
            )
        if last.embedding is None or not all(map(math.isfinite, last.embedding)):
            raise ApiError(
                "engine_error", "the model's hidden states of an input are not finite numbers"
            )
        return last


__all__ = ["Embeddings"]
