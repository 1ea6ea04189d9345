"""What a latent diffusion pack can do: draw pictures from a request."""

from __future__ import annotations

import platform
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import sfumato
from sfumato.codecs.autoencoder import Autoencoder
from sfumato.core.config import nearest
from sfumato.core.images import png_bytes, to_pil
from sfumato.core.request import METADATA_KEY, GenerateRequest, metadata_text, parameters_text, style_weights
from sfumato.core.rng import numpy_rng, torch_rng
from sfumato.core.seams import Cond, Denoise
from sfumato.diffusion.dit import silent, without_style, without_text
from sfumato.diffusion.guidance import cfg, guided, text_style
from sfumato.diffusion.path import Path, timesteps
from sfumato.diffusion.precond import Precond
from sfumato.diffusion.samplers import sample_ddim, sampler
from sfumato.text.encoder import TextEncoder
from sfumato.text.words import normalise, unknown_words

CHUNK = 16  # pictures drawn together
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Picture:
    """One drawn picture with everything needed to draw it again."""

    image: Image.Image
    request: GenerateRequest
    index: int
    record: dict[str, Any]
    parameters: str

    @property
    def seed(self) -> int:
        return self.record["seed"]

    def png(self) -> bytes:
        """The picture as PNG with its request inside."""
        return png_bytes(self.image, {METADATA_KEY: metadata_text(self.record), "parameters": self.parameters})


