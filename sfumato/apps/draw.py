"""`sfumato generate`: from flags to files."""

from __future__ import annotations

import os
import re
import secrets
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from sfumato.core.checkpoint import FileError, write_bytes
from sfumato.core.images import flatten, grid, png_bytes
from sfumato.core.request import METADATA_KEY, GenerateRequest, parse_metadata

if TYPE_CHECKING:
    from sfumato.pipelines.generate import LatentDiffusion, Picture

OUT = Path("sfumato-out")


@dataclass(frozen=True)
class Generate:
    """Draws pictures from words, in English or Chinese. Without a prompt it draws what it likes."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What to draw; several prompts give several pictures."""
    style: str | None = None
    """A style, shares of several ("noto:0.5,twemoji:0.5"), or "all"; without it each seed draws its own mixture."""
    seed: int | None = None
    """Picture i has seed + i; without it a random one is chosen and printed."""
    count: int | None = None
    """Pictures per prompt."""
    out: Path | None = None
    """The PNG to write; without it one in sfumato-out/ named after prompt and seed."""
    sheet: Path | None = None
    """One picture of all prompts (rows) in all styles (columns)."""
    negative: str | None = None
    """What should not be seen."""
    steps: int | None = None
    """Steps of the sampler (20)."""
    guidance: float | None = None
    """How strictly to follow the prompt: 1 is loosely, 3 the default."""
    style_guidance: float | None = None
    """The same for the style, where it should differ."""
    guidance_interval: tuple[float, float] | None = None
    """Times between 0 (clean) and 1 (noise) at which guidance acts."""
    sampler: str | None = None
    """euler, ddim, ancestral, heun or dpmpp_2m (the default)."""
    eta: float | None = None
    """Fresh noise in each step of the sampler ddim, 0 to 1."""
    label: str | None = None
    """A class, for models trained on labels."""
    size: int | None = None
    """Pixels of a side; models draw the size they were trained at."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Draw the request inside this PNG again; other flags change it."""
    force: bool = False
    """Overwrite files that exist."""
    model: str | None = None
    """A model file, a run folder or the name of a bundled model."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the denoiser."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""


@dataclass(frozen=True)
class Job:
    """One request and where its pictures go; `only` draws one picture of it."""

    request: GenerateRequest
    files: tuple[Path, ...]
    only: int | None = None


def say(text: str) -> None:
    print(text, file=sys.stderr)


def run(asked: Generate) -> None:
    """Draws what was asked; the path of the result is the last line on stdout."""
    from sfumato.pipelines.load import load

    base, only = (GenerateRequest(), None) if asked.source is None else read_request(asked.source)
    changed = _changes(asked)
    if changed or asked.prompts:
        only = None
    request = replace(base, **changed, **({"count": 1} if asked.source is not None and only is None and "count" not in changed else {}))
    if request.seed is None:
        request = replace(request, seed=secrets.randbelow(2**31))
    prompts: list[str | None] = list(asked.prompts) or [request.prompt]
    requests = [replace(request, prompt=p) for p in prompts]
    model = load(asked.model, device=asked.device, dtype=asked.dtype, threads=asked.threads)
    for r in requests:
        model.check(r)
    styles = model.styles if asked.style == "all" else [request.style]
    jobs = _jobs(asked, requests, styles, only)
    files = [_png(asked.sheet)] if asked.sheet else [f for j in jobs for f in j.files]
    _check_targets(files + ([_grid_path(asked, jobs)] if len(files) > 1 else []), asked.force)
    say(f"{_where(model)}, seed {request.seed}")
    for r in requests:
        _warn(model, r)
    if asked.sheet is not None:
        return _sheet(model, asked, requests, styles)
    pictures = _draw(model, jobs)
    result = jobs[0].files[0]
    if len(pictures) > 1:
        result = _grid_path(asked, jobs)
        write_bytes(result, png_bytes(grid([p.image for p in pictures])))
    print(result)


def read_request(source: Path) -> tuple[GenerateRequest, int]:
    """The request inside one of our PNGs, and which of its pictures this is."""
    try:
        with Image.open(source) as image:
            text = image.info.get(METADATA_KEY)
    except (OSError, SyntaxError, ValueError) as e:
        raise FileError(f"{source} is not a picture that can be read: {e}") from None
    if text is None:
        raise FileError(f"{source} holds no request of sfumato: it was drawn by something else, or its metadata was stripped")
    record = parse_metadata(text)
    return record["request"], int(record["index"])


def _changes(asked: Generate) -> dict[str, Any]:
    """The request fields that were given as flags."""
    given = {f.name: getattr(asked, f.name, None) for f in fields(GenerateRequest) if f.name not in ("prompt",)}
    if asked.style == "all":
        given["style"] = None
    return {k: v for k, v in given.items() if v is not None}


def _where(model: LatentDiffusion) -> str:
    import torch

    return f"{model.name} on {model.device.type}, {str(model.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"


def _warn(model: LatentDiffusion, r: GenerateRequest) -> None:
    """Says which options have no effect and which words mean nothing to the model."""
    if r.eta and r.sampler != "ddim":
        say(f"warning: eta has no effect with the sampler {r.sampler}; it is for ddim")
    if r.negative and r.guidance == 1:
        say("warning: negative has no effect at guidance 1")
    if r.guidance_interval and (r.guidance == 1 or r.style_guidance is not None):
        say("warning: guidance_interval has no effect at guidance 1 or together with style_guidance")
    for text in (r.prompt, r.negative):
        for word, near in model.unknown(text) if text else []:
            say(f"note: {word!r} is not a word this model knows" + (f"; near: {', '.join(near)}" if near else ""))


def _jobs(asked: Generate, requests: list[GenerateRequest], styles: list[str | None], only: int | None) -> list[Job]:
    pairs = [(r, s) for r in requests for s in styles]
    alone = len(pairs) == 1 and (requests[0].count == 1 or only is not None)
    jobs, number = [], 0
    for r, style in pairs:
        wanted = range(r.count) if only is None else [only]
        files = []
        for i in wanted:
            number += 1
            if asked.out is not None:
                files.append(_png(asked.out) if alone else _png(asked.out).with_stem(f"{_png(asked.out).stem}-{number}"))
            else:
                files.append(OUT / f"{slug(r.prompt)}{f'-{slug(style)}' if style else ''}-{r.seed + i}.png")  # type: ignore[operator]
        jobs.append(Job(replace(r, style=style), tuple(files), only))
    return jobs


def _png(path: Path) -> Path:
    if path.suffix.lower() not in ("", ".png"):
        raise ValueError(f"out (={str(path)!r}) must end in .png: pictures are written as PNG, which keeps transparency and the request")
    return path.with_suffix(".png")


def slug(text: str | None) -> str:
    """A prompt as part of a file name: letters and digits of any script."""
    return re.sub(r"[^\w]+", "-", text or "untitled").strip("-_")[:48] or "picture"


def _grid_path(asked: Generate, jobs: list[Job]) -> Path:
    if asked.out is not None:
        return _png(asked.out).with_stem(_png(asked.out).stem + "-grid")
    first = jobs[0]
    return OUT / f"{slug(first.request.prompt)}-{first.request.seed}-grid.png"


def _check_targets(paths: list[Path], force: bool) -> None:
    """Refuses what cannot or must not be written before anything is drawn."""
    for path in paths:
        if path.is_dir():
            raise FileError(f"{path} is a folder: name a .png file")
        if path.exists() and not force:
            raise FileError(f"{path} exists: use --force to overwrite it, or another --out")
        folder = next(p for p in path.absolute().parents if p.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise FileError(f"cannot write {path}: {folder} is not a folder that may be written to")


def _draw(model: LatentDiffusion, jobs: list[Job]) -> list[Picture]:
    """Draws all jobs under one progress bar; each picture is written as soon as it is there."""
    pictures = []
    with tqdm(total=0, unit="step", leave=False, desc="drawing", dynamic_ncols=True) as bar:
        for j, job in enumerate(jobs):

            def progress(done: int, total: int, j: int = j) -> None:
                bar.total = total * len(jobs)
                bar.n = total * j + done
                bar.refresh()

            for picture, file in zip(model.pictures(job.request, progress=progress, only=job.only), job.files, strict=True):
                write_bytes(file, picture.png())
                pictures.append(picture)
    return pictures


def _sheet(model: LatentDiffusion, asked: Generate, requests: list[GenerateRequest], styles: list[str | None]) -> None:
    """All prompts in all styles as one picture, over white, with the names of what can be written."""
    path = _png(asked.sheet)  # type: ignore[arg-type]
    jobs = [Job(replace(r, style=s), (), None) for r in requests for s in styles]
    images: list[Image.Image] = []
    with tqdm(total=len(jobs), unit="picture", leave=False, desc="drawing", dynamic_ncols=True) as bar:
        for job in jobs:
            images += [p.image for p in model.pictures(job.request)]
            bar.update(1)
    columns = len(styles) * requests[0].count
    scale = max(1, 128 // model.size)
    big = [flatten(i).resize((i.width * scale, i.height * scale), Image.Resampling.LANCZOS) for i in images]
    write_bytes(path, png_bytes(labelled(grid(big, columns=columns, gap=4), [s or "" for s in styles], [r.prompt or "" for r in requests])))
    for row, r in enumerate(requests, 1):
        say(f"row {row}: {r.prompt or '(no prompt)'}, seed {r.seed}")
    print(path)


def labelled(sheet: Image.Image, heads: list[str], rows: list[str]) -> Image.Image:
    """A margin with style names above and prompts at the left; prompts that Pillow's own font cannot write are numbered."""
    font = ImageFont.load_default(14)
    left, top = 112, 24
    page = Image.new("RGB", (sheet.width + left, sheet.height + top), "white")
    page.paste(sheet, (left, top), sheet)
    draw = ImageDraw.Draw(page)
    tall = sheet.height / len(rows)
    for i, head in enumerate(heads):
        draw.text((left + (i + 0.5) * sheet.width / len(heads), top / 2), head, fill="black", font=font, anchor="mm")
    for i, text in enumerate(rows):
        shown = text if text.isascii() else f"row {i + 1}"
        draw.text((6, top + (i + 0.5) * tall), "\n".join(re.findall(r".{1,14}(?:\s|$)", shown) or [shown[:14]]), fill="black", font=font, anchor="lm")
    return page
