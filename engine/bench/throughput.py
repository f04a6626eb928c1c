"""`engineroom bench throughput`: tokens a second of requests that all come at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from ..config import EngineConfig
from ..tools.session import open_engine
from .bound import Bound, share
from .model import LEAD, Subject, arrivals, publish, rounds
from .spread import spread, spread_columns
from .tables import Column, Table
from .timing import Repeats, percentile

_COLUMNS = (
    *LEAD,
    Column("input_tokens_s", "in tok/s", 1),
    Column("output_tokens_s", "out tok/s", 1),
    Column("total_tokens_s", "total tok/s", 1),
    Column("requests_s", "requests/s", 2),
    Column("share", "% of limit", 1),
    *spread_columns("whole", "end to end"),
)


def figures(ends: Sequence[Sequence[float]], input_len: int, output_len: int) -> dict[str, float]:
    """Cells from each repetition's requests: seconds from the start of all to the end of each.

    Rates are of the repetition of median length, from its start to its last request's end.
    """
    requests_s = len(ends[0]) / percentile([max(times) for times in ends], 50)
    return {
        "input_tokens_s": requests_s * input_len,
        "output_tokens_s": requests_s * output_len,
        "total_tokens_s": requests_s * (input_len + output_len),
        "requests_s": requests_s,
        **spread("whole", [end for times in ends for end in times]),
    }


def run(
    config: EngineConfig,
    *,
    requests: Sequence[int],
    inputs: Sequence[int],
    outputs: Sequence[int],
    repeats: Repeats,
    paths: Mapping[str, str | None],
) -> int:
    """Measure every number of requests and lengths, print the table, write the files."""
    subject, rng = Subject.of(config), np.random.default_rng(0)
    engine = open_engine(config)
    bound = Bound(engine)
    rows: list[dict[str, Any]] = []
    try:
        for count, input_len, output_len in product(requests, inputs, outputs):
            once = partial(arrivals, engine, rng, count, input_len, output_len, streamed=False)
            what = f"{count} requests, {input_len} in, {output_len} out"
            ends = [[s[-1] for s in streams] for streams in rounds(what, repeats, once)]
            cells = figures(ends, input_len, output_len)
            least = bound.run_s(count, input_len, output_len)
            cells |= share("share", least, 1e3 * count / cells["requests_s"])
            rows.append(subject.row(count, input_len, output_len, repeats) | cells)
        backend = engine.loaded.backend.describe()
        publish(Table("Throughput", _COLUMNS, rows), config, backend, paths)
    finally:
        engine.close()
    return 0
