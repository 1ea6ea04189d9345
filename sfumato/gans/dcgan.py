"""DCGAN (arXiv 1511.06434): strided convolutions up from a vector, and down to one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from sfumato.core.config import at_least
from sfumato.nn.layers import Norm, channels_at, check_groups, norm_of


@dataclass(frozen=True, kw_only=True)
class DCGANConfig:
    """`width` channels at half the side, twice as many at each half of that, `most` at most. `norm` of the discriminator: batch is the paper's, with
    which no gradient penalty can be had, since scores of one picture depend on the others.
    """

    kind: str = "dcgan"
    width: int = 64
    most: int = 512
    norm: Norm = "batch"

    def __post_init__(self) -> None:
        at_least(1, width=self.width, most=self.most)
        check_groups(self.norm, width=self.width, most=self.most)


def _begin(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(m.weight, 0.0, 0.02)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.02)


class DCGANGenerator(nn.Module):
    """Vector "b d" -> image "b c size size" in [-1, 1]."""

    def __init__(self, config: DCGANConfig, vector: int, size: int, channels: int) -> None:
        super().__init__()
        widths = channels_at(config.width, config.most, size // 2)[::-1]
        self.first = nn.Sequential(nn.ConvTranspose2d(vector, widths[0], 4, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        rest: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            rest += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.rest = nn.Sequential(*rest, nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1))
        self.colours: nn.Module = nn.Identity()
        _begin(self)

    def forward(self, v: Float[Tensor, "b d"]) -> Float[Tensor, "b c size size"]:
        return self.colours(self.rest(self.first(v[:, :, None, None]))).tanh()


class DCGANDiscriminator(nn.Module):
    """Image "b c size size" -> features "b d", of 4 x 4 places."""

    def __init__(self, config: DCGANConfig, size: int, channels: int) -> None:
        super().__init__()
        widths = channels_at(config.width, config.most, size // 2)
        layers = [nn.Sequential(nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2))]
        for a, b in itertools.pairwise(widths):
            layers.append(nn.Sequential(nn.Conv2d(a, b, 4, 2, 1, bias=config.norm == "none"), norm_of(config.norm, b), nn.LeakyReLU(0.2)))
        self.layers = nn.Sequential(*layers)
        self.features, self.mixes = 16 * widths[-1], config.norm == "batch"
        _begin(self)

    @property
    def parts(self) -> list[nn.Module]:
        """From the picture on."""
        return list(self.layers)

    def forward(self, x: Float[Tensor, "b c size size"]) -> Float[Tensor, "b d"]:
        return self.layers(x).flatten(1)
