"""The residual pair of SNGAN (arXiv 1802.05957, appendix B.4): blocks that double or halve the side."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.config import at_least
from sfumato.nn.layers import Norm, channels_at, check_groups, norm_of


@dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """`width` channels at the full side, twice as many at each half of it, `most` at most. `norm` is the generator's; the discriminator has none."""

    kind: str = "residual"
    width: int = 64
    most: int = 256
    norm: Norm = "batch"

    def __post_init__(self) -> None:
        at_least(1, width=self.width, most=self.most)
        check_groups(self.norm, width=self.width, most=self.most)


class UpBlock(nn.Module):
    """Twice the side: conv(relu(norm(up(conv(relu(norm(x))))))) + up(x)."""

    def __init__(self, a: int, b: int, norm: Norm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_of(norm, a), norm_of(norm, b)
        self.conv1, self.conv2, self.skip = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1), nn.Conv2d(a, b, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d 2*h 2*w"]:
        up = F.interpolate(F.relu(self.norm1(x)), scale_factor=2)
        h = self.conv2(F.relu(self.norm2(self.conv1(up))))
        return h + F.interpolate(self.skip(x), scale_factor=2)


class DownBlock(nn.Module):
    """Half the side, or (the last) the same: the activation before the first convolution is left out at the picture itself."""

    def __init__(self, a: int, b: int, *, first: bool = False, down: bool = True) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        self.skip = nn.Conv2d(a, b, 1) if a != b or down else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if not self.down:
            return h + self.skip(x)
        return F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x, 2))


def _begin(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class ResidualGenerator(nn.Module):
    """Vector "b d" -> image "b c size size" in [-1, 1]."""

    def __init__(self, config: ResidualConfig, vector: int, size: int, channels: int) -> None:
        super().__init__()
        widths = channels_at(config.width, config.most, size)[::-1]
        self.first = nn.Linear(vector, 16 * widths[0])
        self.blocks = nn.Sequential(*(UpBlock(a, b, config.norm) for a, b in itertools.pairwise(widths)))
        self.last = nn.Sequential(norm_of(config.norm, widths[-1]), nn.ReLU(), nn.Conv2d(widths[-1], channels, 3, padding=1))
        self.colours: nn.Module = nn.Identity()
        _begin(self)

    def forward(self, v: Float[Tensor, "b d"]) -> Float[Tensor, "b c size size"]:
        return self.colours(self.last(self.blocks(self.first(v).unflatten(1, (-1, 4, 4))))).tanh()


class ResidualDiscriminator(nn.Module):
    """Image "b c size size" -> features "b d", summed over 4 x 4 places."""

    def __init__(self, config: ResidualConfig, size: int, channels: int) -> None:
        super().__init__()
        widths = channels_at(config.width, config.most, size)
        self.blocks = nn.Sequential(
            DownBlock(channels, widths[0], first=True, down=False),
            *(DownBlock(a, b) for a, b in itertools.pairwise(widths)),
            DownBlock(widths[-1], widths[-1], down=False),
        )
        self.features, self.mixes = widths[-1], False
        _begin(self)

    @property
    def parts(self) -> list[nn.Module]:
        """From the picture on."""
        return list(self.blocks)

    def forward(self, x: Float[Tensor, "b c size size"]) -> Float[Tensor, "b d"]:
        return F.relu(self.blocks(x)).sum((2, 3))
