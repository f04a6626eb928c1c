"""Grammars: a StructuredOutput compiled by llguidance over a model's tokenizer.

llguidance (https://github.com/guidance-ai/llguidance) turns JSON schemas, regular expressions and
Lark grammars into a parser that tells which tokens may come next. It bounds its own work; the
limits here are what one request may take of it.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from ..core.parameter import ParameterError
from ..core.structured import FIELD, StructuredOutput
from .endings import END, TOKENS, Effort, Words, find_ending

MAX_KEPT: Final = 128  # compiled grammars
MAX_ENDING: Final = 1 << 14  # bytes of the shortest output that is looked for
_EFFORT: Final = 20_000  # looks at the grammar for it; some 0.1 s
_LIMITS: Final = {
    "initial_lexer_fuel": 1_000_000,  # 50,000 a millisecond
    "step_lexer_fuel": 200_000,  # of one token's mask; 14,000 a millisecond
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,  # 1 to 2 kB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class Tokens(Protocol):
    """What is asked of a tokenizer; see engine/load/tokenizer.py."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def strip_leading_space(self) -> bool: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]: ...


@dataclass(frozen=True)
class Compiled:
    """A grammar at its start. The matchers are copied, never moved.

    ending: the shortest output, as tokens; None where the search found none. words: what endings
    are spelled in. stands: of each special token that it asks for, the byte in `byte_matcher`.
    """

    kind: str
    matcher: Any  # over the model's tokens
    byte_matcher: Any
    words: Words
    stands: Mapping[int, bytes]
    ending: tuple[int, ...] | None


class Grammars:
    """Compiles for one model, each text once. May be called from any thread."""

    def __init__(self, tokenizer: Tokens) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._kept: OrderedDict[StructuredOutput, Future[Compiled]] = OrderedDict()
        self._vocabulary: _Vocabulary | None = None
        self._making = threading.Lock()

    @property
    def vocabulary(self) -> _Vocabulary:
        with self._making:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._tokenizer)
            return self._vocabulary

    def is_kept(self, form: StructuredOutput) -> bool:
        """True where compile() returns at once."""
        with self._lock:
            known = self._kept.get(form)
        return known is not None and known.done()

    def compile(self, form: StructuredOutput) -> Compiled:
        """The grammar of a form. Errors: ParameterError("structured") with llguidance's reason."""
        with self._lock:
            known = self._kept.get(form)
            mine = known is None
            if known is None:
                known = self._kept[form] = Future()
                while len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(form)
        if mine:
            try:
                known.set_result(_compile(form, self.vocabulary))
            except BaseException as error:
                known.set_exception(error)
        try:
            return known.result()
        except ParameterError as error:
            raise ParameterError(error.field, str(error)) from None  # its own traceback each time


class _Vocabulary:
    """A model's tokens as llguidance takes them, and the 256 bytes as a vocabulary of their own."""

    def __init__(self, tokenizer: Tokens) -> None:
        self.library = _library()
        size = tokenizer.vocab_size
        texts = [tokenizer.token_bytes(i) for i in range(size)]
        ends = sorted(tokenizer.eos_token_ids)
        if not ends:
            raise ParameterError(
                FIELD, f"{FIELD}: this model has no end-of-text token, which a form ends with"
            )
        special = tokenizer.special_ids

        # An id without bytes must never be allowed: it counts as special.
        apart = sorted(special | {i for i, text in enumerate(texts) if not text})
        self.size = size
        self.apart: Sequence[int] = apart
        self.texts: Sequence[bytes] = texts
        self.special: Collection[int] = special
        self.eos_token_ids = frozenset(ends)
        self.tokens = self._tokenizer(
            texts, apart, ends, tokenizer.bos_token_id, _encoder(tokenizer)
        )
        single = [b"<%d>" % b if b in TOKENS else bytes([b]) for b in range(256)]
        self.bytes = self._tokenizer(
            [*single, b"<end>"],
            [*TOKENS, END],
            [END],
            None,
            lambda text: list(text.encode()),
            slices=[],
        )
        plain = {texts[i]: i for i in range(size - 1, -1, -1) if i not in special}
        self.words = Words(plain)

    def _tokenizer(
        self,
        texts: Sequence[bytes],
        special: Sequence[int],
        ends: Sequence[int],
        bos: int | None,
        encode: Any,
        **options: Any,
    ) -> Any:
        source = _Source(texts, special, ends[0], bos, encode)
        wrapped = self.library.TokenizerWrapper(source)
        return self.library.LLTokenizer(wrapped, eos_token=list(ends), **options)


