"""An engine without a model: deterministic outputs, and every misfortune, by prompt.

A text prompt may begin with a word and a colon: refuse, vast, crowded, bug, panic (at the door);
raise, kill, exit, hang (in a step; "hang:2.5" for that many seconds); vanish (forgotten); log,
print, slow (1 ms a step; an embedding never ends). A prompt with say«TEXT» is answered by TEXT, a
byte a token; say«GRAMMAR» by the grammar that the output should have. The models of TEMPLATES have
a chat template to be known by.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from engineroom.engine.config import ConfigError, EngineConfig, ModelConfig, RopeConfig
from engineroom.engine.core.answers import (
    CompletionOutput,
    Growth,
    Logprob,
    RequestOutput,
    Timings,
    Usage,
)
from engineroom.engine.core.checks import AdmissionError, check_token_ids
from engineroom.engine.core.cost import Cost
from engineroom.engine.core.parameter import ParameterError
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.core.structured import StructuredOutput

VOCAB = 1000
MODEL = ModelConfig(
    family="fake",
    vocab_size=VOCAB,
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=8,
    norm_eps=1e-5,
    max_position=4096,
    rope=RopeConfig(theta=1e4, rotary_dim=8),
)

COST = Cost(joules=0.5, money=0.25, grams=None, estimated=True)  # whatever a request does


# What the server reads in a template; "r1" also opens the thoughts in the prompt.
TEMPLATES = {
    "hermes": "{% if enable_thinking %}<think></think>{% endif %}<tool_call>",
    "mistral": "[TOOL_CALLS][",
    "coder": "<tool_call><function=x><parameter=y>",
    "r1": "<think>\n",
    "toolless": "<tool_call>",
}


class Panic(BaseException):
    """What a Rust library raises: no Exception."""


class TemplateError(ValueError):
    """As the chat template's."""


@dataclass(frozen=True)
class FakeStats:
    live: int
    steps: int
    weights: dict[str, float]  # of each tenant met
    blocks: int  # of memory that Python holds in the engine's process


@dataclass
class _Live:
    prompt: str | Sequence[int]
    params: SamplingParams
    output: RequestOutput
    final_only: bool = False
    growths: bool = False
    embed: bool = False
    aborted: bool = False
    script: bytes | None = None


