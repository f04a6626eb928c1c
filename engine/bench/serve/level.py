"""One level of load: sends what was planned, when it was planned, and gathers the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .client import Answer, Target, ask
from .traffic import Load, Planned

_Tell = Callable[[int], None]  # how many are answered


async def run(
    target: Target, load: Load, planned: Sequence[Planned], extra: Mapping[str, Any], tell: _Tell
) -> tuple[list[Answer], float]:
    """The answers in the plan's order, and by how many seconds the latest request was sent late.

    A client that falls behind its plan measures itself: the second value says so.
    """
    answers: list[Answer | None] = [None] * len(planned)
    late = 0.0
    done = 0

    async def one(index: int) -> None:
        nonlocal done
        answers[index] = await ask(
            target, target.body(planned[index].prompt, planned[index].output_len, extra)
        )
        done += 1
        tell(done)

    if load.users is not None:
        todo = iter(range(len(planned)))

        async def user() -> None:
            for index in todo:
                await one(index)

        await asyncio.gather(*(user() for _ in range(min(load.users, len(planned)))))
    else:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for index, request in enumerate(planned):
                await asyncio.sleep(max(0.0, start + request.at - time.perf_counter()))
                late = max(late, time.perf_counter() - start - request.at)
                tasks.create_task(one(index))
    return [answer for answer in answers if answer is not None], late
