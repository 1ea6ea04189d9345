"""Trains a denoiser over a codec's latents, conditioned on text, style or label (arXiv 2112.10752 on the rectified flow of 2209.03003).

Latents are encoded once, several augmented pictures per drawing, and captions are made anew each time from what those pictures show.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato import zoo
from sfumato.codecs.autoencoder import Autoencoder
from sfumato.core.config import to_json
from sfumato.core.images import grid, to_pil
from sfumato.core.rng import derive, torch_rng
from sfumato.data.latents import cached_latents
from sfumato.data.shards import same_source
from sfumato.data.subjects import EMOJI
from sfumato.diffusion.dit import DiTConfig
from sfumato.diffusion.guidance import cfg, guided
from sfumato.diffusion.objective import ObjectiveConfig, draw_t, loss
from sfumato.diffusion.path import PathConfig, make_path, timesteps
from sfumato.diffusion.precond import Precond, check_prediction
from sfumato.diffusion.samplers import sample_heun
from sfumato.diffusion.unet import UNetConfig
from sfumato.train.conditioned import CLOSE, STEADY, Conditioned, Taught
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer, main_first, settled, starting


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe(Taught):
    """What decides what a denoiser learns."""

    part: ClassVar[str] = "denoiser"
    kind: str = "train-diffusion"
    denoiser: DiTConfig | UNetConfig = field(default_factory=DiTConfig)
    path: PathConfig = field(default_factory=PathConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        check_prediction(self.objective.prediction, make_path(self.path))
        super().__post_init__()


def preset_bundled() -> tuple[DiffusionRecipe, LoopConfig]:
    """The denoiser of the bundled model: a DiT (arXiv 2212.09748) of 11.8 M parameters over 16 tokens, with a memory of 518 concepts.

    On two cores with AVX512-bf16 some 300 images/s, after three minutes of encoding.

    `sfumato train diffusion --preset bundled --codec runs/codec --text runs/text --out runs/diffusion --loop.compile`
    """
    denoiser = DiTConfig(width=320, heads=5, modulation="block")
    return DiffusionRecipe(denoiser=denoiser, objective=ObjectiveConfig(P_mean=0.6), memory=True), LoopConfig(
        images=1_000_000, batch_size=128, lr=6e-4, warmup=20_000, dtype="auto", log_every=25_600, save_every=100_096, sample_every=100_096
    )  # fmt: skip


def preset_sharpen() -> tuple[DiffusionRecipe, LoopConfig]:
    """The second part of the bundled denoiser's training, from the run of `--preset bundled` on: more of the clean times, where details are drawn.

    `sfumato train diffusion --preset sharpen --codec runs/codec --text runs/text --out runs/sharp --loop.compile`
    """
    recipe, loop = preset_bundled()
    objective = ObjectiveConfig(P_mean=-0.2, P_std=1.2)
    return replace(recipe, objective=objective, init="runs/diffusion"), replace(loop, images=400_000, lr=4e-4, warmup=5_000, decay=1.0)


def preset_settle() -> tuple[DiffusionRecipe, LoopConfig]:
    """The third part of the bundled denoiser's training, from the run of `--preset sharpen` on: mostly the drawings as they are.

    `sfumato train diffusion --preset settle --codec runs/codec --text runs/text --out runs/settle --loop.compile`
    """
    recipe, loop = preset_sharpen()
    recipe = replace(recipe, objective=ObjectiveConfig(P_mean=0.0, P_std=1.2), variety=STEADY, init="runs/sharp")
    return recipe, replace(loop, images=1_400_000, lr=5e-4)


def preset_unet() -> tuple[DiffusionRecipe, LoopConfig]:
    """A small denoiser of the kind of Stable Diffusion (arXiv 2112.10752), 9 M parameters that predict noise: to try what is for large ones.

    `sfumato train diffusion --preset unet --codec emoji --text emoji --out runs/unet`
    """
    recipe, loop = preset_bundled()
    unet = UNetConfig(channels=16, out_channels=16, widths=(64, 128, 192), blocks=1, depths=(1, 1, 0), heads=(2, 4, 6), context=256)
    objective, path = ObjectiveConfig(prediction="eps"), PathConfig(kind="vp-linear")
    recipe = replace(recipe, denoiser=unet, path=path, objective=objective, variety=STEADY, memory=False)
    return recipe, replace(loop, images=400_000, batch_size=64, lr=5e-4, warmup=10_000, dtype="fp32", save_every=20_480, sample_every=40_960)


def preset_own() -> tuple[DiffusionRecipe, LoopConfig]:
    """A denoiser of one's own pictures, begun from the bundled one.

    `sfumato train diffusion --preset own --data DIR --codec runs/own-codec --text emoji --out runs/own`
    """
    recipe, loop = preset_bundled()
    recipe = replace(recipe, objective=ObjectiveConfig(P_mean=0.0, P_std=1.2), variety=CLOSE, each=8, labels="auto", init="emoji")
    return recipe, replace(loop, images=60_000, lr=4e-4, warmup=3_000, decay=0.5, log_every=6_400, save_every=15_360, sample_every=15_360)


def preset_smoke() -> tuple[DiffusionRecipe, LoopConfig]:
    """A denoiser that trains in seconds, to try the tools."""
    denoiser = DiTConfig(channels=4, patch=2, width=32, depth=2, heads=2, text_width=32)
    return DiffusionRecipe(denoiser=denoiser, each=2, limit=12), LoopConfig(
        images=640, batch_size=32, warmup=64, save_every=320, sample_every=320, log_every=64
    )  # fmt: skip


PRESETS = {
    "bundled": preset_bundled, "sharpen": preset_sharpen, "settle": preset_settle, "unet": preset_unet, "own": preset_own, "smoke": preset_smoke,
}  # fmt: skip


class DiffusionTask(Conditioned):
    """See `sfumato.train.loop.Task`."""

    kind = "diffusion"

    def __init__(
        self, recipe: DiffusionRecipe, seed: int, codec: Path, text: Path, run: Path, device: torch.device | str = "cpu", bf16: bool = False
    ) -> None:
        super().__init__(recipe, seed, codec, text, run, device, bf16)
        alive = (self.codec.latent_std > 0).to(self.device)
        self.live = None if bool(alive.all()) else alive
        self.path = make_path(recipe.path)
        self.latents = cached_latents(run / "latents.npy", self.encode, len(self.shown.pixels) * recipe.each, self.made_from())
        self._held_out = self._validation()
        torch.manual_seed(seed)
        self.networks: dict[str, nn.Module] = {"denoiser": self.begun(zoo.make(to_json(self.net)))}
        self.phases = [Phase("denoiser", ("denoiser",), self.loss)]

    def _load_codec(self, pack: Path) -> tuple[Autoencoder, dict[str, Any]]:
        codec, meta = super()._load_codec(pack)
        if codec.spec.latent_channels != self.recipe.denoiser.channels:
            raise ValueError(
                f"denoiser.channels (={self.recipe.denoiser.channels}) must be the codec's latent channels (={codec.spec.latent_channels})"
            )
        return codec, meta

    @torch.no_grad()
    def encode(self, indices: np.ndarray) -> Tensor:
        """Latents "b c h w" of augmented pictures."""
        mean = self.codec.encode(self.pictures(indices)).mean
        assert mean is not None
        return mean

    def _validation(self) -> dict[str, Any]:
        """Pictures that no training sees, as they are, with fixed times and noise: a deterministic validation loss."""
        exact = self.shown.validation()
        with torch.no_grad():
            parts = [self.codec.encode(self.as_seen(p)).mean.cpu() for p in exact.pixels.split(64)]  # type: ignore[union-attr]
        x0, n = torch.cat(parts), len(exact.pixels)
        noise = torch.stack([torch.randn(x0.shape[1:], generator=torch_rng(self.seed, "validation/noise", i)) for i in range(n)])
        t = (torch.arange(n) + 0.5) / n
        t = t[torch.randperm(n, generator=torch_rng(self.seed, "validation/t"))]
        label = torch.from_numpy(exact.label)
        return {"x0": x0, "noise": noise, "t": t, "captions": exact.captions, "style": self._hot(exact.style), "label": label}

    # --- training -----------------------------------------------------------------------------------------------------------------------------

    def batch(self, positions: np.ndarray) -> Batch:
        """Latents, noise and times, and what is said of the pictures."""
        indices, u, batch = self.said(positions)
        x0 = self.latents[indices].float()
        noise = torch.stack([torch.randn(x0.shape[1:], generator=torch_rng(self.seed, "train/noise", int(p))) for p in positions])
        return {"x0": x0, "noise": noise, "t": draw_t(self.recipe.objective, u[:, 0].clamp(1e-6, 1 - 1e-6), u[:, 1])} | batch

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        cond = self.heard(batch)
        return loss(networks["denoiser"], batch["x0"], batch["noise"], batch["t"], cond, self.path, self.recipe.objective, live=self.live)

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """The preview prompts in fixed styles with fixed noise, two of each."""
        net = networks["denoiser"]
        cond, nothing = self.preview()
        denoise = guided(cfg(Precond(net, self.recipe.objective.prediction, self.path), cond, nothing, 3.0))
        noise = torch.stack(
            [torch.randn(self.latents.shape[1:], generator=torch_rng(derive(self.seed, "preview"), "noise", i)) for i in range(len(cond.style))]
        )
        z = [s.x for s in sample_heun(denoise, noise.to(self.device), timesteps(self.path, 12), self.path)][-1]
        return grid(to_pil(self.codec.decode(z)), columns=8)

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        v, net = self._held_out, networks["denoiser"]
        total = 0.0
        for start in range(0, len(v["x0"]), 128):
            rows = slice(start, start + 128)
            x0, noise, t = (v[k][rows].to(self.device) for k in ("x0", "noise", "t"))
            cond = self.cond(v["captions"][rows], v["style"][rows], v["label"][rows])
            value, _ = loss(net, x0, noise, t, cond, self.path, self.recipe.objective, live=self.live)
            total += float(value) * len(x0)
        validation = total / len(v["x0"])
        return {"validation_loss": validation, "score": -validation}

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        meta = {"kind": "latent-diffusion", "path": to_json(self.recipe.path), "prediction": self.recipe.objective.prediction}
        return self.packed({"denoiser": networks["denoiser"]}, meta)


def train(recipe: DiffusionRecipe, loop: LoopConfig, out: Path, *, codec: Path, text: Path, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, the denoiser in the run folder `out`; `codec` and `text` are runs or packs, copied in on the first start."""
    loop = settled(loop, out)
    with starting(out):
        if recipe.data != EMOJI:
            same_source(Path(out), recipe.data)
        task = main_first(loop, lambda device: DiffusionTask(recipe, loop.seed, Path(codec), Path(text), Path(out), device, loop.dtype == "bf16"))
        trainer = Trainer(task, loop, out, recipe)
    trainer.train(stop_at=stop_at)
    return trainer
