"""The first stage: image -> latents -> image. A KL-VAE and a VQGAN are this one network with another bottleneck.

Latents that leave `encode` and enter `decode` are standardised per channel with statistics measured after training
(`measure_latents`), so that a generator always sees unit variance.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.codecs.bottlenecks.fsq import FSQ, FSQConfig
from sfumato.codecs.bottlenecks.gumbel import Gumbel, GumbelConfig
from sfumato.codecs.bottlenecks.kl import KL, KLConfig, split
from sfumato.codecs.bottlenecks.lfq import LFQ, LFQConfig
from sfumato.codecs.bottlenecks.residual import Residual, ResidualConfig
from sfumato.codecs.bottlenecks.vq import VQ, VQConfig
from sfumato.codecs.convnets import ConvnetConfig, decoder, encoder
from sfumato.codecs.resnets import ResnetConfig, ResnetDecoder, ResnetEncoder
from sfumato.core.seams import Latents, LatentSpec

DEAD_BELOW = 0.1  # a channel whose std is below this fraction of the median carries no information
BottleneckConfig = KLConfig | VQConfig | FSQConfig | LFQConfig | ResidualConfig | GumbelConfig
BOTTLENECKS: dict[type, type[nn.Module]] = {
    KLConfig: KL, VQConfig: VQ, FSQConfig: FSQ, LFQConfig: LFQ, ResidualConfig: Residual, GumbelConfig: Gumbel,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Networks and bottleneck of a codec."""

    kind: str = "autoencoder"
    convnet: ConvnetConfig | ResnetConfig = field(default_factory=ConvnetConfig)
    bottleneck: BottleneckConfig = field(default_factory=KLConfig)

    @property
    def discrete(self) -> bool:
        """Whether pictures become indices."""
        return not isinstance(self.bottleneck, KLConfig)


class Autoencoder(nn.Module):
    """See `sfumato.core.seams.Codec`. Images are in [-1, 1]; their sides must be multiples of the factor."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        net, bottleneck = config.convnet, config.bottleneck
        if isinstance(net, ResnetConfig):
            self.encoder: nn.Module = ResnetEncoder(net, bottleneck.encoder_channels)
            self.decoder: nn.Module = ResnetDecoder(net, bottleneck.channels)
        else:
            self.encoder, self.decoder = encoder(net, bottleneck.encoder_channels), decoder(net, bottleneck.channels)
        self.bottleneck = BOTTLENECKS[type(bottleneck)](bottleneck)
        self.register_buffer("latent_mean", torch.zeros(bottleneck.channels))
        self.register_buffer("latent_std", torch.ones(bottleneck.channels))

    @property
    def spec(self) -> LatentSpec:
        net, b = self.config.convnet, self.config.bottleneck
        mean, std = tuple(self.latent_mean.tolist()), tuple(self.latent_std.tolist())
        codes = {"codebook_size": b.codebook_size, "levels": b.levels} if not isinstance(b, KLConfig) else {}
        return LatentSpec(image_channels=net.image_channels, latent_channels=b.channels, factor=net.factor, mean=mean, std=std, **codes)

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight of the decoder's last convolution, on which losses are balanced."""
        return [m for m in self.decoder.modules() if isinstance(m, nn.Conv2d)][-1].weight  # type: ignore[return-value]

    def forward(
        self, x: Float[Tensor, "b c h w"], noise: Float[Tensor, "b zc zh zw"] | None = None, *, bypass: bool = False
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, ""], dict[str, Tensor]]:
        """Reconstruction, bottleneck loss, statistics: what training needs. `bypass` leaves a discrete bottleneck out: before it has codes."""
        self._check(x)
        z_e = self.encoder(x)
        if bypass:
            z = self.bottleneck.directed(z_e.movedim(1, -1)).movedim(-1, 1) if isinstance(self.bottleneck, VQ) else z_e
            return self.decoder(z).float(), z_e.new_zeros(()).float(), {}
        z, loss, stats = self.bottleneck(z_e, noise)
        return self.decoder(z).float(), loss, stats

    def encode(self, x: Float[Tensor, "b c h w"], *, noise: Float[Tensor, "b zc zh zw"] | None = None) -> Latents:
        """Mean and std "b c h/f w/f" in standardised units, with `noise` the mean is a sample; of a discrete codec the codes and their `indices`
        "b h/f w/f levels".
        """
        self._check(x)
        z_e = self.encoder(x)
        if self.config.discrete:
            indices = self.bottleneck.quantize(z_e)
            mean, std = self.bottleneck.lookup(indices), None
        else:
            indices, (mean, std) = None, split(z_e)
            if noise is not None:
                mean = mean + std * noise
        live = (self.latent_std > 0)[:, None, None]
        scale = torch.where(live, self.latent_std[:, None, None], 1.0)
        mean = (mean - self.latent_mean[:, None, None]) / scale * live
        return Latents(mean=mean, std=None if std is None else std / scale * live, indices=indices)

    def decode(self, z: Float[Tensor, "b zc zh zw"]) -> Float[Tensor, "b c h w"]:
        """Standardised latents -> image in about [-1, 1] (not clamped)."""
        return self.decoder(z * self.latent_std[:, None, None] + self.latent_mean[:, None, None]).float()

    def decode_indices(self, indices: Int[Tensor, "b h w l"]) -> Float[Tensor, "b c h2 w2"]:
        """Indices -> image, of a discrete codec. Raises ValueError for a continuous one, and for an index outside of the codebook."""
        if not self.config.discrete:
            raise ValueError(f"a codec with a {self.config.bottleneck.kind} bottleneck has no indices: decode its latents")
        return self.decoder(self.bottleneck.lookup(indices)).float()

    def _check(self, x: Tensor) -> None:
        c = self.config.convnet
        if x.ndim != 4 or x.shape[1] != c.image_channels or x.shape[2] % c.factor or x.shape[3] % c.factor:
            raise ValueError(f"images must be 'b {c.image_channels} h w' with sides that are multiples of {c.factor}, not of shape {tuple(x.shape)}")


@torch.no_grad()
def measure_latents(codec: Autoencoder, batches: Iterable[Float[Tensor, "_ c h w"]]) -> None:
    """Sets the codec's per-channel statistics from posterior means, or codes, over `batches` of images.

    Dead channels (std below 0.1 of the median) get std 0: they encode to zero and always decode from their mean.
    """
    total, square, n = 0.0, 0.0, 0
    for x in batches:
        z_e = codec.encoder(x)
        latents = codec.bottleneck.lookup(codec.bottleneck.quantize(z_e)) if codec.config.discrete else split(z_e)[0]
        mean = latents.cpu().double()
        total, square, n = total + mean.sum((0, 2, 3)), square + mean.square().sum((0, 2, 3)), n + mean.numel() // mean.shape[1]
    if n < 2:
        raise ValueError("measure_latents needs at least two latent cells")
    mean = total / n
    std = (square / n - mean.square()).clamp_min(0).sqrt()
    codec.latent_mean.copy_(mean)
    codec.latent_std.copy_(torch.where(std < DEAD_BELOW * std.median(), 0.0, std))
