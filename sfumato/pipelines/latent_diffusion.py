"""Drawing from noise: a denoiser over the latents of a codec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.core.request import GenerateRequest
from sfumato.core.rng import torch_rng
from sfumato.core.seams import Denoise
from sfumato.diffusion.guidance import Post, cfg, guided, inpaint, text_style
from sfumato.diffusion.path import Path, timesteps
from sfumato.diffusion.precond import Precond
from sfumato.diffusion.samplers import sample_ddim, sampler
from sfumato.pipelines.generate import Begun, Model, Row, slerp

USUAL_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class LatentDiffusion(Model):
    """See `Model`."""

    denoiser: nn.Module
    path: Path
    way: ClassVar[str] = "diffusion"
    part: ClassVar[str] = "denoiser"

    def steps_of(self, request: GenerateRequest) -> int:
        return request.steps or USUAL_STEPS

    def check_way(self, request: GenerateRequest) -> None:
        """Raises ValueError for a sampler that there is not."""
        sampler(request.sampler)

    @torch.no_grad()
    def latents(self, rows: list[Row], begun: Begun | None = None) -> Iterator[Tensor]:
        """The latents after each step, for rows that share steps, sampler, guidance and what they begin from."""
        request = rows[0].request
        shape = self._shape
        x = torch.stack([self._noise(r) for r in rows]).to(self.device)
        streams = [torch_rng(r.seed, "generate/steps") for r in rows]

        def noise(_: int) -> Tensor:
            return torch.stack([torch.randn(shape, generator=g) for g in streams]).to(self.device)

        function = sampler(request.sampler).function
        extra = {"eta": request.eta} if function is sample_ddim and request.eta else {}
        ts = timesteps(self.path, self.steps_of(request))[-self.steps_taken(request, begun) - 1 :]
        if begun is not None:
            x = self.path.mix(begun.z.expand_as(x), x, ts[:1].expand(len(x)).to(x))
        for step in function(self._denoise(rows, begun), x, ts, self.path, noise=noise, **extra):
            yield step.x

    @property
    def _shape(self) -> tuple[int, int, int]:
        side = self.size // self.codec.spec.factor
        return self.codec.spec.latent_channels, side, side

    def _noise(self, row: Row) -> Tensor:
        own = torch.randn(self._shape, generator=torch_rng(row.seed, "generate/noise"))
        return own if row.toward is None else slerp(own, self._noise(row.toward), row.share)

    def _denoise(self, rows: list[Row], begun: Begun | None = None) -> Denoise:
        request = rows[0].request
        cond, empty = self._sides(rows)
        predict = Precond(self.denoiser, self.meta["prediction"], self.path, None if self.dtype == torch.float32 else self.dtype)
        post: list[Post] = [self._without_dead] if bool((self.codec.latent_std == 0).any()) else []
        if begun is not None and begun.mask is not None:
            post.append(inpaint(begun.z, begun.redraw()))
        if request.style_guidance is None:
            return guided(cfg(predict, cond, empty, request.guidance, request.guidance_interval), post)
        return guided(text_style(predict, cond, empty, self._neither(rows, empty), request.guidance, request.style_guidance), post)

    def _without_dead(self, x0: Tensor, *_: Any) -> Tensor:
        """Channels that the codec does not use stay 0, as training had them: nobody taught the denoiser what to say of them."""
        return x0 * (self.codec.latent_std > 0)[:, None, None]
