"""Tools and reasoning over HTTP, whole and streamed, by OpenAI's and Anthropic's interfaces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import Running, start
from .http import chat, get, post

PATH = "/v1/chat/completions"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "time"}}


@pytest.fixture(scope="module")
def hermes() -> Iterator[Running]:
    running = start("hermes")
    yield running
    running.stop()


def say(text: str, **fields: Any) -> dict[str, Any]:
    return chat(f"say«{text}»", **fields)


def joined(events: list[Any]) -> dict[str, Any]:
    """The message that the parts of one choice make."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for part in (c["delta"] for e in events for c in e["choices"]):
        message["content"] += part.get("content", "")
        message["reasoning_content"] += part.get("reasoning_content", "")
        for piece in part.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(message["tool_calls"])
                message["tool_calls"].append({**piece, "function": dict(piece["function"])})
            else:
                call = message["tool_calls"][piece["index"]]
                call["function"]["arguments"] += piece["function"]["arguments"]
    return message


def both(running: Running, body: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The whole answer and the events, which must say the same."""
    whole = post(running, PATH, body).json
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    events = post(running, PATH, asked).events
    (choice,) = whole["choices"]
    message, streamed = choice["message"], joined(events)
    assert streamed["content"] == (message["content"] or "")
    assert streamed["reasoning_content"] == message.get("reasoning_content", "")
    assert [c["function"] for c in streamed["tool_calls"]] == [
        c["function"] for c in message.get("tool_calls", ())
    ]
    assert events[-1]["usage"] == whole["usage"]
    (ending,) = [
        c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"] is not None
    ]
    assert ending == choice["finish_reason"]
    return whole, events


def test_the_model_says_which_formats_it_has(hermes: Running, server: Running) -> None:
    (model,) = get(hermes, "/v1/models").json["data"]
    assert (model["tool_format"], model["reasoning_format"]) == ("hermes", "think")
    (model,) = get(server, "/v1/models").json["data"]
    assert model["tool_format"] is None and model["reasoning_format"] is None


def test_a_call(hermes: Running) -> None:
    whole, _ = both(hermes, say(f"Let me see.\n{CALL}", tools=[TOOL, OTHER]))
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Zürich"}


def test_arguments_are_streamed_as_they_are_written(hermes: Running) -> None:
    long = CALL.replace("Zürich", "x" * 300)
    _, events = both(hermes, say(long, tools=[TOOL]))
    pieces = [e for e in events for c in e["choices"] if "tool_calls" in c["delta"]]
    assert len(pieces) > 5


def test_several_calls_and_one_alone(hermes: Running) -> None:
    second = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    whole, _ = both(hermes, say(f"{CALL}\n{second}", tools=[TOOL, OTHER]))
    message = whole["choices"][0]["message"]
    assert message["content"] is None
    assert [c["function"]["name"] for c in message["tool_calls"]] == ["weather", "time"]
    whole, _ = both(
        hermes, say(f"{CALL}\n{second}", tools=[TOOL, OTHER], parallel_tool_calls=False)
    )
    assert len(whole["choices"][0]["message"]["tool_calls"]) == 1


@pytest.mark.parametrize("more", [{}, {"tools": [TOOL], "tool_choice": "none"}])
def test_without_tools_a_marker_is_text(hermes: Running, more: Any) -> None:
    whole, _ = both(hermes, say(CALL, **more))
    message = whole["choices"][0]["message"]
    assert message["content"] == CALL and "tool_calls" not in message


def test_what_is_no_call_is_text(hermes: Running) -> None:
    whole, _ = both(hermes, say("<tool_call>oh\n</tool_call>", tools=[TOOL]))
    (choice,) = whole["choices"]
    assert choice["message"]["content"] == "<tool_call>oh\n</tool_call>"
    assert choice["finish_reason"] == "stop"


def test_a_call_that_is_cut_ends_by_length(hermes: Running) -> None:
    whole, _ = both(hermes, say(CALL, tools=[TOOL], max_tokens=50))
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith("{")


def test_thoughts_are_apart_and_counted(hermes: Running) -> None:
    text = "<think>\nHm, é.\n</think>\n\n"
    whole, _ = both(hermes, say(f"{text}Yes.\n{CALL}", tools=[TOOL]))
    message = whole["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == "Hm, é."
    assert message["content"] == "Yes." and len(message["tool_calls"]) == 1
    details = whole["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": len(text.rstrip().encode())}


def test_thoughts_that_the_prompt_opened(serving: Any) -> None:
    running = serving("r1")
    whole, _ = both(running, say("Hm.\n</think>\n\nYes."))
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    whole, _ = both(running, say("Hm. And on", max_tokens=5))
    assert whole["choices"][0]["message"]["reasoning_content"] == "Hm. A"
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5


def test_reasoning_may_be_left_in_the_text(serving: Any) -> None:
    running = serving("hermes", reasoning_format="none", tool_format="none")
    whole, _ = both(running, say("<think>a</think>b"))
    assert whole["choices"][0]["message"]["content"] == "<think>a</think>b"
    assert post(running, PATH, chat(tools=[TOOL])).error["param"] == "tools"


def test_a_whole_conversation_reaches_the_template(hermes: Running) -> None:
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "reasoning": "Hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    answer = post(hermes, PATH, {**chat(), "messages": messages, "tools": [TOOL], "max_tokens": 1})
    assert answer.status == 200, answer.body
    ids = post(hermes, "/tokenize", {"messages": messages}).json["tokens"]
    said = bytes(ids).decode()
    assert '"arguments": {"city": "Rome"}' in said and '"name": "weather"' in said
    assert '"reasoning_content": "Hm"' in said


def test_effort_is_told_to_the_template_or_refused(hermes: Running, server: Running) -> None:
    def prompt_tokens(**fields: Any) -> int:
        found: int = post(hermes, PATH, chat(max_tokens=1, **fields)).json["usage"]["prompt_tokens"]
        return found

    on = prompt_tokens(reasoning_effort="high")
    off = prompt_tokens(reasoning_effort="none")
    assert off == on + 1  # False is a letter longer than True
    told = prompt_tokens(reasoning_effort="high", chat_template_kwargs={"enable_thinking": False})
    assert told == off
    assert post(server, PATH, chat(reasoning_effort="high")).error["param"] == "reasoning_effort"
    assert post(server, PATH, chat(reasoning_effort="none", max_tokens=1)).status == 200


@pytest.mark.parametrize(
    ("choice", "parallel", "has", "lacks"),
    [
        ("required", True, ["body_1", "weather", "time", '" body)*'], ["TEXT"]),
        (
            {"type": "function", "function": {"name": "time"}},
            False,
            ["time"],
            ["weather", '" body)*'],
        ),
    ],
)
def test_a_demanded_call_is_held_to_by_a_grammar(
    hermes: Running, choice: Any, parallel: bool, has: list[str], lacks: list[str]
) -> None:
    body = say("GRAMMAR", tools=[TOOL, OTHER], tool_choice=choice, parallel_tool_calls=parallel)
    grammar = post(hermes, PATH, body).json["choices"][0]["message"]["content"]
    assert all(text in grammar for text in has), grammar
    assert not any(text in grammar for text in lacks), grammar


def test_a_strict_tool_is_held_to_as_well(hermes: Running) -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}  # type: ignore[dict-item]
    answer = post(hermes, PATH, say("GRAMMAR", tools=[strict])).json
    assert "TEXT" in answer["choices"][0]["message"]["content"]
    assert (
        post(hermes, PATH, say("GRAMMAR", tools=[TOOL])).json["choices"][0]["message"]["content"]
        == "None"
    )


BAD_NAME = {"type": "function", "function": {"name": "a b"}}
CHOICE = {"choice": ["a", "b"]}
ODD = {"type": "function", "function": {"name": "odd", "parameters": {"anyOf": [SCHEMA]}}}
NAMED = {"type": "function", "function": {"name": "nobody"}}


@pytest.mark.parametrize(
    ("model", "fields", "code", "param"),
    [
        ("fake", {"tools": [TOOL]}, "unsupported", "tools"),
        ("toolless", {"tools": [TOOL]}, "unsupported", "tools"),
        ("coder", {"tools": [ODD], "tool_choice": "required"}, "unsupported", "tool_choice"),
        ("hermes", {"tools": [TOOL], "structured_outputs": CHOICE}, "unsupported", "tools"),
        ("hermes", {"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ("hermes", {"tools": [TOOL], "tool_choice": "some"}, "invalid_value", "tool_choice"),
        ("hermes", {"tools": [TOOL], "tool_choice": NAMED}, "invalid_value", "tool_choice"),
        ("hermes", {"tools": [TOOL, TOOL]}, "invalid_value", "tools"),
        ("hermes", {"tools": [{"type": "code"}]}, "invalid_value", "tools[0].type"),
        ("hermes", {"tools": [BAD_NAME]}, "invalid_value", "tools[0].function.name"),
    ],
)  # fmt: skip
def test_a_refusal(
    serving: Any, hermes: Running, server: Running, model: str, fields: Any, code: str, param: str
) -> None:
    known = {"hermes": hermes, "fake": server}
    answer = post(known.get(model) or serving(model), PATH, chat(**fields))
    assert (answer.error["code"], answer.error["param"]) == (code, param), answer.body


def test_the_official_client(hermes: Running) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=f"{hermes.url}/v1", api_key="none", max_retries=0)
    asked = {"model": "fake", "tools": [TOOL], **say(f"<think>Hm</think>\n{CALL}")}
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Zürich"}
    assert message.reasoning_content == "Hm"
    assert whole.usage.completion_tokens_details.reasoning_tokens > 0
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    again = [
        *asked["messages"],
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "say«Sunny.»"},
    ]
    last = client.chat.completions.create(model="fake", messages=again, tools=[TOOL])
    assert last.choices[0].message.content == "Sunny."


# ------------------------------------------------------------------------------------- Anthropic's

MESSAGES = "/v1/messages"
CUSTOM = {"name": "weather", "input_schema": SCHEMA}


def anthropic_say(text: str, **fields: Any) -> dict[str, Any]:
    return {**say(text), "max_tokens": 1000, "tools": [CUSTOM], **fields}


def test_blocks_of_an_answer(hermes: Running) -> None:
    answer = post(hermes, MESSAGES, anthropic_say(f"<think>Hm.</think>\nLet me see.\n{CALL}")).json
    assert answer["stop_reason"] == "tool_use"
    thinking, text, use = answer["content"]
    assert thinking == {"type": "thinking", "thinking": "Hm.", "signature": ""}
    assert text["text"] == "Let me see."
    assert (use["name"], use["input"]) == ("weather", {"city": "Zürich"})
    assert use["id"].startswith("toolu_")


def test_arguments_that_are_no_json_are_text(hermes: Running) -> None:
    answer = post(hermes, MESSAGES, anthropic_say(CALL, max_tokens=60)).json
    (block,) = answer["content"]
    assert answer["stop_reason"] == "max_tokens"
    assert block["type"] == "text" and block["text"].startswith('weather{"c')


@pytest.mark.parametrize(
    ("choice", "has"),
    [({"type": "any"}, "body_0"), ({"type": "tool", "name": "weather"}, "weather")],
)
def test_anthropics_choice_is_a_grammar_too(hermes: Running, choice: Any, has: str) -> None:
    answer = post(hermes, MESSAGES, anthropic_say("GRAMMAR", tool_choice=choice)).json
    assert has in answer["content"][0]["text"]
    assert "TEXT" not in answer["content"][0]["text"]


def test_thinking_is_told_to_the_template_or_refused(hermes: Running, server: Running) -> None:
    def tokens(**fields: Any) -> int:
        asked = {**chat(), **fields}
        found: int = post(hermes, f"{MESSAGES}/count_tokens", asked).json["input_tokens"]
        return found

    on = tokens(thinking={"type": "enabled", "budget_tokens": 50})
    assert tokens() == tokens(thinking={"type": "disabled"}) == on + 1
    asked = {**chat(), "max_tokens": 40, "thinking": {"type": "enabled", "budget_tokens": 50}}
    refused = post(hermes, MESSAGES, asked).error
    assert "thinking.budget_tokens=50" in refused["message"]
    asked["max_tokens"] = 60
    assert "thinking" in post(server, MESSAGES, asked).error["message"]


def test_blocks_where_they_cannot_be(hermes: Running) -> None:
    result = {"type": "tool_result", "tool_use_id": "x", "content": "sun"}
    messages = [{"role": "assistant", "content": [result]}, *chat()["messages"]]
    refused = post(hermes, MESSAGES, anthropic_say("x", messages=messages)).error
    assert "ToolResultBlock" in refused["message"]


def test_anthropics_official_client(hermes: Running) -> None:
    anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    client = anthropic.Anthropic(base_url=hermes.url, api_key="none", max_retries=0)
    asked = anthropic_say(f"<think>Hm.</think>\nLet me see.\n{CALL}\n{CALL}")
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert {"thinking", "text", "input_json", "content_block_stop"} <= set(kinds)
    assert final.stop_reason == whole.stop_reason == "tool_use"
    blocks = [b.model_dump(exclude={"id", "parsed_output"}) for b in whole.content]
    assert [b.model_dump(exclude={"id", "parsed_output"}) for b in final.content] == blocks
    assert [b["type"] for b in blocks] == ["thinking", "text", "tool_use", "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": b.id, "content": "say«Sunny.»"}
        for b in whole.content
        if b.type == "tool_use"
    ]
    again = [
        *asked["messages"],
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": results},
    ]
    last = client.messages.create(model="fake", max_tokens=90, messages=again, tools=[CUSTOM])
    assert last.content[0].text == "Sunny."
