"""The tokenizer of a Hugging Face folder: tokenizer.json, else tokenizer.model.

tokenizer.json is read by `tokenizers`, tokenizer.model by `sentencepiece`. Both files are
untrusted: sizes are capped, patterns that can take exponential time refused, and whatever fails in
a library's native code becomes a CheckpointError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Final

from .checkpoint import Checkpoint
from .mapped import CheckpointError, read_small
from .sentencepiece_model import add_fields, read_normalizer
from .split_tokenizer import SplitTokenizer
from .strict_json import parse_object
from .vocabulary import (
    SPACE_MARK,
    Vocabulary,
    byte_level_bytes,
    byte_token,
    library_errors,
    spm_bytes,
    well_formed,
)

MAX_TOKENIZER: Final = 1 << 27  # bytes of a tokenizer.json; Gemma's 262,144 tokens take 33 MB
MAX_CONFIG: Final = 1 << 24  # bytes of a tokenizer_config.json; some list thousands of tokens
MAX_TOKENS: Final = 1 << 21
MAX_PATTERN: Final = 1 << 14
JSON, MODEL, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"


def load_folder_tokenizer(checkpoint: Checkpoint) -> JsonTokenizer | SplitTokenizer:
    """A Tokenizer from a folder's files. Errors: CheckpointError naming the file at fault."""
    folder = checkpoint.path
    config = read_tokenizer_config(folder)
    if (folder / JSON).exists():
        return JsonTokenizer(read_small(folder / JSON, MAX_TOKENIZER), config, checkpoint)
    if (folder / MODEL).exists():
        return _sentencepiece(read_small(folder / MODEL, MAX_TOKENIZER), config, checkpoint)
    raise CheckpointError(
        JSON, f"{folder} has neither {JSON} nor {MODEL}; copy the tokenizer's files there too"
    )


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json as a dict, {} where there is none. Errors: CheckpointError."""
    path = folder / CONFIG
    return parse_object(read_small(path, MAX_CONFIG), CONFIG) if path.exists() else {}


def special_text(config: Mapping[str, Any], name: str) -> str | None:
    """The spelling of `bos_token` and its like: a string, or an object with `content`."""
    value = config.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(CONFIG, f"{CONFIG}: {name} is {type(value).__name__}, not a string")
    return value


class JsonTokenizer(Vocabulary):
    """A Tokenizer (see tokenizer.py) from a tokenizer.json; `tokenizers` does the encoding."""

    def __init__(self, raw: bytes, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        from tokenizers import Tokenizer as Backend

        with library_errors(JSON, "reading the tokenizer"):
            backend = Backend.from_buffer(raw)
            # A text is encoded whole: neither cut, nor filled up to a length that the file states.
            backend.no_truncation()
            backend.no_padding()
            ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
            added = backend.get_added_tokens_decoder()
            parts = {
                name: _state(getattr(backend, name))
                for name in ("normalizer", "pre_tokenizer", "decoder")
            }
            dropout = getattr(backend.model, "dropout", None)
        _check_patterns(parts)
        if dropout:
            raise CheckpointError(
                JSON, f"{JSON}: a dropout of {dropout} would make the ids of a text random"
            )
        texts = _by_id({**ids, **{t.content: i for i, t in added.items()}}, JSON)
        byte_level, byte_fallback, strips_space = _style(parts)
        bos = _special_id(config, "bos_token", ids, checkpoint, texts)
        eos = _special_id(config, "eos_token", ids, checkpoint, texts)
        self.bos_token_id = bos
        self.eos_token_ids = _end_ids(checkpoint, eos, len(texts))
        super().__init__(
            texts,
            to_bytes=byte_level_bytes if byte_level else spm_bytes,
            literal=frozenset(added),
            byte_values=_byte_values(texts, added) if byte_fallback else {},
            special_ids=frozenset(i for i, t in added.items() if t.special) | self.eos_token_ids,
            strip_leading_space=strips_space,
        )
        self._backend = backend
        self._parses_special = True
        self._lock = Lock()
        before, after = self._template()
        self._before = _with_flag(config, "add_bos_token", before, bos, first=True)
        self._after = _with_flag(config, "add_eos_token", after, eos, first=False)
        self.add_bos = bos is not None and self._before[:1] == [bos]

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`; see tokenizer.Tokenizer. Errors: CheckpointError (a broken file)."""
        ids = self._ids_of(well_formed(text), parse_special, template=False)
        return self._before + ids + self._after if add_special_tokens else ids

    def _ids_of(self, text: str, parse_special: bool, *, template: bool) -> list[int]:
        # The library keeps this switch as the tokenizer's state, so one text at a time.
        with self._lock, library_errors(JSON, "encoding a text"):
            if parse_special != self._parses_special:
                self._backend.encode_special_tokens = not parse_special
                self._parses_special = parse_special
            ids: list[int] = self._backend.encode(text, add_special_tokens=template).ids
            return ids

    def _template(self) -> tuple[list[int], list[int]]:
        """What the file's post-processor puts before and after a text."""
        for probe in ("a", " a", "0", "."):
            bare = self._ids_of(probe, True, template=False)
            full = self._ids_of(probe, True, template=True)
            for at in range(len(full) - len(bare) + 1):
                if bare and full[at : at + len(bare)] == bare:
                    return full[:at], full[at + len(bare) :]
        raise CheckpointError(
            JSON, f"{JSON}: its post_processor does not leave the text's ids in place"
        )


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def _by_id(ids: Mapping[str, int], where: str) -> list[str | None]:
    """Spellings by id; None where no token has that id."""
    highest = max(ids.values(), default=-1)
    if not 0 <= highest < MAX_TOKENS:
        raise CheckpointError(
            where,
            f"{where}: the highest token id is {highest}; ids of 0..{MAX_TOKENS - 1} are read",
        )
    texts: list[str | None] = [None] * (highest + 1)
    for text, token_id in ids.items():
        texts[token_id] = text
    return texts


