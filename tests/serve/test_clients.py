"""Clients that others wrote over OpenAI's interface: LangChain and LiteLLM."""

from __future__ import annotations

import pytest

from .conftest import Running
from .http import chat, post


def expected(server: Running, **fields: object) -> str:
    whole = post(server, "/v1/chat/completions", chat(max_tokens=9, seed=3, **fields)).json
    text: str = whole["choices"][0]["message"]["content"]
    return text


def test_langchain(server: Running) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    llm = langchain.ChatOpenAI(
        model="fake", base_url=f"{server.url}/v1", api_key="none", max_tokens=9, seed=3
    )
    answer = llm.invoke("hello")
    assert answer.content == expected(server)
    assert answer.usage_metadata["output_tokens"] == 9
    assert "".join(part.content for part in llm.stream("hello")) == answer.content
    vectors = langchain.OpenAIEmbeddings(
        model="fake", base_url=f"{server.url}/v1", api_key="none", check_embedding_ctx_length=False
    ).embed_documents(["ab", "cd"])
    assert [len(vector) for vector in vectors] == [8, 8]


def test_litellm(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    asked = {
        "model": "openai/fake",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "messages": chat()["messages"],
        "max_tokens": 9,
        "seed": 3,
    }
    answer = litellm.completion(**asked)
    assert answer.choices[0].message.content == expected(server)
    parts = litellm.completion(**asked, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == answer.choices[0].message.content
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**{**asked, "messages": [{"role": "user", "content": "hostile"}]})
