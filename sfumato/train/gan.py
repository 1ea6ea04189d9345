"""Trains a generator and a discriminator against each other (arXiv 1406.2661): every loss, penalty and pair under one protocol.

Both see each step's pictures; what the generator makes of fresh noise is judged beside them, both changed alike (`augment`). Penalties on the
discriminator's slopes come in its own step, or lazily every few steps in a step of their own, with the rate and the betas that StyleGAN2 gives them.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from sfumato.core.checkpoint import read_metadata
from sfumato.core.config import at_least, to_json
from sfumato.core.images import grid, to_pil
from sfumato.core.language import translated
from sfumato.core.rng import torch_rng
from sfumato.core.seams import Cond
from sfumato.data.augment import STILL, Variety
from sfumato.data.folder import evenly
from sfumato.data.shards import same_source
from sfumato.data.subjects import EMOJI
from sfumato.gans.augment import Augment, ada, diffaugment
from sfumato.gans.dcgan import DCGANConfig
from sfumato.gans.pair import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig, NetworkConfig
from sfumato.gans.r3gan import R3GANConfig
from sfumato.gans.residual import ResidualConfig
from sfumato.gans.style import StyleConfig
from sfumato.losses.adversarial import (
    Kind,
    beside,
    between,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    middle,
    squared_slopes,
    towards,
)
from sfumato.metrics.distribution import kernel_distance
from sfumato.metrics.diversity import pairwise_distance
from sfumato.metrics.features import feature_net, look
from sfumato.nn.backbones import over
from sfumato.nn.conditions import concat_conds
from sfumato.train.adversary import MEMORY, mean_of_processes
from sfumato.train.conditioned import Lessons, Taught, begun_from
from sfumato.train.doctor import Doctor
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer, main_first, settled, starting

FEWEST = 4
LOOKED_AT = 256  # pictures of each kind, at each look
QUICK = 0.95  # of the running averages that a controller follows
MOST_P = 0.85  # of ADA
BLANK = 1e-8  # of a slope


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """Weights of the penalties on the discriminator, 0 is none: r1 at real and r2 at generated pictures (gamma of arXiv 1801.04406), gp between them
    (WGAN-GP, 1704.00028), dragan beside real ones (1705.07215), lecam on its scores (2104.03310). `one_sided` lets gp and dragan punish steep slopes
    only. Of those on slopes there is one every `every` steps, as many times as heavy; more than 1 makes it a step of its own. Over the training their
    weights fall to `end` times what they were, by a cosine (2501.05441, appendix): a discriminator that is smooth at first and sharp at last.
    """

    r1: float = 0.0
    r2: float = 0.0
    gp: float = 0.0
    dragan: float = 0.0
    lecam: float = 0.0
    one_sided: bool = False
    every: int = 1
    end: float = 1.0

    def __post_init__(self) -> None:
        at_least(0, **{f"penalty.{name}": getattr(self, name) for name in ("r1", "r2", "gp", "dragan", "lecam")})
        if not 0 <= self.end <= 1:
            raise ValueError(
                f"penalty.end (={self.end}) must be between 0 and 1: the share of the weights that is left at the end, 1 leaves them alone"
            )
        if self.every < 1:
            raise ValueError(f"penalty.every (={self.every}) must be at least 1: discriminator steps from one penalty to the next")

    @property
    def of_slopes(self) -> bool:
        return bool(self.r1 or self.r2 or self.gp or self.dragan)

    def left(self, progress: float) -> float:
        """The share of the weights that is left after this share of the training."""
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """What a controller may move, and by what. ADA's probability follows overfitting; `penalty` says what the weight of the penalties follows:
    overfitting (how far scores of held-out pictures have gone from those of training pictures to those of drawn ones is to be `target`: r_v of
    arXiv 2006.06676, eq. 1) or the slope where the penalties look (to be `slope`). `images` take ADA's p from 0 to 1, a penalty's weight from 1 to
    `most` times what the recipe says; 1 / `most` is the least.
    """

    penalty: Literal["none", "overfit", "slope"] = "none"
    target: float = 0.3
    slope: float = 1.0
    images: int = 100_000
    most: float = 10.0

    def __post_init__(self) -> None:
        good = 0 < self.target < 1 and 0 < self.slope < math.inf and self.images >= 1 and 1 < self.most < math.inf
        if not good:
            raise ValueError(
                f"adapt.target (={self.target}) must be between 0 and 1, slope (={self.slope}) above 0, images (={self.images}) at least 1, "
                f"most (={self.most}) above 1"
            )


@dataclass(frozen=True, kw_only=True)
class GANRecipe(Taught):
    """Everything that decides what a pair becomes.

    `steps` discriminator steps for each of the generator; `d_lr` is the discriminator's learning rate relative to the loop's; `betas` are of both.
    `augment` changes what the discriminator sees; ADA begins with probability `p`. `freeze` parts of the discriminator next to the picture stay as
    `init` has them (arXiv 2002.10964). `each`: different versions of a picture, by `variety`; nothing of them is kept. What is said of the
    pictures counts from the share `told_from` of the training on, in full after `told_ramp` more: pairs that hear classes of few pictures from the
    start collapse (arXiv 2201.06578). With `init` it counts at once.
    """

    part: ClassVar[str] = "generator"
    kind: str = "train-gan"
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: Kind = "relativistic"
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    augment: Augment = "none"
    p: float = 0.0
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    steps: int = 1
    d_lr: float = 1.0
    betas: tuple[float, float] = (0.0, 0.99)
    freeze: int = 0
    told_from: float = 0.0
    told_ramp: float = 0.0
    variety: Variety = STILL
    each: int = 1_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        g, d = self.generator, self.discriminator
        for name in ("size", "image_channels"):
            if getattr(g, name) != getattr(d, name):
                raise ValueError(f"generator.{name} (={getattr(g, name)}) must be discriminator.{name} (={getattr(d, name)})")
        if self.penalty.of_slopes and isinstance(d.network, DCGANConfig) and d.network.norm == "batch":
            raise ValueError(
                "discriminator.network.norm (='batch') makes scores depend on the other pictures: a penalty on slopes needs group or none"
            )
        if self.steps < 1 or not 0 < self.d_lr < math.inf:
            raise ValueError(f"steps (={self.steps}) must be at least 1 and d_lr (={self.d_lr}) above 0")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas (={self.betas}) must be from 0 to below 1: the memory of Adam's averages")
        if not 0 <= self.p <= MOST_P:
            raise ValueError(f"p (={self.p}) must be between 0 and {MOST_P}: above that a generator learns the changes themselves")
        if self.p and self.augment != "ada":
            raise ValueError(f"p (={self.p}) is the probability with which augment ada begins: set that too, or leave p out")
        if self.adapt.penalty != "none" and not self.penalty.of_slopes:
            raise ValueError(f"adapt.penalty (={self.adapt.penalty!r}) moves the weight of penalties on slopes: one of them must be above 0")
        if not (self.told_from >= 0 and self.told_ramp >= 0 and self.told_from + self.told_ramp <= 1):
            raise ValueError(f"told_from (={self.told_from}) and told_ramp (={self.told_ramp}) must be shares of the training, together at most 1")
        at_least(0, freeze=self.freeze)
        if self.memory:
            raise ValueError("memory (=True) is of diffusion and priors: leave it out")


# --- presets --------------------------------------------------------------------------------------------------------------------------------------


def _on(network: NetworkConfig) -> dict[str, Any]:
    """Both parts of a pair, on the same kind of network."""
    return {"generator": GeneratorConfig(network=network), "discriminator": DiscriminatorConfig(network=network)}


def preset_bundled() -> tuple[GANRecipe, LoopConfig]:
    """The loss of R3GAN, relativistic with R1 and R2 (arXiv 2501.05441), lazily, on the pair of DCGAN, which a CPU trains fastest; 64 x 64.

    `sfumato train gan --data emoji --out runs/gan`
    """
    network = DCGANConfig(width=32, most=256, norm="group")
    recipe = GANRecipe(
        **_on(network), augment="ada",
        penalty=PenaltyConfig(r1=1.0, r2=1.0, every=4), told_from=0.2, told_ramp=0.2,
    )  # fmt: skip
    return recipe, LoopConfig(
        images=200_000, batch_size=16, lr=5e-4, warmup=2_000, decay=0.3, weight_decay=0.0, clip=0.0, log_every=3_200, save_every=16_000,
        sample_every=16_000,
    )  # fmt: skip


def preset_own() -> tuple[GANRecipe, LoopConfig]:
    """The same for one's own pictures, by class where sub-folders say one.

    `sfumato train gan --data DIR --out runs/gan`
    """
    recipe, loop = preset_bundled()
    return replace(recipe, labels="auto"), loop


def preset_r3gan() -> tuple[GANRecipe, LoopConfig]:
    """R3GAN (arXiv 2501.05441), smaller: its residual blocks without any normalisation, and its loss.

    `sfumato train gan --preset r3gan --data DIR --out runs/r3gan`
    """
    recipe, loop = preset_own()
    recipe = replace(recipe, **_on(R3GANConfig()), penalty=replace(recipe.penalty, r1=3.0, r2=3.0, every=8, end=0.3))
    return replace(recipe, generator=replace(recipe.generator, colours=True)), replace(loop, lr=1.5e-3, batch_size=32, ema=0.1)


def preset_dcgan() -> tuple[GANRecipe, LoopConfig]:
    """DCGAN (arXiv 1511.06434) with the non-saturating loss.

    `sfumato train gan --preset dcgan --data DIR --out runs/dcgan`
    """
    network = DCGANConfig()
    recipe, loop = preset_own()
    return replace(
        recipe, **_on(network), loss="non-saturating",
        penalty=PenaltyConfig(), augment="none", betas=(0.5, 0.999),
    ), replace(loop, batch_size=32, lr=2e-4)  # fmt: skip


def preset_wgan_gp() -> tuple[GANRecipe, LoopConfig]:
    """WGAN-GP (arXiv 1704.00028): residual networks, five discriminator steps for one of the generator.

    `sfumato train gan --preset wgan-gp --data DIR --out runs/wgan`
    """
    network = ResidualConfig()
    recipe, loop = preset_own()
    return replace(
        recipe, **_on(network), loss="wasserstein",
        penalty=PenaltyConfig(gp=10.0), augment="none", steps=5, betas=(0.0, 0.9),
    ), replace(loop, batch_size=32, lr=2e-4)  # fmt: skip


def preset_sngan() -> tuple[GANRecipe, LoopConfig]:
    """SNGAN (arXiv 1802.05957): residual networks, spectral norms and the hinge loss.

    `sfumato train gan --preset sngan --data DIR --out runs/sngan`
    """
    recipe, loop = preset_wgan_gp()
    return replace(recipe, discriminator=replace(recipe.discriminator, spectral=True), loss="hinge", penalty=PenaltyConfig()), loop


def preset_stylegan() -> tuple[GANRecipe, LoopConfig]:
    """The style-based pair (arXiv 1912.04958) with lazy R1 and ADA (2006.06676).

    `sfumato train gan --preset stylegan --data DIR --out runs/style`
    """
    network = StyleConfig()
    recipe, loop = preset_own()
    return replace(
        recipe, **_on(network), loss="non-saturating",
        penalty=PenaltyConfig(r1=1.0, every=16),
    ), replace(loop, batch_size=32, lr=2e-3)  # fmt: skip


def preset_smoke() -> tuple[GANRecipe, LoopConfig]:
    """A pair that trains in seconds, to try the tools."""
    network = R3GANConfig(width=16, most=32, patch=1)
    recipe, loop = preset_bundled()
    made = {"network": network, "size": 16, "told": 16}
    pair = {"generator": GeneratorConfig(z=16, **made), "discriminator": DiscriminatorConfig(**made)}  # type: ignore[arg-type]
    recipe = replace(recipe, penalty=replace(recipe.penalty, every=1), limit=12, **pair)  # type: ignore[arg-type]
    return recipe, replace(loop, images=640, lr=2e-4, warmup=64, save_every=320, sample_every=320, log_every=64)


PRESETS = {
    "bundled": preset_bundled, "own": preset_own, "r3gan": preset_r3gan, "dcgan": preset_dcgan, "wgan-gp": preset_wgan_gp,
    "sngan": preset_sngan, "stylegan": preset_stylegan, "smoke": preset_smoke,
}  # fmt: skip


# --- what a run remembers -------------------------------------------------------------------------------------------------------------------------


class Balance(nn.Module):
    """ADA's `p` and what the penalties' weights are multiplied with; running averages of the scores (real, generated), of those of held-out pictures,
    and of the slope.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.register_buffer("p", torch.full((), p))
        self.register_buffer("louder", torch.ones(()))
        self.register_buffer("scores", torch.zeros(2))
        self.register_buffer("held", torch.zeros(()))
        self.register_buffer("slope", torch.zeros(()))

    def forward(self) -> None:
        """Nothing to compute."""

    @property
    def overfit(self) -> Tensor:
        """How far held-out scores are on the way from real to generated ones; 0 where those are not told apart."""
        real, fake = self.scores
        return torch.where(real > fake, (real - self.held) / (real - fake).clamp_min(1e-6), 0.0).clamp(-1, 1)

    @torch.no_grad()
    def follow(self, seen: dict[str, Tensor], recipe: GANRecipe, images: int) -> None:
        """Takes what a step saw into the averages, and moves what may be moved by as much as `images` are worth."""
        for name, memory in (("scores", MEMORY), ("held", MEMORY), ("slope", QUICK)):
            if name in seen:
                getattr(self, name).lerp_(seen[name], 1 - memory)
        a, share = recipe.adapt, images / recipe.adapt.images
        overfit = torch.sign(self.overfit - a.target)
        if recipe.augment == "ada":
            self.p.add_(overfit * share).clamp_(0, MOST_P)
        if a.penalty != "none":
            towards = overfit if a.penalty == "overfit" else torch.sign(self.slope - a.slope)
            self.louder.mul_(a.most ** (towards * share)).clamp_(1 / a.most, a.most)


