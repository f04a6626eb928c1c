"""The conversation of `engineroom chat`: its messages, its commands, its lines."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ..core.answers import RequestOutput
from ..core.checks import AdmissionError
from ..core.sampling_params import SamplingParams
from ..dialects.answer import Answer, AnswerParser
from ..dialects.parts import Part, Reasoning, Text
from ..dialects.reasoning import ReasoningFormat, reasoning_format_of
from ..load.chat_template import TemplateError
from .session import Session, ctrl_c

HELP = """\
/help            this list
/reset           forget the conversation (the system message stays)
/forget          forget its oldest question and answer
/system [TEXT]   set the system message, or show it
/save FILE       write the conversation as JSON
/exit            leave (also Ctrl-D)
A line that begins with // is sent with one slash.
Ctrl-C stops an answer; the conversation stays."""
COMMANDS = ("/help", "/reset", "/forget", "/system", "/save", "/exit")


class Conversation:
    """Messages so far and where answers are written. One object per `engineroom chat`."""

    def __init__(
        self,
        session: Session,
        params: SamplingParams,
        *,
        system: str | None = None,
        out: TextIO | None = None,
        interactive: bool = False,
        colour: bool = False,
        form: ReasoningFormat | None = None,
    ) -> None:
        """`form`: of answers that are messages with headers, where the model gives such."""
        self._session = session
        self._params = params
        self._out = out if out is not None else sys.stdout
        self._interactive = interactive
        self._colour = colour
        self._form = form
        self._thinks = False  # what was written last was a thought
        if form is not None and params.skip_special_tokens:
            kept = dict.fromkeys((*params.keep_special_tokens, *form.markers))
            self._params = params.replace(keep_special_tokens=tuple(kept))
        self.system = system
        self.messages: list[dict[str, str]] = []  # without the system message

    # ------------------------------------------------------------------------------- answering

    def ask(self, text: str) -> RequestOutput:
        """Stream the answer to `text` and keep both. Where it is refused, neither is kept.

        Errors: AdmissionError, TemplateError, RequestFailed.
        """
        asked = {"role": "user", "content": text}
        prompt = self._session.engine.render_chat([*self._system(), *self.messages, asked])
        last: RequestOutput | None = None
        parser = AnswerParser(self._form.parser(inside=False) if self._form else None, None)
        answered = Answer()
        with ctrl_c(self._session.interrupt):
            for output in self._session.run(prompt, self._params):
                parts = parser.feed(output.deltas[0] if output.deltas else "")
                parts += parser.finish() if output.finished else []
                self._show(parts)
                answered.add(parts)
                last = output
        if last is None:
            raise RuntimeError("the engine ended a request without an output")
        self._write("\n")
        self._thinks = False
        answer = {"role": "assistant", "content": answered.text}
        self.messages += [asked, answer]
        return last

    def _system(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _show(self, parts: list[Part]) -> None:
        """Thoughts are for who sits before it: dim where colours are shown, and left out of a
        pipe."""
        for part in parts:
            if isinstance(part, Text):
                self._write("\n" * self._thinks + part.text)
                self._thinks = False
            elif isinstance(part, Reasoning) and self._interactive:
                self._thinks = True
                self._write(part.text, dim=self._colour)

    def _write(self, text: str, *, dim: bool = False) -> None:
        text = printable(text) if self._out.isatty() else text
        self._out.write(f"\x1b[2m{text}\x1b[0m" if dim else text)
        self._out.flush()

    def say(self, text: str) -> None:
        """A line that is not the model's, dim where colours are shown."""
        self._out.write(f"\x1b[2m{text}\x1b[0m\n" if self._colour else text + "\n")
        self._out.flush()

    # --------------------------------------------------------------------------------- the loop

    def loop(self, source: TextIO) -> None:
        """Ask each line of `source` until it ends or says /exit. Piped: no prompts, no remarks
        between answers; a refused line is an error and ends the loop."""
        for line in self._lines(source):
            text = line.strip()
            if not text:
                continue
            if text.startswith("/") and not text.startswith("//"):
                if not self.command(text):
                    return
                continue
            text = text[1:] if text.startswith("//") else text
            if not self._interactive:
                self.ask(text)
                continue
            try:
                output = self.ask(text)
            except AdmissionError as error:
                self.say(f"not sent: {error}")
                if error.code in ("context_length", "never_fits") and self.messages:
                    self.say("/forget drops the oldest question and answer, /reset all of them.")
            except TemplateError as error:
                self.say(f"not sent: {error}")
            else:
                self.say(statistics(output))

    def _lines(self, source: TextIO) -> Iterator[str]:
        """Lines as they come. At a terminal: with a prompt; Ctrl-C twice or Ctrl-D ends."""
        if not self._interactive:
            yield from source
            return
        with contextlib.suppress(ImportError):  # line editing, where Python was built with it
            import readline  # noqa: F401
        leaving = False
        while True:
            try:
                line = input("> ")
            except EOFError:
                self._out.write("\n")
                return
            except KeyboardInterrupt:
                self._out.write("\n")
                if leaving:
                    return
                leaving = True
                self.say("Ctrl-C once more, or Ctrl-D, leaves.")
                continue
            leaving = False
            yield line

    def command(self, line: str) -> bool:
        """Carry out a /command; False where it ends the conversation."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/exit":
            return False
        if name == "/help":
            self.say(HELP)
        elif name == "/reset":
            self.messages.clear()
            self.say("the conversation is empty")
        elif name == "/forget":
            del self.messages[:2]
            self.say(f"{len(self.messages) // 2} questions and answers are kept")
        elif name == "/system":
            if rest:
                self.system = rest
            self.say(f"system message: {self.system or 'none'}")
        elif name == "/save":
            self._save(rest)
        else:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            self.say(f"{name} is no command{f'; did you mean {near[0]}?' if near else ''} (/help)")
        return True

    def _save(self, name: str) -> None:
        if not name:
            self.say("/save needs a file name")
            return
        path = Path(os.path.expanduser(name)).absolute()
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump([*self._system(), *self.messages], file, ensure_ascii=False, indent=1)
                file.write("\n")
        except FileExistsError:
            self.say(f"{path} exists; it was left as it is")
        except OSError as error:
            self.say(f"{path} could not be written: {error.strerror}")
        else:
            self.say(f"saved to {path}")


def form_of(template: str) -> ReasoningFormat | None:
    """The form of answers that are messages with headers; None where a template has others."""
    form = reasoning_format_of(template)
    return form if form is not None and form.messages else None


def statistics(output: RequestOutput) -> str:
    """ "12 tokens · 34.5 tok/s · first token 0.21 s · 3.1 J", and why it ended early, if it did."""
    times, tokens = output.timings, output.usage.completion_tokens
    parts = [f"{tokens} token{'' if tokens == 1 else 's'}"]
    if tokens > 1 and times.decode_s > 0:
        parts.append(f"{(tokens - 1) / times.decode_s:.1f} tok/s")
    if times.time_to_first_token_s is not None:
        parts.append(f"first token {times.time_to_first_token_s:.2f} s")
    if output.cost is not None:
        parts.append(str(output.cost))
    reason = output.outputs[0].finish_reason
    if reason == "abort":
        parts.append("stopped; what it said is kept")
    elif reason == "length":
        parts.append("cut at max_tokens or the end of the context")
    return " · ".join(parts)


def printable(text: str) -> str:
    """Model text for a terminal: control characters but newline and tab become U+FFFD, so that an
    answer cannot move the cursor, retitle the window or write to the clipboard."""
    return "".join(
        c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "\ufffd" for c in text
    )


__all__ = ["Conversation", "form_of", "printable", "statistics"]
