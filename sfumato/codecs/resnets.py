"""The convolutional encoder and decoder of VQGAN (arXiv 2012.09841) and of Stable Diffusion's autoencoder (arXiv 2112.10752), with their names.

Residual blocks of two convolutions, attention at chosen resolutions and in the middle, one level a halving. Heavier than `convnets`, which does the
same work with space-to-depth; it is here for checkpoints of that family, and where a GPU trains.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.nn.layers import Activation, Norm, activation_of, norm_of
from sfumato.nn.winograd import Conv3x3

GROUPS, EPS = 32, 1e-6


@dataclass(frozen=True, kw_only=True)
class ResnetConfig:
    """Level i has width * multipliers[i] channels, `blocks` residual blocks, and attention where the side of `resolution`-pixel pictures is one of
    `attention`. The factor from image to latent is 2 ** (len(multipliers) - 1). `z_channels` lie between the encoder's last layer and the bottleneck.
    """

    kind: str = "resnet"
    image_channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    resolution: int = 256
    z_channels: int = 256
    double_z: bool = False
    dropout: float = 0.0
    norm: Norm = "group"
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        if self.width % GROUPS or not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"width (={self.width}) must be a multiple of {GROUPS}, which its norms have as groups, multipliers at least 1")
        if self.image_channels < 1 or self.blocks < 1 or self.z_channels < 1:
            raise ValueError(
                f"image_channels (={self.image_channels}), blocks (={self.blocks}) and z_channels (={self.z_channels}) must be at least 1"
            )
        if self.resolution % self.factor:
            raise ValueError(f"resolution (={self.resolution}) must be a multiple of the factor (={self.factor})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout (={self.dropout}) must be from 0 to below 1")

    @property
    def factor(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    def attends(self, level: int) -> bool:
        return self.resolution // 2**level in self.attention

    def normed(self, channels: int) -> nn.Module:
        return norm_of(self.norm, channels, GROUPS, EPS)


class ResnetBlock(nn.Module):
    """x + conv2(dropout(act(norm2(conv1(act(norm1(x))))))); a 1 x 1 convolution where the width changes."""

    def __init__(self, config: ResnetConfig, cin: int, cout: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = config.normed(cin), Conv3x3(cin, cout)
        self.norm2, self.conv2 = config.normed(cout), Conv3x3(cout, cout)
        self.act, self.dropout = activation_of(config.activation), config.dropout
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        h = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(F.dropout(self.act(self.norm2(h)), self.dropout, self.training))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head attention over all positions, by 1 x 1 convolutions."""

    def __init__(self, config: ResnetConfig, width: int) -> None:
        super().__init__()
        self.norm = config.normed(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(y)


class Downsample(nn.Module):
    """Half the side: padded right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side: each pixel four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv3x3(width, width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution and what leads out of it."""

    def __init__(self, config: ResnetConfig, cin: int, cout: int, blocks: int, attends: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(config, cin if i == 0 else cout, cout) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(config, cout) for _ in range(blocks if attends else 0))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, config: ResnetConfig, width: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = (ResnetBlock(config, width, width) for _ in range(2))
        self.attn_1 = AttnBlock(config, width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResnetEncoder(nn.Module):
    """Image "b c h w" -> "b out h/f w/f", what the bottleneck takes."""

    def __init__(self, config: ResnetConfig, out_channels: int) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.image_channels, config.width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (cin, cout) in enumerate(zip([config.width, *widths[:-1]], widths, strict=True)):
            level = Level(config, cin, cout, config.blocks, config.attends(i))
            if i < len(widths) - 1:
                level.downsample = Downsample(cout)
            self.down.append(level)
        self.mid = Middle(config, widths[-1])
        z = config.z_channels * (2 if config.double_z else 1)
        self.norm_out, self.act = config.normed(widths[-1]), activation_of(config.activation)
        self.conv_out = nn.Conv2d(widths[-1], z, 3, padding=1)
        self.quant_conv = nn.Conv2d(z, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z zh zw"]:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.quant_conv(self.conv_out(self.act(self.norm_out(self.mid(x)))))


class ResnetDecoder(nn.Module):
    """What the bottleneck gives "b in h w" -> image "b c h*f w*f"."""

    def __init__(self, config: ResnetConfig, in_channels: int) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.post_quant_conv = nn.Conv2d(in_channels, config.z_channels, 1)
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(config, widths[-1])
        levels = []
        for i in reversed(range(len(widths))):
            cin = widths[min(i + 1, len(widths) - 1)]
            level = Level(config, cin, widths[i], config.blocks + 1, config.attends(i))
            if i:
                level.upsample = Upsample(widths[i])
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out, self.act = config.normed(widths[0]), activation_of(config.activation)
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "b z zh zw"]) -> Float[Tensor, "b c h w"]:
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(self.act(self.norm_out(x)))