def _byte_values(texts: Sequence[str | None], added: Mapping[int, Any]) -> dict[int, int]:
    found = ((i, byte_token(t)) for i, t in enumerate(texts) if t and t.startswith("<0x"))
    return {i: value for i, value in found if value is not None and i not in added}


def _style(parts: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """(byte-level alphabet?, <0xHH> tokens are bytes?, decoding drops a leading space?)."""
    decoders = list(_objects(parts["decoder"]))
    kinds = {d.get("type") for d in decoders}
    if "ByteLevel" in kinds or (
        not decoders and "ByteLevel" in {d.get("type") for d in _objects(parts["pre_tokenizer"])}
    ):
        return True, False, False
    marks = any(
        d.get("type") == "Metaspace"
        or (d.get("type") == "Replace" and d.get("pattern") == {"String": SPACE_MARK})
        for d in decoders
    )
    if not marks:
        raise CheckpointError(
            JSON,
            f"{JSON}: decoder {sorted(str(k) for k in kinds) or 'missing'} is not supported "
            "(supported: ByteLevel, Metaspace, and Replace of '▁' with ByteFallback)",
        )
    strips = any(
        (d.get("type") == "Strip" and d.get("content") == " " and d.get("start", 0) >= 1)
        or (d.get("type") == "Metaspace" and d.get("prepend_scheme", "always") != "never")
        for d in decoders
    )
    return False, "ByteFallback" in kinds, strips


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value, itself included."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _objects(item)


def _with_flag(
    config: Mapping[str, Any], name: str, ids: list[int], token_id: int | None, *, first: bool
) -> list[int]:
    """The template's ids with BOS or EOS as tokenizer_config.json says, where it says anything."""
    wanted = config.get(name)
    if wanted is None or token_id is None:
        return ids
    if not isinstance(wanted, bool):
        raise CheckpointError(CONFIG, f"{CONFIG}: {name} is {wanted!r}, not true or false")
    rest = [i for i in ids if i != token_id]
    if not wanted:
        return rest
    return [token_id, *rest] if first else [*rest, token_id]


def _special_id(
    config: Mapping[str, Any],
    name: str,
    ids: Mapping[str, int],
    checkpoint: Checkpoint,
    texts: Sequence[str | None],
) -> int | None:
    text = special_text(config, name)
    if text is not None:
        if text not in ids:
            raise CheckpointError(
                CONFIG, f"{CONFIG}: {name} {text[:40]!r} is not in the vocabulary"
            )
        return ids[text]
    stated = _id_list(checkpoint.metadata.get(f"{name}_id"), f"config.json: {name}_id")
    return stated[0] if stated and stated[0] < len(texts) else None


def _end_ids(checkpoint: Checkpoint, eos: int | None, vocab_size: int) -> frozenset[int]:
    """eos_token_id of generation_config.json and config.json (one or a list), and `eos`."""
    ends = [] if eos is None else [eos]
    for where, config in (
        ("generation_config.json", checkpoint.generation_config),
        ("config.json", checkpoint.metadata),
    ):
        ends += _id_list(config.get("eos_token_id"), f"{where}: eos_token_id")
    return frozenset(i for i in ends if i < vocab_size)


def _id_list(value: Any, where: str) -> list[int]:
    items = value if isinstance(value, list) else [] if value is None else [value]
    for item in items:
        if type(item) is not int or item < 0:
            raise CheckpointError(
                where, f"{where} is {value!r}; it must be a token id or a list of them"
            )
    return items


# ------------------------------------------------------------------------------------- patterns


def _check_patterns(parts: Mapping[str, Any]) -> None:
    for part, state in parts.items():
        for item in _objects(state):
            pattern = item.get("Regex")
            if not isinstance(pattern, str):
                continue
            if len(pattern) > MAX_PATTERN:
                raise CheckpointError(
                    JSON,
                    f"{JSON}: {part}: a pattern of {len(pattern)} characters; at most "
                    f"{MAX_PATTERN} are read",
                )
            if nested_repetition(pattern):
                raise CheckpointError(
                    JSON,
                    f"{JSON}: {part}: the pattern {pattern[:60]!r} repeats without bound a group "
                    "that itself repeats without bound; it can take exponential time",
                )


_TOKEN = re.compile(
    r"\\.|\[\^?\]?|\(\?<?[=!]|\((?:\?[a-z:>-]*)?|\)|\|"
    r"|(?:[*+]|\{\d+,\}|\?|\{\d*,?\d+\})[?+]?|.",
    re.DOTALL,
)


def nested_repetition(pattern: str) -> bool:
    """Whether a group repeated without bound contains something repeated without bound: (a+)+.

    That is what lets a pattern take exponential time. The other ways to (alternatives that overlap,
    back references) stop at the pattern library's own limit, and encoding fails.
    """
    unbounded = [False]  # per open group: does it contain an unbounded repetition?
    closed: bool | None = None  # the group that has just ended: did it?
    at = 0
    while at < len(pattern):
        match = _TOKEN.match(pattern, at)
        token = match.group() if match else pattern[at]
        at += len(token)
        if token[0] == "[":
            at = _class_end(pattern, at)
            closed = None
        elif token[0] == "(":
            unbounded.append(False)
            closed = None
        elif token == ")":
            closed = unbounded.pop() if len(unbounded) > 1 else False
            unbounded[-1] |= closed
        elif token[0] in "*+" or (
            token[0] == "{" and "," in token and token.rstrip("?+")[-2] == ","
        ):
            if closed:
                return True
            unbounded[-1] = True
            closed = None
        elif token[0] not in "?{":
            closed = None
    return False


def _class_end(pattern: str, at: int) -> int:
    """The position after the character class whose opening bracket ends at `at`."""
    depth = 1
    while at < len(pattern) and depth:
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]":
            depth -= 1
        at += 1
    return at


