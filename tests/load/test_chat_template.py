"""Chat templates: on the corpus of the test data equal to transformers, or both refuse."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine.load.chat_template import (
    MAX_SOURCE,
    RESERVED,
    ChatTemplate,
    TemplateError,
    load_chat_template,
)
from engineroom.engine.load.mapped import CheckpointError
from engineroom.engine.load.tokenizer import load_tokenizer
from tests.counts import FULL
from tests.data import data_path
from tests.load.vocabularies import StubCheckpoint, gguf_stub, path_of, tokenizer_of

NOW = datetime(2026, 3, 4, 5, 6, 7)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
USER = {"role": "user", "content": "What is the weather in Paris & <Rome>?  "}
ANSWER = {"role": "assistant", "content": "  It rains.\n"}
SYSTEM = {"role": "system", "content": "You are terse — «très»."}
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Paris", "days": [1, 2], "x": None}},
}
CALL_TEXT = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
RESULT = {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": '{"t": 3.5}'}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather (°C, <when>) of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
            "required": ["city"],
        },
        "return": {"type": "number"},
    },
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, USER],
    "no system": [USER, ANSWER, USER, ANSWER],
    "starts with the assistant": [ANSWER, USER],
    "two users": [USER, USER],
    "unknown role": [{"role": "narrator", "content": "Night falls."}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    "image": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
    "call": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT],
    "call without content": [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT, ANSWER],
    "call, null content": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "call in text": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL_TEXT]}],
    "two calls": [SYSTEM, USER, {"role": "assistant", "content": "x", "tool_calls": [CALL, CALL]}],
    "reasoning": [USER, {**ANSWER, "reasoning_content": "Let me think."}, USER],
    "thinking": [USER, {**ANSWER, "thinking": "Let me think."}, USER],
    "think tags": [USER, {"role": "assistant", "content": "<think>hm</think>Yes."}, USER],
    "answer null": [USER, {"role": "assistant", "content": None}, USER],
    "empty content": [{"role": "user", "content": ""}],
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": False},
    {"tools": [TOOL]},
    {"tools": [TOOL, TOOL], "add_generation_prompt": False},
    {"documents": [{"title": "One", "text": "Two", "content": "Three"}]},
    {"enable_thinking": False},
    {"thinking": True, "date_string": "1 Jan 2026", "reasoning_effort": "high"},
]


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """transformers' renderer with the clock stopped."""
    utils = pytest.importorskip(
        "transformers.utils.chat_template_utils", reason="needs transformers 5"
    )

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return NOW

    def render(source: str, messages: Any, **options: Any) -> str:
        options.setdefault("add_generation_prompt", True)
        (text,) = utils.render_jinja_template(
            conversations=[messages], chat_template=source, **SPECIAL, **options
        )[0]
        return str(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "datetime", Clock)
        yield render


def make(source: str, **more: Any) -> ChatTemplate:
    return ChatTemplate(source, special_tokens=SPECIAL, origin="a test", now=lambda: NOW, **more)


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    """One template object whose source tests change, so that its process stays warm."""
    made = make("")
    yield made
    made.close()


def test_the_corpus_renders_as_transformers_does(template: ChatTemplate, theirs: Any) -> None:
    paths = sorted(data_path("chat_templates").glob("*.jinja"))
    assert len(paths) >= 45
    equal = refused = 0
    for path in paths:
        template.source = path.read_text("utf-8")
        for name, messages in CONVERSATIONS.items():
            for options in OPTIONS if FULL or name == "turns" else OPTIONS[:3]:
                try:
                    expected = theirs(template.source, messages, **options)
                except Exception:
                    expected = None
                try:
                    got = template.render(messages, **options)
                except TemplateError as error:
                    assert error.kind not in ("limit", "crashed", "input"), (path.name, error)
                    got = None
                assert got == expected, (path.name, name, options)
                equal += got is not None
                refused += got is None
    assert equal > 2000 and refused > 100, (equal, refused)


