"""`sfumato generate`: from flags to files."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import secrets
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from sfumato.apps.cli import OUT, say
from sfumato.core.checkpoint import FileError, write_bytes
from sfumato.core.images import flatten, grid, png_bytes, texts_in
from sfumato.core.language import translated
from sfumato.core.request import (
    HEARD,
    METADATA_KEY,
    SEVERAL_KEY,
    SOURCE_KEY,
    TAG,
    THEIR_SCHEDULES,
    Device,
    GenerateRequest,
    metadata_text,
    parse_metadata,
    parse_parameters,
)

if TYPE_CHECKING:
    from sfumato.pipelines.generate import Model, Picture

CHINESE_FONTS = (  # where systems have one, in the order of preference
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "simhei.ttf",
)


@dataclass(frozen=True)
class Generate:
    """Draws pictures from words, in English or Chinese. Without a prompt it draws what it likes."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What to draw; several prompts give several pictures."""
    file: Annotated[Path | None, tyro.conf.arg(name="prompts")] = None
    """A text file of prompts, one a line (UTF-8)."""
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
    """Steps of the sampler (20), or in which codes are filled in (10)."""
    guidance: float | None = None
    """How strictly to follow the prompt: 1 is loosely, 3 the default (of Stable Diffusion 7.5, of XL 5)."""
    style_guidance: float | None = None
    """The same for the style, where it should differ."""
    guidance_interval: tuple[float, float] | None = None
    """Times between 0 (clean) and 1 (noise) at which guidance acts."""
    sampler: str | None = None
    """euler, ddim, ancestral, heun, lms, plms, unipc, dpmpp_2m (the default, but where a folder says), dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde, lcm."""
    schedule: str | None = None
    """When the network is asked: uniform, lambda (exponential), karras, edm, ays, ays-xl; of Stable Diffusion leading, trailing, linspace, lcm."""
    eta: float | None = None
    """Fresh noise in each step of the sampler ddim, 0 to 1."""
    truncation: float | None = None
    """Of GANs: how far to stray from what is usual; 1 as learned, 0.7 more alike."""
    temperature: float | None = None
    """Of models that draw codes: 1 as learned, 0 always the likeliest code."""
    top_k: int | None = None
    """Of models that draw codes: from so many of the likeliest (0: all)."""
    top_p: float | None = None
    """Of models that draw codes: from the likeliest that together have this probability (1: all)."""
    label: str | None = None
    """A class, for models trained on labels."""
    size: int | None = None
    """Pixels of a side; without it the largest that the model has."""
    native: bool = False
    """The size that the model draws, without the enlargement."""
    init: str | None = None
    """A picture to begin from: a doodle, a photograph, one of our own."""
    mask: str | None = None
    """Where to redraw the init picture: white there, black where it stays as it is; of the same size."""
    strength: float | None = None
    """How much of the init picture is drawn anew, above 0 (little) to 1 (0.6)."""
    width: int | None = None
    """Of Stable Diffusion: pixels from left to right."""
    height: int | None = None
    """Of Stable Diffusion: pixels from top to bottom."""
    clip_skip: int | None = None
    """Of Stable Diffusion: which block of the text encoder is heard, counted from its end (1: the last)."""
    guidance_rescale: float | None = None
    """Brings the contrast that guidance adds back, 0 (not) to 1 (arXiv 2305.08891 has 0.7)."""
    tiling: bool = False
    """Of Stable Diffusion: opposite edges fit together."""
    variation: float | None = None
    """How much of the noise is of --variation-seed instead, 0 to 1."""
    variation_seed: int | None = None
    """The seed of the other noise."""
    hires: float | None = None
    """Of Stable Diffusion: a second pass so many times as large."""
    hires_strength: float | None = None
    """How much is drawn anew in the second pass (0.5)."""
    noise: Literal["own", "diffusers", "a1111"] | None = None
    """Of Stable Diffusion: whose noise a seed stands for."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A LoRA, a file or a run of train lora, with its strength (a.safetensors:0.8); may be given several times."""
    embedding: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A file of learned words (textual inversion), or a run of train embedding; may be given several times."""
    extend: tuple[int, int, int, int] | None = None
    """Of Stable Diffusion: pixels to draw to the left, above, to the right and below of the init picture (with --strength 1)."""
    apg: float | None = None
    """How much of the guidance along the picture counts, which saturates colours: 0 to 1 (arXiv 2410.02416)."""
    fast: bool = False
    """A little different and, of models with a UNet, twice as fast: every third step is whole (others: no guidance at the end of the time)."""
    cache_interval: int | None = None
    """Of models with a UNet: at every how many-th step the whole network is asked (1: all), else its outermost blocks (arXiv 2312.00858)."""
    vae: Path | None = None
    """Of Stable Diffusion: another autoencoder, a file or a folder; a tiny one (TAESD), too."""
    preview: int = 0
    """Writes what the picture would be every so many steps, into preview.png beside it."""
    prediction: Literal["auto", "eps", "v"] = "auto"
    """What a checkpoint of Stable Diffusion predicts, where its file does not say."""
    averaged: bool = False
    """Of a single file of Stable Diffusion: its averages (EMA)."""
    variant: str | None = None
    """Of a folder of diffusers: the files that are called so (fp16)."""
    guide: str | None = None
    """A weaker model that guidance leans on, such as an earlier checkpoint of the same run (arXiv 2406.02507)."""
    morph: str | None = None
    """Another prompt: an animation from the first to this one, as .webp, .gif or .png."""
    morph_style: str | None = None
    """The style at the end of the animation."""
    morph_seed: int | None = None
    """The seed at its end."""
    frames: int | None = None
    """Pictures of the animation from its beginning to its end (24)."""
    fps: float | None = None
    """Pictures a second (12)."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Draw the request inside this picture or animation again; other flags change it."""
    force: bool = False
    """Overwrite files that exist."""
    json: bool = False
    """Say what happens as JSON lines on stdout, for programs: begin, step, picture, end."""
    model: str | None = None
    """A model file, a run folder or the name of a bundled model."""
    device: Device = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the network that draws."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    engine: Literal["auto", "eager", "openvino", "compile"] = "auto"
    """What computes the networks; auto is OpenVINO for Stable Diffusion on a CPU, where it is installed (pip install openvino), else eager."""
    low_memory: bool = False
    """Of Stable Diffusion on a CPU: weights of 16 bits stay so in memory."""


