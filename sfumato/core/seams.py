"""The seams between the floors: what a codec, a bottleneck, a condition and a generator are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """What a codec turns an image into.

    `factor` is image pixels per latent cell and side; `mean` and `std` per channel standardise the latents; a channel whose
    `std` is 0 is dead: it always decodes from, and encodes to, zero. `codebook_size` and `levels` are 0 for continuous latents.
    """

    image_channels: int
    latent_channels: int
    factor: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    codebook_size: int = 0
    levels: int = 0


@dataclass(frozen=True)
class Latents:
    """An encoded batch: `mean` and `std` "b c h w" of a continuous posterior, or `indices` "b h w l" of a discrete one."""

    mean: Tensor | None = None
    std: Tensor | None = None
    indices: Tensor | None = None


class Codec(Protocol):
    """Image "b c h w" in [-1, 1] <-> latents. KL-VAE and VQGAN are one autoencoder with another bottleneck."""

    spec: LatentSpec

    def encode(self, x: Tensor, *, noise: Tensor | None = None) -> Latents: ...

    def decode(self, z: Tensor) -> Tensor: ...

    def decode_indices(self, indices: Tensor) -> Tensor: ...


class Bottleneck(Protocol):
    """Between encoder and decoder: `__call__(z_e) -> (z, loss, stats)`."""

    def __call__(self, z_e: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...

    def update(self, stats: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Cond:
    """What a generator is told. All fields are batched; None where a model has no such input.

    text "b n d" token states, mask "b n" True where a token is, pooled "b d", style "b s" weights over styles (all zero: no style),
    label "b" class index (-1: none), concat "b c h w" channels beside x (never scaled by c_in).
    """

    text: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    style: Tensor | None = None
    label: Tensor | None = None
    concat: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def map(self, f: Callable[[Tensor], Tensor]) -> Cond:
        """Applies f to every tensor."""
        values = {k: None if v is None else f(v) for k, v in self.__dict__.items() if k != "extra"}
        return Cond(**values, extra={k: f(v) for k, v in self.extra.items()})

    def __getitem__(self, rows: slice | Tensor) -> Cond:
        return self.map(lambda t: t[rows])


Predict = Callable[["Tensor", "Tensor", Cond], "Tensor"]
Denoise = Callable[["Tensor", "Tensor"], "Tensor"]
