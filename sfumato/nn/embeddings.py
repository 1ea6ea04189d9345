"""Embeddings of time, of place, and of known things."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn


def sinusoidal(t: Float[Tensor, " b"], width: int, max_period: float = 10_000.0, scale: float = 1000.0) -> Float32[Tensor, "b {width}"]:
    """Times in [0, 1] -> cosines and sines at geometric frequencies (arXiv 1706.03762, section 3.5), in fp32."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(width // 2, device=t.device, dtype=torch.float32) / (width // 2))
    angle = t.float()[:, None] * scale * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def grid_positions(height: int, width: int, channels: int) -> Float[Tensor, "{height*width} {channels}"]:
    """Fixed 2-D sine and cosine positions, row by row; channels must be a multiple of 4."""
    if channels % 4:
        raise ValueError(f"channels (={channels}) must be a multiple of 4: sine and cosine for each of two axes")
    frequencies = 1.0 / 100.0 ** (torch.arange(channels // 4) / (channels // 4))
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (y, x)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


def rotary(rows: Float[Tensor, " n"], columns: Float[Tensor, " n"], width: int, base: float = 100.0) -> Float[Tensor, "n {width//2}"]:
    """Angles of 2-D rotary positions (arXiv 2104.09864; half of the pairs turn with the row, half with the column); width: a multiple of 4."""
    if width % 4:
        raise ValueError(f"width (={width}) must be a multiple of 4: pairs for each of two axes")
    frequencies = 1.0 / base ** (torch.arange(width // 4, device=rows.device) / (width // 4))
    return torch.cat([axis[:, None] * frequencies for axis in (rows.float(), columns.float())], dim=1)


def turned(x: Float[Tensor, "b heads n d"], angles: Float[Tensor, "n d2"]) -> Float[Tensor, "b heads n d"]:
    """Every pair (x_i, x_{i + d/2}) turned by its angle."""
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Memory(nn.Module):
    """What each known thing looks like, found by what the text says: attention of a pooled text over one key and one value per thing.

    A network learns a value as fast as a class's own embedding, and other words for the thing find it too. Keys start at the texts of the
    things' names, sharpness at 20, where names recall almost only their own thing. A pooled text of zeros (nothing was said)
    recalls nothing.
    """

    def __init__(self, things: int, text_width: int, width: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(things, text_width))
        self.values = nn.Parameter(torch.randn(things, width) * 0.02)
        self.log_sharpness = nn.Parameter(torch.tensor(20.0).log())

    def forward(self, pooled: Float[Tensor, "b e"]) -> Float[Tensor, "b d"]:
        nearness = nn.functional.normalize(pooled, dim=-1) @ nn.functional.normalize(self.keys, dim=-1).to(pooled).T
        weight = (nearness * self.log_sharpness.exp()).float().softmax(-1)
        said = (pooled != 0).any(-1, keepdim=True)
        return (weight * said).to(self.values.dtype) @ self.values
