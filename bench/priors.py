"""Ways to draw over the codes of one VQGAN, and latent diffusion beside them, at equal training time: `python bench/priors.py`. One JSON on stdout.

- quality: codes by chance, by frequency, by frequency at each place, GPT, MaskGIT, latent diffusion: kernel distance with its interval, precision,
  recall, coverage, diversity, label and style, seconds a picture; beside each what its codec alone loses;
- speed: GPT with and without the cache at 256 codes, MaskGIT in 8 steps, same width and depth, by turns.

`--data emoji` are the embedded drawings, with latent diffusion over the bundled codec; a folder with IDX files is Fashion-MNIST by label, with both
codecs of the same shape and training and as many tokens for all, compared with pictures that no training saw.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import ROOT, claim, emit, of_parts, speed_of
from torch import Tensor
from tqdm import tqdm
from vqgan import idx_folder

from sfumato.codecs.autoencoder import AutoencoderConfig
from sfumato.codecs.bottlenecks.kl import KLConfig
from sfumato.codecs.bottlenecks.vq import VQConfig
from sfumato.core.images import grid
from sfumato.core.pack import save_pack
from sfumato.core.runlog import read_log
from sfumato.core.seams import Cond
from sfumato.data.subjects import EMOJI
from sfumato.diffusion.dit import DiTConfig
from sfumato.metrics.distribution import compare_pairs
from sfumato.metrics.features import feature_net, look
from sfumato.nn.backbones import over
from sfumato.pipelines import evaluate as work
from sfumato.pipelines.generate import Model
from sfumato.pipelines.load import load, load_judge
from sfumato.priors.frequency import counted
from sfumato.priors.gpt import cached, sample_gpt, uncached
from sfumato.priors.maskgit import sample_maskgit
from sfumato.priors.tokens import Vocabulary
from sfumato.priors.transformer import MASKED, Prior, PriorConfig
from sfumato.train import autoencoder, diffusion, judge, prior
from sfumato.train.autoencoder import AutoencoderRecipe
from sfumato.train.conditioned import CLOSE, GENTLE
from sfumato.train.loop import LoopConfig

PARTS = ("quality", "speed")
BASELINES = {"codes by chance": "nothing", "codes by frequency": "counts", "codes by frequency at their place": "places"}
LEARNED = ("gpt", "maskgit", "latent diffusion")
GUIDANCE = 2.0
BATCH = 16  # of all: in some minutes larger ones make few steps
PROMPTS = ("a cat", "an apple", "a fox", "a rocket", "a whale", "a sunflower")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compares generators, and prints one JSON object."""

    data: str = EMOJI
    """emoji, or a folder with the IDX files of Fashion-MNIST."""
    codec: Path | None = None
    """A run of `sfumato train autoencoder --preset vqgan` or vqvae; without it one is trained."""
    codec_images: int = 60_000
    """Pictures that a codec sees which is trained here."""
    judge: Path | None = None
    """A run of `sfumato train judge`; without it one is trained."""
    judge_images: int = 250_000
    """Pictures that a judge sees which is trained here."""
    minutes: float = 20.0
    """Training time of each generator, encoding not counted."""
    count: int = 1024
    """Pictures drawn by each."""
    only: str = ",".join(PARTS)
    """Parts, with commas."""
    out: Path = ROOT / "runs" / "bench-priors"
    """Where the runs are kept; a run that was stopped is gone on with."""
    repeats: int = 3
    """Of a timed drawing."""
    seed: int = 0
    quick: bool = False
    """A smoke run of seconds: its figures mean nothing."""


# --- quality --------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ground:
    """What the generators have in common. `asks` are what the sheet shows, two pictures of each."""

    data: str
    seen: str
    codec: Path
    latents: Path
    judge: Path
    asks: tuple[dict[str, str], ...]


