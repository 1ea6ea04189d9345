"""Trains all weights of a model that draws by diffusion, on one's own pictures: for many of them, where a LoRA is too little.

What comes of it is a model that draws; of a checkpoint of Stable Diffusion one file that other programs load. With `--loop.shard` several processes
share weights, averages and the optimiser's memory (FSDP2, arXiv 2304.11277): torchrun --nproc-per-node 2 -m sfumato.apps.cli train finetune ...
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.pipelines.latent_diffusion import LatentDiffusion
from sfumato.pipelines.stable_diffusion import StableDiffusion
from sfumato.pipelines.stored import stored
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer
from sfumato.train.tuned import Tuned, Tuning, tune


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Tuned):
    """What decides what a model learns anew."""

    kind: str = "train-finetune"
    text: bool = False
    """The text encoders learn, too."""


def preset_own() -> tuple[FinetuneRecipe, LoopConfig]:
    """All of the bundled denoiser, or of another of ours.

    `sfumato train finetune --data DIR --out runs/mine`
    """
    return FinetuneRecipe(flip=True), LoopConfig(
        images=48_000, batch_size=32, lr=1e-4, warmup=2_000, decay=0.5, ema=0.02, save_every=16_000, sample_every=16_000, log_every=1_600
    )


def preset_stable() -> tuple[FinetuneRecipe, LoopConfig]:
    """All of the UNet of a checkpoint of Stable Diffusion, for a thousand pictures and more.

    `sfumato train finetune --base sd15.safetensors --data DIR --out runs/mine`
    """
    return FinetuneRecipe(base="", checkpointing=True), LoopConfig(
        images=40_000, batch_size=4, lr=1e-5, betas=(0.9, 0.999), warmup=2_000, decay=0.3, ema=0.05, save_every=4_000, sample_every=4_000,
        log_every=40,
    )  # fmt: skip


PRESETS = {"own": preset_own, "stable": preset_stable}


class FinetuneTask(Tuning):
    """See `Tuning`."""

    kind = "finetune"
    recipe: FinetuneRecipe
    shardable = True

    def __init__(self, recipe: FinetuneRecipe, seed: int, batch: int, run: Path, device: torch.device | str = "cpu", bf16: bool = False) -> None:
        super().__init__(recipe, seed, batch, run, device, bf16=False)  # what learns is fp32
        self.hears_anew = recipe.text
        self.part = next(name for name, n in self.model.networks.items() if n is self.model.denoiser)
        learning = self.model.networks if recipe.text else {self.part: self.model.denoiser}
        self.networks = {name: n.train().requires_grad_(True) for name, n in learning.items()}
        self.phases = [Phase("denoiser", tuple(self.networks), self.loss)]

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_of(networks[self.part], batch)

    def used(self, networks: dict[str, nn.Module]) -> LatentDiffusion:
        """A model with these networks; what they hear with, if that learns, is theirs too."""
        model = replace(self.model, denoiser=networks[self.part])
        if isinstance(model, StableDiffusion):
            ears = [
                replace(e, network=networks.get(name, e.network)) for name, e in zip(("text_encoder", "text_encoder_2"), model.ears, strict=False)
            ]
            return replace(model, ears=ears)
        return replace(model, text=networks.get("text", model.text))  # type: ignore[arg-type]

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = stored(self.used(networks))
        return tensors, meta | self.about()


def train(recipe: FinetuneRecipe, loop: LoopConfig, out: Path, *, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, the model in the run folder `out`."""
    if recipe.text and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("text (=True) is for one process: the text encoder's gradients are not shared between several")
    return tune(FinetuneTask, recipe, loop, out, stop_at)
