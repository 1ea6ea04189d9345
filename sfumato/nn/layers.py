"""Small building blocks that several networks share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

Activation = Literal["silu", "relu", "gelu", "leaky-relu"]
Norm = Literal["group", "batch", "none"]


class Unfilled(TorchFunctionMode):
    """Networks made within have no first weights: a file has them, and random numbers take time (on "meta" the import of torch's compiler, too)."""

    DRAWN = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "orthogonal_")

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if getattr(func, "__name__", "") in self.DRAWN:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def activation_of(kind: Activation) -> nn.Module:
    """Raises ValueError for another kind."""
    known = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU, "leaky-relu": lambda: nn.LeakyReLU(0.2)}
    if kind not in known:
        raise ValueError(f"activation (={kind!r}) must be one of {', '.join(known)}")
    return known[kind]()


def norm_of(kind: Norm, width: int, groups: int = 16, eps: float = 1e-5) -> nn.Module:
    """group: of each picture alone; batch: of all pictures of a batch, and of averages of them when it draws; none: the identity.

    Raises ValueError for another kind.
    """
    known = {"group": lambda: nn.GroupNorm(groups, width, eps=eps), "batch": lambda: nn.BatchNorm2d(width, eps=eps), "none": nn.Identity}
    if kind not in known:
        raise ValueError(f"norm (={kind!r}) must be one of {', '.join(known)}")
    return known[kind]()


def channels_at(first: int, most: int, size: int) -> list[int]:
    """Channels at sides of `size`, size/2, ... 4: twice as many at each half, `most` at most."""
    return [min(first * 2**i, most) for i in range(size.bit_length() - 2)]


def check_groups(norm: Norm, **channels: int) -> None:
    """Raises ValueError where group norm cannot cut these numbers of channels into its groups of 16."""
    if norm == "group" and any(n % 16 for n in channels.values()):
        said = " and ".join(f"{name} (={n})" for name, n in channels.items())
        raise ValueError(f"{said} must be multiples of 16 with norm group")


class ResBlock(nn.Module):
    """x + conv(act(conv(act(norm(x))))): a pre-activation residual block with a single norm (arXiv 1603.05027).

    The last convolution starts at zero, so that a new network is the identity along its trunk.
    """

    def __init__(self, width: int, norm: Norm = "group", activation: Activation = "silu") -> None:
        super().__init__()
        self.norm, self.act = norm_of(norm, width), activation_of(activation)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        h = self.conv1(self.act(self.norm(x)))
        return x + self.conv2(self.act(h))


def checkpointed(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Parts of these kinds keep only what goes into them, and compute the rest again in the backward pass (arXiv 1604.06174)."""
    for part in network.modules():
        if isinstance(part, kinds):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)


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


def slerp(a: Float[Tensor, " *shape"], b: Float[Tensor, " *shape"], share: float) -> Float[Tensor, " *shape"]:
    """From a to b along the arc between them, so that what lies between has the norm of noise too; a straight line where they are parallel."""
    cosine = float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12))
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(angle) < 1e-4:
        return torch.lerp(a, b, share)
    return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)
