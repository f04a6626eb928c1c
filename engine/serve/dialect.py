"""Dialect: how the served model's chat template has it call tools and think, and turns made so.

What the template says of itself is read off its source; what it does is found out by rendering a
small conversation, once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..async_llm import AsyncLLM, EngineInfo, RequestRefused
from ..core.answers import CompletionOutput
from ..core.sampling_params import SamplingParams
from ..core.structured import StructuredOutput
from ..dialects.answer import Answer, AnswerParser
from ..dialects.formats import TOOL_FORMATS, ToolFormat, tool_format_of
from ..dialects.grammar import call_grammar
from ..dialects.parts import Part
from ..dialects.reasoning import (
    REASONING_FORMATS,
    ReasoningFormat,
    reasoning_format_of,
)
from .bounds import MAX_TOOLS
from .errors import ApiError
from .settings import ServeConfig

log = logging.getLogger(__name__)
_TAIL = 32  # tokens of a prompt's end: an opening marker and white space, however they are cut
_THOUGHTS = "reasoning_content"  # of a message, as every interface has it


@dataclass(frozen=True)
class Function:
    """A tool, as every interface offers it."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool = False

    def plain(self) -> dict[str, Any]:
        """As chat templates read it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request. `choice`: auto, none, required, or ("name", a tool's name).

    `param`: what the request calls the choice, for errors.
    """

    functions: tuple[Function, ...] = ()
    choice: str | tuple[str, str] = "auto"
    parallel: bool = True
    param: str = "tool_choice"

    def __post_init__(self) -> None:
        names = [f.name for f in self.functions]
        if len(names) > MAX_TOOLS:
            raise ApiError(
                "invalid_value",
                f"tools has {len(names)} entries; at most {MAX_TOOLS}",
                param="tools",
            )
        for name in names:
            if names.count(name) > 1:
                raise ApiError("invalid_value", f"tools: {name!r} is there twice", param="tools")
        if not names and self.choice not in ("auto", "none"):
            raise ApiError(
                "invalid_value",
                f"{self.param} asks for a tool and tools has none",
                param=self.param,
            )
        if isinstance(self.choice, tuple) and self.choice[1] not in names:
            raise ApiError(
                "invalid_value",
                f"{self.param} names {self.choice[1][:100]!r}, which is not among tools",
                param=self.param,
            )

    @property
    def offered(self) -> tuple[Function, ...]:
        """What the model is told of."""
        return () if self.choice == "none" else self.functions

    @property
    def callable(self) -> dict[str, Any]:
        """Tools that may be called, and the schemas of their parameters."""
        only = self.choice[1] if isinstance(self.choice, tuple) else None
        return {f.name: f.parameters for f in self.offered if only in (None, f.name)}

    @property
    def required(self) -> bool:
        return self.choice not in ("auto", "none")

    @property
    def constrained(self) -> bool:
        """Whether a grammar has to hold the model to its tools."""
        return bool(self.offered) and (self.required or any(f.strict for f in self.offered))


class Reader:
    """One sample's answer as it grows."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self.answer = Answer()
        self._ids: list[str] = []

    def feed(self, delta: str, *, last: bool) -> list[Part]:
        """The parts that a piece of the answer's text makes certain."""
        parts = self._parser.feed(delta)
        if last:
            parts += self._parser.finish()
        self.answer.add(parts)
        return parts

    def call_id(self, index: int) -> str:
        """Of a tool call of this answer."""
        while len(self._ids) <= index:
            self._ids.append(f"call_{secrets.token_hex(12)}")
        return self._ids[index]

    @property
    def thought(self) -> bool:
        return self._parser.reasoning is not None and self._parser.reasoning.found

    @property
    def thoughts_closed(self) -> bool:
        return self._parser.reasoning is not None and self._parser.reasoning.closed

    def finish_reason(self, completion: CompletionOutput) -> str:
        """OpenAI's: "tool_calls" where the answer ended by itself and calls a tool."""
        reason = completion.finish_reason or "abort"
        return "tool_calls" if reason == "stop" and self.answer.calls else reason