@dataclass(frozen=True)
class LatentDiffusion:
    """Codec, text encoder and denoiser of one pack. Made by `sfumato.load`."""

    codec: Autoencoder
    text: TextEncoder | None
    denoiser: nn.Module
    path: Path
    meta: dict[str, Any]
    name: str
    device: torch.device
    dtype: torch.dtype

    @property
    def styles(self) -> list[str]:
        return self.meta["styles"]

    @property
    def size(self) -> int:
        return self.meta["size"]

    @cached_property
    def words(self) -> set[str]:
        """Every word that some concept of this model is known by."""
        entries = (w for entry in self.meta["words"].values() for key, words in entry.items() if key != "group" for w in words)
        return {normalise(w) for w in entries} - {""}

    def unknown(self, prompt: str) -> list[tuple[str, list[str]]]:
        """Words of a prompt that this model never learned, each with its nearest known words."""
        return unknown_words(prompt, self.words, filler=self.meta["filler"])

    def check(self, request: GenerateRequest) -> None:
        """Raises ValueError for what this model cannot do."""
        if request.style is not None:
            style_weights(request.style, self.styles)
        labels = self.meta["labels"]
        if request.label is not None and request.label not in labels:
            allowed = f"one of {', '.join(labels)}{nearest(request.label, labels)}" if labels else "left out: this model has no labels"
            raise ValueError(f"label (={request.label!r}) must be {allowed}")
        if request.size not in (None, self.size):
            raise ValueError(f"size (={request.size}) must be {self.size}: this model draws {self.size} x {self.size} pixels")
        sampler(request.sampler)
        if self.text is None and (request.prompt or request.negative):
            raise ValueError(f"prompt (={request.prompt or request.negative!r}) must be left out: this model was trained without captions")

    def generate(
        self, prompt: str | None = None, *, progress: Progress | None = None, request: GenerateRequest | None = None, **options: Any
    ) -> list[Image.Image]:
        """PIL images for a prompt and the fields of GenerateRequest as options; RGBA where the model draws transparency."""
        request = request or GenerateRequest(prompt=prompt, **options)
        return [p.image for p in self.pictures(request, progress=progress)]

    def pictures(self, request: GenerateRequest, *, progress: Progress | None = None, only: int | None = None) -> Iterator[Picture]:
        """Draws a request, CHUNK pictures at a time. `only` gives one picture of it, drawn in the same company, so byte for byte the same.

        progress(done, total) counts network steps.
        """
        self.check(request)
        if request.seed is None:
            request = replace(request, seed=secrets.randbelow(2**31))
        chunks = [range(s, min(s + CHUNK, request.count)) for s in range(0, request.count, CHUNK)]
        if only is not None:
            chunks = [c for c in chunks if only in c]
        total, done = len(chunks) * request.steps, 0
        for chunk in chunks:
            seeds = [request.seed + i for i in chunk]  # type: ignore[operator]
            styles = [self._style_of(request, s) for s in seeds]
            x = None
            for step in self.latents(request, seeds, styles):
                x, done = step, done + 1
                if progress:
                    progress(done, total)
            assert x is not None
            images = to_pil(self.decode(x))
            for i, seed, style, image in zip(chunk, seeds, styles, images, strict=True):
                if only is None or i == only:
                    yield self._picture(image, request, i, seed, style)

    # --- the way from noise to latents --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, request: GenerateRequest, seeds: list[int], styles: list[dict[str, float] | None]) -> Iterator[Tensor]:
        """The latents after each step, for these seeds."""
        shape = (self.codec.spec.latent_channels, *[self.size // self.codec.spec.factor] * 2)
        x = torch.stack([torch.randn(shape, generator=torch_rng(s, "generate/noise")) for s in seeds]).to(self.device)
        streams = [torch_rng(s, "generate/steps") for s in seeds]

        def noise(_: int) -> Tensor:
            return torch.stack([torch.randn(shape, generator=g) for g in streams]).to(self.device)

        function = sampler(request.sampler).function
        extra = {"eta": request.eta} if function is sample_ddim and request.eta else {}
        ts = timesteps(self.path, request.steps)
        for step in function(self._denoise(request, styles), x, ts, self.path, noise=noise, **extra):
            yield step.x

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents -> images "b c h w" in [-1, 1]."""
        x = self.codec.decode(z.float())
        if not bool(torch.isfinite(x).all()):
            raise ValueError("the model drew values that are not finite: use --dtype fp32, or fewer extremes of guidance and steps")
        return x

    def _denoise(self, request: GenerateRequest, styles: list[dict[str, float] | None]) -> Denoise:
        n = len(styles)
        cond = self._cond(request, request.prompt, styles)
        everything = torch.ones(n, dtype=torch.bool, device=self.device)
        predict = Precond(self.denoiser, self.meta["prediction"], self.path, None if self.dtype == torch.float32 else self.dtype)
        empty = self._cond(request, request.negative, styles) if request.negative else silent(cond, everything)
        if request.style_guidance is None:
            return guided(cfg(predict, cond, empty, request.guidance, request.guidance_interval))
        neither = without_style(empty, everything)
        return guided(text_style(predict, cond, empty, neither, request.guidance, request.style_guidance))

    def _cond(self, request: GenerateRequest, prompt: str | None, styles: list[dict[str, float] | None]) -> Cond:
        n = len(styles)
        weights = torch.tensor([[(s or {}).get(name, 0.0) for name in self.styles] for s in styles]).to(self.device)
        cond = Cond(style=weights if self.styles else None)
        if self.meta["labels"]:
            index = self.meta["labels"].index(request.label) if request.label and prompt == request.prompt else -1
            cond = replace(cond, label=torch.full((n,), index, device=self.device))
        if self.text is not None:
            states, mask, pooled = (t.expand(n, *t.shape[1:]) for t in self.text.encode([prompt or ""]))
            cond = replace(cond, text=states, mask=mask, pooled=pooled)
        return cond if prompt else without_text(cond, torch.ones(n, dtype=torch.bool, device=self.device))

    def _style_of(self, request: GenerateRequest, seed: int) -> dict[str, float] | None:
        """The asked style, or a mixture drawn from the seed: mostly one style, sometimes two or three."""
        if not self.styles:
            return None
        if request.style is not None:
            return style_weights(request.style, self.styles)
        shares = numpy_rng(seed, "generate/style").dirichlet([0.25] * len(self.styles)).round(2)
        return style_weights(",".join(f"{n}:{w}" for n, w in zip(self.styles, shares, strict=True) if w > 0.05), self.styles)

    def _picture(self, image: Image.Image, request: GenerateRequest, index: int, seed: int, style: dict[str, float] | None) -> Picture:
        record = {
            "version": sfumato.__version__,
            "request": request,
            "index": index,
            "seed": seed,
            "style": style,
            "model": {"name": self.name, "hash": self.meta["hash"]},
            "engine": f"torch {torch.__version__}",
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        }
        parameters = parameters_text(request, seed=seed, size=self.size, model=self.name, model_hash=self.meta["hash"], version=sfumato.__version__)
        return Picture(image, request, index, record, parameters)
