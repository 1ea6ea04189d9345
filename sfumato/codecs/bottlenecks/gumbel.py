"""The Gumbel-softmax bottleneck of older checkpoints (arXiv 1611.01144), as they are used after training: the code of the largest logit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.codecs.bottlenecks.vq import Codes, check_indices


@dataclass(frozen=True, kw_only=True)
class GumbelConfig(Codes):
    """`size` codes of `channels` numbers, chosen by a projection of `encoder_channels`. For importing: new codebooks learn better as vq or fsq."""

    kind: str = "gumbel"
    size: int = 1024
    channels: int = 256
    encoder_channels: int = 256


class Gumbel(nn.Module):
    """Imported only: it does not train."""

    def __init__(self, config: GumbelConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Conv2d(config.encoder_channels, config.size, 1)
        self.codebook = nn.Parameter(torch.randn(config.size, config.channels))
        self.register_buffer("counts", torch.zeros(config.size, dtype=torch.int64), persistent=False)

    def forward(self, z_e: Float[Tensor, "b k h w"], noise: None = None) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, ""], dict[str, Tensor]]:
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise ValueError("a Gumbel codebook can be used, not trained: train the decoder alone, or a new codec of kind vq or fsq")
        indices = self.quantize(z_e)
        return self.lookup(indices), z_e.new_zeros(()), {"indices": indices}

    def quantize(self, z_e: Float[Tensor, "b k h w"]) -> Int[Tensor, "b h w 1"]:
        """The index of the largest logit."""
        return rearrange(self.proj(z_e).argmax(1), "b h w -> b h w 1")

    def lookup(self, indices: Int[Tensor, "b h w 1"]) -> Float[Tensor, "b c h w"]:
        """The codes of indices. Raises ValueError for one outside of the codebook."""
        check_indices(indices, self.config.size)
        return rearrange(self.codebook[indices[..., 0]], "b h w c -> b c h w")

    def update(self, stats: dict[str, Tensor]) -> None:
        """Nothing to learn."""

    def forget(self) -> None:
        """Nothing was counted."""
