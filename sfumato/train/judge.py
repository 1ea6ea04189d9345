"""Trains a judge (`sfumato.metrics.judge`): whether pictures show what they should, told by a network that shares nothing with their maker.

It learns from real pictures only, heavily varied: placed, turned, mirrored where meaning allows, tinted, blurred, with noise and changed colours,
over random grounds. What is held out from generators is held out from it too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.config import to_json
from sfumato.core.rng import numpy_rng, shuffled, torch_rng
from sfumato.data.augment import Variety, render
from sfumato.data.shards import same_source
from sfumato.data.subjects import EMOJI, subjects
from sfumato.metrics.judge import JudgeConfig, JudgeNet
from sfumato.nn.backbones import over
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer, main_first, settled, starting

HEAVY = Variety(place=0.9, scale=(0.6, 1.1), angle=18.0, recolour=0.2, scene=0.05, pair=0.0)


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """Everything that decides what a judge becomes. `data`: "emoji", a folder, a zip or shards; `limit` takes the first concepts of the emoji only.

    Labels are the concepts of the emoji, of one's own pictures the sub-folder or another label; styles as the data have them.
    """

    kind: str = "train-judge"
    data: str = EMOJI
    limit: int = 0
    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(labels=2, styles=2))
    smoothing: float = 0.1
    variety: Variety = HEAVY


def preset_bundled() -> tuple[JudgeRecipe, LoopConfig]:
    """The second judge of the bundled model: 2.6 M parameters, 15 to 25 minutes of two cores.

    `sfumato train judge --preset bundled --out runs/judge`
    """
    return JudgeRecipe(), LoopConfig(
        images=250_000, batch_size=64, lr=2e-3, warmup=6_400, decay=0.5, ema=0.02, dtype="auto", weight_decay=0.05, log_every=6_400,
        save_every=25_600, sample_every=128_000, keep=1,
    )  # fmt: skip


def preset_own() -> tuple[JudgeRecipe, LoopConfig]:
    """A judge of one's own classes and styles.

    `sfumato train judge --preset own --data DIR --out runs/own-judge`
    """
    recipe, loop = preset_bundled()
    return recipe, replace(loop, images=50_048, warmup=3_200, save_every=12_800, sample_every=25_600)


def preset_smoke() -> tuple[JudgeRecipe, LoopConfig]:
    """A judge that trains in seconds, to try the tools."""
    net = JudgeConfig(widths=(16, 16, 32), blocks=(1, 1, 1), labels=2, styles=2)
    loop = LoopConfig(images=96, batch_size=16, warmup=16, log_every=48, save_every=96, sample_every=96)
    return JudgeRecipe(limit=12, judge=net), loop


PRESETS = {"bundled": preset_bundled, "own": preset_own, "smoke": preset_smoke}


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
        self.recipe, self.seed, self.size = recipe, seed, recipe.judge.size
        self.shown = subjects(recipe.data, self.size, limit=recipe.limit, labels="concept" if recipe.data == EMOJI else "auto")
        self.labels, self.styles = self.shown.labels, self.shown.styles
        self.config = replace(recipe.judge, labels=len(self.labels), styles=len(self.styles))
        self.apart = self.shown.validation()
        torch.manual_seed(seed)
        self.networks: dict[str, nn.Module] = {"judge": JudgeNet(self.config).to(memory_format=torch.channels_last)}  # type: ignore[call-overload]
        self.phases = [Phase("judge", ("judge",), self.loss)]

    def batch(self, positions: np.ndarray, purpose: str = "train") -> Batch:
        rows = shuffled(len(self.shown.pixels), self.seed, f"judge/{purpose}/order", positions)
        rngs = [numpy_rng(self.seed, f"judge/{purpose}/scene", int(p)) for p in positions]
        scenes = [self.shown.scene(int(row), self.recipe.variety, rng) for rng, row in zip(rngs, rows, strict=True)]
        shape = (3, self.size, self.size)
        noise = torch.stack([torch.randn(shape, generator=torch_rng(self.seed, f"judge/{purpose}/noise", int(p))) for p in positions])
        x = spoil(render(self.shown.pixels, scenes, self.size), rngs, noise).contiguous(memory_format=torch.channels_last)
        return {"x": x, "label": torch.from_numpy(self.shown.label[rows]).long(), "style": torch.from_numpy(self.shown.style[rows]).long()}

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        total, found = batch["x"].new_zeros(()), {}
        for name, logits in zip(("label", "style"), networks["judge"](batch["x"]), strict=True):
            known = batch[name] >= 0
            if logits.shape[1] > 1 and bool(known.any()):
                mine, right = logits[known].float(), batch[name][known]
                total = total + F.cross_entropy(mine, right, label_smoothing=self.recipe.smoothing)
                found[name] = (mine.argmax(1) == right).float().mean()
        return total, found

    def samples(self, networks: dict[str, nn.Module]) -> None:
        return None

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        """Accuracy on pictures that no training sees, as they are over white, and on varied training pictures."""
        n = min(512, len(self.shown.pixels))
        parts = [self.batch(p, "measure") for p in np.split(np.arange(n), range(64, n, 64))]
        varied = [torch.cat([p[k] for p in parts]) for k in ("x", "label", "style")]
        scores = {f"train_{k}": v for k, v in _accuracy(networks["judge"], *varied).items()}
        a = self.apart
        told = [torch.from_numpy(np.asarray(v)).long() for v in (a.label, a.style)]
        scores |= {f"held_out_{k}": v for k, v in _accuracy(networks["judge"], over(a.pixels) * 2 - 1, *told).items()}
        return scores | {"score": next(scores[k] for k in ("held_out_label", "held_out_style", "train_label", "train_style") if k in scores)}

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        meta = {"kind": "judge", "judge": to_json(self.config), "labels": self.labels, "styles": self.styles, "scores": self.evaluate(networks)}
        return {f"judge.{k}": v for k, v in networks["judge"].state_dict().items()}, meta


@torch.no_grad()
def _accuracy(network: nn.Module, x: Tensor, label: Tensor, style: Tensor) -> dict[str, float]:
    """The shares that are named right, of labels also among the best five; of pictures without one nothing is said."""
    device, found = next(network.parameters()).device, {}
    parts = [network(p.to(device)) for p in x.split(64)]
    for i, (name, right) in enumerate((("label", label), ("style", style))):
        known = right >= 0
        if not bool(known.any()) or parts[0][i].shape[1] < 2:
            continue
        logits = torch.cat([p[i] for p in parts]).cpu()[known]
        best = logits.topk(min(5, logits.shape[1])).indices == right[known, None]
        found[name] = float(best[:, 0].float().mean())
        if name == "label":
            found["label5"] = float(best.any(1).float().mean())
    return found


def train(recipe: JudgeRecipe, loop: LoopConfig, out: Path, *, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, a judge in the run folder `out`."""
    loop = settled(loop, out)
    with starting(out):
        if recipe.data != EMOJI:
            same_source(Path(out), recipe.data)
        trainer = Trainer(main_first(loop, lambda _: JudgeTask(recipe, loop.seed)), loop, out, recipe)
    trainer.train(stop_at=stop_at)
    return trainer
