"""Trains a LoRA (arXiv 2106.09685): low-rank changes of chosen layers of a model that draws by diffusion, on a few pictures of one's own.

What comes of it is one file, which other programs load too where the model is a checkpoint of Stable Diffusion.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.convert.kohya import MOST_ALONG, Lora, lora_tensors
from sfumato.core.pack import save_pack
from sfumato.core.request import GenerateRequest
from sfumato.core.rng import derive, numpy_rng
from sfumato.nn.lora import LowRank, chosen
from sfumato.pipelines.generate import Begun, Row
from sfumato.pipelines.latent_diffusion import LatentDiffusion
from sfumato.pipelines.stable_diffusion import StableDiffusion
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer
from sfumato.train.tuned import Tuned, Tuning, tune

EVERY = 2  # steps from one of the decoder to the next
AGAIN, STEPS = (2, 3, 4), 10  # steps, of so many, by which pictures are drawn again for that


@dataclass(frozen=True, kw_only=True)
class LoraRecipe(Tuned):
    """What decides what a LoRA learns."""

    kind: str = "train-lora"
    rank: int = 16
    """Of the changes: more can say more, and needs more of a file."""
    alpha: float = 0.0
    """Changes count alpha / rank times, but those of the decoder; 0: once."""
    layers: str = "attention"
    """Of the denoiser: attention, linear (1x1 convolutions too), all (with convolutions), or a regular expression on their names."""
    text: bool = False
    """The attention of the text encoder learns, too."""
    until: float = 1.0
    """The time (1 noise, 0 clean) from which on it is at work: below 1 it learns how things are drawn and not which. Other programs know nothing
    of that."""

    along: float = 1.0
    """With until: how many times as far as it learned pictures go along what it changes; above 1 is more of the style and less of the thing."""

    decoder: int = 0
    """Of our own models: rank of what their decoder learns, which is how to paint what the LoRA draws. Pictures are drawn again for that, from
    themselves with some noise; 0: nothing."""
    decoder_from: float = 0.4
    """The share of the training from which on the decoder learns: a LoRA that draws something comes first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.along <= MOST_ALONG:
            raise ValueError(f"along (={self.along}) must be above 0 and at most {MOST_ALONG:g}: 1 is as it learned, 1.5 more of the style")
        if self.decoder < 0:
            raise ValueError(f"decoder (={self.decoder}) must be at least 0: the rank of what the decoder learns, 0 leaves it alone")
        if not 0 <= self.decoder_from < 1:
            raise ValueError(f"decoder_from (={self.decoder_from}) must be at least 0 and below 1: the share of the training before it learns")
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
    recipe = LoraRecipe(layers="linear", rank=64, until=0.3, along=1.75, decoder=16, each=100, flip=True, style="auto")
    return recipe, LoopConfig(
        images=16_000, batch_size=32, lr=3e-3, warmup=320, decay=0.5, ema=0.02, weight_decay=0.0, save_every=8_000, sample_every=8_000,
        log_every=1_600,
    )  # fmt: skip


