"""The reference of a mixture of experts: who is chosen, each expert's products, their sum.

Law 2: a row of an expert's product has the bits of `linear` by that expert's weight alone, in which
it matters neither how many rows there are nor which row stands where.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import linear as lin
from .elementwise import in_whole_vectors


def top_experts(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """See ops.top_experts.  logits [T, E] -> ids [T, top_k], as fp32."""
    ranked = torch.where(torch.isnan(logits), -torch.inf, logits)
    # A stable sort keeps the lower id first where logits are equal.
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    # -inf and NaN are below every number but not equal: the former comes first.
    nan = torch.isnan(logits).gather(1, order)
    order = order.gather(1, torch.sort(nan.int(), dim=1, stable=True).indices)
    return order[:, :top_k].float()


def expert_weights(logits: torch.Tensor, experts: torch.Tensor, renormalise: bool) -> torch.Tensor:
    """See ops.expert_weights.  logits [T, E], experts [T, k] -> [T, k]."""
    chosen = logits.gather(1, experts.long())
    # The best expert's: a NaN among the logits is no maximum, and shows in the exponentials.
    most = chosen[:, :1]
    exponentials = in_whole_vectors(torch.exp, chosen - most)
    summed = exponentials if renormalise else in_whole_vectors(torch.exp, logits - most)
    total = torch.zeros(len(logits))
    for column in summed.unbind(1):
        total = total + column
    return exponentials / total[:, None]


def expert_linear(
    x: torch.Tensor,
    weights: Sequence[lin.PackedWeight],
    experts: torch.Tensor,
    bias: torch.Tensor | None,
    workers: lin.Workers,
) -> torch.Tensor:
    """See ops.expert_linear.  x [T, K] or [T, k*K], weights one [N, K] an expert -> [T, k*N]."""
    num_tokens, top_k = experts.shape
    rows, width = weights[0].shape
    own = x.shape[1] == top_k * width  # a row for each place, not one for all
    operands = x.view(num_tokens, -1, width).expand(-1, top_k, -1) if not own else x
    operands = operands.reshape(num_tokens * top_k, width)
    out = torch.empty(num_tokens * top_k, rows)
    biases = [None] * len(weights) if bias is None else bias.view(len(weights), rows)
    for expert, weight in enumerate(weights):
        here = torch.nonzero(experts.reshape(-1) == expert).view(-1)
        if len(here):
            out[here] = lin.linear(operands[here], weight, biases[expert], workers)
    return out.view(num_tokens, top_k * rows)


def expert_sum(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See ops.expert_sum.  x [T, k*H], weights [T, k] -> [T, H]."""
    num_tokens, top_k = weights.shape
    products = x.view(num_tokens, top_k, -1) * weights[:, :, None]
    total = products[:, 0]
    for j in range(1, top_k):
        total = total + products[:, j]
    return total


__all__ = ["expert_linear", "expert_sum", "expert_weights", "top_experts"]
