"""The scheduler's limits, and who can never run within them."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import AdmissionError
from .request import Request

__all__ = ["SchedulerConfig", "check_fits"]


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of the schedule. Errors: ValueError naming a limit below 1 (max_waiting: below 0)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int  # prompt + output, tokens
    num_blocks: int
    block_size: int
    max_waiting: int = 1024
    enable_prefix_caching: bool = True
    max_prompt_logprob_rows: int = 64  # in one step, over all requests

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "num_blocks",
            "block_size",
            "max_prompt_logprob_rows",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting={self.max_waiting} must not be negative")

    @property
    def watermark(self) -> int:
        """Blocks that admission leaves free for the requests already running to grow into."""
        return max(1, self.num_blocks // 100)


def check_fits(request: Request, config: SchedulerConfig) -> None:
    """Errors: AdmissionError, with the numbers, for a request that could never finish here."""
    prompt = request.num_prompt_tokens
    if prompt == 0:
        raise AdmissionError("prompt_empty", "the prompt is empty: it must hold a token")
    if prompt + request.max_tokens > config.max_model_len:
        raise AdmissionError(
            "context_length",
            f"the prompt's {prompt} tokens and max_tokens={request.max_tokens} make "
            f"{prompt + request.max_tokens}, above max_model_len={config.max_model_len}; "
            "shorten the prompt or lower max_tokens",
        )
    # The last token generated is never fed back, so it needs no room.
    room = prompt + max(request.max_tokens - 1, 0)
    need = -(-room // config.block_size)
    if need > config.num_blocks:
        raise AdmissionError(
            "never_fits",
            f"{room} tokens need {need} KV blocks of {config.block_size}, and the whole pool has "
            f"{config.num_blocks} ({config.num_blocks * config.block_size} tokens); shorten the "
            "prompt, lower max_tokens or give the KV cache more memory",
        )
