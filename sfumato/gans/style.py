"""The style-based pair of StyleGAN2 (arXiv 1912.04958) without custom operators: styles scale activations, what the weights make of that is undone.

z -> w by a mapping network; at each side w scales the channels that enter a convolution, noise is added, and a picture is summed up from all sides.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.config import at_least
from sfumato.nn.layers import channels_at

GAIN = 2**0.5  # of the activation


@dataclass(frozen=True, kw_only=True)
class StyleConfig:
    """`width` channels at the full side, twice as many at each half of it, `most` at most; `w` numbers of style by `mapping` layers, which learn at
    `mapping_lr` of the rate.
    """

    kind: str = "style"
    width: int = 32
    most: int = 256
    w: int = 256
    mapping: int = 4
    mapping_lr: float = 0.01

    def __post_init__(self) -> None:
        at_least(1, width=self.width, most=self.most, w=self.w, mapping=self.mapping)
        at_least(1e-6, mapping_lr=self.mapping_lr)


class EqualLinear(nn.Linear):
    """Weights of unit deviation, scaled when used, so that all layers learn at the same pace (arXiv 1710.10196, section 4.1)."""

    def __init__(self, a: int, b: int, *, bias: bool = True, lr: float = 1.0, start: float = 0.0) -> None:
        super().__init__(a, b, bias=bias)
        nn.init.normal_(self.weight, std=1 / lr)
        if bias:
            nn.init.constant_(self.bias, start / lr)
        self.scale, self.lr = lr / a**0.5, lr

    def forward(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
        return F.linear(x, self.weight * self.scale, None if self.bias is None else self.bias * self.lr)


class EqualConv(nn.Conv2d):
    """The same of a convolution that keeps the side."""

    def __init__(self, a: int, b: int, side: int, *, bias: bool = True) -> None:
        super().__init__(a, b, side, padding=side // 2, bias=bias)
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.scale = 1 / (a * side * side) ** 0.5

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        return self._conv_forward(x, self.weight * self.scale, self.bias)


def act(x: Float[Tensor, " *rest"]) -> Float[Tensor, " *rest"]:
    """A leaky ReLU that keeps the mean square."""
    return F.leaky_relu(x, 0.2) * GAIN


class Styled(nn.Module):
    """act(demodulated(conv(x * s(w))) + strength * noise + bias): eq. 1 and 3, with the division made of what leaves the convolution."""

    def __init__(self, a: int, b: int, w: int, side: int = 3, *, up: bool = False) -> None:
        super().__init__()
        self.style, self.conv, self.up = EqualLinear(w, a, start=1.0), EqualConv(a, b, side, bias=False), up
        self.bias, self.strength = nn.Parameter(torch.zeros(b)), nn.Parameter(torch.zeros(()))

    def forward(self, x: Float[Tensor, "b i h w"], w: Float[Tensor, "b s"], noise: Float[Tensor, "b 1 h2 w2"]) -> Float[Tensor, "b o h2 w2"]:
        s = self.style(w)
        power = (self.conv.weight * self.conv.scale).square().sum((2, 3))
        demodulation = torch.rsqrt(s.square() @ power.T + 1e-8)
        x = x * s[:, :, None, None]
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = self.conv(x) * demodulation[:, :, None, None]
        return act(x + self.strength * noise + self.bias[:, None, None])


class StyleGenerator(nn.Module):
    """Vector "b d" -> w "b s" (`style`) -> image "b c size size"; `noise` "b n" are the unit Gaussian numbers of all places, none is zeros."""

    def __init__(self, config: StyleConfig, vector: int, size: int, channels: int) -> None:
        super().__init__()
        widths, s = channels_at(config.width, config.most, size)[::-1], config.w
        self.sides = [4] + [4 * 2**i for i in range(1, len(widths)) for _ in (0, 1)]
        self.mapping = nn.ModuleList(EqualLinear(vector if i == 0 else s, s, lr=config.mapping_lr) for i in range(config.mapping))
        self.start = nn.Parameter(torch.randn(widths[0], 4, 4))
        layers = [Styled(widths[0], widths[0], s)]
        for a, b in itertools.pairwise(widths):
            layers += [Styled(a, b, s, up=True), Styled(b, b, s)]
        self.layers = nn.ModuleList(layers)
        self.to_style = nn.ModuleList(EqualLinear(s, w, start=1.0) for w in widths)
        self.to_image = nn.ModuleList(EqualConv(w, channels, 1) for w in widths)
        self.colours: nn.Module = nn.Identity()

    @property
    def noises(self) -> int:
        """Numbers of noise a picture."""
        return sum(side * side for side in self.sides)

    def style(self, v: Float[Tensor, "b d"]) -> Float[Tensor, "b s"]:
        for layer in self.mapping:
            v = act(layer(v))
        return v

    def forward(self, w: Float[Tensor, "b s"], noise: Float[Tensor, "b n"] | None = None) -> Float[Tensor, "b c size size"]:
        x, image = self.start.expand(len(w), -1, -1, -1), None
        noise = w.new_zeros(len(w), self.noises) if noise is None else noise
        parts = noise.split([side * side for side in self.sides], dim=1)
        for i, (layer, side, part) in enumerate(zip(self.layers, self.sides, parts, strict=True)):
            x = layer(x, w, part.reshape(-1, 1, side, side).to(x))
            if i % 2 == 0:  # the second layer of each side
                k = i // 2
                seen = self.to_image[k](x * self.to_style[k](w)[:, :, None, None])
                image = seen if image is None else F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False) + seen
        assert image is not None
        return self.colours(image)


class StyleDiscriminator(nn.Module):
    """Image "b c size size" -> features "b d": residual blocks that halve the side, and how much the pictures of a group differ (1710.10196)."""

    def __init__(self, config: StyleConfig, size: int, channels: int) -> None:
        super().__init__()
        widths = channels_at(config.width, config.most, size)
        self.first = EqualConv(channels, widths[0], 1)
        self.convs = nn.ModuleList(
            nn.ModuleList([EqualConv(a, a, 3), EqualConv(a, b, 3), EqualConv(a, b, 1, bias=False)]) for a, b in itertools.pairwise(widths)
        )
        self.last, self.out = EqualConv(widths[-1] + 1, widths[-1], 3), EqualLinear(16 * widths[-1], widths[-1])
        self.features, self.mixes = widths[-1], True

    @property
    def parts(self) -> list[nn.Module]:
        """From the picture on."""
        return [self.first, *self.convs]

    def forward(self, x: Float[Tensor, "b c size size"]) -> Float[Tensor, "b d"]:
        x = act(self.first(x))
        for one, two, skip in self.convs:  # type: ignore[misc]
            h = F.avg_pool2d(act(two(act(one(x)))), 2)
            x = (h + skip(F.avg_pool2d(x, 2))) / GAIN
        x = act(self.last(torch.cat([x, spread_of(x)], dim=1)))
        return act(self.out(x.flatten(1)))


def spread_of(x: Float[Tensor, "b c h w"], group: int = 4) -> Float[Tensor, "b 1 h w"]:
    """The mean standard deviation over the pictures of a group, as one more channel; a rest that fills no group makes one."""
    parts = [p.var(0, unbiased=False).add(1e-8).sqrt().mean().expand(len(p), 1, *x.shape[2:]) for p in x.split(group)]
    return torch.cat(parts)
