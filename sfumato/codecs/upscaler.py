"""A learned enlargement by 4 of what a codec draws (a small EDSR, arXiv 1707.02921): x' = bicubic(x) + r(x)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.checkpoint import hash_tensors


@dataclass(frozen=True, kw_only=True)
class UpscalerConfig:
    """`blocks` residual blocks of `width` channels at the small resolution."""

    kind: str = "upscaler"
    channels: int = 4
    width: int = 64
    blocks: int = 6
    factor: int = 4

    def __post_init__(self) -> None:
        for name in ("channels", "width", "blocks", "factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} (={getattr(self, name)}) must be at least 1")


def drawn_by(codec: nn.Module) -> str:
    """What an enlargement was made for: a digest of the decoder whose pictures it has learned to enlarge."""
    return hash_tensors({k: v for k, v in codec.state_dict().items() if k.startswith("decoder.")})


class Block(nn.Module):
    """x + conv(silu(conv(x))), without norms: they would take a picture's contrast away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.second(F.silu(self.first(x)))


class Upscaler(nn.Module):
    """Pictures in [-1, 1], premultiplied where they have alpha -> the same `factor` times as large. It starts as bicubic enlargement."""

    def __init__(self, config: UpscalerConfig) -> None:
        super().__init__()
        self.config = config
        out = nn.Conv2d(config.width, config.channels * config.factor**2, 3, padding=1)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        start = nn.Conv2d(config.channels, config.width, 3, padding=1)
        self.body = nn.Sequential(start, *(Block(config.width) for _ in range(config.blocks)), nn.SiLU(), out, nn.PixelShuffle(config.factor))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c hf wf"]:
        return F.interpolate(x, scale_factor=self.config.factor, mode="bicubic", align_corners=False) + self.body(x)
