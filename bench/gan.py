"""GANs under one protocol: `python bench/gan.py --data DIR`, a folder with the IDX files of Fashion-MNIST. One JSON on stdout.

- study: six losses with no penalty, WGAN-GP, R1, and R1 with R2, three seeds each, one pair of networks, equal pictures seen (after "Are GANs Created
  Equal?", arXiv 1711.10337): kernel and Frechet distance to held-out pictures, diversity, pictures a second, failures, and a picture of each;
- race: our preset against DCGAN and WGAN-GP at equal seconds, the learning rates of those two tuned first;
- step: one step of WGAN-GP beside the plain textbook step on the same networks, by turns.

Every cell is kept in `--out`: a run that was stopped is gone on with. Features are those of a classifier trained here on the same classes, and of
Inception where its file is there (`--inception FILE`), else of the default feature net; each figure is given with both.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import tyro
from common import ROOT, claim, emit, of_parts
from PIL import Image
from scipy.stats import ttest_ind
from torch import Tensor
from tqdm import tqdm
from vqgan import idx_folder

from sfumato.core.config import to_json
from sfumato.core.images import grid, to_pil
from sfumato.core.rng import torch_rng
from sfumato.core.runlog import read_log
from sfumato.core.seams import Cond
from sfumato.data.augment import STILL
from sfumato.gans.dcgan import DCGANConfig
from sfumato.gans.pair import Discriminator, Generator
from sfumato.gans.residual import ResidualConfig
from sfumato.losses.adversarial import Kind
from sfumato.metrics.distribution import Moments, frechet_distance, kernel_distance
from sfumato.metrics.diversity import pairwise_distance
from sfumato.metrics.features import FeatureNet, feature_net, look
from sfumato.metrics.intervals import bootstrap
from sfumato.metrics.judge import Judge
from sfumato.nn.backbones import over, resize
from sfumato.pipelines.evaluate import picture_set
from sfumato.pipelines.load import load_judge
from sfumato.train import gan, judge
from sfumato.train.gan import GANRecipe, PenaltyConfig
from sfumato.train.loop import Diverged, LoopConfig

PARTS = ("study", "race", "step")
SIDE = 32
LOSSES: tuple[Kind, ...] = get_args(Kind)
PENALTIES = {
    "none": PenaltyConfig(),
    "wgan-gp": PenaltyConfig(gp=10.0),
    "r1": PenaltyConfig(r1=1.0),
    "r1+r2": PenaltyConfig(r1=1.0, r2=1.0),
}
COLLAPSED = 0.3  # diversity of the real pictures', by either net, below which a run has failed
RATE = 2e-4  # of the study
TRIED = (5e-5, 2e-4, 8e-4)  # learning rates of the baselines
RIVALS = {"ours": gan.preset_r3gan, "dcgan": gan.preset_dcgan, "wgan-gp": gan.preset_wgan_gp}
COLOURED = "dcgan with colours"  # of its pictures, as ours has them, at its own rate


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compares GANs, and prints one JSON object."""

    data: Path
    """A folder with the IDX files of Fashion-MNIST (Debian's `dataset-fashion-mnist` has them)."""
    images: int = 48_000
    """Pictures that each cell of the study sees."""
    seeds: int = 3
    minutes: float = 6.0
    """Training time of each run of the race."""
    count: int = 2048
    """Pictures drawn by each, and held-out ones that they are compared with."""
    only: str = ",".join(PARTS)
    """Parts, with commas."""
    losses: str = ",".join(LOSSES)
    """Losses of the study, with commas."""
    penalties: str = ",".join(PENALTIES)
    """Penalties of the study, with commas."""
    inception: Path | None = None
    """The original weights of Inception, for its features instead of the default net's; give it an --out of its own."""
    out: Path = ROOT / "runs" / "bench-gan"
    """Where cells are kept."""
    repeats: int = 24
    """Of a timed step."""
    seed: int = 0
    quick: bool = False
    """A smoke run of seconds: its figures mean nothing."""


# --- what looks at pictures -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eyes:
    """Two feature nets, by their names, and the features of held-out pictures."""

    looks: dict[str, Callable[[Tensor], Tensor]]
    real: dict[str, Tensor]


