"""The second judge of the bundled model: `python bench/judge.py` trains it (`sfumato.train.judge`, preset bundled) and prints its accuracy.

It shares nothing with what it judges: not Lite0 (which served in the codec's training), not the codec, not the text encoder. 250,000 pictures take
15 to 25 minutes of two free cores. The run lies in runs/judge/ under the hash of its settings; stopped, it goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from common import ROOT, claim, emit, report
from torch import Tensor
from torch.nn import functional as F

from sfumato.core.checkpoint import checkpoints, read_metadata
from sfumato.core.config import to_json
from sfumato.data.emoji import Drawings, concepts, drawings
from sfumato.metrics.judge import Judge
from sfumato.nn.backbones import over
from sfumato.pipelines.load import load_judge
from sfumato.train.judge import JudgeRecipe, preset_bundled, preset_smoke, train
from sfumato.train.loop import LoopConfig, Stopped

FOLDER = ROOT / "runs" / "judge"
FEW = 64  # so many concepts or fewer are rasterised alone, not the whole set
RECIPE, LOOP = preset_bundled()
QUICK_RECIPE, QUICK = preset_smoke()
QUICK = replace(QUICK, device="cpu")


def art_of(wanted: tuple[int, ...], size: int) -> Drawings:
    """The drawings of some concepts; more than a few come from the cache of all."""
    art = drawings(size, [concepts()[c] for c in wanted] if len(wanted) <= FEW else None)
    return art.rows(np.isin(art.concept, wanted))


def exact(art: Drawings) -> Tensor:
    """The drawings as drawn, averaged 2 x 2: premultiplied RGBA "n 4 h/2 w/2" in steps of 1/255."""
    return F.avg_pool2d(art.pixels.float(), 2).round() / 255


@dataclass(frozen=True)
class OfDrawings:
    """A judge of premultiplied RGBA drawings; column i of its logits is of concept known[i]."""

    judge: Judge
    known: tuple[int, ...]

    @property
    def meaningful(self) -> bool:
        return self.judge.images >= LOOP.images // 2

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return self.judge(over(pictures))


def folder_of(root: Path, recipe: JudgeRecipe, loop: LoopConfig) -> Path:
    """The run folder of these settings; where and with how many threads it runs does not matter."""
    settings = [to_json(recipe), to_json(replace(loop, threads=0, device="auto"))]
    return root / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def judge(recipe: JudgeRecipe, loop: LoopConfig, root: Path = FOLDER) -> OfDrawings:
    """The trained judge of these settings: from its folder, or trained first."""
    folder = folder_of(root, recipe, loop)
    packs = checkpoints(folder, "model")
    if not packs or int(read_metadata(packs[-1])["images"]) < loop.images:  # type: ignore[call-overload]
        print(f"training the second judge: {loop.images:,} pictures, in {folder}", file=sys.stderr)
        train(recipe, loop, folder)
    found = load_judge(folder)
    index = {c.name: c.index for c in concepts()}
    return OfDrawings(found, tuple(index[name] for name in found.labels))


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
    recipe, loop = (QUICK_RECIPE, QUICK) if options.quick else (RECIPE, replace(LOOP, images=options.images))
    try:
        found = judge(recipe, replace(loop, threads=options.threads), options.out)
    except Stopped as e:
        print(e, file=sys.stderr)
        raise SystemExit(128 + e.signum) from None
    names = {
        "held_out_label": "concept of a real held-out pair", "held_out_label5": "... among the best five", "held_out_style": "its style",
        "train_label": "concept of a varied training drawing", "train_label5": "... among the best five", "train_style": "its style, varied",
    }  # fmt: skip
    claims = [claim(f"second judge: {text}", found.judge.scores.get(k, math.nan), "fraction") for k, text in names.items()]
    parameters = sum(p.numel() for p in found.judge.network.parameters())
    details = {"meaningful": found.meaningful, "images": found.judge.images, "parameters": parameters, "classes": len(found.known)}
    emit(report(started, loop.seed, claims, details))


if __name__ == "__main__":
    main()
