"""Embeddings of time and place."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float32
from torch import Tensor


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
