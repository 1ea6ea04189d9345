"""Ways to draw over the codes of one VQGAN, and latent diffusion beside them, at equal training time: `python bench/priors.py`. One JSON on stdout.

- quality: codes by chance, by frequency, by frequency at each place, GPT, MaskGIT, latent diffusion (over the bundled codec): kernel distance with
  its interval, precision, recall, coverage, diversity, concept and style, seconds a picture; beside each what its codec alone loses;
- speed: GPT with and without the cache at 256 codes, MaskGIT in 8 steps, same width and depth, by turns.
"""

from __future__ import annotations

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
from torch import Tensor
from tqdm import tqdm

from sfumato.core.images import grid
from sfumato.core.pack import save_pack
from sfumato.core.runlog import read_log
from sfumato.core.seams import Cond
from sfumato.metrics.features import feature_net
from sfumato.nn.backbones import over
from sfumato.pipelines import evaluate as work
from sfumato.pipelines.generate import Model
from sfumato.pipelines.load import load
from sfumato.priors.frequency import counted
from sfumato.priors.gpt import cached, sample_gpt, uncached
from sfumato.priors.maskgit import sample_maskgit
from sfumato.priors.tokens import Vocabulary
from sfumato.priors.transformer import MASKED, Prior, PriorConfig
from sfumato.train import diffusion, prior
from sfumato.train.conditioned import GENTLE
from sfumato.train.loop import LoopConfig

PARTS = ("quality", "speed")
BASELINES = {"codes by chance": "nothing", "codes by frequency": "counts", "codes by frequency at their place": "places"}
LEARNED = ("gpt", "maskgit", "latent diffusion")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compares generators, and prints one JSON object."""

    codec: Path = ROOT / "runs" / "bench-vqgan" / "emoji-24000-preset-vqgan"
    """A run of `sfumato train autoencoder --preset vqgan` or vqvae."""
    latents: str = "emoji"
    """The codec of latent diffusion."""
    text: str = "emoji"
    """The text encoder of this model is frozen for all."""
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


def recipes(options: Options) -> dict[str, tuple[Any, LoopConfig, Callable[..., Any], Path]]:
    """Recipe, loop, trainer and codec of each: the same pictures, captions, styles and memory."""
    text = Path(options.text)
    written, loop = prior.preset_smoke() if options.quick else prior.preset_bundled()
    drawn, of_drawn = diffusion.preset_smoke() if options.quick else diffusion.preset_bundled()
    small = {"limit": 12, "memory": False, "each": 2} if options.quick else {"memory": True, "variety": GENTLE}
    found: dict[str, Any] = {}
    for way in ("gpt", "maskgit"):
        found[way] = (replace(written, prior=replace(written.prior, way=way), **small), loop, prior.train, options.codec, text)
    found["latent diffusion"] = (replace(drawn, **small), of_drawn, diffusion.train, Path(options.latents), text)
    return found


def trained(options: Options, name: str) -> Path:
    """The run folder of a generator that was trained for as long as the others: how many pictures that is, a few steps say first."""
    recipe, loop, train, codec, text = recipes(options)[name]  # type: ignore[misc]
    run = options.out / f"{name.replace(' ', '-')}-{options.minutes:g}"
    loop = replace(loop, seed=options.seed, dtype="fp32", keep=1)
    if options.quick:
        return train(recipe, replace(loop, images=64, save_every=64, sample_every=64), run, codec=codec, text=text).run
    told = run / "length.txt"
    if not told.exists():
        timing = run / "timing"
        short = replace(loop, images=10**9, warmup=1000, log_every=loop.batch_size, save_every=10**9, sample_every=10**9)
        train(recipe, short, timing, codec=codec, text=text, stop_at=20 * loop.batch_size)
        lines = [line for line in read_log(timing / "log.jsonl") if "images_per_s" in line]
        span = [line["images"] / line["images_per_s"] for line in lines]  # seconds since the beginning
        speed = (lines[-1]["images"] - lines[4]["images"]) / (span[-1] - span[4])
        told.parent.mkdir(parents=True, exist_ok=True)
        told.write_text(str(int(speed * 60 * options.minutes)))
    images = int(told.read_text()) // loop.batch_size * loop.batch_size
    every = images // 4 // loop.batch_size * loop.batch_size
    loop = replace(loop, images=images, warmup=min(loop.warmup, images // 20), save_every=every, sample_every=every, log_every=every // 8)
    return train(recipe, loop, run, codec=codec, text=text).run


def baseline(options: Options, name: str, run: Path) -> Path:
    """A pack that draws codes by how often they were seen, with the codec of the run."""
    recipe, loop, _, codec, text = recipes(options)["gpt"]  # type: ignore[misc]
    task = prior.PriorTask(recipe, loop.seed, codec, text, run)
    network = counted(task.vocabulary, task.codes.long(), BASELINES[name])  # type: ignore[arg-type]
    task.net = network.config
    out = options.out / f"{name.replace(' ', '-')}.safetensors"
    save_pack(out, *task.packed(network, {"kind": "codes"}))
    return out


def quality(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    net, rows = feature_net(), {}
    runs = {name: trained(options, name) for name in LEARNED}
    models = {name: baseline(options, name, runs["gpt"]) for name in BASELINES} | runs
    for name, path in models.items():
        print(f"--- {name}", file=sys.stderr)
        model = load(path)
        known = set(model.meta["words"])
        reference = work.picture_set("emoji", model.size, known)
        asked = work.Options(groups=("distribution", "diversity", "text"), count=min(options.count, len(reference)), guidance=2.0, seed=options.seed)
        found, _ = work.evaluate(model, name, reference, net, asked)
        rows[name] = {f.name: [f.value, *(f.interval or ())] for f in found.figures}
        rows[name]["seconds a picture, one at a time"] = [seconds_of(model, 1, options.repeats)]
        rows[name]["seconds a picture, 16 together"] = [seconds_of(model, 16, options.repeats) / 16]
        rows[name]["codec alone: kernel distance"] = list(floor(model, reference, net))
        if name in runs:
            log = [line for line in read_log(path / "log.jsonl") if "images_per_s" in line]
            rows[name]["images"], rows[name]["images a second"] = [log[-1]["images"]], [float(np.median([x["images_per_s"] for x in log]))]
    prompts = ("a cat", "an apple", "a fox", "a rocket", "a whale", "a sunflower")
    sheet = [p for path in models.values() for prompt in prompts for p in load(path).generate(prompt, style="fluent", seed=3, count=2, guidance=2.0)]
    grid([p.resize((64, 64)) for p in sheet], columns=12).save(options.out / "priors.png", optimize=True)
    key = next(k for k in rows["gpt"] if k.startswith("kernel distance"))
    claims = [claim(f"{name}: kernel distance", rows[name][key][0]) for name in models]
    return claims, {"rows": rows, "sheet": ["rows:", *models]}


def seconds_of(model: Model, count: int, repeats: int) -> float:
    seconds = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        model.generate("a cat", seed=i, count=count, guidance=2.0, size=model.size)  # without an enlargement
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


@torch.no_grad()
def floor(model: Model, reference: Any, net: Any) -> tuple[float, float, float]:
    """The kernel distance between pictures and what the codec makes of them, with its interval."""
    from sfumato.metrics.distribution import compare_pairs
    from sfumato.metrics.features import look

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
