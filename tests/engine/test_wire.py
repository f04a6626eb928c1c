"""The wire: every message survives, hostile bytes do not, outputs grow back to themselves."""

from __future__ import annotations

import dataclasses
import struct
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineroom.engine import differences, wire
from engineroom.engine.config import EngineConfig
from engineroom.engine.core.answers import CompletionOutput, Logprob, RequestOutput, Timings, Usage
from engineroom.engine.core.cost import Cost
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.core.structured import StructuredOutput
from tests.counts import count
from tests.engine.fake import MODEL

TO_CHILD = typing.get_args(wire.ToChild)
TO_PARENT = typing.get_args(wire.ToParent)
EXAMPLES = count(reduced=15, full=500)
INTS = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(max_size=12)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a message's field type, so that a new message or field is covered unasked."""
    given_for = {
        int: INTS,
        float: st.floats(allow_nan=False),
        str: TEXT,
        bool: st.booleans(),
        bytes: st.binary(max_size=12),
        type(None): st.none(),
        Any: st.one_of(st.none(), INTS, TEXT, st.lists(INTS, max_size=2)),
        EngineConfig: st.builds(EngineConfig, model=st.just("m"), threads=st.integers(1, 9)),
        type(MODEL): st.just(MODEL),
        wire.Params: params().map(wire.pack_params),
    }
    if kind in given_for:
        return given_for[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin is list:
        return st.lists(values(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    named_tuple = isinstance(kind, type) and issubclass(kind, tuple)
    if dataclasses.is_dataclass(kind) or named_tuple:
        return st.builds(kind, **{k: values(t) for k, t in typing.get_type_hints(kind).items()})
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: values(hints[name]) for name in kind.__struct_fields__})
    return st.one_of([values(arg) for arg in args])


def params() -> st.SearchStrategy[SamplingParams]:
    return st.builds(
        SamplingParams,
        n=st.integers(1, 4),
        temperature=st.floats(0.01, 2.0),
        top_p=st.floats(0.0, 1.0),
        top_k=st.integers(-1, 50),
        logit_bias=st.none() | st.dictionaries(st.integers(0, 99), st.floats(-5, 5), max_size=3),
        seed=st.none() | st.integers(0, 2**64 - 1),
        stop=st.lists(st.text(min_size=1, max_size=4), max_size=2),
        stop_token_ids=st.lists(st.integers(0, 99), max_size=3),
        max_tokens=st.none() | st.integers(1, 9),
        logprobs=st.none() | st.integers(0, 20),
        ignore_eos=st.booleans(),
        structured=st.none()
        | st.sampled_from(
            [
                StructuredOutput(json_schema='{"type": "integer"}'),
                StructuredOutput(json_object=True),
                StructuredOutput(choice=("yes", "no")),
            ]
        ),
    )


def payload(message: Any) -> bytes:
    (whole,) = wire.Frames().feed(wire.encode(message))
    return whole


@pytest.mark.parametrize("kind", [*TO_CHILD, *TO_PARENT], ids=lambda k: k.__name__)
@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_every_message_survives(kind: Any, data: st.DataObject) -> None:
    message = data.draw(values(kind))
    mine, other = wire.decode_to_child, wire.decode_to_parent
    if kind in TO_PARENT:
        mine, other = other, mine
    assert mine(payload(message)) == message
    with pytest.raises(wire.WireError):  # what one side says, the other side never does
        other(payload(message))


@settings(max_examples=count(reduced=50, full=2000), deadline=None)
@given(params())
def test_sampling_params_survive(wanted: SamplingParams) -> None:
    message = wire.Submit("r", "hi", wire.pack_params(wanted), 0, b"")
    arrived = wire.decode_to_child(payload(message))
    assert isinstance(arrived, wire.Submit)
    assert wire.unpack_params(arrived.params) == wanted


def test_every_sampling_parameter_crosses() -> None:
    fields = {f.name for f in dataclasses.fields(SamplingParams)} - {"logits_processor"}
    assert set(wire.Params.__struct_fields__) == fields
    with pytest.raises(wire.WireError, match="logits_processor"):
        wire.pack_params(SamplingParams(logits_processor=lambda *a: a))


PICKLES = [
    b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    b"cos\nsystem\n(S'true'\ntR.",
    b"\x80\x02c__builtin__\neval\nq\x00.",
]
SUBMIT = wire.Submit("r", (1, 2), wire.pack_params(SamplingParams(seed=1)), 0, b"")


@pytest.mark.parametrize(
    "data",
    [
        *PICKLES,
        b"",
        b"\xc1",
        b"\xff" * 40,
        b"\x91" * 200_000,  # nested deeper than any stack
        b"\x94\xaaRenderChat\x01\x91\x81\xa1a" + b"\x91" * 200_000,
        b"\xdd\xff\xff\xff\xff",  # an array of four thousand million entries
        msgspec.msgpack.encode(["Eval", "1 + 1"]),
        msgspec.msgpack.encode(["Abort"]),
        msgspec.msgpack.encode(["Abort", 7]),
        msgspec.msgpack.encode(["Abort", "r", "one too many"]),
        msgspec.msgpack.encode(["Submit", "r", "hi", {"temprature": 1.0}, 0, b""]),
        msgspec.msgpack.encode(["Submit", "r", "hi", {"temperature": "hot"}, 0, b""]),
        msgspec.msgpack.encode(["Submit", "r", "hi", {"logits_processor": "os.system"}, 0, b""]),
        msgspec.msgpack.encode({"type": "Abort", "request_id": "r"}),
        payload(SUBMIT)[:-1],
        payload(SUBMIT) + b"\x00",
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode_to_child(data)
    with pytest.raises(wire.WireError):
        wire.decode_to_parent(data)


@settings(max_examples=count(reduced=300, full=20_000), deadline=None)
@given(st.data())
def test_flipped_bytes_never_escape(data: st.DataObject) -> None:
    broken = bytearray(payload(SUBMIT))
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = wire.decode_to_child(bytes(broken))
    except wire.WireError:
        return
    assert isinstance(message, TO_CHILD)


def test_a_frame_beyond_the_cap_is_refused_before_it_arrives() -> None:
    frames = wire.Frames()
    with pytest.raises(wire.WireError, match="67108865"):
        list(frames.feed(struct.pack("<I", wire.MAX_FRAME + 1)))


def test_a_message_beyond_the_cap_is_not_sent() -> None:
    with pytest.raises(wire.WireError, match="exceeds"):
        wire.encode(wire.Log(30, "x", "a" * (wire.MAX_FRAME + 1)))


@pytest.mark.parametrize("value", [object(), 2**70, "\ud800"])
def test_a_value_without_a_wire_form_is_refused(value: Any) -> None:
    with pytest.raises(wire.WireError, match="RenderChat"):
        wire.encode(wire.RenderChat(1, [{"content": value}], {}))


@settings(max_examples=count(reduced=60, full=3000), deadline=None)
@given(st.lists(st.text(max_size=300), max_size=5), st.lists(st.integers(1, 90), max_size=20))
def test_frames_come_whole_however_they_are_cut(texts: list[str], cuts: list[int]) -> None:
    sent = [wire.Log(30, "x", text) for text in texts]
    stream = b"".join(wire.encode(m) for m in sent)
    frames, arrived = wire.Frames(), []
    for size in [*cuts, len(stream)]:
        part, stream = stream[:size], stream[size:]
        arrived += [wire.decode_to_parent(p) for p in frames.feed(part)]
    assert arrived == sent


# ------------------------------------------------------------------------------------------ outputs

LOGPROBS = st.dictionaries(
    st.integers(0, 99), st.builds(Logprob, st.floats(-9, 0), st.integers(1, 9), TEXT), max_size=2
)

COSTS = st.builds(
    Cost, st.floats(0, 9), st.none() | st.floats(0, 9), st.none() | st.floats(0, 9), st.booleans()
)


@st.composite
def histories(draw: st.DrawFn) -> list[RequestOutput]:
    """A request's outputs, growing; sometimes, as with best_of, replaced by others at the end."""
    logprobs, rows = draw(st.booleans()), draw(st.booleans())
    prompt = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=9)))
    text_prompt = draw(st.sampled_from([None, "p"]))
    known: tuple[Any, ...] = ()
    states = [("", (), ()) for _ in range(draw(st.integers(0, 3)))]
    history = []
    length = draw(st.integers(1, 5))
    for step in range(length):
        last = step == length - 1
        if last and draw(st.booleans()):
            states = [("", (), ()) for _ in range(draw(st.integers(1, 3)))]
        deltas = []
        for i, (text, tokens, probs) in enumerate(states):
            new = draw(st.lists(st.tuples(st.integers(0, 99), TEXT, LOGPROBS), max_size=3))
            deltas.append("".join(t for _, t, _ in new))
            states[i] = (
                text + deltas[-1],
                (*tokens, *(t for t, _, _ in new)),
                (*probs, *(p for _, _, p in new)),
            )
        if rows:
            known = (*known, *draw(st.lists(st.none() | LOGPROBS, max_size=9)))
        history.append(
            RequestOutput(
                request_id="r",
                prompt=text_prompt,
                prompt_token_ids=prompt,
                prompt_logprobs=known if rows else None,
                outputs=tuple(
                    CompletionOutput(
                        index=i,
                        text=text,
                        token_ids=tokens,
                        cumulative_logprob=draw(st.none() | st.floats(-9, 0)),
                        logprobs=probs if logprobs else None,
                        finish_reason="stop" if last else None,
                        stop_reason=draw(st.sampled_from([None, "x", 7])),
                        seed=draw(st.integers(0, 2**64 - 1)),
                        error=draw(st.sampled_from([None, "e"])),
                    )
                    for i, (text, tokens, probs) in enumerate(states)
                ),
                finished=last,
                usage=Usage(len(prompt), step, 0),
                timings=Timings(0.0, 0.1, 0.2, 0.3, None),
                deltas=tuple(deltas),
                cost=draw(st.none() | COSTS),
            )
        )
    return history


