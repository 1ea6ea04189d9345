"""Trains a codec (first stage) on pictures: pixels, edges and, in the last part of the run, features (arXiv 2112.10752, section 3.1).

loss = |d| + mse * d^2 + edges * |grad d| + kl * KL + perceptual * features, where d is the error over black, over white, and of alpha.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato import zoo
from sfumato.codecs.autoencoder import Autoencoder, AutoencoderConfig, measure_latents
from sfumato.core.checkpoint import read_metadata
from sfumato.core.config import to_json
from sfumato.core.images import grid, to_pil
from sfumato.core.pack import load_pack
from sfumato.core.rng import derive, numpy_rng, shuffled, torch_rng
from sfumato.data.augment import Variety, draw_scene, render
from sfumato.data.emoji import Drawings, concepts, drawings
from sfumato.data.folder import MOST_EXACT, Pictures, evenly, pixels_of, scan, split
from sfumato.data.shards import ShardPictures, are_shards, same_source, split_shards
from sfumato.data.subjects import EMOJI
from sfumato.losses.perceptual import perceptual
from sfumato.nn.backbones import efficientnet_lite0, lite0_on, over
from sfumato.pipelines.find import find
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer, main_first, settled

OWN = Variety(place=0.9, scale=(1.0, 1.35), angle=0.0, recolour=0.0)
WIDE = Variety(place=0.6, scale=(0.6, 1.25), angle=20.0, recolour=0.15, count=0.05, pair=0.05, scene=0.1)


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """Everything that decides what a codec becomes. Weights are relative to the mean absolute error.

    `data` is "emoji", the embedded drawings, or a folder, a zip or shards of one's own pictures; `init` a pack whose codec it begins from.
    `perceptual_from` is the fraction of the run after which the feature term joins, at `perceptual_size` pixels.
    """

    kind: str = "train-autoencoder"
    data: str = EMOJI
    init: str = ""
    codec: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    size: int = 64
    mse: float = 1.0
    edges: float = 0.5
    kl: float = 1e-3
    perceptual: float = 0.3
    perceptual_from: float = 0.67
    perceptual_size: int = 128
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


def preset_smoke() -> tuple[AutoencoderRecipe, LoopConfig]:
    """A codec that trains in seconds, to try the tools: 12 concepts, 16 x 16 pixels."""
    from sfumato.codecs.bottlenecks.kl import KLConfig
    from sfumato.codecs.convnets import ConvnetConfig

    net = ConvnetConfig(patch=2, widths=(16, 32), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    recipe = AutoencoderRecipe(codec=AutoencoderConfig(convnet=net, bottleneck=KLConfig(channels=4)), size=16, perceptual=0.0, limit=12)
    return recipe, LoopConfig(images=640, batch_size=16, warmup=64, save_every=320, sample_every=320, log_every=64)


PRESETS = {"bundled": preset_bundled, "own": preset_own, "smoke": preset_smoke}


def split_pictures(data: str, size: int, limit: int = 0) -> tuple[Drawings | Pictures | ShardPictures, Drawings | Pictures | ShardPictures]:
    """(training, held out): the embedded art, of which `limit` takes the first concepts only, or the pictures of a folder or of shards."""
    if data != EMOJI and are_shards(data):
        return split_shards(data, size)
    if data != EMOJI:
        found = scan(data)
        return tuple(pixels_of(found, part, size) for part in split(found.entries))  # type: ignore[return-value]
    art = drawings(size, concepts()[:limit] if limit else None)
    return art.rows(~art.held_out), art.rows(art.held_out)


def check_init(recipe: AutoencoderRecipe) -> None:
    """Raises ValueError where `recipe.init` has no codec of the recipe's shape."""
    pack = find(recipe.init)
    found = read_metadata(pack).get("codec", "no codec")
    if found != to_json(recipe.codec):
        raise ValueError(f"init (={recipe.init!r}) must hold a codec of the recipe's shape: {pack} has {found}")


def begun_from(recipe: AutoencoderRecipe) -> Autoencoder:
    """The codec of the pack `recipe.init`. Raises ValueError where it has none of this shape."""
    check_init(recipe)
    tensors, _ = load_pack(find(recipe.init))
    return zoo.load_into(Autoencoder(recipe.codec), tensors, "codec.").train().requires_grad_(True)  # type: ignore[return-value]


def layers_of(x: Tensor) -> Tensor:
    """Premultiplied RGBA "b 4 h w" in [-1, 1] -> over black, over white and alpha, "b 7 h w": an error in any of them is seen."""
    rgb, alpha = x[:, :3], x[:, 3:]
    return torch.cat([rgb, rgb + 1 - alpha, alpha], dim=1)


