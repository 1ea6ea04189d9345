"""Residual quantization (arXiv 2107.03312, 2203.01941): each level quantizes what the levels before it left over; z_q is the sum of their codes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.codecs.bottlenecks.vq import VQ, VQConfig


@dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """`levels` codebooks of one kind. Codes are compared by distance, not by direction: what is left over has a length."""

    kind: str = "residual"
    levels: int = 4
    code: VQConfig = field(default_factory=lambda: VQConfig(size=256, cosine=False, gradient="straight-through"))

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels (={self.levels}) must be at least 1")
        if self.code.cosine or self.code.gradient != "straight-through":
            raise ValueError("code.cosine must be false and code.gradient straight-through: a residual has a length, and its levels are added up")

    @property
    def channels(self) -> int:
        return self.code.channels

    @property
    def encoder_channels(self) -> int:
        return self.code.channels

    @property
    def codebook_size(self) -> int:
        return self.code.size


class Residual(nn.Module):
    """Indices are "b h w levels"; `counts` are "levels size"."""

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizers = nn.ModuleList(VQ(config.code) for _ in range(config.levels))

    @property
    def counts(self) -> Int[Tensor, "levels size"]:
        return torch.stack([q.counts for q in self.quantizers])

    def forward(self, z_e: Float[Tensor, "b c h w"], noise: None = None) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, ""], dict[str, Tensor]]:
        left, total, loss = z_e.float(), torch.zeros_like(z_e, dtype=torch.float32), z_e.new_zeros(()).float()
        stats: dict[str, list[Tensor]] = {}
        for quantizer in self.quantizers:
            code, level_loss, found = quantizer(left)
            code = code.detach()
            total, left, loss = total + code, left - code, loss + level_loss / self.config.levels
            for k, v in found.items():
                stats.setdefault(k, []).append(v)
        passed = z_e + (total - z_e).detach()
        told = {"latents": torch.stack(stats["latents"]), "indices": torch.cat(stats["indices"], -1)}
        return passed, loss, told | {"commitment": stats["commitment"][-1]}

    def quantize(self, z_e: Float[Tensor, "b c h w"]) -> Int[Tensor, "b h w l"]:
        """The index of every latent on every level."""
        left, found = z_e.float(), []
        for quantizer in self.quantizers:
            found.append(quantizer.quantize(left))
            left = left - quantizer.lookup(found[-1])
        return torch.cat(found, -1)

    def lookup(self, indices: Int[Tensor, "b h w l"]) -> Float[Tensor, "b c h w"]:
        """The sum of the codes of the levels; fewer levels than there are give a coarser picture."""
        if not 1 <= indices.shape[-1] <= self.config.levels:
            raise ValueError(f"indices (={tuple(indices.shape)}) must be 'b h w l' with l from 1 to {self.config.levels}")
        return torch.stack([q.lookup(i) for q, i in zip(self.quantizers, indices.split(1, -1), strict=False)]).sum(0)

    def update(self, stats: dict[str, Tensor]) -> None:
        """Each level's own: see `VQ.update`."""
        for quantizer, latents, indices in zip(self.quantizers, stats["latents"], stats["indices"].split(1, -1), strict=True):
            quantizer.update({"latents": latents, "indices": indices})

    @torch.no_grad()
    def fit(self, z_e: Float[Tensor, "b c h w"], seed: int = 0, rounds: int = 10, fresh: bool = True) -> None:
        """The k-means of latents, then of what each level leaves over: see `VQ.fit`."""
        left = z_e.float()
        for level, quantizer in enumerate(self.quantizers):
            quantizer.fit(left, seed + level, rounds, fresh)
            left = left - quantizer.lookup(quantizer.quantize(left))

    def forget(self) -> None:
        """Begins to count anew."""
        for quantizer in self.quantizers:
            quantizer.forget()
