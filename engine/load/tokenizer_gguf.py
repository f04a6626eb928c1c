"""The tokenizer inside a GGUF file: gpt2-style byte-level BPE, and llama-style sentencepiece.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; where it is silent,
what llama.cpp does with them (src/llama-vocab.cpp) is the reference.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, overload

from .checkpoint import Checkpoint
from .mapped import CheckpointError
from .pretokenizers import PreTokenizer, find_pre_tokenizer
from .sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, build_bpe_model
from .split_tokenizer import SplitTokenizer
from .vocabulary import (
    Spellings,
    byte_level_bytes,
    byte_token,
    library_errors,
    spm_bytes,
    well_formed,
)

MAX_TOKENS: Final = 1 << 21  # eight times the largest vocabulary known
MAX_TOKEN: Final = 1 << 16  # characters of one token
MODELS: Final = ("gpt2", "llama")

# Control tokens that end an answer though no key of the file says so (llama.cpp has this list too).
END_OF_TURN: Final = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "  # noqa: SIM905
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[".split()
)
_KEY = "tokenizer.ggml."
Core = Callable[[str], list[int]]  # the ids of a text without special tokens

log = logging.getLogger(__name__)


def load_gguf_tokenizer(checkpoint: Checkpoint) -> SplitTokenizer:
    """The tokenizer of a GGUF file. Errors: CheckpointError naming the key at fault."""
    metadata = checkpoint.metadata
    model = _text(metadata, "model")
    if model not in MODELS:
        near = difflib.get_close_matches(str(model), MODELS, n=1)
        raise CheckpointError(
            _KEY + "model",
            f"{_KEY}model: {'missing' if model is None else repr(model[:64])}"
            f"{f', the nearest is {near[0]!r}' if near else ''} (supported: {', '.join(MODELS)})",
        )
    entries, ids = _Entries.read(metadata)
    pre = _pre_tokenizer(metadata) if model == "gpt2" else None
    core = _sentencepiece(entries, ids) if pre is None else _byte_level(entries, ids, pre)
    del ids  # what is made from here on stays; among so many texts it would keep their memory
    control = entries.of_kinds(CONTROL, UNKNOWN)
    user = entries.of_kinds(USER_DEFINED)
    prefix = pre is None and entries.flag("add_space_prefix", True)
    return SplitTokenizer(
        entries.texts,
        core,
        to_bytes=spm_bytes if pre is None else byte_level_bytes,
        control=control,
        user=user,
        byte_values=entries.byte_values,
        bos=entries.special("bos"),
        eos=entries.special("eos"),
        end_ids=_end_ids(entries, control),
        add_bos=entries.flag("add_bos_token", pre is None or pre.add_bos),
        add_eos=entries.flag("add_eos_token", False),
        space_prefix="each" if prefix else "never",
        strip_right=entries.strip_right(control | user),
        field=_KEY + "tokens",
    )


# -------------------------------------------------------------------------------- the two kinds


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = _text(metadata, "pre")
    if not name:
        log.warning(
            "%spre is missing: text is cut into words as 'default' does, which may not be how this "
            "model was trained; convert it again with a current llama.cpp",
            _KEY,
        )
    return find_pre_tokenizer(name or "default")


def _byte_level(entries: _Entries, ids: dict[str, int], pre: PreTokenizer) -> Core:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    merges = _Merges(_array(entries.metadata, "merges", str, required=True))
    # Words that merging never makes stay out, so that no plain text becomes a control token.
    vocab = dict(ids)
    for text in entries.of_kinds(CONTROL, UNKNOWN):
        del vocab[text]
    with library_errors(_KEY + "merges", "building the vocabulary"):
        try:
            bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges)
        except Exception:
            if len(vocab) == len(ids):
                raise
            bpe = models.BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges)
        backend = Tokenizer(bpe)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(s), "isolated") for s in pre.splits),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def core(text: str) -> list[int]:
        encoded: list[int] = backend.encode(text, add_special_tokens=False).ids
        return encoded

    return core


def _sentencepiece(entries: _Entries, ids: dict[str, int]) -> Core:
    if entries.scores is None:
        raise CheckpointError(
            _KEY + "scores", f"{_KEY}scores is missing; a llama vocabulary merges by score"
        )
    from sentencepiece import SentencePieceProcessor

    model = build_bpe_model(
        [t.encode() for t in ids],
        entries.scores,
        # A user-defined token merges like any other where the text does not spell it whole.
        [NORMAL if k == USER_DEFINED else k for k in entries.kinds],
        unknown_id=entries.special("unknown"),
    )
    with library_errors(_KEY + "tokens", "building the vocabulary"):
        processor = SentencePieceProcessor(model_proto=model)
    encode: Core = processor.encode_as_ids
    return encode


# ---------------------------------------------------------------------------------- the metadata


@dataclass(frozen=True)
class _Entries:
    """A GGUF vocabulary, checked: one text, kind and perhaps score per id, no text twice."""

    metadata: Mapping[str, Any]
    texts: Spellings
    kinds: list[int]
    odd: dict[int, str]  # those whose kind is not NORMAL, few, and their texts as `read` has them
    scores: list[float] | None
    byte_values: dict[int, int]

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> tuple[_Entries, dict[str, int]]:
        """The vocabulary, and its ids by text, in order: a text that is empty or not UTF-8 has a
        stand-in there. Errors: CheckpointError."""
        texts = _array(metadata, "tokens", str, required=True)
        if not 0 < len(texts) <= MAX_TOKENS:
            raise _bad("tokens", f"{len(texts)} tokens; a vocabulary has 1..{MAX_TOKENS}")
        longest = max(map(len, texts))
        if longest > MAX_TOKEN:
            raise _bad("tokens", f"a token of {longest} characters; at most {MAX_TOKEN} are read")
        kinds = _array(metadata, "token_type", int) or [NORMAL] * len(texts)
        scores = _array(metadata, "scores", float)
        for name, values in (("token_type", kinds), ("scores", scores)):
            if values is not None and len(values) != len(texts):
                raise _bad(name, f"{len(values)} entries for {len(texts)} tokens; one each")
        if (low := min(kinds)) < 0 or (high := max(kinds)) > BYTE:
            raise _bad("token_type", f"{low if low < 0 else high} is no token type (0..{BYTE})")
        unique = _stand_ins(texts)
        ids = dict(zip(unique, range(len(unique)), strict=True))
        if len(ids) != len(unique):
            twice = next(t for i, t in enumerate(unique) if ids[t] != i)
            first = unique.index(twice)
            raise _bad("tokens", f"token {twice[:40]!r} appears twice (ids {first}, {ids[twice]})")
        odd = {i: unique[i] for i, kind in enumerate(kinds) if kind != NORMAL}
        byte_values: dict[int, int] = {}
        for i in odd:
            if kinds[i] == BYTE:
                value = byte_token(texts[i])
                if value is None:
                    raise _bad(
                        "tokens",
                        f"token {i} stands for a byte but is written {texts[i][:20]!r}, not <0xHH>",
                    )
                byte_values[i] = value
        return cls(metadata, Spellings(texts), kinds, odd, scores, byte_values), ids

    def of_kinds(self, *kinds: int) -> dict[str, int]:
        """The tokens of these kinds: spelling to id."""
        return {text: i for i, text in self.odd.items() if self.kinds[i] in kinds}

    def special(self, name: str) -> int | None:
        """The id under `<name>_token_id`, or None. Errors: CheckpointError (out of range)."""
        key = f"{name}_token_id"
        value = self.metadata.get(_KEY + key)
        if value is None:
            return None
        if type(value) is not int:
            raise _bad(key, f"is {type(value).__name__}; it must be an integer")
        if not 0 <= value < len(self.texts):
            raise _bad(key, f"{value} is outside the vocabulary 0..{len(self.texts) - 1}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(_KEY + name, default)
        if type(value) is not bool:
            raise _bad(name, f"is {type(value).__name__}; it must be bool")
        return value

    def strip_right(self, specials: Mapping[str, int]) -> frozenset[int]:
        """Phi-3's special tokens take the white space after them; only the name tells."""
        name = str(self.metadata.get("general.name", "")).lower()
        is_phi3 = "phi-3" in name or "phi3" in name
        if not is_phi3 and (
            self.metadata.get("general.architecture") != "phi3"
            or self.metadata.get(_KEY + "model") != "llama"
        ):
            return frozenset()
        keep = ("<unk>", "<s>", "<|endoftext|>")
        return frozenset(i for t, i in specials.items() if t not in keep)


