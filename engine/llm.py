"""The offline face: generate(), chat(), stream(), score() over an engine in this process."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import batch as batches
from .batch.manifest import engine_facts
from .config import EngineConfig
from .core.answers import RequestOutput
from .core.checks import as_prompt, check_params
from .core.parameter import ParameterError
from .core.sampling_params import SamplingParams
from .engine import Engine, EngineStats
from .load.tokenizer import Tokenizer
from .receipts import Receipt

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None
_Inbox = list[RequestOutput]


@dataclass(frozen=True)
class EmbeddingOutput:
    """A text's embedding, float32 [H] of unit length, and the tokens that it is the mean of."""

    prompt_token_ids: tuple[int, ...]
    embedding: np.ndarray


@dataclass(frozen=True)
class ScoreOutput:
    """Logprobs (natural log) of a text's own tokens: entry i is of token i + 1 given its past."""

    prompt_token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.logprobs)


class LLM:
    """A model loaded in this process.

        llm = LLM("smollm2")
        for out in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(out.outputs[0].text)

    `model` is a folder, a .gguf file, a Hugging Face id or a short name (`engineroom models`).
    Options are EngineConfig's fields; an unknown one is an error. Loading raises SourceError,
    CheckpointError, ConfigError, BackendUnavailable or DoesNotFit.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        max_model_len: int | None = None,
        **options: Any,
    ) -> None:
        options |= {
            "device": device,
            "dtype": dtype,
            "quantization": quantization,
            "max_model_len": max_model_len,
        }
        self._engine = Engine.from_model(model, EngineConfig.from_options(model, options))
        self._ids = itertools.count()
        self._inboxes: dict[str, _Inbox] = {}  # whoever turns the engine delivers to all
        self._lock = threading.Lock()  # the engine has one caller at a time

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        priority: int = 0,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts (texts, or lists of token ids); outputs in the prompts' order.

        `params` is one SamplingParams for all (default: SamplingParams()) or one per prompt.
        Errors: ParameterError, AdmissionError, naming the prompt; nothing keeps running then.
        """
        many = _as_prompts(prompts)
        return self._run(many, _as_params(params, len(many)), priority, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template.

        A message is {"role": ..., "content": ...}. `template_options` (tools, documents,
        add_generation_prompt, and the template's own variables) go to the template.
        Errors: TemplateError besides those of generate().
        """
        several = isinstance(_first(messages), list | tuple)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [self._engine.render_chat(c, **template_options) for c in conversations]
        return self._run(prompts, _as_params(params, len(prompts)), 0, use_tqdm)

    def stream(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Yield one request's growing output as tokens come; `out.deltas[i]` is the new text.

        `prompt` is text, token ids, or a conversation. Closing the iterator aborts the request.
        """
        if isinstance(_first(prompt), Mapping):
            ids: Prompt = self._engine.render_chat(prompt)  # type: ignore[arg-type]
        else:
            ids = prompt  # type: ignore[assignment]
        inbox: _Inbox = []
        request_id = self._add(inbox, ids, params or SamplingParams())
        yield from self._drive(request_id, inbox)

    def score(self, prompts: Prompt | Sequence[Prompt]) -> list[ScoreOutput]:
        """Logprob of every token of each prompt but the first, given the tokens before it."""
        many = _as_prompts(prompts)
        params = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0.0)
        outputs = self._run(many, [params] * len(many), 0, False)
        return [
            ScoreOutput(
                out.prompt_token_ids,
                tuple(
                    entry[token].logprob
                    for token, entry in zip(
                        out.prompt_token_ids, out.prompt_logprobs or (), strict=True
                    )
                    if entry is not None
                ),
            )
            for out in outputs
        ]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingOutput]:
        """The mean of the last hidden states of each prompt's tokens, at unit length.

        Every prompt is computed whole: the prefix cache holds no hidden states. What is not
        finite is a model's own fault and stays as it is. Errors: those of generate(); RuntimeError
        where a prompt's step failed.
        """
        many = _as_prompts(prompts)
        params = SamplingParams(truncate_prompt_tokens=truncate_prompt_tokens)
        outputs = self._run(many, [params] * len(many), 0, use_tqdm, embed=True)
        for index, out in enumerate(outputs):
            if out.embedding is None:
                raise RuntimeError(f"prompt {index} of {len(many)}: {out.outputs[0].error}")
        return [
            EmbeddingOutput(out.prompt_token_ids, np.array(out.embedding, np.float32))
            for out in outputs
        ]

    def score_stream(self, prompt: Prompt) -> Iterator[tuple[int, np.ndarray]]:
        """Full-vocabulary logprobs, in chunks: (position, fp32 [n, V]).

        Row j of a chunk is the distribution of the token at position + j given those before it;
        the last row is of the token that would follow the prompt.
        """
        chunks: list[tuple[int, np.ndarray]] = []
        inbox: _Inbox = []
        request_id = self._add(
            inbox,
            prompt,
            SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0.0),
            observer=lambda position, rows: chunks.append((position, rows)),
        )
        for _ in self._drive(request_id, inbox):
            yield from chunks
            chunks.clear()

    def batch(
        self,
        inputs: str | Path | Sequence[str | Path],
        output: str | Path,
        *,
        format: str | None = None,
        prompt_template: str | None = None,
        system_template: str | None = None,
        id_column: str | None = None,
        chat: bool = False,
        params: SamplingParams = batches.BATCH_DEFAULTS,
        on_error: str = "stop",
        restart: bool = False,
        max_cost: float | None = None,
        deadline: str | None = None,
        receipts: bool = False,
        use_tqdm: bool = True,
    ) -> batches.Summary:
        """Answer files of requests in OpenAI's batch format into a file, losing nothing.

        Whatever ends it, calling it again goes on from `output`.journal, and the finished file is
        the same byte for byte. `format` "text" takes each line as a prompt; "csv" and "parquet"
        fill `prompt_template` and, with `chat`, `system_template` from a row's columns and name
        the row by `id_column`; None goes by the files' names. `params` is what a line leaves out;
        `on_error` "record" makes bad lines errors of the output; with `receipts` each answer
        carries its receipt. See docs/batch.md. Errors: BatchError.
        """
        return batches.run(
            _Turns(self),
            [inputs] if isinstance(inputs, str | Path) else inputs,
            output,
            model=engine_facts(self._engine),
            format=format,
            prompting=batches.Prompting(prompt_template, system_template, id_column, chat),
            params=params,
            on_error=on_error,
            restart=restart,
            limits=batches.Limits(max_cost=max_cost, deadline=deadline),
            progress=use_tqdm,
            receipts=self.engine.receipt if receipts else None,
        )

    def receipt(self, output: RequestOutput, params: SamplingParams | None = None) -> Receipt:
        """What a finished output was computed from, and what came of it: docs/receipts.md.

        `params` are those that it was asked for with. The first receipt reads the whole model once,
        for its hash. Errors: ReceiptError for a request that did not end by itself.
        """
        return self._engine.receipt(output, params or SamplingParams())

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        """Release the model; the object is of no use afterwards."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------- private

    def _add(
        self,
        inbox: _Inbox,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        **options: Any,
    ) -> str:
        check_params(params)
        self._engine.prepare(params)  # without the lock: others' turns go on
        with self._lock:
            request_id = request_id or f"llm-{next(self._ids)}"
            self._engine.add_request(request_id, prompt, params, **options)
            self._inboxes[request_id] = inbox
            return request_id

    def _turn(self, inbox: _Inbox) -> list[RequestOutput]:
        """Turn the engine once, unless another caller's turn has already brought our mail."""
        with self._lock:
            if not inbox:
                self._deliver(self._engine.step())
            mail, inbox[:] = list(inbox), []
            return mail

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for out in outputs:
            inbox = self._inboxes.get(out.request_id)
            if inbox is not None:
                inbox.append(out)
            if out.finished:
                self._inboxes.pop(out.request_id, None)

    def _drive(self, request_id: str, inbox: _Inbox) -> Iterator[RequestOutput]:
        """Turn the engine until one request is finished; abort it where the caller leaves."""
        finished = False
        try:
            while not finished:
                for out in self._turn(inbox):
                    finished = out.finished
                    yield out
        finally:
            if not finished:
                self._abort([request_id])

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        priority: int,
        use_tqdm: bool,
        *,
        embed: bool = False,
    ) -> list[RequestOutput]:
        inbox: _Inbox = []
        done: dict[str, RequestOutput] = {}
        ids: list[str] = []
        limit = self._engine.config.max_num_seqs * 2
        bar = _progress_bar(len(prompts)) if use_tqdm and sys.stderr.isatty() else None
        try:
            while len(done) < len(prompts):
                # Feed the bounded queue as it empties, so that any number of prompts may come.
                while len(ids) < len(prompts) and len(ids) - len(done) < limit:
                    index = len(ids)
                    try:
                        ids.append(
                            self._add(
                                inbox,
                                prompts[index],
                                params[index],
                                priority=priority,
                                final_only=True,
                                embed=embed,
                            )
                        )
                    except ValueError as error:
                        error.add_note(f"(prompt {index} of {len(prompts)})")
                        raise
                for out in self._turn(inbox):
                    if out.finished:
                        done[out.request_id] = out
                        if bar is not None:
                            bar.update()
        except BaseException:  # Ctrl-C as well: leave nothing running
            self._abort([i for i in ids if i not in done])
            raise
        finally:
            if bar is not None:
                bar.close()
        return [done[request_id] for request_id in ids]

    def _abort(self, request_ids: Sequence[str]) -> None:
        with self._lock:
            for request_id in request_ids:
                self._inboxes.pop(request_id, None)
                self._engine.abort(request_id)


