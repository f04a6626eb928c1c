"""What tests of forms share: a small vocabulary, random schemas, and a model of random logits."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from engineroom.engine.core.structured import StructuredOutput
from engineroom.engine.features.grammar import Grammars
from engineroom.engine.features.grammar_form import GrammarForm
from engineroom.engine.runtime.runner import RESAMPLES

_PAIRS = ['":', '"}', '"},{"', "[[", '":"', '","', "]}", "}}", "true", "false", "null", "ab", "a b"]


class SmallTokens:
    """The 256 bytes, some longer tokens as JSON has them, one id without bytes, and two ends."""

    bos_token_id = None
    add_bos = strip_leading_space = False

    def __init__(self) -> None:
        self.texts = [bytes([b]) for b in range(256)] + [p.encode() for p in _PAIRS] + [b""]
        self.eos_token_ids = frozenset({len(self.texts), len(self.texts) + 1})
        self.texts += [b"<|eos|>", b"<|im_end|>", b"<|tool|>"]
        self.special_ids = self.eos_token_ids | {len(self.texts) - 1}
        self.vocab_size = len(self.texts)

    def token_bytes(self, token_id: int) -> bytes:
        return self.texts[token_id]

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        ids, rest = [], text.encode()
        known = {t: i for i, t in enumerate(self.texts) if t and i not in self.special_ids}
        while rest:
            word = max((t for t in known if rest.startswith(t)), key=len)
            ids.append(known[word])
            rest = rest[len(word) :]
        return ids


def schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random JSON schema; every property that it requires is one it has."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "any_of"]
    if depth < 3:
        kinds += ["object", "object", "array"]
    match rng.choice(kinds) if depth else "object":
        case "object":
            names = rng.sample(["a", "bb", "name", "value of it", "été", 'q"'], rng.randint(0, 4))
            return {
                "type": "object",
                "properties": {name: schema(rng, depth + 1) for name in names},
                "required": [name for name in names if rng.random() < 0.6],
                "additionalProperties": False,
            }
        case "array":
            least = rng.choice([0, 0, 1, 3])
            return {
                "type": "array",
                "items": schema(rng, depth + 1),
                "minItems": least,
                "maxItems": least + rng.randint(1, 4),
            }
        case "string":
            return rng.choice(
                [
                    {"type": "string"},
                    {"type": "string", "minLength": 2, "maxLength": 9},
                    {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]{3}$"},
                    {"type": "string", "format": "date"},
                ]
            )
        case "integer":
            return rng.choice([{"type": "integer"}, {"type": "integer", "minimum": 15}])
        case "enum":
            return {"enum": ["a rather long value", "short", 17, None]}
        case "const":
            return {"const": rng.choice(["fixed", 3, True])}
        case "any_of":
            return {"anyOf": [schema(rng, depth + 1), {"type": "boolean"}]}
        case kind:
            return {"type": kind}


def make_form(
    grammars: Grammars, output: StructuredOutput, max_tokens: int, *, ignore_eos: bool = False
) -> GrammarForm:
    return GrammarForm(
        grammars,
        grammars.compile(output),
        max_tokens=max_tokens,
        num_mask_words=-(-grammars.vocabulary.size // 32) + 1,
        ignore_eos=ignore_eos,
    )


def play(form: GrammarForm, max_tokens: int, logits: Any) -> list[int]:
    """The output of a model of these logits ((position) -> [V]), by the runner's own rule."""
    ids: list[int] = []
    ends = form._vocabulary.eos_token_ids
    while len(ids) < max_tokens:
        row, mask = logits(len(ids)), form.mask()
        assert form.error is None
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(row)] == 1
        assert allowed.any()
        row = np.where(allowed, row, -np.inf)
        token = int(row.argmax())
        if form.near:
            for _ in range(RESAMPLES):
                if form.settle(token):
                    break
                row[token] = -np.inf
                token = int(row.argmax())
            else:
                if not form.settle(token):
                    token = form.instead()
        assert allowed[token]
        if form.take(token):
            if token not in ends:
                ids.append(token)
            break
        ids.append(token)
    return ids


def text_of(tokens: Any, ids: Sequence[int]) -> str:
    return b"".join(tokens.token_bytes(i) for i in ids).decode()


def as_output(value: dict[str, Any]) -> StructuredOutput:
    return StructuredOutput.json(json.dumps(value, ensure_ascii=False))
