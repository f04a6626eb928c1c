"""A backend that overlaps, without a device: the CPU backend behind a stream of its own.

`Stream(thread=True)` runs what is launched in a thread, at its own pace; `Stream(thread=False)`
runs nothing before somebody waits for it, and then all that was launched before as well. Both in
order, so that the step after overwrites the logits of the one before, as on a device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np

from engineroom.engine.runtime import assemble


class Stream:
    def __init__(self, thread: bool) -> None:
        self._pool = ThreadPoolExecutor(1) if thread else None
        self._waiting: deque[tuple[Future, Callable[[], Any]]] = deque()
        self.longest = 0  # of what was launched and not waited for

    def put(self, work: Callable[[], Any]) -> Future:
        if self._pool is not None:
            return self._pool.submit(work)
        future: Future = Future()
        self._waiting.append((future, work))
        self.longest = max(self.longest, len(self._waiting))
        return future

    def get(self, future: Future) -> Any:
        while not future.done() and self._waiting:
            done, work = self._waiting.popleft()
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
        return future.result()


class LateLogits:
    def __init__(self, stream: Stream, future: Future) -> None:
        self.stream, self.future = stream, future

    def wait(self) -> None:
        self.stream.get(self.future)

    def numpy(self) -> np.ndarray:
        return self.stream.get(self.future).numpy()


class LateExecutable:
    def __init__(self, backend: LateBackend, inner: Any) -> None:
        self._backend, self._inner = backend, inner

    def run(self, step: Any) -> LateLogits:
        self._backend.meet("launch")
        stream, late = self._backend.stream, step.token_ids < 0
        step = copied(step)

        def work() -> Any:
            self._backend.meet("run")
            if late.any():
                tokens = step.sampled.result().tokens  # that step stands before in the stream
                step.token_ids[late] = np.maximum(tokens[-1 - step.token_ids[late]], 0)
            return self._inner.run(step)

        self._backend.num_late += int(late.sum())
        return LateLogits(stream, stream.put(work))


class HostSampler:
    """As the CPU's, over logits that are on their way."""

    def __init__(self, backend: LateBackend, inner: Any) -> None:
        self.backend, self.inner = backend, inner

    def run(self, logits: Any, rows: Any) -> Any:
        self.backend.meet("sample")
        self.backend.num_host += 1
        return self.inner.run(here(logits), rows)

    def from_numpy(self, logits: np.ndarray) -> Any:
        return self.inner.from_numpy(logits)

    def log_softmax(self, logits: Any) -> np.ndarray:
        return self.inner.log_softmax(here(logits))


class LateSampler(HostSampler):
    def launch(self, logits: LateLogits, rows: Any) -> LateSampling:
        rows = copied(rows)

        def work() -> Any:
            self.backend.meet("sample")
            return self.inner.run(logits.future.result(), rows)

        return LateSampling(self.backend.stream, self.backend.stream.put(work))


class LateSampling:
    def __init__(self, stream: Stream, future: Future) -> None:
        self._stream, self.tokens = stream, future

    def result(self) -> Any:
        return self._stream.get(self.tokens)


class LateBackend:
    """`faults`: how many times each of "launch", "run" and "sample" is passed before it fails."""

    name = "late"
    overlaps = True

    def __init__(self, inner: Any, *, thread: bool, host_sampler: bool) -> None:
        self._inner = inner
        self.stream = Stream(thread)
        self.faults: dict[str, int] = {}
        self.num_late = 0  # tokens read on the device
        self.num_host = 0  # steps sampled on the host
        self._sampler = HostSampler if host_sampler else LateSampler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def lower(self, *args: Any) -> LateExecutable:
        return LateExecutable(self, self._inner.lower(*args))

    def sampler(self, vocab_size: int) -> HostSampler:
        return self._sampler(self, self._inner.sampler(vocab_size))

    def meet(self, place: str) -> None:
        left = self.faults.get(place)
        if left is not None:
            self.faults[place] = left - 1
            if left == 0:
                raise MemoryError(f"injected at {place}")


def copied(inputs: Any) -> Any:
    """With arrays of its own: what was given may change once the launch has returned."""
    arrays = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    return replace(inputs, **{n: a.copy() for n, a in arrays.items() if isinstance(a, np.ndarray)})


def here(logits: Any) -> Any:
    return logits.stream.get(logits.future) if isinstance(logits, LateLogits) else logits


@contextmanager
def late_backends(monkeypatch: Any, **options: Any) -> Iterator[None]:
    """Models loaded inside run on a LateBackend."""
    create = assemble.create

    def wrapped(*args: Any, **kwargs: Any) -> LateBackend:
        return LateBackend(create(*args, **kwargs), **options)

    with monkeypatch.context() as patch:
        patch.setattr(assemble, "create", wrapped)
        yield
