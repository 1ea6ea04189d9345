"""Pictures in memory and on disk: tensors to PIL and back, grids, PNG."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sfumato.core.checkpoint import write_bytes

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def to_pil(x: Float[Tensor, "b c h w"]) -> list[Image.Image]:
    """Images in [-1, 1] -> PIL. Four channels are RGBA with premultiplied alpha; PIL's RGBA is straight."""
    array = ((x.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(_straight(a) if a.shape[-1] == 4 else _to_u8(a).squeeze(-1) if a.shape[-1] == 1 else _to_u8(a)) for a in array]


def _to_u8(a: np.ndarray) -> np.ndarray:
    return (a * 255 + 0.5).astype(np.uint8)


def _straight(a: np.ndarray) -> np.ndarray:
    alpha = a[..., 3:]
    colour = np.where(alpha > 0.5 / 255, np.clip(a[..., :3] / np.maximum(alpha, 1e-6), 0, 1), 0)
    return _to_u8(np.concatenate([colour, alpha], axis=-1))


def flatten(image: Image.Image, colour: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """An RGBA picture over a plain ground, as RGB."""
    ground = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def grid(images: list[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures of one size side by side, row by row; transparent where they are."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    w, h = images[0].size
    sheet = Image.new("RGBA", (columns * (w + gap) - gap, rows * (h + gap) - gap), (0, 0, 0, 0))
    for i, image in enumerate(images):
        sheet.paste(image.convert("RGBA"), ((i % columns) * (w + gap), (i // columns) * (h + gap)))
    return sheet


def png_bytes(image: Image.Image, text: dict[str, str] | None = None) -> bytes:
    """PNG with text chunks (UTF-8 where needed)."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(path: Path, image: Image.Image, text: dict[str, str] | None = None) -> None:
    write_bytes(path, png_bytes(image, text))
