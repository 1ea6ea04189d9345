"""Discriminators: networks that tell generated pictures from real ones."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sfumato.nn.layers import Norm, norm_of


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """`layers` halvings: 3 see 70 x 70 pixels a score (PatchGAN, arXiv 1611.07004), 2 see 34 x 34. `norm`: group has no statistics of the batch, so
    real and generated pictures cannot be told apart by them; none is what `spectral` (arXiv 1802.05957) is usually combined with.
    """

    kind: str = "patch"
    image_channels: int = 3
    width: int = 64
    layers: int = 3
    norm: Norm = "group"
    spectral: bool = False

    def __post_init__(self) -> None:
        if self.width % 16 or self.layers < 1:
            raise ValueError(f"width (={self.width}) must be a multiple of 16 and layers (={self.layers}) at least 1")

    @property
    def sees(self) -> int:
        """The side in pixels of what one score depends on."""
        side = 7  # the last two layers, 4 x 4 at stride 1
        for _ in range(self.layers):
            side = 2 * side + 2
        return side


class PatchDiscriminator(nn.Module):
    """Image "b c h w" in [-1, 1] -> scores "b 1 h' w'", large where it takes a patch for real."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.config = config
        made = (lambda m: spectral_norm(m)) if config.spectral else (lambda m: m)
        layers: list[nn.Module] = [made(nn.Conv2d(config.image_channels, config.width, 4, 2, 1)), nn.LeakyReLU(0.2)]
        width = config.width
        for i in range(1, config.layers + 1):
            wider = config.width * min(2**i, 8)
            layers.append(made(nn.Conv2d(width, wider, 4, 2 if i < config.layers else 1, 1, bias=config.norm == "none")))
            if config.norm != "none":
                layers.append(norm_of(config.norm, wider))
            layers.append(nn.LeakyReLU(0.2))
            width = wider
        self.layers = nn.Sequential(*layers, made(nn.Conv2d(width, 1, 4, 1, 1)))
        for m in self.modules():
            if isinstance(m, nn.Conv2d) and not config.spectral:
                nn.init.normal_(m.weight, 0.0, 0.02)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        return self.layers(x)
