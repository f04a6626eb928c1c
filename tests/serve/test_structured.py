"""Structured output over HTTP: every way to ask for it, and the official clients' own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest

pytest.importorskip("llguidance", reason="llguidance is not installed")

from engineroom.engine.async_llm import AsyncLLM
from tests.engine import golden

from .conftest import Running, start
from .http import post

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True},
}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the golden model: a real engine, whose logits are as good as random."""
    model = str(golden.write(tmp_path_factory.mktemp("golden")))
    running = start(make=lambda: AsyncLLM(model, device="cpu", max_num_seqs=4))
    yield running
    running.stop()


def chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Is it so?"}]
    return {"model": "fake", "messages": messages, "max_tokens": 120, "seed": 5, **fields}


def plain(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "Is it so?", "max_tokens": 120, "seed": 5, **fields}


def check(text: str) -> None:
    value = json.loads(text)
    assert value["answer"] in ("yes", "no") and value["sure"] in (True, False) and len(value) == 2


def test_a_schema_whole_and_streamed_in_chat_and_completions(serving: Running) -> None:
    body = chat(response_format=RESPONSE_FORMAT)
    (choice,) = post(serving, "/v1/chat/completions", body).json["choices"]
    check(choice["message"]["content"])
    assert choice["complete"] is True
    events = post(serving, "/v1/chat/completions", {**body, "stream": True}).events
    parts = [c for e in events for c in e["choices"]]
    assert "".join(p["delta"].get("content", "") for p in parts) == choice["message"]["content"]
    assert [p["complete"] for p in parts if "complete" in p] == [True]
    body = plain(response_format=RESPONSE_FORMAT)
    (answer,) = post(serving, "/v1/completions", body).json["choices"]
    check(answer["text"])
    events = post(serving, "/v1/completions", {**body, "stream": True}).events
    assert "".join(c["text"] for e in events for c in e["choices"]) == answer["text"]
    assert events[-1]["choices"][0]["complete"] is True


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"json": SCHEMA}, r"\{.*\}"),
        ({"json": json.dumps(SCHEMA)}, r"\{.*\}"),
        ({"json_object": True}, r"\{.*\}"),
        ({"regex": "[a-f]{3}[0-9]"}, "[a-f]{3}[0-9]"),
        ({"choice": ["left", "right"]}, "left|right"),
        ({"grammar": 'start: "<" /[a-z]{2}/ ">"'}, "<[a-z]{2}>"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_form_of_ours(
    serving: Running, path: str, outputs: dict[str, Any], pattern: str
) -> None:
    body = chat if "chat" in path else plain
    answer = post(serving, path, body(structured_outputs=outputs))
    assert answer.status == 200, answer.body
    (choice,) = answer.json["choices"]
    text = choice["message"]["content"] if "chat" in path else choice["text"]
    assert re.fullmatch(pattern, text, re.DOTALL) and choice["complete"]


@pytest.mark.parametrize("form", [{"type": "text"}, None])
def test_text_is_no_form(serving: Running, form: Any) -> None:
    answer = post(serving, "/v1/chat/completions", chat(response_format=form, max_tokens=3)).json
    assert "complete" not in answer["choices"][0]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"not": {}}},
                }
            },
            "response_format",
            'Unimplemented keys: ["not"]',
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "x": 1}}},
            "response_format.json_schema.x",
            "unknown field",
        ),
        (
            {"structured_outputs": {"json": {"type": "objct"}}},
            "structured_outputs",
            "Invalid type: objct",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "give exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "2 forms"),
        ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx", "unknown field"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": RESPONSE_FORMAT},
            "structured_outputs",
            "send one",
        ),
        ({"response_format": RESPONSE_FORMAT, "max_tokens": 3}, "max_tokens", "the shortest has"),
        ({"response_format": RESPONSE_FORMAT, "min_tokens": 3}, "min_tokens", "combined"),
    ],
)
def test_what_is_refused_names_its_field(
    serving: Running, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = post(serving, "/v1/chat/completions", chat(**fields))
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param and words in answer.error["message"]
    streamed = post(serving, "/v1/chat/completions", chat(**fields, stream=True))
    assert streamed.status == 400


def test_the_official_client_parses(serving: Running) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    pydantic = pytest.importorskip("pydantic")

    class Verdict(pydantic.BaseModel):  # type: ignore[name-defined, misc]
        answer: Literal["yes", "no"]
        sure: bool

    client = openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "fake", "messages": chat()["messages"], "seed": 5}
    whole = client.chat.completions.parse(**asked, max_tokens=200, response_format=Verdict)
    verdict = whole.choices[0].message.parsed
    assert isinstance(verdict, Verdict)
    with client.chat.completions.stream(**asked, max_tokens=200, response_format=Verdict) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == verdict
    extra = {"structured_outputs": {"choice": ["left", "right"]}}
    chosen = client.chat.completions.create(**asked, max_tokens=9, extra_body=extra)
    assert chosen.choices[0].message.content in ("left", "right")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.parse(**asked, max_tokens=2, response_format=Verdict)


def test_anthropic_s_output_format(serving: Running) -> None:
    anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    client = anthropic.Anthropic(base_url=serving.url, api_key="none", max_retries=0)
    asked: dict[str, Any] = {
        "model": "fake",
        "messages": chat()["messages"],
        "max_tokens": 120,
        "extra_body": {"seed": 5},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    }
    whole = client.messages.create(**asked)
    check(whole.content[0].text)
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
    with pytest.raises(anthropic.BadRequestError, match="output_config"):
        bad = {"format": {"type": "json_schema", "schema": {"type": "objct"}}}
        client.messages.create(**{**asked, "output_config": bad})
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.effort"):
        client.messages.create(**{**asked, "output_config": {"effort": "low"}})
