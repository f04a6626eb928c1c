"""The bounds of requests as /openapi.json states them: the numbers that SamplingParams and the
door refuse by, said on the wire types. msgspec reads past these, so that the refusal's sentence
stays the one of whoever knows the parameter; it checks what a plain Meta says beside them.
"""

from __future__ import annotations

from typing import Any

from msgspec import Meta

from ..core.checks import MAX_ID_LENGTH, MAX_PRIORITY
from ..core.sampling_params import MIN_TEMPERATURE, TOKEN_ID_TEXT, SamplingParams
from ..core.structured import StructuredOutput

MAX_TOOLS = 128
MAX_KEPT = SamplingParams.LIMITS["keep_special_tokens"][0] - 16  # beside a dialect's markers
MAX_INPUTS = 2048  # of an embeddings call, as OpenAI's
# Tokens of an answer where there is no echo that could be asked for alone.
ANSWER_TOKENS = (1, int(SamplingParams.BOUNDS["max_tokens"][1]))
REQUEST_ID_LENGTH = MAX_ID_LENGTH - 16  # beside the prefix and the index that an id gets here


def says(description: str = "", /, **keywords: Any) -> Meta:
    """A Meta of JSON Schema keywords that the document states and msgspec does not check."""
    return Meta(description=description or None, extra_json_schema=keywords)


def between(low: float, high: float, description: str = "") -> Meta:
    """Of a number: both ends are allowed."""
    return says(description, minimum=low, maximum=high)


def within(name: str, description: str = "") -> Meta:
    """Of a number: a SamplingParams field, or one value of a field that is a collection."""
    return between(*SamplingParams.BOUNDS[name], description)


def entries(name: str, at_least: int = 0) -> Meta:
    """Of a list: how many entries the field of SamplingParams may have."""
    return says(
        **({"minItems": at_least} if at_least else {}), maxItems=SamplingParams.LIMITS[name][0]
    )


def text(name: str) -> Meta:
    """Of one string of such a list."""
    return says(minLength=1, maxLength=SamplingParams.LIMITS[name][1])


def form(name: str, at_least: int = 1) -> Meta:
    """Of the text of a form of StructuredOutput, whose bytes are counted."""
    most = StructuredOutput.MAX_BYTES[name]
    return says(f"At most {most} bytes of UTF-8.", minLength=at_least, maxLength=most)


def prompts(max_prompts: int | None = None) -> Meta:
    """Of a list that is texts, token ids, or lists of token ids: one of the kinds, not empty."""
    low, high = SamplingParams.BOUNDS["allowed_token_ids"]
    token_id = {"type": "integer", "minimum": low, "maximum": high}
    most = {} if max_prompts is None else {"maxItems": max_prompts}
    return says(
        "A text, several texts, the token ids of one prompt, or those of several; a prompt has at "
        "least one token.",
        minItems=1,
        anyOf=[
            {"items": {"type": "string"}, **most},
            {"items": token_id},
            {"items": {"type": "array", "items": token_id, "minItems": 1}, **most},
        ],
    )


TEMPERATURE = says(
    f"0 is the most likely token always; values between 0 and {MIN_TEMPERATURE} are refused.",
    **dict(zip(("minimum", "maximum"), SamplingParams.BOUNDS["temperature"], strict=True)),
    **{"not": {"exclusiveMinimum": 0, "exclusiveMaximum": MIN_TEMPERATURE}},
)
TOKEN_KEYS = says("A token id of the served model, in digits.", pattern=f"^({TOKEN_ID_TEXT})$")
BIASES = says(maxProperties=SamplingParams.LIMITS["logit_bias"][0])
PRIORITY = between(-MAX_PRIORITY, MAX_PRIORITY, "Lower runs first.")
TOOLS = says("Each of another name.", maxItems=MAX_TOOLS)
NEVER = says("Not supported: leave it out.", enum=[None])
NOT_TRUE = says("Not supported: leave it out.", enum=[None, False])

__all__ = [
    "ANSWER_TOKENS",
    "BIASES",
    "MAX_INPUTS",
    "MAX_KEPT",
    "MAX_TOOLS",
    "NEVER",
    "NOT_TRUE",
    "PRIORITY",
    "REQUEST_ID_LENGTH",
    "TEMPERATURE",
    "TOKEN_KEYS",
    "TOOLS",
    "between",
    "entries",
    "form",
    "prompts",
    "says",
    "text",
    "within",
]
