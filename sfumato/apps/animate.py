"""`sfumato generate --morph`: one picture that turns into another, as WebP, GIF or animated PNG."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from sfumato.apps.cli import OUT, say
from sfumato.apps.draw import Generate, check_targets, finish, slug, teller, warn, where
from sfumato.core.checkpoint import write_bytes
from sfumato.core.images import flatten
from sfumato.core.language import translated
from sfumato.core.request import METADATA_KEY, SOURCE_KEY, GenerateRequest, metadata_text

if TYPE_CHECKING:
    from sfumato.pipelines.generate import LatentDiffusion, Picture

KINDS = {".webp": "WEBP", ".gif": "GIF", ".png": "PNG", ".apng": "PNG"}
MOST_FRAMES = 600


def animate(asked: Generate, model: LatentDiffusion, requests: list[GenerateRequest]) -> None:
    """Draws the frames, there and back again, and writes them as one file."""
    if len(requests) != 1 or asked.sheet is not None or asked.style == "all":
        raise ValueError("morph goes from one prompt to another: give one prompt, one style and no sheet")
    if not 2 <= asked.frames <= MOST_FRAMES:
        raise ValueError(f"frames (={asked.frames}) must be between 2 and {MOST_FRAMES}")
    if not 0.1 <= asked.fps <= 60:
        raise ValueError(f"fps (={asked.fps:g}) must be between 0.1 and 60")
    first = replace(requests[0], count=1)
    seed = first.seed if asked.morph_seed is None else asked.morph_seed
    last = replace(first, prompt=asked.morph or first.prompt, style=asked.morph_style or first.style, seed=seed)
    model.check(last)
    out = asked.out or OUT / f"{slug(first.prompt)}-to-{slug(asked.morph or asked.morph_style or str(seed))}-{first.seed}.webp"
    if out.suffix.lower() not in KINDS:
        raise ValueError(f"out (={str(out)!r}) must end in one of {', '.join(KINDS)} for an animation")
    check_targets([out], asked.force)
    say(f"{where(model)}, seed {first.seed}")
    tell = teller(asked.json)
    tell("begin", model=model.name, hash=model.meta["hash"], seed=first.seed, prompts=[first.prompt, last.prompt])
    for r in (first, last):
        warn(model, r)
    with tqdm(unit="step", leave=False, desc=translated("drawing"), dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()
            tell("step", done=done, total=total)

        pictures = list(model.morph(first, last, asked.frames, progress=progress))
    write_bytes(out, encode(pictures, last, out, asked.fps))
    finish(out, asked.json, tell)


def encode(pictures: list[Picture], last: GenerateRequest, out: Path, fps: float) -> bytes:
    """The frames forwards and backwards, in a loop, towards the request `last`. GIF knows no half transparency: it is drawn over white."""
    kind = KINDS[out.suffix.lower()]
    frames = [p.image for p in pictures]
    frames = [*frames, *frames[-2:0:-1]]
    if kind == "GIF":
        frames = [flatten(f) for f in frames]
    options: dict[str, object] = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0}
    record = metadata_text(pictures[0].record | {"until": last, "frames": len(pictures)})
    match kind:
        case "PNG":
            info = PngInfo()
            info.add_itxt(SOURCE_KEY, pictures[0].source)
            info.add_itxt(f"{METADATA_KEY}-morph", record)
            options["pnginfo"] = info
        case "GIF":
            options["comment"] = pictures[0].source.encode()
        case _:
            exif = Image.Exif()
            exif[0x010E] = pictures[0].source  # ImageDescription
            options |= {"lossless": True, "exif": exif}
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, **options)
    return buffer.getvalue()