@dataclass(frozen=True)
class Job:
    """One request and where its pictures go; `only` draws one picture of it."""

    request: GenerateRequest
    files: tuple[Path, ...]
    only: int | None = None


def run(asked: Generate) -> None:
    """Draws what was asked; the path of the result is the last line on stdout."""
    from sfumato.pipelines.load import load

    asked = replace(asked, prompts=(*asked.prompts, *_lines(asked.file)))
    theirs = None if asked.source is None else their_request(asked.source, asked.sampler)
    record = None if asked.source is None or theirs is not None else read_record(asked.source)
    if record is not None and "until" in record:
        asked = _morph_again(asked, record)
    request, only = _request(asked, record) if theirs is None else (replace(theirs[0], **_changes(asked)), None)
    requests = [replace(request, prompt=p) for p in asked.prompts or (request.prompt,)]
    _check_files(asked, request)
    model = load(asked.model, **_engine(asked, record), **_loading(asked, record))
    if record is not None:
        _compare(model, record, again=only is not None)
    if theirs is not None and theirs[1] and not model.meta["hash"].startswith(theirs[1]):
        say(f"warning: it was drawn by the model {theirs[1]}, this is {model.meta['hash'][:10]}")
    _warn_of_flags(asked, morphs(asked))
    if asked.native and model.sized:
        say("warning: native has no effect: nothing enlarges what this model draws")
    elif asked.native:
        requests = [replace(r, size=model.size) for r in requests]
    for r in requests:
        model.check(r)
    if morphs(asked):
        from sfumato.apps.animate import animate

        return animate(asked, model, requests)
    styles = model.styles if asked.style == "all" else [request.style]
    jobs = _jobs(asked, requests, styles, only)
    files = [_png(asked.sheet, "sheet")] if asked.sheet else [f for j in jobs for f in j.files]
    check_targets(files + ([_grid_path(asked, jobs)] if len(files) > 1 else []), asked.force)
    say(f"{where(model)}, seed {request.seed}")
    tell = teller(asked.json)
    tell("begin", model=model.name, hash=model.meta["hash"], seed=request.seed, prompts=[r.prompt for r in requests])
    for r in requests:
        warn(model, r)
    if asked.sheet is not None:
        if asked.out is not None:
            say("warning: out has no effect together with sheet")
        _sheet(model, files[0], requests, styles, tell)
        return finish(files[0], asked.json, tell)
    with previews(model, asked.preview, jobs[0].files[0].with_name("preview.png")):
        pictures = _draw(model, jobs, tell)
    result = jobs[0].files[0]
    if len(pictures) > 1:
        result = _grid_path(asked, jobs)
        write_bytes(result, png_bytes(grid([p.image for p in pictures]), _several(pictures)))
        if not asked.json:
            print(*files, sep="\n")
    finish(result, asked.json, tell)


