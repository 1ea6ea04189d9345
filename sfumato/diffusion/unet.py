"""The denoiser of Stable Diffusion (arXiv 2112.10752, section 3.3): residual blocks of convolutions with time, and transformers over all places
that attend to the text. Parts are called as in diffusers, whose names LoRA files use too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.config import at_least
from sfumato.core.seams import Cond
from sfumato.nn.embeddings import sinusoidal
from sfumato.nn.winograd import Conv3x3

TIMES = "time_ids"  # in Cond.extra: original height and width, crop from above and left, wanted height and width (arXiv 2307.01952, section 2.2)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Level i has `widths[i]` channels, `blocks` residual blocks down and one more up, after each a transformer of `depths[i]` layers (0: none) with
    `heads[i]` heads; each level but the last halves the side. In the middle `mid_depth` layers with the last level's heads.

    `context` numbers a token of text. `pooled` and `sizes` numbers of pooled text and of sizes told beside time (SDXL: 1280 and 6; 0: not told).
    `linear`: transformers begin and end with linear layers instead of 1x1 convolutions. `steps` of the discrete model: it hears t in (0, 1] as
    steps * t - 1. Defaults are Stable Diffusion 1.x.
    """

    kind: str = "unet"
    channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    depths: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context: int = 768
    linear: bool = False
    pooled: int = 0
    sizes: int = 0
    size_width: int = 256
    groups: int = 32
    steps: int = 1000

    def __post_init__(self) -> None:
        at_least(1, channels=self.channels, out_channels=self.out_channels, blocks=self.blocks, context=self.context, steps=self.steps)
        at_least(0, mid_depth=self.mid_depth, pooled=self.pooled, sizes=self.sizes)
        n = len(self.widths)
        if not n or len(self.depths) != n or len(self.heads) != n:
            raise ValueError(f"widths (={self.widths}), depths (={self.depths}) and heads (={self.heads}) must be as many, one a level")
        for width, depth, heads in zip(self.widths, self.depths, self.heads, strict=True):
            if width % self.groups or heads < 1 or width % heads or depth < 0:
                raise ValueError(f"widths (={self.widths}) must be multiples of groups (={self.groups}) and of heads (={self.heads})")
        if bool(self.pooled) != bool(self.sizes):
            raise ValueError(f"pooled (={self.pooled}) and sizes (={self.sizes}) are told together, or neither")

    @property
    def text_width(self) -> int:
        """Numbers a token of text, as other denoisers call them."""
        return self.context


class TimestepEmbedding(nn.Module):
    def __init__(self, cin: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(cin, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b e"]) -> Float[Tensor, "b d"]:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))) + time)))."""

    def __init__(self, cin: int, cout: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, cin, eps=1e-5), Conv3x3(cin, cout)
        self.time_emb_proj = nn.Linear(time, cout)
        self.norm2, self.conv2 = nn.GroupNorm(groups, cout, eps=1e-5), Conv3x3(cout, cout)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b d"]) -> Float[Tensor, "b c2 h w"]:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class CrossAttention(nn.Module):
    """Tokens look at a context, or at themselves; queries, keys and values are three layers."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, width, bias=False) for n in (width, context, context))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Float[Tensor, "b n d"], context: Float[Tensor, "b m e"], mask: Bool[Tensor, "b m"] | None = None) -> Float[Tensor, "b n d"]:
        q, k, v = (rearrange(f(y), "b n (h d) -> b h n d", h=self.heads) for f, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        return self.to_out[0](rearrange(y, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """a * gelu(b) of one linear layer's halves (arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        a, b = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(b)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])  # dropout was in the middle

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, and a gated MLP, each after a norm and added."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = CrossAttention(width, heads, width), CrossAttention(width, heads, context)
        self.ff = FeedForward(width)

    def forward(self, x: Float[Tensor, "b n d"], context: Float[Tensor, "b m e"], mask: Bool[Tensor, "b m"] | None = None) -> Float[Tensor, "b n d"]:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """x + transformer over all places of x."""

    def __init__(self, width: int, heads: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        self.linear = config.linear
        self.norm = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.proj_in, self.proj_out = (nn.Linear(width, width) if config.linear else nn.Conv2d(width, width, 1) for _ in range(2))
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, heads, config.context) for _ in range(depth))

    def forward(
        self, x: Float[Tensor, "b c h w"], context: Float[Tensor, "b m e"], mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context, mask)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]).contiguous()  # or the layers that follow would put channels last, which is slower
        return x + (h if self.linear else self.proj_out(h))


