"""The reference of every operation that is neither a matrix product nor attention.

All functions take and return fp32 tensors; the executor rounds results to the activation dtype.
Law 2 holds by construction: each uses only IEEE operations applied element by element (+, -, *, /,
sqrt: one right answer wherever an element lies), sums in an order fixed by the row's length
(`row_sum`), and transcendental functions in whole vectors (`in_whole_vectors`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

# Elements. A multiple of every vector width torch is built for (up to 16 floats, unrolled 4 times).
_WHOLE = 64


def in_whole_vectors(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """function(x) elementwise, with x zero-padded so that no element falls into a loop's tail.

    torch computes exp, tanh and the like with one polynomial in the vector body and may use
    another for what is left over, so an element's value would depend on its place. This holds
    while torch runs single-threaded (a second thread's share could start anywhere), which the
    executor sees to.
    """
    count = x.numel()
    if count % _WHOLE == 0:
        return function(x.contiguous())
    padded = torch.zeros(-(-count // _WHOLE) * _WHOLE)
    padded[:count] = x.reshape(-1)
    return function(padded)[:count].view(x.shape)


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis [..., N] -> [..., 1] by halving: upper half added onto lower.

    Where N is odd the middle element waits a round. Destroys x.
    """
    n = x.shape[-1]
    while n > 1:
        half = (n + 1) // 2
        x[..., : n - half] += x[..., half:n]
        n = half
    return x[..., :1]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """See ops.rms_norm.  x [T, G*D], weight [D]."""
    groups = x.reshape(-1, weight.shape[0])  # [T*G, D]
    mean = row_sum(groups * groups) / weight.shape[0]
    return (groups / torch.sqrt(mean + eps) * (weight + offset)).view(x.shape)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """See ops.softcap."""
    return in_whole_vectors(torch.tanh, x / cap) * cap


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See ops.silu_mul."""
    return gate / (in_whole_vectors(torch.exp, -gate) + 1) * up


def sigmoid_scale(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """See ops.sigmoid_scale.  x [T, H], gate [T, 1]."""
    return x * (1 / (in_whole_vectors(torch.exp, -gate) + 1))


def gelu_tanh_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See ops.gelu_tanh_mul, with (1 + tanh(u)) / 2 written as 1 / (1 + exp(-2u))."""
    u = (gate * gate * gate * 0.044715 + gate) * 0.7978845608028654
    return gate / (in_whole_vectors(torch.exp, u * -2) + 1) * up


def clamped_silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See ops.clamped_silu_mul."""
    g = gate.clamp(max=7)
    return g / (in_whole_vectors(torch.exp, g * -1.702) + 1) * (up.clamp(-7, 7) + 1)


@lru_cache(maxsize=8192)
def _rotation(
    position: int, inv_freq: tuple[float, ...], attention_factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of one position's angles, each [len(inv_freq)].

    In float64, one position at a time: the arrays' shape, and so every bit, is independent of T.
    """
    angle = np.float32(position) * np.array(inv_freq, dtype=np.float32)  # fp32, as ops.rope says
    factor = np.float32(attention_factor)
    wide = angle.astype(np.float64)
    return np.cos(wide).astype(np.float32) * factor, np.sin(wide).astype(np.float32) * factor


def rotations(
    positions: np.ndarray, inv_freq: tuple[float, ...], attention_factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin tables for positions [T]: each [T, 1, len(inv_freq)]."""
    pairs = [_rotation(p, inv_freq, attention_factor) for p in positions.tolist()]
    cos = torch.from_numpy(np.stack([c for c, _ in pairs]))
    sin = torch.from_numpy(np.stack([s for _, s in pairs]))
    return cos[:, None], sin[:, None]


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int, interleaved: bool
) -> torch.Tensor:
    """See ops.rope.  x [T, G*head_dim], cos and sin [T, 1, F]."""
    heads = x.reshape(x.shape[0], -1, head_dim)
    num_pairs = cos.shape[-1]
    if interleaved:
        first, second = slice(0, 2 * num_pairs, 2), slice(1, 2 * num_pairs, 2)
    else:
        first, second = slice(0, num_pairs), slice(num_pairs, 2 * num_pairs)
    a, b = heads[..., first], heads[..., second]
    out = heads.clone()
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out.view(x.shape)
