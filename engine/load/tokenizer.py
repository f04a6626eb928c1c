"""The tokenizer of a checkpoint, whatever it comes as: `load_tokenizer(checkpoint)`.

A GGUF file carries its own vocabulary; a folder has tokenizer.json (read by `tokenizers`) or
tokenizer.model (read by `sentencepiece`). Only the library that is needed is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .checkpoint import Checkpoint
from .mapped import CheckpointError
from .tokenizer_files import load_folder_tokenizer
from .tokenizer_gguf import load_gguf_tokenizer


class Tokenizer(Protocol):
    """Text to token ids and back.

    `add_bos`: whether `encode` puts BOS first by default. `special_ids`: what `decode` leaves out.
    `eos_token_ids`: what ends an answer. `strip_leading_space`: `decode` drops one leading space,
    which `encode` had put there.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def strip_leading_space(self) -> bool: ...

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """The ids of `text`. Lone surrogates count as U+FFFD.

        `add_special_tokens`: with the BOS and EOS that the checkpoint wants around every text.
        `parse_special`: special tokens spelled in the text become their ids; else they are text.
        Errors: CheckpointError where the vocabulary itself is broken.
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The tokens' bytes joined, as UTF-8, U+FFFD for what is none. Errors: ValueError."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes an id adds to a text. Errors: ValueError for an id outside the vocabulary."""
        ...

    def token_text(self, token_id: int) -> str:
        """An id's spelling in the vocabulary. Errors: ValueError for an id outside it."""
        ...

    def token_id(self, text: str) -> int | None:
        """The id spelled exactly so in the vocabulary, or None."""
        ...


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of an open checkpoint. Errors: CheckpointError naming the key or file."""
    if checkpoint.kind == "gguf":
        return load_gguf_tokenizer(checkpoint)
    return load_folder_tokenizer(checkpoint)


__all__ = ["CheckpointError", "Tokenizer", "load_tokenizer"]
