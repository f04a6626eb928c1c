"""A batch over the fake engine, in a process that may be told to die: python child.py JSON

{"input", "output", "lines"?} and one of {"step": n}, {"write": n, "share": x}, {"line": n}: SIGKILL
itself in the n-th step, after that share of the n-th write to the journal, at the n-th line of the
output; or {"limit": bytes}, the largest file that it may write. Ends with 10 on a BatchError.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engineroom.engine import batch
from engineroom.engine.batch import journal
from engineroom.engine.config import EngineConfig
from engineroom.engine.core.answers import RequestOutput
from engineroom.engine.core.cost import Cost
from engineroom.engine.core.sampling_params import SamplingParams
from tests.engine.fake import FakeEngine

MODEL = {"name": "fake", "weights": "1"}


class BatchFake(FakeEngine):
    """FakeEngine with `final_only`; `on_step` is called with each step's number."""

    def __init__(self, **options: Any) -> None:
        super().__init__(EngineConfig(model="fake", **{"max_num_seqs": 4, **options}))
        self.on_step = lambda number: None
        self.costs: Callable[[], Cost | None] = lambda: None  # of each answer
        self.asked: list[str | Sequence[int]] = []
        self.most_live = 0

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        final_only: bool = False,
        **rest: Any,
    ) -> None:
        assert final_only
        super().add_request(request_id, prompt, params, **rest)
        self.asked.append(prompt)
        self.most_live = max(self.most_live, self.num_live)

    def step(self) -> list[RequestOutput]:
        outputs = super().step()
        self.on_step(self.steps)
        return [replace(o, cost=self.costs()) for o in outputs if o.finished]

    def fail(self) -> None:
        raise ZeroDivisionError("a step that fails")


def write_lines(path: Path, count: int, tokens: int = 3) -> Path:
    """Requests of both kinds, some with a seed and some with logprobs."""
    rng = random.Random(count)
    with path.open("w") as file:
        for number in range(count):
            body: dict[str, Any] = {"max_tokens": 1 + number % tokens}
            if number % 3:
                content = f"{rng.choice('abc') * 20} {number} é"
                body["messages"] = [{"role": "user", "content": content}]
                body |= {"logprobs": True, "top_logprobs": 2} if number % 5 == 0 else {}
            else:
                body |= {"prompt": f"p {number}", "seed": number}
            url = "/v1/chat/completions" if number % 3 else "/v1/completions"
            line = {"custom_id": f"r{number}", "method": "POST", "url": url, "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def run(source: Path, output: Path, engine: BatchFake | None = None, **options: Any) -> Any:
    return batch.run(
        engine or BatchFake(), [source], output, **{"model": MODEL, "progress": False, **options}
    )


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _main(task: dict[str, Any]) -> int:
    engine = BatchFake()
    count = itertools.count()
    if "step" in task:
        engine.on_step = lambda number: _die() if number > task["step"] else None
    elif "write" in task:
        whole = journal.write_all

        def write(fd: int, data: bytes, at: int) -> None:
            if next(count) == task["write"]:
                whole(fd, data[: int(len(data) * task["share"])], at)
                _die()
            whole(fd, data, at)

        journal.write_all = write
    elif "line" in task:
        line = journal.Journal.line

        def read(self: journal.Journal, offset: int) -> bytes:
            if next(count) == task["line"]:
                _die()
            return line(self, offset)

        journal.Journal.line = read  # type: ignore[method-assign]
    elif "limit" in task:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["limit"], resource.RLIM_INFINITY))
    journal._SYNC_RECORDS = 5
    try:
        run(Path(task["input"]), Path(task["output"]), engine)
    except batch.BatchError as error:
        print(error.code, error)
        return 10
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, engine.most_live)
    return 0


if __name__ == "__main__":
    sys.exit(_main(json.loads(sys.argv[1])))