def pixel_loss(prediction: Tensor, target: Tensor, *, mse: float, edges: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Absolute, squared and finite-difference error of the layers; inputs "b c h w" in [-1, 1], premultiplied where c is 4."""
    d = layers_of(prediction) - layers_of(target) if prediction.shape[1] == 4 else prediction - target
    l1, l2 = d.abs().mean(), d.square().mean()
    gradient = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    return l1 + mse * l2 + edges * gradient, {"l1": l1.detach(), "l2": l2.detach()}


def psnr_over_white(prediction: Tensor, target: Tensor) -> Tensor:
    """Per-picture PSNR in dB "b", over white, after rounding to 8 bits; inputs "b c h w" in [-1, 1], premultiplied where c is 4."""
    flat = over if prediction.shape[1] == 4 else lambda x: x
    a, b = ((flat((x.clamp(-1, 1) + 1) / 2) * 255).round().clamp(0, 255) for x in (prediction, target))
    return 20 * math.log10(255) - 10 * (a - b).square().mean((1, 2, 3)).clamp_min(1e-3).log10()


class AutoencoderTask:
    """See `sfumato.train.loop.Task`."""

    kind = "autoencoder"

    def __init__(self, recipe: AutoencoderRecipe, seed: int, bf16: bool = False) -> None:
        self.recipe, self.seed, self.bf16 = recipe, seed, bf16
        if recipe.perceptual:
            efficientnet_lite0()  # better missed now than when the feature term joins
        self.train, held_out = split_pictures(recipe.data, 2 * recipe.size, recipe.limit)
        shown = held_out if len(held_out) else self.train
        exact = shown.pixels[torch.tensor(evenly(len(shown), MOST_EXACT if recipe.data != EMOJI else len(shown)))]
        self.exact = self._of_the_codec(F.avg_pool2d(exact.float() / 255, 2)) * 2 - 1
        self.flips = self.train.may_flip
        self.of_style = [np.flatnonzero(self.train.style == s) for s in range(6)]
        torch.manual_seed(seed)
        codec = (begun_from(recipe) if recipe.init else Autoencoder(recipe.codec)).to(memory_format=torch.channels_last)
        self.networks: dict[str, nn.Module] = {"codec": codec}
        self.phases = [Phase("codec", ("codec",), self.loss)]

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
        side = r.size // r.codec.convnet.factor
        shape = (r.codec.bottleneck.channels, side, side)
        noise = torch.stack([torch.randn(shape, generator=torch_rng(self.seed, "train/posterior", int(p))) for p in positions])
        ground = torch.tensor([numpy_rng(self.seed, "train/ground", int(p)).choice((0.0, 0.5, 1.0)) for p in positions], dtype=torch.float32)
        x = self.pictures(positions).contiguous(memory_format=torch.channels_last)
        return {"x": x, "noise": noise, "ground": ground[:, None, None, None]}

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        r, x = self.recipe, batch["x"]
        y, kl, stats = networks["codec"](x, batch["noise"])
        loss, found = pixel_loss(y, x, mse=r.mse, edges=r.edges)
        loss = loss + r.kl * kl
        if r.perceptual and progress >= r.perceptual_from:
            features, _ = self._perceptual(y, x, batch["ground"])
            loss = loss + r.perceptual * features
            found["perceptual"] = features.detach()
        return loss, found | {"kl": kl.detach(), **stats}

    def _perceptual(self, y: Tensor, x: Tensor, ground: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        network = lite0_on(x.device)
        size = self.recipe.perceptual_size
        flat = [
            F.interpolate((over((v + 1) / 2, ground) * 2 - 1) if v.shape[1] == 4 else v, size=(size, size), mode="bilinear", align_corners=False)
            for v in (y, x)
        ]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return perceptual(network, *flat)

    def reconstruct(self, codec: nn.Module, x: Tensor) -> Tensor:
        device = next(codec.parameters()).device
        return torch.cat([codec(part.to(device))[0].cpu() for part in x.split(64)])

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        x = self.exact[:: max(len(self.exact) // 24, 1)][:24]
        y = self.reconstruct(networks["codec"], x)
        return grid([p for pair in zip(to_pil(x), to_pil(y), strict=True) for p in pair], columns=8)

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        psnr = psnr_over_white(self.reconstruct(networks["codec"], self.exact), self.exact).mean().item()
        return {"psnr": psnr, "score": psnr}

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        codec = copy.deepcopy(networks["codec"])
        device = next(codec.parameters()).device
        measure_latents(codec, (self.pictures(np.arange(i, i + 64), "measure").to(device) for i in range(0, 512, 64)))  # type: ignore[arg-type]
        tensors = {f"codec.{k}": v for k, v in codec.state_dict().items()}
        return tensors, {"kind": "codec", "codec": to_json(self.recipe.codec), "size": self.recipe.size}


def train(recipe: AutoencoderRecipe, loop: LoopConfig, out: Path, *, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, the codec in the run folder `out`."""
    loop = settled(loop, out)
    if recipe.data != EMOJI:
        same_source(Path(out), recipe.data, words=False)
    trainer = Trainer(main_first(loop, lambda _: AutoencoderTask(recipe, loop.seed, loop.dtype == "bf16")), loop, out, recipe)
    trainer.train(stop_at=stop_at)
    return trainer
