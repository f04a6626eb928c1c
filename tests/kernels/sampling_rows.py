"""SamplingInputs from a list of per-row dictionaries: what the sampling tests speak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engineroom.kernels.backend import SamplingInputs

COLUMNS: dict[str, tuple[Any, Any]] = {
    "temperature": (1.0, np.float32),
    "top_k": (0, np.int32),
    "top_p": (1.0, np.float32),
    "min_p": (0.0, np.float32),
    "typical_p": (1.0, np.float32),
    "top_n_sigma": (0.0, np.float32),
    "xtc_probability": (0.0, np.float32),
    "xtc_threshold": (0.1, np.float32),
    "repetition_penalty": (1.0, np.float32),
    "presence_penalty": (0.0, np.float32),
    "frequency_penalty": (0.0, np.float32),
    "seed": (0, np.uint64),
    "sample_index": (0, np.uint32),
    "position": (0, np.uint32),
    "target": (-1, np.int32),
    "num_logprobs": (-1, np.int32),
}
# token id -> count, token id -> value, token ids, allowed token ids (None: all)
SPARSE = ("history", "bias", "ban", "allowed")


def inputs(rows: Sequence[Mapping[str, Any]], vocab_size: int) -> SamplingInputs:
    """Rows of {column: value}, missing ones at their defaults, as SamplingInputs."""
    for row in rows:
        unknown = set(row) - set(COLUMNS) - set(SPARSE)
        if unknown:
            raise KeyError(f"no such sampling parameter: {sorted(unknown)}")
    columns = {
        name: np.array([row.get(name, default) for row in rows], dtype=dtype)
        for name, (default, dtype) in COLUMNS.items()
    }
    history = [sorted(dict(row.get("history", {})).items()) for row in rows]
    bias = [sorted(dict(row.get("bias", {})).items()) for row in rows]
    ban = [sorted(row.get("ban", ())) for row in rows]
    masks = [np.full(-(-vocab_size // 32), 0xFFFFFFFF, dtype=np.uint32)]
    mask_row = []
    for row in rows:
        allowed = row.get("allowed")
        mask_row.append(0 if allowed is None else len(masks))
        if allowed is not None:
            mask = np.zeros_like(masks[0])
            for token in allowed:
                mask[token // 32] |= np.uint32(1 << token % 32)
            masks.append(mask)
    return SamplingInputs(
        **columns,
        history_start=_starts(history),
        history_ids=np.array([t for row in history for t, _ in row], dtype=np.int32),
        history_count=np.array([c for row in history for _, c in row], dtype=np.int32),
        bias_start=_starts(bias),
        bias_ids=np.array([t for row in bias for t, _ in row], dtype=np.int32),
        bias_values=np.array([v for row in bias for _, v in row], dtype=np.float32),
        ban_start=_starts(ban),
        ban_ids=np.array([t for row in ban for t in row], dtype=np.int32),
        mask_row=np.array(mask_row, dtype=np.int32),
        mask_table=np.stack(masks),
    )


def _starts(rows: Sequence[Sequence[Any]]) -> np.ndarray:
    return np.cumsum([0, *(len(row) for row in rows)]).astype(np.int32)
