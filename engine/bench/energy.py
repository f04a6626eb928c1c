"""`engineroom bench energy`: joules of a request alone and beside others, tokens for a joule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from ..config import EngineConfig
from ..core.cost import Cost
from ..core.sampling_params import SamplingParams
from ..engine import Engine
from ..tools.session import open_engine, raise_failure
from .model import LEAD, Subject, publish, rounds
from .tables import Column, Table
from .timing import Repeats, percentile

_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
_COLUMNS = (
    *LEAD,
    Column("joules_request", "J/request", 3),
    Column("tokens_joule", "out tok/J", 2),
    Column("cost_alone", "of alone", 2),
    Column("estimated", "estimated"),
)


def costs(
    engine: Engine, rng: np.random.Generator, count: int, input_len: int, output_len: int
) -> list[Cost]:
    """Of `count` requests of random token ids that come at once and write `output_len` tokens.

    Errors: AdmissionError, RequestFailed; RuntimeError where the meter fails.
    """
    params = _GREEDY.replace(max_tokens=output_len)
    prompts = rng.integers(0, engine.model_config.vocab_size, (count, input_len)).tolist()
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params, final_only=True)
    found: list[Cost] = []
    while engine.has_work:
        for output in engine.step():
            raise_failure(output)
            if output.cost is None:
                raise RuntimeError("the meter of energy failed; the log says why")
            found.append(output.cost)
    return found


def figures(
    found: Sequence[Sequence[Cost]], output_len: int, alone: float | None
) -> dict[str, Any]:
    """Cells from each repetition's costs: of the repetition with the median sum.

    alone: joules of a request of the same lengths by itself, where that was measured.
    """
    joules = percentile([sum(c.joules for c in costs) for costs in found], 50) / len(found[0])
    return {
        "joules_request": joules,
        "tokens_joule": output_len / joules if joules else None,
        "cost_alone": joules / alone if alone else None,
        "estimated": found[0][0].estimated,
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
    rows: list[dict[str, Any]] = []
    try:
        for input_len, output_len in product(inputs, outputs):
            alone = None
            for count in sorted(requests):
                once = partial(costs, engine, rng, count, input_len, output_len)
                what = f"{count} requests, {input_len} in, {output_len} out"
                cells = figures(rounds(what, repeats, once), output_len, alone)
                if count == 1:
                    alone = cells["joules_request"]
                    cells["cost_alone"] = 1.0
                rows.append(subject.row(count, input_len, output_len, repeats) | cells)
        meter = {"meter": engine.stats().energy.meter}
        backend = {**engine.loaded.backend.describe(), **meter}
        publish(Table("Energy", _COLUMNS, rows), config, backend, paths)
    finally:
        engine.close()
    return 0