class Resampled(nn.Module):
    """Half the side by a strided convolution, or twice the side and a convolution."""

    def __init__(self, width: int, down: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1) if down else Conv3x3(width, width)

    def forward(self, x: Float[Tensor, "b c h w"], size: Sequence[int] | None = None) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(x if size is None else F.interpolate(x, size=tuple(size), mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, down, up or in the middle, each with its transformer where there is one."""

    def __init__(self, ways: list[tuple[int, int]], time: int, heads: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(cin, cout, time, config.groups) for cin, cout in ways)
        width = ways[-1][1]
        if depth:
            self.attentions = nn.ModuleList(SpatialTransformer(width, heads, depth, config) for _ in ways)

    def block(
        self, i: int, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b d"], context: Float[Tensor, "b m e"], mask: Bool[Tensor, "b m"] | None
    ) -> Float[Tensor, "b c2 h w"]:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context, mask) if hasattr(self, "attentions") else x


class Middle(nn.Module):
    """Two blocks with a transformer between them."""

    def __init__(self, width: int, time: int, heads: int, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, time, config.groups) for _ in range(2))
        if config.mid_depth:
            self.attentions = nn.ModuleList([SpatialTransformer(width, heads, config.mid_depth, config)])

    def forward(
        self, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b d"], context: Float[Tensor, "b m e"], mask: Bool[Tensor, "b m"] | None
    ) -> Float[Tensor, "b c h w"]:
        x = self.resnets[0](x, time)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x, context, mask)
        return self.resnets[1](x, time)


class UNet(nn.Module):
    """net(x_t, t in (0, 1], Cond) -> prediction "b out h w". `cond.text` is attended to; `cond.concat` are channels beside x (masks and masked
    pictures of inpainting models); `cond.pooled` and `cond.extra["time_ids"]` are told beside time where the config has them.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        widths, time = c.widths, 4 * c.widths[0]
        self.conv_in = nn.Conv2d(c.channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time)
        if c.pooled:
            self.add_embedding = TimestepEmbedding(c.pooled + c.sizes * c.size_width, time)
        self.down_blocks, skips = nn.ModuleList(), [widths[0]]
        for i, width in enumerate(widths):
            ways = [(skips[-1] if j == 0 else width, width) for j in range(c.blocks)]
            level = Level(ways, time, c.heads[i], c.depths[i], c)
            skips += [width] * c.blocks
            if i < len(widths) - 1:
                level.downsamplers = nn.ModuleList([Resampled(width, down=True)])
                skips.append(width)
            self.down_blocks.append(level)
        self.mid_block = Middle(widths[-1], time, c.heads[-1], c)
        self.up_blocks, x = nn.ModuleList(), widths[-1]
        for i in reversed(range(len(widths))):
            ways = []
            for _ in range(c.blocks + 1):
                ways.append((x + skips.pop(), widths[i]))
                x = widths[i]
            level = Level(ways, time, c.heads[i], c.depths[i], c)
            if i:
                level.upsamplers = nn.ModuleList([Resampled(widths[i], down=False)])
            self.up_blocks.append(level)
        self.conv_norm_out, self.conv_out = nn.GroupNorm(c.groups, widths[0], eps=1e-5), nn.Conv2d(widths[0], c.out_channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: Cond, residuals: Sequence[Float[Tensor, "b _ _ _"]] = ()
    ) -> Float[Tensor, "b out h w"]:
        """`residuals` are added to what each level leaves for the way up, and the last of them to the middle: of a ControlNet."""
        return self.whole(x, t, cond, residuals)[0]

    def whole(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: Cond, residuals: Sequence[Float[Tensor, "b _ _ _"]] = ()
    ) -> tuple[Float[Tensor, "b out h w"], Float[Tensor, "b d h w"]]:
        """The prediction, and the deep features: what goes into the last block."""
        x, time, context, mask = self._begun(x, t, cond)
        skips = [x]
        for level in self.down_blocks:
            for i in range(self.config.blocks):
                x = level.block(i, x, time, context, mask)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, time, context, mask)
        if residuals:
            *beside, middle = residuals
            skips, x = [s + r for s, r in zip(skips, beside, strict=True)], x + middle
        for level in self.up_blocks:
            for i in range(self.config.blocks + 1):
                deep = x
                x = level.block(i, torch.cat([x, skips.pop()], dim=1), time, context, mask)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(x))), deep

    def shallow(self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: Cond, deep: Float[Tensor, "b d h w"]) -> Float[Tensor, "b out h w"]:
        """The prediction by the first convolution and the last block alone, with deep features of another time (arXiv 2312.00858)."""
        x, time, context, mask = self._begun(x, t, cond)
        x = self.up_blocks[-1].block(self.config.blocks, torch.cat([deep, x], dim=1), time, context, mask)  # type: ignore[operator]
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _begun(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What comes out of the first convolution, and what all blocks are told."""
        if cond.concat is not None:
            x = torch.cat([x, cond.concat.to(x)], dim=1)
        self._check(x, cond)
        return self.conv_in(x), self._time(t, cond, x), cond.text.to(x), cond.mask  # type: ignore[union-attr]

    def _time(self, t: Tensor, cond: Cond, x: Tensor) -> Tensor:
        """Time in fp32 until it is embedded, with what is told beside it."""
        c = self.config
        time = self.time_embedding(sinusoidal(t * c.steps - 1, c.widths[0], scale=1.0).to(x.dtype))
        if not c.pooled:
            return time
        sizes = rearrange(sinusoidal(cond.extra[TIMES].reshape(-1), c.size_width, scale=1.0), "(b n) e -> b (n e)", n=c.sizes)
        return time + self.add_embedding(torch.cat([cond.pooled, sizes], dim=1).to(x.dtype))  # type: ignore[list-item]

    def _check(self, x: Tensor, cond: Cond) -> None:
        c = self.config
        if x.ndim != 4 or x.shape[1] != c.channels:
            beside = "" if c.channels == c.out_channels else f", with the {c.channels - c.out_channels} of cond.concat (an inpainting model)"
            raise ValueError(f"x must have {c.channels} channels{beside}, not the shape {tuple(x.shape)}")
        told: dict[str, Any] = {"text": cond.text}
        if c.pooled:
            told |= {"pooled": cond.pooled, TIMES: cond.extra.get(TIMES)}
        if lacking := [name for name, v in told.items() if v is None]:
            raise ValueError(f"cond must have {' and '.join(lacking)} for this network")
        if cond.text.shape[2] != c.context:  # type: ignore[union-attr]
            raise ValueError(f"cond.text must have {c.context} numbers a token, not {cond.text.shape[2]}: it is of another text encoder")  # type: ignore[union-attr]
