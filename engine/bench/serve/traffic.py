"""What is sent and when: lengths, texts and moments of requests, all of them from one seed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

# Every tokenizer has most of these as one token, so that a text's tokens grow with its words.
_TEXT = """
the of and to in is you that it he was for on are as with his they at be this have from or one had
by word but not what all were we when your can said there use an each which she do how their if
will up other about out many then them these so some her would make like him into time has look
two more write go see number no way could people my than first water been call who oil its now
find long down day did get come made may part
"""
_WORDS = tuple(_TEXT.split())
_SIGMA = 1.0  # of the logarithm: a long tail, as in logs of conversations


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers: all alike, or lognormal about these means.

    Means of 161 and 338 with a lognormal spread are near those of the ShareGPT conversations that
    servers are commonly measured with (Kwon et al. 2023, https://arxiv.org/abs/2309.06180).
    """

    input_mean: int
    output_mean: int
    spread: str = "fixed"  # or "lognormal"

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """One request's; a lognormal one lies between 4 tokens and 8 times the mean."""
        return self._one(rng, self.input_mean), self._one(rng, self.output_mean)

    def _one(self, rng: random.Random, mean: int) -> int:
        if self.spread == "fixed":
            return mean
        drawn = rng.lognormvariate(math.log(mean) - _SIGMA**2 / 2, _SIGMA)
        return max(4, min(8 * mean, round(drawn)))


@dataclass(frozen=True)
class Load:
    """How requests arrive: at `rate` a second by a Poisson process, or from `users` who each send
    the next when the last is answered. Exactly one is set; a rate of inf sends all at once."""

    rate: float | None = None
    users: int | None = None

    @property
    def name(self) -> str:
        if self.users is not None:
            return f"{self.users} user{'s' * (self.users != 1)}"
        return "all at once" if self.rate == math.inf else f"{self.rate:g}/s"


@dataclass(frozen=True)
class Planned:
    """One request: when it is sent, in seconds from the start (0 where a user sends it as soon as
    free), its text and the tokens asked for."""

    at: float
    prompt: str
    output_len: int


def plan(
    load: Load, count: int, lengths: Lengths, words_per_token: float, seed: int
) -> Sequence[Planned]:
    """`count` requests. The texts differ from each other from their first word on, so that no
    prefix cache helps."""
    rng = random.Random(seed)
    at, planned = 0.0, []
    for _ in range(count):
        if load.rate is not None and load.rate != math.inf:
            at += rng.expovariate(load.rate)
        input_len, output_len = lengths.draw(rng)
        planned.append(Planned(at, text(rng, input_len, words_per_token), output_len))
    return planned


def text(rng: random.Random, tokens: int, words_per_token: float) -> str:
    """Words of about so many tokens, one at least."""
    return " ".join(rng.choices(_WORDS, k=max(1, round(tokens * words_per_token))))
