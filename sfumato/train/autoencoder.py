"""Trains a codec (first stage) on pictures: a KL-VAE, a VQ-VAE or a VQGAN (arXiv 2112.10752 section 3.1, 2012.09841).

loss = pixels + perceptual * features + bottleneck + w * adversarial, where pixels are errors over black, over white, and of alpha. With a learned
codebook a run has four parts: without it until `codebook_from`, when the k-means of the latents makes it; with it; the discriminator's (see
`adversary`); its ramp. With `likelihood` it is a VAE that draws by itself: loss = -log p(x | z) + beta * KL, in nats a value.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato import zoo
from sfumato.codecs.autoencoder import Autoencoder, AutoencoderConfig, measure_latents
from sfumato.codecs.bottlenecks.kl import KLConfig, divergence, split
from sfumato.codecs.bottlenecks.residual import Residual
from sfumato.codecs.bottlenecks.vq import VQ, VQConfig, use_of
from sfumato.codecs.convnets import ConvnetConfig
from sfumato.codecs.gaussians import fit_mixture
from sfumato.core.checkpoint import read_metadata
from sfumato.core.config import from_json, to_json
from sfumato.core.images import grid, to_pil
from sfumato.core.pack import load_pack
from sfumato.core.rng import derive, numpy_rng, shuffled, torch_rng
from sfumato.data.augment import Variety, draw_scene, render
from sfumato.data.emoji import Drawings, concepts, drawings
from sfumato.data.folder import MOST_EXACT, Pictures, evenly, pixels_of, scan
from sfumato.data.folder import split as split_entries
from sfumato.data.shards import ShardPictures, are_shards, same_source, split_shards
from sfumato.data.subjects import EMOJI
from sfumato.gans.discriminators import PatchConfig
from sfumato.losses.adversarial import discriminator_loss
from sfumato.losses.perceptual import perceptual
from sfumato.losses.pixels import logistic_nll, pixel_loss
from sfumato.metrics.distribution import kernel_distance
from sfumato.metrics.features import feature_net, look
from sfumato.metrics.pairwise import over_both, ssim
from sfumato.metrics.stability import sharpness
from sfumato.nn.backbones import efficientnet_lite0, lite0_on, over
from sfumato.nn.lpips import lpips_from
from sfumato.pipelines.find import find
from sfumato.train.adversary import Adversary, AdversaryConfig, Controls
from sfumato.train.doctor import Doctor, codes_for
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer, begun_with, main_first, settled, starting

OWN = Variety(place=0.9, scale=(1.0, 1.35), angle=0.0, recolour=0.0)
WIDE = Variety(place=0.6, scale=(0.6, 1.25), angle=20.0, recolour=0.15, count=0.05, pair=0.05, scene=0.1)
LOOKED_AT = 512  # held-out pictures, and as many of the training, that every look measures
FIT_LATENTS = 32_768  # from which k-means makes a codebook, or 8 a code where that is more
COUNTED = 512  # pictures whose codes a pack counts
ENCODED = 2_048  # pictures to whose encodings a prior is fitted
SMALLEST_SSIM = 7


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """Everything that decides what a codec becomes. Weights are relative to the mean absolute error.

    `data` is "emoji", the embedded drawings, or a folder, a zip or shards of one's own pictures; `init` a pack whose codec it begins from, of
    which `only` decoder trains that part alone. `features` is what the perceptual term looks with: Lite0, LPIPS, or auto: LPIPS where a
    backbone's weights are (see `seen_with`); it joins after the fraction `perceptual_from` of the run, at `perceptual_size` pixels. With `kmeans`
    a learned codebook is left out until `codebook_from`, and made then; every `refit` pictures k-means moves it once more (0: never). `kl` weighs
    the KL term, after it has risen over `kl_warmup` of the run, and `free_bits` (nats a latent channel) are not counted. `likelihood`: the loss
    is a bound on the likelihood, pixels and features are left out.
    """

    kind: str = "train-autoencoder"
    data: str = EMOJI
    init: str = ""
    only: Literal["all", "decoder"] = "all"
    codec: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    size: int = 64
    l1: float = 1.0
    mse: float = 1.0
    charbonnier: float = 0.0
    edges: float = 0.5
    kl: float = 1e-3
    kl_warmup: float = 0.0
    free_bits: float = 0.0
    likelihood: bool = False
    codebook: float = 1.0
    kmeans: bool = True
    codebook_from: float = 0.1
    refit: int = 0
    perceptual: float = 0.3
    perceptual_from: float = 0.67
    perceptual_size: int = 128
    features: Literal["auto", "lite0", "lpips"] = "lite0"
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    variety: Variety = WIDE
    mixed_channels: float = 0.2
    limit: int = 0

    def __post_init__(self) -> None:
        if self.codec.convnet.image_channels not in (3, 4):
            raise ValueError(f"image_channels (={self.codec.convnet.image_channels}) must be 3 (RGB) or 4 (RGBA)")
        if self.size < 1 or self.size % self.codec.convnet.factor:
            raise ValueError(f"size (={self.size}) must be a multiple of the codec's factor (={self.codec.convnet.factor})")
        if self.data != EMOJI and self.limit:
            raise ValueError(f"limit (={self.limit}) is of the embedded drawings: leave it out for {self.data}")
        if self.limit < 0:
            raise ValueError(f"limit (={self.limit}) must be at least 0: how many concepts, 0 is all")
        if self.only == "decoder" and not self.init:
            raise ValueError("only (='decoder') needs init: the pack whose encoder and codebook stay as they are")
        if self.likelihood and self.codec.discrete:
            raise ValueError(f"likelihood needs a kl bottleneck, not {self.codec.bottleneck.kind}: codes have no density")
        if self.likelihood and self.adversary.weight:
            raise ValueError(f"likelihood has no place for an adversary (weight={self.adversary.weight}): leave one of them out")
        if self.adversary.weight and self.adversary.discriminator.image_channels != self.codec.convnet.image_channels:
            raise ValueError(
                f"adversary.discriminator.image_channels (={self.adversary.discriminator.image_channels}) must be those of the codec "
                f"(={self.codec.convnet.image_channels})"
            )
        if not 0 <= self.codebook_from < 1 or not 0 <= self.kl_warmup <= 1 or self.free_bits < 0 or self.refit < 0:
            raise ValueError(
                f"codebook_from (={self.codebook_from}) and kl_warmup (={self.kl_warmup}) are fractions of the run, "
                f"free_bits (={self.free_bits}) and refit (={self.refit}) at least 0"
            )


def preset_bundled() -> tuple[AutoencoderRecipe, LoopConfig]:
    """The codec of the bundled model: 64 x 64 RGBA -> 8 x 8 x 16, 6.9 M parameters (the KL autoencoder of arXiv 2112.10752, cheaper).

    On two cores with AVX512-bf16 46 minutes (52 images/s, and 33/s in the last third, with features). Held-out pairs: 29.8 dB.

    `sfumato train autoencoder --preset bundled --data emoji --out runs/codec`
    """
    return AutoencoderRecipe(), LoopConfig(images=120_000, batch_size=32, lr=1e-3, warmup=5_000, dtype="auto", save_every=25_000, sample_every=25_000)


def preset_own() -> tuple[AutoencoderRecipe, LoopConfig]:
    """A codec of one's own pictures at 64 pixels, begun from the bundled one.

    `sfumato train autoencoder --preset own --data DIR --out runs/codec`
    """
    return AutoencoderRecipe(init="emoji", variety=OWN, mixed_channels=0.0), LoopConfig(
        images=24_000, batch_size=32, lr=3e-4, warmup=1_000, dtype="auto", save_every=8_000, sample_every=8_000, log_every=1_600
    )  # fmt: skip


def preset_vqvae() -> tuple[AutoencoderRecipe, LoopConfig]:
    """64 x 64 pictures -> 8 x 8 of 1,024 codes, without a discriminator (VQ-VAE, arXiv 1711.00937, with cosine codes begun by k-means).

    `sfumato train autoencoder --preset vqvae --data DIR --out runs/vqvae`
    """
    net = ConvnetConfig(image_channels=3, patch=2, widths=(48, 96, 192), encoder_blocks=(1, 2, 2), decoder_blocks=(2, 2, 2))
    recipe = AutoencoderRecipe(
        codec=AutoencoderConfig(convnet=net, bottleneck=VQConfig()), variety=OWN, mixed_channels=0.0, perceptual_from=0.5, features="auto"
    )
    return recipe, LoopConfig(images=60_000, batch_size=8, lr=5e-4, warmup=2_000, dtype="auto", save_every=10_000, sample_every=10_000)


def preset_vqgan() -> tuple[AutoencoderRecipe, LoopConfig]:
    """The same with a patch discriminator in the last third (VQGAN, arXiv 2012.09841): sharper, at a little PSNR.

    `sfumato train autoencoder --preset vqgan --data DIR --out runs/vqgan`
    """
    recipe, loop = preset_vqvae()
    adversary = AdversaryConfig(weight=0.3, begins=0.4, joins=0.6, lr=2.0, discriminator=PatchConfig(width=32, layers=2))
    return replace(recipe, adversary=adversary), loop


def preset_vae() -> tuple[AutoencoderRecipe, LoopConfig]:
    """A VAE that draws by itself (arXiv 1312.6114): 64 x 64 pictures -> one vector of 128 numbers, trained on a bound of their likelihood.

    `sfumato train autoencoder --preset vae --data DIR --out runs/vae`, then `sfumato sample runs/vae`
    """
    net = ConvnetConfig(image_channels=3, patch=2, widths=(48, 96, 192), encoder_blocks=(1, 2, 2), decoder_blocks=(2, 2, 2), vector=8)
    recipe = AutoencoderRecipe(
        codec=AutoencoderConfig(convnet=net, bottleneck=KLConfig(channels=128)), likelihood=True, kl=1.0, kl_warmup=0.2, free_bits=0.02,
        perceptual=0.0, variety=OWN, mixed_channels=0.0,
    )  # fmt: skip
    return recipe, LoopConfig(images=60_000, batch_size=8, lr=5e-4, warmup=2_000, dtype="auto", save_every=10_000, sample_every=10_000)


def preset_smoke() -> tuple[AutoencoderRecipe, LoopConfig]:
    """A codec that trains in seconds, to try the tools: 12 concepts, 16 x 16 pixels."""
    net = ConvnetConfig(patch=2, widths=(16, 32), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    recipe = AutoencoderRecipe(codec=AutoencoderConfig(convnet=net, bottleneck=KLConfig(channels=4)), size=16, perceptual=0.0, limit=12)
    return recipe, LoopConfig(images=640, batch_size=16, warmup=64, save_every=320, sample_every=320, log_every=64)


PRESETS = {
    "bundled": preset_bundled, "own": preset_own, "vqvae": preset_vqvae, "vqgan": preset_vqgan, "vae": preset_vae, "smoke": preset_smoke,
}  # fmt: skip


def of_few(recipe: AutoencoderRecipe, pictures: int) -> AutoencoderRecipe:
    """With no more codes of a learned codebook than that many pictures can teach."""
    codec = recipe.codec
    if not isinstance(codec.bottleneck, VQConfig):
        return recipe
    cells = (recipe.size // codec.convnet.factor) ** 2
    return replace(recipe, codec=replace(codec, bottleneck=replace(codec.bottleneck, size=min(codec.bottleneck.size, codes_for(pictures * cells)))))


def split_pictures(data: str, size: int, limit: int = 0) -> tuple[Drawings | Pictures | ShardPictures, Drawings | Pictures | ShardPictures]:
    """(training, held out): the embedded art, of which `limit` takes the first concepts only, or the pictures of a folder or of shards."""
    if data != EMOJI and are_shards(data):
        return split_shards(data, size)
    if data != EMOJI:
        found = scan(data)
        return tuple(pixels_of(found, part, size) for part in split_entries(found.entries))  # type: ignore[return-value]
    art = drawings(size, concepts()[:limit] if limit else None)
    return art.rows(~art.held_out), art.rows(art.held_out)


def check_init(recipe: AutoencoderRecipe) -> None:
    """Raises ValueError where `recipe.init` has no codec of the recipe's shape."""
    pack = find(recipe.init)
    found = read_metadata(pack).get("codec", "no codec")
    if not isinstance(found, dict) or from_json(AutoencoderConfig, found) != recipe.codec:
        raise ValueError(f"init (={recipe.init!r}) must hold a codec of the recipe's shape: {pack} has {found}")


