"""StepPlan -> packed arrays: the only place where Python lists become arrays."""

from __future__ import annotations

import dataclasses
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ...kernels.backend import SamplingInputs, StepInputs
from ..core import history
from ..core.plan import SAMPLE, Roster, StepPlan
from ..core.request import PENDING, Request
from ..core.sampling_params import SamplingParams


class _Layout:
    """Where a roster's tokens and logit rows lie in the packed step; and its last step's places in
    sequences and cache."""

    def __init__(self, plan: StepPlan, block_size: int) -> None:
        roster = plan.roster
        counts = np.array([share.num_tokens for share in roster.shares], dtype=np.int32)
        first = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(counts, out=first[1:])
        self.roster = roster
        self.step_id = plan.step_id
        self.counts = counts  # [S] tokens of each
        self.query_start = first  # [S + 1]
        self.owner = np.repeat(np.arange(len(counts)), counts)  # [T] whose each token is
        self.strides = counts[self.owner]  # [T] by how much its position grows from step to step
        start = np.array(plan.starts, dtype=np.int32)
        self.seq_len = start + counts  # [S]
        within = np.arange(first[-1], dtype=np.int32) - first[self.owner]
        self.positions = start[self.owner] + within  # [T]
        offsets = [share.logit_offsets for share in roster.shares]
        self.logit_rows = _int32(
            start + offset
            for start, wanted in zip(first.tolist(), offsets, strict=False)
            for offset in wanted
        )
        self._tables = _BlockTables(roster)
        self._block_size = block_size
        self.slot = self._slots()  # [T]

    @property
    def block_table(self) -> np.ndarray:
        return self._tables.array

    def _slots(self) -> np.ndarray:
        """Where in the cache each position lies, by tables that may have grown."""
        self._tables.grow()
        size = np.int32(self._block_size)
        block, offset = np.divmod(self.positions, size)
        slots: np.ndarray = self.block_table[self.owner, block] * size + offset
        return slots

    def leads_to(self, plan: StepPlan) -> bool:
        """Whether the plan is the one behind, of the same roster."""
        return plan.roster is self.roster and plan.step_id == self.step_id + 1

    def go_on(self, plan: StepPlan) -> None:
        """To the roster's next step."""
        self.step_id += 1
        self.seq_len = self.seq_len + self.counts
        self.positions = self.positions + self.strides
        if plan.turned is None:
            self.slot = self._slots()
            return
        self.slot = self.slot + self.strides
        size = self._block_size
        for place in plan.turned:
            self.slot[place] = size * self._tables.at(place, plan.starts[place] // size)


class StepInputsBuilder:
    """Packs plans; remembers what the one before was laid out like, for the same roster again."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._layout: _Layout | None = None

    def build(self, plan: StepPlan, before: StepPlan | None = None) -> StepInputs:
        """The plan's tokens in order; shapes and meanings are StepInputs' own. The block table is
        valid until the next call.

        `before` is the plan still in flight, if any, that samples the tokens not known yet.
        """
        layout = self._layout
        if layout is not None and layout.leads_to(plan):
            layout.go_on(plan)
        else:
            layout = self._layout = _Layout(plan, self._block_size)
        if before is not None and plan.turned is not None:  # each is its own row's of `before`
            token_ids = np.invert(layout.query_start[:-1])
        else:
            token_ids = np.array(plan.token_ids, dtype=np.int32)
            if before is not None:
                _name_pending(token_ids, layout, before)
        return StepInputs(
            token_ids,
            layout.positions,
            layout.query_start,
            layout.seq_len,
            layout.block_table,
            layout.slot,
            layout.logit_rows,
        )


def _name_pending(token_ids: np.ndarray, layout: _Layout, before: StepPlan) -> None:
    """Put the row of `before` that samples it, as -1 - row, in the place of each PENDING token:
    the last of its request."""
    requests = before.roster.requests
    rows = {requests[place]: row for place, row in before.roster.sampling_rows}
    ends = layout.query_start[1:].tolist()
    for request, end in zip(layout.roster.requests, ends, strict=True):
        if token_ids[end - 1] == PENDING:
            token_ids[end - 1] = -1 - rows[request]


class _BlockTables:
    """A roster's tables as one array. They only grow: what they grew by is added."""

    def __init__(self, roster: Roster) -> None:
        self._tables = roster.tables
        self._lengths = [0] * len(roster.tables)  # what the array holds of each
        self.array = np.zeros((len(roster.tables), 0), dtype=np.int32)  # zero behind a table's end

    def grow(self) -> None:
        """Take in all that grew."""
        for place, table in enumerate(self._tables):
            if len(table) > self._lengths[place]:
                self._take(place, table)

    def at(self, place: int, index: int) -> int:
        """An entry of a table that may have grown."""
        table = self._tables[place]
        if len(table) > self._lengths[place]:
            self._take(place, table)
        return table[index]

    def _take(self, place: int, table: Sequence[int]) -> None:
        width = self.array.shape[1]
        if len(table) > width:
            wider = np.zeros((len(self._tables), max(map(len, self._tables))), dtype=np.int32)
            wider[:, :width] = self.array
            self.array = wider
        first, self._lengths[place] = self._lengths[place], len(table)
        self.array[place, first : len(table)] = table[first:]


@dataclass(frozen=True, slots=True)
class _Row:
    """One logit row: whose it is, and whether it samples (or scores a prompt token)."""

    request: Request
    samples: bool


@dataclass(frozen=True)
class _Constants:
    """What does not change from step to step of one roster."""

    roster: Roster
    rows: Sequence[_Row]
    inputs: SamplingInputs  # but for its position
    bias: bool  # whether any row may have entries of that kind
    bans: bool
    forms: bool  # whether any row has a mask that changes


class SamplingInputsBuilder:
    """Builds the per-row sampling parameters; remembers those of the step before, and masks."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._masks: dict[Request, np.ndarray] = {}
        self._seen: dict[Request, _Seen] = {}
        self._constants: _Constants | None = None

    def build(self, plan: StepPlan, step: StepInputs) -> SamplingInputs:
        """Rows in packed order; `step` are the plan's own inputs. See SamplingInputs.

        Penalties, bans and the like read the tokens so far: those sampled by earlier plans must
        be known. What the rows of a request that has ended meanwhile hold is of no account.
        """
        constants = self._constants
        if constants is None or constants.roster is not plan.roster:
            constants = self._constants = self._constants_of(plan.roster)
        if plan.turned is None:
            position = step.positions[step.logit_rows] + 1
        else:
            position = step.seq_len
        changing: dict[str, np.ndarray] = {}
        if self._seen:
            changing |= self._history(constants.rows)
        if constants.bias:
            changing |= _csr("bias", map(_bias, constants.rows), values=np.float32)
        if constants.bans:
            changing |= _csr("ban", map(_bans, constants.rows))
        if constants.forms:
            changing["mask_table"] = self._form_masks(constants)
        if not changing:
            return constants.inputs.at(position.view(np.uint32))
        return dataclasses.replace(constants.inputs, position=position.view(np.uint32), **changing)

    def _constants_of(self, roster: Roster) -> _Constants:
        targets = [share.targets for share in roster.shares]
        rows = [
            _Row(request, target == SAMPLE)
            for request, wanted in zip(roster.requests, targets, strict=True)
            for target in wanted
        ]
        params = [row.request.params for row in rows if row.samples]
        self._seen = {
            row.request: self._seen.get(row.request) or _Seen(row.request)
            for row in rows
            if row.samples and _penalised(row.request.params)
        }
        return _Constants(
            roster,
            rows,
            self._inputs(rows, _int32(chain.from_iterable(targets))),
            any(p.logit_bias or p.dry_multiplier for p in params),
            any(p.min_tokens or p.no_repeat_ngram_size or p.bad_words for p in params),
            any(row.samples and row.request.form.masks for row in rows),
        )

    def _inputs(self, rows: Sequence[_Row], target: np.ndarray) -> SamplingInputs:
        def column(name: str, off: float, dtype: Any) -> np.ndarray:
            return np.array(
                [getattr(row.request.params, name) if row.samples else off for row in rows],
                dtype=dtype,
            )

        mask_row, mask_table = self._mask(rows)
        f32, i32 = np.float32, np.int32
        none: Sequence[_Entries] = [()] * len(rows)
        return SamplingInputs(
            temperature=column("temperature", 0.0, f32),
            top_k=column("top_k", 0, i32),
            top_p=column("top_p", 1.0, f32),
            min_p=column("min_p", 0.0, f32),
            typical_p=column("typical_p", 1.0, f32),
            top_n_sigma=column("top_n_sigma", 0.0, f32),
            xtc_probability=column("xtc_probability", 0.0, f32),
            xtc_threshold=column("xtc_threshold", 0.1, f32),
            repetition_penalty=column("repetition_penalty", 1.0, f32),
            presence_penalty=column("presence_penalty", 0.0, f32),
            frequency_penalty=column("frequency_penalty", 0.0, f32),
            seed=np.array([row.request.seed for row in rows], dtype=np.uint64),
            sample_index=np.array([row.request.sample_index for row in rows], dtype=np.uint32),
            num_logprobs=np.array([_num_logprobs(row) for row in rows], dtype=i32),
            position=np.zeros(len(rows), dtype=np.uint32),
            target=target,
            mask_row=mask_row,
            mask_table=mask_table,
            **_csr("history", none, count=i32),
            **_csr("bias", none, values=f32),
            **_csr("ban", none),
        )

    def _history(self, rows: Sequence[_Row]) -> dict[str, np.ndarray]:
        seen = [self._seen.get(row.request) if row.samples else None for row in rows]
        ids: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        for entry in filter(None, seen):
            entry.catch_up()
            ids.append(np.frombuffer(entry.ids, np.int32))
            counts.append(np.frombuffer(entry.counts, np.int32))
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum([len(entry.ids) if entry else 0 for entry in seen], out=starts[1:])
        return {
            "history_start": starts,
            "history_ids": np.concatenate(ids),
            "history_count": np.concatenate(counts),
        }

    def _mask(self, rows: Sequence[_Row]) -> tuple[np.ndarray, np.ndarray]:
        words = -(-self._vocab_size // 32)
        live: dict[Request, np.ndarray] = {}
        for row in rows:
            request = row.request
            if row.samples and request.form.masks:
                live[request] = np.zeros(words, dtype=np.uint32)  # filled in every step
            elif row.samples and request.params.allowed_token_ids is not None:
                known = self._masks.get(request)
                live[request] = _bitmask(request, words) if known is None else known
        self._masks = live
        place = {request: i + 1 for i, request in enumerate(live)}
        everything = np.full(words, 0xFFFFFFFF, dtype=np.uint32)
        mask_row = [place.get(row.request, 0) if row.samples else 0 for row in rows]
        return np.array(mask_row, dtype=np.int32), np.stack([everything, *live.values()])

    def _form_masks(self, constants: _Constants) -> np.ndarray:
        """The mask table with this step's rows of those whose output has a form."""
        table: np.ndarray = constants.inputs.mask_table.copy()
        places = constants.inputs.mask_row.tolist()
        for row, place in zip(constants.rows, places, strict=True):
            if row.samples and row.request.form.masks:
                table[place] = row.request.form.mask()
        return table


def _penalised(p: SamplingParams) -> bool:
    return bool(p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty)


def _bitmask(request: Request, words: int) -> np.ndarray:
    bits = np.zeros(words * 32, dtype=np.uint8)
    bits[list(request.params.allowed_token_ids or ())] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _num_logprobs(row: _Row) -> int:
    params = row.request.params
    if not row.samples:
        return params.prompt_logprobs or 0
    if params.logprobs is not None:
        return params.logprobs
    ranked = params.best_of is not None and params.best_of > params.n
    return 0 if ranked else -1  # best_of ranks its samples by their logprobs


_Entries = Sequence[tuple[int, float]]


class _Seen:
    """What history.token_counts() says of a request, kept as the request grows: counting anew
    would take every step as long as its sequence."""

    def __init__(self, request: Request) -> None:
        output = request.output_token_ids
        counts = history.token_counts(request.prompt_token_ids, output)
        self._request = request
        self._num_output = len(output)
        self.ids = array("i", counts)  # ascending
        self.counts = array("i", counts.values())

    def catch_up(self) -> None:
        """Count the tokens known since."""
        request, known = self._request, self._num_output
        self._num_output = request.num_output_tokens
        start = request.num_prompt_tokens
        for token in request.token_ids[start + known : start + self._num_output]:
            place = bisect_left(self.ids, token)
            if place < len(self.ids) and self.ids[place] == token:
                self.counts[place] += 1
            else:
                self.ids.insert(place, token)
                self.counts.insert(place, 1)


def _bias(row: _Row) -> _Entries:
    p = row.request.params
    if not row.samples or not (p.logit_bias or p.dry_multiplier):
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
    if not row.samples:
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


def _int32(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), dtype=np.int32)


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
