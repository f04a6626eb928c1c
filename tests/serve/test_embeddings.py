"""/v1/embeddings: forms of input and of answers, by raw HTTP and by OpenAI's client."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import pytest

from .conftest import Running
from .http import post

PATH = "/v1/embeddings"


def body(text: Any = "ab", **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "input": text, **fields}


@pytest.mark.parametrize("text", ["ab", ["ab", "cde"], [1, 2, 3], [[1], [2, 3]]])
def test_inputs_of_every_form(server: Running, text: Any) -> None:
    answer = post(server, PATH, body(text)).json
    many = isinstance(text, list) and not isinstance(text[0], int)
    assert [d["index"] for d in answer["data"]] == list(range(2 if many else 1))
    assert answer["object"] == "list" and answer["model"] == "fake"
    assert all(d["object"] == "embedding" and len(d["embedding"]) == 8 for d in answer["data"])
    tokens = sum(map(len, text)) if many else len(text)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    if many:  # each as it is alone
        alone = [post(server, PATH, body([part])).json["data"][0] for part in text]
        assert [d["embedding"] for d in answer["data"]] == [d["embedding"] for d in alone]


def test_base64_is_little_endian_float32(server: Running) -> None:
    floats = post(server, PATH, body()).json["data"][0]["embedding"]
    coded = post(server, PATH, body(encoding_format="base64")).json["data"][0]["embedding"]
    assert list(struct.unpack("<8f", base64.b64decode(coded))) == floats


def test_fewer_dimensions_are_the_first_ones_at_unit_length(server: Running) -> None:
    whole = post(server, PATH, body([3])).json["data"][0]["embedding"]  # 0.6 at 3, 0.8 at 4
    cut = post(server, PATH, body([3], dimensions=4)).json["data"][0]["embedding"]
    assert len(cut) == 4 and cut == [0.0, 0.0, 0.0, 1.0] and whole[3] != 1.0
    assert post(server, PATH, body([3], dimensions=8)).json["data"][0]["embedding"] == whole
    assert math.isclose(sum(x * x for x in whole), 1.0, rel_tol=1e-6)


def test_more_inputs_than_run_at_once(server: Running) -> None:
    answer = post(server, PATH, body([[i] for i in range(450)])).json
    assert [d["index"] for d in answer["data"]] == list(range(450))
    assert server.service.num_live == 0


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    (body([]), "prompt_empty", "input"),
    (body([1, "a"]), "invalid_value", "input"),
    (body([[1]] * 2049), "invalid_value", "input"),
    (body(dimensions=9), "invalid_value", "dimensions"),
    (body(dimensions=0), "invalid_value", "dimensions"),
    (body(encoding_format="hex"), "invalid_value", "encoding_format"),
    (body(temperature=1), "invalid_value", "temperature"),
    (body(truncate_prompt_tokens=0), "invalid_value", "truncate_prompt_tokens"),
    (body([1, -1]), "token_id", "input"),
    (body("refuse: it"), "context_length_exceeded", None),
    (body([[1], [500]]), "engine_error", None),  # whose hidden states are no numbers
    (body(model="other"), "model_not_found", "model"),
]


@pytest.mark.parametrize(("wrong", "code", "param"), REFUSED, ids=[r[1] for r in REFUSED])
def test_a_refusal_names_what_is_wrong(
    server: Running, wrong: dict[str, Any], code: str, param: str | None
) -> None:
    answer = post(server, PATH, wrong)
    assert (answer.error["code"], answer.error["param"]) == (code, param), answer.body
    assert server.service.num_live == 0


def test_the_official_client(server: Running) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    asked = client.embeddings.create(model="fake", input=["ab", "cd"])  # in base64, by itself
    plain = client.embeddings.create(model="fake", input="ab", encoding_format="float")
    assert len(asked.data) == 2 and asked.usage.prompt_tokens == 4
    assert asked.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=0)