@pytest.mark.parametrize(
    "source",
    [
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for m in tools %}{% if loop.first %}{% continue %}{% endif %}x{% break %}{% endfor %}",
        "{{ tools | tojson(indent=2) }}",
        "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=1, ensure_ascii=1, separators=(',', ':')) }}",
        "{{ {'b': '<&>'} | tojson }}",
        "{{ strftime_now('%d %b %Y %H:%M') }}",
        "{{ tools is none }} {{ documents is none }} {{ nothing is defined }}",
        "  {% if true %}\n  x\n  {% endif %}\n{{ bos_token }}{{ pad_token }}\n",
        "{% set ns = namespace(a=1, self=2) %}{% set ns.a = 5 %}{{ ns.a }}{{ ns.self }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace({'_a': 1}) %}",
        "{{ dict(a=1) }} {{ dict.fromkeys([1, 2]) }}",
        "{{ dict.__class__ }}",
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ range(3) | list }} {{ lipsum is defined }}",
        "{{ x.y.z }}",
        "{% endfor %}",
        "{{ messages[0]['content'] | upper | trim }}{{ '%s' | format('ü') }}",
        "{% macro f(a) %}[{{ a }}]{% endmacro %}{{ f(1) ~ f('<') }}",
        "{{ messages | map(attribute='role') | join(', ') }}",
        "{% import 'x' as y %}",
        "{{ ''.__class__.__mro__ }}",
    ],
)  # fmt: skip
def test_the_language_is_transformers(template: ChatTemplate, theirs: Any, source: str) -> None:
    template.source = source
    messages = CONVERSATIONS["turns"]
    for options in ({}, {"tools": [TOOL]}):
        try:
            expected = theirs(source, messages, **options)
        except Exception:
            with pytest.raises(TemplateError):
                template.render(messages, **options)
        else:
            assert template.render(messages, **options) == expected


def test_a_template_refuses_in_its_own_words(template: ChatTemplate) -> None:
    template.source = "{{ raise_exception('Roles must alternate: ü') }}"
    with pytest.raises(TemplateError, match="^Roles must alternate: ü$") as caught:
        template.render([USER])
    assert caught.value.kind == "raised"


def test_a_syntax_error_names_the_line(template: ChatTemplate) -> None:
    template.source = "a\n{% if %}"
    with pytest.raises(TemplateError, match="a test failed .syntax.: line 2: "):
        template.render([USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "messages is str; it must be a list"),
        ([], "messages is empty"),
        (["Hi"], r"messages\[0\] is str; it must be an object"),
        ([USER, {"content": "x"}], r"messages\[1\].role is None"),
        ([{"role": 7, "content": "x"}], r"messages\[0\].role is 7"),
        ([{"role": "", "content": "x"}], r"messages\[0\].role is ''"),
        ([{"role": "user"}], r"messages\[0\] has neither content nor tool_calls"),
        ([{"role": "user", "content": 7}], r"messages\[0\].content is int"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] is str"),
        ([{"role": "user", "content": [{"text": "x"}]}], r"content\[0\].type is None"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\].content is bytes"),
        ([{**ANSWER, "tool_calls": {}}], r"messages\[0\].tool_calls is dict"),
        ([{**ANSWER, "tool_calls": [1]}], r"messages\[0\].tool_calls\[0\] is int"),
        ([{**USER, 3: 4}], r"messages\[0\] has the key 3"),
        ([{**USER, "x": object()}], r"messages\[0\].x is object; only what JSON knows"),
        ([{**USER, "x": [{"y": {1, 2}}]}], r"messages\[0\].x\[0\].y is set"),
        ([{**USER, "x": 10**5000}], "cannot be written as JSON"),
    ],
)
def test_bad_messages_are_refused(template: ChatTemplate, messages: Any, message: str) -> None:
    template.source = "ok"
    with pytest.raises(TemplateError, match=message) as caught:
        template.render(messages)
    assert caught.value.kind == "input"
    assert template.render([USER]) == "ok"


@pytest.mark.parametrize("field", ["tools", "documents"])
def test_bad_tools_and_documents_are_refused(template: ChatTemplate, field: str) -> None:
    for value in ("x", [1], {"a": 1}):
        with pytest.raises(TemplateError, match=field):
            template.render([USER], **{field: value})


@pytest.mark.parametrize(
    "name",
    [
        *sorted(RESERVED - {"messages", "tools", "documents", "add_generation_prompt", "self"}),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("_x", "__class__", "bos_token"),
    ],
)
def test_reserved_variables_are_refused(template: ChatTemplate, name: str) -> None:
    template.source = "ok"
    with pytest.raises(TemplateError, match=f"variable '{name}' is reserved"):
        template.render([USER], **{name: "x"})


def test_depth_is_limited(template: ChatTemplate) -> None:
    template.source = "{{ messages | tojson | length }}"

    def nested(depth: int) -> Any:
        value: Any = "x"
        for _ in range(depth):
            value = [value]
        return [{**USER, "x": value}]

    assert template.render(nested(60))
    for depth in (64, 100_000):
        with pytest.raises(TemplateError, match="nested more than 64 deep"):
            template.render(nested(depth))


def test_values_of_enumerations_count_as_their_strings(template: ChatTemplate) -> None:
    class Role(StrEnum):
        USER = "user"

    template.source = "{{ messages[0].role == 'user' }}{{ messages[0].role }}"
    assert template.render([{"role": Role.USER, "content": "x"}]) == "Trueuser"


def test_text_beyond_unicode_survives(template: ChatTemplate) -> None:
    template.source = "{{ messages[0].content }}"
    for text in ("\x00\x1b\u2028", "😀" * 1000, "a\ud800b"):
        assert template.render([{"role": "user", "content": text}]) == text