class _Turns:
    """The engine as a batch uses it, beside the LLM's other callers."""

    def __init__(self, llm: LLM) -> None:
        self.config = llm.engine.config
        self.render_chat = llm.engine.render_chat
        self._llm = llm
        self._inbox: _Inbox = []

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        final_only: bool = False,
        embed: bool = False,
    ) -> None:
        self._llm._add(
            self._inbox, prompt, params, request_id=request_id, final_only=final_only, embed=embed
        )

    def step(self) -> list[RequestOutput]:
        return self._llm._turn(self._inbox)

    def abort(self, request_id: str) -> bool:
        self._llm._abort([request_id])
        return True


def _progress_bar(total: int) -> Any:
    from tqdm import tqdm  # late: it costs a tenth of a cold start

    return tqdm(total=total, desc="generating", unit="req")


def _first(sequence: object) -> object:
    """The first entry of a list or the like; None where there is none."""
    return sequence[0] if isinstance(sequence, Sequence) and sequence else None


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One text or one list of ids is one prompt; anything else is a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(as_prompt(list(prompts) if isinstance(prompts, Iterator) else prompts))
    if many and all(isinstance(p, int) and not isinstance(p, bool) for p in many):
        return [many]
    for index, prompt in enumerate(many):
        try:
            many[index] = as_prompt(prompt)
        except ParameterError as error:
            error.add_note(f"(prompt {index} of {len(many)})")
            raise
    return many


def _as_params(params: Params, count: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence):
        check_params(params)
    many = list(params)
    if len(many) != count:
        raise ValueError(f"{len(many)} SamplingParams for {count} prompts: give one, or one each")
    return many