def _end_ids(entries: _Entries, control: Mapping[str, int]) -> frozenset[int]:
    named = [entries.special(name) for name in ("eos", "eot", "eom")]
    ends = {i for i in named if i is not None}
    known = END_OF_TURN & control.keys()
    # Harmony: <|end|> closes a message of an answer that goes on; <|return|> or <|call|> ends it.
    if (
        "<|end|>" in known
        and known & {"<|call|>", "<|calls|>"}
        and known & {"<|return|>", "<|flush|>"}
    ):
        known -= {"<|end|>"}
        ends.discard(control["<|end|>"])
    if "<|tool_response>" in known:  # Gemma 4's vocabulary also holds an </s> that ends nothing
        known -= {"</s>"}
    return frozenset(ends | {control[t] for t in known})


def _stand_ins(texts: list[str]) -> list[str]:
    """`texts` with a unique spelling for those that no library takes: empty, or not UTF-8."""
    joined = "".join(texts)
    if all(texts) and well_formed(joined) is joined:
        return texts
    return [t if t and well_formed(t) is t else f"[id {i}]" for i, t in enumerate(texts)]


class _Merges(Sequence[tuple[str, str]]):
    """Merges as pairs of tokens, each made as the library asks for it: all at once they would take
    more memory than all else that is read of a vocabulary."""

    def __init__(self, merges: list[str]) -> None:
        for i, merge in enumerate(merges):
            if merge.count(" ") != 1:
                raise _bad(
                    "merges", f"merge {i} is {merge[:40]!r}; it must be two tokens and a space"
                )
        self._merges = merges

    def __len__(self) -> int:
        return len(self._merges)

    @overload
    def __getitem__(self, index: int) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, str]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, str] | list[tuple[str, str]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first, _, second = self._merges[index].partition(" ")
        return first, second

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return (tuple(merge.split(" ")) for merge in self._merges)  # type: ignore[misc]


def _text(metadata: Mapping[str, Any], name: str) -> str | None:
    value = metadata.get(_KEY + name)
    if value is not None and not isinstance(value, str):
        raise _bad(name, f"is {type(value).__name__}; it must be a string")
    return value


def _array(metadata: Mapping[str, Any], name: str, of: type, *, required: bool = False) -> Any:
    """An array whose elements are all of one type; None where it is absent and not required."""
    value = metadata.get(_KEY + name)
    if value is None:
        if required:
            raise _bad(name, "the key is missing; the file holds no complete tokenizer")
        return None
    if not isinstance(value, list):
        raise _bad(name, f"is {type(value).__name__}; it must be an array of {of.__name__}")
    kinds = set(map(type, value))
    if kinds - {of}:
        odd = min(k.__name__ for k in kinds - {of})
        raise _bad(name, f"holds {odd}; it must be an array of {of.__name__}")
    return value


def _bad(name: str, message: str) -> CheckpointError:
    return CheckpointError(_KEY + name, f"{_KEY}{name}: {message}")


__all__ = ["load_gguf_tokenizer"]