class FakeEngine:
    """EngineLike. `pace` is slept in each step, seconds."""

    def __init__(self, config: EngineConfig, *, pace: float = 0.0) -> None:
        self.config = config
        self.model_config = MODEL
        self.chat_template: object = object()
        if config.model in TEMPLATES:
            self.chat_template = SimpleNamespace(source=TEMPLATES[config.model])
        self.closed = False
        self.steps = 0
        self.prepared: set[StructuredOutput] = set()
        self._pace = pace
        self._weights: dict[str, float] = {}
        self._live: dict[str, _Live] = {}
        self._growths: list[Growth] = []

    @property
    def has_work(self) -> bool:
        return any(not r.aborted for r in self._live.values())  # endings come out of step() alone

    @property
    def num_live(self) -> int:
        return sum(not r.aborted for r in self._live.values())

    def is_prepared(self, params: SamplingParams) -> bool:
        return params.structured is None or params.structured in self.prepared

    def prepare(self, params: SamplingParams) -> None:
        """The grammar "slow" takes a second, "stuck" two minutes; "bad" is refused."""
        assert params.structured is not None
        match params.structured.grammar:
            case "slow":
                time.sleep(1.0)
            case "stuck":
                time.sleep(120.0)
            case "bad":
                raise ParameterError("structured", "structured: grammar cannot be used: it is bad")
        self.prepared.add(params.structured)

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: bytes = b"",
        final_only: bool = False,
        growths: bool = False,
        embed: bool = False,
        tenant: str = "",
        weight: float = 1.0,
    ) -> SimpleNamespace:
        """The word "displace" and a request's id aborts that one, as a full queue does."""
        self._weights[tenant] = weight
        displaced: list[str] = []
        match _word(prompt):
            case "displace":
                displaced = [str(prompt).split(":")[1]]
                self.abort(displaced[0])
            case "refuse":
                raise AdmissionError("context_length", "9000 tokens exceed the 4096 of this model")
            case "vast":
                raise AdmissionError("never_fits", "900 blocks are needed, and there are 64")
            case "crowded":
                raise AdmissionError("queue_full", "1024 requests are waiting already")
            case "bug":
                raise KeyError("a bug of ours")
            case "panic":
                raise Panic("a Rust library's")
        if request_id in self._live:
            raise AdmissionError("duplicate_id", f"{request_id} runs")
        ids = tuple(prompt.encode()) if isinstance(prompt, str) else tuple(prompt)
        check_token_ids(params, ids, VOCAB)
        if not ids:
            raise AdmissionError("prompt_empty", "the prompt is empty: it must hold a token")
        rows = None
        if params.prompt_logprobs is not None:
            rows = (None, *(_row(t, i, params.prompt_logprobs) for i, t in enumerate(ids[1:])))
        seed = params.seed if params.seed is not None else 42
        samples = tuple(
            CompletionOutput(
                index=i,
                text="",
                token_ids=(),
                cumulative_logprob=None,
                logprobs=None if params.logprobs is None else (),
                finish_reason=None,
                stop_reason=None,
                seed=seed,
            )
            for i in range(params.n)
        )
        self._live[request_id] = _Live(
            prompt,
            params,
            RequestOutput(
                request_id=request_id,
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=ids,
                prompt_logprobs=rows,
                outputs=samples,
                finished=False,
                usage=Usage(len(ids), 0, 0),
                timings=Timings(0.0, 0.0, 0.0, 0.0, None),
                deltas=("",) * params.n,
                cost=COST,
            ),
            script=_script(ids, params),
            final_only=final_only or embed,
            growths=growths and params.n == 1 and params.logprobs is params.prompt_logprobs is None,
            embed=embed,
        )
        return SimpleNamespace(displaced=displaced)

    def step(self, tell: object = None) -> list[RequestOutput]:
        self.steps += 1
        if self._pace:
            time.sleep(self._pace)
        outputs = []
        for rid, request in list(self._live.items()):
            if not request.aborted:
                self._misfortune(rid, request)
            if rid in self._live:
                old, request.output = request.output, self._advance(request)
                if request.growths and old.outputs[0].token_ids and not request.output.finished:
                    ids = request.output.outputs[0].token_ids[len(old.outputs[0].token_ids) :]
                    self._growths.append(Growth(rid, ids, request.output.deltas[0]))
                    continue
                if request.output.finished or not request.final_only:
                    outputs.append(request.output)
                if request.output.finished:
                    del self._live[rid]
        return outputs

    def take_growths(self) -> list[Growth]:
        taken, self._growths = self._growths, []
        return taken

    def abort(self, request_id: str) -> bool:
        request = self._live.get(request_id)
        if request is None or request.aborted:
            return False
        request.aborted = True
        return True

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        text = "".join(f"{m['role']}:{m['content']};" for m in messages)
        if "hostile" in text:
            raise TemplateError("the template refuses hostile messages")
        if self.config.model == "toolless":
            options.pop("tools", None)
        text += repr(sorted(options.items()))
        if self.config.model in TEMPLATES:
            more = ("tool_calls", "tool_call_id", "name", "reasoning_content")
            text += json.dumps([{k: m[k] for k in more if k in m} for m in messages])
        if self.config.model == "r1":
            text += "<think>\n"
        return list(text.encode())

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if _word(text) == "bug":
            raise KeyError("a bug of ours")
        return [7] * add_special_tokens + list(text.encode())

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        check_token_ids(SamplingParams(), token_ids, VOCAB)
        return bytes(t for t in token_ids if t < 256).decode("utf-8", "replace")

    def facts(self) -> dict[str, Any]:
        return {"name": "fake", "weights": "0" * 64}

    def stats(self) -> FakeStats:
        gc.collect()
        return FakeStats(self.num_live, self.steps, self._weights, sys.getallocatedblocks())

    def close(self) -> None:
        self.closed = True

    def _misfortune(self, rid: str, request: _Live) -> None:
        match _word(request.prompt):
            case "raise":
                raise RuntimeError("out of cheese")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                print("last words", file=sys.stderr, flush=True)
                os._exit(7)
            case "hang":
                time.sleep(float(str(request.prompt).split(":")[1]))
            case "vanish":
                del self._live[rid]
            case "slow":
                time.sleep(0.001)
            case "log" if not request.output.outputs[0].token_ids:
                logging.getLogger("engineroom.fake").warning("a word %s", "of warning")
            case "print" if not request.output.outputs[0].token_ids:
                print("printed by the child", flush=True)

    def _advance(self, request: _Live) -> RequestOutput:
        old, params = request.output, request.params
        if request.aborted:
            ended = tuple(replace(c, finish_reason="abort") for c in old.outputs)
            return replace(old, outputs=ended, finished=True, deltas=("",) * len(ended))
        if request.embed and _word(request.prompt) == "slow":
            return old
        if request.embed:
            ended = tuple(replace(c, finish_reason="length") for c in old.outputs)
            unit = _embedding(old.prompt_token_ids)
            return replace(old, outputs=ended, finished=True, embedding=unit)
        outputs, deltas = [], []
        limit = params.max_tokens if params.max_tokens is not None else 1 << 30
        for c in old.outputs:
            position = len(c.token_ids)
            token = _token(old.prompt_token_ids, c.seed, c.index, position)
            last = position + 1 >= limit
            script = request.script
            if script is not None:
                token = script[position]
                last = last or position + 1 == len(script)
            # Like a real stream's, text lags behind: it comes in pieces of three tokens.
            tokens = (*c.token_ids, token)
            held = len(tokens) % 3 if not last else 0
            delta = "".join(f"{t}é " for t in tokens[c.text.count(" ") : len(tokens) - held])
            if script is not None:
                said = script[: len(tokens) - held]
                delta = said.decode("utf-8", "replace" if last else "ignore")[len(c.text) :]
            row = None if params.logprobs is None else _row(token, position, params.logprobs)
            outputs.append(
                replace(
                    c,
                    text=c.text + delta,
                    token_ids=tokens,
                    cumulative_logprob=(c.cumulative_logprob or 0.0) - 0.5,
                    logprobs=None if row is None else (*(c.logprobs or ()), row),
                    finish_reason=_reason(script, len(tokens)) if last else None,
                )
            )
            deltas.append(delta)
        done = sum(len(c.token_ids) for c in outputs)
        return replace(
            old,
            outputs=tuple(outputs),
            finished=all(c.finish_reason for c in outputs),
            usage=replace(old.usage, completion_tokens=done),
            timings=Timings(0.0, 0.25, 0.5 * done, 0.25 + 0.5 * done, 0.25),
            deltas=tuple(c.text for c in outputs) if request.final_only else tuple(deltas),
        )


