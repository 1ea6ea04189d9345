"""Small building blocks that several networks share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ResBlock(nn.Module):
    """x + conv(silu(conv(silu(norm(x))))): a pre-activation residual block with a single norm (arXiv 1603.05027).

    The last convolution starts at zero, so that a new network is the identity along its trunk.
    """

    def __init__(self, width: int, groups: int = 16) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        h = self.conv1(F.silu(self.norm(x)))
        return x + self.conv2(F.silu(h))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis (arXiv 1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, " *rest d"]) -> Float[Tensor, " *rest d"]:
        return F.rms_norm(x, (x.shape[-1],), self.scale.to(x.dtype), eps=1e-6)


class MLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, int(width * ratio))
        self.down = nn.Linear(int(width * ratio), width)

    def forward(self, x: Float[Tensor, " *rest d"]) -> Float[Tensor, " *rest d"]:
        return self.down(F.gelu(self.up(x), approximate="tanh"))
