"""The process that renders chat templates: it may hang, swell or crash, and is then replaced.

Runs as a program of its own and imports only jinja2 and the standard library. Frames on stdin and
stdout: four bytes of length, big-endian, then JSON. A request is {source, variables, now}; the
answer {text} or {kind, message}. An empty frame says that the process is ready. It ends when stdin
does, and by itself when one rendering takes far longer than the parent would wait.
Usage: template_worker.py MAX_OUTPUT_BYTES MAX_MEMORY_BYTES MAX_SECONDS
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.debug  # imported here, before memory is limited, not at the first error
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from jinja2.exceptions import SecurityError

MAX_TEMPLATES = 8  # compiled ones kept


class Raised(jinja2.TemplateError):
    """The template itself refused its input, by raise_exception."""


class TooMuchOutput(Exception):
    """The text grew beyond the limit."""


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks what the model writes; the text stays as is."""

    tags = {"generation"}  # noqa: RUF012 (the name and the form are jinja's)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: the body has a scope of its own.
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class Dict:
    """What templates know as `dict`: it makes dictionaries and has no attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """`namespace`, without names that start with an underscore (Python's internals)."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the kwargs
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the name {name!r} starts with an underscore")


class Renderer:
    """Renders requests, keeping the templates compiled last. `max_output` in bytes of UTF-8."""

    def __init__(self, max_output: int) -> None:
        self._max_output = max_output
        self._now = datetime.now()
        self._templates: dict[str, jinja2.Template] = {}
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, jinja2.ext.loopcontrols],
        )
        env.filters["tojson"] = _to_json
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = lambda format: self._now.strftime(format)
        env.globals["dict"] = Dict()
        env.globals["namespace"] = Namespace
        self._env = env

    def answer(self, request: dict[str, Any]) -> dict[str, str]:
        """{text}, or {kind, message} where the template fails."""
        try:
            return {"text": self._render(request)}
        except Raised as error:
            return {"kind": "raised", "message": str(error)}
        except jinja2.TemplateSyntaxError as error:
            return {"kind": "syntax", "message": f"line {error.lineno}: {error.message}"}
        except SecurityError as error:
            return {"kind": "security", "message": str(error)}
        except TooMuchOutput:
            return {"kind": "limit", "message": f"more than {self._max_output} bytes of text"}
        except MemoryError:
            return {"kind": "limit", "message": "it needs too much memory"}
        except RecursionError:
            return {"kind": "limit", "message": "it recurses too deeply"}
        except Exception as error:
            text = str(error)[:500]
            return {"kind": "runtime", "message": f"{type(error).__name__}: {text}"}

    def _render(self, request: dict[str, Any]) -> str:
        self._now = datetime.fromisoformat(request["now"])
        parts, size = [], 0
        for part in self._compiled(request["source"]).generate(**request["variables"]):
            size += len(part) if part.isascii() else len(part.encode("utf-8", "surrogatepass"))
            if size > self._max_output:
                raise TooMuchOutput
            parts.append(part)
        return "".join(parts)

    def _compiled(self, source: str) -> jinja2.Template:
        template = self._templates.pop(source, None) or self._env.from_string(source)
        self._templates[source] = template  # the one used last is the last
        if len(self._templates) > MAX_TEMPLATES:
            del self._templates[next(iter(self._templates))]
        return template


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained to see it: jinja's own filter escapes < > & for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: object) -> None:
    raise Raised(str(message))


def _limit_memory(nbytes: int) -> None:
    try:
        import resource  # not on every system
    except ImportError:
        return
    for name, limit in (
        ("RLIMIT_AS", nbytes),
        ("RLIMIT_DATA", nbytes),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", 0),
    ):
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        try:
            hard = resource.getrlimit(kind)[1]
            new = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (new, hard))
        except (OSError, ValueError):
            pass  # the system has no such limit: the time limit still holds


def _read_exactly(stream: BinaryIO, size: int) -> bytes | None:
    data = stream.read(size)
    return data if len(data) == size else None


def main(argv: list[str]) -> int:
    max_output, max_memory, max_seconds = int(argv[0]), int(argv[1]), float(argv[2])
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (only frames on the pipe)
    renderer = Renderer(max_output)
    _limit_memory(max_memory)
    stdout.write(struct.pack(">I", 0))
    stdout.flush()
    while (head := _read_exactly(stdin, 4)) is not None:
        data = _read_exactly(stdin, struct.unpack(">I", head)[0])
        if data is None:
            break
        # The parent kills a slow worker; where there is no parent any more, the alarm does.
        signal.setitimer(signal.ITIMER_REAL, 2 * max_seconds + 1)
        answer = json.dumps(renderer.answer(json.loads(data))).encode()
        stdout.write(struct.pack(">I", len(answer)) + answer)
        stdout.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
