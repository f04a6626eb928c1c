"""Every parameter of the official clients' calls, one by one: honoured, or refused by its name.

The names come from the installed clients' own signatures. A new version that knows another
parameter fails here until the table says what the server does with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from .conftest import Running, start
from .http import chat

openai = pytest.importorskip("openai", reason="the openai package is not installed")
anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")

# What a client keeps to itself, or sends as headers of its own.
OF_THE_CLIENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout", "output_format"}
OF_THE_CLIENT |= {"user_profile_id", "workspace_id"}
MESSAGES = chat()["messages"]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "f", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
SAMPLING = {"temperature": 0.5, "top_p": 0.5}
PENALTIES = {"frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {"65": 5}}

# Of Anthropic's: what the tokens of a prompt are counted of, too.
NAMED_TOOL = {"name": "f", "input_schema": SCHEMA}
PROMPT = {
    "cache_control": {"type": "ephemeral"},
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    "system": "be brief",
    "thinking": {"type": "disabled"},
    "tool_choice": {"with": {"tools": [NAMED_TOOL]}, "is": {"type": "none"}},
    "tools": [NAMED_TOOL],
}


@dataclass(frozen=True)
class Call:
    """A call of a client: what it needs, what is honoured, and what is refused with a 400.

    A value may be a dictionary {"with": other parameters, "is": the value}.
    """

    create: Callable[[Running], Callable[..., Any]]
    needs: dict[str, Any]
    honoured: dict[str, Any]
    refused: dict[str, Any]


def _openai(running: Running) -> Any:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def _anthropic(running: Running) -> Any:
    return anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)


CALLS = {
    "chat.completions": Call(
        lambda running: _openai(running).chat.completions.create,
        {"model": "fake", "messages": MESSAGES, "max_tokens": 4},
        {
            **SAMPLING,
            **PENALTIES,
            "function_call": "none",
            "logprobs": True,
            "max_completion_tokens": 4,
            "metadata": {"a": "b"},
            "modalities": ["text"],
            "n": 2,
            "parallel_tool_calls": {"with": {"tools": [TOOL]}, "is": False},
            "prompt_cache_key": "a",
            "prompt_cache_retention": "in_memory",
            "reasoning_effort": "none",
            "response_format": {"type": "text"},
            "safety_identifier": "a",
            "seed": 3,
            "service_tier": "auto",
            "stop": ["b"],
            "store": False,
            "stream": True,
            "stream_options": {"with": {"stream": True}, "is": {"include_usage": True}},
            "tool_choice": {"with": {"tools": [TOOL]}, "is": "none"},
            "tools": [TOOL],
            "top_logprobs": {"with": {"logprobs": True}, "is": 2},
            "user": "a",
        },
        {
            "audio": {"voice": "alloy", "format": "wav"},
            "functions": [FUNCTION],
            "moderation": {"model": "omni-moderation-latest"},
            "prediction": {"type": "content", "content": "a"},
            "prompt_cache_options": {"mode": "implicit"},
            "verbosity": "low",
            "web_search_options": {"search_context_size": "low"},
        },
    ),
    "completions": Call(
        lambda running: _openai(running).completions.create,
        {"model": "fake", "prompt": "hello", "max_tokens": 4},
        {
            **SAMPLING,
            **PENALTIES,
            "best_of": 2,
            "echo": True,
            "logprobs": 2,
            "n": 2,
            "seed": 3,
            "stop": "b",
            "stream": True,
            "stream_options": {"with": {"stream": True}, "is": {"include_usage": True}},
            "user": "a",
        },
        {"suffix": "end"},
    ),
    "responses": Call(
        lambda running: _openai(running).responses.create,
        {"model": "fake", "input": "hello", "max_output_tokens": 4},
        {
            **SAMPLING,
            "background": False,
            "include": ["reasoning.encrypted_content"],
            "instructions": "be brief",
            "metadata": {"a": "b"},
            "parallel_tool_calls": False,
            "prompt_cache_key": "a",
            "prompt_cache_retention": "in_memory",
            "reasoning": {"effort": "none"},
            "safety_identifier": "a",
            "service_tier": "auto",
            "store": False,
            "stream": True,
            "stream_options": {"with": {"stream": True}, "is": {"include_obfuscation": False}},
            "text": {"format": {"type": "text"}},
            "tool_choice": {"with": {"tools": [{"type": "function", **FUNCTION}]}, "is": "none"},
            "tools": [{"type": "function", **FUNCTION}],
            "truncation": "disabled",
            "user": "a",
        },
        {
            "access_programs": ["a"],
            "background_options": {},
            "context_management": [{"type": "compaction"}],
            "conversation": "conv_1",
            "image": {},
            "max_tool_calls": 1,
            "moderation": {"model": "omni-moderation-latest"},
            "previous_response_id": "resp_none",
            "prompt": {"id": "pmpt_1"},
            "prompt_cache_options": {"mode": "implicit"},
            "top_logprobs": 2,
        },
    ),
    "embeddings": Call(
        lambda running: _openai(running).embeddings.create,
        {"model": "fake", "input": "hello"},
        {"dimensions": 3, "encoding_format": "float", "user": "a"},
        {},
    ),
    "messages": Call(
        lambda running: _anthropic(running).messages.create,
        {"model": "fake", "messages": MESSAGES, "max_tokens": 8},
        {
            **PROMPT,
            "metadata": {"user_id": "a"},
            "service_tier": "auto",
            "stop_sequences": ["b"],
            "stream": True,
        },
        {
            "container": "a",
            "diagnostics": {"previous_message_id": "a"},
            "inference_geo": "us",
            "speed": "fast",
        },
    ),
    "count_tokens": Call(
        lambda running: _anthropic(running).messages.count_tokens,
        {"model": "fake", "messages": MESSAGES},
        PROMPT,
        {"speed": "fast"},
    ),
}


def outcome(create: Callable[..., Any], needs: dict[str, Any], name: str, value: Any) -> str:
    """ "honoured", or "refused" by a message that names it."""
    more: dict[str, Any] = {}
    if isinstance(value, dict) and set(value) == {"with", "is"}:
        more, value = value["with"], value["is"]
    try:
        answer = create(**{**needs, **more, name: value})
        if more.get("stream") or name == "stream":
            assert list(answer), "a stream without a part"
    except openai.BadRequestError as error:
        assert error.param is not None and error.param.partition(".")[0] == name, error
        return "refused"
    except anthropic.BadRequestError as error:  # this interface's errors have no field for it
        assert name in str(error), error
        return "refused"
    return "honoured"


@pytest.fixture(scope="module")
def hermes() -> Iterator[Running]:
    running = start("hermes")  # whose template has tools, and a switch for thinking
    yield running
    running.stop()


@pytest.mark.parametrize("name", CALLS)
def test_every_parameter_is_honoured_or_refused_by_its_name(hermes: Running, name: str) -> None:
    call = CALLS[name]
    create = call.create(hermes)
    known = set(inspect.signature(create).parameters) - OF_THE_CLIENT - set(call.needs)
    values = call.honoured | call.refused
    assert known == set(values), "this client's parameters are others than the table's"
    expected = dict.fromkeys(call.honoured, "honoured") | dict.fromkeys(call.refused, "refused")
    assert {n: outcome(create, call.needs, n, value) for n, value in values.items()} == expected
