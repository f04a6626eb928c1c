"""What token ids stand for: their bytes, which are special, and where texts spell them out.

Shared by every kind of tokenizer: `Vocabulary` turns ids into bytes and text, `SpecialTokens` finds
the tokens that are matched whole in a text before the rest of it is tokenized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, overload

import numpy as np

from .mapped import CheckpointError

SPACE_MARK: Final = "\u2581"  # how sentencepiece writes a space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte, printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTE_OF: Final = _byte_alphabet()
CHAR_OF: Final = {b: c for c, b in BYTE_OF.items()}


def byte_level_bytes(text: str) -> bytes:
    """The bytes of a token written in the byte alphabet; a token not in it stands for itself."""
    try:
        return bytes([BYTE_OF[c] for c in text])
    except KeyError:
        return literal_bytes(text)


def spm_bytes(text: str) -> bytes:
    """The bytes of a sentencepiece token: its text with the marks as spaces."""
    return literal_bytes(text.replace(SPACE_MARK, " "))


def literal_bytes(text: str) -> bytes:
    """UTF-8; surrogate escapes (see gguf.Metadata) give back the file's bytes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # other surrogates: a JSON vocabulary may spell them
        return well_formed(text).encode()


def byte_token(text: str) -> int | None:
    """The byte that a token written <0xHH> stands for; None for any other spelling."""
    match = _BYTE.fullmatch(text)
    return int(match[1], 16) if match else None


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates as U+FFFD: what UTF-8 can carry."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Spellings(Sequence[str | None]):
    """Texts by id, None where an id has none: as one piece of UTF-8 and where each begins.

    A twentieth of what as many Python strings take. Bytes that UTF-8 never has stand between texts
    (0xFF) and for None (0xFE); surrogates, which a vocabulary may hold, are kept.
    """

    def __init__(self, texts: Iterable[str | None]) -> None:
        data = bytearray(b"\xff")
        for text in texts:
            data += b"\xfe" if text is None else text.encode("utf-8", "surrogatepass")
            data += b"\xff"
        self._data = bytes(data)
        self._starts = np.flatnonzero(np.frombuffer(self._data, np.uint8) == 0xFF) + 1
        if len(self._data) < 1 << 32:
            self._starts = self._starts.astype(np.uint32)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[str | None]: ...
    def __getitem__(self, index: int | slice) -> str | list[str | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones count from the end; IndexError beyond it
        piece = self._data[self._starts[index] : self._starts[index + 1] - 1]
        return None if piece == b"\xfe" else piece.decode("utf-8", "surrogatepass")

    def id_of(self, text: str) -> int | None:
        """The last id that is spelled so, or None: a scan, for the few that are asked for."""
        at = self._data.rfind(b"\xff" + text.encode("utf-8", "surrogatepass") + b"\xff")
        return None if at < 0 else int(np.searchsorted(self._starts, at + 1))


class Vocabulary:
    """Ids to bytes and text.

    `texts`: the spelling by id, None where an id has no token. `to_bytes` reads a spelling; ids in
    `literal` are what they spell, those in `byte_values` one byte. `special_ids`: what `decode`
    leaves out. `strip_leading_space`: encoding puts a space before a text, which decoding takes
    away again, once, at the start.
    """

    def __init__(
        self,
        texts: Sequence[str | None],
        *,
        to_bytes: Callable[[str], bytes],
        literal: Collection[int],
        byte_values: Mapping[int, int],
        special_ids: frozenset[int],
        strip_leading_space: bool,
    ) -> None:
        self.vocab_size = len(texts)
        self.special_ids = special_ids
        self.strip_leading_space = strip_leading_space
        self._texts = texts if isinstance(texts, Spellings) else Spellings(texts)
        self._to_bytes = to_bytes
        self._literal = literal
        self._byte_values = byte_values
        self._bytes: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes an id adds to a text. Errors: ValueError for an id outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        text = self._text(token_id)
        if token_id in self._byte_values:
            value = bytes([self._byte_values[token_id]])
        elif text is None:
            value = b""
        else:
            value = literal_bytes(text) if token_id in self._literal else self._to_bytes(text)
        self._bytes[token_id] = value
        return value

    def token_text(self, token_id: int) -> str:
        """An id's spelling in the vocabulary ("" for an id without a token). Errors: ValueError."""
        return self._text(token_id) or ""

    def token_id(self, text: str) -> int | None:
        """The id spelled exactly so in the vocabulary, or None."""
        return self._texts.id_of(text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`: their bytes joined, as UTF-8, U+FFFD for what is none.

        Errors: ValueError for an id outside the vocabulary.
        """
        skip = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join([self.token_bytes(i) for i in ids if i not in skip]).decode(
            "utf-8", "replace"
        )
        return text.removeprefix(" ") if self.strip_leading_space else text

    def _text(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is outside the vocabulary 0..{self.vocab_size - 1}"
            )
        return self._texts[token_id]


class SpecialTokens:
    """Finds tokens spelled in a text: leftmost first, the longest of those that start there.

    `always` are matched whatever is asked (user-defined tokens), `control` only where special
    tokens are to be parsed. After a token in `strip_right` ASCII white space is passed over.
    """

    def __init__(
        self,
        *,
        always: Mapping[str, int],
        control: Mapping[str, int],
        strip_right: Collection[int] = (),
    ) -> None:
        self._plain = _Matcher(always)
        self._all = _Matcher({**always, **control})
        self._strip_right = strip_right

    def split(self, text: str, parse_special: bool) -> Iterator[str | int]:
        """The parts of `text` in order: token ids, and between them non-empty texts."""
        matcher = self._all if parse_special else self._plain
        at = 0
        while (found := matcher.find(text, at)) is not None:
            start, stop, token_id = found
            if start > at:
                yield text[at:start]
            yield token_id
            at = stop
            if token_id in self._strip_right:
                while at < len(text) and text[at] in " \t\n\v\f\r":
                    at += 1
        if at < len(text):
            yield text[at:]


class _Matcher:
    """Where the next of many texts occurs. Gemma 3 has 6,400 of them and 40 ways to start.

    So the scan looks for the first two characters and tries the lengths that tokens so started
    have, longest first; a pattern of all the tokens would take longer to build than to use.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = {text: i for text, i in ids.items() if text}
        lengths: dict[str, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[:2], set()).add(len(text))
        for start, known in lengths.items():
            if start[0] in self._ids:
                known.add(1)
        self._lengths = {start: sorted(known, reverse=True) for start, known in lengths.items()}
        starts = sorted(lengths, key=len, reverse=True)
        self._scan = re.compile("|".join(map(re.escape, starts))) if starts else None

    def find(self, text: str, at: int) -> tuple[int, int, int] | None:
        """(start, stop, id) of the first token at or after `at`; None where there is none."""
        if self._scan is None:
            return None
        while (match := self._scan.search(text, at)) is not None:
            start = match.start()
            for length in self._lengths[match.group()]:
                token_id = self._ids.get(text[start : start + length])
                if token_id is not None:
                    return start, min(start + length, len(text)), token_id
            at = start + 1
        return None


@contextmanager
def library_errors(field: str, doing: str) -> Iterator[None]:
    """A tokenizer library's failure as CheckpointError: also a panic of its Rust code.

    A panic derives from BaseException, so that `except Exception` would let it end the process.
    """
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(field, f"{field}: {doing} failed: {reason}") from error


__all__ = [
    "BYTE_OF",
    "CHAR_OF",
    "SPACE_MARK",
    "SpecialTokens",
    "Spellings",
    "Vocabulary",
    "byte_level_bytes",
    "byte_token",
    "library_errors",
    "literal_bytes",
    "spm_bytes",
    "well_formed",
]
