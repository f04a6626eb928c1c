"""StepPlan -> packed arrays: the only place where Python lists become arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernels.backend import SamplingInputs, StepInputs
from ..core import history
from ..core.plan import SAMPLE, ScheduledRequest, StepPlan
from ..core.request import Request, SamplingParams


def step_inputs(plan: StepPlan, block_size: int) -> StepInputs:
    """Pack a plan's tokens in order; shapes and meanings are StepInputs' own."""
    token_ids: list[int] = []
    logit_rows: list[int] = []
    query_start = [0]
    for s in plan.requests:
        first = len(token_ids)
        token_ids.extend(s.token_ids)
        logit_rows.extend(first + offset for offset in s.logit_offsets)
        query_start.append(len(token_ids))
    counts = np.array([s.num_tokens for s in plan.requests], dtype=np.int32)
    starts = np.array([s.start for s in plan.requests], dtype=np.int32)
    starts_of_token = np.repeat(starts - np.array(query_start[:-1], dtype=np.int32), counts)
    positions = np.arange(len(token_ids), dtype=np.int32) + starts_of_token
    widest = max(len(s.block_ids) for s in plan.requests)
    block_table = np.zeros((len(plan.requests), widest), dtype=np.int32)
    for row, s in enumerate(plan.requests):
        block_table[row, : len(s.block_ids)] = s.block_ids
    owner = np.repeat(np.arange(len(plan.requests)), counts)
    block_of_token = block_table[owner, positions // block_size]
    return StepInputs(
        token_ids=np.array(token_ids, dtype=np.int32),
        positions=positions,
        query_start=np.array(query_start, dtype=np.int32),
        seq_len=starts + counts,
        block_table=block_table,
        slot=block_of_token * np.int32(block_size) + positions % np.int32(block_size),
        logit_rows=np.array(logit_rows, dtype=np.int32),
    )


@dataclass(frozen=True)
class _Row:
    """One logit row: whose it is, the position of the token it predicts, and what to do there."""

    request: Request
    position: int
    target: int


@dataclass(frozen=True)
class _Constants:
    """What does not change from step to step while the same requests sample the same rows."""

    rows: tuple[tuple[Request, bool], ...]  # whose each row is, and whether it samples
    fields: dict[str, np.ndarray]
    history: bool  # whether any row may have entries of that kind
    bias: bool
    bans: bool


class SamplingInputsBuilder:
    """Builds the per-row sampling parameters; remembers those of the step before, and masks."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._masks: dict[Request, np.ndarray] = {}
        self._constants: _Constants | None = None

    def build(self, plan: StepPlan) -> SamplingInputs:
        """Rows in packed order; see SamplingInputs."""
        rows = [
            _Row(s.request, s.start + offset + 1, target)
            for s in plan.requests
            for offset, target in zip(s.logit_offsets, s.targets, strict=True)
        ]
        constants = self._constants_of(plan, rows)
        none: Sequence[_Entries] = [()] * len(rows)
        return SamplingInputs(
            **constants.fields,
            position=np.array([row.position for row in rows], dtype=np.uint32),
            target=np.array([row.target for row in rows], dtype=np.int32),
            **_csr("history", map(_history, rows) if constants.history else none, count=np.int32),
            **_csr("bias", map(_bias, rows) if constants.bias else none, values=np.float32),
            **_csr("ban", map(_bans, rows) if constants.bans else none),
        )

    def _constants_of(self, plan: StepPlan, rows: Sequence[_Row]) -> _Constants:
        owners = tuple([(row.request, row.target == SAMPLE) for row in rows])
        if self._constants is None or self._constants.rows != owners:
            self._constants = _Constants(owners, self._columns(plan, rows), *_entries_wanted(rows))
        return self._constants

    def _columns(self, plan: StepPlan, rows: Sequence[_Row]) -> dict[str, np.ndarray]:
        samples = [row.target == SAMPLE for row in rows]

        def column(name: str, off: float, dtype: Any) -> np.ndarray:
            return np.array(
                [
                    getattr(row.request.params, name) if sampled else off
                    for row, sampled in zip(rows, samples, strict=True)
                ],
                dtype=dtype,
            )

        mask_row, mask_table = self._mask(plan, rows)
        f32, i32 = np.float32, np.int32
        return {
            "temperature": column("temperature", 0.0, f32),
            "top_k": column("top_k", 0, i32),
            "top_p": column("top_p", 1.0, f32),
            "min_p": column("min_p", 0.0, f32),
            "typical_p": column("typical_p", 1.0, f32),
            "top_n_sigma": column("top_n_sigma", 0.0, f32),
            "xtc_probability": column("xtc_probability", 0.0, f32),
            "xtc_threshold": column("xtc_threshold", 0.1, f32),
            "repetition_penalty": column("repetition_penalty", 1.0, f32),
            "presence_penalty": column("presence_penalty", 0.0, f32),
            "frequency_penalty": column("frequency_penalty", 0.0, f32),
            "seed": np.array([row.request.seed for row in rows], dtype=np.uint64),
            "sample_index": np.array([row.request.sample_index for row in rows], dtype=np.uint32),
            "num_logprobs": np.array([_num_logprobs(row) for row in rows], dtype=i32),
            "mask_row": mask_row,
            "mask_table": mask_table,
        }

    def _mask(self, plan: StepPlan, rows: Sequence[_Row]) -> tuple[np.ndarray, np.ndarray]:
        words = -(-self._vocab_size // 32)
        live: dict[Request, np.ndarray] = {}
        for s in plan.requests:
            if s.samples and s.request.params.allowed_token_ids is not None:
                known = self._masks.get(s.request)
                live[s.request] = _bitmask(s, words) if known is None else known
        self._masks = live
        place = {request: i + 1 for i, request in enumerate(live)}
        everything = np.full(words, 0xFFFFFFFF, dtype=np.uint32)
        mask_row = [place.get(row.request, 0) if row.target == SAMPLE else 0 for row in rows]
        return np.array(mask_row, dtype=np.int32), np.stack([everything, *live.values()])


def _entries_wanted(rows: Sequence[_Row]) -> tuple[bool, bool, bool]:
    """Whether any row may have history, bias or ban entries."""
    params = [row.request.params for row in rows if row.target == SAMPLE]
    return (
        any(_penalised(p) for p in params),
        any(p.logit_bias or p.dry_multiplier for p in params),
        any(p.min_tokens or p.no_repeat_ngram_size or p.bad_words for p in params),
    )


def _penalised(p: SamplingParams) -> bool:
    return bool(p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty)


def _bitmask(scheduled: ScheduledRequest, words: int) -> np.ndarray:
    bits = np.zeros(words * 32, dtype=np.uint8)
    bits[list(scheduled.request.params.allowed_token_ids or ())] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _num_logprobs(row: _Row) -> int:
    params = row.request.params
    if row.target != SAMPLE:
        return params.prompt_logprobs or 0
    if params.logprobs is not None:
        return params.logprobs
    ranked = params.best_of is not None and params.best_of > params.n
    return 0 if ranked else -1  # best_of ranks its samples by their logprobs


_Entries = Sequence[tuple[int, float]]


def _history(row: _Row) -> _Entries:
    p = row.request.params
    if row.target != SAMPLE or not _penalised(p):
        return ()
    counts = history.token_counts(row.request.prompt_token_ids, row.request.output_token_ids)
    return sorted(counts.items())


def _bias(row: _Row) -> _Entries:
    p = row.request.params
    if row.target != SAMPLE or not (p.logit_bias or p.dry_multiplier):
        return ()
    bias = dict(p.logit_bias or {})
    if p.dry_multiplier:
        tokens = _tokens(row)
        dry = history.dry_penalties(tokens, p, row.request.dry_breaker_ids)
        for token, penalty in dry.items():
            bias[token] = bias.get(token, 0.0) - penalty
    return sorted(bias.items())


def _bans(row: _Row) -> _Entries:
    request, p = row.request, row.request.params
    if row.target != SAMPLE:
        return ()
    banned: set[int] = set()
    if request.num_output_tokens < p.min_tokens:
        banned |= request.eos_token_ids | set(p.stop_token_ids)
    if p.no_repeat_ngram_size:
        banned |= set(history.banned_ngram_tokens(_tokens(row), p.no_repeat_ngram_size))
    if request.bad_word_ids:
        banned |= set(history.bad_word_bans(request.output_token_ids, request.bad_word_ids))
    return [(token, 0.0) for token in sorted(banned)]


def _tokens(row: _Row) -> list[int]:
    return row.request.known_token_ids


def _csr(prefix: str, rows: Iterable[_Entries], **values: Any) -> dict[str, np.ndarray]:
    """Rows of (token id, value) as the arrays `prefix`_start, _ids and, where asked, the values."""
    rows = list(rows)
    starts = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    flat = [entry for row in rows for entry in row]
    out = {
        f"{prefix}_start": starts,
        f"{prefix}_ids": np.array([token for token, _ in flat], dtype=np.int32),
    }
    for name, dtype in values.items():
        out[f"{prefix}_{name}"] = np.array([value for _, value in flat], dtype=dtype)
    return out
