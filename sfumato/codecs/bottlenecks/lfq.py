"""Lookup-free quantization (arXiv 2310.05737): the code is the sign of every channel; an entropy term keeps the 2^channels codes in use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sfumato.codecs.bottlenecks.vq import Codes, Counted, check_indices

GROUP = 8  # channels whose codes the entropy term looks at together


@dataclass(frozen=True, kw_only=True)
class LFQConfig(Codes):
    """2^channels codes. `entropy` weighs (mean entropy of the soft choice - entropy of the mean choice), per channel; `temperature` softens it."""

    kind: str = "lfq"
    channels: int = 10
    entropy: float = 0.1
    commitment: float = 0.25
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= 24:
            raise ValueError(f"channels (={self.channels}) must be from 1 to 24: there are 2^channels codes")
        if self.entropy < 0 or self.commitment < 0 or self.temperature <= 0:
            raise ValueError(
                f"entropy (={self.entropy}) and commitment (={self.commitment}) must be at least 0, temperature (={self.temperature}) above 0"
            )

    @property
    def codebook_size(self) -> int:
        return 2**self.channels


class LFQ(Counted):
    """z_q in {-1, 1} per channel, straight through; the index has the first channel as its lowest bit."""

    def __init__(self, config: LFQConfig) -> None:
        super().__init__(config.codebook_size)
        self.config = config
        self.register_buffer("bits", 2 ** torch.arange(config.channels), persistent=False)

    def forward(self, z_e: Float[Tensor, "b c h w"], noise: None = None) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, ""], dict[str, Tensor]]:
        c = self.config
        with torch.autocast(z_e.device.type, enabled=False):
            z = rearrange(z_e.float(), "b c h w -> b h w c")
            signs = torch.where(z > 0, 1.0, -1.0)
            to_latent = F.mse_loss(z, signs)
            loss = c.commitment * to_latent + c.entropy * self._entropy(z.flatten(0, 2))
            passed = z + (signs - z).detach()
        return rearrange(passed, "b h w c -> b c h w"), loss, {"indices": self._index(z), "commitment": to_latent.detach()}

    def _entropy(self, z: Float[Tensor, "n c"]) -> Tensor:
        """In parts of log 2 a channel, over groups of channels: within a group the mean choice is exact, between groups taken as independent."""
        total = z.new_zeros(())
        for part in z.split(GROUP, dim=1):
            codes = 1.0 - 2.0 * ((torch.arange(2 ** part.shape[1], device=z.device)[:, None] >> torch.arange(part.shape[1], device=z.device)) & 1)
            logits = 2 * part @ codes.T / self.config.temperature
            p, logp = logits.softmax(1), logits.log_softmax(1)
            mean = p.mean(0)
            total = total - (p * logp).sum(1).mean() + (mean * mean.clamp_min(1e-20).log()).sum()
        return total / (z.shape[1] * torch.tensor(2.0).log())

    def _index(self, z: Tensor) -> Tensor:
        return ((z > 0) * self.bits).sum(-1, keepdim=True)

    def quantize(self, z_e: Float[Tensor, "b c h w"]) -> Int[Tensor, "b h w 1"]:
        """The index of every latent."""
        return self._index(rearrange(z_e, "b c h w -> b h w c"))

    def lookup(self, indices: Int[Tensor, "b h w 1"]) -> Float[Tensor, "b c h w"]:
        """The signs of indices. Raises ValueError for one outside of the codebook."""
        check_indices(indices, self.config.codebook_size)
        return rearrange(((indices & self.bits) > 0).float() * 2 - 1, "b h w c -> b c h w")
