"""`sfumato generate --morph`: one picture that turns into another, as WebP, GIF or animated PNG."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from sfumato.apps.cli import OUT, say
from sfumato.apps.draw import Generate, check_targets, finish, slug, teller, warn, where
from sfumato.core.checkpoint import write_bytes
from sfumato.core.images import exif_of, flatten
from sfumato.core.language import translated
from sfumato.core.request import METADATA_KEY, SOURCE_KEY, GenerateRequest, metadata_text

if TYPE_CHECKING:
    from sfumato.pipelines.generate import Model, Picture

KINDS = {".webp": "WEBP", ".gif": "GIF", ".png": "PNG", ".apng": "PNG"}
MOST_FRAMES = 600


def animate(asked: Generate, model: Model, requests: list[GenerateRequest]) -> None:
    """Draws the frames, there and back again, and writes them as one file."""
    if len(requests) != 1 or asked.sheet is not None or asked.style == "all":
        raise ValueError("morph goes from one prompt to another: give one prompt, one style and no sheet")
    frames, fps = 24 if asked.frames is None else asked.frames, 12.0 if asked.fps is None else asked.fps
    if not 2 <= frames <= MOST_FRAMES:
        raise ValueError(f"frames (={frames}) must be between 2 and {MOST_FRAMES}")
    if not 0.1 <= fps <= 60:
        raise ValueError(f"fps (={fps:g}) must be between 0.1 and 60")
    for name in ("morph", "morph_style"):
        if getattr(asked, name) == "":
            raise ValueError(f"{name} is empty: say what the animation ends with, or leave it out")
    first = model.complete(replace(requests[0], count=1))
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

        pictures = list(model.morph(first, last, frames, progress=progress))
    write_bytes(out, encode(pictures, last, out, fps))
    finish(out, asked.json, tell)


def encode(pictures: list[Picture], last: GenerateRequest, out: Path, fps: float) -> bytes:
    """The frames forwards and backwards, in a loop, towards the request `last`. GIF knows no half transparency: it is drawn over white."""
    kind = KINDS[out.suffix.lower()]
    frames = [p.image for p in pictures]
    frames = [*frames, *frames[-2:0:-1]]
    if kind == "GIF":
        frames = [flatten(f) for f in frames]
    options: dict[str, object] = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0}
    record = metadata_text(pictures[0].record | {"until": last, "frames": len(pictures), "fps": fps})
    match kind:
        case "PNG":
            info = PngInfo()
            info.add_itxt(SOURCE_KEY, pictures[0].source)
            info.add_itxt(METADATA_KEY, record)
            options["pnginfo"] = info
        case "GIF":
            options["comment"] = f"{pictures[0].source}\n{record}".encode()
        case _:
            options |= {"lossless": True, "exif": exif_of(pictures[0].source, record)}
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, **options)
    return buffer.getvalue()
