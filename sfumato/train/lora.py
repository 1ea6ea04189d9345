"""Trains a LoRA (arXiv 2106.09685): low-rank changes of chosen layers of a model that draws by diffusion, on a few pictures of one's own.

What comes of it is one file, which other programs load too where the model is a checkpoint of Stable Diffusion.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.convert.kohya import MOST_ALONG, Lora, lora_tensors
from sfumato.core.pack import save_pack
from sfumato.nn.lora import LowRank, chosen
from sfumato.pipelines.latent_diffusion import LatentDiffusion
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer
from sfumato.train.tuned import Tuned, Tuning, tune


@dataclass(frozen=True, kw_only=True)
class LoraRecipe(Tuned):
    """What decides what a LoRA learns."""

    kind: str = "train-lora"
    rank: int = 16
    """Of the changes: more can say more, and needs more of a file."""
    alpha: float = 0.0
    """Changes count alpha / rank times; 0: once."""
    layers: str = "attention"
    """Of the denoiser: attention, linear (1x1 convolutions too), all (with convolutions), or a regular expression on their names."""
    text: bool = False
    """The attention of the text encoder learns, too."""
    until: float = 1.0
    """The time (1 noise, 0 clean) from which on it is at work: below 1 it learns how things are drawn and not which. Other programs know nothing
    of that."""

    along: float = 1.0
    """With until: how many times as far as it learned pictures go along what it changes; above 1 is more of the style and less of the thing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.along <= MOST_ALONG:
            raise ValueError(f"along (={self.along}) must be above 0 and at most {MOST_ALONG:g}: 1 is as it learned, 1.5 more of the style")
        if self.rank < 1:
            raise ValueError(f"rank (={self.rank}) must be at least 1: 4 to 64 are usual")
        if self.alpha < 0:
            raise ValueError(f"alpha (={self.alpha}) must be at least 0: changes count alpha / rank times, 0 is once")
        if not 0 < self.until <= 1:
            raise ValueError(f"until (={self.until}) must be above 0 and at most 1: the time from which on the LoRA is at work, 1 is always")


def preset_style() -> tuple[LoraRecipe, LoopConfig]:
    """How drawings look, from ten or more of them, for the bundled model or another of ours; some 4 minutes of two cores.

    `sfumato train lora --data DIR --out runs/my-style`
    """
    recipe = LoraRecipe(layers="linear", rank=64, until=0.3, along=2.0, each=100, flip=True, style="auto")
    return recipe, LoopConfig(
        images=24_000, batch_size=32, lr=3e-3, warmup=320, decay=0.5, ema=0.02, weight_decay=0.0, save_every=8_000, sample_every=8_000,
        log_every=1_600,
    )  # fmt: skip


def preset_subject() -> tuple[LoraRecipe, LoopConfig]:
    """What something looks like, in all styles of the bundled model or another of ours, from five pictures or more.

    `sfumato train lora --preset subject --data DIR --prompt "my-dog" --out runs/my-dog`
    """
    recipe, loop = preset_style()
    return replace(recipe, until=1.0, along=1.0, style="any", rank=16, layers="attention"), replace(loop, images=8_000, lr=5e-4)


def preset_stable() -> tuple[LoraRecipe, LoopConfig]:
    """A LoRA of a checkpoint of Stable Diffusion: 1,500 steps of one picture.

    `sfumato train lora --preset stable --base sd15.safetensors --data DIR --prompt "a photo of sks dog" --out runs/my-dog`
    """
    return LoraRecipe(base="", rank=16, checkpointing=True), LoopConfig(
        images=1_500, batch_size=1, lr=1e-4, betas=(0.9, 0.999), warmup=100, decay=0.3, ema=0.02, save_every=500, sample_every=500, log_every=10
    )  # fmt: skip


PRESETS = {"style": preset_style, "subject": preset_subject, "stable": preset_stable}


class LoraTask(Tuning):
    """See `Tuning`."""

    kind = "lora"
    recipe: LoraRecipe

    def __init__(self, recipe: LoraRecipe, seed: int, batch: int, run: Path, device: torch.device | str = "cpu", bf16: bool = False) -> None:
        super().__init__(recipe, seed, batch, run, device, bf16)
        networks = self.model.networks
        layers = {name: chosen(n, recipe.layers) for name, n in networks.items() if n is self.model.denoiser}
        if recipe.text:
            layers |= {name: chosen(n, "attention") for name, n in networks.items() if n is not self.model.denoiser}
        self.hears_anew, self.until = recipe.text, recipe.until
        self.networks = {"lora": LowRank(layers, recipe.rank, recipe.alpha or None)}
        self.phases = [Phase("lora", ("lora",), self.loss)]

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        return networks["lora"](self.loss_of, self.model.denoiser, batch)

    def used(self, networks: dict[str, nn.Module]) -> LatentDiffusion:
        networks["lora"](lambda: None)
        return self.model

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """See `Tuning`; what comes late is drawn by its file, as it will be."""
        if self.until == 1:
            return super().samples(networks)
        networks["lora"].rest()  # type: ignore[operator]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "lora.safetensors"
            save_pack(file, *self.pack(networks))
            return self.drawn(self.model, lora=(str(file),))

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        lora = Lora(networks["lora"].deltas(), {})  # type: ignore[operator]
        said = {"kind": "lora", "ss_network_module": "networks.lora", "ss_network_dim": lora.rank, "ss_network_alpha": self.recipe.alpha or lora.rank}
        return lora_tensors(lora), said | self.about() | ({"until": self.recipe.until, "along": self.recipe.along} if self.recipe.until < 1 else {})


def train(recipe: LoraRecipe, loop: LoopConfig, out: Path, *, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, the LoRA in the run folder `out`."""
    return tune(LoraTask, recipe, loop, out, stop_at)
