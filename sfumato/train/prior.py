"""Trains a prior over the codes of a codec, conditioned on text, style or label: written one after the other (gpt) or filled in (maskgit).

Pictures become codes once, several augmented ones per drawing; captions are made anew each time from what those pictures show.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.codecs.autoencoder import Autoencoder
from sfumato.core.images import grid, to_pil
from sfumato.core.rng import numpy_rng, torch_rng
from sfumato.data.latents import cached_latents
from sfumato.data.shards import same_source
from sfumato.data.subjects import EMOJI
from sfumato.pipelines.codes import drawn
from sfumato.priors.gpt import gpt_loss
from sfumato.priors.maskgit import drawn_mask, maskgit_loss
from sfumato.priors.tokens import Vocabulary, factorised
from sfumato.priors.transformer import MASKED, Prior, PriorConfig
from sfumato.train.conditioned import CLOSE, Conditioned, Taught
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer, main_first, settled, starting

GUIDANCE = 2.0  # of the sample grids


@dataclass(frozen=True, kw_only=True)
class PriorRecipe(Taught):
    """What decides what a prior learns; its vocabulary is the codec's, but for the digits that a code is written as."""

    part: ClassVar[str] = "prior"
    kind: str = "train-prior"
    prior: PriorConfig = field(default_factory=PriorConfig)


def preset_bundled() -> tuple[PriorRecipe, LoopConfig]:
    """A prior over the codes of the embedded drawings: 11 M parameters, 64 codes a picture, with a memory of 518 concepts.

    `sfumato train prior --kind gpt --codec runs/vqgan --text emoji --out runs/gpt`
    """
    return PriorRecipe(memory=True), LoopConfig(
        images=600_000, batch_size=64, lr=6e-4, warmup=10_000, dtype="auto", log_every=12_800, save_every=64_000, sample_every=64_000,
        weight_decay=0.05,
    )  # fmt: skip


def preset_own() -> tuple[PriorRecipe, LoopConfig]:
    """A prior over the codes of one's own pictures: 5 M parameters.

    `sfumato train prior --kind maskgit --data DIR --codec runs/vqgan --text emoji --out runs/own`
    """
    recipe, loop = preset_bundled()
    small = replace(recipe.prior, way="maskgit", width=256, depth=6, heads=4)
    recipe = replace(recipe, prior=small, variety=CLOSE, each=8, labels="auto")
    return recipe, replace(loop, images=100_000, batch_size=16, warmup=3_000, decay=0.5, log_every=6_400, save_every=16_000, sample_every=16_000)


def preset_smoke() -> tuple[PriorRecipe, LoopConfig]:
    """A prior that trains in seconds, to try the tools."""
    small = PriorConfig(width=32, depth=2, heads=2, text_width=32)
    return PriorRecipe(prior=small, each=2, limit=12), LoopConfig(
        images=640, batch_size=32, warmup=64, save_every=320, sample_every=320, log_every=64
    )  # fmt: skip


PRESETS = {"bundled": preset_bundled, "own": preset_own, "smoke": preset_smoke}


