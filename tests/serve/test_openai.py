"""OpenAI's interface: answers whole and streamed, by raw HTTP and by its official client."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from engineroom.engine import receipts
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.serve import schema

from .conftest import Running
from .http import chat, completion, get, post


def test_the_schema_has_every_sampling_parameter() -> None:
    ours = {f.name for f in dataclasses.fields(SamplingParams)}
    # Said otherwise in OpenAI's interface, or not over a wire at all.
    apart = {"logits_processor", "logprobs", "echo", "structured"}
    assert set(schema.Sampling.__struct_fields__) == ours - apart


def test_a_chat_answer(server: Running) -> None:
    answer = post(server, "/v1/chat/completions", chat(max_tokens=7, seed=5)).json
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and answer["model"] == "fake"
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"].count("é") == 7
    assert choice["finish_reason"] == "length" and choice["seed"] == 5
    usage = answer["usage"]
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7
    assert answer["timings"]["decode_ms"] > 0
    cost = {"joules": 0.5, "money": 0.25, "grams": None, "estimated": True}
    assert usage["cost"] == cost


@pytest.mark.parametrize("n", [1, 3])
def test_a_streamed_chat_is_the_whole_one(server: Running, n: int) -> None:
    body = chat(max_tokens=20, n=n, seed=7, logprobs=True, top_logprobs=2)
    whole = post(server, "/v1/chat/completions", body).json
    events = post(
        server,
        "/v1/chat/completions",
        {**body, "stream": True, "stream_options": {"include_usage": True}},
    ).events
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert all(e["usage"] is None for e in events[:-1])
    for index, choice in enumerate(whole["choices"]):
        parts = [c for e in events for c in e["choices"] if c["index"] == index]
        text = "".join(p["delta"].get("content", "") for p in parts)
        assert text == choice["message"]["content"]
        rows = [row for p in parts if p["logprobs"] for row in p["logprobs"]["content"]]
        assert rows == choice["logprobs"]["content"] and len(rows) == 20
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == ["length"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_so_far_in_each_part(serving: Any, path: str) -> None:
    server = serving("paced")  # a millisecond a token: its parts do not come together
    body: Any = (chat if "chat" in path else completion)(max_tokens=20, seed=7)
    asked = {"include_usage": True, "continuous_usage_stats": True}
    events = post(server, path, {**body, "stream": True, "stream_options": asked}).events
    told = [e["usage"] for e in events]
    made = [usage["completion_tokens"] for usage in told]
    assert made == sorted(made) and len(set(made)) > 2 and made[-1] == 20
    assert {usage["prompt_tokens"] for usage in told} == {told[-1]["prompt_tokens"]}
    del asked["include_usage"]
    refused = post(server, path, {**body, "stream": True, "stream_options": asked})
    assert refused.status == 400
    assert refused.json["error"]["param"] == "stream_options.continuous_usage_stats"


@pytest.mark.parametrize("prompt", ["one", ["one", "two"], [1, 2, 3], [[1], [2, 3]]])
def test_prompts_of_every_form(server: Running, prompt: Any) -> None:
    body = completion(prompt, max_tokens=4, n=2, seed=1)
    whole = post(server, "/v1/completions", body).json
    many = isinstance(prompt, list) and not isinstance(prompt[0], int)
    expected = 2 * (len(prompt) if many else 1)
    assert [c["index"] for c in whole["choices"]] == list(range(expected))
    events = post(server, "/v1/completions", {**body, "stream": True}).events
    for index, choice in enumerate(whole["choices"]):
        parts = [c for e in events for c in e["choices"] if c["index"] == index]
        assert "".join(p["text"] for p in parts) == choice["text"]


def test_the_older_logprobs(server: Running) -> None:
    body = completion("ab", max_tokens=3, logprobs=2, echo=True)
    (choice,) = post(server, "/v1/completions", body).json["choices"]
    rows = choice["logprobs"]
    assert len(rows["tokens"]) == 5 and rows["token_logprobs"][0] is None
    assert len(rows["text_offset"]) == 5 and rows["top_logprobs"][0] is None
    assert rows["tokens"][0] == "a" and rows["text_offset"][:2] == [0, 1]
    (first, *_) = post(server, "/v1/completions", {**body, "stream": True}).events
    assert first["choices"][0]["logprobs"]["tokens"][0] == "a"


def test_tokenize_and_back(server: Running) -> None:
    tokens = post(server, "/tokenize", {"prompt": "hé", "add_special_tokens": False}).json
    assert tokens["count"] == 3 and tokens["max_model_len"] == 4096
    assert post(server, "/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": "hé"}
    rendered = post(server, "/tokenize", {"messages": chat()["messages"]}).json
    assert bytes(rendered["tokens"]).startswith(b"user:hello;")


def test_the_model_and_the_health(server: Running) -> None:
    (model,) = get(server, "/v1/models").json["data"]
    assert model["id"] == "fake" and get(server, "/v1/models/fake").json == model
    assert get(server, "/v1/models/other").status == 404
    for path in ("/health", "/health/live", "/health/ready"):
        assert get(server, path).status == 200
    assert post(server, "/v1/chat/completions", chat(max_tokens=1)).status == 200
    page = get(server, "/metrics").body.decode()
    spent = re.findall(r"^engineroom_request_joules_total{.*} (.*)$", page, re.MULTILINE)
    assert float(*spent) > 0 and float(*spent) % 0.5 == 0
    assert "engineroom_up" in page and 'engineroom_requests_total{finish_reason="length"' in page


def test_every_message_reaches_the_template(server: Running) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "developer", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "e"},
    ]
    tokens = post(server, "/tokenize", {"messages": messages}).json["tokens"]
    assert bytes(tokens).decode().startswith("system:ab;system:c;user:d;assistant:;tool:e;")


def test_the_official_client(server: Running) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list().data] == ["fake"]
    messages = chat()["messages"]
    whole = client.chat.completions.create(model="fake", messages=messages, max_tokens=9, seed=3)
    text = ""
    for part in client.chat.completions.create(
        model="fake", messages=messages, max_tokens=9, seed=3, stream=True
    ):
        text += part.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content
    plain = client.completions.create(model="fake", prompt="x", max_tokens=2)
    assert plain.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="fake", messages=messages, temperature=-1)
    assert refused.value.param == "temperature" and refused.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages)


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", chat), ("/v1/completions", completion)],
    ids=["chat", "completion"],
)
def test_a_receipt_comes_with_the_answer(server: Running, path: str, body: Any) -> None:
    answer = post(server, path, body(max_tokens=5, seed=4, receipt=True)).json
    receipt = receipts.read(json.dumps(answer))
    assert receipt.model["name"] == "fake"
    assert receipt.params == {"max_tokens": 5, "seed": 4, **receipt.params}
    assert [len(a.token_ids) for a in receipt.answers] == [5]
    assert "receipt" not in post(server, path, body(max_tokens=5)).json
    refused = post(server, path, body(receipt=True, stream=True))
    assert refused.status == 400 and refused.json["error"]["param"] == "receipt"


def test_a_receipt_is_of_one_prompt(server: Running) -> None:
    refused = post(server, "/v1/completions", completion(prompt=["a", "b"], receipt=True))
    assert refused.status == 400 and "one prompt" in refused.json["error"]["message"]