def ground(options: Options) -> Ground:
    """Pictures, codecs and judge, trained where none are named; of the emoji latent diffusion has the bundled codec."""
    if options.data == EMOJI:
        data = seen = EMOJI
        asks = tuple({"prompt": p, "style": "fluent"} for p in PROMPTS)
    else:
        count = (400, 100) if options.quick else (12_000, 2_048)
        parts = (("train", count[0]), ("t10k", count[1]))
        data, seen = (str(idx_folder(Path(options.data), options.out / part, n, part)) for part, n in parts)
        asks = tuple({"label": str(i)} for i in (0, 1, 5, 7, 8, 9))
    codec = options.codec or codec_of(options, data, "vqgan")
    latents = Path(EMOJI) if data == EMOJI and not options.quick else codec_of(options, data, "kl")
    return Ground(data, seen, codec, latents, options.judge or judge_of(options, data), asks)


def codec_of(options: Options, data: str, name: str) -> Path:
    """A VQGAN, or the same with a KL bottleneck; an eighth of the side."""
    recipe, loop = autoencoder.preset_vqgan()
    if options.quick:
        small, _ = autoencoder.preset_smoke()
        net = replace(small.codec.convnet, image_channels=3)
        recipe, loop = replace(small, limit=12 if data == EMOJI else 0), replace(loop, images=64, batch_size=16, save_every=64, sample_every=64)
    else:
        net = recipe.codec.convnet  # type: ignore[assignment]
        if data != EMOJI:
            recipe = replace(recipe, size=32, perceptual_size=64)
        every = options.codec_images // 4
        loop = replace(loop, images=options.codec_images, save_every=every, sample_every=every, dtype="fp32")
    bottleneck = {"vqgan": VQConfig(size=16, channels=4) if options.quick else VQConfig(), "kl": KLConfig(channels=4 if options.quick else 16)}
    codec = AutoencoderConfig(convnet=net, bottleneck=bottleneck[name])  # type: ignore[arg-type]
    of: AutoencoderRecipe = replace(recipe, data=data, codec=codec)
    return autoencoder.train(of, replace(loop, seed=options.seed, keep=1), options.out / name).run


