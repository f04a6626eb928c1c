"""A tokenizer in two steps: special tokens are found first, the texts between them go to a core.

GGUF vocabularies of both kinds and tokenizer.model files work so; tokenizer.json files bring their
own handling of special tokens (tokenizer_files.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from .mapped import CheckpointError
from .vocabulary import SpecialTokens, Vocabulary, library_errors, well_formed


class SplitTokenizer(Vocabulary):
    """A Tokenizer (see tokenizer.py).

    `core`: ids of a text without special tokens. `control`: tokens parsed where the caller says so,
    `user`: tokens that are always matched whole; both by spelling. `space_prefix`: where a space
    goes before a text: before every one that follows a special token or nothing, before the first
    part only, or nowhere. `end_ids`: what ends an answer.
    """

    def __init__(
        self,
        texts: Sequence[str | None],
        core: Callable[[str], list[int]],
        *,
        to_bytes: Callable[[str], bytes],
        control: Mapping[str, int],
        user: Mapping[str, int],
        byte_values: Mapping[int, int],
        bos: int | None,
        eos: int | None,
        end_ids: frozenset[int],
        add_bos: bool,
        add_eos: bool,
        space_prefix: Literal["each", "first", "never"],
        strip_right: Collection[int] = (),
        field: str,
    ) -> None:
        super().__init__(
            texts,
            to_bytes=to_bytes,
            literal=frozenset(control.values()) | frozenset(user.values()),
            byte_values=byte_values,
            special_ids=frozenset(control.values()) | end_ids,
            strip_leading_space=space_prefix != "never",
        )
        for wanted, token_id, name in ((add_bos, bos, "BOS"), (add_eos, eos, "EOS")):
            if wanted and token_id is None:
                raise CheckpointError(
                    field,
                    f"{field}: every text is to get a {name} token (add_{name.lower()}_token), but "
                    f"{name.lower()}_token_id is missing",
                )
        self.bos_token_id = bos
        self.eos_token_ids = end_ids
        self.add_bos = add_bos
        self._before = [bos] if add_bos and bos is not None else []
        self._after = [eos] if add_eos and eos is not None else []
        self._core = core
        self._field = field
        self._space_prefix = space_prefix
        self._special = SpecialTokens(always=user, control=control, strip_right=strip_right)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`; see tokenizer.Tokenizer. Errors: CheckpointError (a broken core)."""
        out = list(self._before) if add_special_tokens else []
        prefix_here = self._space_prefix != "never"
        with library_errors(self._field, "encoding a text"):
            for part in self._special.split(well_formed(text), parse_special):
                if isinstance(part, int):
                    out.append(part)
                    prefix_here = self._space_prefix == "each"
                else:
                    out += self._core(" " + part if prefix_here else part)
                    prefix_here = False
        return out + self._after if add_special_tokens else out


__all__ = ["SplitTokenizer"]
