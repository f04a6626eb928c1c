"""The same work by torch's own kernels and by libraries that happen to be installed here.

A library that is missing, or refuses a shape, leaves its reason in the row.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .card import Card, Launch
from .case import Case
from .launches import Heads


def installed(package: str) -> bool:
    """Whether the package can be found; it is not imported."""
    return importlib.util.find_spec(package) is not None


def _add(case: Case, name: str, make: Callable[[], list[Launch]]) -> None:
    """The peer's launches, tried once; or why there are none."""
    try:
        made = make()
        made[0]()
    except Exception as error:
        case.skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    else:
        case.peers[name] = made


def attention(
    case: Case, card: Card, heads: Heads, dtype: torch.dtype, batch: int, new: int, context: int
) -> None:
    """The last `new` tokens of each of `batch` sequences attend to `context`, over K and V that lie
    in one piece (which is easier than pages)."""
    turns = []
    for _ in case.ours:
        q = torch.randn(batch, new, heads.num_heads, heads.head_dim, device=card.device)
        k, v = (
            torch.randn(batch, context, heads.num_kv_heads, heads.head_dim, device=card.device)
            for _ in range(2)
        )
        turns.append([x.to(dtype) for x in (q, k, v)])
    causal = new > 1

    def by_torch(backend: SDPBackend) -> list[Launch]:
        heads_first = [[x.transpose(1, 2) for x in turn] for turn in turns]

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel([backend]):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=heads.num_heads != heads.num_kv_heads
                )

        return _each(run, heads_first)

    for name, backend in (
        ("torch, cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("torch, flash", SDPBackend.FLASH_ATTENTION),
    ):
        if card.rehearsal:
            case.skipped[name] = "needs a card"
        else:
            _add(case, name, lambda b=backend: by_torch(b))  # type: ignore[misc]
    for name, make in _ATTENTION_PEERS.items():
        if not installed(name):
            case.skipped[name] = "not installed"
        else:
            _add(case, name, lambda m=make: m(turns, causal))  # type: ignore[misc]


def _each(run: Callable[..., Any], turns: list[list[torch.Tensor]]) -> list[Launch]:
    return [lambda turn=turn: run(*turn) for turn in turns]  # type: ignore[misc]


def _flash_attn(turns: list[list[torch.Tensor]], causal: bool) -> list[Launch]:
    library = importlib.import_module("flash_attn")
    if causal:
        return _each(lambda q, k, v: library.flash_attn_func(q, k, v, causal=True), turns)
    return _each(library.flash_attn_with_kvcache, turns)


def _flashinfer(turns: list[list[torch.Tensor]], causal: bool) -> list[Launch]:
    library = importlib.import_module("flashinfer")
    if len(turns[0][0]) != 1:
        raise ValueError("its call without a wrapper takes one sequence")
    single = [[x[0] for x in turn] for turn in turns]
    if causal:
        return _each(
            lambda q, k, v: library.single_prefill_with_kv_cache(q, k, v, causal=True), single
        )
    return _each(lambda q, k, v: library.single_decode_with_kv_cache(q[0], k, v), single)


def _vllm(turns: list[list[torch.Tensor]], causal: bool) -> list[Launch]:
    library = importlib.import_module("vllm.vllm_flash_attn")
    q, k, _ = turns[0]
    starts = [
        torch.arange(len(x) + 1, device=x.device, dtype=torch.int32) * x.shape[1] for x in (q, k)
    ]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return library.flash_attn_varlen_func(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            max_seqlen_q=q.shape[1],
            cu_seqlens_q=starts[0],
            max_seqlen_k=k.shape[1],
            cu_seqlens_k=starts[1],
            causal=causal,
        )

    return _each(run, turns)


_ATTENTION_PEERS: dict[str, Callable[[list[list[torch.Tensor]], bool], list[Launch]]] = {
    "flash_attn": _flash_attn,
    "flashinfer": _flashinfer,
    "vllm": _vllm,
}


def linear(case: Case, card: Card, x: torch.Tensor, out_width: int, eight_bits: bool) -> None:
    """cuBLAS on 16-bit weights; beside 8-bit weights torch's fp8 product too, x given in fp8."""
    width = x.shape[1]
    size = out_width * width

    def plain() -> list[Launch]:
        turns = [
            torch.randn(out_width, width, device=card.device, dtype=x.dtype)
            for _ in range(card.copies(size * x.dtype.itemsize))
        ]
        out = torch.empty(len(x), out_width, device=card.device, dtype=x.dtype)
        return [lambda w=w: torch.mm(x, w.t(), out=out) for w in turns]  # type: ignore[misc]

    def fp8() -> list[Launch]:
        one = torch.ones((), device=card.device)
        narrow = x.to(torch.float8_e4m3fn)
        turns = [
            torch.randn(out_width, width, device=card.device).to(torch.float8_e4m3fn)
            for _ in range(card.copies(size))
        ]
        return [
            lambda w=w: torch._scaled_mm(  # type: ignore[misc]
                narrow, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
            )
            for w in turns
        ]

    _add(case, "cuBLAS, 16 bits", plain)
    if eight_bits and card.rehearsal:
        case.skipped["torch._scaled_mm, fp8"] = "needs a card"
    elif eight_bits:
        _add(case, "torch._scaled_mm, fp8", fp8)