def _check_files(asked: Generate, request: GenerateRequest) -> None:
    """Refuses files that are not there, and those that must not be written, before a large model is read."""
    named = [("init", request.init), ("mask", request.mask), ("vae", asked.vae), *(("embedding", f) for f in request.embedding)]
    named += [("lora", f if Path(f).exists() else f.rpartition(":")[0] or f) for f in request.lora]
    for name, file in named:
        if file is not None and not Path(file).exists():
            raise FileError(f"{name} (={str(file)!r}): there is no such file")
    several = len(asked.prompts) > 1 or (asked.count or request.count) > 1 or asked.style == "all"
    if asked.out is not None and not morphs(asked) and not several and not asked.sheet:
        check_targets([_png(asked.out)], asked.force)
    if asked.preview < 0:
        raise ValueError(f"preview (={asked.preview}) must be at least 0: steps from one look to the next")


def morphs(asked: Generate) -> bool:
    return asked.morph is not None or asked.morph_style is not None or asked.morph_seed is not None


def _morph_again(asked: Generate, record: dict[str, Any]) -> Generate:
    """With the end of an animation that is asked for again."""
    start, end = record["request"], record["until"]
    flags = {"prompt": "morph", "style": "morph_style", "seed": "morph_seed"}
    changed = {flag: getattr(end, k) for k, flag in flags.items() if getattr(end, k) != getattr(start, k)}
    recorded = (changed or {"morph_seed": end.seed}) | {k: record[k] for k in ("frames", "fps")}
    return replace(asked, **{k: v for k, v in recorded.items() if getattr(asked, k) is None})


def _warn_of_flags(asked: Generate, morph: bool) -> None:
    """Says which flags have no effect together with others."""
    flags = (
        ("count", "with morph", morph and asked.count != 1),
        ("size", "together with native", asked.native),
        ("frames", "without --morph", not morph),
        ("fps", "without --morph", not morph),
    )
    for name, why, useless in flags:
        if useless and getattr(asked, name) is not None:
            say(f"warning: {name} has no effect {why}")


Tell = Callable[..., None]  # tell(event, **what)


def teller(as_json: bool) -> Tell:
    """Prints events as JSON lines, or says nothing."""

    def tell(event: str, **what: Any) -> None:
        if as_json:
            print(json.dumps({"event": event, **what}, ensure_ascii=False), flush=True)

    return tell


