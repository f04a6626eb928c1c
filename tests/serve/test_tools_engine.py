"""Tools over a real engine: a random model, held by a grammar, calls them and nothing else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engineroom.engine.async_llm import AsyncLLM
from engineroom.engine.serve import schema
from engineroom.engine.serve.chat import Chat
from engineroom.engine.serve.keeper import Keeper
from engineroom.engine.serve.service import NOBODY, Service
from engineroom.engine.serve.settings import ServeConfig
from tests.engine import golden

from .http import chat

pytestmark = pytest.mark.torch
TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}<|assistant|>{# MARKERS #}"
)
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "set",
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}, "to": {"enum": ["a", "b"]}},
                "required": ["on", "to"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "get", "parameters": NOTHING}},
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "markers", ["<tool_call>", "<function= <parameter=", "<arg_key><arg_value>"]
)
def test_a_required_call_is_one_whatever_the_model_would_say(
    tmp_path_factory: pytest.TempPathFactory, markers: str, seed: int
) -> None:
    pytest.importorskip("llguidance")
    model = golden.write(tmp_path_factory.mktemp("golden"))
    template = TEMPLATE.replace("MARKERS", markers)
    message = asyncio.run(answer(model, template, tools=TOOLS, tool_choice="required", seed=seed))
    assert message.content is None and message.tool_calls
    for call in message.tool_calls:
        arguments = json.loads(call.function.arguments)
        if call.function.name == "set":
            assert isinstance(arguments["on"], bool) and arguments["to"] in "ab"
        else:
            assert (call.function.name, arguments) == ("get", {})


async def answer(model: Path, template: str, **fields: Any) -> Any:
    """The message of one chat completion."""
    keeper = Keeper(lambda: AsyncLLM(str(model), chat_template=template))
    service = Service(keeper, ServeConfig(), "fake")
    body = chat(parallel_tool_calls=False, max_tokens=200, **fields)
    await keeper.start()
    try:
        whole = await Chat(service, msgspec.convert(body, schema.ChatRequest), NOBODY).whole()
    finally:
        await keeper.close()
    assert whole.choices[0].finish_reason == "tool_calls"
    return whole.choices[0].message
