"""A generator and a discriminator of one size and one condition, whatever networks they are made of.

What is said (style, label, pooled text) becomes a vector: the generator gets it beside z, the discriminator compares it with what it sees
(projection, arXiv 1802.05637, eq. 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from sfumato.core.config import at_least
from sfumato.core.rng import torch_rng
from sfumato.core.seams import Cond
from sfumato.gans.dcgan import DCGANConfig, DCGANDiscriminator, DCGANGenerator
from sfumato.gans.r3gan import R3GANConfig, R3GANDiscriminator, R3GANGenerator
from sfumato.gans.residual import ResidualConfig, ResidualDiscriminator, ResidualGenerator
from sfumato.gans.style import EqualLinear, StyleConfig, StyleDiscriminator, StyleGenerator
from sfumato.nn.conditions import told
from sfumato.nn.layers import slerp

RARE = 0.01  # of a channel's variance: a colour that pictures hardly have
RAREST = 0.01  # of the deviation of a colour
CENTRE = 0.998  # memory of the mean of w, in steps
TRIED, COARSE = 64, 8  # pictures among which the most usual is looked for, at this side
NetworkConfig = DCGANConfig | ResidualConfig | R3GANConfig | StyleConfig
GENERATORS = {"dcgan": DCGANGenerator, "residual": ResidualGenerator, "r3gan": R3GANGenerator, "style": StyleGenerator}
DISCRIMINATORS = {"dcgan": DCGANDiscriminator, "residual": ResidualDiscriminator, "r3gan": R3GANDiscriminator, "style": StyleDiscriminator}


@dataclass(frozen=True, kw_only=True)
class _PairConfig:
    network: NetworkConfig = field(default_factory=R3GANConfig)
    size: int = 64
    image_channels: int = 3
    text_width: int = 0
    styles: int = 0
    labels: int = 0
    told: int = 64

    def __post_init__(self) -> None:
        at_least(0, text_width=self.text_width, styles=self.styles, labels=self.labels)
        at_least(1, told=self.told)
        if self.size < 8 or self.size & (self.size - 1):
            raise ValueError(f"size (={self.size}) must be a power of two, 8 at least: sides double from 4 on")
        if self.image_channels not in (3, 4):
            raise ValueError(f"image_channels (={self.image_channels}) must be 3 (RGB) or 4 (RGBA)")

    @property
    def conditional(self) -> bool:
        return bool(self.text_width or self.styles or self.labels)


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(_PairConfig):
    """`z` unit Gaussian numbers; `told` numbers of what is said, where there is something (`text_width`, `styles`, `labels`). With
    `colours` channels hang together as they do in pictures to learn from that lack colours (grey ones), or as in the pair that it begins from.
    """

    kind: str = "generator"
    z: int = 128
    colours: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, z=self.z)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(_PairConfig):
    """`spectral` bounds every layer by its largest singular value (arXiv 1802.05957)."""

    kind: str = "discriminator"
    spectral: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        norm = self.network.norm if isinstance(self.network, DCGANConfig) else "none"  # the others' discriminators have none
        if self.spectral and norm != "none":
            raise ValueError(f"discriminator.network.norm (={norm!r}) undoes what spectral bounds: set it to none")


class Told(nn.Module):
    """What is said -> a vector "b told", of which a `share` counts: less than 1 while a pair first learns to draw at all."""

    def __init__(self, config: GeneratorConfig | DiscriminatorConfig) -> None:
        super().__init__()
        self.config = c = config
        self.memory = self.style_token = None
        if c.text_width:
            self.pooled = nn.Linear(c.text_width, c.told)
        if c.styles:  # one row more: no style
            self.style = nn.Embedding(c.styles + 1, c.told)
        if c.labels:  # one row more: no label
            self.label = nn.Embedding(c.labels + 1, c.told)
        self.register_buffer("share", torch.ones(()))

    def forward(self, cond: Cond, like: Float[Tensor, "b _"]) -> Float[Tensor, "b told"]:
        return told(self, cond, like.new_zeros(len(like), self.config.told), like)[0]


class Colours(nn.Module):
    """Channels that hang together as those of pictures do, where these lack colours: mixed by the root of their correlations, so that each has the
    deviation that it would have alone. What no picture has is rare from the start on: a generator of grey pictures need not learn that they are grey.
    Of pictures that have all colours channels stay as they are: mixed they were learned more slowly.
    """

    mix: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mix", torch.eye(channels))

    @torch.no_grad()
    def learn(self, x: Float[Tensor, "b c h w"]) -> None:
        """From pictures. No direction is closed: the least of them has `RAREST` of its deviation."""
        flat = x.cpu().double().transpose(0, 1).flatten(1)
        flat = flat - flat.mean(1, keepdim=True)
        spread = flat.square().mean(1).sqrt()
        flat = flat / spread.clamp_min(1e-6)[:, None]
        together = (flat @ flat.T / flat.shape[1]).fill_diagonal_(1.0)
        values, vectors = torch.linalg.eigh(together)
        if float(values[0]) < RARE:
            self.mix.copy_(vectors @ torch.diag(values.clamp_min(RAREST**2).sqrt()) @ vectors.T)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return F.conv2d(x, self.mix[:, :, None, None])


def _unit(v: Tensor) -> Tensor:
    """Of mean square 1."""
    return F.rms_norm(v, (v.shape[-1],), eps=1e-8)


class Generator(nn.Module):
    """net(z "b z", Cond) -> image "b c size size". With style networks `style` gives w, and `draw` a picture of it."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = c = config
        self.told = Told(c) if c.conditional else None
        vector = c.z + (c.told if c.conditional else 0)
        self.network = GENERATORS[c.network.kind](c.network, vector, c.size, c.image_channels)  # type: ignore[arg-type]
        if c.colours:
            self.network.colours = Colours(c.image_channels)
        if isinstance(c.network, StyleConfig):
            self.register_buffer("centre", torch.zeros(c.network.w))  # the running mean of w
            self.register_buffer("seen", torch.zeros(()))  # batches of it

    @property
    def noises(self) -> int:
        """Numbers of noise that a picture takes besides z."""
        return self.network.noises if isinstance(self.network, StyleGenerator) else 0

    def style(self, z: Float[Tensor, "b z"], cond: Cond) -> Float[Tensor, "b s"]:
        """What the network draws from: w of a style network, of others z with what is said."""
        styled = isinstance(self.network, StyleGenerator)
        v = _unit(z) if styled else z
        if self.told is not None:
            v = torch.cat([v, self.told.share * _unit(self.told(cond, z))], dim=1)
        if not styled:
            return v
        w = self.network.style(v)  # type: ignore[operator]
        if self.training:
            self.seen.add_(1)
            self.centre.lerp_(w.detach().float().mean(0), (1 / self.seen).clamp_min(1 - CENTRE))
        return w

    def check_truncation(self, truncation: float) -> None:
        """Raises ValueError for what this network cannot do."""
        if truncation > 1 and not isinstance(self.network, StyleGenerator):
            raise ValueError(f"truncation (={truncation}) must be at most 1: only networks with a style go further than they learned")

    def truncated(self, z: Float[Tensor, "b z"], cond: Cond, truncation: float) -> Float[Tensor, "b s"]:
        """`style` nearer to what is usual, the rest of the way `truncation`: w pulled to its mean (arXiv 1812.04948, appendix B); of other networks z
        along the arc from the noise of the most usual picture, since a shorter z is none that they ever saw. There is nothing above 1 for those, and
        1 changes nothing.
        """
        self.check_truncation(truncation)
        if truncation == 1:
            return self.style(z, cond)
        if isinstance(self.network, StyleGenerator):
            return torch.lerp(self.centre, self.style(z, cond), truncation)
        ends = zip(self.usual(z, cond), z, strict=True)
        return self.style(torch.stack([slerp(a, b, truncation) for a, b in ends]), cond)

    def usual(self, z: Float[Tensor, "b z"], cond: Cond) -> Float[Tensor, "b z"]:
        """For each of these conditions the noise, of sixty-four, whose picture is nearest to the mean of theirs, looked at coarsely."""
        tried = torch.stack([torch.randn(self.config.z, generator=torch_rng(0, "gan/usual", i)) for i in range(TRIED)]).to(z)
        found = []
        for row in range(len(z) if self.told is not None else 1):
            x = self.draw(self.style(tried, cond[row : row + 1].map(lambda v: v.expand(TRIED, *v.shape[1:]))))
            coarse = F.adaptive_avg_pool2d(x.float(), COARSE).flatten(1)
            found.append(tried[(coarse - coarse.mean(0)).square().sum(1).argmin()])
        return torch.stack(found).expand_as(z)

    def draw(self, w: Float[Tensor, "b s"], noise: Float[Tensor, "b n"] | None = None) -> Float[Tensor, "b c size size"]:
        return self.network(w, noise) if isinstance(self.network, StyleGenerator) else self.network(w)

    def forward(self, z: Float[Tensor, "b z"], cond: Cond, noise: Float[Tensor, "b n"] | None = None) -> Float[Tensor, "b c size size"]:
        return self.draw(self.style(z, cond), noise)


