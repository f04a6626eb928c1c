"""What fits: weights, KV cache and workspace, planned before loading, printed, and then held to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...kernels.backend import KVSpec
from ...quant.policy import SCHEMES
from ..config import EngineConfig, ModelConfig, parse_bytes, show_bytes

DEFAULT_SHARE = 0.8  # of the memory available now: the rest is for the process and its neighbours
MIN_MODEL_LEN = 16  # below this an automatic context length helps nobody


class DoesNotFit(ValueError):
    """The model cannot run in the memory it may use; the message has the numbers and remedies."""

    def __init__(self, message: str, plan: MemoryPlan) -> None:
        super().__init__(message)
        self.plan = plan


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """All sizes in bytes unless named otherwise. `fits` is the verdict, `because` the reason."""

    available: int  # memory that a process could take now, limits of its cgroup included
    budget: int  # what this engine may take of it
    weights: int
    workspace: int
    kv_bytes_per_token: int
    block_size: int  # tokens
    num_blocks: int
    max_model_len: int  # tokens
    max_num_seqs: int
    fits: bool
    because: str
    notes: tuple[str, ...] = ()

    @property
    def kv(self) -> int:
        return self.num_blocks * self.block_size * self.kv_bytes_per_token

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.workspace

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def requests_at(self, context: int) -> int:
        """How many requests of `context` tokens each the cache holds at once."""
        blocks = -(-context // self.block_size)
        return min(self.max_num_seqs, self.num_blocks // blocks)


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    *,
    weight_bytes: int,
    workspace_bytes: int,
    kv: KVSpec,
    available: int | None = None,
) -> MemoryPlan:
    """Decide the number of KV blocks and the context length; never raises, see `MemoryPlan.fits`.

    The cache is given what max_num_seqs sequences of full length could use, at most what the
    budget leaves. With max_model_len unset, the context is the model's own, or what fits, noted.
    """
    available = available_memory() if available is None else available
    budget = (
        parse_bytes(config.memory_budget)
        if config.memory_budget is not None
        else int(available * DEFAULT_SHARE)
    )
    asked = config.max_model_len
    notes: list[str] = []
    left = budget - weight_bytes - workspace_bytes
    affordable = max(left, 0) // kv.bytes_per_block
    wanted_len = asked or model.max_position

    def blocks_for(tokens: int) -> int:
        return -(-tokens // kv.block_size)

    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    else:
        num_blocks = min(blocks_for(wanted_len) * config.max_num_seqs, affordable)
    max_model_len = wanted_len
    if asked is None and num_blocks < blocks_for(wanted_len):
        max_model_len = num_blocks * kv.block_size
        if max_model_len >= MIN_MODEL_LEN:
            notes.append(
                f"context limited to {max_model_len} tokens of the model's {wanted_len}: "
                f"that is what the KV cache holds ({num_blocks} blocks of {kv.block_size})"
            )
    sizes = (
        f"weights {show_bytes(weight_bytes)} + KV {show_bytes(num_blocks * kv.bytes_per_block)} "
        f"({num_blocks} blocks of {kv.block_size} tokens) + workspace {show_bytes(workspace_bytes)}"
    )
    if asked is not None and asked > model.longest_context:
        fits, because = False, too_long(asked, model)
    elif num_blocks > affordable:
        fits, because = (
            False,
            f"{sizes} is more than the budget of {show_bytes(budget)}"
            + _remedies(config, kv, available, budget),
        )
    elif num_blocks < blocks_for(max_model_len) or max_model_len < MIN_MODEL_LEN <= wanted_len:
        need = blocks_for(asked or MIN_MODEL_LEN)
        fits, because = (
            False,
            f"weights {show_bytes(weight_bytes)} + workspace {show_bytes(workspace_bytes)} leave "
            f"{show_bytes(max(left, 0))} of the budget of {show_bytes(budget)} for the KV cache: "
            f"{num_blocks} blocks of {kv.block_size} tokens, but one request of "
            f"{asked or MIN_MODEL_LEN} tokens needs {need} "
            f"({show_bytes(need * kv.bytes_per_block)})" + _remedies(config, kv, available, budget),
        )
    else:
        fits, because = True, f"{sizes} is within the budget of {show_bytes(budget)}"
    return MemoryPlan(
        available=available,
        budget=budget,
        weights=weight_bytes,
        workspace=workspace_bytes,
        kv_bytes_per_token=kv.bytes_per_token,
        block_size=kv.block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        fits=fits,
        because=because,
        notes=tuple(notes),
    )


def too_long(context: int, model: ModelConfig) -> str:
    """The message for a max_model_len beyond what the model was made for."""
    return (
        f"max_model_len={context} is more than the {model.longest_context} tokens that the model "
        f"was made for; use at most {model.longest_context}"
    )


def kv_spec(config: EngineConfig, model: ModelConfig, default_dtype: str) -> KVSpec:
    """The cache's shape and dtype for this model: kv_cache_dtype, or the backend's default."""
    dtype = config.kv_cache_dtype
    return KVSpec(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=config.block_size,
        dtype=default_dtype if dtype == "auto" else dtype,
    )


def activation_dtype(config: EngineConfig, model: ModelConfig) -> str:
    """The dtype that results are rounded to: as asked, or the checkpoint's own (law 6).

    Of integers that is float32, be they the checkpoint's or made by loading.
    """
    if config.dtype != "auto":
        return config.dtype
    makes_integers = config.quantization is not None and SCHEMES[config.quantization].has_integers
    return "float32" if makes_integers else model.dtype


def available_memory() -> int:
    """Bytes a new process could take: free and reclaimable memory, within the cgroup's limit."""
    if sys.platform == "darwin":
        total = int(subprocess.run(["sysctl", "-n", "hw.memsize"], capture_output=True).stdout)
        return total * 3 // 4  # macOS keeps no "available" figure; a quarter is the system's
    available = _meminfo()["MemAvailable"]
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        limit, used = _read_int(limit_file), _read_int(used_file)
        if limit is not None and used is not None:
            available = min(available, max(limit - used, 0))
    return available


def _meminfo() -> Mapping[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = (line.split() for line in lines)
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if len(f) > 1}


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _remedies(config: EngineConfig, kv: KVSpec, available: int, budget: int) -> str:
    ways = ["a smaller or more strongly quantised checkpoint"]
    if config.num_blocks is not None:
        ways.insert(0, "a smaller num_blocks")
    if config.max_model_len is not None:
        ways.insert(0, f"a smaller max_model_len ({show_bytes(kv.bytes_per_token)} per token)")
    if budget < available:
        ways.insert(0, f"a larger memory_budget ({show_bytes(available)} are available)")
    return ". Any one of: " + "; ".join(ways)