def judge_of(options: Options, data: str) -> Path:
    recipe, loop = judge.preset_smoke() if options.quick else judge.preset_own()
    if not options.quick:
        loop = replace(loop, images=options.judge_images, save_every=options.judge_images // 4, sample_every=options.judge_images, dtype="fp32")
    recipe = replace(recipe, data=data, limit=12 if options.quick and data == EMOJI else 0)
    return judge.train(recipe, replace(loop, seed=options.seed, keep=1), options.out / "judge").run


def recipes(options: Options, g: Ground) -> dict[str, tuple[Any, LoopConfig, Callable[..., Any], Path]]:
    """Recipe, loop, trainer and codec of each: the same pictures, captions, styles, labels and memory."""
    written, loop = prior.preset_smoke() if options.quick else prior.preset_bundled()
    drawn, of_drawn = diffusion.preset_smoke() if options.quick else diffusion.preset_bundled()
    if options.quick:  # the text encoder is the bundled one all the same
        written = replace(written, prior=replace(written.prior, text_width=PriorConfig().text_width))
        drawn = replace(drawn, denoiser=replace(drawn.denoiser, text_width=DiTConfig().text_width))
    emoji = g.data == EMOJI
    if not emoji and not options.quick:  # a token a latent, and networks for minutes
        written = replace(written, prior=replace(written.prior, width=256, depth=6, heads=4))
        drawn = replace(drawn, denoiser=replace(drawn.denoiser, patch=1, width=256, depth=6, heads=4))
    said: dict[str, Any] = {"data": g.data, "memory": emoji and not options.quick, "each": 2 if options.quick else 12 if emoji else 4}
    said |= {"variety": GENTLE, "limit": 12 if options.quick else 0} if emoji else {"variety": CLOSE, "labels": "auto", "limit": 0}
    found: dict[str, Any] = {}
    for way in ("gpt", "maskgit"):
        found[way] = (replace(written, prior=replace(written.prior, way=way), **said), loop, prior.train, g.codec)
    found["latent diffusion"] = (replace(drawn, **said), of_drawn, diffusion.train, g.latents)
    return found


def trained(options: Options, g: Ground, name: str) -> Path:
    """The run folder of a generator that was trained for as long as the others: how many pictures that is, a few steps say first."""
    recipe, loop, train, codec = recipes(options, g)[name]
    run, frozen = options.out / f"{name.replace(' ', '-')}-{options.minutes:g}", {"codec": codec, "text": Path(EMOJI)}
    loop = replace(loop, seed=options.seed, dtype="fp32", keep=1, batch_size=BATCH)
    if options.quick:
        return train(recipe, replace(loop, images=64, save_every=64, sample_every=64), run, **frozen).run
    told, timing = run / "length.txt", run / "timing"
    lend(options.out / f"gpt-{options.minutes:g}", timing)
    if not told.exists():
        short = replace(loop, images=10**9, warmup=1000, log_every=loop.batch_size, save_every=10**9, sample_every=10**9)
        train(recipe, short, timing, **frozen, stop_at=20 * loop.batch_size)
        told.write_text(str(int(speed_of(timing / "log.jsonl", 4) * 60 * options.minutes)))
    lend(timing, run)
    images = int(told.read_text()) // loop.batch_size * loop.batch_size
    every = images // 4 // loop.batch_size * loop.batch_size
    loop = replace(loop, images=images, warmup=min(loop.warmup, images // 20), save_every=every, sample_every=every, log_every=every // 8)
    return train(recipe, loop, run, **frozen).run


def lend(there: Path, here: Path) -> None:
    """The encoded pictures of another run, so that they are encoded once."""
    here.mkdir(parents=True, exist_ok=True)
    for name in ("codes.npy", "codes.json", "latents.npy", "latents.json"):
        if (there / name).exists() and not (here / name).exists():
            shutil.copy(there / name, here / name)


def baseline(options: Options, g: Ground, name: str, run: Path) -> Path:
    """A pack that draws codes by how often they were seen, with the codec of the run."""
    recipe, loop, _, codec = recipes(options, g)["gpt"]
    task = prior.PriorTask(recipe, loop.seed, codec, Path(EMOJI), run)
    network = counted(task.vocabulary, task.codes.long(), BASELINES[name])  # type: ignore[arg-type]
    task.net = network.config
    out = options.out / f"{name.replace(' ', '-')}.safetensors"
    save_pack(out, *task.packed({"prior": network}, {"kind": "codes"}))
    return out


def quality(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    g = ground(options)
    net, rows, sheet = feature_net(), {}, []
    runs = {name: trained(options, g, name) for name in LEARNED}
    models = {name: baseline(options, g, name, runs["gpt"]) for name in BASELINES} | runs
    for name, path in models.items():
        print(f"--- {name}", file=sys.stderr)
        model = load(path)
        rows[name] = figures(options, g, name, model, net)
        if name in runs:
            log = [line for line in read_log(path / "log.jsonl") if "images_per_s" in line]
            rows[name] |= {"images": [log[-1]["images"]], "images a second": [float(np.median([x["images_per_s"] for x in log]))]}
        sheet += [p for ask in g.asks for p in model.generate(**ask, seed=3, count=2, guidance=GUIDANCE, size=model.size)]  # type: ignore[arg-type]
    grid([p.resize((64, 64)) for p in sheet], columns=2 * len(g.asks)).save(options.out / "priors.png", optimize=True)
    key = next(k for k in rows["gpt"] if k.startswith("kernel distance"))
    claims = [claim(f"{name}: kernel distance", rows[name][key][0]) for name in models]
    return claims, {"rows": rows, "sheet": ["rows:", *models], "codec": str(g.codec), "judge": load_judge(g.judge).scores}


def figures(options: Options, g: Ground, name: str, model: Model, net: Any) -> dict[str, list[float]]:
    """Each figure with its interval."""
    reference = work.picture_set(g.seen, model.size, set(model.meta["words"]) if g.data == EMOJI else None)
    asked = work.Options(groups=("distribution", "diversity", "text"), count=min(options.count, len(reference)), guidance=GUIDANCE, seed=options.seed)
    found, _ = work.evaluate(model, name, reference, net, asked, judge=load_judge(g.judge))
    row = {f.name: [f.value, *(f.interval or ())] for f in found.figures}
    row["seconds a picture, one at a time"] = [seconds_of(model, g, 1, options.repeats)]
    row["seconds a picture, 16 together"] = [seconds_of(model, g, 16, options.repeats) / 16]
    row["codec alone: kernel distance"] = list(floor(model, reference, net))
    return row


def seconds_of(model: Model, g: Ground, count: int, repeats: int) -> float:
    seconds = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        model.generate(**g.asks[0], seed=i, count=count, guidance=GUIDANCE, size=model.size)  # type: ignore[arg-type]  # without an enlargement
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


@torch.no_grad()
def floor(model: Model, reference: Any, net: Any) -> tuple[float, float, float]:
    """The kernel distance between pictures and what the codec makes of them, with its interval."""
    rows = list(range(0, len(reference), max(1, len(reference) // 1024)))
    real, copies = [], []
    for batch in reference.batches(rows):
        x = batch if model.codec.spec.image_channels == 4 else over(batch)
        found = model.codec.encode(x * 2 - 1)
        y = model.codec.decode(found.mean) if found.indices is None else model.codec.decode_indices(found.indices)  # type: ignore[arg-type]
        y = y.clamp(-1, 1) / 2 + 0.5
        flat = [over(p) if p.shape[1] == 4 else p for p in (x, y)]
        real.append(look(net, flat[0])[0])
        copies.append(look(net, flat[1])[0])
    pairs = compare_pairs(torch.cat(real), torch.cat(copies))
    return (pairs.kid, *pairs.kid_interval)


# --- speed ----------------------------------------------------------------------------------------------------------------------------------------


def speed(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    side = 4 if options.quick else 16
    shape = PriorConfig(vocabulary=Vocabulary(codes=1024, grid=(side, side)), text_width=0, styles=0, dropout=0.0)
    torch.manual_seed(options.seed)
    gpt, maskgit = (Prior(replace(shape, way=way)).eval() for way in ("gpt", "maskgit"))  # type: ignore[arg-type]
    n, claims, details, terms = side * side, [], {}, [(Cond(), 1.0)]
    for batch in (1, 16):
        noise: Callable[..., Callable[[int], Tensor]] = lambda *of, b=batch: lambda _: torch.empty(b, *of).exponential_()  # noqa: E731
        ways: dict[str, Callable[[], Any]] = {
            "gpt, cached": lambda b=batch, r=noise: list(sample_gpt(cached(gpt, terms, b), n, r(1024))),
            "maskgit, 8 steps": lambda b=batch, r=noise: list(sample_maskgit(maskgit, terms, torch.full((b, n), MASKED), r(n, 1024), r(n), steps=8)),
        }
        if batch == 1:
            ways["gpt, not cached"] = lambda b=batch, r=noise: list(sample_gpt(uncached(gpt, terms, b), n, r(1024)))
        seconds: dict[str, list[float]] = {k: [] for k in ways}
        for i in tqdm(range(1 + options.repeats), desc=f"batch {batch}", file=sys.stderr):
            for k, go in ways.items():
                began = time.perf_counter()
                go()
                if i:
                    seconds[k].append(time.perf_counter() - began)
        median = {k: float(np.median(v)) for k, v in seconds.items()}
        details[f"batch {batch}"] = median
        if batch == 1:
            claims.append(claim(f"gpt, {n} codes: without the cache / with it", median["gpt, not cached"] / median["gpt, cached"], "times", ">= 5"))
        goal = ">= 2" if batch == 1 else None
        claims.append(claim(f"batch {batch}: cached gpt / maskgit in 8 steps", median["gpt, cached"] / median["maskgit, 8 steps"], "times", goal))
    return claims, details


def run(options: Options) -> dict[str, Any]:
    options.out.mkdir(parents=True, exist_ok=True)
    return of_parts({"quality": quality, "speed": speed}, options.only, options, options.seed)


def main(argv: list[str] | None = None) -> None:
    emit(run(tyro.cli(Options, args=argv)))


if __name__ == "__main__":
    main()