@dataclass(frozen=True)
class Turn:
    """A conversation ready to be answered."""

    prompt: list[int]
    params: SamplingParams
    inside: bool  # the prompt opened thoughts
    reasoning: ReasoningFormat | None
    tools: ToolFormat | None
    use: ToolUse = field(default_factory=ToolUse)

    def form_field(self, asked: str) -> str:
        """What a refused form is to be blamed on: the tools, or the field that asked for it."""
        return "tools" if self.use.constrained else asked

    def reader(self) -> Reader:
        """A reader for one sample."""
        thoughts = calls = None
        if self.reasoning is not None:
            thoughts = self.reasoning.parser(inside=self.inside)
        if self.tools is not None:
            calls = self.tools.parser(self.use.callable)
        return Reader(AnswerParser(thoughts, calls, max_calls=None if self.use.parallel else 1))


class Dialect:
    """Of one served model."""

    def __init__(self, info: EngineInfo, settings: ServeConfig) -> None:
        self.template = info.chat_template or ""
        self.tools: ToolFormat | None = None
        if settings.tool_format == "auto":
            self.tools = tool_format_of(self.template)
        elif settings.tool_format != "none":
            self.tools = TOOL_FORMATS[settings.tool_format]
        self.reasoning: ReasoningFormat | None = None
        if settings.reasoning_format == "auto":
            self.reasoning = reasoning_format_of(self.template)
        elif settings.reasoning_format != "none":
            self.reasoning = REASONING_FORMATS[settings.reasoning_format]
        self._reads_tools: bool | None = None
        self._form: tuple[bool, bool] | None = None
        self._special: dict[str, int] | None = None
        self._inside: dict[tuple[int, ...], bool] = {}
        log.info(
            "tool calls are read as %s, reasoning as %s",
            self.tools.name if self.tools else "none",
            self.reasoning.name if self.reasoning else "none",
        )

    # ----------------------------------------------------------------------------------- turns

    async def turn(
        self,
        llm: AsyncLLM,
        messages: list[dict[str, Any]],
        params: SamplingParams,
        use: ToolUse,
        options: Mapping[str, Any],
    ) -> Turn:
        """Errors: ApiError, RequestRefused (the template's)."""
        prompt = await self.render(llm, messages, use, options)
        held = use.constrained or bool(use.offered and params.structured)
        # An output of another form than text has no thoughts before it.
        reasoning = self.reasoning if params.structured is None or held else None
        inside = reasoning is not None and await self._is_inside(llm, reasoning, prompt)
        format = self.tools if use.offered else None
        if held:
            grammar = await self._grammar(llm, params, use, reasoning, inside)
            params = params.replace(structured=StructuredOutput(grammar=grammar))
        markers = (*(format.markers if format else ()), *_markers(reasoning))
        if markers and params.skip_special_tokens:
            kept = dict.fromkeys((*params.keep_special_tokens, *markers))
            params = params.replace(keep_special_tokens=tuple(kept))
        return Turn(prompt, params, inside, reasoning, format, use)

    async def render(
        self,
        llm: AsyncLLM,
        messages: list[dict[str, Any]],
        use: ToolUse,
        options: Mapping[str, Any],
    ) -> list[int]:
        """Token ids of a conversation with its tools. Errors: ApiError, RequestRefused."""
        given = dict(options)
        if use.offered:
            await self._check_tools(llm)
            given["tools"] = [f.plain() for f in use.offered]
        if any(m.get("tool_calls") for m in messages):
            messages = _formed(messages, *await self._history_form(llm))
        if self.reasoning is not None and self.reasoning.key != _THOUGHTS:
            messages = [_with_thoughts(m, self.reasoning.key) for m in messages]
        if self.tools is not None and self.tools.short_ids:
            messages = _with_short_ids(messages)
        return await llm.render_chat(messages, **given)

    def thinking(self, wanted: bool, param: str, effort: str | None = None) -> dict[str, Any]:
        """Variables by which the template is told to think or not. Errors: ApiError(param)."""
        said: dict[str, Any] = {}
        if effort is not None and "reasoning_effort" in self.template:
            said["reasoning_effort"] = effort
        if "enable_thinking" in self.template:
            said["enable_thinking"] = wanted
        elif self.reasoning is not None and _reads(self.template, "thinking"):
            said["thinking"] = wanted
        if said or (not wanted and self.reasoning is None):
            return said
        raise ApiError(
            "unsupported",
            f"{param}: the served model's chat template has no switch for thinking"
            + (", it always thinks" if self.reasoning is not None else ""),
            param=param,
        )

    async def reasoning_tokens(self, llm: AsyncLLM, reader: Reader, ids: Sequence[int]) -> int:
        """How many of an answer's tokens are thoughts, with the marker that ends them."""
        if not reader.thought or self.reasoning is None:
            return 0
        if not reader.thoughts_closed:
            return len(ids)
        end = await llm.tokenize(self.reasoning.end, add_special_tokens=False)
        for start in range(len(ids) - len(end) + 1):
            if list(ids[start : start + len(end)]) == end:
                return start + len(end)
        # The marker shares tokens with the text around it.
        return len(await llm.tokenize(reader.answer.reasoning, add_special_tokens=False))

    # ------------------------------------------------------------------- what the template does

    async def _check_tools(self, llm: AsyncLLM) -> None:
        if self.tools is None:
            raise ApiError(
                "unsupported",
                "tools: the served model's chat template has no tool format that is known here "
                f"({', '.join(TOOL_FORMATS)}); serve with --tool-format NAME if it has one",
                param="tools",
            )
        if self._reads_tools is None:
            ids = await llm.render_chat(_PROBE[:1], tools=[_PROBE_TOOL.plain()])
            text = await llm.detokenize(ids, skip_special_tokens=False)
            self._reads_tools = _PROBE_TOOL.name in text
        if not self._reads_tools:
            raise ApiError(
                "unsupported",
                "tools: the served model's chat template does not tell the model of tools",
                param="tools",
            )

    async def _history_form(self, llm: AsyncLLM) -> tuple[bool, bool]:
        """(content is null, arguments are a string): how the template wants calls of earlier turns.

        Errors: ApiError("chat_template") where it shows them in none.
        """
        if self._form is None:
            for form in itertools.product((False, True), (False, True)):
                text = await _rendered(llm, _formed(_PROBE, *form), tools=[_PROBE_TOOL.plain()])
                if text is not None and all(said in text for said in _PROBE_SAYS):
                    self._form = form
                    break
            else:
                raise ApiError(
                    "chat_template",
                    "messages: the served model's chat template does not show tool calls of "
                    "earlier turns to the model",
                    param="messages",
                )
        return self._form

    async def _is_inside(
        self, llm: AsyncLLM, reasoning: ReasoningFormat, prompt: Sequence[int]
    ) -> bool:
        tail = tuple(prompt[-_TAIL:])
        if tail not in self._inside:
            if len(self._inside) > 256:
                self._inside.clear()
            text = await llm.detokenize(tail, skip_special_tokens=False)
            self._inside[tail] = reasoning.is_open(text)
        return self._inside[tail]

    async def _grammar(
        self,
        llm: AsyncLLM,
        params: SamplingParams,
        use: ToolUse,
        reasoning: ReasoningFormat | None,
        inside: bool,
    ) -> str:
        format = self.tools
        param = use.param if use.required else "tools"
        content = params.structured
        assert format is not None  # render() has refused tools without one
        if content is not None and content.kind not in ("json_schema", "json_object"):
            raise ApiError(
                "unsupported",
                f"{param}: beside tools the answer's form is a JSON schema or any JSON object, not "
                f"a {content.kind}",
                param=param,
            )
        if not use.required and content is not None and not format.marker:
            raise ApiError(
                "unsupported",
                f"{param}: calls of the format {format.name} cannot be told from another JSON "
                "answer; leave out the tools or the answer's form",
                param=param,
            )
        try:
            return call_grammar(
                use.callable,
                format,
                required=use.required,
                content=None if content is None else content.json_schema or '{"type": "object"}',
                parallel=use.parallel,
                reasoning=reasoning,
                inside=inside,
                special=await self._special_markers(llm),
            )
        except ValueError as error:
            raise ApiError("unsupported", f"{param}: {error}", param=param) from None

    async def _special_markers(self, llm: AsyncLLM) -> dict[str, int]:
        """Markers that are special tokens, which leave no text, and their ids."""
        if self._special is None:
            found = {}
            for marker in (*(self.tools.markers if self.tools else ()), *_markers(self.reasoning)):
                ids = await llm.tokenize(marker, add_special_tokens=False)
                if len(ids) == 1 and not await llm.detokenize(ids):
                    found[marker] = ids[0]
            self._special = found
        return self._special


