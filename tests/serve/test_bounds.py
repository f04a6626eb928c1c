"""Every bound that /openapi.json states of a request: what lies on it is accepted, and what lies
just outside of it is refused with a 400 that names the field.

The cases are read off the document itself. What it can say of one field alone, and what another
field has to be for that, is in BESIDE.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest

from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.serve.openapi import OPERATIONS, document
from engineroom.engine.serve.query import stated
from tests.engine.fake import MODEL

from .conftest import start
from .http import Answer, chat, completion, get, post
from .test_gallery import upload

# The smallest request of a path, and what else a field needs beside it to be accepted.
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat("say«a»", max_tokens=4),
    "/v1/completions": completion("say«a»"),
    "/v1/responses": {"model": "fake", "input": "say«a»", "max_output_tokens": 4},
    "/v1/messages": chat("say«a»", max_tokens=8),
    "/v1/messages/count_tokens": chat(),
    "/v1/embeddings": {"model": "fake", "input": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [65]},
    "/v1/batches": {"endpoint": "/v1/completions", "completion_window": "24h"},
}
BESIDE: dict[str, dict[str, Any]] = {
    "max_tokens": {"prompt_logprobs": 1},
    "max_completion_tokens": {"prompt_logprobs": 1, "max_tokens": None},
    "min_tokens": {"max_tokens": 1 << 24},
    "messages": {"prompt": None},
    "tool_choice": {"tools": None},  # one, as the path has it
    "top_logprobs": {"logprobs": True},
    "thinking": {"max_tokens": 100},
    "stream_options": {"stream": True},
}
_SCHEMAS = json.loads(document("0", MODEL.vocab_size, MODEL.hidden_size))["components"]["schemas"]


@dataclass(frozen=True)
class Case:
    path: str
    field: str
    keyword: str
    inside: tuple[Any, ...]
    outside: tuple[Any, ...]
    place: Callable[[Any], Any]  # a value at the bound's place -> the field
    is_query: bool = False

    def __str__(self) -> str:
        return f"{self.path} {self.field} {self.keyword}"


def _whole(schema: dict[str, Any]) -> dict[str, Any]:
    """Without a reference, or the other forms that an anyOf of one kind of value allows."""
    while "$ref" in schema:
        schema = _SCHEMAS[schema["$ref"].rpartition("/")[2]]
    return schema


def _forms(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a schema, each with what is said of all of them."""
    schema = _whole(schema)
    if "anyOf" not in schema:
        return [schema]
    rest = {k: v for k, v in schema.items() if k != "anyOf"}
    found = [form for inner in schema["anyOf"] for form in _forms(inner)]
    return [{**rest, **form} for form in found]


def _sample(schema: dict[str, Any], nth: int = 0) -> Any:
    """A small value; others for other `nth`."""
    form = _forms(schema)[0]
    if "const" in form or "enum" in form:
        return form.get("const", form.get("enum", [None])[-1])
    match form.get("type"):
        case "object" if "properties" not in form:  # an item of /v1/responses' input
            return {"role": "user", "content": "a"}
        case "object":
            names = form.get("required", ())
            return {name: _sample(form["properties"][name], nth) for name in names}
        case "array":
            return [_sample(form.get("items", {}), i) for i in range(form.get("minItems", 0))]
        case "string":
            return str(nth).rjust(form.get("minLength", 1), "a")
        case "integer" | "number":
            return max(form.get("minimum", 0), 0)
        case "boolean":
            return True
    return None


def _text(length: int) -> str:
    """Also as JSON, where the field is a schema's text."""
    return "a" * length if length < 2 else "{}".ljust(length)


def _keyed(count: int, form: dict[str, Any]) -> dict[str, Any]:
    return {str(i): _sample(form["additionalProperties"]) for i in range(count)}


def _listed(count: int, form: dict[str, Any]) -> list[Any]:
    return [_sample(form.get("items", {}), i) for i in range(count)]


def _bounds(form: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, ...], tuple[Any, ...]]]:
    """(keyword, values on the bound, values just outside) of one form."""
    whole = form.get("type") == "integer"
    for keyword, sign in (("minimum", -1), ("maximum", 1)):
        if keyword in form:
            limit = form[keyword]
            yield keyword, (limit,), (limit + sign if whole else _next(limit, sign),)
    if "not" in form:
        low, high = form["not"]["exclusiveMinimum"], form["not"]["exclusiveMaximum"]
        yield "not", (low, high), (_next(low, 1), _next(high, -1))
    for kind, make in (
        ("Length", _text),
        ("Items", lambda n: _listed(n, form)),
        ("Properties", lambda n: _keyed(n, form)),
    ):
        for keyword, step in ((f"min{kind}", -1), (f"max{kind}", 1)):
            if keyword in form:
                # Of tokens there are only those of the model.
                known = keyword != "maxProperties" or form[keyword] <= MODEL.vocab_size
                inside = (make(form[keyword]),) if known else ()
                yield keyword, inside, (make(form[keyword] + step),)
    if "pattern" in form:
        yield "pattern", (), ("", " ", "a b", "ä", "-1 ")
    if "enum" in form:
        fitting = _TYPES.get(form.get("type", ""), object)
        yield "enum", tuple(v for v in form["enum"] if isinstance(v, fitting)), ("no such", "1")


