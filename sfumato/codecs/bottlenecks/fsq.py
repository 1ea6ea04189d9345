"""Finite scalar quantization (arXiv 2309.15505): every channel is bounded and rounded to a few steps; no codebook has to learn, or can collapse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.codecs.bottlenecks.vq import Codes, Counted, check_indices

EPS = 1e-3  # keeps the outermost levels within reach of tanh


@dataclass(frozen=True, kw_only=True)
class FSQConfig(Codes):
    """`steps` of each channel: (8, 5, 5, 5) are 1,000 codes, (4, 4, 4, 4, 4) are 1,024."""

    kind: str = "fsq"
    steps: tuple[int, ...] = (8, 5, 5, 5)

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 3:
            raise ValueError(f"steps (={list(self.steps)}) must all be at least 3: for two a channel there is kind lfq")

    @property
    def channels(self) -> int:
        return len(self.steps)

    @property
    def codebook_size(self) -> int:
        return math.prod(self.steps)


class FSQ(Counted):
    """z_q in [-1, 1] per channel, straight through. The first channel is the lowest digit of the index."""

    def __init__(self, config: FSQConfig) -> None:
        super().__init__(config.codebook_size)
        self.config = config
        steps = torch.tensor(config.steps)
        self.register_buffer("steps", steps, persistent=False)
        self.register_buffer("place_values", torch.cumprod(torch.cat([torch.ones(1, dtype=torch.int64), steps[:-1]]), 0), persistent=False)

    def _rounded(self, z: Float[Tensor, "*cells c"]) -> tuple[Tensor, Tensor]:
        """(bounded values, their nearest whole numbers), both centred as the paper has it: even numbers of steps lie half a step off."""
        half = (self.steps - 1) * (1 + EPS) / 2
        offset = torch.where(self.steps % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
        return bounded, bounded.round()

    def forward(self, z_e: Float[Tensor, "b c h w"], noise: None = None) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, ""], dict[str, Tensor]]:
        with torch.autocast(z_e.device.type, enabled=False):
            bounded, whole = self._rounded(rearrange(z_e.float(), "b c h w -> b h w c"))
            passed = (bounded + (whole - bounded).detach()) / (self.steps // 2)
        return rearrange(passed, "b h w c -> b c h w"), z_e.new_zeros(()).float(), {"indices": self._index(whole)}

    def _index(self, whole: Tensor) -> Tensor:
        return ((whole.long() + self.steps // 2) * self.place_values).sum(-1, keepdim=True)

    def quantize(self, z_e: Float[Tensor, "b c h w"]) -> Int[Tensor, "b h w 1"]:
        """The index of every latent."""
        return self._index(self._rounded(rearrange(z_e.float(), "b c h w -> b h w c"))[1])

    def lookup(self, indices: Int[Tensor, "b h w 1"]) -> Float[Tensor, "b c h w"]:
        """The values of indices. Raises ValueError for one outside of the codebook."""
        check_indices(indices, self.config.codebook_size)
        digits = indices // self.place_values % self.steps
        return rearrange((digits - self.steps // 2) / (self.steps // 2), "b h w c -> b c h w")
