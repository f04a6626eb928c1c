"""What crosses between a ProcessClient and its engine child: typed messages, and their framing.

A frame is 4 bytes, little endian, of payload length and then one MessagePack message. Every message
is a closed, tagged type: an unknown field, tag or type is a WireError, and nothing that arrives can
name code to run. Outputs cross as the difference to the one sent before (differences.py).
"""

from __future__ import annotations

import dataclasses
import functools
import struct
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from .config import EngineConfig, ModelConfig
from .core.answers import Growth, Logprob, Timings, Usage
from .core.cost import Cost
from .core.sampling_params import SamplingParams

MAX_FRAME = 64 << 20  # bytes of payload: a million token ids fit ten times over
_LENGTH = struct.Struct("<I")


class WireError(ValueError):
    """Bytes that are no message of ours, or a message that no frame can hold."""


class _Message(msgspec.Struct, tag=True, array_like=True, forbid_unknown_fields=True):
    """One message: an array of its tag and its fields."""


# ------------------------------------------------------------------------------ sampling parameters

# Derived from SamplingParams, so that a new parameter needs no second edit; what equals the default
# is not sent. A callable cannot cross: logits_processor stays in the library face.
_LOCAL_ONLY = "logits_processor"
_PARAMS = [f for f in dataclasses.fields(SamplingParams) if f.init and f.name != _LOCAL_ONLY]
_HINTS = typing.get_type_hints(SamplingParams)
_DEFAULT = SamplingParams()
Params = msgspec.defstruct(
    "Params",
    [(f.name, typing.Union[_HINTS[f.name], UnsetType], UNSET) for f in _PARAMS],  # noqa: UP007
    frozen=True,
    forbid_unknown_fields=True,
)


def pack_params(params: SamplingParams) -> msgspec.Struct:
    """SamplingParams as a wire struct. Errors: WireError where a callable would have to cross."""
    if getattr(params, _LOCAL_ONLY) is not None:
        raise WireError(f"{_LOCAL_ONLY} is a Python callable and cannot cross to another process")
    changed = {}
    for f in _PARAMS:
        value = getattr(params, f.name)
        if value != getattr(_DEFAULT, f.name):
            changed[f.name] = dict(value) if isinstance(value, Mapping) else value
    return Params(**changed)


def unpack_params(params: msgspec.Struct) -> SamplingParams:
    """SamplingParams, validated anew. Errors: ParameterError."""
    data = msgspec.msgpack.encode(params)
    return _known(data) if len(data) <= _SHORT else _validated(params)


_SHORT = 1024  # bytes of parameters that are kept


@functools.lru_cache(maxsize=64)
def _known(data: bytes) -> SamplingParams:
    """Many requests have the same, and validating takes as long as everything else of a request."""
    return _validated(msgspec.msgpack.decode(data, type=Params))


def _validated(params: msgspec.Struct) -> SamplingParams:
    values = {f.name: getattr(params, f.name) for f in _PARAMS}
    return SamplingParams(**{k: v for k, v in values.items() if v is not UNSET})


# ----------------------------------------------------------------------------------------- messages

Option = bool | int | float | str | None


class Configure(_Message):
    """The first frame: which model, with which EngineConfig options; the parent's log level."""

    model: str
    options: dict[str, Option]
    log_level: int


class Submit(_Message):
    """A request. The answer is Outputs with this id, or one Refused."""

    request_id: str
    prompt: str | tuple[int, ...]
    params: Params  # type: ignore[valid-type]
    priority: int
    cache_salt: bytes
    final_only: bool = False
    embed: bool = False
    tenant: str = ""
    weight: float = 1.0
    growths: bool = False


class Abort(_Message):
    """End a request, at whatever stage it is; an id that is not known is nothing to do."""

    request_id: str


class RenderChat(_Message):
    """Messages to prompt token ids, by the model's chat template; answered by Rendered."""

    ticket: int
    messages: list[dict[str, Any]]
    options: dict[str, Any]


class Tokenize(_Message):
    """Text to token ids; answered by Rendered."""

    ticket: int
    text: str
    add_special_tokens: bool


class Detokenize(_Message):
    """Token ids to text; answered by Text."""

    ticket: int
    token_ids: tuple[int, ...]
    skip_special_tokens: bool = True


class Stats(_Message):
    """Answered by StatsReply."""

    ticket: int


class Facts(_Message):
    """What answers depend on, of receipts.facts; answered by FactsReply."""

    ticket: int


class Ping(_Message):
    """Answered by Pong from the child's IO threads, also while a step runs."""

    ticket: int


class Shutdown(_Message):
    """End: abort what runs, or with `drain` let it finish; then the child exits."""

    drain: bool


class Progress(_Message):
    """What loading is doing, in words."""

    text: str


class Ready(_Message):
    """The engine is loaded, under this configuration as resolved."""

    config: EngineConfig
    model: ModelConfig
    has_chat_template: bool
    pid: int
    thread: int
    chat_template: str | None = None