def preset_subject() -> tuple[LoraRecipe, LoopConfig]:
    """What something looks like, in all styles of the bundled model or another of ours, from five pictures or more.

    `sfumato train lora --preset subject --data DIR --prompt "my-dog" --out runs/my-dog`
    """
    recipe, loop = preset_style()
    return replace(recipe, until=1.0, along=1.0, decoder=0, style="any", rank=16, layers="attention"), replace(loop, images=8_000, lr=5e-4)


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
        self.hears_anew, self.until, self.batch_size = recipe.text, recipe.until, batch
        self.networks = {"lora": LowRank(layers, recipe.rank, recipe.alpha or None)}
        self.phases = [Phase("lora", ("lora",), self.loss)]
        if recipe.decoder:
            decoder = {"decoder": chosen(self.model.codec.decoder, "all")}  # type: ignore[arg-type]
            self.networks["decoder"] = LowRank(decoder, recipe.decoder)
            self.phases.append(Phase("decoder", ("decoder",), self.painted, every=EVERY, begins=recipe.decoder_from))

    def _base(self, bf16: bool) -> LatentDiffusion:
        model = super()._base(bf16)
        if self.recipe.decoder and isinstance(model, StableDiffusion):
            raise ValueError(f"decoder (={self.recipe.decoder}) must be 0 for checkpoints of Stable Diffusion: only our own models know such changes")
        return model

    @property
    def complete_from(self) -> float:
        """The progress from which on all that is learned learns."""
        return self.recipe.decoder_from if self.recipe.decoder else 0.0

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        return networks["lora"](self.loss_of, self.model.denoiser, batch)

    def painted(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The decoder's loss: what the LoRA draws of pictures with some noise, painted, is to be the pictures. In latents it cannot be told how it
        errs; here it is seen, and how to paint over it is learned from few pictures: of each batch a half.
        """
        some = [i for i, (position, _, _) in enumerate(batch["versions"]) if position // 2 % 2 == 0]
        if not some:  # in this part of a batch, but other processes wait for a gradient
            return networks["decoder"](lambda: 0.0 * torch.stack([p.sum() for p in self.networks["decoder"].parameters()]).sum()), {}
        x = networks["decoder"](self.model.codec.decode, self._drawn_again(batch, some))
        self.networks["decoder"].rest()  # type: ignore[operator]
        pictures = torch.cat([self.pixels(self.items[row], version) for _, row, version in (batch["versions"][i] for i in some)])
        off = (x - pictures.to(x)).abs().flatten(1).mean(1) * batch["weight"][some].to(x)
        return off.sum() / (len(batch["versions"]) / 2), {}

    def _drawn_again(self, batch: Batch, some: list[int]) -> Tensor:
        """Latents of some pictures of a batch, noised and drawn from there as they will be with the file."""
        number = batch["versions"][0][0] // self.batch_size
        steps = AGAIN[int(numpy_rng(self.seed, "train/again", number).integers(len(AGAIN)))]
        with self._file(self.networks) as file:
            asked = self.model.complete(GenerateRequest(lora=(file,), steps=STEPS, strength=steps / STEPS, size=self.model.size))
            seeds = [derive(self.seed, "train/again", batch["versions"][i][0]) >> 1 for i in some]
            said = [replace(asked, prompt=batch["captions"][i]) for i in some]
            rows = [Row(one, k, seed, self.model._style_of(one, seed)) for k, (one, seed) in enumerate(zip(said, seeds, strict=True))]
            x0 = batch["x0"][some]
            with self.model.changed(rows[0].request):
                *_, z = self.model.latents(rows, Begun(x0, x0, None, ""))
        return z

    def used(self, networks: dict[str, nn.Module]) -> LatentDiffusion:
        for network in networks.values():
            network(lambda: None)
        return self.model

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """See `Tuning`; what comes late is drawn by its file, as it will be."""
        if self.until == 1:
            return super().samples(networks)
        with self._file(networks) as file:
            return self.drawn(self.model, lora=(file,))

    @contextmanager
    def _file(self, networks: dict[str, nn.Module]) -> Iterator[str]:
        """A file of what was learned, beside a model that is as it was."""
        for network in self.networks.values():
            network.rest()  # type: ignore[operator]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "lora.safetensors"
            save_pack(file, *self.pack(networks))
            yield str(file)

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        r, changes = self.recipe, {k: v for network in networks.values() for k, v in network.deltas().items()}  # type: ignore[operator]
        said = {"kind": "lora", "ss_network_module": "networks.lora", "ss_network_dim": r.rank, "ss_network_alpha": r.alpha or r.rank}
        late = {"until": r.until, "along": r.along} if r.until < 1 else {}
        return lora_tensors(Lora(changes, {})), said | self.about() | late


def train(recipe: LoraRecipe, loop: LoopConfig, out: Path, *, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, the LoRA in the run folder `out`."""
    return tune(LoraTask, recipe, loop, out, stop_at)
