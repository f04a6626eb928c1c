"""The sampling program once more, written from the definitions in plain Python and float64.

Shares nothing with kernels/sampling.py but the uniforms it is given. Where a decision hangs on
less than `SLACK` (a mass within SLACK of the border, two scores nearer than that) a float64 oracle
cannot judge fp32, so a result says whether it is `sure`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SLACK = 2e-5
NO_TOKEN = -1


@dataclass
class Doubt:
    """Smallest distance from any decision's border seen so far."""

    least: float = field(default=math.inf)

    def near(self, distance: float) -> None:
        self.least = min(self.least, abs(distance))

    @property
    def sure(self) -> bool:
        return self.least > SLACK


Kept = dict[int, float]  # token id -> logit


def probabilities(kept: Kept) -> Kept:
    top = max(kept.values())
    total = math.fsum(math.exp(x - top) for x in kept.values())
    return {i: math.exp(x - top) / total for i, x in kept.items()}


def top_n_sigma(kept: Kept, n: float, doubt: Doubt) -> Kept:
    mean = math.fsum(kept.values()) / len(kept)
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in kept.values()) / len(kept))
    top = max(kept.values())
    spread = top - min(kept.values())
    for x in kept.values():
        if x != top:
            doubt.near((x - (top - n * sigma)) / spread)
    return {i: x for i, x in kept.items() if x == top or x >= top - n * sigma}


def top_k(kept: Kept, k: int, doubt: Doubt) -> Kept:
    order = sorted(kept, key=lambda i: (-kept[i], i))
    return {i: kept[i] for i in order[:k]}


def _prefix(kept: Kept, order: Sequence[int], mass: float, doubt: Doubt) -> Kept:
    p = probabilities(kept)
    out: Kept = {}
    total = 0.0
    for i in order:
        out[i] = kept[i]
        total += p[i]
        if len(out) < len(kept):
            doubt.near(total - mass)
        if total >= mass:
            break
    return out


def top_p(kept: Kept, mass: float, doubt: Doubt) -> Kept:
    return _prefix(kept, sorted(kept, key=lambda i: (-kept[i], i)), mass, doubt)


def typical_p(kept: Kept, mass: float, doubt: Doubt) -> Kept:
    p = probabilities(kept)
    entropy = -math.fsum(q * math.log(q) for q in p.values() if q > 0)
    top = max(kept.values())
    log_total = math.log(math.fsum(math.exp(x - top) for x in kept.values()))
    score = {i: abs((top + log_total - x) - entropy) for i, x in kept.items()}
    # Equal logits tie exactly; others whose scores all but meet cannot be ordered from here.
    order = sorted(kept, key=lambda i: (score[i], i))
    for a, b in itertools.pairwise(order):
        if kept[a] != kept[b]:
            doubt.near(score[b] - score[a])
    return _prefix(kept, order, mass, doubt)


def min_p(kept: Kept, least: float, doubt: Doubt) -> Kept:
    top = max(kept.values())
    for x in kept.values():
        doubt.near(math.exp(x - top) - least)
    return {i: x for i, x in kept.items() if math.exp(x - top) >= least}


def xtc(kept: Kept, threshold: float, doubt: Doubt) -> Kept:
    p = probabilities(kept)
    for q in p.values():
        doubt.near(q - threshold)
    above = [i for i in sorted(kept, key=lambda i: (-kept[i], i)) if p[i] >= threshold]
    return {i: x for i, x in kept.items() if i not in above[:-1]}


def adjust(logits: Sequence[float], row: Mapping[str, Any]) -> list[float]:
    x = list(logits)
    for token, value in dict(row.get("bias", {})).items():
        x[token] += value
    allowed = row.get("allowed")
    for token in range(len(x)):
        if token in row.get("ban", ()) or (allowed is not None and token not in allowed):
            x[token] = -math.inf
    for token, count in dict(row.get("history", {})).items():
        penalty = row.get("repetition_penalty", 1.0)
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
        x[token] -= count * row.get("frequency_penalty", 0.0)
        x[token] -= row.get("presence_penalty", 0.0) if count else 0.0
    return x


def choose(
    logits: Sequence[float], row: Mapping[str, Any], uniform: Callable[[int], Sequence[float]]
) -> tuple[int, bool]:
    """(token, sure) for one row; uniform(stream) gives one number per token id."""
    doubt = Doubt()
    x = adjust(logits, row)
    kept = {i: v for i, v in enumerate(x) if v > -math.inf}
    if not kept:
        return NO_TOKEN, True
    if row.get("temperature", 1.0) == 0:
        order = sorted(kept, key=lambda i: (-kept[i], i))
        if len(order) > 1 and kept[order[0]] != kept[order[1]]:
            doubt.near(kept[order[0]] - kept[order[1]])
        return order[0], doubt.sure
    if row.get("top_n_sigma", 0.0) > 0:
        kept = top_n_sigma(kept, row["top_n_sigma"], doubt)
    kept = {i: v / row.get("temperature", 1.0) for i, v in kept.items()}
    if row.get("top_k", 0) > 0:
        kept = top_k(kept, row["top_k"], doubt)
    if row.get("typical_p", 1.0) < 1:
        kept = typical_p(kept, row["typical_p"], doubt)
    if row.get("top_p", 1.0) < 1:
        kept = top_p(kept, row["top_p"], doubt)
    if row.get("min_p", 0.0) > 0:
        kept = min_p(kept, row["min_p"], doubt)
    if uniform(1)[0] < row.get("xtc_probability", 0.0):
        kept = xtc(kept, row.get("xtc_threshold", 0.1), doubt)
    noise = uniform(0)
    score = {i: v - math.log(-math.log1p(-float(noise[i]))) for i, v in kept.items()}
    order = sorted(kept, key=lambda i: -score[i])
    if len(order) > 1:
        doubt.near(score[order[0]] - score[order[1]])
    return order[0], doubt.sure


def logprobs(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    log_total = math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - top - log_total for x in logits]
