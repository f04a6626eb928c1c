"""Chat messages to the text that a model was trained on, by the jinja template of its checkpoint.

Templates are untrusted programs. They run in jinja's immutable sandbox in a process of their own
(template_worker.py), with limits on time, memory and output; one that exceeds them costs its own
rendering and a new process, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from .checkpoint import Checkpoint
from .mapped import CheckpointError, read_small
from .template_process import MAX_SECONDS, TemplateError, WorkerPool
from .tokenizer import Tokenizer
from .tokenizer_files import CONFIG, read_tokenizer_config, special_text

MAX_SOURCE: Final = 1 << 18  # characters; the longest template known has 14 thousand
MAX_INPUT: Final = 1 << 24  # bytes of JSON: messages, tools and the rest of one rendering
MAX_DEPTH: Final = 64  # nested lists and objects in a message, tool or variable

# Variables that a caller may not set: what the renderer itself passes, what other programs take as
# arguments of their renderers (and would act on), and the functions that templates call.
RESERVED: Final = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "dict",
        "documents",
        "max_length",
        "messages",
        "namespace",
        "padding",
        "raise_exception",
        "range",
        "self",
        "strftime_now",
        "template",
        "tokenize",
        "tokenizer",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
# The same thing under the names that different models' templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_GGUF_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class ChatTemplate:
    """A template, its process, and the special tokens it may write.

    `origin` says where the source comes from, in messages. `now` is what strftime_now tells.
    Thread-safe. Errors: TemplateError for a source beyond MAX_SOURCE.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        origin: str,
        now: Callable[[], datetime] = datetime.now,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template of {origin} has {len(source)} characters; at most {MAX_SOURCE} "
                "are taken",
                kind="limit",
            )
        self.source = source
        self.origin = origin
        self.special_tokens = dict(special_tokens)
        self._now = now
        self._pool = WorkerPool(origin, max_seconds)

    def start(self) -> None:
        """Start the process without waiting for it, so that the first rendering finds it warm."""
        self._pool.start()

    def close(self) -> None:
        """End the process. Twice does nothing; a later render starts a new one."""
        self._pool.close()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation. `variables` are the template's own (enable_thinking, ...).

        Errors: TemplateError: messages of a wrong form, a reserved variable, a template that
        refuses its input (its own words), fails, or exceeds a limit.
        """
        for name in variables:
            self._check_name(name)
        request = {
            "source": self.source,
            "now": self._now().isoformat(),
            "variables": {
                **self.special_tokens,
                **{name: _plain(value, name) for name, value in variables.items()},
                "messages": _messages(messages),
                "tools": _objects(tools, "tools"),
                "documents": _objects(documents, "documents"),
                "add_generation_prompt": bool(add_generation_prompt),
            },
        }
        try:
            data = json.dumps(request).encode()
        except ValueError as error:  # integers of thousands of digits
            raise TemplateError(f"messages cannot be written as JSON: {error}") from None
        if len(data) > MAX_INPUT:
            raise TemplateError(
                f"messages, tools and variables take {len(data)} bytes of JSON; at most "
                f"{MAX_INPUT} are rendered",
                kind="limit",
            )
        return self._pool.render(data)

    def _check_name(self, name: str) -> None:
        if name in RESERVED or name.startswith(("_", "return_")) or name in self.special_tokens:
            raise TemplateError(
                f"the template variable {name!r} is reserved and cannot be set by the caller"
            )


def load_chat_template(
    checkpoint: Checkpoint, tokenizer: Tokenizer, override: str | None = None
) -> ChatTemplate | None:
    """The chat template of a checkpoint; None where it has none and nothing overrides it.

    `override`: the path of a template, or a template itself (anything with a brace or a newline).
    Errors: TemplateError; CheckpointError for a key or file of a wrong form.
    """
    if checkpoint.kind == "gguf":
        special_tokens = _gguf_special_tokens(checkpoint, tokenizer)
        source: Any = checkpoint.metadata.get("tokenizer.chat_template")
        origin = f"{checkpoint.path.name}: tokenizer.chat_template"
    else:
        config = read_tokenizer_config(checkpoint.path)
        special_tokens = _folder_special_tokens(config)
        source, origin = _folder_source(checkpoint.path, config)
    if override is not None:
        source, origin = _override(override)
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(origin, f"{origin} is {type(source).__name__}; it must be a string")
    return ChatTemplate(source, special_tokens=special_tokens, origin=origin)


# ------------------------------------------------------------------------------------- the sources


def _gguf_special_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, key in _GGUF_SPECIAL.items():
        token_id = checkpoint.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(token_id) is int and 0 <= token_id < tokenizer.vocab_size:
            found[f"{name}_token"] = tokenizer.token_text(token_id)
    if "bos_token" not in found and tokenizer.bos_token_id is not None:
        found["bos_token"] = tokenizer.token_text(tokenizer.bos_token_id)
    return found


def _folder_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {f"{name}_token": special_text(config, f"{name}_token") for name in _SPECIAL}
    return {name: text for name, text in found.items() if text is not None}


def _folder_source(folder: Path, config: Mapping[str, Any]) -> tuple[Any, str]:
    path = folder / "chat_template.jinja"
    if path.exists():
        return _read(path), path.name
    source, origin = config.get("chat_template"), f"{CONFIG}: chat_template"
    if not isinstance(source, list):
        return source, origin
    named = {
        t["name"]: t.get("template")
        for t in source
        if isinstance(t, dict) and isinstance(t.get("name"), str)
    }
    if "default" in named:
        return named["default"], origin
    raise CheckpointError(origin, f"{origin}: no template named 'default' among {sorted(named)}")


def _override(value: str) -> tuple[str, str]:
    if "{" in value or "\n" in value:
        return value, "the given chat template"
    path = Path(value)
    if not path.is_file():
        raise TemplateError(
            f"the chat template {value[:200]!r} is neither a file nor a template (a template has "
            "{{ or {% in it)"
        )
    return _read(path), str(path)


def _read(path: Path) -> str:
    try:
        return read_small(path, 4 * MAX_SOURCE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(path.name, f"{path} is not UTF-8 (byte {error.start})") from None


# ------------------------------------------------------------------------------------ the messages


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple):
        raise TemplateError(f"messages is {type(messages).__name__}; it must be a list")
    if not messages:
        raise TemplateError("messages is empty; a conversation has at least one message")
    return [_message(m, f"messages[{i}]") for i, m in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TemplateError(f"{where} is {type(message).__name__}; it must be an object")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise TemplateError(f"{where}.role is {role!r:.50}; it must be a non-empty string")
    calls = message.get("tool_calls")
    if calls is not None:
        _objects(calls, f"{where}.tool_calls")
    if "content" not in message and calls is None:
        raise TemplateError(f"{where} has neither content nor tool_calls")
    _check_content(message.get("content"), f"{where}.content")
    plain: dict[str, Any] = _plain(message, where)
    reasoning = next((plain[k] for k in _REASONING if plain.get(k) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _check_content(content: Any, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        raise TemplateError(
            f"{where} is {type(content).__name__}; it must be a string, null or a list of parts"
        )
    for i, part in enumerate(content):
        if not isinstance(part, Mapping):
            raise TemplateError(f"{where}[{i}] is {type(part).__name__}; it must be an object")
        if not isinstance(part.get("type"), str):
            raise TemplateError(
                f"{where}[{i}].type is {part.get('type')!r:.50}; it must be a string"
            )


def _objects(value: Any, where: str) -> list[dict[str, Any]] | None:
    """A list of objects, as plain JSON; None stays None."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise TemplateError(f"{where} is {type(value).__name__}; it must be a list of objects")
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise TemplateError(f"{where}[{i}] is {type(item).__name__}; it must be an object")
    return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """`value` rebuilt of JSON's types only. Errors: TemplateError naming the part that is none."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth >= MAX_DEPTH:
        raise TemplateError(f"{where} is nested more than {MAX_DEPTH} deep", kind="limit")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TemplateError(f"{where} has the key {key!r:.50}; keys must be strings")
        return {str(k): _plain(v, f"{where}.{k:.50}", depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    for kind in (str, int, float):  # enumerations and the like: their plain value
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    raise TemplateError(
        f"{where} is {type(value).__name__}; only what JSON knows can be passed to a template"
    )


__all__ = ["MAX_DEPTH", "MAX_SOURCE", "ChatTemplate", "TemplateError", "load_chat_template"]
