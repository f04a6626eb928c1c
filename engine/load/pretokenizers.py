"""How a byte-level vocabulary cuts text into words before merging, by the name a GGUF file gives.

`tokenizer.ggml.pre` names one. The patterns are those of the models' own tokenizer.json files, or,
where llama.cpp states another, of llama.cpp's table (src/llama-vocab.cpp, the reference for these
names). Syntax: Oniguruma, as the `tokenizers` library has it. What a pattern leaves unmatched is a
word too; the patterns of one entry apply one after the other, each to the words of the one before.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from .mapped import CheckpointError


@dataclass(frozen=True)
class PreTokenizer:
    """`splits`: the patterns, in order. `ignore_merges`: a word that is a token is that token.

    `add_bos`: what holds where the file does not say whether a text starts with BOS.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"


def _letters_then(numbers: str, contraction: str = _CONTRACTION + "|") -> str:
    """The pattern of the cl100k kind; the models differ in how many digits make a word."""
    return (
        contraction
        + r"[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        + _SPACES
    )


def _cased(numbers: str, suffix: str = "") -> str:
    """The pattern of the o200k kind: a word is capitals, then small letters, then `suffix`."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
    )


_LLAMA3 = _letters_then(r"\p{N}{1,3}")
_QWEN2 = _letters_then(r"\p{N}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    _CJK,
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)
# The letters that deepseek-llm keeps together: cased ones, as its tokenizer.json lists them (older
# than the newest in Unicode). Escaped, because normalising this file would change some of them.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_PUNCTUATION_FIRST = r"[\p{P}\$\+<=>\^~\|"
_THREE_DIGITS = r"[0-9][0-9][0-9]"
_POEM = r" ?[^(\s|.,!?…。，、।۔،)]+"


def _table() -> dict[str, PreTokenizer]:
    kinds: list[tuple[str, PreTokenizer]] = [
        (
            "default",
            PreTokenizer((_PUNCTUATION_FIRST + "]+", _GPT2, r"\p{N}+", _THREE_DIGITS)),
        ),
        (
            "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4",
            PreTokenizer((_GPT2,)),
        ),
        (
            "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
            PreTokenizer((r"\p{N}", _GPT2)),
        ),
        (
            "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
            PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
        ),
        ("dbrx smaug-bpe chatglm-bpe glm4", PreTokenizer((_LLAMA3,))),
        (
            "qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez grok-2 kormo solar-open",
            PreTokenizer((_QWEN2,)),
        ),
        (
            "qwen35",
            PreTokenizer(
                (
                    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
                    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES,
                )
            ),
        ),
        ("tekken", PreTokenizer((_cased(r"\p{N}"),), ignore_merges=True, add_bos=True)),
        (
            "gpt-4o llama4 kanana2 minimax-m2",
            PreTokenizer((_cased(r"\p{N}{1,3}", _CONTRACTION + "?"),)),
        ),
        ("deepseek-llm", PreTokenizer(_DEEPSEEK_LLM)),
        ("deepseek-coder", PreTokenizer(_DEEPSEEK_CODER)),
        ("deepseek-v3 hunyuan-dense joyai-llm", PreTokenizer(_DEEPSEEK3)),
        ("falcon", PreTokenizer((_PUNCTUATION_FIRST + "`]+", _GPT2, _THREE_DIGITS))),
        ("bloom gpt3-finnish poro-chat", PreTokenizer((_POEM,))),
        ("viking", PreTokenizer((_POEM, r"\p{N}"))),
        (
            "seed-coder",
            PreTokenizer(
                (
                    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}"
                    r"| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES,
                )
            ),
        ),
        (
            "bailingmoe bailingmoe2 llada-moe",
            PreTokenizer(
                (
                    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
                )
            ),
        ),
    ]
    return {name: entry for names, entry in kinds for name in names.split()}


PRE_TOKENIZERS: dict[str, PreTokenizer] = _table()


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The entry of that name. Errors: CheckpointError naming the nearest and all supported ones."""
    entry = PRE_TOKENIZERS.get(name)
    if entry is not None:
        return entry
    near = difflib.get_close_matches(name, PRE_TOKENIZERS, n=1)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise CheckpointError(
        "tokenizer.ggml.pre",
        f"tokenizer.ggml.pre: pre-tokenizer {name[:64]!r} is not known{hint} "
        f"(supported: {', '.join(sorted(PRE_TOKENIZERS))})",
    )


__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "find_pre_tokenizer"]