# --- the task -------------------------------------------------------------------------------------------------------------------------------------


class GANTask(Lessons):
    """See `sfumato.train.loop.Task`."""

    kind = "gan"
    splittable = False  # halves of a batch would give batch norms other statistics
    shardable = False  # a phase asks one network for gradients that another gets
    broadcasts = False  # a network judges twice before its gradients are asked for: buffers must not change between

    def __init__(self, recipe: GANRecipe, seed: int, text: Path, run: Path, device: torch.device | str = "cpu", bf16: bool = False) -> None:
        super().__init__(recipe, seed, recipe.generator.size, text, run, device, bf16)
        if (count := len(self.shown.pixels)) < FEWEST:
            raise ValueError(
                f"data (={recipe.data!r}) has {count} pictures to learn from: at least {FEWEST} are wanted, since a pair is measured by their variety"
            )
        of_data = {name: getattr(self.net, name) for name in ("text_width", "styles", "labels")}
        for name, what in (("text_width", "captions"), ("styles", "styles"), ("labels", "classes")):
            if getattr(recipe.generator, name) and not of_data[name]:
                tqdm.write(translated(f"warning: generator.{name} has no effect: these pictures have no {what}"), file=sys.stderr)
        if recipe.init:  # whose weights were learned with its colours, or without
            theirs = read_metadata(begun_from(recipe.init)).get("generator")
            self.net = replace(self.net, colours=isinstance(theirs, dict) and bool(theirs.get("colours")))
        self.of_discriminator = replace(recipe.discriminator, **of_data)
        torch.manual_seed(seed)
        generator, discriminator = Generator(self.net), Discriminator(self.of_discriminator)
        self.balance = Balance(recipe.p)
        self.networks: dict[str, nn.Module] = {
            "generator": self.begun(generator), "discriminator": self.begun(discriminator, "discriminator"), "balance": self.balance,
        }  # fmt: skip
        if generator.config.colours and not recipe.init:
            generator.network.colours.learn(self.looked_at["x"])  # type: ignore[union-attr, operator]
        if recipe.freeze and not recipe.init:
            raise ValueError(f"freeze (={recipe.freeze}) needs --init: what is frozen is to have learned before")
        parts = discriminator.network.parts
        if recipe.freeze >= len(parts):
            raise ValueError(f"freeze (={recipe.freeze}) must be below {len(parts)}, the parts of this discriminator: one at least is to learn")
        for part in parts[: recipe.freeze]:
            part.requires_grad_(False)
        self.phases = self._phases()
        self.full_precision = ("discriminator",) if recipe.penalty.of_slopes else ()
        self.seen: dict[str, list[Tensor]] = defaultdict(list)  # of the parts of a batch
        self.loop = LoopConfig()

    def _phases(self) -> list[Phase]:
        """Discriminator, generator, and where penalties are lazy a step of theirs, with its share of the rate (arXiv 1912.04958, appendix B)."""
        r = self.recipe
        k = r.penalty.every if r.penalty.of_slopes else 1
        share = k / (k + 1) if k > 1 else 1.0
        betas = (r.betas[0] ** share, r.betas[1] ** share)
        phases = [Phase("discriminator", ("discriminator",), self.judge, 1, r.d_lr * share, betas=betas)]
        if k > 1:
            phases.append(Phase("penalty", ("discriminator",), self.smooth, k, r.d_lr * share, betas=betas, shares="discriminator"))
        return [*phases, Phase("generator", ("generator",), self.fool, r.steps, betas=r.betas)]

    # --- training -----------------------------------------------------------------------------------------------------------------------------------

    @property
    def complete_from(self) -> float:
        """The progress from which on all that is said counts."""
        return self.recipe.told_from + self.recipe.told_ramp if self.net.conditional and not self.recipe.init else 0.0

    def batch(self, positions: np.ndarray) -> Batch:
        """Pictures, what is said of them, and two portions of noise a picture: one to judge, one to fool with."""
        indices, _, said = self.said(positions)
        rngs = [torch_rng(self.seed, "train/z", int(p)) for p in positions]
        z = torch.stack([torch.randn(2, self.net.z, generator=g) for g in rngs])
        return {"x": self.pictures(indices.numpy()).contiguous(), "z": z} | said  # the networks are contiguous, too

    def heard(self, batch: Batch) -> Cond:
        """Once a batch: every phase asks."""
        if "cond" not in batch:
            batch["cond"] = super().heard(batch)
        return batch["cond"]  # type: ignore[no-any-return]

    def tell(self, progress: float) -> None:
        """How much of what is said counts at this share of the training."""
        r = self.recipe
        share = 1.0 if r.init or progress >= r.told_from + r.told_ramp else max(progress - r.told_from, 0.0) / (r.told_ramp or 1.0)
        for name in ("generator", "discriminator"):
            if (told := getattr(self.networks[name], "told", None)) is not None:
                told.share.fill_(share)

    def drawn(self, network: nn.Module, z: Tensor, cond: Cond) -> Tensor:
        n = self.networks["generator"].noises
        return network(z, cond, torch.randn(len(z), n, device=z.device) if n else None)  # type: ignore[no-any-return, arg-type]

    def changed(self, x: Tensor) -> Tensor:
        """As the discriminator sees it."""
        match self.recipe.augment:
            case "diffaugment":
                return diffaugment(x)
            case "ada":
                return ada(x, self.balance.p)
        return x

    def judge(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss, with its penalties where they are not lazy."""
        self.tell(progress)
        r, cond, network = self.recipe, self.heard(batch), networks["discriminator"]
        slopes = r.penalty.of_slopes and r.penalty.every == 1
        real, fake = self._both(batch, cond)
        assert fake is not None
        elsewhere = self._elsewhere(network, real, fake, cond) if slopes else {}  # first: memory of two passes back is made once
        of_real, of_fake, steep = self._steep(network, real, fake, cond) if slopes else (*self._scores(network, real, fake, cond), {})
        batch["of_real"] = of_real.detach()
        loss = plain = discriminator_loss(r.loss, of_real, of_fake)
        found = self._noted(of_real.detach(), of_fake.detach()) | {"classification": plain.detach()}
        if r.augment == "ada" or r.adapt.penalty == "overfit":
            self.seen["held"].append(self._held_out(len(real)))
        if r.penalty.lecam:
            loss = loss + r.penalty.lecam * lecam_penalty(of_real, of_fake, self.balance.scores.clone())
        if slopes:
            penalty, more = self._weighed(steep | elsewhere, progress)
            loss, found = loss + penalty, found | more
        return loss, found

    def smooth(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The penalties alone, as many times as heavy as they are rare."""
        cond, p, network = self.heard(batch), self.recipe.penalty, networks["discriminator"]
        real, fake = self._both(batch, cond, fakes=bool(p.r2 or p.gp))
        elsewhere = self._elsewhere(network, real, fake, cond)
        of_real, _, steep = self._steep(network, real, fake if p.r2 else None, cond)
        penalty, found = self._weighed(steep | elsewhere, progress)
        return penalty * p.every + 0.0 * of_real.sum(), found  # what has no part in a slope has a gradient of 0, which processes wait for

    def fool(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's loss; nothing is left with the discriminator."""
        cond, discriminator = self.heard(batch), self.networks["discriminator"]
        fake = self.drawn(networks["generator"], batch["z"][:, 1], cond).float()
        with _resting(discriminator):
            of_real = batch.get("of_real") if self.recipe.loss == "relativistic" else None  # as it was told in this step
            return generator_loss(self.recipe.loss, discriminator(self.changed(fake), cond).float(), of_real), {}

    @torch.no_grad()
    def _both(self, batch: Batch, cond: Cond, fakes: bool = True) -> tuple[Tensor, Tensor | None]:
        """Real and generated pictures as the discriminator sees them, without a way back; once a batch."""
        if "both" in batch:
            return batch["both"] if fakes else (batch["both"][0], None)  # type: ignore[no-any-return]
        x = batch["x"]
        if not fakes:
            return self.changed(x).detach(), None
        fake = self.drawn(self.networks["generator"], batch["z"][:, 0], cond).to(x)
        batch["both"] = self.changed(torch.cat([x, fake])).chunk(2)
        return batch["both"]  # type: ignore[no-any-return]

    def _scores(self, network: nn.Module, real: Tensor, fake: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Of both together, but apart where statistics of a batch would tell them apart."""
        if self.networks["discriminator"].mixes:
            return network(real, cond).float(), network(fake, cond).float()
        return network(torch.cat([real, fake]), concat_conds([cond, cond], len(real))).float().chunk(2)  # type: ignore[return-value]

    def _steep(self, network: nn.Module, real: Tensor, fake: Tensor | None, cond: Cond) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Scores of both, and the squared slopes for R1 and R2: of both kinds in one pass back where R2 is wanted, else of real ones."""
        p = self.recipe.penalty
        if fake is not None and p.r2 and not self.networks["discriminator"].mixes:
            x = torch.cat([real, fake]).requires_grad_()
            scores = network(x, concat_conds([cond, cond], len(real))).float()
            at_real, at_fake = squared_slopes(scores, x).chunk(2)
            return *scores.chunk(2), {"r1": at_real, "r2": at_fake}  # type: ignore[return-value]
        real = real.detach().requires_grad_(bool(p.r1 or p.r2))
        of_real = of_fake = network(real, cond).float()
        steep = {"r1": squared_slopes(of_real, real)} if p.r1 or p.r2 else {}
        if fake is not None:
            fake = fake.detach().requires_grad_(bool(p.r2))
            of_fake = network(fake, cond).float()
            steep |= {"r2": squared_slopes(of_fake, fake)} if p.r2 else {}
        return of_real, of_fake, steep

    def _elsewhere(self, network: nn.Module, real: Tensor, fake: Tensor | None, cond: Cond) -> dict[str, Tensor]:
        """Squared slopes between real and generated pictures for WGAN-GP, beside real ones for DRAGAN."""
        p, steep = self.recipe.penalty, {}
        if p.gp and fake is not None:
            u = torch.rand(len(real), device=real.device)
            steep["gp"] = self._squared(network, between(real.detach(), fake.detach(), u), cond)
        if p.dragan:
            steep["dragan"] = self._squared(network, beside(real.detach(), torch.rand_like(real), torch.rand_like(real[:, 0, 0, 0])), cond)
        return steep

    def _weighed(self, steep: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """All penalties on slopes, weighed, and how steep the discriminator is: at real pictures where R1 or R2 look, else where the others do."""
        p, total = self.recipe.penalty, next(iter(steep.values())).new_zeros(())
        for name, squared in steep.items():
            size = squared.mean() / 2 if name in ("r1", "r2") else towards(squared, one_sided=p.one_sided)
            total = total + p.left(progress) * getattr(p, name) * size
        slope = (next(iter(steep.values())).detach() + BLANK).sqrt().mean()
        self.seen["slope"].append(mean_of_processes(slope.clone()))
        return total * self.balance.louder, {"slope": slope, "penalty": total.detach()}

    def _squared(self, network: nn.Module, x: Tensor, cond: Cond) -> Tensor:
        x = x.requires_grad_()
        return squared_slopes(network(x, cond).float(), x)

    @torch.no_grad()
    def _held_out(self, count: int) -> Tensor:
        """The mean score of a quarter as many held-out pictures, changed as all are; of as many where scores hang together."""
        x, cond = self.apart
        wanted = count if self.networks["discriminator"].mixes else -(-count // 4)
        rows = torch.randint(len(x), (wanted,), device=x.device)
        return mean_of_processes(self.networks["discriminator"](self.changed(x[rows]), cond[rows]).float().mean())

    def _noted(self, of_real: Tensor, of_fake: Tensor) -> dict[str, Tensor]:
        """What the averages follow, and what the log says of the scores."""
        half = mean_of_processes(middle(self.recipe.loss, of_real, of_fake))
        self.seen["scores"].append(mean_of_processes(torch.stack([of_real.mean(), of_fake.mean()])))
        return {
            "real_right": (of_real > half).float().mean(),
            "fake_right": (of_fake < half).float().mean(),
            "real_score": of_real.mean(),
            "fake_score": of_fake.mean(),
        }

    def after_step(self, averages: dict[str, nn.Module], images: int, finite: bool) -> dict[str, float]:
        seen = {name: torch.stack(parts).mean(0) for name, parts in self.seen.items()}
        self.seen.clear()
        if hasattr(self.networks["generator"], "centre"):  # each process saw other pictures
            self.networks["generator"].centre.copy_(mean_of_processes(self.networks["generator"].centre))
        if finite:
            self.balance.follow(seen, self.recipe, self.loop.batch_size)
        found = {"ada_p": float(self.balance.p)} if self.recipe.augment == "ada" else {}
        return found | ({"penalty_weight": float(self.balance.louder)} if self.recipe.adapt.penalty != "none" else {})

    # --- looking ------------------------------------------------------------------------------------------------------------------------------------

    def noise(self, purpose: str, count: int, width: int = 0) -> Tensor:
        return torch.stack([torch.randn(width or self.net.z, generator=torch_rng(self.seed, purpose, i)) for i in range(count)]).to(self.device)

    def looks(self, generator: nn.Module, z: Tensor, cond: Cond) -> Tensor:
        """What it draws of fixed noise, of places too, as `generate` does."""
        n = self.networks["generator"].noises
        return generator(z, cond, self.noise("look/places", len(z), n) if n else None)  # type: ignore[no-any-return, arg-type]

    @torch.no_grad()
    def drawing(self, networks: dict[str, nn.Module]) -> Any:
        """The averaged generator, ready to draw: batch norms with the statistics of its own pictures, not of the raw network's."""
        generator = copy.deepcopy(networks["generator"])
        norms = [m for m in generator.modules() if isinstance(m, nn.BatchNorm2d)]
        if norms:
            for m in norms:
                m.reset_running_stats()
                m.momentum = None  # the mean of all that comes
            known = self.looked_at["cond"]
            count = len(_rows(known))
            for i, z in _parts(self.noise("norms/z", count // 64 * 64 or count), 64):  # as many in each, since all weigh the same
                generator.train()(z, known[i : i + 64])
        return generator.eval()

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """The preview prompts in fixed styles with fixed noise, two of each."""
        cond, _ = self.preview()
        return grid(to_pil(self.looks(self.drawing(networks), self.noise("preview/z", len(_rows(cond))), cond)), columns=8)

    @cached_property
    def looked_at(self) -> dict[str, Any]:
        """Training pictures as they are, evenly from all of them, with what is said of them."""
        rows = np.random.default_rng(self.seed).permutation(evenly(len(self.shown.pixels), LOOKED_AT))  # some networks compare neighbours
        x = self.as_seen(F.avg_pool2d(self.shown.pixels[torch.from_numpy(rows)].float() / 255, 2)).contiguous()
        rng = np.random.default_rng(self.seed)
        texts = [self.shown.caption(self.shown.scene(int(r), replace(STILL, flip=0.0), rng), rng) if self.text else None for r in rows]
        cond = self.cond(texts, self._hot(self.shown.style[rows]), torch.from_numpy(self.shown.label[rows]))
        return {"x": x, "cond": cond}

    @cached_property
    def real_features(self) -> Tensor:
        """Of those pictures."""
        return self._features(self.looked_at["x"])

    @cached_property
    def apart(self) -> tuple[Tensor, Cond]:
        """Pictures that no training sees, with what is said of them."""
        shown = self.shown.validation()
        cond = self.cond(shown.captions, self._hot(shown.style), torch.from_numpy(shown.label))
        return self.as_seen(shown.pixels).contiguous(), cond

    def _features(self, x: Tensor) -> Tensor:
        u = (x.clamp(-1, 1) + 1) / 2
        return look(feature_net(), (over(u) if u.shape[1] == 4 else u).cpu())[0]

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        """Kernel distance and diversity (of the real ones 1) of what averaged weights draw; the scores of training, held-out and drawn pictures."""
        generator, discriminator, known = self.drawing(networks), self.networks["discriminator"], self.looked_at
        fake = torch.cat([self.looks(generator, z, known["cond"][i : i + 64]) for i, z in _parts(self.noise("look/z", len(known["x"])), 64)])
        finite = float(torch.isfinite(fake).flatten(1).all(1).float().mean())
        if finite < 1:
            return {"finite": finite}
        features, real = self._features(fake), self.real_features
        found = {
            "kid": kernel_distance(real, features),
            "diversity": pairwise_distance(features) / max(pairwise_distance(real), 1e-12),
        }
        discriminator.eval()
        for name, x, cond in (("train", known["x"], known["cond"]), ("held_out", *self.apart), ("drawn", fake, known["cond"])):
            scores = torch.cat([discriminator(p, cond[i : i + 64]) for i, p in _parts(x, 64)])
            found |= {f"{name}_score": float(scores.mean())} | ({"train_spread": float(scores.std())} if name == "train" else {})
        discriminator.train()
        return found | {"score": -found["kid"]}

    def remarks(self, run: Path) -> list[dict[str, Any]]:
        """What the doctor sees that it did not say before."""
        self.doctor.save(run)
        return self.doctor.look(run / "log.jsonl")

    @cached_property
    def doctor(self) -> Doctor:
        parameters = {f"{name}_parameters": sum(p.numel() for p in self.networks[name].parameters()) for name in ("generator", "discriminator")}
        some = self.looked_at["x"]
        variety = float(some.std(0).mean()) if len(some) > 1 else 0.0
        return Doctor({"kind": "gan", "images": self.loop.images, "pictures": len(self.shown.pixels), "variety": variety} | parameters)

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        parts = {"generator": self.drawing(networks), "discriminator": networks["discriminator"]}
        return self.packed(parts, {"kind": "gan", "discriminator": to_json(self.of_discriminator)})


def _parts(x: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for i in range(0, len(x), size):
        yield i, x[i : i + size]


def _rows(cond: Cond) -> Tensor:
    return next(v for v in (cond.style, cond.label, cond.pooled) if v is not None)


@contextmanager
def _resting(network: nn.Module) -> Iterator[None]:
    """A network that passes gradients on and keeps none."""
    learning = [p for p in network.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def without_effect(recipe: GANRecipe, loop: LoopConfig) -> list[str]:
    """A sentence for each thing that was set and does nothing."""
    p, a, d, usual = recipe.penalty, recipe.adapt, recipe.discriminator, AdaptConfig()
    follows = recipe.augment == "ada" or a.penalty == "overfit"
    useless = {
        "loop.betas": (loop.betas != LoopConfig().betas, "a pair has recipe.betas"),
        "discriminator.text_width, styles or labels": (bool(d.text_width or d.styles or d.labels), "they are the generator's"),
        "penalty.one_sided": (p.one_sided and not (p.gp or p.dragan), "it is of gp and dragan"),
        "penalty.end": (p.end < 1 and not p.of_slopes, "no penalty on slopes is above 0"),
        "penalty.every": (p.every > 1 and not p.of_slopes, "no penalty on slopes is above 0"),
        "adapt.target": (a.target != usual.target and not follows, "augment ada or adapt.penalty overfit follow it"),
        "adapt.images": (a.images != usual.images and recipe.augment != "ada" and a.penalty == "none", "augment ada and adapt.penalty take them"),
        "adapt.most": (a.most != usual.most and a.penalty == "none", "adapt.penalty is none"),
        "adapt.slope": (a.slope != usual.slope and a.penalty != "slope", "adapt.penalty slope holds it"),
    }
    return [f"warning: {name} has no effect: {why}" for name, (so, why) in useless.items() if so]


def train(recipe: GANRecipe, loop: LoopConfig, out: Path, *, text: Path, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, a pair in the run folder `out`; `text` is a run or pack, copied in on the first start."""
    for line in without_effect(recipe, loop):
        tqdm.write(translated(line), file=sys.stderr)
    loop = settled(loop, out)
    if loop.compile and recipe.penalty.of_slopes:
        raise ValueError("compile (=True) has no second derivative, which a penalty on slopes needs: leave one of them out")
    with starting(out):
        if recipe.data != EMOJI:
            same_source(Path(out), recipe.data)
        task = main_first(loop, lambda device: GANTask(recipe, loop.seed, Path(text), Path(out), device, loop.dtype == "bf16"))
        task.loop = loop  # type: ignore[attr-defined]
        trainer = Trainer(task, loop, out, recipe)
    trainer.train(stop_at=stop_at)
    return trainer
