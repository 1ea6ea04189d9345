"""Trains the enlargement by 4 on what a codec makes of drawings, against the same drawings rasterised four times as large.

What a sampler draws is not as clean as what a codec repairs, so latents are disturbed by up to `disturb` of their spread before they are decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato import zoo
from sfumato.codecs.autoencoder import Autoencoder
from sfumato.codecs.upscaler import Upscaler, UpscalerConfig, drawn_by
from sfumato.core.checkpoint import FileError
from sfumato.core.config import to_json
from sfumato.core.images import grid, to_pil
from sfumato.core.pack import load_pack
from sfumato.core.rng import numpy_rng, shuffled, torch_rng
from sfumato.data.emoji import Drawings, art_digest, concepts, credits, drawable, drawings
from sfumato.data.latents import cached_latents
from sfumato.losses.perceptual import perceptual
from sfumato.losses.pixels import pixel_loss
from sfumato.nn.backbones import efficientnet_lite0, lite0_on, over
from sfumato.train.autoencoder import psnr_over_white
from sfumato.train.conditioned import frozen_part
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer, main_first, settled, starting

MOST_EXACT = 96  # held-out drawings that are looked at while training


@dataclass(frozen=True, kw_only=True)
class UpscalerRecipe:
    """What decides what an enlargement becomes. `each` differently disturbed versions of a drawing are decoded; `crop` is in small pixels.

    `perceptual_from` is the fraction of the run after which the feature term joins.
    """

    kind: str = "train-upscaler"
    upscaler: UpscalerConfig = field(default_factory=UpscalerConfig)
    each: int = 4
    disturb: float = 0.3
    crop: int = 32
    mse: float = 8.0
    edges: float = 0.25
    perceptual: float = 0.1
    perceptual_from: float = 0.5
    limit: int = 0

    def __post_init__(self) -> None:
        if self.each < 1 or self.crop < 1 or self.limit < 0:
            raise ValueError(f"each (={self.each}) and crop (={self.crop}) must be at least 1 and limit (={self.limit}) at least 0")


def preset_bundled() -> tuple[UpscalerRecipe, LoopConfig]:
    """The enlargement of the bundled model: 64 x 64 -> 256 x 256 RGBA, 0.5 M parameters (a small EDSR, arXiv 1707.02921).

    `sfumato train upscaler --preset bundled --codec emoji --out runs/upscaler`
    """
    return UpscalerRecipe(), LoopConfig(
        images=60_000, batch_size=16, lr=1e-3, warmup=1_000, decay=0.8, dtype="auto", log_every=3_200, save_every=10_000, sample_every=10_000
    )  # fmt: skip


def preset_smoke() -> tuple[UpscalerRecipe, LoopConfig]:
    """An enlargement that trains in seconds, to try the tools."""
    recipe = UpscalerRecipe(upscaler=UpscalerConfig(width=16, blocks=1), each=2, crop=8, perceptual=0.0, limit=6)
    return recipe, LoopConfig(images=640, batch_size=16, lr=1e-3, warmup=64, save_every=320, sample_every=320, log_every=64)


PRESETS = {"bundled": preset_bundled, "smoke": preset_smoke}


class UpscalerTask:
    """See `sfumato.train.loop.Task`."""

    kind = "upscaler"

    def __init__(self, recipe: UpscalerRecipe, seed: int, codec: Path, run: Path, device: torch.device | str = "cpu") -> None:
        self.recipe, self.seed, self.device = recipe, seed, torch.device(device)
        if recipe.perceptual:
            efficientnet_lite0()  # better missed now than when the feature term joins
        tensors, meta = load_pack(frozen_part(codec, run, "codec"))
        if "codec" not in meta:
            raise FileError(f"{codec} holds no codec: name a run of `sfumato train autoencoder`")
        self.codec: Autoencoder = zoo.load_into(zoo.make(meta["codec"]), tensors, "codec.").to(self.device)  # type: ignore[assignment]
        self.size, self.factor = int(meta["size"]), recipe.upscaler.factor
        if recipe.crop > self.size:
            raise ValueError(f"crop (={recipe.crop}) must be at most the codec's size (={self.size})")
        which = concepts()[: recipe.limit] if recipe.limit else drawable()
        art = drawings(self.factor * self.size, which)
        self.train, held = art.rows(~art.held_out), art.rows(art.held_out)
        self.small = self._small(run)
        self.exact = self._exact(held if len(held) else self.train)
        torch.manual_seed(seed)
        self.networks: dict[str, nn.Module] = {"upscaler": Upscaler(recipe.upscaler).to(memory_format=torch.channels_last)}  # type: ignore[call-overload]
        self.phases = [Phase("upscaler", ("upscaler",), self.loss)]

    def _codec_input(self, pixels: Tensor) -> Tensor:
        return F.avg_pool2d(pixels.float() / 255, self.factor) * 2 - 1

    def decoded(self, indices: np.ndarray) -> Tensor:
        """What the codec makes of drawings, "b 4 size size" in [-1, 1]: picture i is of drawing i // each, disturbed the more the higher i % each."""
        each = self.recipe.each
        z = self.codec.encode(self._codec_input(self.train.pixels[torch.from_numpy(indices // each)]).to(self.device)).mean
        assert z is not None
        noise = torch.stack([torch.randn(z.shape[1:], generator=torch_rng(self.seed, "disturb", int(i))) for i in indices]).to(z)
        share = torch.from_numpy(indices % each).to(z) / max(each - 1, 1) * self.recipe.disturb
        return self.codec.decode(z + share[:, None, None, None] * noise).clamp(-1, 1)

    def _small(self, run: Path) -> Tensor:
        r = self.recipe
        made_from = {"decoder": drawn_by(self.codec), "seed": self.seed, "each": r.each, "disturb": r.disturb, "limit": r.limit}
        return cached_latents(run / "decoded.npy", self.decoded, len(self.train) * r.each, made_from | {"drawings": art_digest()}, batch=64)

    def _exact(self, held: Drawings) -> tuple[Tensor, Tensor]:
        """(what the codec makes of held-out drawings, those drawings at full size), in [-1, 1]."""
        pixels = held.pixels[:: max(len(held) // MOST_EXACT, 1)][:MOST_EXACT]
        with torch.no_grad():
            small = [self.codec(self._codec_input(p).to(self.device))[0].clamp(-1, 1).cpu() for p in pixels.split(32)]
        return torch.cat(small), pixels.float() / 127.5 - 1

    def batch(self, positions: np.ndarray) -> Batch:
        """Crops of decoded pictures with the same crops of the drawings, turned and mirrored alike."""
        c, f = self.recipe.crop, self.factor
        xs, ys, ground = [], [], []
        for position, i in zip(positions, shuffled(len(self.small), self.seed, "order", positions), strict=True):
            rng = numpy_rng(self.seed, "crop", int(position))
            top, left = (int(v) for v in rng.integers(0, self.size - c + 1, 2))
            turns, flip = int(rng.integers(4)), bool(rng.integers(2))
            x = self.small[i, :, top : top + c, left : left + c].float()
            y = self.train.pixels[i // self.recipe.each, :, f * top : f * (top + c), f * left : f * (left + c)].float() / 127.5 - 1
            x, y = (torch.rot90(v.flip(2) if flip else v, turns, (1, 2)) for v in (x, y))
            xs.append(x)
            ys.append(y)
            ground.append(rng.choice((0.0, 0.5, 1.0)))
        return {"x": torch.stack(xs), "y": torch.stack(ys), "ground": torch.tensor(ground, dtype=torch.float32)[:, None, None, None]}

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        r = self.recipe
        drawn = networks["upscaler"](batch["x"].contiguous(memory_format=torch.channels_last)).float()
        loss, found = pixel_loss(drawn, batch["y"], mse=r.mse, edges=r.edges)
        if r.perceptual and progress >= r.perceptual_from:
            flat = [over((v + 1) / 2, batch["ground"]) * 2 - 1 for v in (drawn, batch["y"])]
            features, _ = perceptual(lite0_on(drawn.device), *flat)
            loss = loss + r.perceptual * features
            found["perceptual"] = features.detach()
        return loss, found

    def enlarged(self, network: nn.Module, x: Tensor) -> Tensor:
        device = next(network.parameters()).device
        return torch.cat([network(part.to(device)).cpu() for part in x.split(16)]).clamp(-1, 1)

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """What the codec made, enlarged by Lanczos and by the network, and the drawing."""
        small, large = (x[:8] for x in self.exact)
        columns = zip(to_pil(lanczos(small, self.factor)), to_pil(self.enlarged(networks["upscaler"], small)), to_pil(large), strict=True)
        return grid([p for three in columns for p in three], columns=6)

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        """Of held-out drawings: PSNR in dB over white and feature distance, of the network and of Lanczos."""
        small, large = self.exact
        found: dict[str, float] = {}
        for name, drawn in (("", self.enlarged(networks["upscaler"], small)), ("lanczos_", lanczos(small, self.factor))):
            found[f"{name}psnr"] = psnr_over_white(drawn, large).mean().item()
            if self.recipe.perceptual:
                white = [over((v + 1) / 2) * 2 - 1 for v in (drawn, large)]
                parts = zip(*(w.split(16) for w in white), strict=True)
                found[f"{name}features"] = float(np.mean([float(perceptual(efficientnet_lite0(), a, b)[0]) for a, b in parts]))
        return found | {"score": found["psnr"]}

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"upscaler.{k}": v for k, v in networks["upscaler"].state_dict().items()}
        meta = {"kind": "upscaler", "upscaler": to_json(self.recipe.upscaler), "decoder": drawn_by(self.codec)}
        return tensors, meta | {"credits": credits()}


def lanczos(x: Tensor, factor: int) -> Tensor:
    """Pillow's Lanczos on each channel of pictures in [-1, 1]: what enlarging by hand would give."""
    side = factor * x.shape[-1]
    planes = [[np.asarray(Image.fromarray(c.numpy()).resize((side, side), Image.Resampling.LANCZOS)) for c in picture] for picture in x.float()]
    return torch.from_numpy(np.array(planes)).clamp(-1, 1)


def train(recipe: UpscalerRecipe, loop: LoopConfig, out: Path, *, codec: Path, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, the enlargement in the run folder `out`; `codec` is a run or a pack, copied in on the first start."""
    loop = settled(loop, out)
    with starting(out):
        trainer = Trainer(main_first(loop, lambda device: UpscalerTask(recipe, loop.seed, Path(codec), Path(out), device)), loop, out, recipe)
    trainer.train(stop_at=stop_at)
    return trainer