def folders(options: Options) -> tuple[Path, Path]:
    """(pictures to learn from, half of them mirrored where a recipe says nothing else; pictures to compare with, as they are)."""
    counts = (400, 128) if options.quick else (60_000, options.count)
    train, test = (idx_folder(options.data, options.out / part, n, part) for part, n in zip(("train", "t10k"), counts, strict=True))
    return train, test


@cache
def eyes(options: Options) -> Eyes:
    """Made once, when the first run is to be looked at."""
    train, test = folders(options)
    recipe, loop = judge.preset_smoke() if options.quick else judge.preset_own()
    recipe = replace(recipe, data=str(train), limit=0)
    run = judge.train(recipe, replace(loop, dtype="fp32", seed=options.seed), options.out / "classifier").run
    net, classifier = net_of(options), load_judge(run)
    looks: dict[str, Callable[[Tensor], Tensor]] = {"classifier": partial(seen_by, classifier), net.name: lambda x: look(net, x)[0]}
    reference = picture_set(test, SIDE)
    x = torch.cat([over(b) for b in reference.batches(range(len(reference)))])
    return Eyes(looks, {name: f(x) for name, f in looks.items()})


def net_of(options: Options) -> FeatureNet:
    return feature_net("inception", str(options.inception)) if options.inception else feature_net()


@torch.no_grad()
def seen_by(classifier: Judge, rgb: Tensor) -> Tensor:
    """Its pooled features "n 256"."""
    net = classifier.network
    return torch.cat([net.trunk(resize(p, net.config.size) * 2 - 1).mean((2, 3)) for p in rgb.split(128)])


# --- one run --------------------------------------------------------------------------------------------------------------------------------------


def on(network: Any, options: Options, recipe: GANRecipe) -> GANRecipe:
    """A recipe whose pair has this network and the side of the data; small where it is only tried."""
    if options.quick:
        network = replace(network, width=16, most=16)
    parts = {name: replace(getattr(recipe, name), network=network, size=SIDE) for name in ("generator", "discriminator")}
    return replace(recipe, **parts)


