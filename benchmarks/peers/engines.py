"""The table of engines: what each runs, in which class, with which weights and which worker."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .places import WORKERS, NotPrepared, Places

OURS = "engineroom"
CLASSES = ("4bit", "8bit", "bf16", "gemma")
CACHE = ("memory", "long")  # the workloads that tell one type of the cache from another


@dataclass(frozen=True)
class Entry:
    """One engine with one format of the weights: a row of every table."""

    engine: str
    format: str
    kind: str  # its class
    weights: Callable[[Places], Path]
    peer: str  # whose environment; "" is this Python's
    worker: str
    steps: tuple[str, ...]  # of `prepare`
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)  # options of the memory row
    start: str = ""  # worker of the process start and of the divergence, where it is another one
    only: tuple[str, ...] = ()  # the workloads that it has; empty: all
    warm: bool = False  # its worker warms itself up

    @property
    def has_twin(self) -> bool:
        """Whether its weights are those of the 16-bit model that divergences are from."""
        return self.kind != "gemma"

    @property
    def products(self) -> str:
        """Which of the probe's peaks bounds its linear layers."""
        return "bf16_gflops" if self.kind == "bf16" else "int8_gops"

    @property
    def name(self) -> str:
        return f"{self.engine} {self.format}"

    def check(self, places: Places) -> None:
        """Errors: NotPrepared, naming the steps of `prepare` that are missing, or the option that
        this engineroom does not have."""
        missing = [step for step in self.steps if not places.marker(step).exists()]
        if missing:
            raise NotPrepared(
                f"{self.name}: {', '.join(missing)} not in {places.folder}; run "
                "`python -m benchmarks.peers prepare` (or name the folder: --folder, "
                "ENGINEROOM_PEERS)"
            )
        if self.engine == OURS:
            from engineroom.engine.config import ConfigError, EngineConfig  # `prepare` needs none

            try:
                EngineConfig.from_options(str(self.weights(places)), self.options)
            except ConfigError as error:
                raise NotPrepared(f"{self.name}: not available: {error}") from error

    def command(
        self,
        places: Places,
        *,
        threads: int,
        max_len: int,
        max_seqs: int,
        small: bool = False,
        start: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """The worker's command line. `start`: the worker of process start and divergence."""
        options = dict(self.options) | (self.small if small else {}) | (extra or {})
        if self.worker == "llamacpp_worker.py" and not (start and self.start):
            options["tool"] = str(places.llama_tool("llama-batched-bench"))
        asked = {
            "model": str(self.weights(places)),
            "threads": threads,
            "max_len": max_len,
            "max_seqs": max_seqs,
            "options": options,
        }
        python = str(places.python(self.peer)) if self.peer else sys.executable
        script = self.start if start and self.start else self.worker
        return [python, str(WORKERS / script), json.dumps(asked)]


def table(our_options: Mapping[str, Any]) -> list[Entry]:
    """Every entry, ours first in each class. `our_options` are LLM()'s, for every one of ours."""

    def ours(
        format: str,
        kind: str,
        weights: Callable[[Places], Path],
        step: str,
        only: tuple[str, ...] = (),
        **options: Any,
    ) -> Entry:
        """A variant is a line of the table: `options` are LLM()'s for it alone."""
        return Entry(
            OURS,
            format,
            kind,
            weights,
            "",
            "ours_worker.py",
            (step,),
            {**our_options, **options},
            only=only,
        )

    def llama(
        format: str,
        kind: str,
        step: str = "ggufs",
        only: tuple[str, ...] = (),
        shown: str = "",
        **options: Any,
    ) -> Entry:
        return Entry(
            "llama.cpp",
            shown or format,
            kind,
            lambda p: p.gguf(format),
            "llamacpp",
            "llamacpp_worker.py",
            ("llamacpp", "llama-python", step),
            options,
            start="llama_python_worker.py",
            only=only,
            warm=True,
        )

    def openvino(format: str, kind: str, shown: str) -> Entry:
        return Entry(
            "OpenVINO GenAI",
            shown,
            kind,
            lambda p: p.openvino(format),
            "openvino",
            "openvino_worker.py",
            ("openvino", "openvino-models"),
            small={"cache_gb": 1},
        )

    def gguf(format: str) -> Callable[[Places], Path]:
        return lambda p: p.gguf(format)

    def twin(places: Places) -> Path:
        return places.twin

    gemma = ("decode", "prompt", "batch32")
    return [
        ours("Q4_0", "4bit", gguf("Q4_0"), "ggufs"),
        llama("Q4_0", "4bit"),
        ours("Q4_1", "4bit", gguf("Q4_1"), "model"),
        llama("Q4_1", "4bit"),
        ours("int4", "4bit", twin, "twin", quantization="int4"),
        ours("Q8_0", "8bit", gguf("Q8_0"), "ggufs"),
        llama("Q8_0", "8bit"),
        ours("int8", "8bit", twin, "twin", quantization="int8"),
        ours("int8-KV Q8_0", "8bit", gguf("Q8_0"), "ggufs", CACHE, kv_cache_dtype="int8"),
        llama("Q8_0", "8bit", only=CACHE, shown="q8_0-KV Q8_0", kv="q8_0"),
        openvino("int8", "8bit", "int8"),
        ours("bf16", "bf16", twin, "twin"),
        llama("BF16", "bf16"),
        openvino("fp32", "bf16", "fp32 run in bf16"),
        Entry(
            "vLLM",
            "bf16",
            "bf16",
            twin,
            "vllm",
            "vllm_worker.py",
            ("vllm", "twin"),
            {"dtype": "bfloat16"},
            {
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            },
        ),
        Entry(
            "transformers",
            "bf16",
            "bf16",
            twin,
            "transformers",
            "transformers_worker.py",
            ("transformers", "twin"),
            {"dtype": "bfloat16"},
            {"HF_HUB_OFFLINE": "1"},
        ),
        ours("Q4_K_M", "gemma", gguf("Q4_K_M"), "gemma", gemma),
        llama("Q4_K_M", "gemma", "gemma", gemma),
    ]
