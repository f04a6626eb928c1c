"""The card under test: its clock, buffers that its caches cannot hold, and what it does at most."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ....kernels.triton import device as dev
from ...tools.doctor import command_output
from ..timing import Times, measure

Launch = Callable[[], object]

_PER_GRAPH = 20  # launches in one graph, at least: its own cost is then small beside theirs
_COPY = 1 << 30  # bytes read by the copy that measures bandwidth
_SQUARE = 8192  # of the products that measure peaks
_MOST_COPIES = 64


class Card:
    """Device, names, clock. Under Triton's interpreter everything runs once and no time is told."""

    def __init__(self) -> None:
        self.device = dev.device()
        self.rehearsal = dev.interpreted()

    @property
    def cache_bytes(self) -> int:
        """The L2 cache."""
        if self.rehearsal:
            return 0
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def copies(self, num_bytes: int) -> int:
        """Buffers to go round, so that each is out of the L2 cache when its turn comes."""
        return max(1, min(_MOST_COPIES, -(-2 * self.cache_bytes // max(1, num_bytes))))

    def time(self, launches: Sequence[Launch], allowance: float) -> Times | None:
        """Seconds of one launch; `launches` do the same on buffers of their own, in turn.

        They are captured into a graph, so that no launch waits for Python, and timed by events.
        Where capture is refused they are launched one by one.
        """
        if self.rehearsal:
            for launch in launches:
                launch()
            return None
        rounds = -(-_PER_GRAPH // len(launches))
        turns = [launch for _ in range(rounds) for launch in launches]
        for launch in launches:  # compiles, and lets libraries choose
            launch()
        torch.cuda.synchronize()
        run = self._captured(turns) or (lambda: [launch() for launch in turns])
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def timed() -> float:
            begin.record()
            run()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return measure(timed, allowance).over(len(turns))

    def _captured(self, launches: Sequence[Launch]) -> Launch | None:
        graph = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError):
            with torch.cuda.graph(graph):
                for launch in launches:
                    launch()
            return graph.replay
        torch.cuda.synchronize()
        return None

    def facts(self) -> dict[str, Any]:
        """Names and versions that stand beside the figures."""
        found: dict[str, Any] = {"device": dev.describe()["device"]}
        if not self.rehearsal:
            query = [
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.max.sm",
                "--format=csv,noheader",
            ]
            properties = torch.cuda.get_device_properties(self.device)
            found |= {
                "driver, highest clock": command_output(query) or "unknown",
                "cuda": torch.version.cuda or torch.version.hip,
                "memory": f"{properties.total_memory / 2**30:.0f} GiB",
                "multiprocessors": properties.multi_processor_count,
                "L2": f"{self.cache_bytes / 2**20:.0f} MiB",
            }
        return found

    def free(self) -> None:
        """Give memory of rows that are done back."""
        if not self.rehearsal:
            torch.cuda.empty_cache()

    def limits(self) -> dict[str, float | None]:
        """Bytes/s of a copy (read and write), operations/s of products, by measuring; None where
        this card or torch has no such product, and in a rehearsal."""
        found: dict[str, float | None] = {"copy": self._copy_rate()}
        for name, product in _PRODUCTS.items():
            found[name] = None if self.rehearsal else self._product_rate(product)
            self.free()
        return found

    def _copy_rate(self) -> float | None:
        if self.rehearsal:
            return None
        source, target = (
            torch.empty(_COPY, dtype=torch.uint8, device=self.device) for _ in range(2)
        )
        times = self.time([lambda: target.copy_(source)], 0.5)
        return None if times is None else 2 * _COPY / times.median

    def _product_rate(self, product: Callable[[torch.device, int], Launch]) -> float | None:
        try:
            times = self.time([product(self.device, _SQUARE)], 0.5)
        except (RuntimeError, AttributeError, TypeError):
            return None
        return None if times is None else 2 * float(_SQUARE) ** 3 / times.median


def _plain(dtype: torch.dtype) -> Callable[[torch.device, int], Launch]:
    def product(device: torch.device, n: int) -> Launch:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        return lambda: torch.mm(a, b, out=out)

    return product


def _fp8(device: torch.device, n: int) -> Launch:
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _int8(device: torch.device, n: int) -> Launch:
    a, b = (torch.randint(-127, 128, (n, n), device=device).to(torch.int8) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())


_PRODUCTS: dict[str, Callable[[torch.device, int], Launch]] = {
    "bfloat16": _plain(torch.bfloat16),
    "float16": _plain(torch.float16),
    "fp8": _fp8,
    "int8": _int8,
}
