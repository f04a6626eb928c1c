"""An engine for the command's tests: no model, one scripted token per step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from engineroom.engine.core.answers import CompletionOutput, RequestOutput, Timings, Usage
from engineroom.engine.core.checks import AdmissionError
from engineroom.engine.core.cost import Cost
from engineroom.engine.core.sampling_params import SamplingParams


class ScriptedEngine:
    """Answers with `script` a word per step, or like an echo of the prompt where it is None."""

    def __init__(self, script: Sequence[str] | None = None, context: int = 10_000) -> None:
        self.script = script
        self.context = context
        self.asked: list[tuple[Any, SamplingParams]] = []
        self.rendered: list[list[dict[str, str]]] = []
        self.closed = False
        self.on_step = lambda count: None
        self._running: dict[str, dict[str, Any]] = {}
        self.loaded = self

    def require_chat_template(self) -> Any:
        return SimpleNamespace(source="")

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        self.rendered.append([dict(m) for m in messages])
        return list(range(sum(len(m["content"]) for m in messages)))

    def add_request(
        self, request_id: str, prompt: str | Sequence[int], params: SamplingParams
    ) -> None:
        if len(prompt) > self.context:
            raise AdmissionError(
                "context_length", f"{len(prompt)} tokens exceed the context of {self.context}"
            )
        self.asked.append((prompt, params))
        script = self.script if self.script is not None else str(prompt).split(" ")
        self._running[request_id] = {"left": list(script), "said": "", "abort": False}

    def abort(self, request_id: str) -> bool:
        state = self._running.get(request_id)
        if state is not None:
            state["abort"] = True
        return state is not None

    _steps = itertools.count(1)

    def step(self) -> list[RequestOutput]:
        outputs = []
        for request_id, state in list(self._running.items()):
            delta = "" if state["abort"] else state["left"].pop(0)
            state["said"] += delta
            reason = "abort" if state["abort"] else None if state["left"] else "stop"
            tokens = len(self.script or "") - len(state["left"])
            outputs.append(
                RequestOutput(
                    request_id=request_id,
                    prompt="p",
                    prompt_token_ids=(1, 2),
                    prompt_logprobs=None,
                    outputs=(
                        CompletionOutput(
                            0, state["said"], (5,) * tokens, None, None, reason, None, 7
                        ),
                    ),
                    finished=reason is not None,
                    usage=Usage(2, tokens, 0),
                    timings=Timings(0.0, 0.25, 0.5, 0.75, 0.25),
                    deltas=(delta,),
                    cost=Cost(1.25, None, None, True),
                )
            )
            if reason is not None:
                del self._running[request_id]
        self.on_step(next(self._steps))
        return outputs

    def close(self) -> None:
        self.closed = True
