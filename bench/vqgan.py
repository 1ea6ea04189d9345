"""Codecs against each other at equal images seen, and one training step beside taming-transformers': `python bench/vqgan.py`. One JSON on stdout.

- codecs: nearest neighbour, moving average, k-means, our presets, FSQ, the VAE; with and without discriminator, without the first stages, without
  augmentation; held-out pictures, averaged weights, evaluation mode;
- pictures (of finished runs alone): reconstructions.png and codebook.png in `--out`;
- step: encoder, quantizer, decoder, discriminator of the same shapes and weights on both sides, by turns.

`--data emoji` are the embedded drawings; a folder with IDX files is Fashion-MNIST (Debian's `dataset-fashion-mnist` has them).
"""

from __future__ import annotations

import gzip
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import ROOT, claim, emit, of_parts
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from sfumato.codecs.autoencoder import AutoencoderConfig
from sfumato.codecs.bottlenecks.fsq import FSQConfig
from sfumato.codecs.bottlenecks.vq import VQ, VQConfig, use_of
from sfumato.codecs.resnets import ResnetConfig, ResnetDecoder, ResnetEncoder
from sfumato.core.images import grid, to_pil
from sfumato.core.runlog import read_log
from sfumato.data.augment import STILL
from sfumato.gans.discriminators import PatchConfig, PatchDiscriminator
from sfumato.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss
from sfumato.metrics.distribution import compare_pairs, kernel_distance
from sfumato.metrics.features import feature_net, look
from sfumato.metrics.intervals import jackknife, mean_interval
from sfumato.metrics.pairwise import ssim
from sfumato.metrics.stability import sharpness
from sfumato.pipelines.codec import load_codec
from sfumato.train.autoencoder import AutoencoderRecipe, AutoencoderTask, preset_vae, preset_vqgan, preset_vqvae, psnr_over_white, train
from sfumato.train.loop import LoopConfig, Trainer