_TYPES: dict[str, type] = {"string": str, "boolean": bool, "null": type(None), "array": list}


def _next(value: float, sign: int) -> float:
    return math.nextafter(value, sign * math.inf)


def _walk(
    schema: dict[str, Any], place: Callable[[Any], Any], seen: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[Any, ...], tuple[Any, ...], Callable[[Any], Any]]]:
    for form in _forms(schema):
        for keyword, inside, outside in _bounds(form):
            yield keyword, inside, outside, place
        title = form.get("title", "")
        if title in seen:
            continue
        inner = (*seen, title) if title else seen
        base = _sample(form) if form.get("type") == "object" else {}
        for name, child in form.get("properties", {}).items():
            if name in ("type", "role", "object"):  # what kind of thing it is
                continue
            yield from _walk(child, lambda v, n=name, b=base: place({**b, n: v}), inner)
        if form.get("type") == "array":
            yield from _walk(form.get("items", {}), lambda v: place([v]), inner)
        if isinstance(form.get("additionalProperties"), dict):
            yield from _walk(form["additionalProperties"], lambda v: place({"1": v}), inner)
        if "propertyNames" in form:
            value = _sample(form["additionalProperties"])
            names = {"type": "string", **form["propertyNames"]}
            yield from _walk(names, lambda v, x=value: place({v: x}), inner)


def _cases() -> Iterator[Case]:
    for op in OPERATIONS:
        for field, schema in stated(op.query).items() if op.query is not None else ():
            for keyword, inside, outside in _bounds(schema):
                yield Case(op.path, field, keyword, inside, outside, lambda v: v, True)
        if op.body is None or op.takes != "application/json":
            continue
        for field, schema in _SCHEMAS[op.body.__name__]["properties"].items():
            for keyword, inside, outside, place in _walk(schema, lambda v: v):
                yield Case(op.path, field, keyword, inside, outside, place)


CASES = list(_cases())


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case, Any], Answer]]:
    """Of a server whose model has tools, thoughts, and a place for files."""
    running = start("hermes", data_dir=str(tmp_path_factory.mktemp("data")))
    file = {"input_file_id": upload(running).json["id"]}

    def ask(case: Case, value: Any) -> Answer:
        if case.is_query:
            return get(running, f"{case.path}?{case.field}={quote(str(value))}")
        known = _SCHEMAS[_body(case.path)]["properties"]
        body = BASES[case.path] | (file if case.path == "/v1/batches" else {})
        for name, there in BESIDE.get(case.field, {}).items():
            if name in known:
                body[name] = (
                    [_sample(_forms(known[name])[0]["items"])] if name == "tools" else there
                )
        return post(running, case.path, {**body, case.field: case.place(value)})

    yield ask
    running.stop()


def _body(path: str) -> str:
    return next(op.body.__name__ for op in OPERATIONS if op.path == path and op.body)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_stated_bound_is_the_one_that_is_kept(
    ask: Callable[[Case, Any], Answer], case: Case
) -> None:
    for value in case.outside:
        answer = ask(case, value)
        assert answer.status == 400, answer.body[:300]
        # Anthropic's errors have no field for it: the sentence names it.
        named = answer.error.get("param") or answer.error["message"]
        assert re.search(rf"\b{case.field}\b", named), answer.body
    for value in case.inside:
        answer = ask(case, value)
        if case.field == "timeout_ms" and answer.status != 200:  # a millisecond may be too few
            assert "timeout_ms=1 " in answer.error["message"], answer.body[:300]
            continue
        assert answer.status == 200, answer.body[:300]


def test_every_bound_of_the_sampling_parameters_is_stated() -> None:
    stated = {(case.field, case.keyword) for case in CASES if case.path == "/v1/completions"}
    for name in SamplingParams.BOUNDS:
        assert {(name, "minimum"), (name, "maximum")} <= stated, name
    for name in SamplingParams.LIMITS:
        kind = "maxProperties" if name == "logit_bias" else "maxItems"
        assert (name, kind) in stated, name
