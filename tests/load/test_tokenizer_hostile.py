"""Vocabularies and tokenizer files made to crash, hang or mislead: each a clear CheckpointError."""

# ruff: noqa: E501 (tables of cases, one line each)

import json
import time
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine.load.checkpoint import open_checkpoint
from engineroom.engine.load.mapped import CheckpointError
from engineroom.engine.load.tokenizer import load_tokenizer
from engineroom.engine.load.tokenizer_files import MAX_TOKENIZER, nested_repetition
from tests.load.vocabularies import StubCheckpoint, gguf_stub
from tests.load.writers import Typed, write_gguf

NAN = float("nan")
BYTES = [f"<0x{b:02X}>" for b in range(256)]

GGUF_CASES: list[tuple[str, str, dict[str, Any], str]] = [
    ("no model", "gpt2", {"model": None}, "tokenizer.ggml.model: missing .supported: gpt2, llama"),
    ("unknown model", "gpt2", {"model": "lama"}, "'lama', the nearest is 'llama'"),
    ("model no string", "gpt2", {"model": 7}, "tokenizer.ggml.model: is int"),
    ("unknown pre", "gpt2", {"pre": "qwen-2"}, "'qwen-2' is not known; the nearest is 'qwen2'.*llama-bpe"),
    ("no tokens", "gpt2", {"tokens": None}, "tokens: the key is missing"),
    ("empty tokens", "gpt2", {"tokens": []}, "tokens: 0 tokens"),
    ("tokens of int", "gpt2", {"tokens": [1, 2, 3]}, "tokens: holds int; it must be an array of str"),
    ("tokens a string", "gpt2", {"tokens": "abc"}, "tokens: is str; it must be an array"),
    ("a huge token", "gpt2", {"tokens": ["a", "b" * 70000], "token_type": [1, 1]}, "70000 characters"),
    ("a token twice", "gpt2", {"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "'a' appears twice .ids 0, 2"),
    ("types too few", "gpt2", {"token_type": [1]}, "token_type: 1 entries for 264 tokens"),
    ("types of float", "llama", {"token_type": [1.0] * 270}, "token_type: holds float"),
    ("type unknown", "llama", {"token_type": [1] * 269 + [7]}, "token_type: 7 is no token type"),
    ("type negative", "llama", {"token_type": [1] * 269 + [-1]}, "token_type: -1 is no token type"),
    ("no merges", "gpt2", {"merges": None}, "merges: the key is missing"),
    ("merge of one", "gpt2", {"merges": ["he"]}, "merge 0 is 'he'"),
    ("merge of three", "gpt2", {"merges": ["h e", "h e l"]}, "merge 1 is 'h e l'"),
    ("merge of an absent token", "gpt2", {"merges": ["zz yy"]}, "tokenizer.ggml.merges.*zz"),
    ("merge into an absent token", "gpt2", {"merges": ["h o"]}, "tokenizer.ggml.merges.*ho"),
    ("bos out of range", "gpt2", {"bos_token_id": 2**32 - 1}, "bos_token_id: 4294967295 is outside"),
    ("eos negative", "gpt2", {"eos_token_id": -1}, "eos_token_id: -1 is outside the vocabulary 0..263"),
    ("eos a string", "gpt2", {"eos_token_id": "</s>"}, "eos_token_id: is str"),
    ("eos a bool", "gpt2", {"eos_token_id": True}, "eos_token_id: is bool"),
    ("flag no bool", "gpt2", {"add_bos_token": 1}, "add_bos_token: is int; it must be bool"),
    ("bos wanted, none there", "gpt2", {"add_bos_token": True, "bos_token_id": None}, "BOS.*is missing"),
    ("eos wanted, none there", "gpt2", {"add_eos_token": True, "eos_token_id": None}, "EOS.*is missing"),
    ("no scores", "llama", {"scores": None}, "scores is missing"),
    ("scores of int", "llama", {"scores": [0] * 270}, "scores: holds int; it must be an array of float"),
    ("scores too few", "llama", {"scores": [0.0]}, "scores: 1 entries for 270 tokens"),
    ("a score NaN", "llama", {"scores": [NAN] * 270}, "scores: holds NaN or infinity"),
    ("<0x-1>", "llama", {"tokens": ["<0x-1>", "a"], "token_type": [6, 1], "scores": [0.0, 0.0]}, "written '<0x-1>', not <0xHH>"),
    ("<0x100>", "llama", {"tokens": ["<0x100>", "a"], "token_type": [6, 1], "scores": [0.0, 0.0]}, "written '<0x100>'"),
    ("bytes incomplete", "llama", {"tokens": BYTES[:5], "token_type": [6] * 5, "scores": [0.0] * 5}, "5 tokens stand for bytes; it must be 256 or 0"),
    ("nothing for unknown text", "llama", {"tokens": ["a", "b", "c"], "token_type": [1] * 3, "scores": [0.0] * 3, "unknown_token_id": None}, "unknown_token_id is missing"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "message"), [pytest.param(*c[1:], id=c[0]) for c in GGUF_CASES]
)
def test_bad_gguf_vocabularies_are_refused(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(gguf_stub(kind, **changes))
    assert caught.value.field.startswith("tokenizer.ggml.")
    assert time.perf_counter() - start < 5


def test_the_sound_vocabularies_that_these_are_made_from_load() -> None:
    for kind in ("gpt2", "llama"):
        assert load_tokenizer(gguf_stub(kind)).encode("hello")


def test_tokens_that_are_empty_or_no_utf_8_are_kept_apart(tmp_path: Path) -> None:
    """A file may hold any bytes; they come back as they are, and encoding still works."""
    stub = gguf_stub("llama")
    tokens = [*stub.metadata["tokenizer.ggml.tokens"], "", "\udcff\udcfe", "\udc80"]
    more = {"tokens": tokens, "scores": [0.0] * 273}
    tokenizer = load_tokenizer(
        gguf_stub("llama", **more, token_type=[2, 3, 3, 4] + [6] * 256 + [1] * 13)
    )
    assert [tokenizer.token_bytes(i) for i in (270, 271, 272)] == [b"", b"\xff\xfe", b"\x80"]
    assert tokenizer.decode([271, 272]) == "\ufffd\ufffd\ufffd"
    assert tokenizer.decode(tokenizer.encode("hello é")) == "hello é"


def test_control_tokens_never_come_from_plain_text_by_ignore_merges() -> None:
    """A word that is spelled like a control token: the whole-word rule must not make it one."""
    tokens = ["<", ">", "x", "<<<", "y"]
    keys = {"tokens": tokens, "token_type": [1, 1, 1, 3, 1], "merges": [], "pre": "llama-bpe"}
    tokenizer = load_tokenizer(
        gguf_stub("gpt2", **keys, add_bos_token=False, bos_token_id=None, eos_token_id=3)
    )
    assert tokenizer.encode("<<<", parse_special=False) == [0, 0, 0]
    assert tokenizer.encode("<<<") == [3]


def test_the_files_reader_and_the_tokenizer_agree_on_a_bad_byte_token(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    stub = gguf_stub("llama")
    tokens = list(stub.metadata["tokenizer.ggml.tokens"])
    tokens[10] = "<0x-1>"
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": Typed("string", tokens),
        "tokenizer.ggml.scores": Typed("float32", stub.metadata["tokenizer.ggml.scores"]),
        "tokenizer.ggml.token_type": Typed("int32", stub.metadata["tokenizer.ggml.token_type"]),
    }
    write_gguf(path, metadata, {})
    with pytest.raises(CheckpointError, match="<0x-1>"):
        load_tokenizer(open_checkpoint(path))


# --------------------------------------------------------------------------------- tokenizer.json


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
        },
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, ".": 3}, "merges": ["a b"]},
    }  # fmt: skip
    return state | changes


