"""The conversation of `engineroom chat`: what it keeps, what stops it, what it says."""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine.core.checks import AdmissionError
from engineroom.engine.tools.chat import Conversation, form_of, printable, statistics
from engineroom.engine.tools.options import CHAT_DEFAULTS
from engineroom.engine.tools.session import Session

from .cli_engine import ScriptedEngine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def conversation(
    script: list[str] | None = None, **options: Any
) -> tuple[Conversation, ScriptedEngine, io.StringIO]:
    context = options.pop("context", 10_000)
    engine = ScriptedEngine(script or ["The", " answer", "."], context)
    out = options.pop("out", io.StringIO())
    return Conversation(Session(engine), CHAT_DEFAULTS, out=out, **options), engine, out


def test_the_conversation_is_kept() -> None:
    chat, engine, out = conversation(system="Be brief.")
    chat.ask("One?")
    chat.ask("Two?")
    assert out.getvalue() == "The answer.\n" * 2
    assert engine.rendered[1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "The answer."},
        {"role": "user", "content": "Two?"},
    ]


MESSAGES = [
    "<|channel|>analysis<|mess",
    "age|>The sea?<|end|>",
    "<|start|>assistant<|channel|>final<|message|>",
    "It is",
    " blue.",
]


@pytest.mark.parametrize("interactive", [True, False])
def test_of_messages_with_headers_the_answer_is_shown_and_kept(interactive: bool) -> None:
    form = form_of("{{ '<|start|>assistant<|channel|>analysis<|message|>' }}")
    chat, engine, out = conversation(MESSAGES, form=form, interactive=interactive, colour=True)
    chat.ask("Which colour?")
    dim = "\x1b[2mThe sea?\x1b[0m\n" if interactive else ""
    assert out.getvalue() == f"{dim}It is blue.\n"
    chat.ask("Sure?")
    assert engine.rendered[1][1] == {"role": "assistant", "content": "It is blue."}
    assert form_of("<think>") is None


def test_ctrl_c_stops_the_answer_and_keeps_what_it_said() -> None:
    chat, engine, out = conversation(["a", "b", "c", "d"])
    before = signal.getsignal(signal.SIGINT)
    steps: list[int] = []

    def press(count: int) -> None:
        steps.append(count)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    engine.on_step = press
    output = chat.ask("Go on.")
    assert output.outputs[0].finish_reason == "abort"
    assert out.getvalue() == "ab\n"
    assert chat.messages[-1] == {"role": "assistant", "content": "ab"}
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped" in statistics(output)
    engine.on_step = lambda count: None
    chat.ask("And now?")  # the engine goes on
    assert chat.messages[-1]["content"] == "abcd"


def test_a_second_ctrl_c_leaves() -> None:
    chat, engine, _ = conversation(["a", "b", "c", "d"])
    before = signal.getsignal(signal.SIGINT)

    def press(count: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    engine.on_step = press
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Go on.")
    assert signal.getsignal(signal.SIGINT) is before


def test_piped_lines_are_answered_without_remarks() -> None:
    chat, _, out = conversation()
    chat.loop(io.StringIO("One?\n\n  \nTwo?\n/exit\nThree?\n"))
    assert out.getvalue() == "The answer.\n" * 2


def test_piped_a_refusal_is_an_error() -> None:
    chat, _, _ = conversation(context=5)
    with pytest.raises(AdmissionError):
        chat.loop(io.StringIO("a question that is too long\n"))


def typed(*lines: str | type[BaseException]) -> Iterator[Any]:
    yield from lines


def interactive(
    monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException], **options: Any
) -> tuple[Conversation, ScriptedEngine, str]:
    chat, engine, out = conversation(interactive=True, **options)
    source = typed(*lines)

    def read(prompt: str) -> str:
        try:
            line = next(source)
        except StopIteration:
            raise EOFError from None
        if isinstance(line, str):
            return line
        raise line()

    monkeypatch.setattr(builtins, "input", read)
    chat.loop(io.StringIO())
    return chat, engine, out.getvalue()


def test_each_answer_is_followed_by_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, said = interactive(monkeypatch, "One?")
    assert "The answer.\n3 tokens · 4.0 tok/s · first token 0.25 s · 1.25 J (estimated)\n" in said


def test_a_full_context_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _, said = interactive(monkeypatch, "12345", "1234567", "/forget", "123456", context=20)
    assert "not sent: 23 tokens exceed the context of 20" in said
    assert "/forget drops the oldest" in said
    assert [m["content"] for m in chat.messages] == ["123456", "The answer."]


def test_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    chat, engine, said = interactive(
        monkeypatch,
        "/help",
        "/system Be kind.",
        "One?",
        f"/save {file}",
        f"/save {file}",
        "/save",
        "/sytem x",
        "//slash",
        "/reset",
        "/exit",
        "never asked",
    )
    assert "/reset" in said
    saved = json.loads(file.read_text())
    assert [m["role"] for m in saved] == ["system", "user", "assistant"]
    assert "exists; it was left as it is" in said
    assert "/save needs a file name" in said
    assert "did you mean /system?" in said
    assert engine.rendered[-1][-1]["content"] == "/slash"
    assert chat.messages == []
    assert chat.system == "Be kind."
    assert len(engine.asked) == 2


def test_ctrl_c_at_the_prompt_twice_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine, said = interactive(
        monkeypatch, KeyboardInterrupt, "One?", KeyboardInterrupt, KeyboardInterrupt, "Two?"
    )
    assert len(engine.asked) == 1
    assert said.count("Ctrl-C once more") == 2


def test_colour_is_for_remarks_alone() -> None:
    plain, _, out = conversation()
    plain.say("remark")
    assert out.getvalue() == "remark\n"
    dim, _, out = conversation(colour=True)
    dim.say("remark")
    assert out.getvalue() == "\x1b[2mremark\x1b[0m\n"


def test_a_model_cannot_command_the_terminal() -> None:
    attack = "\x1b]0;title\x07 \x9b2J ok\n\té\u200d"
    assert printable(attack) == "\ufffd]0;title\ufffd \ufffd2J ok\n\té\u200d"
    chat, _, out = conversation([attack], out=Terminal())
    chat.ask("x")
    assert "\x1b" not in out.getvalue()
    piped, _, out = conversation([attack])
    piped.ask("x")
    assert out.getvalue() == attack + "\n"  # a pipe gets the exact text