def finish(result: Path, as_json: bool, tell: Tell) -> None:
    tell("end", result=str(result))
    if not as_json:
        print(result)


def _lines(file: Path | None) -> list[str]:
    """The prompts of a file; empty lines are passed over. Raises FileError where it cannot be read or holds none."""
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise FileError(f"{file} is not UTF-8 text: save it as UTF-8") from None
    except OSError as e:
        raise FileError(f"prompts (={str(file)!r}) cannot be read: {e.strerror or e}") from None
    if not any(lines):
        raise FileError(f"{file} holds no prompt: write one a line")
    return [line for line in lines if line]


def _request(asked: Generate, record: dict[str, Any] | None) -> tuple[GenerateRequest, int | None]:
    """What to draw; with `only` the one picture of it that a record is of, where nothing about it was changed."""
    base = GenerateRequest() if record is None else record["request"]
    changed = _changes(asked)
    if record is not None and not changed and not asked.prompts and asked.sheet is None:
        return base, record["index"]
    if record is not None:  # a variation of that picture, not of the first one of its call
        changed = {"seed": record["seed"], "count": 1} | changed
    request = replace(base, **changed)
    if request.variation and request.variation_seed is None:
        request = replace(request, variation_seed=secrets.randbelow(2**31))
    return (request if request.seed is not None else replace(request, seed=secrets.randbelow(2**31))), None


def _engine(asked: Generate, record: dict[str, Any] | None) -> dict[str, Any]:
    """Device, dtype, threads and engine as asked for, else as the record says."""
    chosen: dict[str, Any] = {"device": asked.device, "dtype": asked.dtype, "threads": asked.threads, "engine": asked.engine}
    if record is None:
        return chosen | {"low_memory": asked.low_memory}
    threads = min(record["threads"], os.cpu_count() or 1)
    device = "cpu" if record["device"] == "cpu" else "auto"
    there = importlib.util.find_spec("openvino") and not asked.low_memory and asked.device in ("auto", "cpu") and asked.dtype in ("auto", "fp32")
    engine = "eager" if record["engine"].startswith("torch") else "openvino" if there else "auto"
    recorded = {"device": device, "dtype": record["dtype"], "threads": threads, "engine": engine}
    return {k: recorded[k] if v in ("auto", 0) else v for k, v in chosen.items()} | {"low_memory": asked.low_memory}


def _loading(asked: Generate, record: dict[str, Any] | None) -> dict[str, Any]:
    """What a model is loaded with, as asked for, else as the record says."""
    plain = Generate()
    said = {} if record is None else record.get("with", {})
    chosen = {name: getattr(asked, name) for name in ("prediction", "vae", "averaged", "variant", "guide")}
    found = {k: said[k] if k in said and v == getattr(plain, k) else v for k, v in chosen.items()}
    return found | {"vae": None if found["vae"] is None else Path(found["vae"])}


