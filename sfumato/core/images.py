"""Pictures in memory and on disk: tensors to PIL and back, grids, PNG, and other people's files as they were meant to look."""

from __future__ import annotations

import contextlib
import io
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, features

from sfumato.core.checkpoint import write_bytes
from sfumato.core.request import METADATA_KEY, SOURCE_KEY

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


READABLE = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
MOST_PIXELS = 100_000_000
EXIF_DESCRIPTION, EXIF_MORE, EXIF_COMMENT = 0x010E, 0x8769, 0x9286  # ImageDescription, the IFD of Exif, its UserComment
SRGB = ImageCms.createProfile("sRGB")
STARTS = (  # what else a file named like a picture turns out to be
    (b"version https://git-lfs", "git-lfs", "is a Git LFS pointer, not the picture: run `git lfs pull` where it came from"),
    (b"%PDF", "not-a-picture", "is a PDF"),
    (b"PK\x03\x04", "not-a-picture", "is a zip archive: give it the ending .zip, or unpack it"),
    (b"\x1f\x8b", "not-a-picture", "is gzip data"),
)


class Unreadable(ValueError):
    """A picture that cannot be used; `kind` is one word for it, the message says what it is and what helps."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def decode(data: bytes, max_pixels: int = MOST_PIXELS) -> Image.Image:
    """The bytes of a picture -> PIL, RGB or RGBA with straight alpha, 8-bit sRGB, upright; of an animation the first frame.

    Turned by its EXIF orientation; colours converted by its ICC profile (a broken profile is taken for sRGB); 16-bit samples are rounded
    to 8 bits. Raises Unreadable.
    """
    if not data:
        raise Unreadable("empty", "is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in READABLE:
                raise Unreadable("format", f"is a {image.format} file: save it as PNG, JPEG or WebP")
            if image.width * image.height > max_pixels:
                raise Unreadable("too-large", f"has {image.width} x {image.height} pixels, more than {max_pixels:,}: make it smaller")
            image.seek(0)
            image.load()
            return _upright_srgb(image)
    except Image.DecompressionBombError:
        raise Unreadable("too-large", f"has more than {max_pixels:,} pixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise _what_else(data) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError) as e:
        if isinstance(e, Unreadable):
            raise
        cut = "truncated" in str(e).lower() or isinstance(e, EOFError) or _ends_early(data)
        said = " ".join(str(e).split()) or type(e).__name__
        raise (Unreadable("truncated", f"is cut off ({said})") if cut else Unreadable("damaged", f"is damaged ({said})")) from None


def _ends_early(data: bytes) -> bool:
    """Whether a PNG or JPEG lacks its end marker, or a WebP is shorter than it says."""
    if data.startswith(b"RIFF"):
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return (data.startswith(b"\x89PNG") and b"IEND" not in data[-64:]) or (data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-1024:])


def _what_else(data: bytes) -> Unreadable:
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    for start, kind, text in STARTS:
        if head.startswith(start):
            return Unreadable(kind, text)
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heim", b"heis"):
        return Unreadable("format", "is a HEIC photograph: export it as JPEG, or convert it (`heif-convert IN.heic OUT.jpg`)")
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        if features.check("avif"):
            return Unreadable("damaged", "begins like an AVIF picture and is damaged or cut off")
        return Unreadable("format", "is an AVIF picture and this Pillow cannot read it: install pillow>=11.3, or convert it to PNG")
    if head[:1] == b"<":
        drawing = b"<svg" in head[:256].lower()
        return Unreadable("html", "is an SVG drawing: render it to PNG first" if drawing else "is a web page, not a picture: download it again")
    if data.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8")):
        cut = len(data) < 64 or _ends_early(data)
        return Unreadable("truncated" if cut else "damaged", "is cut off" if cut else "begins like a picture and is damaged")
    if not any(data):
        return Unreadable("damaged", "holds nothing but zeros: its disk or its download failed")
    return Unreadable("not-a-picture", "is not a picture")


def _upright_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    with contextlib.suppress(struct.error, TypeError, KeyError, ValueError, SyntaxError, OSError, EOFError, IndexError):
        image = ImageOps.exif_transpose(image)  # EXIF data that cannot be read turns nothing; the picture itself is whole
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        image = _eight_bits(image)
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    alpha = image.convert("RGBA").getchannel("A") if transparent else None
    colours = image.convert("RGBA").convert("RGB") if transparent or image.mode == "P" else image
    rgb = _to_srgb(colours, profile).convert("RGB")
    if alpha is None or alpha.getextrema() == (255, 255):
        return rgb
    rgb.putalpha(alpha)
    return rgb


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image
    try:
        return ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), SRGB, outputMode="RGB")  # type: ignore[return-value]
    except (ImageCms.PyCMSError, OSError, ValueError):  # broken, or of another kind of colours than the picture has
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; numbers beyond 16 bits, or not in [0, 1] where they are fractions, have no agreed meaning."""
    values = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise Unreadable("format", f"holds numbers from {values.min():g} to {values.max():g} instead of 8- or 16-bit samples: save it as PNG or JPEG")
    return Image.fromarray((values / top * 255 + 0.5).astype(np.uint8))


