"""Tokenizers for tests: the real ones, loaded once, and checkpoints made of dicts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine.load.checkpoint import open_checkpoint
from engineroom.engine.load.tokenizer import Tokenizer, load_tokenizer
from tests.data import data_path, model_path

VOCABULARIES = ("deepseek-coder", "gpt-2", "llama-spm", "phi-3")
MODELS = ("smollm2", "gemma3-270m")

# Texts that tell tokenizers apart: spaces, line ends, digits, case, contractions, scripts, marks
# above letters, emoji of several code points, and characters that no vocabulary holds.
TEXTS = (
    "",
    " ",
    "   leading and trailing   ",
    "Hello, world! It's 3:45pm; they'LL've gone.",
    "tabs\tand\r\nline\n\n\nends \n x",
    "1 22 333 4444 55555 1234567890 3.14159 ٣٤ ½",
    "def f(x):\n    return x**2  # comment\n",
    "Ünïcödé e\u0301 naïve ŁÓDŹ",
    "日本語のテキスト 한국어 中文，标点。",
    "नमस्ते สวัสดี کتاب שלום",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \U000e0041 \U0010fffd",
    "camelCaseWORDSmixed HTTPServer iPhone15",
    "http://example.com/?q=a&b=<c>|d~e`f`",
    "\x00\x01\x7f control \u200b zero width \ufeff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)


@dataclass
class StubCheckpoint:
    """The part of a Checkpoint that tokenizers and templates look at."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "gguf"
    path: Path = Path("stub.gguf")
    architecture: str = "llama"
    generation_config: Mapping[str, Any] = field(default_factory=dict)


def path_of(name: str) -> Path:
    """The file of a vocabulary or model by name, or skip."""
    if name in MODELS:
        return model_path(name)
    return data_path(f"vocab/ggml-vocab-{name}.gguf")


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer of a vocabulary or model by name, or skip."""
    return _load(path_of(name))


@cache
def _load(path: Path) -> Tokenizer:
    return load_tokenizer(open_checkpoint(path))


@cache
def metadata_of(path: Path) -> dict[str, Any]:
    """A GGUF file's metadata, all decoded, as a dict to change."""
    return dict(open_checkpoint(path).metadata)


def gguf_stub(kind: str, **changes: Any) -> StubCheckpoint:
    """A small sound vocabulary, "gpt2" or "llama", with keys changed (None: taken away)."""
    keys = dict(_GPT2 if kind == "gpt2" else _LLAMA) | changes
    metadata = {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not None}
    return StubCheckpoint({"general.architecture": "llama", **metadata})


def _alphabet() -> list[str]:
    from engineroom.engine.load.vocabulary import CHAR_OF

    return [CHAR_OF[b] for b in range(256)]


_GPT2: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": [
        "<|bos|>",
        "<|im_end|>",
        "<user>",
        *_alphabet(),
        "he",
        "ll",
        "hell",
        "hello",
        "Ġhello",
    ],
    "token_type": [3, 3, 4] + [1] * 261,
    "merges": ["h e", "l l", "he ll"],
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA: dict[str, Any] = {
    "model": "llama",
    "tokens": [
        "<unk>", "<s>", "</s>", "<user>", *[f"<0x{b:02X}>" for b in range(256)],
        "▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello",
    ],
    "scores": [0.0] * 260 + [-9.0] * 5 + [-1.0, -2.0, -3.0, -4.0, -5.0],
    "token_type": [2, 3, 3, 4] + [6] * 256 + [1] * 10,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="session", params=[*VOCABULARIES, *MODELS])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Every tokenizer of the test data, one after the other."""
    return tokenizer_of(request.param)