def model(**changes: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]} | changes


def replace(pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


DEEP = "[" * 100_000
JSON_CASES: list[tuple[str, Any, str]] = [
    ("no JSON", b"\x00\xff", "reading the tokenizer failed"),
    ("empty", b"", "reading the tokenizer failed"),
    ("a list", b"[]", "reading the tokenizer failed"),
    ("deeply nested", DEEP.encode(), "reading the tokenizer failed"),
    ("deeply nested inside", json.dumps(tokenizer_json())[:-1].encode() + b', "x":' + DEEP.encode(), "failed"),
    ("merge of an absent token", tokenizer_json(model=model(merges=["a z"])), "failed"),
    ("id beyond the cap", tokenizer_json(model=model(vocab={"a": 4294967295}, merges=[])), "highest token id is 4294967295"),
    ("id negative", tokenizer_json(model=model(vocab={"a": -1}, merges=[])), "failed"),
    ("no vocabulary", tokenizer_json(model=model(vocab={}, merges=[])), "highest token id is -1"),
    ("dropout", tokenizer_json(model=model(dropout=0.5)), "random"),
    ("decoder unknown", tokenizer_json(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "WordPiece.*not supported"),
    ("evil Replace", tokenizer_json(normalizer=replace("(a+)+$")), r"normalizer: the pattern '\(a\+\)\+\$'"),
    ("evil Replace, nested", tokenizer_json(normalizer={"type": "Sequence", "normalizers": [replace("(?:(x|a*)b?)*$")]}), "normalizer: the pattern"),
    ("evil Split", tokenizer_json(pre_tokenizer=split(r"(\w+\s?)*$")), "pre_tokenizer: the pattern"),
    ("pattern does not compile", tokenizer_json(normalizer=replace("(")), "failed"),
    ("pattern too long", tokenizer_json(normalizer=replace("a" * 20000)), "20000 characters"),
]  # fmt: skip


def folder(tmp_path: Path, content: Any, config: Any = None) -> StubCheckpoint:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / "tokenizer.json").write_bytes(raw)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return StubCheckpoint(kind="safetensors", path=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [pytest.param(*c[1:], id=c[0]) for c in JSON_CASES]
)
def test_bad_tokenizer_json_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(folder(tmp_path, content))
    assert "tokenizer.json" in str(caught.value)
    assert time.perf_counter() - start < 5


def test_the_sound_tokenizer_json_that_these_are_made_from_loads(tmp_path: Path) -> None:
    assert load_tokenizer(folder(tmp_path, tokenizer_json())).encode("ab") == [2]


def test_a_pattern_that_exhausts_the_library_is_an_error_not_the_end(tmp_path: Path) -> None:
    """No nested repetition, but alternatives that overlap: the library panics, we do not."""
    checkpoint = folder(tmp_path, tokenizer_json(normalizer=replace(r"^(a|a|aa)+$")))
    tokenizer = load_tokenizer(checkpoint)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="encoding a text failed.*retry"):
        tokenizer.encode("a" * 60 + "b")
    assert time.perf_counter() - start < 10
    assert tokenizer.encode("ab", add_special_tokens=False) == [2]