@settings(max_examples=count(reduced=200, full=5000), deadline=None)
@given(histories())
def test_outputs_grow_back_to_themselves(history: list[RequestOutput]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differences, "PROMPT_ROWS", 3)
        sent = received = None
        for output in history:
            messages = list(differences.difference(sent, output))
            assert [m.more for m in messages] == [True] * (len(messages) - 1) + [False]
            for message in messages:
                arrived = wire.decode_to_parent(payload(message))
                assert isinstance(arrived, wire.Output)
                received = differences.apply(received, arrived)
            assert received == output
            sent = output


def test_what_did_not_grow_is_sent_whole() -> None:
    def output(text: str, ids: tuple[int, ...]) -> RequestOutput:
        completion = CompletionOutput(0, text, ids, None, None, None, None, 1)
        usage, timings = Usage(9, len(ids), 0), Timings(0.0, 0.0, 0.0, 0.0, None)
        return RequestOutput("r", "p", (1,), None, (completion,), False, usage, timings, ("",))

    sent = output("abc", (1, 2, 3))
    for new in (output("abd", (1, 2, 4)), output("a", (1, 2, 3)), output("abc", (1, 2))):
        (message,) = differences.difference(sent, new)
        assert message.choices[0].reset
        assert differences.apply(sent, message) == new