def to_pil(x: Float[Tensor, "b c h w"]) -> list[Image.Image]:
    """Images in [-1, 1] -> PIL. Four channels are RGBA with premultiplied alpha; PIL's RGBA is straight."""
    array = ((x.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(_straight(a) if a.shape[-1] == 4 else _to_u8(a).squeeze(-1) if a.shape[-1] == 1 else _to_u8(a)) for a in array]


def to_tensor(image: Image.Image, channels: int) -> Float[Tensor, "1 {channels} h w"]:
    """PIL -> "1 c h w" in [-1, 1]: 4 channels are RGBA with premultiplied alpha, 3 are RGB over white, 1 is grey."""
    import torch

    if channels == 4:
        straight = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
        array = np.concatenate([straight[..., :3] * straight[..., 3:], straight[..., 3:]], axis=-1)
    else:
        array = np.atleast_3d(np.asarray(flatten(image) if channels == 3 else image.convert("L"), dtype=np.float32) / 255)
    return torch.from_numpy(array).permute(2, 0, 1)[None] * 2 - 1


def _to_u8(a: np.ndarray) -> np.ndarray:
    return (a * 255 + 0.5).astype(np.uint8)


def _straight(a: np.ndarray) -> np.ndarray:
    alpha = a[..., 3:]
    colour = np.where(alpha > 0.5 / 255, np.clip(a[..., :3] / np.maximum(alpha, 1e-6), 0, 1), 0)
    return _to_u8(np.concatenate([colour, alpha], axis=-1))


def premultiply(straight: np.ndarray) -> np.ndarray:
    """uint8 "h w 4" RGBA with straight alpha -> premultiplied, rounded to nearest."""
    alpha = straight[..., 3:].astype(np.uint16)
    rgb = (straight[..., :3].astype(np.uint16) * alpha + 127) // 255
    return np.concatenate([rgb, alpha], axis=-1).astype(np.uint8)


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


def exif_of(source: str, record: str) -> Image.Exif:
    """For formats without texts of their own (WebP): where a picture comes from, and its record."""
    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = source
    exif[EXIF_MORE] = {EXIF_COMMENT: b"UNICODE\0" + record.encode("utf-16-be")}
    return exif


def texts_in(image: Image.Image) -> dict[str, str]:
    """What one of our pictures says of itself, by the keys of its PNG; of a WebP from its EXIF, of a GIF from its comment. Empty for others."""
    source, record = "", b""
    if image.format in ("WEBP", "JPEG"):
        with contextlib.suppress(Exception):  # other people's EXIF is broken in many ways
            exif = image.getexif()
            source, record = exif.get(EXIF_DESCRIPTION), exif.get_ifd(EXIF_MORE).get(EXIF_COMMENT, b"")
        record = record.removeprefix(b"UNICODE\0").decode("utf-16-be", "replace") if isinstance(record, bytes) else ""
    elif image.format == "GIF":
        comment = image.info.get("comment", b"")
        source, _, record = (comment.decode("utf-8", "replace") if isinstance(comment, bytes) else "").partition("\n")
    else:
        return {k: v for k, v in image.info.items() if isinstance(v, str)}
    if record.startswith("{") and '"request"' in record:
        return {SOURCE_KEY: str(source), METADATA_KEY: record}
    return {"parameters": record} if "Steps: " in record else {}  # of another program


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