def _compare(model: Model, record: dict[str, Any], again: bool) -> None:
    """Refuses to pass another model's picture off as the same one; says what else is different."""
    import torch

    from sfumato.pipelines.generate import begun_digest

    drawn_by, ours = record["model"]["hash"], model.meta["hash"]
    if again and drawn_by != ours:
        raise ValueError(
            f"the picture was drawn by the model {record['model']['name']} {drawn_by[:10]}, this is {model.name} {ours[:10]}: "
            "name that model with --model, or give the prompt again to draw it with this one"
        )
    enlarged = (record.get("side", model.size), record.get("upscaler"))
    large = model.side(record["request"]) != model.size
    if again and enlarged != (model.side(record["request"]), model.upscaler_hash if large else None):
        raise ValueError(
            f"the picture has {enlarged[0]} x {enlarged[0]} pixels and was not made by the enlargement that is here: "
            "give the prompt again to draw it as it would be now"
        )
    if again and record["request"].init is not None and record.get("init_sha256") != begun_digest(record["request"]):
        raise ValueError(f"{record['request'].init} or its mask is not the picture that was begun from: it has changed, so it cannot be drawn again")
    for file, digest in record.get("files_sha256", {}).items() if again else ():
        if not Path(file).exists() or hashlib.sha256(Path(file).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{file} is not the file that the picture was drawn with: it has changed or is gone, so it cannot be drawn again")
    if again and record.get("with", {}) != model.meta.get("with", {}):
        raise ValueError(
            f"the picture was drawn with {_said(record.get('with', {}))}, this is {_said(model.meta.get('with', {}))}: "
            "name the same, or give the prompt again to draw it with this"
        )
    here = {"engine": model.engine.version, "device": model.device.type, "threads": torch.get_num_threads(), "machine": platform.machine()}
    other = [f"{k} {record[k]} instead of {v}" for k, v in here.items() if record.get(k, v) != v]
    if again and other:
        say(f"warning: it was drawn with {', '.join(other)}: the picture may differ by a level here and there")


def _said(loaded: dict[str, Any]) -> str:
    return ", ".join(f"{k} {str(v)[:10] if k.endswith('_hash') else v}" for k, v in loaded.items()) or "nothing more"


def their_request(source: Path, sampler: str | None = None) -> tuple[GenerateRequest, str] | None:
    """What AUTOMATIC1111's interface says in a picture of its own, and its model's hash; None in ours. What it says and is not taken is told."""
    try:
        with Image.open(source) as image:
            texts = texts_in(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    if "parameters" not in texts or METADATA_KEY in texts or SEVERAL_KEY in texts:
        return None
    request, found = parse_parameters(texts["parameters"], sampler)
    say(f"note: {source} was drawn by another program with the model {found.get('Model', '?')} ({found.get('Model hash', '?')})")
    left = [name for name in found if name not in HEARD]
    if found.get("Schedule type", "Automatic") not in (*THEIR_SCHEDULES, "Automatic"):
        left.append(f"Schedule type {found['Schedule type']}")
    if left:
        say(f"note: not taken of it: {', '.join(left)}")
    if "Denoising strength" in found and "Hires upscale" not in found:
        say("note: it was drawn from a picture: name that with --init")
    return request, found.get("Model hash", "")


def read_record(source: Path) -> dict[str, Any]:
    """The record inside one of our pictures: the request, and which of its pictures this is; of an animation, what it goes until, too."""
    try:
        with Image.open(source) as image:
            texts = texts_in(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise FileError(f"{source} is not a picture that can be read: {e}") from None
    if SEVERAL_KEY in texts:
        raise FileError(f"{source} shows several pictures: name one of them, or give the prompt again (sfumato info {source} prints it)")
    if METADATA_KEY not in texts:
        raise FileError(f"{source} holds no request of sfumato: it was drawn by something else, or its metadata was stripped")
    return parse_metadata(texts[METADATA_KEY])


def _several(pictures: list[Picture]) -> dict[str, str]:
    """The records of a grid or a sheet, for its PNG."""
    return {SEVERAL_KEY: "[" + ", ".join(metadata_text(p.record) for p in pictures) + "]", SOURCE_KEY: pictures[0].source}


def _changes(asked: Generate) -> dict[str, Any]:
    """The request fields that were given as flags."""
    given = {f.name: getattr(asked, f.name, None) for f in fields(GenerateRequest) if f.name not in ("prompt",)}
    if asked.style == "all":
        given["style"] = None
    return {k: v for k, v in given.items() if v is not None and v is not False and v != ()}


def where(model: Model) -> str:
    import torch

    from sfumato.pipelines.generate import DTYPES

    by = "" if model.engine.name == "eager" else f" by {model.engine.name}"
    return f"{model.name} on {model.device.type}{by}, {DTYPES[model.dtype]}, {torch.get_num_threads()} threads"


def warn(model: Model, r: GenerateRequest) -> None:
    """Says which options have no effect and which words mean nothing to the model."""
    usual = GenerateRequest()
    diffusion, gan = model.way == "diffusion", model.way == "gan"
    codes = not diffusion and not gan
    for name in (f.name for f in fields(r) if getattr(r, f.name) != getattr(usual, f.name)):
        if name in ("temperature", "top_k", "top_p") and not codes:
            say(f"warning: {name} has no effect: it is for models that draw codes")
        if name in ("sampler", "eta", "guidance_interval") and not diffusion:
            say(f"warning: {name} has no effect: it is for models that draw by diffusion")
        if name in ("guidance", "style_guidance", "negative") and gan:
            say(f"warning: {name} has no effect: it is for models that draw in steps")
        if name == "truncation" and not gan:
            say(f"warning: {name} has no effect: it is for GANs")
    if codes and not model.guided and (r.guidance, r.style_guidance) != (usual.guidance, None):  # type: ignore[attr-defined]
        say("warning: guidance has no effect: this model never learned to draw with nothing said")
    if codes and r.mask is not None and r.strength != usual.strength:
        say("warning: strength has no effect together with mask: what that shows is drawn anew")
    if model.way == "gpt" and r.steps is not None:
        say("warning: steps has no effect: this model draws one code after the other")
    if gan and r.label is not None and float(model.generator.told.share) < 1:  # type: ignore[attr-defined]
        say(f"warning: label counts by {float(model.generator.told.share):.0%} only: this pair had not heard of classes in full yet")  # type: ignore[attr-defined]
    if gan and r.steps is not None:
        say("warning: steps has no effect: this model draws in one pass")
    sampler = r.sampler or model.usual.get("sampler")
    if diffusion and r.eta and sampler != "ddim":
        say(f"warning: eta has no effect with the sampler {sampler}; it is for ddim")
    guided = getattr(model, "guide", None) is not None
    if r.style_guidance is not None and diffusion and not model.styles:
        say("warning: style_guidance has no effect: this model has no styles")
    if r.init is not None and model.sized and r.extend is None and r.width is None and r.height is None:
        large, (height, width) = model.init_size(r), model.extent(r)  # type: ignore[attr-defined]
        if large[0] > width + 8 or large[1] > height + 8:
            say(f"note: {r.init} has {large[0]} x {large[1]} pixels and is drawn at {width} x {height}: --width and --height say otherwise")
    for name in ("negative", "style_guidance"):
        if guided and getattr(r, name) is not None:
            say(f"warning: {name} has no effect together with guide")
    if r.negative and r.guidance == 1 and r.style_guidance in (None, 1):
        say("warning: negative has no effect at guidance 1")
    if diffusion and r.guidance_interval and (r.guidance == 1 or r.style_guidance is not None):
        say("warning: guidance_interval has no effect at guidance 1 or together with style_guidance")
    if r.strength != usual.strength and r.init is None:
        say("warning: strength has no effect without --init")
    if r.variation_seed is not None and not r.variation:
        say("warning: variation_seed has no effect without --variation")
    for name, _ in TAG.findall(r.prompt or "") if model.sized else ():
        if name not in [Path(f.rpartition(":")[0] or f).stem for f in r.lora]:
            say(f"warning: {name}, a LoRA named in the prompt, has no effect: name its file with --lora")
    if model.sized and r.prompt and (odd := re.search(r"\[[^\[\]:]*:[^\[\]]*\]|\[[^\[\]]*\|[^\[\]]*\]|\bAND\b", r.prompt)):
        say(f"warning: {odd.group()[:40]!r} is heard as words: prompts that change with the steps and AND are not here")
    if model.sized and r.prompt and re.search(r"[\u3400-\u9fff]", r.prompt):
        say("note: the text encoders of Stable Diffusion learned from English: Chinese words mean little to them")
    if r.prompt and (shown := model.people(r.prompt)):
        say(f"note: this model draws no people and no faces: {shown!r} gives what goes with it at most")
    taught = taught_words(r) if model.words else set()
    for text in (r.prompt, r.negative):
        if text and model.too_long(text):
            say(f"warning: {text[:30]!r}... is longer than this model hears ({model.text.config.tokens} tokens): its end has no effect")  # type: ignore[union-attr]
        for word, near in model.unknown(text) if text else []:
            if word in taught:
                continue
            say(f"note: {word!r} is not a word this model knows" + (f"; near: {', '.join(near)}" if near else ""))


def taught_words(r: GenerateRequest) -> set[str]:
    """What a request's learned words and LoRAs add to the words that its model knows."""
    from sfumato.convert.kohya import read_embedding, said_of
    from sfumato.pipelines.find import named_file, strength_of
    from sfumato.text.words import normalise, strange_words

    words = [name for file in r.embedding for name in read_embedding(named_file(file))]
    words += [said_of(strength_of(file, r.prompt)[0], "prompt") or "" for file in r.lora]
    return {part for w in words for part in strange_words(normalise(str(w)), ())}


def _jobs(asked: Generate, requests: list[GenerateRequest], styles: list[str | None], only: int | None) -> list[Job]:
    pairs = [(r, s) for r in requests for s in styles]
    alone = len(pairs) == 1 and (requests[0].count == 1 or only is not None)
    jobs, number, taken = [], 0, set()
    for r, style in pairs:
        wanted = range(r.count) if only is None else [only]
        files = []
        for i in wanted:
            number += 1
            if asked.out is not None:
                files.append(_png(asked.out) if alone else _png(asked.out).with_stem(f"{_png(asked.out).stem}-{number}"))
            else:
                named = [slug(r.prompt), *([slug(style)] if style else []), str(r.seed + i), *([] if r.size is None else [str(r.size)])]  # type: ignore[operator]
                files.append(_free(OUT / f"{'-'.join(named)}.png", taken))
        jobs.append(Job(replace(r, style=style), tuple(files), only))
    return jobs


def _free(path: Path, taken: set[str]) -> Path:
    """The path, numbered where an earlier picture of this call has it: prompts may differ only in what a file name cannot show."""
    wanted, n = path, 1
    while str(wanted).casefold() in taken:
        n += 1
        wanted = path.with_stem(f"{path.stem}-{n}")
    taken.add(str(wanted).casefold())
    return wanted


def _png(path: Path, what: str = "out") -> Path:
    if path.is_dir() or path.suffix.lower() not in ("", ".png"):
        raise ValueError(f"{what} (={str(path)!r}) must be a file that ends in .png: PNG keeps transparency and the request")
    return path.with_suffix(".png")


def slug(text: str | None) -> str:
    """A prompt as part of a file name: letters and digits of any script."""
    return re.sub(r"[^\w]+", "-", text or "untitled").strip("-_")[:48] or "picture"


def _grid_path(asked: Generate, jobs: list[Job]) -> Path:
    if asked.out is not None:
        return _png(asked.out).with_stem(_png(asked.out).stem + "-grid")
    first = jobs[0].files[0]
    return first.with_stem(f"{first.stem}-grid")


def check_targets(paths: list[Path], force: bool) -> None:
    """Refuses what cannot or must not be written before anything is drawn."""
    for path in paths:
        if path.is_dir():
            raise FileError(f"{path} is a folder: name a .png file")
        if path.exists() and not force:
            raise FileError(f"{path} exists: use --force to overwrite it, or another --out")
        folder = next(p for p in path.absolute().parents if p.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise FileError(f"cannot write {path}: {folder} is not a folder that may be written to")


@contextmanager
def previews(model: Model, every: int, path: Path) -> Iterator[None]:
    """Writes what the picture would be after every so many steps; nothing stays of it when the pictures are there."""
    if every < 0:
        raise ValueError(f"preview (={every}) must be at least 0: steps from one look to the next")
    watchers: list[Any] | None = getattr(model, "watchers", None)
    if not every or watchers is None:
        if every:
            say("warning: preview has no effect: it is for models that draw by diffusion")
        yield
        return
    from sfumato.core.images import to_pil

    def watch(step: int, x0: Any) -> None:
        if (step + 1) % every == 0:
            write_bytes(path, png_bytes(grid(to_pil(model.decode(x0))), {}))

    watchers.append(watch)
    try:
        yield
    finally:
        watchers.remove(watch)
        path.unlink(missing_ok=True)


def _draw(model: Model, jobs: list[Job], tell: Tell) -> list[Picture]:
    """Draws all jobs under one progress bar; each picture is written as soon as it is there."""
    pictures = []
    with tqdm(total=0, unit="step", leave=False, desc=translated("drawing"), dynamic_ncols=True) as bar:
        for j, job in enumerate(jobs):

            def progress(done: int, total: int, j: int = j) -> None:
                bar.total = total * len(jobs)
                bar.n = total * j + done
                bar.refresh()
                tell("step", done=bar.n, total=bar.total)

            for picture, file in zip(model.pictures(job.request, progress=progress, only=job.only), job.files, strict=True):
                write_bytes(file, picture.png())
                tell("picture", file=str(file), prompt=picture.request.prompt, seed=picture.seed, style=picture.record["style"])
                pictures.append(picture)
    return pictures


def _sheet(model: Model, path: Path, requests: list[GenerateRequest], styles: list[str | None], tell: Tell) -> None:
    """All prompts in all styles as one picture, over white, with the names of what can be written."""
    with tqdm(unit="step", leave=False, desc=translated("drawing"), dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()
            tell("step", done=done, total=total)

        pictures = list(model.draw([replace(r, style=s) for r in requests for s in styles], progress=progress))
    columns = len(styles) * requests[0].count
    side = model.side(requests[0]) * max(1, 128 // model.side(requests[0]))
    big = [flatten(p.image).resize((side, side), Image.Resampling.LANCZOS) for p in pictures]
    page = labelled(grid(big, columns=columns, gap=4), [s or "" for s in styles], [r.prompt or "" for r in requests])
    write_bytes(path, png_bytes(page, _several(pictures)))
    for row, r in enumerate(requests, 1):
        say(f"row {row}: {r.prompt or '(no prompt)'}, seed {r.seed}")


def labelled(sheet: Image.Image, heads: list[str], rows: list[str]) -> Image.Image:
    """A margin with style names above and prompts at the left; prompts that no font at hand can write are numbered."""
    font = ImageFont.load_default(14)
    chinese = None if all(r.isascii() for r in rows) else _chinese_font()
    left, top = 112, 24
    page = Image.new("RGB", (sheet.width + left, sheet.height + top), "white")
    page.paste(sheet, (left, top), sheet)
    draw = ImageDraw.Draw(page)
    tall = sheet.height / len(rows)
    for i, head in enumerate(heads):
        draw.text((left + (i + 0.5) * sheet.width / len(heads), top / 2), head, fill="black", font=font, anchor="mm")
    for i, text in enumerate(rows):
        if text.isascii() or chinese is None:
            writer, lines = font, textwrap.wrap(text if text.isascii() else f"row {i + 1}", 14)
        else:
            writer, lines = chinese, textwrap.wrap(text, 7)
        draw.text((6, top + (i + 0.5) * tall), "\n".join(lines[:5]), fill="black", font=writer, anchor="lm")
    return page


def _chinese_font() -> ImageFont.FreeTypeFont | None:
    """A font of this system that has Chinese letters; None where there is none."""
    for name in CHINESE_FONTS:
        try:
            return ImageFont.truetype(name, 14)
        except OSError:
            continue
    return None