# --------------------------------------------------------------------------------- sentencepiece


def _sentencepiece(
    model: bytes, config: Mapping[str, Any], checkpoint: Checkpoint
) -> SplitTokenizer:
    from sentencepiece import SentencePieceProcessor

    normalizer = read_normalizer(model)
    # Where the library would trim the space again, it also has to be the one that puts it there.
    ours = normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
    if ours:
        model = add_fields(model, add_dummy_prefix=False)
    with library_errors(MODEL, "reading the model"):
        processor = SentencePieceProcessor(model_proto=model)
        size = processor.get_piece_size()
        pieces: list[str] = [processor.id_to_piece(i) for i in range(size)]
        control = {
            t: i for i, t in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)
        }
        byte_values = {i: byte_token(pieces[i]) for i in range(size) if processor.is_byte(i)}
    ids = {t: i for i, t in enumerate(pieces)}
    user: dict[str, int] = {}
    for token_id, text, special in _added_tokens(config):
        if ids.setdefault(text, token_id) != token_id:
            raise CheckpointError(
                CONFIG,
                f"{CONFIG}: added token {text[:40]!r} is {token_id}, but {ids[text]} in {MODEL}",
            )
        (control if special else user)[text] = token_id
    texts = _by_id(ids, MODEL)
    bos = _special_id(config, "bos_token", ids, checkpoint, texts)
    eos = _special_id(config, "eos_token", ids, checkpoint, texts)
    flags = {n: config.get(n) for n in ("add_bos_token", "add_eos_token", "legacy")}
    for name, value in flags.items():
        if not isinstance(value, bool | None):
            raise CheckpointError(CONFIG, f"{CONFIG}: {name} is {value!r}, not true or false")
    add_bos = flags["add_bos_token"]
    tokenizer = SplitTokenizer(
        texts,
        processor.encode_as_ids,
        to_bytes=spm_bytes,
        control=control,
        user=user,
        byte_values={i: b for i, b in byte_values.items() if b is not None},
        bos=bos,
        eos=eos,
        end_ids=_end_ids(checkpoint, eos, len(texts)),
        add_bos=bos is not None if add_bos is None else add_bos,
        add_eos=bool(flags["add_eos_token"]),
        # "legacy": a space before every text that follows a special token, as Llama 2 was trained.
        space_prefix="never" if not ours else "first" if flags["legacy"] is False else "each",
        field=MODEL,
    )
    tokenizer.strip_leading_space = normalizer.add_dummy_prefix
    return tokenizer


def _added_tokens(config: Mapping[str, Any]) -> Iterator[tuple[int, str, bool]]:
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise CheckpointError(CONFIG, f"{CONFIG}: added_tokens_decoder is no object")
    for key, token in added.items():
        text = token.get("content") if isinstance(token, dict) else None
        if not re.fullmatch(r"\d{1,9}", key) or not isinstance(text, str) or not text:
            raise CheckpointError(
                CONFIG,
                f"{CONFIG}: added_tokens_decoder[{key[:20]!r}] must be an id and {{content: text}}",
            )
        yield int(key), text, bool(token.get("special", False))


__all__ = [
    "JsonTokenizer",
    "load_folder_tokenizer",
    "nested_repetition",
    "read_tokenizer_config",
    "special_text",
]