class Choice(_Message):
    """One completion's growth. `reset`: text, token_ids and logprobs replace what was sent."""

    position: int  # in RequestOutput.outputs
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] | None
    cumulative_logprob: float | None
    finish_reason: str | None
    stop_reason: str | int | None
    seed: int
    error: str | None
    reset: bool = False
    complete: bool | None = None
    delta: str | None = None  # RequestOutput.deltas[position] where it is not `text`


class Prompt(_Message):
    """The prompt as the engine understood it: sent once."""

    text: str | None
    token_ids: tuple[int, ...]


class Output(_Message):
    """A RequestOutput as the difference to the one sent before. `more`: the rest follows."""

    request_id: str
    num_choices: int
    choices: tuple[Choice, ...]  # those that changed
    finished: bool
    usage: Usage
    timings: Timings
    prompt: Prompt | None = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None  # new positions
    more: bool = False
    cost: Cost | None = None
    embedding: tuple[float, ...] | None = None


class Growths(_Message):
    """What one step brought requests that take growths."""

    growths: list[Growth]


class Refused(_Message):
    """A request or call that failed alone: the exception's class, field or code, and text.

    `fault` is "caller" where another request would have been accepted, else "engine".
    """

    request_id: str
    fault: typing.Literal["caller", "engine"]
    kind: str
    field: str
    text: str
    ticket: int = 0  # of the call, where it was one and not a request


class Rendered(_Message):
    """A chat's prompt token ids, or a text's."""

    ticket: int
    token_ids: tuple[int, ...]


class Text(_Message):
    """The text of token ids."""

    ticket: int
    text: str


class StatsReply(_Message):
    """EngineStats, as plain data."""

    ticket: int
    stats: dict[str, Any]


class FactsReply(_Message):
    """receipts.facts.all_facts()."""

    ticket: int
    facts: dict[str, Any]


class Pong(_Message):
    """The child's IO threads live; the running step has taken `stalled_s` seconds so far."""

    ticket: int
    stalled_s: float


class Log(_Message):
    """A log record of the child, for the parent's logger of the same name."""

    level: int
    logger: str
    text: str


class Fatal(_Message):
    """The engine is over: the exception's class, field or code, and text."""

    kind: str
    field: str
    text: str


ToChild = (
    Configure
    | Submit
    | Abort
    | RenderChat
    | Tokenize
    | Detokenize
    | Stats
    | Facts
    | Ping
    | Shutdown
)
ToParent = (
    Progress
    | Ready
    | Output
    | Growths
    | Refused
    | Rendered
    | Text
    | StatsReply
    | FactsReply
    | Pong
    | Log
    | Fatal
)

# ------------------------------------------------------------------------------------------ framing

_encoder = msgspec.msgpack.Encoder()
_to_child: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)
_to_parent: msgspec.msgpack.Decoder[ToParent] = msgspec.msgpack.Decoder(ToParent)


def encode(message: ToChild | ToParent) -> bytes:
    """One frame. Errors: WireError for a value with no wire form, or beyond MAX_FRAME."""
    try:
        payload = _encoder.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise WireError(f"{type(message).__name__} cannot be sent: {exc}") from exc
    if len(payload) > MAX_FRAME:
        raise WireError(
            f"{type(message).__name__} of {len(payload)} bytes exceeds a frame's {MAX_FRAME}"
        )
    return _LENGTH.pack(len(payload)) + payload


def encode_to_child(message: ToChild) -> bytes:
    """encode() for what callers gave: read back, since what the child cannot read ends its process.

    Errors: WireError.
    """
    frame = encode(message)
    try:
        _to_child.decode(memoryview(frame)[_LENGTH.size :])
    except (ValueError, RecursionError) as exc:
        raise WireError(f"{type(message).__name__} cannot be sent: {exc}") from exc
    return frame


def decode_to_child(payload: bytes) -> ToChild:
    """A message that only a parent sends. Errors: WireError."""
    try:
        return _to_child.decode(payload)
    except (ValueError, RecursionError) as exc:  # msgspec's errors are ValueErrors
        raise _no_message(payload, exc) from exc


def decode_to_parent(payload: bytes) -> ToParent:
    """A message that only a child sends. Errors: WireError."""
    try:
        return _to_parent.decode(payload)
    except (ValueError, RecursionError) as exc:
        raise _no_message(payload, exc) from exc


def _no_message(payload: bytes, exc: Exception) -> WireError:
    return WireError(f"{len(payload)} bytes are no message of ours: {exc}")


class Frames:
    """Bytes as they arrive -> whole payloads. No I/O; memory is bounded by MAX_FRAME."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """The payloads that `data` completes. Errors: WireError for a length above MAX_FRAME."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if length > MAX_FRAME:
                    raise WireError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME}")
                end = start + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                yield bytes(memoryview(self._buffer)[start + _LENGTH.size : end])
                start = end
        finally:
            del self._buffer[:start]