def test_a_tokenizer_json_beyond_the_cap_is_not_read(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path, b"")
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(MAX_TOKENIZER + 1)  # sparse
    with pytest.raises(CheckpointError, match=f"at most {MAX_TOKENIZER}"):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": 7}, "bos_token is int"),
        ({"bos_token": "<none>"}, "'<none>' is not in the vocabulary"),
        ({"bos_token": "a", "add_bos_token": "yes"}, "add_bos_token is 'yes'"),
    ],
)
def test_bad_tokenizer_configs_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder(tmp_path, tokenizer_json(), config))


@pytest.mark.parametrize("eos", [-1, "2", [None], True, {"a": 1}])
def test_bad_eos_ids_are_refused(tmp_path: Path, eos: Any) -> None:
    checkpoint = folder(tmp_path, tokenizer_json())
    checkpoint.generation_config = {"eos_token_id": eos}
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id"):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize("raw", [b"", b"\x0a\xff\xff\xff\xff\x7f", b"\xff" * 40, b"\x0b\x01", b"x"])
def test_bad_tokenizer_models_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        load_tokenizer(StubCheckpoint(kind="safetensors", path=tmp_path))


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(StubCheckpoint(kind="safetensors", path=tmp_path))


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a*)*", "(?:a+b?)+", "((a{2,})b)*", "(a+){3,}", "([a)]+)+", r"(\(a+)+", "(?=(a+)+b)", "((x)|(a+))*?"],
)  # fmt: skip
def test_nested_repetition_is_seen(pattern: str) -> None:
    assert nested_repetition(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "a+b+", "(a+)(b+)", "(a+)?", "(ab)+", r"(\d{3})+(?!\d)", r"\s+(?!\S)|\s+", "[(a+)+]", r"\(a+\)+",
        r"(?=(\d{3})+(?!\d))", "(a+){2}", "(a{1,3})+", "(a+)|b+", r"[^\r\n\p{L}]?\p{L}+|\p{N}{1,3}",
    ],
)  # fmt: skip
def test_other_repetition_is_fine(pattern: str) -> None:
    assert not nested_repetition(pattern)


def test_the_patterns_of_our_own_table_are_fine() -> None:
    from engineroom.engine.load.pretokenizers import PRE_TOKENIZERS

    for entry in PRE_TOKENIZERS.values():
        assert not any(map(nested_repetition, entry.splits))