def _markers(reasoning: ReasoningFormat | None) -> tuple[str, ...]:
    return () if reasoning is None else reasoning.markers


def _reads(template: str, name: str) -> bool:
    return any(f"{word} {name}" in template for word in ("if", "if not", "set", "and", "or"))


# -------------------------------------------------------------------------- earlier turns' calls

_PROBE_TOOL = Function("probe_tool", "A probe.", {"type": "object", "properties": {}})
_PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "probe"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "probe0001",
                "type": "function",
                "function": {"name": "probe_tool", "arguments": {"probe_key": "probe_value"}},
            }
        ],
    },
    {
        "role": "tool",
        "tool_call_id": "probe0001",
        "name": "probe_tool",
        "content": "probe_result",
    },
]
_PROBE_SAYS = ("probe_key", "probe_value", "probe_result")


async def _rendered(llm: AsyncLLM, messages: list[dict[str, Any]], **options: Any) -> str | None:
    try:
        ids = await llm.render_chat(messages, **options)
    except RequestRefused:
        return None
    return await llm.detokenize(ids, skip_special_tokens=False)


def _formed(
    messages: list[dict[str, Any]], null_content: bool, text_arguments: bool
) -> list[dict[str, Any]]:
    return [_formed_message(m, null_content, text_arguments) for m in messages]


def _formed_message(message: dict[str, Any], null: bool, text: bool) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    if text:
        calls = [
            {**c, "function": {**c["function"], "arguments": _as_text(c["function"]["arguments"])}}
            for c in calls
        ]
    content = message.get("content") or (None if null else "")
    return {**message, "content": content, "tool_calls": calls}


def _with_thoughts(message: dict[str, Any], key: str) -> dict[str, Any]:
    """Its thoughts under `key`; left out beside content, where such a template refuses them."""
    if _THOUGHTS not in message:
        return message
    rest = {k: v for k, v in message.items() if k != _THOUGHTS}
    return rest if rest.get("content") else {**rest, key: message[_THOUGHTS]}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_short_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def short(call_id: str) -> str:
        if len(call_id) == 9 and call_id.isalnum() and call_id.isascii():
            return call_id
        return hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:9]

    made = []
    for message in messages:
        changed = dict(message)
        if "tool_call_id" in message:
            changed["tool_call_id"] = short(message["tool_call_id"])
        if message.get("tool_calls"):
            changed["tool_calls"] = [{**c, "id": short(c["id"])} for c in message["tool_calls"]]
        made.append(changed)
    return made


__all__ = ["Dialect", "Function", "Reader", "ToolUse", "Turn"]