def test_a_step_costs_its_new_tokens() -> None:
    def output(length: int) -> RequestOutput:
        completion = CompletionOutput(
            0, "ab " * length, tuple(range(length)), None, None, None, None, 1
        )
        usage, timings = Usage(9, length, 0), Timings(0.0, 0.0, 0.0, 0.0, None)
        ids = tuple(range(5000))
        return RequestOutput("r", None, ids, None, (completion,), False, usage, timings, ("ab ",))

    (short,) = differences.difference(output(10), output(11))
    (long,) = differences.difference(output(100_000), output(100_001))
    assert abs(len(wire.encode(long)) - len(wire.encode(short))) < 16
    assert len(wire.encode(long)) < 300


@pytest.mark.parametrize(
    "change",
    [
        {"num_choices": 3},
        {"num_choices": 0},
        {"choices": (wire.Choice(5, 0, "", (), None, None, None, None, 1, None),)},
        {"choices": (wire.Choice(-1, 0, "", (), None, None, None, None, 1, None),)},
        {"prompt": None},
    ],
)
def test_a_difference_to_nothing_known_is_refused(change: dict[str, Any]) -> None:
    choice = wire.Choice(0, 0, "a", (1,), None, None, None, None, 1, None)
    fields: dict[str, Any] = {
        "request_id": "r",
        "num_choices": 1,
        "choices": (choice,),
        "finished": False,
        "usage": Usage(1, 1, 0),
        "timings": Timings(0.0, 0.0, 0.0, 0.0, None),
        "prompt": wire.Prompt("p", (1,)),
    }
    differences.apply(None, wire.Output(**fields))
    with pytest.raises(wire.WireError, match="'r'"):
        differences.apply(None, wire.Output(**{**fields, **change}))
