"""Dialect over the real templates: formats, tools and earlier calls reach the model's prompt."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engineroom.engine.async_llm import AsyncLLM, EngineInfo, RequestRefused
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.dialects.answer import AnswerParser, read_answer
from engineroom.engine.load.chat_template import ChatTemplate, TemplateError
from engineroom.engine.serve.dialect import Dialect, Function, ToolUse
from engineroom.engine.serve.errors import ApiError
from engineroom.engine.serve.settings import ServeConfig
from tests.data import data_path

# file -> tool format, reasoning format, whether the prompt opens thoughts by itself
KNOWN: dict[str, tuple[str, str | None, bool]] = {
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", None, False),
    "Qwen-Qwen3-0.6B": ("hermes", "think", False),
    "Qwen-QwQ-32B": ("hermes", "think", False),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("hermes", None, False),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", None, False),
    "ibm-granite-granite-4.0": ("hermes", None, False),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama3", None, False),
    "meta-llama-Llama-3.2-3B-Instruct": ("llama3", None, False),
    "meta-llama-Llama-3.3-70B-Instruct": ("llama3", None, False),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral_json", None, False),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral", None, False),
    "unsloth-mistral-Devstral-Small-2507": ("mistral", None, False),
    "moonshotai-Kimi-K2": ("kimi_k2", None, False),
    "Qwen3-Coder": ("qwen3_coder", None, False),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("qwen3_coder", "think", True),
    "ByteDance-Seed-OSS": ("seed_oss", "seed", False),
    "unsloth-Apriel-1.5": ("apriel", None, False),
    "GLM-4.7-Flash": ("glm47", "think", True),
    "LFM2.5-8B-A1B": ("lfm2", "think", False),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("command", "command", False),
}
TOOL = Function(
    "weather", "Of a city.", {"type": "object", "properties": {"city": {"type": "string"}}}
)
USE = ToolUse((TOOL,))
CALL = {"name": "weather", "arguments": {"city": "Zürich"}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "How is it in Zürich?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_0123456789abcdef", "type": "function", "function": CALL}],
    },
    {"role": "tool", "tool_call_id": "call_0123456789abcdef", "name": "weather", "content": "-3.5"},
]


class Rendering:
    """The part of AsyncLLM that a Dialect uses; a token is a character."""

    def __init__(self, name: str, source: str = "") -> None:
        source = source or (data_path("chat_templates") / f"{name}.jinja").read_text("utf-8")
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        self.template = ChatTemplate(source, special_tokens=tokens, origin=name)

    async def render_chat(self, messages: Any, **options: Any) -> list[int]:
        try:
            return [ord(c) for c in self.template.render(messages, **options)]
        except TemplateError as error:
            raise RequestRefused.of(error) from None

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]

    async def detokenize(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


def dialect_of(source: str, **options: Any) -> Dialect:
    info = cast(EngineInfo, SimpleNamespace(chat_template=source))
    return Dialect(info, ServeConfig(**options))


@pytest.mark.parametrize("name", KNOWN)
def test_a_real_template(name: str) -> None:
    tools, reasoning, inside = KNOWN[name]
    rendering = Rendering(name)
    llm = cast(AsyncLLM, rendering)
    dialect = dialect_of(rendering.template.source)
    assert dialect.tools is not None and dialect.tools.name == tools
    assert (dialect.reasoning.name if dialect.reasoning else None) == reasoning
    try:
        first = asyncio.run(dialect.turn(llm, MESSAGES[:1], SamplingParams(), USE, {}))
        again = asyncio.run(dialect.turn(llm, MESSAGES, SamplingParams(), USE, {}))
    finally:
        rendering.template.close()
    assert first.inside == inside
    assert set(dialect.tools.markers) <= set(first.params.keep_special_tokens)
    told, text = ("".join(map(chr, t.prompt)) for t in (first, again))
    assert "weather" in told and "Of a city." in told and "-3.5" not in told
    rest = text[text.rindex("How is it in") :]
    assert "-3.5" in rest
    # What the template shows of the earlier call is what the parser reads.
    begins = [rest.index(m) for m in (*dialect.tools.markers[:3], '{"name": "w') if m in rest]
    written = rest[min(begins) : rest.index("-3.5")]
    answer = read_answer(AnswerParser(None, dialect.tools.parser(USE.callable)), written)
    assert answer.calls is not None and answer.calls[0].name == "weather"
    assert "Zürich" in answer.calls[0].arguments or "Z\\u00fcrich" in answer.calls[0].arguments


# In the form of gpt-oss's own: a call's recipient stands with the role, a result names its tool.
HARMONY = """<|start|>system<|message|># Valid channels: analysis, commentary, final.<|end|>
{%- for tool in tools or [] %}// {{ tool.function.description }}
type {{ tool.function.name }} = () => any;
{% endfor %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if "<|channel|>analysis<|message|>" in message.content %}{{ raise_exception() }}{% endif %}
{%- if message.content and message.thinking %}{{ raise_exception() }}{% endif %}
{%- if message.thinking %}<|start|>assistant<|channel|>analysis<|message|>
{{- message.thinking + "<|end|>" }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- "<|start|>assistant to=functions." + call.name }}
{{- "<|channel|>commentary json<|message|>" }}
{{- call.arguments|tojson + "<|call|>" }}
{%- elif message.role == "tool" %}<|start|>functions.weather to=assistant<|channel|>commentary
{{- "<|message|>" + message.content|tojson + "<|end|>" }}
{%- else %}{{ "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
{%- endif %}{% endfor %}<|start|>assistant"""


def test_a_turn_of_messages_with_headers() -> None:
    rendering = Rendering("gpt-oss", HARMONY)
    dialect = dialect_of(HARMONY)
    assert dialect.tools is not None and dialect.tools.name == "harmony"
    assert dialect.reasoning is not None and dialect.reasoning.name == "harmony"
    llm = cast(AsyncLLM, rendering)
    try:
        asked = {**MESSAGES[1], "reasoning_content": "It has a tool."}
        both = {**asked, "content": "Let me see."}
        messages = [MESSAGES[0], asked, MESSAGES[2]]
        turn = asyncio.run(dialect.turn(llm, messages, SamplingParams(), USE, {}))
        messages[1] = both
        said = asyncio.run(dialect.turn(llm, messages, SamplingParams(), USE, {}))
        plain = asyncio.run(dialect.turn(llm, MESSAGES[:1], SamplingParams(), ToolUse(), {}))
    finally:
        rendering.template.close()
    assert not turn.inside
    for marker in ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>"):
        assert marker in turn.params.keep_special_tokens
        assert marker in plain.params.keep_special_tokens
    told = "".join(map(chr, turn.prompt))
    assert "Of a city." in told and told.endswith("<|start|>assistant")
    assert "<|channel|>analysis<|message|>It has a tool.<|end|>" in told
    assert "It has a tool." not in "".join(map(chr, said.prompt))
    # What the template shows of the earlier call is what the reader reads.
    call = told[told.index(" to=functions.weather") : told.index("<|start|>functions")]
    reader = turn.reader()
    thoughts = "<|channel|>analysis<|message|>Ask.<|end|><|start|>assistant"
    for piece in (*thoughts, call):
        reader.feed(piece, last=False)
    reader.feed("", last=True)
    assert reader.thought and reader.thoughts_closed
    assert (reader.answer.reasoning, reader.answer.text) == ("Ask.", "")
    assert reader.answer.calls is not None and reader.answer.calls[0].name == "weather"
    assert "rich" in reader.answer.calls[0].arguments
    ids = [ord(c) for c in thoughts + call]
    tokens = asyncio.run(dialect.reasoning_tokens(llm, reader, ids))
    assert tokens == thoughts.index("<|end|>") + len("<|end|>")


@pytest.mark.parametrize("name", ["google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct"])
def test_a_template_without_a_known_format(name: str) -> None:
    rendering = Rendering(name)
    dialect = dialect_of(rendering.template.source)
    assert dialect.tools is None
    with pytest.raises(ApiError, match="--tool-format"):
        asyncio.run(
            dialect.turn(cast(AsyncLLM, rendering), MESSAGES[:1], SamplingParams(), USE, {})
        )
    rendering.template.close()


def test_a_template_that_hides_earlier_calls_is_refused() -> None:
    rendering = Rendering("ibm-granite-granite-3.3-2B-Instruct")
    dialect = dialect_of(rendering.template.source)
    assert dialect.tools is not None and dialect.tools.name == "granite"
    with pytest.raises(ApiError, match="does not show tool calls"):
        llm = cast(AsyncLLM, rendering)
        asyncio.run(dialect.turn(llm, MESSAGES, SamplingParams(), ToolUse(), {}))
    rendering.template.close()


@pytest.mark.parametrize(
    ("name", "wanted", "said"),
    [
        ("Qwen-Qwen3-0.6B", False, {"enable_thinking": False}),
        ("ibm-granite-granite-3.3-2B-Instruct", True, {"thinking": True}),
        ("upstage-Solar-Open-100B", True, {"reasoning_effort": "high"}),
        ("llama-cpp-deepseek-r1", False, None),
        ("google-gemma-2-2b-it", False, {}),
        ("google-gemma-2-2b-it", True, None),
    ],
)
def test_the_switch_for_thinking(name: str, wanted: bool, said: Any) -> None:
    source = (data_path("chat_templates") / f"{name}.jinja").read_text("utf-8")
    dialect = dialect_of(source)
    effort = "high" if wanted else "none"
    if said is None:
        with pytest.raises(ApiError, match="no switch for thinking"):
            dialect.thinking(wanted, "reasoning_effort", effort)
    else:
        assert dialect.thinking(wanted, "reasoning_effort", effort) == said


def test_a_marker_that_is_a_special_token_is_asked_for_as_one() -> None:
    class Special(Rendering):
        async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [7] if text == "[TOOL_CALLS]" else await super().tokenize(text)

        async def detokenize(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
            shown = [i for i in ids if i != 7 or not skip_special_tokens]
            return await super().detokenize(shown)

    rendering = Special("Mistral-Small-3.2-24B-Instruct-2506")
    llm, dialect = cast(AsyncLLM, rendering), dialect_of(rendering.template.source)
    strict = Function(TOOL.name, TOOL.description, TOOL.parameters, strict=True)
    free, required = (
        asyncio.run(dialect.turn(llm, MESSAGES[:1], SamplingParams(), use, {}))
        for use in (ToolUse((strict,)), ToolUse((strict,), "required"))
    )
    rendering.template.close()
    for turn, start in ((free, "TEXT (<[7]> body"), (required, "<[7]> body")):
        assert turn.params.structured is not None
        assert f"start:  {start}" in str(turn.params.structured.grammar)
