"""Drawing in one pass: the generator of a GAN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.core.request import GenerateRequest
from sfumato.core.rng import torch_rng
from sfumato.nn.layers import slerp
from sfumato.pipelines.generate import Begun, Model, Row


@dataclass(frozen=True, kw_only=True)
class GANModel(Model):
    """See `Model`; there is no codec, the generator draws pixels."""

    generator: nn.Module
    codec: None = None
    way: ClassVar[str] = "gan"
    part: ClassVar[str] = "generator"

    def steps_of(self, request: GenerateRequest) -> int:
        """One pass."""
        return 1

    def check_way(self, request: GenerateRequest) -> None:
        """Raises ValueError for an init picture, which nothing here turns into noise, and for a truncation that the network does not have."""
        if request.init is not None:
            raise ValueError(f"init (={request.init!r}) must be left out: this model draws from noise in one pass and begins from no picture")
        self.generator.check_truncation(request.truncation)  # type: ignore[operator]

    @torch.no_grad()
    def latents(self, rows: list[Row], begun: Begun | None = None) -> Iterator[Tensor]:
        """The pictures, in one step."""
        net: Any = self.generator
        z, noise = self._noise(rows, "generate/z", net.config.z), self._noise(rows, "generate/places", net.noises)
        asked, _ = self._sides(rows)
        w = net.truncated(z.to(self.dtype), asked.map(lambda v: v.to(self.dtype) if v.is_floating_point() else v), rows[0].request.truncation)
        yield net.draw(w, noise.to(self.dtype) if net.noises else None)

    def _noise(self, rows: list[Row], purpose: str, count: int) -> Tensor:
        def one(row: Row) -> Tensor:
            own = torch.randn(count, generator=torch_rng(row.seed, purpose))
            return own if row.toward is None else slerp(own, one(row.toward), row.share)

        return torch.stack([one(r) for r in rows]).to(self.device)

    def _decoded(self, z: Tensor) -> Tensor:
        return z.float()
