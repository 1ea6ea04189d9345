"""The second judge: a small residual network that names concept and style of a drawing. `python bench/judge.py` trains it.

It shares nothing with what it judges: not Lite0 (which served in the codec's training), not the codec, not the text encoder. It learns
from the real training drawings only, held-out pairs excluded, heavily varied: placed, turned, mirrored where meaning allows, tinted,
blurred, with noise and changed colours, over random grounds. 250,000 pictures take 15 to 25 minutes of two free cores. The run lies in
runs/judge/ under the hash of its settings; stopped, it goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import ROOT, claim, emit, report
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato import zoo
from sfumato.core.checkpoint import load_tensors, read_metadata
from sfumato.core.config import to_json
from sfumato.core.rng import numpy_rng, shuffled, torch_rng
from sfumato.data.augment import Variety, draw_scene, render
from sfumato.data.emoji import STYLES, Drawings, concepts, drawable, drawings
from sfumato.nn.backbones import over, resize
from sfumato.nn.layers import ResBlock
from sfumato.train.loop import Batch, LoopConfig, Phase, Stopped, Trainer, checkpoints, main_first

FOLDER = ROOT / "runs" / "judge"
FEW = 64  # so many concepts or fewer are rasterised alone, not the whole set
HEAVY = Variety(place=0.9, scale=(0.6, 1.1), angle=18.0, recolour=0.2, scene=0.05)


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """Everything that decides what the judge becomes. `which` are hexcodes; none means all that the bundled model draws."""

    kind: str = "train-judge"
    which: tuple[str, ...] = ()
    size: int = 64
    widths: tuple[int, int, int] = (64, 128, 256)
    blocks: tuple[int, int, int] = (2, 2, 1)
    smoothing: float = 0.1
    variety: Variety = HEAVY


LOOP = LoopConfig(
    images=250_000, batch_size=64, lr=2e-3, warmup=6_400, decay=0.5, ema=0.02, dtype="auto", weight_decay=0.05, log_every=6_400, save_every=25_600,
    sample_every=128_000, keep=1,
)  # fmt: skip
QUICK = replace(LOOP, images=96, batch_size=16, warmup=16, log_every=48, save_every=96, sample_every=96, dtype="fp32", device="cpu")


def known(recipe: JudgeRecipe) -> tuple[int, ...]:
    """The concepts that the judge tells apart, as indices into `concepts()`, in its own order."""
    index = {c.hexcode: c.index for c in concepts()}
    return tuple(index[h] for h in recipe.which) if recipe.which else tuple(c.index for c in drawable())


class JudgeNet(nn.Module):
    """RGB "b 3 64 64" in [-1, 1] -> logits over concepts "b c" and over styles "b 6". 2.6 M parameters at the full set."""

    def __init__(self, recipe: JudgeRecipe, num_concepts: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(4), nn.Conv2d(48, recipe.widths[0], 3, padding=1)]
        for i, (width, blocks) in enumerate(zip(recipe.widths, recipe.blocks, strict=True)):
            if i:
                layers.append(nn.Conv2d(recipe.widths[i - 1], width, 3, stride=2, padding=1))
            layers += [ResBlock(width) for _ in range(blocks)]
        self.trunk = nn.Sequential(*layers, nn.GroupNorm(16, recipe.widths[-1]), nn.SiLU())
        self.concept = nn.Linear(recipe.widths[-1], num_concepts)
        self.style = nn.Linear(recipe.widths[-1], len(STYLES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.trunk(x).mean((2, 3))
        return self.concept(pooled), self.style(pooled)


# --- training -----------------------------------------------------------------------------------------------------------------------------------


def art_of(wanted: tuple[int, ...], size: int) -> Drawings:
    """The drawings of some concepts; more than a few come from the cache of all."""
    art = drawings(size, [concepts()[c] for c in wanted] if len(wanted) <= FEW else None)
    return art.rows(np.isin(art.concept, wanted))


def exact(art: Drawings) -> Tensor:
    """The drawings as drawn, averaged 2 x 2: premultiplied RGBA "n 4 h/2 w/2" in steps of 1/255."""
    return F.avg_pool2d(art.pixels.float(), 2).round() / 255


def spoil(x: Tensor, rngs: list[np.random.Generator], noise: Tensor) -> Tensor:
    """Premultiplied RGBA "b 4 h w" -> RGB "b 3 h w" in [-1, 1] over random grounds, with changed colours, blur and noise (`noise` is unit)."""
    draws = torch.tensor(np.array([r.random(12) for r in rngs]), dtype=torch.float32)[:, :, None, None]
    kind = draws[:, :1]
    ground = torch.where(kind < 0.45, 1.0, torch.where(kind < 0.55, 0.0, draws[:, 1:4]))
    flat = over(x, ground)
    flat = ((flat - 0.5) * (0.8 + 0.4 * draws[:, 4:5]) + 0.5) * (0.88 + 0.24 * draws[:, 5:8]) + 0.1 * (draws[:, 8:9] - 0.5)
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).expand(3, 1, 3, 3) / 16
    soft = F.conv2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    flat = torch.lerp(flat, soft, (1.6 * draws[:, 9:10] - 0.6).clamp(min=0))
    return (flat + 0.05 * draws[:, 10:11] * (draws[:, 11:12] < 0.5) * noise).clamp(0, 1) * 2 - 1


class JudgeTask:
    """See `sfumato.train.loop.Task`."""

    kind = "judge"

    def __init__(self, recipe: JudgeRecipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed
        self.known = known(recipe)
        art = art_of(self.known, 2 * recipe.size)
        self.train, self.held_out = art.rows(~art.held_out), art.rows(art.held_out)
        self.row_of = {c: i for i, c in enumerate(self.known)}
        self.flips, self.recolours = self.train.may_flip, self.train.may_recolour
        torch.manual_seed(seed)
        network = JudgeNet(recipe, len(self.known)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.networks: dict[str, nn.Module] = {"judge": network}
        self.phases = [Phase("judge", ("judge",), self.loss)]

    def targets(self, art: Drawings, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.tensor([self.row_of[int(c)] for c in art.concept[rows]]), torch.from_numpy(art.style[rows])

    def batch(self, positions: np.ndarray, purpose: str = "train") -> Batch:
        r = self.recipe
        rows = shuffled(len(self.train), self.seed, f"judge/{purpose}/order", positions)
        rngs = [numpy_rng(self.seed, f"judge/{purpose}/scene", int(p)) for p in positions]
        may = zip(self.flips[rows].tolist(), self.recolours[rows].tolist(), strict=True)
        scenes = [draw_scene(rng, r.variety, int(row), flip, (), tint) for rng, row, (flip, tint) in zip(rngs, rows, may, strict=True)]
        shape = (3, r.size, r.size)
        noise = torch.stack([torch.randn(shape, generator=torch_rng(self.seed, f"judge/{purpose}/noise", int(p))) for p in positions])
        x = spoil(render(self.train.pixels, scenes, r.size), rngs, noise)
        concept, style = self.targets(self.train, rows)
        return {"x": x.contiguous(memory_format=torch.channels_last), "concept": concept, "style": style}

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        concept, style = networks["judge"](batch["x"])
        s = self.recipe.smoothing
        a = F.cross_entropy(concept.float(), batch["concept"], label_smoothing=s)
        b = F.cross_entropy(style.float(), batch["style"], label_smoothing=s)
        right = (concept.argmax(1) == batch["concept"]).float().mean(), (style.argmax(1) == batch["style"]).float().mean()
        return a + b, {"concept": right[0], "style": right[1]}

    def samples(self, networks: dict[str, nn.Module]) -> None:
        return None

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        """Accuracy on real held-out pairs as drawn over white, and on varied training drawings."""
        n = min(512, len(self.train))
        parts = [self.batch(p, "measure") for p in np.split(np.arange(n), range(64, n, 64))]
        varied = {k: torch.cat([p[k] for p in parts]) for k in ("x", "concept", "style")}
        scores = {f"train_{k}": v for k, v in _accuracy(networks["judge"], varied["x"], varied["concept"], varied["style"]).items()}
        if len(self.held_out):
            x = over(exact(self.held_out)) * 2 - 1
            targets = self.targets(self.held_out, np.arange(len(self.held_out)))
            scores |= {f"held_out_{k}": v for k, v in _accuracy(networks["judge"], x, *targets).items()}
        return scores | {"score": scores.get("held_out_concept", scores["train_concept"])}

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        scores = self.evaluate(networks)
        return {f"judge.{k}": v for k, v in networks["judge"].state_dict().items()}, {
            "kind": "judge",
            "recipe": to_json(self.recipe),
            "scores": scores,
        }


@torch.no_grad()
def _accuracy(network: nn.Module, x: Tensor, concept: Tensor, style: Tensor) -> dict[str, float]:
    found = [network(part.to(next(network.parameters()).device)) for part in x.split(64)]
    by_concept, by_style = (torch.cat([f[i] for f in found]).cpu() for i in (0, 1))
    best = by_concept.topk(min(5, by_concept.shape[1])).indices == concept[:, None]
    values = {"concept": best[:, 0], "concept5": best.any(1), "style": by_style.argmax(1) == style}
    return {k: float(v.float().mean()) for k, v in values.items()}


# --- the trained judge ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """A trained judge; column i of its concept logits is concept known[i]. `images`: how long it learned."""

    network: JudgeNet
    known: tuple[int, ...]
    size: int
    images: int
    scores: dict[str, float]

    @property
    def meaningful(self) -> bool:
        return self.images >= LOOP.images // 2

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Premultiplied RGBA "b 4 h w" in [0, 1] -> concept and style logits, over white."""
        found = [self.network(resize(over(p), self.size) * 2 - 1) for p in pictures.split(64)]
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def folder_of(root: Path, recipe: JudgeRecipe, loop: LoopConfig) -> Path:
    """The run folder of these settings; where and with how many threads it runs does not matter."""
    settings = [to_json(recipe), to_json(replace(loop, threads=0, device="auto"))]
    return root / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def judge(recipe: JudgeRecipe, loop: LoopConfig, root: Path = FOLDER) -> Judge:
    """The trained judge of these settings: from its folder, or trained first."""
    folder = folder_of(root, recipe, loop)
    packs = checkpoints(folder, "model")
    if not packs or int(read_metadata(packs[-1])["images"]) < loop.images:  # type: ignore[call-overload]
        print(f"training the second judge: {loop.images:,} pictures, in {folder}", file=sys.stderr)
        Trainer(main_first(loop, lambda _: JudgeTask(recipe, loop.seed)), loop, folder, recipe).train()
        packs = checkpoints(folder, "model")
    tensors, meta = load_tensors(packs[-1])
    wanted = known(recipe)
    network = zoo.load_into(JudgeNet(recipe, len(wanted)), tensors, "judge.")
    return Judge(network, wanted, recipe.size, int(meta["images"]), meta["scores"])  # type: ignore[arg-type, call-overload]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Trains the second judge, or goes on training it, and prints its accuracy."""

    quick: bool = False
    """A handful of steps on twelve concepts: a smoke test, its figures mean nothing."""
    images: int = LOOP.images
    """Pictures to train on."""
    out: Path = FOLDER
    """Where judges are kept."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""


def main(argv: list[str] | None = None) -> None:
    options, started = tyro.cli(Options, args=argv), time.perf_counter()
    first = tuple(c.hexcode for c in drawable()[:12]) if options.quick else ()
    loop = replace(QUICK if options.quick else replace(LOOP, images=options.images), threads=options.threads)
    try:
        found = judge(JudgeRecipe(which=first), loop, options.out)
    except Stopped as e:
        print(e, file=sys.stderr)
        raise SystemExit(128 + e.signum) from None
    names = {
        "held_out_concept": "concept of a real held-out pair", "held_out_concept5": "... among the best five", "held_out_style": "its style",
        "train_concept": "concept of a varied training drawing", "train_concept5": "... among the best five", "train_style": "its style, varied",
    }  # fmt: skip
    claims = [claim(f"second judge: {text}", found.scores.get(k, math.nan), "fraction") for k, text in names.items()]
    parameters = sum(p.numel() for p in found.network.parameters())
    emit(
        report(
            started,
            loop.seed,
            claims,
            {"meaningful": found.meaningful, "images": found.images, "parameters": parameters, "classes": len(found.known)},
        )
    )


if __name__ == "__main__":
    main()
