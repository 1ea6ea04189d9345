"""Textual inversion (arXiv 2208.01618): vectors of a new word are learned, of which the text encoder and all else that draws know nothing.

What comes of it is one small file, which other programs load too where the model is a checkpoint of Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.convert.kohya import FIRST, SECONDS
from sfumato.data.folder import Entry
from sfumato.pipelines.latent_diffusion import LatentDiffusion
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer
from sfumato.train.tuned import Tuned, Tuning, tune


@dataclass(frozen=True, kw_only=True)
class EmbeddingRecipe(Tuned):
    """What decides what a word learns."""

    kind: str = "train-embedding"
    word: str = ""
    """The new name, as prompts will say it; every caption must say it: --prompt puts it there ("a photo of my-dog")."""
    like: str = ""
    """What it begins as: words that are known ("toy")."""
    vectors: int = 4
    """So many of each text encoder; 1 to 8 are usual."""
    drop: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.vectors <= 32:
            raise ValueError(f"vectors (={self.vectors}) must be between 1 and 32: 1 to 8 are usual")


def preset_own() -> tuple[EmbeddingRecipe, LoopConfig]:
    """A word of the bundled model, or of another of ours.

    `sfumato train embedding --data DIR --word my-style --like drawing --prompt "{} my-style" --out runs/my-word`
    """
    return EmbeddingRecipe(flip=True), LoopConfig(
        images=12_000, batch_size=32, lr=5e-3, betas=(0.9, 0.999), warmup=1_000, decay=0.5, ema=0.02, weight_decay=0.0, save_every=4_000,
        sample_every=4_000, log_every=1_600,
    )  # fmt: skip


def preset_stable() -> tuple[EmbeddingRecipe, LoopConfig]:
    """A word of a checkpoint of Stable Diffusion: 3,000 steps of one picture.

    `sfumato train embedding --base sd15.safetensors --data DIR --word my-dog --like dog --prompt "a photo of my-dog" --out runs/my-word`
    """
    return EmbeddingRecipe(base="", checkpointing=True), LoopConfig(
        images=3_000, batch_size=1, lr=5e-3, betas=(0.9, 0.999), warmup=100, decay=0.3, ema=0.02, weight_decay=0.0, save_every=1_000,
        sample_every=1_000, log_every=10,
    )  # fmt: skip


PRESETS = {"own": preset_own, "stable": preset_stable}


class Word(nn.Module):
    """Vectors "n d" for each of some text encoders. Called with a function and its arguments it runs that with the word known to them."""

    def __init__(self, name: str, vectors: list[Tensor], listeners: Callable[[], list[Any]]) -> None:
        super().__init__()
        self.name, self.listeners = name, listeners  # a function, so that a copy (averages) does not copy what hears
        self.vectors = nn.ParameterList(nn.Parameter(v.clone()) for v in vectors)

    def forward(self, run: Callable[..., Any], *args: Any) -> Any:
        for listener, vectors in zip(self.listeners(), self.vectors, strict=True):
            listener.learned = {self.name: vectors}
        return run(*args)


class EmbeddingTask(Tuning):
    """See `Tuning`."""

    kind = "embedding"
    recipe: EmbeddingRecipe
    hears_anew = True

    def __init__(self, recipe: EmbeddingRecipe, seed: int, batch: int, run: Path, device: torch.device | str = "cpu", bf16: bool = False) -> None:
        if not recipe.word.strip():
            raise ValueError("word (='') must name what is learned, as prompts will say it: --word my-dog")
        super().__init__(recipe, seed, batch, run, device, bf16)
        listeners = list(self.model.listeners)
        first = [known_vectors(e, recipe.like, recipe.vectors) for e in listeners]
        self.networks = {"word": Word(recipe.word, first, lambda: listeners)}
        self.phases = [Phase("word", ("word",), self.loss)]

    def _caption(self, entry: Entry) -> str:
        said, word = super()._caption(entry), self.recipe.word
        if word.lower() not in said.lower():
            raise ValueError(f"word (={word!r}) must be in every caption, and is not in {said!r}: --prompt '{{}} {word}' puts it there")
        return said

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        return networks["word"](self.loss_of, self.model.denoiser, batch)

    def used(self, networks: dict[str, nn.Module]) -> LatentDiffusion:
        networks["word"](lambda: None)
        return self.model

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        vectors = [v.detach() for v in networks["word"].vectors]  # type: ignore[union-attr]
        names = [self.recipe.word] if len(vectors) == 1 else [FIRST, SECONDS]
        return dict(zip(names, vectors, strict=True)), {"kind": "embedding", "word": self.recipe.word} | self.about()


def known_vectors(listener: Any, words: str, count: int) -> Tensor:
    """The vectors of words that a text encoder knows, repeated until they are as many as wanted; small random ones where no word is named."""
    table, ids = listener.known(words)
    if not ids:
        spread = float(table.std())
        return torch.randn(count, table.shape[1], generator=torch.Generator().manual_seed(0)).to(table) * spread
    return table[torch.tensor([ids[i % len(ids)] for i in range(count)], device=table.device)].detach()


def train(recipe: EmbeddingRecipe, loop: LoopConfig, out: Path, *, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, the word in the run folder `out`."""
    return tune(EmbeddingTask, recipe, loop, out, stop_at)
