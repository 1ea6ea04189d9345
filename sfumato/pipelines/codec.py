"""What a codec can do by itself: draw (a VAE of one vector a picture), go from one picture to another, show its codebook."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sfumato import zoo
from sfumato.codecs.autoencoder import Autoencoder
from sfumato.codecs.bottlenecks.residual import Residual
from sfumato.codecs.bottlenecks.vq import use_of
from sfumato.codecs.gaussians import draw_mixture
from sfumato.core.checkpoint import FileError
from sfumato.core.images import grid, to_pil, to_tensor
from sfumato.core.pack import load_pack
from sfumato.core.rng import torch_rng
from sfumato.data.folder import framed
from sfumato.nn.layers import slerp
from sfumato.pipelines.find import find

MOST_SHOWN = 1024  # codes of which a picture is drawn


@dataclass(frozen=True)
class LoadedCodec:
    """The codec of a pack, of a run of `sfumato train autoencoder`, or of a whole model; `prior` is what it was seen to encode pictures to."""

    codec: Autoencoder
    size: int
    prior: dict[str, Tensor]
    name: str
    hash: str

    @torch.no_grad()
    def draw(self, count: int, seed: int, *, fitted: bool = True) -> list[Image.Image]:
        """Pictures from the fitted prior, or from N(0, I); picture i has the seed + i. Raises ValueError for a codec that has no prior."""
        if fitted and not self.prior:
            raise ValueError(f"{self.name} has no prior: it does not draw by itself (train one with --preset vae), or name --prior normal")
        z = [draw_mixture(self.prior, g) if fitted else self._normal(g) for g in (torch_rng(seed + i, "sample/latent") for i in range(count))]
        return [image for part in torch.stack([self._as_latents(v) for v in z]).split(64) for image in to_pil(self.codec.decode(part))]

    def _normal(self, generator: torch.Generator) -> Tensor:
        """From the prior that the KL term is of, in the standardised units that `decode` takes."""
        c = self.codec
        shape = (c.spec.latent_channels, *[self.size // c.spec.factor] * 2)
        live = (c.latent_std > 0)[:, None, None]
        z = torch.randn(shape, generator=generator)
        return (z - c.latent_mean[:, None, None]) / torch.where(live, c.latent_std[:, None, None], 1.0) * live

    def _as_latents(self, z: Tensor) -> Tensor:
        side = self.size // self.codec.spec.factor
        return z.reshape(self.codec.spec.latent_channels, side, side)

    @torch.no_grad()
    def between(self, a: Image.Image, b: Image.Image, frames: int) -> list[Image.Image]:
        """Pictures from one to the other along the arc between their latents, both ends as the codec gives them back."""
        if frames < 2:
            raise ValueError(f"frames (={frames}) must be at least 2: the first and the last")
        ends = [self.codec.encode(self.tensor(p)).mean for p in (a, b)]
        return [to_pil(self.codec.decode(slerp(*ends, i / (frames - 1))))[0] for i in range(frames)]  # type: ignore[arg-type]

    def tensor(self, image: Image.Image) -> Float[Tensor, "1 c h w"]:
        """A picture as the codec takes it, framed as those that it learned from."""
        return to_tensor(framed(image, self.size), self.codec.spec.image_channels)

    @torch.no_grad()
    def codebook(self) -> tuple[Image.Image, dict[str, float], list[int]] | None:
        """(a picture of every code, drawn as a small patch of nothing else, the most used first; what was used; counts in that order).

        None for a codec without codes. Of residual codes the first level.
        """
        bottleneck: Any = self.codec.bottleneck
        if not self.codec.config.discrete:
            return None
        counts = bottleneck.counts[0] if isinstance(bottleneck, Residual) else bottleneck.counts
        order = torch.argsort(counts, descending=True, stable=True)
        shown = order[:MOST_SHOWN]
        patches = [self.codec.decode_indices(part[:, None, None, None].expand(-1, 2, 2, 1)) for part in shown.split(128)]
        tiles = [image.resize((16, 16), Image.Resampling.BOX) for part in patches for image in to_pil(part)]
        return grid(tiles, columns=32), use_of(counts), counts[order].tolist()


def load_codec(model: str | Path) -> LoadedCodec:
    """Raises FileError where there is no codec."""
    path = find(model)
    tensors, meta = load_pack(path)
    if "codec" not in meta or "size" not in meta:
        raise FileError(f"{path} holds no codec: name a run of `sfumato train autoencoder`, or a model")
    codec: Any = zoo.load_into(zoo.make(meta["codec"]), tensors, "codec.")
    own = "prior" not in meta  # of a codec; what a generator is called so is another thing
    prior = {k.removeprefix("prior."): v for k, v in tensors.items() if own and k.startswith("prior.")}
    return LoadedCodec(codec, int(meta["size"]), prior, str(model), meta["hash"])
