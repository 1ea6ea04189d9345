"""The KL bottleneck of a variational autoencoder: a diagonal Gaussian posterior (arXiv 1312.6114, eq. 10)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """`channels` latent channels; the encoder gives twice as many, mean and log-variance."""

    kind: str = "kl"
    channels: int = 16

    @property
    def encoder_channels(self) -> int:
        return 2 * self.channels


def split(z_e: Float[Tensor, "b k h w"]) -> tuple[Float[Tensor, "b k//2 h w"], Float[Tensor, "b k//2 h w"]]:
    """Encoder output -> mean and std, half of the channels each, in fp32."""
    mean, logvar = z_e.float().chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30, 20))


def divergence(mean: Float[Tensor, " *shape"], std: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """KL(N(mean, std^2) || N(0, 1)) of every element, in nats (arXiv 1312.6114, appendix B)."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log())


class KL(nn.Module):
    """z = mean + std * noise (the mean itself where noise is None); loss = KL(posterior || N(0, 1)), mean over elements.

    Among the statistics "kl_channels" is its mean by channel.
    """

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, z_e: Float[Tensor, "b k h w"], noise: Float[Tensor, "b k//2 h w"] | None = None
    ) -> tuple[Float[Tensor, "b k//2 h w"], Float[Tensor, ""], dict[str, Tensor]]:
        mean, std = split(z_e)
        z = mean if noise is None else mean + std * noise
        kl = divergence(mean, std)
        return z, kl.mean(), {"posterior_std": std.detach().mean(), "latent_std": mean.detach().std(), "kl_channels": kl.mean((0, 2, 3))}

    def update(self, stats: dict[str, Tensor]) -> None:
        """Nothing to learn outside of the gradient."""
