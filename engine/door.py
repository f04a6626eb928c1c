"""The door: text and parameters of a request become the scheduler's requests, one a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .core.detokenize import TextStream, TokenPieces
from .core.form import FREE, Form
from .core.parameter import ParameterError
from .core.request import Request
from .core.sampling_params import SamplingParams
from .features.grammar import Grammars
from .features.grammar_form import GrammarForm
from .load.tokenizer import Tokenizer


class Door:
    """Of one model. `grammars` are the engine's, `clock` its own."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        grammars: Grammars,
        *,
        vocab_size: int,
        max_model_len: int,
        clock: Callable[[], float],
    ) -> None:
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._vocab_size = vocab_size  # the model's; the tokenizer may know fewer
        self._max_model_len = max_model_len
        self._clock = clock
        self._pieces = TokenPieces(tokenizer.token_bytes, tokenizer.vocab_size)

    def prompt_ids(self, prompt: str | list[int], params: SamplingParams) -> list[int]:
        ids = self._tokenizer.encode(unicode_text(prompt)) if isinstance(prompt, str) else prompt
        keep = params.truncate_prompt_tokens
        return ids if keep is None else ids[-keep:]

    def samples(
        self,
        request_id: str,
        ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        bad_words: tuple[tuple[int, ...], ...],
        **queueing: Any,
    ) -> list[Request]:
        tokenizer = self._tokenizer
        room = self._max_model_len - len(ids)
        max_tokens = params.max_tokens if params.max_tokens is not None else max(room, 1)
        skip = self._skipped_ids(params)
        starts_text = all(token in tokenizer.special_ids for token in ids)
        arrival = self._clock()
        samples: list[Request] = []
        for index in range(params.num_samples):
            samples.append(
                Request(
                    request_id=request_id,
                    prompt_token_ids=ids,
                    params=params,
                    max_tokens=max_tokens,
                    seed=seed,
                    sample_index=index,
                    arrival=arrival,
                    eos_token_ids=tokenizer.eos_token_ids,
                    bad_word_ids=bad_words,
                    dry_breaker_ids=self._dry_breaker_ids(params),
                    text=TextStream(
                        self._pieces.__getitem__,
                        stop=params.stop,
                        include_stop=params.include_stop_str_in_output,
                        skip_ids=skip,
                        strip_leading_space=tokenizer.strip_leading_space and starts_text,
                        min_tokens=params.min_tokens,
                    ),
                    leader=samples[0] if samples else None,
                    form=self._form(params, max_tokens),
                    **queueing,
                )
            )
        return samples

    def _form(self, params: SamplingParams, max_tokens: int) -> Form:
        """A sample's form. Errors: ParameterError where its shortest output does not fit."""
        if params.structured is None:
            return FREE
        compiled = self._grammars.compile(params.structured)
        if compiled.ending is not None and len(compiled.ending) > max_tokens:
            raise ParameterError(
                "max_tokens",
                f"max_tokens={max_tokens} is too few for any output of the form asked for by "
                f"structured; the shortest has {len(compiled.ending)} tokens",
            )
        return GrammarForm(
            self._grammars,
            compiled,
            max_tokens=max_tokens,
            num_mask_words=-(-self._vocab_size // 32),
            ignore_eos=params.ignore_eos,
        )

    def token_text(self, token_id: int) -> str:
        """What a token alone adds to a text; a part of a character shows as U+FFFD."""
        return self._pieces[token_id].decode("utf-8", "replace")

    def bad_word_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each bad word as token ids, at the start of a text and after a space (vLLM's rule)."""
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            for text in (word, " " + word.lstrip()):
                ids = tuple(
                    self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)
                )
                if ids:
                    found[ids] = None
        return tuple(found)

    def _skipped_ids(self, params: SamplingParams) -> frozenset[int]:
        """Token ids whose text is left out of the output."""
        if not params.skip_special_tokens:
            return frozenset()
        special = self._tokenizer.special_ids
        kept = [
            self._tokenizer.encode(text, add_special_tokens=False)
            for text in params.keep_special_tokens
        ]
        return special.difference(ids[0] for ids in kept if len(ids) == 1)

    def _dry_breaker_ids(self, params: SamplingParams) -> frozenset[int]:
        if not params.dry_multiplier:
            return frozenset()
        encode = self._tokenizer.encode
        ids = (
            encode(text, add_special_tokens=False, parse_special=False)
            for text in params.dry_sequence_breakers
        )
        return frozenset(tokens[-1] for tokens in ids if tokens)


def embedding_params(params: SamplingParams) -> SamplingParams:
    """Errors: ParameterError for what would be ignored."""
    keep = params.truncate_prompt_tokens
    if params != SamplingParams(truncate_prompt_tokens=keep):
        raise ParameterError(
            "params",
            "an embedding samples nothing: of params it takes truncate_prompt_tokens alone",
        )
    return SamplingParams(max_tokens=0, echo=True, truncate_prompt_tokens=keep)


def unicode_text(text: str) -> str:
    """The text itself. Errors: ParameterError("prompt") for a lone surrogate, which is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ParameterError("prompt", f"the prompt is not valid Unicode text: {error}") from None
    return text
