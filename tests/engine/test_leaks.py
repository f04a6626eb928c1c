"""What a request leaves behind in an engine of ours once it is over: nothing."""

from __future__ import annotations

import gc
import itertools
import random
import sys

import pytest

from engineroom.engine.config import EngineConfig
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.core.steplog import StepLog
from engineroom.engine.engine import Engine
from tests.counts import count
from tests.data import data_path
from tests.load.stories260k import convert

WINDOWS = 5
REQUESTS = count(reduced=40, full=400)  # of each window


@pytest.fixture
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = data_path("stories260K/stories260K.bin").parent
    model = convert(folder, tmp_path_factory.mktemp("stories260K"))["hf"]
    config = EngineConfig(model=str(model), max_num_seqs=8, num_blocks=120, max_model_len=256)
    engine = Engine.from_model(str(model), config)
    engine.log = StepLog(4)  # bounded, and soon full
    return engine


def run(engine: Engine, window: int, rng: random.Random) -> None:
    """Requests of every form, more than run at once, some of them aborted."""
    forms = itertools.cycle(
        [
            {"growths": True},
            {"final_only": True},
            {"params": SamplingParams(temperature=0.8, seed=1, max_tokens=12, n=2, logprobs=2)},
            {"params": SamplingParams(seed=1, max_tokens=12, prompt_logprobs=1, stop=("the end",))},
            {"growths": True, "tenant": "one"},
            {"embed": True, "params": SamplingParams()},
        ]
    )
    live = set()
    for number, form in zip(range(REQUESTS), forms, strict=False):
        prompt = [rng.randrange(3, 500) for _ in range(rng.randrange(1, 40))]
        params = form.get("params") or SamplingParams(seed=number, max_tokens=rng.randrange(1, 16))
        rid = f"{window}-{number}"
        engine.add_request(rid, prompt, params, **{k: v for k, v in form.items() if k != "params"})
        live.add(rid)
        if rng.random() < 0.2:
            engine.abort(rng.choice(sorted(live)))
        for output in engine.step():
            if output.finished:
                live.discard(output.request_id)
        engine.take_growths()
    while engine.has_work:
        engine.step()
        engine.take_growths()


def allocated() -> int:
    """Blocks of memory that are held by objects that are of use."""
    gc.collect()
    # Python's table of attributes keeps names alive until others take their places.
    if sys.version_info >= (3, 13):
        sys._clear_internal_caches()
    else:
        sys._clear_type_cache()
    return sys.getallocatedblocks()


def test_a_request_leaves_nothing_behind(engine: Engine) -> None:
    held = []
    for window in range(WINDOWS):
        held.append(allocated())
        run(engine, window, random.Random(4))  # other prompts would leave another prefix cache
    grown = [b - a for a, b in itertools.pairwise(held)]
    # Caches fill in the first windows; a leak is in every one.
    assert min(grown) < REQUESTS / 8, f"blocks of each {REQUESTS} requests: {grown}"
    assert engine.stats().scheduler.owned_blocks == 0
    engine.close()