PARTS = ("codecs", "pictures", "step")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compares codecs, and prints one JSON object."""

    data: str = "emoji"
    """emoji, or a folder with the IDX files of Fashion-MNIST."""
    images: int = 24_000
    """Pictures that each codec sees."""
    only: str = ",".join(PARTS)
    """Parts, with commas."""
    variants: str = ""
    """Variants, with semicolons; without it all of them."""
    out: Path = ROOT / "runs" / "bench-vqgan"
    """Where the runs are kept; a run that was stopped is gone on with."""
    repeats: int = 5
    """Of a training step."""
    seed: int = 0
    quick: bool = False
    """A smoke run of seconds: its figures mean nothing."""


# --- data ---------------------------------------------------------------------------------------------------------------------------------------


def idx_folder(source: Path, out: Path, count: int, part: str = "train") -> Path:
    """Pictures of IDX files ("train" or "t10k") as PNG of 32 x 32, evenly from all of them, in one folder a class."""
    if out.exists():
        return out
    read = lambda p: gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()  # noqa: E731
    images = next(p for p in sorted(source.rglob(f"{part}-images*")) if p.is_file())
    labels = next(p for p in sorted(source.rglob(f"{part}-labels*")) if p.is_file())
    x = np.frombuffer(read(images), dtype=np.uint8, offset=16).reshape(-1, 28, 28)
    y = np.frombuffer(read(labels), dtype=np.uint8, offset=8)
    for i in np.linspace(0, len(x) - 1, min(count, len(x))).astype(int):
        target = out / str(y[i]) / f"{i:05d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.pad(x[i], 2)).convert("RGB").save(target)
    return out


# --- codecs -------------------------------------------------------------------------------------------------------------------------------------


def variants(options: Options) -> dict[str, tuple[AutoencoderRecipe, LoopConfig]]:
    """What is compared; all see the same pictures in the same order."""
    base, loop = preset_vqvae()
    gan, vae = preset_vqgan()[0], preset_vae()[0]
    plain = VQConfig(cosine=False, gradient="straight-through", restart=0.0)
    with_bottleneck = lambda b, **more: replace(base, codec=replace(base.codec, bottleneck=b), **more)  # noqa: E731
    never_alone = replace(gan.adversary, begins=0.0, joins=0.0, ramp=0.0)
    found = {
        "nearest neighbour": with_bottleneck(plain, kmeans=False),
        "moving average": with_bottleneck(replace(plain, learn="ema"), kmeans=False),
        "k-means": with_bottleneck(replace(plain, restart=20.0)),
        "preset vqvae": base,
        "fsq": with_bottleneck(FSQConfig(steps=(4, 4, 4, 4, 4))),
        "preset vae": vae,
        "preset vqgan": gan,
        "vqgan without stages": replace(gan, kmeans=False, perceptual_from=0.0, adversary=never_alone),
        "vqvae without augmentation": replace(base, variety=STILL),
        "vqvae without features": replace(base, perceptual=0.0),
        "vqgan without features": replace(gan, perceptual=0.0),
    }
    every = max(options.images // 6, 1)
    loop = replace(
        loop, images=options.images, warmup=min(loop.warmup, options.images // 10), save_every=every, sample_every=every, log_every=every // 4 or 1
    )
    loop = replace(loop, seed=options.seed, keep=1, dtype="fp32")
    if options.data != "emoji":
        folder = idx_folder(Path(options.data), options.out / "pictures", 400 if options.quick else 12_000)
        side = 32
        found = {k: replace(_of_side(r, side), data=str(folder)) for k, r in found.items()}
    if options.quick:
        found = {k: _quick(r) for k, r in found.items() if k in ("preset vqvae", "fsq", "preset vqgan")}
        loop = replace(loop, images=96, batch_size=8, warmup=8, save_every=96, sample_every=48, log_every=8)
    wanted = [v.strip() for v in options.variants.split(";") if v.strip()]
    return {k: (r, loop) for k, r in found.items() if not wanted or k in wanted}


def _of_side(recipe: AutoencoderRecipe, side: int) -> AutoencoderRecipe:
    """The same recipe for smaller pictures."""
    net = recipe.codec.convnet
    vector = side // 8 if net.vector else 0  # type: ignore[union-attr]
    return replace(recipe, size=side, perceptual_size=64, codec=replace(recipe.codec, convnet=replace(net, vector=vector)))


def _quick(recipe: AutoencoderRecipe) -> AutoencoderRecipe:
    net = replace(recipe.codec.convnet, widths=(16, 16, 16), encoder_blocks=(0, 0, 1), decoder_blocks=(1, 0, 0))
    small = replace(recipe, codec=AutoencoderConfig(convnet=net, bottleneck=recipe.codec.bottleneck), size=16, perceptual_size=32)
    return replace(small, limit=12) if recipe.data == "emoji" else small


@torch.no_grad()
def measured(trainer: Trainer, task: AutoencoderTask, run: Path) -> dict[str, Any]:
    """Of held-out pictures, by the averaged weights."""
    codec, x = trainer.averages["codec"], task.exact
    y = task.reconstruct(codec, x).clamp(-1, 1)
    a, b = (x + 1) / 2, (y + 1) / 2
    net = feature_net()
    real, copy = look(net, a)[0], look(net, b)[0]
    pairs = compare_pairs(real, copy)
    found: dict[str, Any] = {
        "psnr": mean_interval(psnr_over_white(y, x).numpy()),
        "ssim": mean_interval(ssim(b, a).numpy()),
        "kid": [pairs.kid, *pairs.kid_interval],
        "detail": float(sharpness(b).mean() / sharpness(a).mean()),
        "images_per_s": float(np.median([line["images_per_s"] for line in read_log(run / "log.jsonl") if "images_per_s" in line])),
        "features": copy,
        "real": real,
        "held_out": len(x),
    }
    if task.recipe.codec.discrete:
        size = codec.config.bottleneck.codebook_size  # type: ignore[union-attr]
        indices = torch.cat([codec.encode(part).indices.flatten() for part in x.split(64)])  # type: ignore[operator]
        found |= use_of(torch.bincount(indices, minlength=size))
    return found


def run_of(options: Options, name: str) -> Path:
    return options.out / ("quick" if options.quick else "") / f"{Path(options.data).name}-{options.images}-{name.replace(' ', '-')}"


def codecs(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, (recipe, loop) in variants(options).items():
        run = run_of(options, name)
        print(f"--- {name}", file=sys.stderr)
        trainer = train(recipe, loop, run)
        found[name] = measured(trainer, trainer.task, run)  # type: ignore[arg-type]
    claims = []
    if (ours := found.get("preset vqvae")) is not None:
        claims += [claim("preset vqvae: codes in use on held-out pictures", ours["usage"], "share", ">= 0.9")]
        claims += [claim("preset vqvae: perplexity", ours["perplexity_share"], "of the codes", ">= 0.4")]
        if "fsq" in found:
            claims.append(claim("preset vqvae: PSNR above FSQ's at equal bits", ours["psnr"][0] - found["fsq"]["psnr"][0], "dB", ">= -0.5"))
        if "preset vqgan" in found:
            gan = found["preset vqgan"]
            lower, between = difference(gan["real"], gan["features"], ours["features"])
            claims.append(claim("the discriminator changes the kernel distance by, at most", between[1], "", "<= 0"))
            claims.append(claim("... by", lower))
            claims.append(claim("... and PSNR by", gan["psnr"][0] - ours["psnr"][0], "dB", ">= -1"))
    if {"vqvae without features", "vqgan without features"} <= found.keys():
        a, b = found["vqgan without features"], found["vqvae without features"]
        lower, between = difference(a["real"], a["features"], b["features"])
        claims.append(claim("without features in the loss the discriminator changes the kernel distance by, at most", between[1], "", "<= 0"))
        claims.append(claim("... by", lower))
        claims.append(claim("... and PSNR by", a["psnr"][0] - b["psnr"][0], "dB", ">= -1"))
    return claims, {k: {n: w for n, w in v.items() if n not in ("features", "real")} for k, v in found.items()}


def difference(real: Tensor, a: Tensor, b: Tensor, blocks: int = 10) -> tuple[float, list[float]]:
    """How much nearer a is to the real features than b, with its 95 % interval by leaving out the same tenths of all three."""
    order = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).permutation(len(real)))
    kept = [torch.cat([p for j, p in enumerate(order.tensor_split(blocks)) if j != i]) for i in range(blocks)]
    of = lambda rows: kernel_distance(real[rows], a[rows]) - kernel_distance(real[rows], b[rows])  # noqa: E731
    whole = of(order)
    return whole, jackknife(whole, np.array([of(rows) for rows in kept]))


SHOWN = ("preset vqvae", "preset vqgan", "preset vae")  # rows, below the originals


def pictures(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Twelve held-out pictures, below them what each codec makes of them, and a codebook."""
    made = variants(replace(options, variants=";".join(SHOWN)))
    rows: list[Image.Image] = []
    for name, (recipe, loop) in made.items():
        run = run_of(options, name)
        task = AutoencoderTask(recipe, loop.seed)
        x, loaded = task.exact[:: max(len(task.exact) // 12, 1)][:12], load_codec(run)
        rows += (to_pil(x) if not rows else []) + to_pil(task.reconstruct(loaded.codec, x))
        if (codebook := loaded.codebook()) is not None:
            codebook[0].save(options.out / "codebook.png")
    grid(rows, columns=12).save(options.out / "reconstructions.png", optimize=True)
    return [], {"rows": ["originals", *made]}


# --- one step, beside taming-transformers ----------------------------------------------------------------------------------------------------

SHAPES = {  # name: (networks, codes, channels, pixels, batch)
    "f16, 1,024 codes": (ResnetConfig(width=64, multipliers=(1, 1, 2, 2, 4), attention=(8,), resolution=128, z_channels=256), 1024, 256, 128, 4),
    "f8, 16,384 codes": (ResnetConfig(width=64, multipliers=(1, 2, 2, 4), attention=(16,), resolution=128, z_channels=8), 16_384, 8, 128, 4),
}


class Ours(nn.Module):
    """Our networks, and a step as our loop makes it."""

    def __init__(self, net: ResnetConfig, codes: int, channels: int) -> None:
        super().__init__()
        self.encoder, self.decoder = ResnetEncoder(net, channels), ResnetDecoder(net, channels)
        self.quantizer = VQ(VQConfig(size=codes, channels=channels, cosine=False, gradient="straight-through", legacy_beta=True, restart=0.0))
        self.discriminator = PatchDiscriminator(PatchConfig(norm="batch"))
        self.to(memory_format=torch.channels_last)

    def step(self, x: Tensor, optimisers: tuple[Any, Any]) -> float:
        y, (code, stats) = self._copy(x)
        leaf = y.detach().requires_grad_()
        near, fooled = (leaf - x).abs().mean(), generator_loss("hinge", self.discriminator(leaf))
        of_near, of_fooled = torch.autograd.grad(near, leaf)[0], torch.autograd.grad(fooled, leaf)[0]
        last = self.decoder.conv_out.weight
        on_last = [torch.autograd.grad(y, last, g, retain_graph=True)[0] for g in (of_near, of_fooled)]
        w = adaptive_weight(*on_last, most=1e4)
        optimisers[0].zero_grad()
        ((y * (of_near + 0.8 * w * of_fooled)).sum() + code).backward()
        optimisers[0].step()
        self.quantizer.update(stats)
        optimisers[1].zero_grad()
        of_real, of_fake = self.discriminator(torch.cat([x, y.detach()])).chunk(2)
        loss = discriminator_loss("hinge", of_real, of_fake) / 2
        loss.backward()
        optimisers[1].step()
        return float(near)

    def _copy(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        z, loss, stats = self.quantizer(self.encoder(x))
        return self.decoder(z), (loss, stats)


class Taming(nn.Module):
    """Its own modules, and a step as its VQModel and loss make it: the copy once for the codec's optimiser and once more for the discriminator's."""

    def __init__(self, net: ResnetConfig, codes: int, channels: int) -> None:
        from taming.modules.diffusionmodules.model import Decoder, Encoder
        from taming.modules.discriminator.model import NLayerDiscriminator
        from taming.modules.vqvae.quantize import VectorQuantizer2

        super().__init__()
        dd = {
            "ch": net.width, "ch_mult": net.multipliers, "num_res_blocks": net.blocks, "attn_resolutions": list(net.attention), "in_channels": 3,
            "resolution": net.resolution, "z_channels": net.z_channels, "out_ch": 3, "dropout": 0.0, "double_z": False,
        }  # fmt: skip
        self.encoder, self.decoder = Encoder(**dd), Decoder(**dd)
        self.quantize = VectorQuantizer2(codes, channels, beta=0.25)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(net.z_channels, channels, 1), nn.Conv2d(channels, net.z_channels, 1)
        self.discriminator = NLayerDiscriminator(input_nc=3, n_layers=3)

    def _copy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, loss, _ = self.quantize(self.quant_conv(self.encoder(x)))
        return self.decoder(self.post_quant_conv(z)), loss

    def step(self, x: Tensor, optimisers: tuple[Any, Any]) -> float:
        y, code = self._copy(x)
        near, fooled = (y - x).abs().mean(), -self.discriminator(y).mean()
        last = self.decoder.conv_out.weight
        a = torch.autograd.grad(near, last, retain_graph=True)[0]
        b = torch.autograd.grad(fooled, last, retain_graph=True)[0]
        w = (a.norm() / (b.norm() + 1e-4)).clamp(0, 1e4).detach() * 0.8
        optimisers[0].zero_grad()
        (near + w * fooled + code).backward()
        optimisers[0].step()
        y, _ = self._copy(x)
        optimisers[1].zero_grad()
        of_real, of_fake = self.discriminator(x.detach()), self.discriminator(y.detach())
        (0.5 * (torch.relu(1 - of_real).mean() + torch.relu(1 + of_fake).mean())).backward()
        optimisers[1].step()
        return float(near)


def step(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    claims, details = [], {}
    for name, (net, codes, channels, pixels, batch) in SHAPES.items():
        if options.quick:
            net, codes, pixels, batch = replace(net, width=32, blocks=1), 64, 32, 1
        x = torch.rand(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)) * 2 - 1
        steps: dict[str, Callable[[], float]] = {}
        for kind in (Ours, Taming):
            torch.manual_seed(0)
            model = kind(net, codes, channels)
            of_disc = list(model.discriminator.parameters())
            rest = [p for p in model.parameters() if all(p is not q for q in of_disc)]
            optimisers = tuple(torch.optim.Adam(p, lr=1e-5, betas=(0.5, 0.9)) for p in (rest, of_disc))
            input_of = x.contiguous(memory_format=torch.channels_last) if kind is Ours else x
            steps[kind.__name__] = lambda m=model, o=optimisers, v=input_of: m.step(v, o)  # type: ignore[misc]
        seconds: dict[str, list[float]] = {k: [] for k in steps}
        for i in tqdm(range(1 + (1 if options.quick else options.repeats)), desc=name, file=sys.stderr):
            for k, go in steps.items():
                began = time.perf_counter()
                go()
                if i:
                    seconds[k].append(time.perf_counter() - began)
        median = {k: float(np.median(v)) for k, v in seconds.items()}
        goal = ">= 1.3" if codes > 2_000 else ">= 1"
        claims.append(
            claim(f"a training step, {name}, {pixels} pixels, batch {batch}: taming / ours", median["Taming"] / median["Ours"], "times", goal)
        )
        details[name] = median
    return claims, details


def run(options: Options) -> dict[str, Any]:
    return of_parts({"codecs": codecs, "pictures": pictures, "step": step}, options.only, options, options.seed)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv)
    if options.quick:
        options = replace(options, images=96, out=options.out.with_name("bench-vqgan-quick"))
    emit(run(options))


if __name__ == "__main__":
    main()