def loop_of(options: Options, images: int, seed: int, lr: float, own: LoopConfig | None = None) -> LoopConfig:
    """`own` is that of a preset, which decides batches and averages."""
    _, loop = gan.preset_own()
    loop = replace(loop, batch_size=32) if own is None else replace(loop, batch_size=own.batch_size, ema=own.ema)
    batch = 16 if options.quick else loop.batch_size
    images = max(images // batch, 2) * batch
    loop = replace(loop, images=images, batch_size=batch, warmup=min(loop.warmup, images // 10), seed=seed, lr=lr, dtype="fp32", keep=1)
    return replace(loop, save_every=images, sample_every=10 * images, log_every=max(images // 20, batch))


def settings_of(options: Options, recipe: GANRecipe, loop: LoopConfig) -> dict[str, Any]:
    """Everything that decides what comes of a run, but for where its files are."""
    of_recipe = {k: v for k, v in to_json(recipe).items() if k != "data"}
    return {"recipe": of_recipe, "loop": to_json(loop), "count": options.count, "inception": options.inception is not None}


def kept(told: Path, settings: Any) -> dict[str, Any]:
    """What a file says. Raises ValueError where it was made with other settings."""
    found: dict[str, Any] = json.loads(told.read_text())
    if found.get("settings") != json.loads(json.dumps(settings)):
        raise ValueError(f"{told} was made with other settings: name another --out, or remove it")
    return found


def outcome(options: Options, name: str, recipe: GANRecipe, loop: LoopConfig) -> dict[str, Any]:
    """What came of a run, from its file where it was made before with the same settings."""
    told = options.out / "cells" / f"{name}.json"
    settings = settings_of(options, recipe, loop)
    if told.exists():
        return kept(told, settings)
    run, found = options.out / "runs" / name, {"failed": False}
    began = time.perf_counter()
    try:
        trainer = gan.train(recipe, loop, run, text=run)
    except Diverged as e:
        found = {"failed": True, "why": str(e)}
    else:
        found["seconds"] = time.perf_counter() - began
        found["images_per_s"] = float(np.median([line["images_per_s"] for line in read_log(run / "log.jsonl") if "images_per_s" in line]))
        found["skipped"] = trainer.counters["skipped"]
        generator = trainer.task.drawing(trainer.averages)  # type: ignore[attr-defined]
        found |= compared(options, generator, eyes(options), told.with_suffix(".png"))
    told.parent.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(found | {"settings": settings}))
    return found


@torch.no_grad()
def compared(options: Options, generator: Any, sight: Eyes, picture: Path) -> dict[str, Any]:
    """Distances and diversity of what averaged weights draw, and twenty of the pictures."""
    count = len(next(iter(sight.real.values())))
    z = torch.stack([torch.randn(generator.config.z, generator=torch_rng(options.seed, "bench/z", i)) for i in range(count)])
    x = torch.cat([generator(p, Cond()) for p in z.split(128)])
    if not bool(torch.isfinite(x).all()):
        return {"failed": True, "why": "not finite"}
    picture.parent.mkdir(parents=True, exist_ok=True)
    grid(to_pil(x[:20].clamp(-1, 1)), columns=20).save(picture, optimize=True)
    found: dict[str, Any] = {}
    for name, f in sight.looks.items():
        fake, real = f((x.clamp(-1, 1) + 1) / 2), sight.real[name]
        found[f"kid, {name}"] = kernel_distance(real, fake)
        found[f"frechet, {name}"] = frechet_distance(*(Moments().update(v) for v in (real, fake)))
        found[f"diversity, {name}"] = pairwise_distance(fake) / pairwise_distance(real)
    return found | {"failed": min(v for k, v in found.items() if k.startswith("diversity")) < COLLAPSED}


# --- study ----------------------------------------------------------------------------------------------------------------------------------------


def study(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    train, _ = folders(options)
    network = DCGANConfig(width=32, most=128, norm="group")
    images = 64 if options.quick else options.images
    losses, penalties = _named(options.losses, LOSSES), _named(options.penalties, PENALTIES)
    if options.quick:
        losses, penalties = losses[-2:], penalties[:2]
    cells = [(k, p, s) for s in range(seeds_of(options)) for k in losses for p in penalties]
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, penalty, seed in tqdm(cells, desc="study", file=sys.stderr):
        recipe = on(network, options, GANRecipe(data=str(train), loss=kind, penalty=PENALTIES[penalty], betas=(0.0, 0.99)))
        name = f"{kind} + {penalty}"
        found.setdefault(name, []).append(outcome(options, f"{kind}-{penalty}-{seed}", recipe, loop_of(options, images, seed, RATE)))
    sheet(options, losses, penalties, seeds_of(options) - 1).save(options.out / "study.png", optimize=True)
    rows = {name: summary(cells) for name, cells in found.items()}
    best = min((r for r in rows if rows[r]["failures"] == 0), key=lambda r: rows[r]["kid, classifier"][0], default="")
    claims = [claim("the best: kernel distance by the classifier", rows[best]["kid, classifier"][0])] if best else []
    claims.append(claim("cells that failed", sum(r["failures"] for r in rows.values())))
    return claims, {"rows": rows, "best": best, "images": images, "features": f"a classifier trained on the same classes, and {net_of(options).name}"}


def sheet(options: Options, losses: list[str], penalties: list[str], seed: int) -> Image.Image:
    """What each cell of a seed drew: a row a loss, two lines of ten pictures a penalty; white where there is no picture."""
    step, wide, high = SIDE + 2, 10 * (SIDE + 2) + 8, 2 * (SIDE + 2) + 8  # of a picture with its gap; of the pictures of a cell
    whole = Image.new("RGB", (wide * len(penalties) - 10, high * len(losses) - 10), "white")
    for row, kind in enumerate(losses):
        for column, penalty in enumerate(penalties):
            strip = options.out / "cells" / f"{kind}-{penalty}-{seed}.png"
            if strip.exists():
                with Image.open(strip) as drawn:
                    for line in range(2):
                        part = drawn.convert("RGB").crop((line * 10 * step, 0, (line + 1) * 10 * step - 2, SIDE))
                        whole.paste(part, (column * wide, row * high + line * step))
    return whole


def seeds_of(options: Options) -> int:
    return 1 if options.quick else options.seeds


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of what did not fail, and how many did."""
    good = [c for c in cells if not c["failed"]]
    numbers = [k for k, v in (good[0] if good else {}).items() if isinstance(v, float)]
    spread = lambda v: [float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0]  # noqa: E731
    return {"failures": len(cells) - len(good)} | {k: spread([c[k] for c in good]) for k in numbers}


def _named(given: str, known: Any) -> list[str]:
    wanted = [v.strip() for v in given.split(",") if v.strip()]
    if unknown := [v for v in wanted if v not in known]:
        raise ValueError(f"(={unknown[0]!r}) must be one of {', '.join(known)}")
    return wanted


# --- race -----------------------------------------------------------------------------------------------------------------------------------------


def rivals(options: Options, data: str) -> dict[str, GANRecipe]:
    """Our preset r3gan without ADA, since none of them is to have augmentation, and the two that it is measured against: losses, penalties, steps and
    betas of their papers, all on the networks of the study, DCGAN's own with batch norms. None of them sees mirrored pictures.
    """
    pairs = {
        "ours": DCGANConfig(width=32, most=128, norm="group"),
        "dcgan": DCGANConfig(width=32, most=128),
        "wgan-gp": DCGANConfig(width=32, most=128, norm="group"),
    }
    whole = {"data": data, "labels": "none", "variety": replace(STILL, flip=0.0), "augment": "none"}
    return {name: on(pairs[name], options, replace(preset()[0], **whole)) for name, preset in RIVALS.items()}  # type: ignore[arg-type]


def race(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    train, _ = folders(options)
    recipes = rivals(options, str(train))
    loops = {name: preset()[1] for name, preset in RIVALS.items()}
    images = paced(options, recipes, loops)
    rates, others = {"ours": RIVALS["ours"]()[1].lr}, [name for name in RIVALS if name != "ours"]
    for name in others:
        tried = {
            lr: outcome(options, f"race-{name}-{lr:g}-0", recipes[name], loop_of(options, images[name], 0, lr, loops[name]))
            for lr in (TRIED[1:2] if options.quick else TRIED)
        }
        rates[name] = min(tried, key=lambda lr: tried[lr].get("frechet, classifier", np.inf))  # kernel distances have come to their noise by then
    found = {
        name: [
            outcome(options, f"race-{name}-{rates[name]:g}-{s}", recipe, loop_of(options, images[name], s, rates[name], loops[name]))
            for s in range(seeds_of(options))
        ]
        for name, recipe in recipes.items()
    }
    lr, coloured = rates["dcgan"], replace(recipes["dcgan"], generator=replace(recipes["dcgan"].generator, colours=True))
    found[COLOURED] = [
        outcome(options, f"race-{COLOURED}-{lr:g}-{s}", coloured, loop_of(options, images["dcgan"], s, lr, loops["dcgan"]))
        for s in range(seeds_of(options))
    ]
    claims = []
    for name in (*others, COLOURED):
        for what, key in (("Frechet", "frechet"), ("kernel", "kid")):
            for eye in ("classifier", net_of(options).name):
                ours, theirs = ([c.get(f"{key}, {eye}", np.nan) for c in found[n]] for n in ("ours", name))
                ratio, low, high = ratio_of(ours, theirs)
                claims.append(claim(f"{what} distance by the {eye}: ours / {name}, at most", high, "", "<= 1"))
                claims.append(claim(f"... {name}: the ratio itself", ratio, "", "<= 0.7"))
                claims.append(claim(f"... {name}: at least", low))
    return claims, {"rows": {n: summary(c) for n, c in found.items()}, "learning rates": rates, "images": images}


def ratio_of(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """The ratio of geometric means over seeds, with the 95 % interval of Welch's test on the logarithms. Distances below 1e-4 count as that."""
    a, b = (np.log(np.maximum(v, 1e-4)) for v in (ours, theirs))
    if len(a) < 2:
        return (float(np.exp(a.mean() - b.mean())),) * 3
    found = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return float(np.exp(a.mean() - b.mean())), float(np.exp(found.low)), float(np.exp(found.high))


def paced(options: Options, recipes: dict[str, GANRecipe], loops: dict[str, LoopConfig]) -> dict[str, int]:
    """Pictures that fit into the time of a race, from some steps of each, by turns: other work on the machine meets all alike."""
    if options.quick:
        return dict.fromkeys(recipes, 64)
    told = options.out / "cells" / f"pace-{options.minutes:g}.json"
    settings = {name: settings_of(options, recipe, loop_of(options, 10**7, 0, RATE, loops[name])) for name, recipe in recipes.items()}
    if not told.exists():
        for part in range(1, 4):
            for name, recipe in recipes.items():
                loop = loop_of(options, 10**7, 0, RATE, loops[name])
                run = options.out / "runs" / f"pace-{name}"
                gan.train(recipe, replace(loop, log_every=5 * loop.batch_size), run, text=run, stop_at=30 * part * loop.batch_size)
        found = {name: pace(options.out / "runs" / f"pace-{name}" / "log.jsonl") for name in recipes}
        told.parent.mkdir(parents=True, exist_ok=True)
        told.write_text(json.dumps({"images": {name: int(speed * 60 * options.minutes) for name, speed in found.items()}, "settings": settings}))
    return kept(told, settings)["images"]  # type: ignore[no-any-return]


def pace(log: Path) -> float:
    """Pictures a second, the median over some steps."""
    return float(np.median([line["images_per_s"] for line in read_log(log) if "images_per_s" in line]))


# --- one step, beside a textbook's ----------------------------------------------------------------------------------------------------------------


def step(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A discriminator's step of WGAN-GP: ours, through the task, and as every tutorial writes it."""
    train, _ = folders(options)
    network = ResidualConfig(width=32, most=128)
    recipe = on(network, options, GANRecipe(data=str(train), loss="wasserstein", penalty=PenaltyConfig(gp=10.0)))
    task = gan.GANTask(recipe, options.seed, options.out, options.out / "step")
    batch = task.batch(np.arange(64))
    critic, generator = Discriminator(task.of_discriminator), Generator(task.net)
    critic.load_state_dict(task.networks["discriminator"].state_dict())
    generator.load_state_dict(task.networks["generator"].state_dict())
    ours = torch.optim.Adam(task.networks["discriminator"].parameters(), lr=1e-4, betas=(0.0, 0.9))
    plain = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))

    def one() -> None:
        ours.zero_grad()
        task.judge(task.networks, dict(batch), 0.0)[0].backward()  # nothing is kept from the last one
        ours.step()

    def textbook() -> None:
        plain.zero_grad()
        with torch.no_grad():
            fake = generator(batch["z"][:, 0], Cond())
        u = torch.rand(len(fake), 1, 1, 1)
        mixed = (u * batch["x"] + (1 - u) * fake).requires_grad_()
        scores = critic(mixed, Cond())
        (slope,) = torch.autograd.grad(scores, mixed, torch.ones_like(scores), create_graph=True)
        penalty = ((slope.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
        (critic(fake, Cond()).mean() - critic(batch["x"], Cond()).mean() + 10 * penalty).backward()
        plain.step()

    seconds: dict[str, list[float]] = {"ours": [], "textbook": []}
    for i in tqdm(range(2 if options.quick else 2 + options.repeats), desc="step", file=sys.stderr):
        sides = (("ours", one), ("textbook", textbook))
        for name, go in sides if i % 2 else sides[::-1]:
            began = time.perf_counter()
            go()
            if i:
                seconds[name].append(time.perf_counter() - began)
    ratios = np.array(seconds["textbook"]) / np.array(seconds["ours"])
    low, high = bootstrap(lambda a: np.median(a, -1), ratios)
    claims = [
        claim("WGAN-GP, one step of the discriminator: textbook / ours", float(np.median(ratios)), "times"),
        claim("... at most: below 1 it is slower", high, "times", ">= 1"),
        claim("... at least", low, "times"),
    ]
    return claims, {k: float(np.median(v)) for k, v in seconds.items()}


def run(options: Options) -> dict[str, Any]:
    out = options.out.resolve()  # runs remember where their pictures are
    options = replace(options, out=out / "quick" if options.quick else out)
    options.out.mkdir(parents=True, exist_ok=True)
    return of_parts({"study": study, "race": race, "step": step}, options.only, options, options.seed)


def main(argv: list[str] | None = None) -> None:
    emit(run(tyro.cli(Options, args=argv)))


if __name__ == "__main__":
    main()
