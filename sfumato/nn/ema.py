"""Exponential moving average of weights, its horizon counted in images so that it does not change with the batch size."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
RAMP = 0.05


def ema_copy(network: M) -> M:
    """A frozen copy to average into."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def _local(value: Tensor) -> Tensor:
    """This process's part of a tensor that several share, in the same memory; of others all."""
    return value.to_local() if hasattr(value, "to_local") else value  # type: ignore[no-any-return]


@torch.no_grad()
def ema_update(average: nn.Module, network: nn.Module, *, images: int, half_life: float, seen: int, ramp: float = RAMP) -> None:
    """average += (1 - decay) (network - average), decay = 0.5 ** (images / half_life).

    While less than half_life / `ramp` images were `seen`, the half-life is that share of them, so that early averages forget the random start
    (the ramp of arXiv 2006.06676). Buffers are copied.
    """
    half_life = max(min(half_life, ramp * seen), 1e-8)
    decay = 0.5 ** (images / half_life)
    own, raw = ([_local(p.detach()) for p in n.parameters()] for n in (average, network))
    if own:
        torch._foreach_lerp_(own, raw, 1 - decay)
    for a, b in zip(average.buffers(), network.buffers(), strict=True):
        a.copy_(b)
