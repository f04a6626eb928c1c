"""Anthropic's interface: answers whole and streamed, by raw HTTP and by its official client."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from engineroom.engine.core.answers import CompletionOutput
from engineroom.engine.serve.anthropic import stop_reason

from .conftest import Running
from .http import ask, chat, get, post, streaming

PATH = "/v1/messages"


def body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {**chat(text), "max_tokens": 8, **fields}


def events(answer: bytes) -> list[tuple[str, Any]]:
    parts = answer.decode().split("\n\n")
    assert parts.pop() == ""
    pairs = [part.split("\n") for part in parts]
    return [(e.removeprefix("event: "), json.loads(d.removeprefix("data: "))) for e, d in pairs]


def test_an_answer(server: Running) -> None:
    answer = post(server, PATH, body(seed=5, system=[{"type": "text", "text": "be kind"}])).json
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "fake")
    (block,) = answer["content"]
    assert block["type"] == "text" and block["text"].count("é") == 8
    assert answer["stop_reason"] == "max_tokens" and answer["stop_sequence"] is None
    usage = answer["usage"]
    assert usage["output_tokens"] == 8
    counted = post(
        server,
        f"{PATH}/count_tokens",
        {**chat(), "system": "be kind"},
    ).json
    whole = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted == {"input_tokens": whole}
    assert usage["cost"]["joules"] == 0.5
    effort = {**chat(), "output_config": {"effort": "high"}}
    assert "output_config.effort" in post(server, f"{PATH}/count_tokens", effort).error["message"]


def test_the_events_are_the_whole_answer(server: Running) -> None:
    whole = post(server, PATH, body(max_tokens=20, seed=7)).json
    said = events(post(server, PATH, body(max_tokens=20, seed=7, stream=True)).body)
    assert all(name == data["type"] for name, data in said)
    names = [name for name, _ in said]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}
    start, end = said[0][1]["message"], said[-2][1]
    assert start["content"] == [] and start["stop_reason"] is None
    assert "".join(d["delta"]["text"] for _, d in said[2:-3]) == whole["content"][0]["text"]
    assert end["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == whole["usage"]["output_tokens"] == 20


@pytest.mark.parametrize(
    ("finish", "stop", "told"),
    [
        ("stop", "END", ("stop_sequence", "END")),
        ("stop", 2, ("end_turn", None)),
        ("stop", None, ("end_turn", None)),
        ("length", None, ("max_tokens", None)),
        ("timeout", None, ("timeout", None)),
    ],
)
def test_the_reason_of_an_end(finish: Any, stop: Any, told: Any) -> None:
    completion = CompletionOutput(
        index=0,
        text="",
        token_ids=(),
        finish_reason=finish,
        stop_reason=stop,
        cumulative_logprob=None,
        logprobs=None,
        seed=0,
    )
    assert stop_reason(completion) == told


def test_turns_of_one_role_in_a_row_are_one(server: Running) -> None:
    def count(*turns: tuple[str, str]) -> int:
        messages = [{"role": role, "content": text} for role, text in turns]
        asked = {"model": "fake", "messages": messages}
        counted: int = post(server, f"{PATH}/count_tokens", asked).json["input_tokens"]
        return counted

    assert count(("user", "a"), ("user", "b")) == count(("user", "a\n\nb"))
    assert count(("user", "a"), ("assistant", "b"), ("user", "c")) > count(("user", "a"))


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
REFUSALS: list[tuple[Any, int, str, str]] = [
    (b"{", 400, "invalid_request_error", "no JSON"),
    (chat(), 400, "invalid_request_error", "max_tokens"),
    (body(max_tokens=0), 400, "invalid_request_error", "max_tokens=0"),
    (body(foo=1), 400, "invalid_request_error", "foo"),
    (body(top_p=3.0), 400, "invalid_request_error", "top_p"),
    (body(stop_sequences=[""]), 400, "invalid_request_error", "stop_sequences"),
    (body(thinking={"type": "enabled"}), 400, "invalid_request_error", "thinking"),
    (body(tools=[TOOL]), 400, "invalid_request_error", "tools"),
    (body(tool_choice={"type": "any"}), 400, "invalid_request_error", "tool_choice"),
    (body(messages=[]), 400, "invalid_request_error", "messages"),
    (
        body(messages=[{"role": "user", "content": [IMAGE]}]),
        400,
        "invalid_request_error",
        "messages[0].content[0].type",
    ),
    (
        body(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        400,
        "invalid_request_error",
        "the last one is the assistant's",
    ),
    (body("hostile"), 400, "invalid_request_error", "template"),
    (body(model="other"), 404, "not_found_error", "other"),
]


@pytest.mark.parametrize(
    ("sent", "status", "kind", "said"),
    REFUSALS,
    ids=[f"{i}-{r[3]}" for i, r in enumerate(REFUSALS)],
)
def test_a_refusal(server: Running, sent: Any, status: int, kind: str, said: str) -> None:
    for stream in (False, True):
        asked = sent if isinstance(sent, bytes) else {**sent, "stream": stream}
        answer = post(server, PATH, asked)
        assert answer.status == status, answer.body
        assert answer.json["type"] == "error" and answer.error["type"] == kind
        assert said in answer.error["message"]
        assert answer.headers["request-id"]


def test_other_paths_keep_their_form(server: Running, serving: Any) -> None:
    assert get(server, PATH).json["type"] == "error" and get(server, PATH).status == 405
    assert get(server, "/v1/messagesX").error["code"] == "not_found"
    assert get(server, f"{PATH}/batches").error["type"] == "not_found_error"
    locked = serving(api_keys=("sesame-sesame",))
    assert post(locked, PATH, body()).error["type"] == "authentication_error"
    assert post(locked, PATH, body(), {"x-api-key": "sesame-sesame"}).status == 200
    assert ask(locked, "GET", "/v1/models").error["code"] == "invalid_api_key"


def test_a_client_that_leaves_ends_its_request(server: Running) -> None:
    with streaming(server, PATH, body("slow: it", max_tokens=4000)) as response:
        assert response.readline() == b"event: message_start\n"
        server.wait_until(lambda: server.service.num_live == 1)
    server.wait_until(lambda: server.service.num_live == 0)


def test_a_failing_stream_ends_with_an_error(serving: Any) -> None:
    running = serving()
    with streaming(running, PATH, body("slow: it", max_tokens=100_000)) as response:
        assert response.readline() == b"event: message_start\n"
        os.kill(running.service.info.pid, signal.SIGKILL)
        name, data = response.read().decode().strip().split("\n\n")[-1].split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "overloaded_error"


def test_the_official_client(server: Running) -> None:
    anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    asked = {"model": "fake", "max_tokens": 9, "messages": chat()["messages"]}
    extra = {"seed": 3, "top_k": 5, "temperature": 0.5}
    whole = client.messages.create(**asked, extra_body=extra)
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 9
    assert whole._request_id
    with client.messages.stream(**asked, extra_body=extra) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 9)
    parts = client.messages.create(**asked, extra_body=extra, stream=True)
    assert [p.type for p in parts][-1] == "message_stop"
    counted = client.messages.count_tokens(model="fake", messages=chat()["messages"])
    assert counted.input_tokens > 5
    again = [*chat()["messages"], {"role": "assistant", "content": whole.content}]
    again.append({"role": "user", "content": "more"})
    assert client.messages.create(model="fake", max_tokens=2, messages=again).content


def test_the_official_clients_errors(server: Running, serving: Any) -> None:
    anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    messages = chat()["messages"]
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(
            model="fake", max_tokens=1, messages=messages, extra_body={"temperature": -1}
        )
    with pytest.raises(anthropic.NotFoundError, match="other"):
        client.messages.create(model="other", max_tokens=1, messages=messages)
    locked = serving(api_keys=("sesame-sesame",))
    for key, refused in (("wrong", True), ("sesame-sesame", False)):
        client = anthropic.Anthropic(base_url=locked.url, api_key=key, max_retries=0)
        if refused:
            with pytest.raises(anthropic.AuthenticationError):
                client.messages.create(model="fake", max_tokens=1, messages=messages)
        else:
            client.messages.create(model="fake", max_tokens=1, messages=messages)