# ---------------------------------------------------------------------------- where it comes from


def folder(tmp_path: Path, config: Any = None, jinja: str | None = None) -> StubCheckpoint:
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    return StubCheckpoint(kind="safetensors", path=tmp_path)


def load(checkpoint: Any, override: str | None = None) -> ChatTemplate | None:
    return load_chat_template(checkpoint, load_tokenizer(gguf_stub("gpt2")), override)


def test_from_a_gguf_file() -> None:
    stub = gguf_stub("gpt2")
    assert load(stub) is None
    stub.metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ eos_token }}{{ unk_token }}"
    template = load(stub)
    assert template is not None and template.special_tokens == {
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
    }
    assert template.render([USER]) == "<|bos|><|im_end|>"
    template.close()
    stub.metadata["tokenizer.chat_template"] = 7
    with pytest.raises(CheckpointError, match="tokenizer.chat_template is int"):
        load(stub)


def test_smollm2_from_its_file() -> None:
    from engineroom.engine.load.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path_of("smollm2"))
    template = load_chat_template(checkpoint, tokenizer_of("smollm2"))
    assert template is not None
    text = template.render([{"role": "user", "content": "Hi"}])
    template.close()
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer_of("smollm2").encode(text)
    assert ids.count(1) == 3 and ids.count(2) == 2


def test_from_a_folder(tmp_path: Path) -> None:
    assert load(folder(tmp_path)) is None
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    config = {"bos_token": {"content": "<b>"}, "eos_token": "<e>", "chat_template": named}
    template = load(folder(tmp_path, config))
    assert template is not None and template.source == "D"
    assert template.special_tokens == {"bos_token": "<b>", "eos_token": "<e>"}
    template = load(folder(tmp_path, config | {"chat_template": "S"}))
    assert template is not None and template.source == "S"
    with pytest.raises(CheckpointError, match=r"no template named 'default' among \['rag'\]"):
        load(folder(tmp_path, {"chat_template": named[:1]}))
    template = load(folder(tmp_path, config, jinja="J"))
    assert template is not None and template.source == "J"


def test_an_override_is_a_path_or_a_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("mine")
    for override, source in ((str(path), "mine"), ("{{ 1 }}", "{{ 1 }}"), ("a\nb", "a\nb")):
        template = load(gguf_stub("gpt2"), override)
        assert template is not None and template.source == source
    with pytest.raises(TemplateError, match="neither a file nor a template"):
        load(gguf_stub("gpt2"), str(tmp_path / "missing.jinja"))


def test_a_source_beyond_the_limit_is_refused() -> None:
    with pytest.raises(TemplateError, match=f"{MAX_SOURCE + 1} characters; at most {MAX_SOURCE}"):
        make("x" * (MAX_SOURCE + 1))


# ------------------------------------------------------------------------------------ the process


def test_start_does_not_wait_and_a_warm_render_is_fast() -> None:
    template = make("{{ messages[0].content }}")
    began = time.perf_counter()
    template.start()
    started = time.perf_counter() - began
    assert template.render([USER]) == USER["content"]
    assert started < 0.5 * (time.perf_counter() - began)  # most of it is the process's own start
    times = []
    for _ in range(20):
        began = time.perf_counter()
        template.render([USER])
        times.append(time.perf_counter() - began)
    assert min(times) < 0.02
    template.close()
    template.close()
    assert template.render([USER]) == USER["content"]  # closed, it starts again
    template.close()


def test_the_process_imports_jinja2_and_the_standard_library_only() -> None:
    program = "\n".join(
        [
            "import runpy, sys",
            "runpy.run_path(sys.argv[1], run_name='x')",
            "names = {m.partition('.')[0] for m in sys.modules}",
            "print(sorted(names - sys.stdlib_module_names - {'__main__', 'x'}))",
        ]
    )
    from engineroom.engine.load import template_process

    done = subprocess.run(
        [sys.executable, "-S", "-c", program, str(template_process._PROGRAM)],
        env={"PYTHONPATH": os.pathsep.join(p for p in sys.path if "site-packages" in p)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "['jinja2', 'markupsafe']"


def test_the_process_sees_no_environment_and_no_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A_SECRET", "x")
    template = make("fine")
    assert template.render([USER]) == "fine"
    (worker,) = template._pool._idle
    if sys.platform == "linux":
        environment = Path(f"/proc/{worker._process.pid}/environ").read_bytes()
        assert b"A_SECRET" not in environment
    template.close()


def test_the_process_ends_when_its_input_does() -> None:
    template = make("fine")
    template.render([USER])
    (worker,) = template._pool._idle
    worker._in.close()
    assert worker._process.wait(timeout=5) == 0