def fake_engine(config: EngineConfig, progress: Callable[[str], None]) -> FakeEngine:
    """The factory of fake_child.py. The model "late" takes a second to load; "missing" is an
    error. "paced" and those of TEMPLATES take 1 ms a step.
    """
    progress(f"making a fake of {config.model}")
    if config.model == "missing":
        raise ConfigError("model", "missing: no such model; did you mean 'fake'?")
    if config.model == "late":
        time.sleep(1.0)
    paced = config.model == "paced" or config.model in TEMPLATES
    return FakeEngine(config, pace=0.001 if paced else 0.0)


def _word(prompt: str | Sequence[int]) -> str:
    return prompt.split(":")[0] if isinstance(prompt, str) and ":" in prompt else ""


def _reason(script: bytes | None, num_tokens: int) -> str:
    return "stop" if script is not None and num_tokens == len(script) else "length"


def _script(ids: Sequence[int], params: SamplingParams) -> bytes | None:
    text = bytes(i for i in ids if i < 256).decode("utf-8", "replace")
    said = re.findall(r"say«(.*?)»", text, re.DOTALL)
    if not said:
        return None
    if said[-1] == "GRAMMAR":
        return str(params.structured and params.structured.grammar).encode()
    return str(said[-1]).encode()


def _token(prompt: Sequence[int], seed: int, index: int, position: int) -> int:
    digest = hashlib.sha256(repr((tuple(prompt), seed, index, position)).encode()).digest()
    return int.from_bytes(digest[:4], "little") % VOCAB


def _embedding(prompt: Sequence[int]) -> tuple[float, ...]:
    """Eight floats that fp32 holds, of unit length for an even number of tokens."""
    if 500 in prompt:
        return (float("nan"),) * 8
    place = sum(prompt) % 8
    return tuple(0.6 if i == place else 0.8 if i == (place + 1) % 8 else 0.0 for i in range(8))


def _row(token: int, position: int, count: int) -> dict[int, Logprob]:
    rows = {(token + k) % VOCAB: Logprob(-0.5 - k, k + 1, f"t{token + k}") for k in range(count)}
    return {**rows, token: Logprob(-0.5 - position / 7, 1, f"t{token}")}