def _encoder(tokenizer: Tokens) -> Callable[[str], list[int]]:
    """Text in the middle of an output -> ids: without the space that some put before a text."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, parse_special=False)

    if not tokenizer.strip_leading_space:
        return encode
    mark = "\x02"  # merges with nothing
    before = encode(mark)
    return lambda text: encode(mark + text)[len(before) :]


class _Source:
    """The object that llguidance's TokenizerWrapper reads."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_token_ids: Sequence[int],
        eos_token_id: int,
        bos_token_id: int | None,
        encode: Any,
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = eos_token_id
        self.bos_token_id = bos_token_id
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        ids: list[int] = self._encode(plain)
        return ids


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ParameterError(
            FIELD,
            f"{FIELD} needs the package llguidance: pip install 'engineroom[structured]'",
        ) from None
    return llguidance


def _compile(form: StructuredOutput, vocabulary: _Vocabulary) -> Compiled:
    library = vocabulary.library
    if form.grammar is not None:
        form = replace(form, grammar=_without_ends(form.grammar, vocabulary.eos_token_ids))
    limits = library.LLParserLimits(**_LIMITS)
    try:
        text = _grammar(form, library.LLMatcher)
    except ValueError as error:
        raise _refusal(form, str(error)) from None
    over_bytes, stands = _over_bytes(form, text, vocabulary)
    words = vocabulary.words.beside({byte: token for token, byte in stands.items()})
    made = []
    for tokens, said in ((vocabulary.tokens, text), (vocabulary.bytes, over_bytes)):
        matcher = library.LLMatcher(tokens, said, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refusal(form, matcher.get_error())
        made.append(matcher)
    ending = find_ending(made[1], words, Effort(_EFFORT), MAX_ENDING)
    if ending is None and form.kind in ("json_schema", "json_object", "choice"):
        raise _refusal(
            form, f"no output that satisfies it was found within {MAX_ENDING} bytes; simplify it"
        )
    return Compiled(form.kind, made[0], made[1], words, stands, ending)


# Of a Lark grammar: what is skipped (texts, expressions, comments), and a token by its id.
_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|<\[(\d+)\]>')


def _without_ends(grammar: str, eos_token_ids: Collection[int]) -> str:
    """The grammar less the tokens it asks for that end every output of the model.

    They may come wherever the rest is whole, and nothing behind them is ever sampled; asked for by
    their ids they would be no part of an output that is whole.
    """

    def kept(match: re.Match[str]) -> str:
        return '""' if match[1] is not None and int(match[1]) in eos_token_ids else match[0]

    return _TOKEN.sub(kept, grammar)


def _over_bytes(
    form: StructuredOutput, text: str, vocabulary: _Vocabulary
) -> tuple[str, dict[int, bytes]]:
    """The grammar for the byte vocabulary, and the byte that stands for each token it asks for.

    Errors: ParameterError for an id that is no token, and for more of them than there are bytes.
    """
    stands: dict[int, bytes] = {}

    def replaced(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        token = int(match[1])
        if token not in vocabulary.special:
            raise _refusal(form, f"{match[0]} is not the id of a special token of this model")
        if token not in stands and len(stands) == len(TOKENS):
            raise _refusal(form, f"it asks for more than {len(TOKENS)} special tokens")
        stands.setdefault(token, bytes([TOKENS[len(stands) % len(TOKENS)]]))
        return f"<[{stands[token][0]}]>"

    if form.grammar is None:
        return text, {}
    changed = _TOKEN.sub(replaced, form.grammar)
    return (vocabulary.library.LLMatcher.grammar_from_lark(changed) if stands else text), stands


def _grammar(form: StructuredOutput, matcher: Any) -> str:
    if form.json_schema is not None:
        text: str = matcher.grammar_from_json_schema(form.json_schema)
    elif form.json_object:
        text = matcher.grammar_from_json_schema('{"type": "object"}')
    elif form.regex is not None:
        text = matcher.grammar_from_regex(form.regex)
    elif form.grammar is not None:
        text = matcher.grammar_from_lark(form.grammar)
    else:
        choice = dict.fromkeys(form.choice or ())
        texts = " | ".join(json.dumps(c, ensure_ascii=False) for c in choice)
        text = matcher.grammar_from_lark(f"start: {texts}")
    return text


def _refusal(form: StructuredOutput, reason: str) -> ParameterError:
    shown = " ".join(reason.split())[:600]
    return ParameterError(FIELD, f"{FIELD}: {form.kind} cannot be used: {shown}")


__all__ = ["Compiled", "Grammars", "Tokens"]
