"""OpenAI's Responses interface: whole, streamed, with tools; and by its official client."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from engineroom.engine.serve.responses_input import ResponseStore

from .conftest import Running, start
from .http import post, streaming

PATH = "/v1/responses"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}


@pytest.fixture(scope="module")
def hermes() -> Iterator[Running]:
    running = start("hermes")
    yield running
    running.stop()


def say(said: str, **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "input": f"say«{said}»", **fields}


def events(answer: bytes) -> list[Any]:
    pairs = [part.split("\n") for part in answer.decode().strip().split("\n\n")]
    found = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name.removeprefix("event: ") for name, _ in pairs] == [e["type"] for e in found]
    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    return found


def plain(items: list[Any]) -> list[Any]:
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]


def test_a_response_and_its_events(hermes: Running) -> None:
    body = say(
        f"<think>Hm.</think>\nLet me see.\n{CALL}\n{CALL}", tools=[TOOL], metadata={"a": "b"}
    )
    whole = post(hermes, PATH, body).json
    assert (whole["status"], whole["object"], whole["metadata"]) == (
        "completed",
        "response",
        {"a": "b"},
    )
    thoughts, message, call, _ = whole["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "Let me see." and message["status"] == "completed"
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Zürich"})
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == len(b"<think>Hm.</think>")
    said = events(post(hermes, PATH, {**body, "stream": True}).body)
    assert [e["type"] for e in said[:2]] == ["response.created", "response.in_progress"]
    assert said[0]["response"]["status"] == "in_progress" and said[0]["response"]["output"] == []
    final = said[-1]["response"]
    assert said[-1]["type"] == "response.completed"
    assert plain(final["output"]) == plain(whole["output"]) and final["usage"] == usage
    check_items(said)


def check_items(said: list[Any]) -> None:
    """Deltas make what is done, one item after another, under the ids of the final response."""
    final = said[-1]["response"]["output"]
    added = [e for e in said if e["type"] == "response.output_item.added"]
    done = [e["item"] for e in said if e["type"] == "response.output_item.done"]
    assert done == final
    assert [e["item"]["id"] for e in added] == [item["id"] for item in final]
    assert [e["item"]["status"] for e in added] == ["in_progress"] * len(final)
    for index, item in enumerate(final):
        mine = [e for e in said if e.get("output_index") == index]
        deltas = "".join(e["delta"] for e in mine if e["type"].endswith(".delta"))
        assert {e["item_id"] for e in mine if "item_id" in e} == {item["id"]}
        if item["type"] == "function_call":
            assert deltas == item["arguments"]
            (end,) = [e for e in mine if e["type"].endswith("arguments.done")]
            assert end["arguments"] == deltas and end["name"] == item["name"]
        else:
            assert deltas == item["content"][0]["text"]
            kinds = [e["type"].removeprefix("response.") for e in mine]
            assert kinds[:2] == ["output_item.added", "content_part.added"]
            assert kinds[-2:] == ["content_part.done", "output_item.done"]


def test_an_incomplete_and_an_empty_response(hermes: Running) -> None:
    for text, status in (("abcdef", "incomplete"), ("", "completed")):
        body = say(text, max_output_tokens=3) if text else say("<think></think>")
        whole = post(hermes, PATH, body).json
        said = events(post(hermes, PATH, {**body, "stream": True}).body)
        assert said[-1]["type"] == f"response.{status}" and whole["status"] == status
        (message,) = whole["output"]
        assert message["status"] == status and message["content"][0]["text"] == text[:3]
        check_items(said)
    whole = post(hermes, PATH, say("abcdef", max_output_tokens=3)).json
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}


def test_items_become_the_conversation(hermes: Running) -> None:
    def tokens(items: Any, **fields: Any) -> int:
        body = {"model": "fake", "input": items, "max_output_tokens": 1, **fields}
        answer = post(hermes, PATH, body)
        assert answer.status == 200, answer.body
        found: int = answer.json["usage"]["input_tokens"]
        return found

    user = {"role": "user", "content": [{"type": "input_text", "text": "hello"}]}
    assert tokens("hello") == tokens([user])
    assert tokens([{"role": "developer", "content": "be"}, user]) == tokens(
        "hello", instructions="be"
    )
    items = [
        user,
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm"}],
        },
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "say«Sunny.»"},
    ]
    answer = post(hermes, PATH, {"model": "fake", "input": items, "tools": [TOOL]}).json
    assert answer["output"][0]["content"][0]["text"] == "Sunny."


def test_a_conversation_is_gone_on_with(hermes: Running) -> None:
    first = post(hermes, PATH, say(CALL, tools=[TOOL], instructions="once")).json
    (call,) = first["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "say«Sunny.»"}
    more = {"model": "fake", "input": [result], "tools": [TOOL]}
    second = post(hermes, PATH, {**more, "previous_response_id": first["id"]}).json
    assert second["output"][0]["content"][0]["text"] == "Sunny."
    assert second["previous_response_id"] == first["id"]
    by_hand = [{"role": "user", "content": f"say«{CALL}»"}, call, result]
    third = post(hermes, PATH, {**more, "input": by_hand}).json
    assert third["usage"]["input_tokens"] == second["usage"]["input_tokens"]
    unkept = post(hermes, PATH, say("x", store=False)).json["id"]
    refused = post(hermes, PATH, {**more, "previous_response_id": unkept}).error
    assert refused["param"] == "previous_response_id"


def test_a_conversation_is_the_keys_own(serving: Any) -> None:
    running = serving("hermes", api_keys=("sesame-sesame", "open-open-open"))
    mine, other = ({"x-api-key": key} for key in ("sesame-sesame", "open-open-open"))
    first = post(running, PATH, say("x"), mine).json["id"]
    more = say("y", previous_response_id=first)
    assert post(running, PATH, more, mine).status == 200
    assert post(running, PATH, more, other).error["param"] == "previous_response_id"


def test_the_store_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResponseStore, "MAX_BYTES", 1000)
    store = ResponseStore()
    for number in range(100):
        store.keep("", str(number), [{"role": "user", "content": "x" * 100}])
    assert 1 < len(store._kept) < 10 and store._size <= 1000
    assert store.get("", "99")
    store.keep("", "large", [{"role": "user", "content": "x" * 2000}])
    assert not store._kept and store._size == 0


def test_a_grammar_or_a_schema_is_asked_for(hermes: Running) -> None:
    answer = post(hermes, PATH, say("GRAMMAR", tools=[TOOL], tool_choice="required")).json
    assert "body_0" in answer["output"][0]["content"][0]["text"]
    named = {"type": "function", "name": "weather"}
    answer = post(hermes, PATH, say("GRAMMAR", tools=[TOOL], tool_choice=named)).json
    assert "weather" in answer["output"][0]["content"][0]["text"]
    both = {"text": {"format": {"type": "json_object"}}, "tools": [TOOL]}
    answer = post(hermes, PATH, say("GRAMMAR", **both)).json
    assert 'content: %json {"type": "object"}' in answer["output"][0]["content"][0]["text"]
    answer = post(hermes, PATH, say("GRAMMAR", **both, tool_choice="required")).json
    assert "content:" not in answer["output"][0]["content"][0]["text"]


IMAGE = {"role": "user", "content": [{"type": "input_image"}]}
FORMAT = {"type": "json_schema", "name": "x", "schema": 5}
REFUSALS: list[tuple[Any, str, str | None]] = [
    ({"input": []}, "invalid_value", "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "invalid_value", "input[0].type"),
    ({"input": [{"role": "user", "content": "x", "foo": 1}]}, "invalid_value", "input[0].foo"),
    ({"input": [IMAGE]}, "invalid_value", "input[0].content[0].type"),
    ({"foo": 1}, "invalid_value", "foo"),
    ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
    ({"temperature": -1}, "invalid_value", "temperature"),
    ({"text": {"format": FORMAT}}, "invalid_value", "text.format.schema"),
    ({"text": {"verbosity": "low"}}, "unsupported", "text.verbosity"),
    ({"background": True}, "unsupported", "background"),
    ({"truncation": "auto"}, "unsupported", "truncation"),
    ({"conversation": "conv_1"}, "unsupported", "conversation"),
    ({"include": ["file_search_call.results"]}, "unsupported", "include"),
    ({"reasoning": {"summary": "auto"}}, "unsupported", "reasoning.summary"),
    ({"tools": [{"type": "web_search"}]}, "invalid_value", "tools[0].type"),
    ({"previous_response_id": "resp_none"}, "invalid_value", "previous_response_id"),
    ({"model": "other"}, "model_not_found", "model"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "code", "param"), REFUSALS, ids=[str(r[2]) for r in REFUSALS])
def test_a_refusal(hermes: Running, fields: Any, code: str, param: str | None) -> None:
    for stream in (False, True):
        answer = post(hermes, PATH, {**say("x"), **fields, "stream": stream})
        assert (answer.error["code"], answer.error["param"]) == (code, param), answer.body


def test_a_failing_stream_ends_with_a_failed_response(serving: Any) -> None:
    running = serving("hermes")
    with streaming(running, PATH, say("x" * 500)) as response:
        assert response.readline() == b"event: response.created\n"
        os.kill(running.service.info.pid, signal.SIGKILL)
        name, data = response.read().decode().strip().split("\n\n")[-1].split("\n")
    assert name == "event: response.failed"
    failed = json.loads(data.removeprefix("data: "))["response"]
    assert failed["status"] == "failed" and failed["error"]["code"] == "engine_down"


def test_the_official_client(hermes: Running) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    pydantic = pytest.importorskip("pydantic")
    client = openai.OpenAI(base_url=f"{hermes.url}/v1", api_key="none", max_retries=0)
    whole = client.responses.create(**say("Hello there"))
    assert whole.output_text == "Hello there"
    asked = say(f"<think>Hm.</think>\n{CALL}", tools=[TOOL])
    with client.responses.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.reasoning_text.delta", "response.function_call_arguments.done"} <= kinds
    call = final.output[-1]
    assert json.loads(call.arguments) == {"city": "Zürich"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "say«Sunny.»"}
    again = [{"role": "user", "content": asked["input"]}, *final.output, result]
    dumped = [i if isinstance(i, dict) else i.model_dump(exclude_none=True) for i in again]
    for item in dumped:
        item.pop("parsed_arguments", None)
    last = client.responses.create(model="fake", input=dumped, tools=[TOOL])
    assert last.output_text == "Sunny."
    raw = client.responses.create(**say("abc"), stream=True)
    assert [e.type for e in raw][-1] == "response.completed"

    class City(pydantic.BaseModel):
        city: str

    parsed = client.responses.parse(**say('{"city": "Rome"}'), text_format=City)
    assert parsed.output_parsed.city == "Rome"
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**say("x"), background=True)
    assert refused.value.param == "background"