class Discriminator(nn.Module):
    """net(x "b c size size", Cond) -> scores "b", large where it takes a picture for a real one of what is said."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = c = config
        self.network = DISCRIMINATORS[c.network.kind](c.network, c.size, c.image_channels)  # type: ignore[arg-type]
        self.mixes: bool = self.network.mixes  # whether a score depends on the other pictures of a batch
        linear = EqualLinear if isinstance(c.network, StyleConfig) else nn.Linear
        self.score = linear(self.network.features, 1)
        self.told = Told(c) if c.conditional else None
        self.project = linear(c.told, self.network.features, bias=False) if c.conditional else None
        if c.spectral:
            bound(self)

    def forward(self, x: Float[Tensor, "b c size size"], cond: Cond) -> Float[Tensor, " b"]:
        seen = self.network(x)
        score = self.score(seen)[:, 0]
        if self.told is None or self.project is None:
            return score
        said = (self.project(self.told(cond, seen)) * seen).sum(1)
        return score + self.told.share * (said if self.config.spectral else said / seen.shape[1] ** 0.5)  # spectral norms have made it small


def bound(network: nn.Module) -> None:
    """Spectral norm of every convolution, linear layer and embedding; layers with a scale of their own lose it."""
    for m in list(network.modules()):
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding)):
            if not m.weight.is_meta and not bool(m.weight.any()):  # a layer that starts at zero has no direction
                nn.init.xavier_uniform_(m.weight)
            spectral_norm(m)
            if hasattr(m, "scale"):
                m.scale = 1.0  # type: ignore[assignment]
