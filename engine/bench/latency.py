"""`engineroom bench latency`: how long one stream alone waits for its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np

from ..config import EngineConfig
from ..tools.session import open_engine
from .bound import Bound, share
from .model import LEAD, Subject, arrivals, publish, rounds
from .spread import spread, spread_columns
from .tables import Column, Table
from .timing import Repeats

_COLUMNS = (
    *LEAD,
    *spread_columns("first", "first token"),
    Column("first_share", "% of limit", 1),
    *spread_columns("between", "between tokens"),
    Column("between_share", "% of limit", 1),
    *spread_columns("whole", "end to end"),
)


def figures(streams: Sequence[Sequence[float]]) -> dict[str, float]:
    """Cells from each repetition's arrivals: seconds since the request, per token."""
    return {
        **spread("first", [stream[0] for stream in streams]),
        **spread("between", [b - a for stream in streams for a, b in pairwise(stream)]),
        **spread("whole", [stream[-1] for stream in streams]),
    }


def run(
    config: EngineConfig,
    *,
    inputs: Sequence[int],
    outputs: Sequence[int],
    repeats: Repeats,
    paths: Mapping[str, str | None],
) -> int:
    """Measure every input length with every output length, print the table, write the files."""
    subject, rng = Subject.of(config), np.random.default_rng(0)
    engine = open_engine(config)
    bound = Bound(engine)
    rows: list[dict[str, Any]] = []
    try:
        for input_len, output_len in product(inputs, outputs):
            once = partial(arrivals, engine, rng, 1, input_len, output_len, streamed=True)
            results = rounds(f"{input_len} in, {output_len} out", repeats, once)
            cells = figures([streams[0] for streams in results])
            middle = input_len + output_len // 2
            for key, least in (
                ("first", bound.prompt_s(input_len)),
                ("between", bound.decode_s(1, middle)),
            ):
                cells |= share(f"{key}_share", least, cells.get(f"{key}_median_ms"))
            rows.append(subject.row(1, input_len, output_len, repeats) | cells)
        publish(Table("Latency", _COLUMNS, rows), config, engine.loaded.backend.describe(), paths)
    finally:
        engine.close()
    return 0