class PriorTask(Conditioned):
    """See `sfumato.train.loop.Task`."""

    kind = "prior"
    measures = False
    of_codes = ("tokens", "heads")

    def __init__(
        self, recipe: PriorRecipe, seed: int, codec: Path, text: Path, run: Path, device: torch.device | str = "cpu", bf16: bool = False
    ) -> None:
        super().__init__(recipe, seed, codec, text, run, device, bf16)
        spec, side = self.codec.spec, self.size // self.codec.spec.factor
        self.vocabulary = Vocabulary(
            codes=spec.codebook_size, levels=spec.levels, grid=(side, side), digits=recipe.prior.vocabulary.digits or factorised(spec.codebook_size)
        )
        self.net = replace(self.net, vocabulary=self.vocabulary)
        self.codes = cached_latents(run / "codes.npy", self.encode, len(self.shown.pixels) * recipe.each, self.made_from())
        self._held_out = self._validation()
        torch.manual_seed(seed)
        self.networks: dict[str, nn.Module] = {"prior": self.begun(Prior(self.net))}
        self.phases = [Phase("prior", ("prior",), self.loss)]

    def _load_codec(self, pack: Path) -> tuple[Autoencoder, dict[str, Any]]:
        codec, meta = super()._load_codec(pack)
        if not codec.config.discrete:
            raise ValueError(
                f"{pack} has a {codec.config.bottleneck.kind} codec, without codes: name a run of --preset vqvae or vqgan, or train diffusion"
            )
        return codec, meta

    @torch.no_grad()
    def encode(self, indices: np.ndarray) -> Tensor:
        """Tokens "b n" of augmented pictures."""
        return self.tokens(self.pictures(indices))

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens "b n" of pictures."""
        return self.vocabulary.tokens(self.codec.encode(x).indices)  # type: ignore[arg-type]

    def _validation(self) -> dict[str, Any]:
        """Pictures that no training sees, as they are, with fixed masks: a deterministic validation loss."""
        exact = self.shown.validation()
        with torch.no_grad():
            tokens = torch.cat([self.tokens(self.as_seen(p)).cpu() for p in exact.pixels.split(64)])
        masks = [drawn_mask(numpy_rng(self.seed, "validation/mask", i), tokens.shape[1]) for i in range(len(tokens))]
        label = torch.from_numpy(exact.label)
        return {
            "tokens": tokens,
            "lost": torch.from_numpy(np.stack(masks)),
            "captions": exact.captions,
            "style": self._hot(exact.style),
            "label": label,
        }

    # --- training -----------------------------------------------------------------------------------------------------------------------------------

    def batch(self, positions: np.ndarray) -> Batch:
        """Tokens, which of them are lost, and what is said of the pictures."""
        indices, _, batch = self.said(positions)
        n = self.vocabulary.length
        lost = (
            [drawn_mask(numpy_rng(self.seed, "train/mask", int(p)), n) for p in positions]
            if self.net.way == "maskgit"
            else [np.zeros(n, bool)] * len(positions)
        )
        return {"tokens": self.codes[indices].long(), "lost": torch.from_numpy(np.stack(lost))} | batch

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        cond = self.heard(batch)
        if self.net.way == "gpt":
            return gpt_loss(networks["prior"], batch["tokens"], cond)
        return maskgit_loss(networks["prior"], batch["tokens"], batch["lost"], cond)

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """The preview prompts in fixed styles with fixed noise, two of each."""
        net: Any = networks["prior"]
        cond, nothing = self.preview()
        terms, rows, n = [(cond, GUIDANCE), (nothing, 1 - GUIDANCE)], len(cond.style), self.vocabulary.length  # type: ignore[arg-type]
        generators = [torch_rng(self.seed, "preview/codes", i) for i in range(rows)]

        def race(*shape: int) -> Tensor:
            return torch.stack([torch.empty(shape).exponential_(generator=g) for g in generators]).to(self.device)

        *_, tokens = drawn(net, terms, torch.full((rows, n), MASKED, device=self.device), race)
        return grid(to_pil(self.codec.decode_indices(self.vocabulary.indices(tokens))), columns=8)

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        v, net = self._held_out, networks["prior"]
        total = right = weight = 0.0
        for start in range(0, len(v["tokens"]), 128):
            rows = slice(start, start + 128)
            tokens, lost = v["tokens"][rows].to(self.device), v["lost"][rows].to(self.device)
            cond = self.cond(v["captions"][rows], v["style"][rows], v["label"][rows])
            gpt = self.net.way == "gpt"
            value, found = gpt_loss(net, tokens, cond) if gpt else maskgit_loss(net, tokens, lost, cond)
            count = tokens.numel() if gpt else int(lost.sum())
            total, right, weight = total + float(value) * count, right + float(found["right"]) * count, weight + count
        return {"validation_loss": total / weight, "validation_right": right / weight, "score": -total / weight}

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.packed({"prior": networks["prior"]}, {"kind": "codes"})


def train(recipe: PriorRecipe, loop: LoopConfig, out: Path, *, codec: Path, text: Path, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, the prior in the run folder `out`; `codec` and `text` are runs or packs, copied in on the first start."""
    loop = settled(loop, out)
    with starting(out):
        if recipe.data != EMOJI:
            same_source(Path(out), recipe.data)
        task = main_first(loop, lambda device: PriorTask(recipe, loop.seed, Path(codec), Path(text), Path(out), device, loop.dtype == "bf16"))
        trainer = Trainer(task, loop, out, recipe)
    trainer.train(stop_at=stop_at)
    return trainer