def begun_from(recipe: AutoencoderRecipe) -> Autoencoder:
    """The codec of the pack `recipe.init`. Raises ValueError where it has none of this shape."""
    check_init(recipe)
    tensors, _ = load_pack(find(recipe.init))
    return zoo.load_into(Autoencoder(recipe.codec), tensors, "codec.").train().requires_grad_(True)  # type: ignore[return-value]


def psnr_over_white(prediction: Tensor, target: Tensor) -> Tensor:
    """Per-picture PSNR in dB "b", over white, after rounding to 8 bits; inputs "b c h w" in [-1, 1], premultiplied where c is 4."""
    flat = over if prediction.shape[1] == 4 else lambda x: x
    a, b = ((flat((x.clamp(-1, 1) + 1) / 2) * 255).round().clamp(0, 255) for x in (prediction, target))
    return 20 * math.log10(255) - 10 * (a - b).square().mean((1, 2, 3)).clamp_min(1e-3).log10()


class Likelihood(nn.Module):
    """The width of the distribution that a decoder's picture is the middle of, one a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((channels,), -2.0))

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        """-log p in nats, "b"."""
        return logistic_nll(x, mean, self.log_scale[:, None, None])


class AutoencoderTask:
    """See `sfumato.train.loop.Task`."""

    kind = "autoencoder"
    full_precision = ("discriminator", "likelihood")

    def __init__(self, recipe: AutoencoderRecipe, seed: int, bf16: bool = False, auto: bool = False) -> None:
        self.recipe, self.seed, self.bf16, self.auto = recipe, seed, bf16, auto
        self.lpips = lpips_from() if recipe.features != "lite0" and recipe.perceptual else None
        if recipe.features == "lpips" and recipe.perceptual and self.lpips is None:
            raise ValueError(
                "features (='lpips') need a torchvision backbone that torch has downloaded before: use lite0, which comes with the extra data"
            )
        if recipe.perceptual:
            efficientnet_lite0()  # better missed now than when the feature term joins
        self.train, held_out = split_pictures(recipe.data, 2 * recipe.size, recipe.limit)
        shown = held_out if len(held_out) else self.train
        self.exact = self._exact(shown, MOST_EXACT if recipe.data != EMOJI else len(shown))
        self.flips = self.train.may_flip
        self.of_style = [np.flatnonzero(self.train.style == s) for s in range(6)]
        torch.manual_seed(seed)
        codec = (begun_from(recipe) if recipe.init else Autoencoder(recipe.codec)).to(memory_format=torch.channels_last)
        if recipe.only == "decoder":
            codec.encoder.requires_grad_(False)
            codec.bottleneck.requires_grad_(False)
        self.networks: dict[str, nn.Module] = {"codec": codec}
        self.controls, self.adversary = Controls(), None
        of_codec: tuple[str, ...] = ("codec",)
        if recipe.likelihood:
            self.networks["likelihood"], of_codec = Likelihood(recipe.codec.convnet.image_channels), ("codec", "likelihood")
        if recipe.codec.discrete or recipe.adversary.weight:
            self.networks["controls"] = self.controls
        every = recipe.adversary.steps if recipe.adversary.weight else 1
        self.phases = [Phase("codec", of_codec, self.loss, every, thinned=recipe.adversary.begins)]
        if recipe.adversary.weight:
            self.adversary = Adversary(recipe.adversary, self.controls)
            self.networks["discriminator"] = self.adversary.network
            a = recipe.adversary
            self.phases.append(Phase("discriminator", ("discriminator",), self.judge, 1, a.lr, a.begins, betas=a.betas))
        self.partly_used = recipe.codec.discrete or recipe.only == "decoder"
        self.seen: list[dict[str, Tensor]] = []
        self.doctor = Doctor(self._facts())

    def _exact(self, pictures: Any, most: int) -> Tensor:
        """Pictures as they are, in [-1, 1]."""
        exact = pictures.pixels[torch.tensor(evenly(len(pictures), most))]
        return self._of_the_codec(F.avg_pool2d(exact.float() / 255, 2)) * 2 - 1

    def _facts(self) -> dict[str, Any]:
        """What the doctor is to know besides the log."""
        r, some = self.recipe, self._exact(self.train, 64)
        b, cells = r.codec.bottleneck, (r.size // r.codec.convnet.factor) ** 2
        return {
            "pictures": len(self.train), "cells": cells, "codes": 0 if isinstance(b, KLConfig) else b.codebook_size, "bottleneck": b.kind,
            "parameters": sum(p.numel() for p in self.networks["codec"].parameters()), "values": r.size**2 * some.shape[1],
            "variety": float(some.std(0).mean()) if len(some) > 1 else 0.0, "adversary": r.adversary.weight > 0, "most": r.adversary.most,
            "blank": float(discriminator_loss(r.adversary.loss, torch.zeros(1), torch.zeros(1))) / 2,
        }  # fmt: skip

    @cached_property
    def own(self) -> Tensor:
        """As many training pictures as held-out ones are looked at."""
        return self._exact(self.train, min(LOOKED_AT, len(self.exact)))

    @property
    def learns_codes(self) -> bool:
        """Whether it has a codebook that may move."""
        return isinstance(self.networks["codec"].bottleneck, (VQ, Residual)) and self.recipe.only == "all"

    @property
    def fits(self) -> bool:
        """Whether k-means makes the codebook."""
        return self.learns_codes and self.recipe.kmeans

    @property
    def made(self) -> bool:
        """Whether there is a codebook: made by k-means, or that of the codec that it began from."""
        return bool(self.controls.fitted) or bool(self.recipe.init)

    @property
    def complete_from(self) -> float:
        """The progress from which on the codebook, the features and the whole adversarial weight are there."""
        r = self.recipe
        adversary = min(r.adversary.joins + r.adversary.ramp, 1.0) if r.adversary.weight else 0.0
        return max(r.codebook_from if self.fits else 0.0, r.perceptual_from if r.perceptual else 0.0, adversary)

    def pictures(self, positions: np.ndarray, purpose: str = "train") -> Tensor:
        """Augmented training pictures "b 4 size size" in [-1, 1] at positions of the data order."""
        if isinstance(self.train, ShardPictures):
            rows = self.train.shards.order(derive(self.seed, purpose), positions)
        else:
            rows = shuffled(len(self.train), self.seed, f"{purpose}/order", positions)
        scenes, mixes = [], []
        for position, row in zip(positions, rows, strict=True):
            rng = numpy_rng(self.seed, f"{purpose}/scene", int(position))
            friends = rng.choice(self.of_style[self.train.style[row]], 2)
            scenes.append(draw_scene(rng, self.recipe.variety, int(row), bool(self.flips[row]), [(int(f), bool(self.flips[f])) for f in friends]))
            mixes.append([*rng.permutation(3), 3] if rng.random() < self.recipe.mixed_channels else [0, 1, 2, 3])
        x = render(self.train.pixels, scenes, self.recipe.size)
        x = torch.gather(x, 1, torch.tensor(np.array(mixes))[:, :, None, None].expand_as(x))
        return self._of_the_codec(x) * 2 - 1

    def _of_the_codec(self, rgba: Tensor) -> Tensor:
        """Pictures in [0, 1] with as many channels as the codec has: RGBA as it is, RGB over white."""
        return over(rgba) if self.recipe.codec.convnet.image_channels == 3 else rgba

    def batch(self, positions: np.ndarray) -> Batch:
        r = self.recipe
        x = self.pictures(positions).contiguous(memory_format=torch.channels_last)
        ground = torch.tensor([numpy_rng(self.seed, "train/ground", int(p)).choice((0.0, 0.5, 1.0)) for p in positions], dtype=torch.float32)
        batch = {"x": x, "ground": ground[:, None, None, None]}
        if not r.codec.discrete:
            side = r.size // r.codec.convnet.factor
            shape = (r.codec.bottleneck.channels, side, side)
            batch["noise"] = torch.stack([torch.randn(shape, generator=torch_rng(self.seed, "train/posterior", int(p))) for p in positions])
        return batch

    # --- losses -----------------------------------------------------------------------------------------------------------------------------------

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        r, x = self.recipe, batch["x"]
        bypass = {"bypass": True} if self.fits and not self.made else {}
        y, bottleneck, stats = networks["codec"](x, batch.get("noise"), **bypass)
        if "indices" in stats and torch.is_grad_enabled():
            self.seen.append({k: stats.pop(k) for k in ("latents", "indices") if k in stats})
        if r.likelihood:
            return self._bound(networks, x, y, stats, progress)
        share = r.adversary.heard(progress)
        if self.adversary is not None and progress >= r.adversary.begins:
            batch["fake"] = y.detach()
        if share and self.adversary is not None:
            weight = self.networks["codec"].last_weight
            loss, found = self.adversary.hear(y, weight, lambda v: self._reconstruction(v, x, batch["ground"], progress), share)  # type: ignore[arg-type]
        else:
            loss, found = self._reconstruction(y, x, batch["ground"], progress)
        if r.codec.discrete:
            return loss + r.codebook * bottleneck, found | {k: v for k, v in stats.items() if v.ndim == 0}
        kl = self._free(stats.pop("kl_channels"))
        return loss + r.kl * self._risen(progress) * kl, found | {"kl": bottleneck.detach(), **stats}

    def _risen(self, progress: float) -> float:
        return min(1.0, progress / self.recipe.kl_warmup) if self.recipe.kl_warmup else 1.0

    def _free(self, kl: Tensor) -> Tensor:
        """The mean of the KL of each latent channel, of which `free_bits` nats cost nothing (arXiv 1606.04934, section 4)."""
        return kl.clamp_min(self.recipe.free_bits).mean()

    def _bound(
        self, networks: dict[str, nn.Module], x: Tensor, y: Tensor, stats: dict[str, Tensor], progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-log p(x | z) + beta * KL, in nats a value of the picture; "bits" is the bound itself, without beta and free bits, in bits a value."""
        values = x[0].numel()
        channels = stats.pop("kl_channels")
        cells = values // x.shape[1] // self.recipe.codec.convnet.factor**2
        nll = networks["likelihood"](x, y).mean() / values
        per_value = cells * len(channels) / values
        loss = nll + self.recipe.kl * self._risen(progress) * self._free(channels) * per_value
        bits = (nll + channels.mean() * per_value).detach() / math.log(2)
        return loss, {"bits": bits, "nll": nll.detach(), "kl": channels.detach().mean(), **stats}

    def _reconstruction(self, y: Tensor, x: Tensor, ground: Tensor, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        r = self.recipe
        loss, found = pixel_loss(y, x, l1=r.l1, mse=r.mse, charbonnier=r.charbonnier, edges=r.edges)
        if r.perceptual and progress >= r.perceptual_from:
            features, _ = self._perceptual(y, x, ground)
            loss = loss + r.perceptual * features
            found["perceptual"] = features.detach()
        return loss, found

    def judge(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss, of the copies that the codec's step has just made."""
        assert self.adversary is not None
        fake = batch.pop("fake", None)
        if fake is None:
            with torch.no_grad():
                fake = self.networks["codec"](batch["x"], batch.get("noise"))[0]
        return self.adversary.judge(networks["discriminator"], batch["x"], fake)

    # --- what is not learned by gradients ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_step(self, averages: dict[str, nn.Module], images: int, finite: bool) -> dict[str, float]:
        """The codebook's own learning, once a step; its making by k-means; what an epoch used of it."""
        seen, self.seen = self.seen, []
        codec, r = self.networks["codec"], self.recipe
        if self.adversary is not None:
            self.adversary.settle(finite)
        if not r.codec.discrete or not finite or r.only == "decoder":
            return {}
        if seen:
            codec.bottleneck.update(_together(seen))  # type: ignore[operator]
        if self.fits and self._due(images):
            self._fit(codec, fresh=not self.made)
            self.controls.fitted.fill_(True)
        for mine, average in zip(_quantizers(codec), _quantizers(averages["codec"]), strict=True):
            for rows in getattr(mine, "placed", ()):
                average.codebook[rows] = mine.codebook[rows]
            mine.placed = []
        epoch = max(min(len(self.train), 20_000), 1)
        if seen and self._passed(epoch, images):
            use = use_of(codec.bottleneck.counts.flatten())  # type: ignore[union-attr]
            codec.bottleneck.forget()  # type: ignore[operator]
            return use
        return {}

    def _due(self, images: int) -> bool:
        """Whether the codebook is to be made now, or made once more."""
        if not self.made:
            return images >= self.recipe.codebook_from * self.images
        return bool(self.recipe.refit) and self._passed(self.recipe.refit, images)

    def _passed(self, every: int, images: int) -> bool:
        """Whether this step went past a multiple of `every` pictures."""
        return images // every > (images - self.batch_size) // every

    def _fit(self, codec: nn.Module, *, fresh: bool) -> None:
        cells = (self.recipe.size // self.recipe.codec.convnet.factor) ** 2
        count = -(-max(FIT_LATENTS, 8 * self.recipe.codec.bottleneck.codebook_size) // cells)  # type: ignore[union-attr]
        device = next(codec.parameters()).device
        codec.eval()
        z = torch.cat([codec.encoder(self.pictures(np.arange(i, min(i + 64, count)), "codebook").to(device)).float() for i in range(0, count, 64)])
        codec.bottleneck.fit(z, seed=derive(self.seed, "codebook") % 2**31, fresh=fresh)  # type: ignore[operator]
        codec.train()

    def begin(self, loop: LoopConfig) -> AutoencoderTask:
        """Tells the task how long the run is, which decides when its codebook is made."""
        self.images, self.batch_size = loop.images, loop.batch_size
        self.doctor.facts["images"] = loop.images
        return self

    def _perceptual(self, y: Tensor, x: Tensor, ground: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        network = lite0_on(x.device)
        size = self.recipe.perceptual_size
        flat = [
            F.interpolate((over((v + 1) / 2, ground) * 2 - 1) if v.shape[1] == 4 else v, size=(size, size), mode="bilinear", align_corners=False)
            for v in (y, x)
        ]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            if self.lpips is not None:
                return self.lpips.to(x.device)(*((v + 1) / 2 for v in flat)).mean(), {}  # which takes pictures in [0, 1]
            return perceptual(network, *flat)

    def reconstruct(self, codec: nn.Module, x: Tensor) -> Tensor:
        device = next(codec.parameters()).device
        return torch.cat([codec(part.to(device))[0].cpu() for part in x.split(64)])

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        x = self.exact[:: max(len(self.exact) // 24, 1)][:24]
        y = self.reconstruct(networks["codec"], x)
        return grid([p for pair in zip(to_pil(x), to_pil(y), strict=True) for p in pair], columns=8)

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        """PSNR and SSIM of the held-out pictures, and where features are there: their distance, the kernel distance of the copies, and how much of
        the detail they keep; of codes, what the held-out pictures use; the score is the PSNR, with an adversary the distance.
        """
        x, codec = self.exact, networks["codec"]
        y = self.reconstruct(codec, x)
        found = {"psnr": psnr_over_white(y, x).mean().item()}
        few = [v[torch.tensor(evenly(len(x), LOOKED_AT))] for v in (x, y)]
        pictures = [((v.clamp(-1, 1) + 1) / 2) for v in few]
        if self.recipe.size >= SMALLEST_SSIM:
            found["ssim"] = over_both(ssim, pictures[1], pictures[0]).mean().item()
        flat = [over(p) if p.shape[1] == 4 else p for p in pictures]
        found["detail"] = float(sharpness(flat[1]).mean() / sharpness(flat[0]).mean().clamp_min(1e-9))
        if self.recipe.perceptual or self.recipe.codec.discrete or self.recipe.likelihood or self.adversary is not None:
            found |= self._distances(*flat)
            found["train_psnr"] = psnr_over_white(self.reconstruct(codec, self.own), self.own).mean().item()
        if self.lpips is not None:
            found["lpips"] = float(np.mean([float(self.lpips.cpu()(b, a).mean()) for a, b in zip(flat[0].split(64), flat[1].split(64), strict=True)]))
        found |= self._codes(networks, few[0])
        if self.fits and not self.made:
            return found  # a codebook that is not made yet says nothing of the run
        return found | {"score": -found["distance"] if self.adversary is not None else -found["bits"] if "bits" in found else found["psnr"]}

    def _distances(self, real: Tensor, copy: Tensor) -> dict[str, float]:
        net = feature_net()
        distance = [float(perceptual(efficientnet_lite0(), b * 2 - 1, a * 2 - 1)[0]) for a, b in zip(real.split(64), copy.split(64), strict=True)]
        kernel = kernel_distance(look(net, real)[0], look(net, copy)[0]) if len(real) > 1 else math.nan
        return {"distance": float(np.mean(distance)), "kernel": kernel}

    def _codes(self, networks: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
        codec = networks["codec"]
        device = next(codec.parameters()).device
        z_e = torch.cat([codec.encoder(part.to(device)) for part in x.split(64)])
        if self.recipe.codec.discrete:
            return {f"held_out_{k}": v for k, v in use_of(_counts(codec, z_e)).items()}
        mean, std = split(z_e)
        live = mean.movedim(1, 0).flatten(1).std(1) > 0.1
        found = {"live_channels": float(live.float().mean())}
        if self.recipe.likelihood:
            noise = torch.randn(mean.shape, generator=torch_rng(self.seed, "evaluate/posterior")).to(device)
            y = torch.cat([codec.decoder(part).float() for part in (mean + std * noise).split(64)])
            kl = divergence(mean, std).flatten(1).sum(1)
            nll = networks["likelihood"](x.to(device), y)
            found["bits"] = float((nll + kl).mean()) / x[0].numel() / math.log(2)
        return found

    def remarks(self, run: Path) -> list[dict[str, Any]]:
        """What the doctor sees that it did not say before; where it may, it acts."""
        self.doctor.save(run)
        lines = self.doctor.look(run / "log.jsonl")
        for line in lines if self.auto else ():
            if line["finding"] in ("discriminator-too-strong", "discriminator-too-fast", "weight-at-cap", "collapse") and self.adversary is not None:
                self.controls.lowered.mul_(0.5)
                line["action"] = f"the adversarial weight is {float(self.controls.lowered):g} of what was asked for"
            if line["finding"] == "dead-codes" and self.learns_codes:
                self._fit(self.networks["codec"], fresh=False)
                line["action"] = "k-means moved the codebook to the latents"
        return lines

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        codec = copy.deepcopy(networks["codec"])
        device = next(codec.parameters()).device
        some = [self.pictures(np.arange(i, i + 64), "measure").to(device) for i in range(0, COUNTED, 64)]
        measure_latents(codec, some)  # type: ignore[arg-type]
        extra: dict[str, Tensor] = {}
        if self.recipe.codec.discrete:
            counts = sum(_counts(codec, codec.encoder(x)) for x in some)
            for quantizer, count in zip(_quantizers(codec), counts.reshape(len(_quantizers(codec)), -1), strict=True):  # type: ignore[union-attr]
                quantizer.counts.copy_(count)
        if getattr(self.recipe.codec.convnet, "vector", 0):
            extra = fit_mixture(self._encodings(codec), seed=self.seed)
        tensors = {f"codec.{k}": v for k, v in codec.state_dict().items()} | {f"prior.{k}": v for k, v in extra.items()}
        return tensors, {"kind": "codec", "codec": to_json(self.recipe.codec), "size": self.recipe.size}

    def _encodings(self, codec: nn.Module) -> Tensor:
        """Samples of the posteriors of training pictures, on the CPU: where they lie, and how wide each of them is."""
        device = next(codec.parameters()).device
        found = []
        for i in range(0, ENCODED, 64):
            latents = codec.encode(self.pictures(np.arange(i, i + 64), "prior").to(device))
            noise = torch.randn(latents.mean.shape, generator=torch_rng(self.seed, "prior/posterior", i)).to(device)
            found.append((latents.mean + latents.std * noise).flatten(1).cpu())
        return torch.cat(found)


def _together(seen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The parts of a batch as one: latents along their rows (second axis where there are levels), indices along the batch."""
    joined = {"indices": torch.cat([s["indices"] for s in seen])}
    if "latents" in seen[0]:
        joined["latents"] = torch.cat([s["latents"] for s in seen], -2)
    return joined


def _quantizers(codec: nn.Module) -> list[Any]:
    """The bottleneck, or its levels."""
    return list(codec.bottleneck.quantizers) if isinstance(codec.bottleneck, Residual) else [codec.bottleneck]


def _counts(codec: nn.Module, z_e: Tensor) -> Tensor:
    """How often latents choose each code, level after level."""
    indices = codec.bottleneck.quantize(z_e)  # type: ignore[operator]
    size = codec.config.bottleneck.codebook_size  # type: ignore[union-attr]
    return torch.cat([torch.bincount(indices[..., i].flatten(), minlength=size) for i in range(indices.shape[-1])])


def seen_with(recipe: AutoencoderRecipe, run: Path) -> AutoencoderRecipe:
    """`features` auto decided: what the run was begun with, else LPIPS where a backbone's weights are, else Lite0."""
    if recipe.features != "auto":
        return recipe
    begun = begun_with(Path(run))
    if begun is not None:
        return replace(recipe, features=begun["config"].get("features", "lite0"))
    return replace(recipe, features="lite0" if lpips_from() is None else "lpips")


def train(recipe: AutoencoderRecipe, loop: LoopConfig, out: Path, *, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, the codec in the run folder `out`."""
    loop, recipe = settled(loop, out), seen_with(recipe, out)
    with starting(out):
        if recipe.data != EMOJI:
            same_source(Path(out), recipe.data, words=False)
        task = main_first(loop, lambda _: AutoencoderTask(recipe, loop.seed, loop.dtype == "bf16", loop.auto).begin(loop))
        trainer = Trainer(task, loop, out, recipe)
    trainer.train(stop_at=stop_at)
    return trainer
